//! What a destination says to its source, on the main connection.
//!
//! ```text
//!   0  type    u16
//!   2  length  u16      bytes that follow
//!   4  fields           by the type
//! ```

#![forbid(unsafe_code)]

use super::codec::{Reader, Stop, Writer};
use super::collect::Collector;
use super::error::{Fault, Stream, StreamError};
use super::name::Name;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// A message of the destination. The return path exists if the source has opened it with
/// [`super::Command::OpenReturnPath`].
///
/// ```
/// use pageferry::qemu::wire::ReturnMessage;
///
/// let mut bytes = Vec::new();
/// ReturnMessage::Shut { error: 0 }.encode(&mut bytes);
/// assert_eq!(bytes, [0, 1, 0, 4, 0, 0, 0, 0]);
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ReturnMessage {
    /// The destination is done: its last word. A source with a return path waits for it with its guest stopped, without
    /// a limit in time.
    Shut {
        /// 0 if everything is well, otherwise the source goes on running its guest.
        error: u32,
    },
    /// The answer to a ping.
    Pong {
        /// What the ping carried.
        value: u32,
    },
    /// Post-copy: pages that the guest waits for.
    RequestPages {
        /// Their block, or that of the request before.
        block: Option<Name>,
        /// The first byte that is wanted, in the block.
        start: u64,
        /// Bytes that are wanted.
        bytes: u32,
    },
    /// Post-copy: the destination can go on after a break.
    ResumeAck {
        /// Always 1.
        value: u32,
    },
    /// The destination has nothing more against stopping the guest.
    SwitchoverAck,
}

impl ReturnMessage {
    /// Appends the bytes of this message to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut to = Writer::new(out);
        let mut head = |kind: u16, length: u16| {
            to.u16(kind);
            to.u16(length);
        };
        match self {
            ReturnMessage::Shut { error: value } => {
                head(SHUT, 4);
                to.u32(*value);
            }
            ReturnMessage::Pong { value } => {
                head(PONG, 4);
                to.u32(*value);
            }
            ReturnMessage::ResumeAck { value } => {
                head(RESUME_ACK, 4);
                to.u32(*value);
            }
            ReturnMessage::RequestPages { block: Some(block), start, bytes } => {
                head(REQ_PAGES_ID, 13 + u16::from(block.length()));
                to.u64(*start);
                to.u32(*bytes);
                to.name(block);
            }
            ReturnMessage::RequestPages { block: None, start, bytes } => {
                head(REQ_PAGES, 12);
                to.u64(*start);
                to.u32(*bytes);
            }
            ReturnMessage::SwitchoverAck => head(SWITCHOVER_ACK, 0),
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<ReturnMessage, Stop> {
        let kind = from.u16()?;
        let length = from.u16()?;
        // A wrong length is found before its bytes are waited for.
        let fixed = match kind {
            SHUT | PONG | RESUME_ACK => Some(4),
            REQ_PAGES => Some(12),
            SWITCHOVER_ACK => Some(0),
            REQ_PAGES_ID => None,
            RECV_BITMAP => {
                let (what, expected) = ("RECV_BITMAP, which begins a recovery of post-copy", "another message");
                return Err(from.bad(4, Fault::Unsupported { what, expected }));
            }
            _ => {
                let (field, expected) = ("type of a message", "1 (SHUT) to 7 (SWITCHOVER_ACK)");
                return Err(from.bad(4, Fault::Value { field, found: kind.into(), expected }));
            }
        };
        let check = |from: &Reader<'_>, back: usize, expected: u16| {
            let fault = Fault::Length { field: "length of a message", found: length.into(), expected: expected.into() };
            if length == expected { Ok(()) } else { Err(from.bad(back, fault)) }
        };
        if let Some(expected) = fixed {
            check(from, 2, expected)?;
        }
        Ok(match kind {
            SHUT => ReturnMessage::Shut { error: from.u32()? },
            PONG => ReturnMessage::Pong { value: from.u32()? },
            RESUME_ACK => {
                from.expect_u32("value of RESUME_ACK", 1, "1")?;
                ReturnMessage::ResumeAck { value: 1 }
            }
            SWITCHOVER_ACK => ReturnMessage::SwitchoverAck,
            REQ_PAGES => ReturnMessage::RequestPages { block: None, start: from.u64()?, bytes: from.u32()? },
            _ => {
                let (start, bytes) = (from.u64()?, from.u32()?);
                let block = from.name("block of a request")?;
                let rest = u16::from(block.length()) + 13;
                check(from, usize::from(rest) + 2, rest)?;
                ReturnMessage::RequestPages { block: Some(block), start, bytes }
            }
        })
    }
}

/// Takes the bytes of a return path, and gives the messages in them. It holds one message at most, 272 bytes.
///
/// An error is final: every later call returns it again.
///
/// ```
/// use pageferry::qemu::wire::{ReturnDecoder, ReturnMessage};
///
/// let mut decoder = ReturnDecoder::new();
/// assert_eq!(decoder.pull(&mut &[0, 2, 0, 4, 0, 0][..])?, None);
/// assert_eq!(decoder.pull(&mut &[0, 1][..])?, Some(ReturnMessage::Pong { value: 1 }));
/// decoder.finish()?;
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Debug)]
pub struct ReturnDecoder {
    bytes: Collector,
    failed: Option<StreamError>,
}

impl Default for ReturnDecoder {
    fn default() -> ReturnDecoder {
        ReturnDecoder::new()
    }
}

impl ReturnDecoder {
    /// Before the first message.
    pub const fn new() -> ReturnDecoder {
        ReturnDecoder { bytes: Collector::new(Stream::ReturnPath), failed: None }
    }

    /// Takes bytes from the front of `input` until a message is whole, and returns it; `None` once `input` is used up.
    ///
    /// # Errors
    ///
    /// What is wrong with the stream: from then on, always the same.
    pub fn pull(&mut self, input: &mut &[u8]) -> Result<Option<ReturnMessage>, StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.bytes.collect(input, ReturnMessage::read).map_err(|error| self.failed.insert(error).clone())
    }

    /// Bytes of the stream before the next message, or before the one that is not yet whole.
    pub const fn at(&self) -> u64 {
        self.bytes.at()
    }

    /// Bytes of memory in use.
    pub fn capacity_bytes(&self) -> usize {
        self.bytes.capacity_bytes()
    }

    /// The connection has ended.
    ///
    /// # Errors
    ///
    /// If it ended within a message, or was wrong before. A source that has not seen [`ReturnMessage::Shut`] has not
    /// been told that all is well.
    pub fn finish(&self) -> Result<(), StreamError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => self.bytes.finish("message of the return path"),
        }
    }
}
