#![forbid(unsafe_code)]
//! In the place of `tls` where that feature is off: types of which there is no value, so that nobody else need ask.

use std::io;

use crate::error::Failure;
use crate::memory::gather::Sent;
use crate::net::{Address, Encryption, Endpoint, Stream};
use crate::sys::socket::Socket;

/// What encrypts connections: nothing.
#[derive(Clone, Debug)]
pub(crate) enum Tls {}

impl Tls {
    pub fn check(&self, _endpoint: &Endpoint) -> Result<(), Failure> {
        match *self {}
    }

    pub fn connect(&self, _socket: Socket, _address: Option<&Address>) -> io::Result<Stream> {
        match *self {}
    }

    pub fn accept(&self, _socket: Socket, _first: bool) -> io::Result<Stream> {
        match *self {}
    }
}

/// One connection's encryption.
#[derive(Debug)]
pub(crate) enum Session {}

impl Session {
    pub fn set_nonblocking(&mut self, _nonblocking: bool) {
        match *self {}
    }

    pub fn make_room_for_pages(&mut self) {
        match *self {}
    }

    pub fn shake_hands(&mut self, _socket: &Socket) -> io::Result<bool> {
        match *self {}
    }

    pub fn encryption(&self) -> Option<Encryption> {
        match *self {}
    }

    pub fn send(&mut self, _socket: &Socket, _bytes: &[u8]) -> io::Result<usize> {
        match *self {}
    }

    pub fn flush(&mut self, _socket: &Socket) -> io::Result<()> {
        match *self {}
    }

    pub fn unsent_bytes(&self) -> usize {
        match *self {}
    }

    pub fn recv_with(&mut self, _socket: &Socket, _take: impl FnMut(&[u8]) -> usize) -> io::Result<usize> {
        match *self {}
    }

    pub fn has_received(&self) -> bool {
        match *self {}
    }

    pub fn say_goodbye(&mut self, _socket: &Socket) -> bool {
        match *self {}
    }

    pub fn send_from(&mut self, _socket: &Socket, _fill: impl FnMut(&mut [u8]) -> usize) -> io::Result<Sent> {
        match *self {}
    }
}
