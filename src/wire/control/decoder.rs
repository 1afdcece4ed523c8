//! Finds the frames in a stream of bytes that comes in pieces of any size.

#![forbid(unsafe_code)]

use std::marker::PhantomData;

use super::{CRC_AT, FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, Frame};
use crate::wire::WireError;
use crate::wire::codec::{Reader, check_count, crc_around};

/// What errors call a frame whose type may itself be damaged.
const NAME: &str = "control frame";

/// Takes the bytes of one direction of one control connection, and gives the frames in them.
///
/// It holds one frame at most, the one that is being put together, and no more than [`FRAME_BODY_BYTES_MAX`] and a
/// header, whatever lengths the peer states. A header is judged as soon as it is there, before its body is waited for.
/// An error is final: nothing after it can be told apart from damage, so every later call returns it again.
///
/// ```
/// use pageferry::wire::control::{FrameDecoder, FrameEncoder, TargetFrame};
///
/// let mut stream = Vec::new();
/// let mut encoder = FrameEncoder::new();
/// encoder.encode(&TargetFrame::Running, &mut stream)?;
/// encoder.encode(&TargetFrame::QueryAnswer { running: true }, &mut stream)?;
///
/// let mut decoder = FrameDecoder::<TargetFrame>::new();
/// let mut frames = Vec::new();
/// for mut piece in stream.chunks(5) {
///     while let Some(frame) = decoder.pull(&mut piece)? {
///         frames.push(frame);
///     }
/// }
/// decoder.finish()?;
/// assert_eq!(frames, [TargetFrame::Running, TargetFrame::QueryAnswer { running: true }]);
/// # Ok::<(), pageferry::wire::WireError>(())
/// ```
#[derive(Debug)]
pub struct FrameDecoder<F> {
    /// The frame that is being put together, from its first byte on.
    buffer: Vec<u8>,
    /// What its header says, once it is there and found good.
    head: Option<Head>,
    /// The number that the next frame must have.
    sequence: u32,
    /// The error that ended it.
    failed: Option<WireError>,
    frames: PhantomData<fn() -> F>,
}

/// What is kept of a header.
#[derive(Clone, Copy, Debug)]
struct Head {
    frame_type: u16,
    body_bytes: usize,
    crc: u32,
}

impl<F: Frame> FrameDecoder<F> {
    /// A decoder for a new connection: it expects number 0 first. It allocates nothing until bytes come.
    pub const fn new() -> FrameDecoder<F> {
        FrameDecoder { buffer: Vec::new(), head: None, sequence: 0, failed: None, frames: PhantomData }
    }

    /// Takes bytes from the front of `input` until a frame is complete, and returns it; `None` means that all of
    /// `input` was taken and the frame goes on. Call it until it returns `None`.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the frame: see [`WireError`]. After that the connection is of no use.
    pub fn pull(&mut self, input: &mut &[u8]) -> Result<Option<F>, WireError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let pulled = self.advance(input);
        if let Err(error) = pulled {
            self.failed = Some(error);
            self.buffer = Vec::new();
        }
        pulled
    }

    /// To be asked when the connection has ended: whether it ended between two frames.
    ///
    /// # Errors
    ///
    /// [`WireError::CutShort`] if it ended within a frame, or the error that [`FrameDecoder::pull`] has returned.
    pub fn finish(&self) -> Result<(), WireError> {
        match self.failed {
            Some(error) => Err(error),
            None if self.buffer.is_empty() => Ok(()),
            None => Err(WireError::CutShort { message: NAME, wanted: self.goal(), left: self.buffer.len() }),
        }
    }

    /// Bytes of memory that it holds: never more than [`FRAME_HEADER_BYTES`] and [`FRAME_BODY_BYTES_MAX`].
    pub fn capacity_bytes(&self) -> usize {
        self.buffer.capacity()
    }

    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<F>, WireError> {
        if self.head.is_none() {
            if !self.fill(input) {
                return Ok(None);
            }
            self.head = Some(self.read_head()?);
        }
        let Some(head) = self.head.filter(|_| self.fill(input)) else {
            return Ok(None);
        };
        let frame = self.read_frame(head)?;
        self.buffer.clear();
        self.head = None;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(Some(frame))
    }

    /// How long the buffer is to become next: a header, then the whole frame.
    fn goal(&self) -> usize {
        FRAME_HEADER_BYTES + self.head.map_or(0, |head| head.body_bytes)
    }

    /// Takes from `input` what the goal lacks; true once it is reached.
    fn fill(&mut self, input: &mut &[u8]) -> bool {
        let lacking = self.goal().saturating_sub(self.buffer.len());
        let (taken, rest) = input.split_at(lacking.min(input.len()));
        *input = rest;
        // Exactly the frame, not twice as much: the length was checked against its limit, the vector's own growth
        // would go beyond it.
        self.buffer.reserve_exact(lacking);
        self.buffer.extend_from_slice(taken);
        taken.len() == lacking
    }

    fn read_head(&self) -> Result<Head, WireError> {
        let mut fields = Reader::new(NAME, &self.buffer);
        let frame_type = fields.u16()?;
        fields.reserved::<2>()?;
        let body_bytes = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
        let sequence = fields.u32()?;
        let crc = fields.u32()?;
        if F::name_of(frame_type).is_none() {
            return Err(WireError::UnknownFrame { sender: F::SENDER, frame_type });
        }
        check_count("length of a control frame", body_bytes, FRAME_BODY_BYTES_MAX)?;
        if sequence != self.sequence {
            return Err(WireError::OutOfSequence { expected: self.sequence, found: sequence });
        }
        Ok(Head { frame_type, body_bytes, crc })
    }

    fn read_frame(&self, head: Head) -> Result<F, WireError> {
        let Head { frame_type, crc: stated, .. } = head;
        let (header, body) = self.buffer.split_at(FRAME_HEADER_BYTES);
        let computed = crc_around(&header[..CRC_AT], body);
        if stated != computed {
            return Err(WireError::BadCrc { message: NAME, stated, computed });
        }
        let mut fields = Reader::new(F::name_of(frame_type).unwrap_or(NAME), body);
        let frame = F::read(frame_type, &mut fields)?;
        fields.finish()?;
        Ok(frame)
    }
}

impl<F: Frame> Default for FrameDecoder<F> {
    fn default() -> FrameDecoder<F> {
        FrameDecoder::new()
    }
}
