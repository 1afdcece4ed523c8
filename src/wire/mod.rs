//! The wire, version 1: every byte that travels, as pure functions over bytes. No I/O, no clock, no threads.
//!
//! All numbers are little-endian. There are three kinds of message:
//!
//! - a [`hello::Hello`] of 64 bytes is the first thing on every connection, in both directions;
//! - [`control`] frames follow it on the control connection: [`control::SourceFrame`] one way,
//!   [`control::TargetFrame`] the other;
//! - [`packet`]s follow it on a data connection, from the source to the target only: a header, a table of runs, and
//!   the bytes of the pages.
//!
//! Nothing the peer sends can make a function here panic, or allocate more than one frame of
//! [`control::FRAME_BODY_BYTES_MAX`]: every length and count has a named bound, and whatever breaks one is a
//! [`WireError`] that says what was found.
//!
//! **Version rule.** A message that version 1 does not know is an error, and so are reserved bytes and flags that are
//! not zero. So a later version may give them a meaning without an old peer silently missing it. The first ten bytes
//! of a hello (magic and version) never change.

#![forbid(unsafe_code)]

mod codec;
pub mod control;
pub mod crc;
mod error;
pub mod hello;
pub mod packet;
mod text;

pub use error::WireError;
pub use text::{Printable, printable};

/// The version of the wire that this library speaks.
pub const VERSION: u16 = 1;

/// Most data channels one migration can have. Their numbers are 0 to 254, so that a count of them fits in a byte too.
pub const CHANNELS_MAX: usize = 255;

/// Most RAM blocks one migration can have. VMMs have a few dozen; 1024 of them with the longest names still leave
/// more than half of a Setup frame for the VMM's own bytes.
pub const BLOCKS_MAX: usize = 1024;
