//! In the place of `inflate` and `deflate` where the feature is off: types of which there is no value, so that nobody else
//! need ask.

#![forbid(unsafe_code)]

use super::{PackError, PackFault};
use crate::qemu::wire::Compression;

fn unavailable(method: Compression) -> PackError {
    let reason = "this build has no compression: its feature `qemu-compression` is off";
    PackError { method, at: 0, fault: PackFault::Unavailable { reason } }
}

/// What a channel's compressed data would be read with.
#[derive(Debug)]
pub enum Inflate {}

impl Inflate {
    /// Fails.
    ///
    /// # Errors
    ///
    /// Always.
    pub fn new(method: Compression) -> Result<Inflate, PackError> {
        Err(unavailable(method))
    }

    /// How the channel is compressed.
    pub const fn method(&self) -> Compression {
        match *self {}
    }

    /// Fills `pages`.
    ///
    /// # Errors
    ///
    /// None: there is nobody to ask.
    pub fn packet(&mut self, _data: &[u8], _pages: &mut [u8]) -> Result<(), PackError> {
        match *self {}
    }
}

/// What a channel's pages would be compressed with.
#[derive(Debug)]
pub enum Deflate {}

impl Deflate {
    /// Fails.
    ///
    /// # Errors
    ///
    /// Always.
    pub fn new(method: Compression) -> Result<Deflate, PackError> {
        Err(unavailable(method))
    }

    /// How the channel is compressed.
    pub const fn method(&self) -> Compression {
        match *self {}
    }

    /// The data of a packet.
    ///
    /// # Errors
    ///
    /// None: there is nobody to ask.
    pub fn packet(&mut self, _pages: &[u8]) -> Result<&[u8], PackError> {
        match *self {}
    }
}
