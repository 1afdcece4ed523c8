//! Words about what went wrong: reasons, and the error that one side tells the other.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;

use crate::wire::codec::{Reader, Writer, check_count};
use crate::wire::{WireError, printable};

/// Most bytes of a reason or an error text. Enough for a chain of causes; longer ones are cut when they are sent,
/// because half a reason is better than an error about it.
pub const REASON_BYTES_MAX: usize = 4096;

/// Writes a reason, cut between two characters if it is too long.
pub fn write_reason(out: &mut Writer<'_>, reason: &str) {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    out.u16(end as u16);
    out.bytes(&reason.as_bytes()[..end]);
}

/// Reads a reason.
pub fn read_reason(body: &mut Reader<'_>) -> Result<String, WireError> {
    let len = usize::from(body.u16()?);
    read_text(body, "reason", len, REASON_BYTES_MAX)
}

/// Reads a text of `len` bytes, whatever characters it holds: it is made harmless where it is shown, not here, so
/// that a name still equals itself.
pub fn read_text(
    body: &mut Reader<'_>,
    field: &'static str,
    len: usize,
    bytes_max: usize,
) -> Result<String, WireError> {
    check_count(field, len, bytes_max)?;
    let text = std::str::from_utf8(body.bytes(len)?);
    text.map(str::to_owned).map_err(|error| WireError::NotUtf8 { field, valid_bytes: error.valid_up_to() })
}

/// What kind of thing went wrong at the peer. The text beside it says what exactly.
///
/// ```
/// use pageferry::wire::control::ErrorCode;
///
/// assert_eq!(ErrorCode::from_number(4), ErrorCode::Memory);
/// assert_eq!(ErrorCode::from_number(4000).number(), 4000);
/// assert_eq!(ErrorCode::from_number(4000).to_string(), "error 4000");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The other side sent something that is not of this protocol, or not at this point of it.
    Protocol,
    /// The other side was silent for too long.
    Timeout,
    /// A connection failed or was closed.
    Connection,
    /// Guest RAM could not be prepared, read or written.
    Memory,
    /// The digests of what was sent and of what landed disagree, and repair did not help.
    Digest,
    /// The device state could not be saved, transferred or loaded.
    State,
    /// A hook of the VMM failed.
    Guest,
    /// Somebody cancelled.
    Cancelled,
    /// A thread, a file descriptor or memory of this process could not be had.
    Resources,
    /// The session is not the one that is live here, or cannot be resumed.
    Session,
    /// Anything else. Version 1 sends number 0; other numbers come from later versions. The number of a kind above
    /// comes back as that kind.
    Other(u16),
}

impl ErrorCode {
    /// The number that stands for it on the wire.
    pub const fn number(self) -> u16 {
        match self {
            ErrorCode::Protocol => 1,
            ErrorCode::Timeout => 2,
            ErrorCode::Connection => 3,
            ErrorCode::Memory => 4,
            ErrorCode::Digest => 5,
            ErrorCode::State => 6,
            ErrorCode::Guest => 7,
            ErrorCode::Cancelled => 8,
            ErrorCode::Resources => 9,
            ErrorCode::Session => 10,
            ErrorCode::Other(number) => number,
        }
    }

    /// What a number stands for. Every number stands for something: an error whose kind is new must still reach the
    /// user.
    pub const fn from_number(number: u16) -> ErrorCode {
        match number {
            1 => ErrorCode::Protocol,
            2 => ErrorCode::Timeout,
            3 => ErrorCode::Connection,
            4 => ErrorCode::Memory,
            5 => ErrorCode::Digest,
            6 => ErrorCode::State,
            7 => ErrorCode::Guest,
            8 => ErrorCode::Cancelled,
            9 => ErrorCode::Resources,
            10 => ErrorCode::Session,
            other => ErrorCode::Other(other),
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorCode::Protocol => "protocol error",
            ErrorCode::Timeout => "timeout",
            ErrorCode::Connection => "connection error",
            ErrorCode::Memory => "guest memory error",
            ErrorCode::Digest => "digest mismatch",
            ErrorCode::State => "device state error",
            ErrorCode::Guest => "VMM error",
            ErrorCode::Cancelled => "cancelled",
            ErrorCode::Resources => "out of resources",
            ErrorCode::Session => "wrong session",
            ErrorCode::Other(0) => "error",
            ErrorCode::Other(number) => return write!(f, "error {number}"),
        })
    }
}

/// An error that one side tells the other before it gives up.
///
/// ```
/// use pageferry::wire::control::{ErrorCode, PeerError};
///
/// let error = PeerError { code: ErrorCode::State, text: "virtio-net: \x1b[31mbad queue".into() };
/// assert_eq!(error.to_string(), "device state error: virtio-net: \u{FFFD}[31mbad queue");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PeerError {
    /// The kind of error.
    pub code: ErrorCode,
    /// What happened, in the words of the peer. Cut after [`REASON_BYTES_MAX`] when sent. Show it by
    /// [`printable`], as this type's `Display` does.
    pub text: String,
}

impl PeerError {
    pub(super) fn write(&self, out: &mut Writer<'_>) {
        out.u16(self.code.number());
        write_reason(out, &self.text);
    }

    pub(super) fn read(body: &mut Reader<'_>) -> Result<PeerError, WireError> {
        Ok(PeerError { code: ErrorCode::from_number(body.u16()?), text: read_reason(body)? })
    }
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, printable(&self.text))
    }
}

impl Error for PeerError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_two_characters() {
        for (reason, kept) in [
            ("x".repeat(4096), 4096),
            ("x".repeat(4097), 4096),
            ("ß".repeat(2049), 4096),
            (format!("x{}", "ß".repeat(2048)), 4095),
            (format!("xx{}", "\u{1F6A2}".repeat(1024)), 4094),
        ] {
            let mut bytes = Vec::new();
            write_reason(&mut Writer::new(&mut bytes), &reason);
            let read = read_reason(&mut Reader::new("test", &bytes)).unwrap();
            assert_eq!(read.len(), kept);
            assert!(reason.starts_with(&read));
        }
    }

    #[test]
    fn every_error_number_comes_back_as_itself() {
        for number in 0..=u16::MAX {
            let code = ErrorCode::from_number(number);
            assert_eq!(code.number(), number);
            assert!(!(1..=10).contains(&number) || !matches!(code, ErrorCode::Other(_)), "{number} has a name");
        }
    }
}
