//! What can be wrong with the data of a compressed packet, and where.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;

use crate::qemu::wire::Compression;

/// Why the data of a packet is not its pages, or why pages could not be made into data.
///
/// ```
/// use pageferry::qemu::compress::{PackError, PackFault};
/// use pageferry::qemu::wire::Compression;
///
/// let fault = PackFault::TooLittle { bytes: 4000, expected: 8192 };
/// let error = PackError { method: Compression::Zlib, at: 37, fault };
/// assert_eq!(error.to_string(), "zlib data of a packet, byte 37: it gives 4000 bytes of pages, expected 8192");
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackError {
    /// How the pages are compressed.
    pub method: Compression,
    /// How many bytes of the packet's data had been used up by then.
    pub at: usize,
    /// What is wrong.
    pub fault: PackFault,
}

/// What is wrong with the data of a packet.
///
/// ```
/// use pageferry::qemu::compress::PackFault;
///
/// assert_eq!(PackFault::StreamEnd.to_string(), "the stream ends, expected one that goes on with the channel");
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PackFault {
    /// It is no such stream, or not the next piece of this one.
    Corrupt {
        /// What the decompressor has against it.
        reason: String,
    },
    /// It is used up before the pages are full.
    TooLittle {
        /// Bytes that it gave.
        bytes: usize,
        /// Bytes of the pages.
        expected: usize,
    },
    /// It gives more bytes than the pages have.
    TooMuch {
        /// Bytes of the pages.
        expected: usize,
    },
    /// The stream ends in it.
    StreamEnd,
    /// It is empty, or longer than any packet's.
    Data {
        /// Its length.
        bytes: usize,
        /// The most that it may be.
        limit: usize,
    },
    /// These are not the bytes of 1 to 128 pages.
    Pages {
        /// How many they are.
        bytes: usize,
    },
    /// There is no compressor.
    Unavailable {
        /// Why not.
        reason: &'static str,
    },
}

impl fmt::Display for PackFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackFault::Corrupt { reason } => write!(f, "it cannot be read: {reason}"),
            PackFault::TooLittle { bytes, expected } => {
                write!(f, "it gives {bytes} bytes of pages, expected {expected}")
            }
            PackFault::TooMuch { expected } => write!(f, "it gives more bytes of pages than the expected {expected}"),
            PackFault::StreamEnd => f.write_str("the stream ends, expected one that goes on with the channel"),
            PackFault::Data { bytes, limit } => write!(f, "its length is {bytes}, expected 1 to {limit}"),
            PackFault::Pages { bytes } => {
                write!(f, "its pages have {bytes} bytes, expected 1 to 128 pages of 4096")
            }
            PackFault::Unavailable { reason } => f.write_str(reason),
        }
    }
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match self.method {
            Compression::None => "plain",
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        write!(f, "{method} data of a packet, byte {}: {}", self.at, self.fault)
    }
}

impl Error for PackError {}
