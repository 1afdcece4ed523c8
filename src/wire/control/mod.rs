//! Control frames: what source and target tell each other beside the pages.
//!
//! ```text
//! header, 16 bytes
//!   0  type      u16
//!   2  flags     u16  zero
//!   4  length    u32  of the body: at most 1 MiB
//!   8  sequence  u32  0 for the first frame of a connection in this direction, then one more each time
//!  12  crc       u32  CRC-32C of the header, these four bytes as zero, and the body
//! body: the fields of the frame in the order in which they are declared, without gaps
//! ```
//!
//! In a body a list is its count and its elements, a text or a run of bytes its length and its bytes, a truth value
//! the byte 0 or 1. The widths of counts and lengths are in the tests (`tests/wire_golden.rs`), byte by byte.
//!
//! The source sends [`SourceFrame`]s and the target [`TargetFrame`]s: the encoder and the decoder of a direction are
//! typed by it, so a frame of the wrong side can be neither sent nor received.

#![forbid(unsafe_code)]

mod decoder;
mod lists;
mod reason;
mod source;
mod target;
#[cfg(test)]
mod tests;

use std::marker::PhantomData;

use super::WireError;
use super::codec::{Writer, check_count, crc_around};

pub use decoder::FrameDecoder;
pub use lists::CHUNKS_PER_FRAME_MAX;
pub use reason::{ErrorCode, PeerError, REASON_BYTES_MAX};
pub use source::{
    BLOCK_NAME_BYTES_MAX, BlockInfo, Final, HEARD_THE_END, SETUP_OPAQUE_BYTES_MAX, STATE_CHUNK_BYTES_MAX, Setup, SourceFrame,
};
pub use target::{LanePong, TargetFrame};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 16;

/// Most bytes of a frame's body. It holds the largest Setup, so no frame of version 1 needs more; and it is what a
/// peer can make us set aside.
pub const FRAME_BODY_BYTES_MAX: usize = 1 << 20;

/// Where the CRC stands in the header.
const CRC_AT: usize = FRAME_HEADER_BYTES - 4;

/// What travels in one direction: [`SourceFrame`] or [`TargetFrame`], and nothing else.
///
/// ```
/// use pageferry::wire::control::{Frame, SourceFrame, TargetFrame};
///
/// assert_eq!(SourceFrame::Commit.name(), "Commit");
/// assert_eq!(TargetFrame::Running.name(), "Running");
/// ```
pub trait Frame: message::Message + std::fmt::Debug + 'static {
    /// What the frame is called, for errors and traces.
    fn name(&self) -> &'static str {
        Self::name_of(self.frame_type()).unwrap_or("control frame")
    }
}

/// What a frame can do that only this module may ask of it. The module is private: nobody else can add a direction.
mod message {
    use crate::wire::WireError;
    use crate::wire::codec::{Reader, Writer};
    use crate::wire::hello::Side;

    /// The frames of one direction.
    pub trait Message: Sized {
        /// Who sends them.
        const SENDER: Side;

        /// The number of this frame's type.
        fn frame_type(&self) -> u16;

        /// What frames of a type are called; `None` if this side sends none of that type.
        fn name_of(frame_type: u16) -> Option<&'static str>;

        /// Writes the body.
        fn write(&self, out: &mut Writer<'_>) -> Result<(), WireError>;

        /// Reads the body of a frame of this type. The caller looks for bytes after its end.
        fn read(frame_type: u16, body: &mut Reader<'_>) -> Result<Self, WireError>;
    }
}

/// Puts the frames of one direction of one control connection into bytes, and numbers them.
///
/// ```
/// use pageferry::wire::control::{FrameDecoder, FrameEncoder, SourceFrame};
///
/// let mut bytes = Vec::new();
/// FrameEncoder::new().encode(&SourceFrame::Ping { nonce: 7 }, &mut bytes)?;
/// let mut decoder = FrameDecoder::new();
/// assert_eq!(decoder.pull(&mut &bytes[..])?, Some(SourceFrame::Ping { nonce: 7 }));
/// # Ok::<(), pageferry::wire::WireError>(())
/// ```
#[derive(Debug)]
pub struct FrameEncoder<F> {
    sequence: u32,
    frames: PhantomData<fn(&F)>,
}

impl<F: Frame> FrameEncoder<F> {
    /// An encoder for a new connection: its first frame has number 0.
    pub const fn new() -> FrameEncoder<F> {
        FrameEncoder { sequence: 0, frames: PhantomData }
    }

    /// Appends `frame` to `out`. Reasons and error texts are cut to [`REASON_BYTES_MAX`].
    ///
    /// # Errors
    ///
    /// What a decoder would say about the frame. Then `out` is as it was, and the number is not used up.
    pub fn encode(&mut self, frame: &F, out: &mut Vec<u8>) -> Result<(), WireError> {
        let start = out.len();
        let encoded = self.append(frame, out, start);
        match encoded {
            Ok(()) => self.sequence = self.sequence.wrapping_add(1),
            Err(_) => out.truncate(start),
        }
        encoded
    }

    fn append(&self, frame: &F, out: &mut Vec<u8>, start: usize) -> Result<(), WireError> {
        out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        frame.write(&mut Writer::new(out))?;
        let (header, body) = out[start..].split_at_mut(FRAME_HEADER_BYTES);
        check_count("length of a control frame", body.len(), FRAME_BODY_BYTES_MAX)?;
        header[0..2].copy_from_slice(&frame.frame_type().to_le_bytes());
        header[4..8].copy_from_slice(&(body.len() as u32).to_le_bytes());
        header[8..12].copy_from_slice(&self.sequence.to_le_bytes());
        let crc = crc_around(&header[..CRC_AT], body);
        header[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        Ok(())
    }
}

impl<F: Frame> Default for FrameEncoder<F> {
    fn default() -> FrameEncoder<F> {
        FrameEncoder::new()
    }
}
