//! Puts records together that come in pieces.

#![forbid(unsafe_code)]

use super::channel::take;
use super::codec::{Reader, Stop};
use super::error::{Fault, Stream, StreamError};

/// Bytes of one record, as far as they have come. A record that comes whole is read where it is.
#[derive(Debug)]
pub struct Collector {
    stream: Stream,
    /// Bytes of the stream before the record.
    at: u64,
    held: Vec<u8>,
    /// How long the record is at least.
    wanted: usize,
}

impl Collector {
    /// Before the first byte of `stream`.
    pub const fn new(stream: Stream) -> Collector {
        Collector { stream, at: 0, held: Vec::new(), wanted: 1 }
    }

    /// Takes bytes from the front of `input` until `read` has what it needs for a record; `None` once `input` is used
    /// up. `read` sees the record from its first byte each time, and says how much of it must be there. What a record
    /// holds at most is for `read` to see to: it asks for no more bytes than a length that it has checked.
    pub fn collect<T>(
        &mut self,
        input: &mut &[u8],
        mut read: impl FnMut(&mut Reader<'_>) -> Result<T, Stop>,
    ) -> Result<Option<T>, StreamError> {
        if self.held.is_empty() && !input.is_empty() {
            let mut reader = Reader::new(self.stream, self.at, input);
            match read(&mut reader) {
                Ok(record) => {
                    let taken = reader.taken() as u64;
                    take(input, taken);
                    self.passed(taken);
                    return Ok(Some(record));
                }
                Err(Stop::Bad(error)) => return Err(error),
                Err(Stop::Need(total)) => self.wanted = total,
            }
        }
        loop {
            let missing = self.wanted.saturating_sub(self.held.len()) as u64;
            if missing > 0 {
                let Some(more) = take(input, missing) else { return Ok(None) };
                self.held.extend_from_slice(more);
                continue;
            }
            let mut reader = Reader::new(self.stream, self.at, &self.held);
            match read(&mut reader) {
                Ok(record) => {
                    let taken = reader.taken();
                    self.over(taken);
                    return Ok(Some(record));
                }
                Err(Stop::Bad(error)) => return Err(error),
                // It asks for more than is there, so that this ends.
                Err(Stop::Need(total)) => self.wanted = total.max(self.held.len() + 1),
            }
        }
    }

    /// A record of so many bytes is over. What was asked for beyond it belongs to the next.
    fn over(&mut self, bytes: usize) {
        self.passed(bytes as u64);
        self.held.drain(..bytes);
        self.wanted = 1;
    }

    /// Whether bytes of the next record are held.
    pub fn is_collecting(&self) -> bool {
        !self.held.is_empty()
    }

    /// So many bytes have gone past, between two records.
    pub const fn passed(&mut self, bytes: u64) {
        self.at = self.at.saturating_add(bytes);
    }

    /// Bytes of the stream before the record that is being collected.
    pub const fn at(&self) -> u64 {
        self.at
    }

    /// Bytes of memory in use.
    pub fn capacity_bytes(&self) -> usize {
        self.held.capacity()
    }

    /// Whether the stream may end here, which `message` would come next in.
    pub fn finish(&self, message: &'static str) -> Result<(), StreamError> {
        if self.held.is_empty() {
            return Ok(());
        }
        let wanted = self.wanted.saturating_sub(self.held.len()) as u64;
        let at = self.at.saturating_add(self.held.len() as u64);
        Err(StreamError { stream: self.stream, at, fault: Fault::CutShort { message, wanted } })
    }
}
