//! What can be wrong with QEMU's bytes, and where.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;

use crate::wire::printable;

/// One of the byte streams of a migration.
///
/// ```
/// assert_eq!(pageferry::qemu::wire::Stream::Main.to_string(), "main stream");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stream {
    /// The main connection, from the source.
    Main,
    /// A multifd channel.
    Channel,
    /// The main connection, from the destination.
    ReturnPath,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stream::Main => "main stream",
            Stream::Channel => "multifd channel",
            Stream::ReturnPath => "return path",
        })
    }
}

/// Why bytes are not QEMU's, or why a value cannot be put into bytes: what this library refuses to read it also refuses
/// to write.
///
/// ```
/// use pageferry::qemu::wire::InitPacket;
///
/// let error = InitPacket::decode(&[0; 64]).unwrap_err();
/// assert_eq!(error.to_string(), "multifd channel, byte 0: the magic is 0 (0x0), expected 0x11223344");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct StreamError {
    /// On which stream.
    pub stream: Stream,
    /// Where: bytes of the stream before the field that is wrong.
    pub at: u64,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong at a place in a stream.
///
/// ```
/// use pageferry::qemu::wire::Fault;
///
/// let fault = Fault::TooLarge { field: "pages_alloc", found: 129, limit: 128 };
/// assert_eq!(fault.to_string(), "the pages_alloc is 129, expected at most 128");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// A field holds a number that has no meaning there.
    Value {
        /// The field.
        field: &'static str,
        /// What it holds.
        found: u64,
        /// What it may hold.
        expected: &'static str,
    },
    /// A field is above its limit.
    TooLarge {
        /// The field.
        field: &'static str,
        /// What it holds.
        found: u64,
        /// The most that it may hold.
        limit: u64,
    },
    /// A length does not fit what it is the length of.
    Length {
        /// The field.
        field: &'static str,
        /// What it holds.
        found: u64,
        /// What it must hold.
        expected: u64,
    },
    /// A name is no text, or has no end.
    Text {
        /// The field.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// Something has a name that is not known here. Where the format gives no lengths, nothing after it can be read.
    Unknown {
        /// What has the name.
        what: &'static str,
        /// The name.
        name: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A name or a page comes a second time.
    Twice {
        /// What comes twice.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// A record stands where it may not.
    OutOfPlace {
        /// The record.
        found: &'static str,
        /// What may stand there.
        expected: &'static str,
    },
    /// A page is not inside its block, or not aligned.
    Offset {
        /// Its offset in bytes.
        offset: u64,
        /// The length of the block in bytes.
        block_bytes: u64,
    },
    /// Something that QEMU does and this library does not follow.
    Unsupported {
        /// What it is.
        what: &'static str,
        /// What is understood instead.
        expected: &'static str,
    },
    /// The stream ends early.
    CutShort {
        /// In the middle of what.
        message: &'static str,
        /// Bytes that must come at least.
        wanted: u64,
    },
    /// The stream broke off where it must not, though not within a record.
    Unfinished {
        /// What must come before the end.
        expected: &'static str,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Value { field, found, expected } => {
                write!(f, "the {field} is {found} ({found:#x}), expected {expected}")
            }
            Fault::TooLarge { field, found, limit } => write!(f, "the {field} is {found}, expected at most {limit}"),
            Fault::Length { field, found, expected } => write!(f, "the {field} is {found}, expected {expected}"),
            Fault::Text { field, expected } => write!(f, "the {field} is not {expected}"),
            Fault::Unknown { what, name, expected } => {
                write!(f, "{what} is called \"{}\", expected {expected}", printable(name))
            }
            Fault::Twice { what, name } => write!(f, "{what} {} comes twice, expected once", printable(name)),
            Fault::OutOfPlace { found, expected } => write!(f, "found {found}, expected {expected}"),
            Fault::Offset { offset, block_bytes } => write!(
                f,
                "the offset of a page is {offset:#x}, expected a multiple of 4096 below the block's {block_bytes:#x}"
            ),
            Fault::Unsupported { what, expected } => write!(f, "{what} cannot be followed, expected {expected}"),
            Fault::CutShort { message, wanted } => {
                write!(f, "the stream ends within the {message}, expected {wanted} bytes more")
            }
            Fault::Unfinished { expected } => write!(f, "the stream ends, expected {expected}"),
        }
    }
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, byte {}: {}", self.stream, self.at, self.fault)
    }
}

impl Error for StreamError {}
