#![forbid(unsafe_code)]
//! Bytes on their way from one socket to the other, in a buffer that does not grow while there is somebody to hold up.

use std::io;

use crate::sys::socket::Socket;

/// Less room than this is not worth a call.
const ROOM_MIN: usize = 4096;

/// Room that is added at once for what a sender has said who says nothing more.
const REST_BYTES: usize = 64 << 10;

/// Bytes that have come; none is sent before it was approved. What is not sent yet stays, so that whoever sends is held up
/// once the buffer is full.
#[derive(Debug)]
pub struct Passage {
    bytes: Vec<u8>,
    sent: usize,
    approved: usize,
    filled: usize,
    /// Where in the stream the first of `bytes` stands.
    start: u64,
    /// The sender has closed it.
    pub ended: bool,
}

impl Passage {
    /// A buffer of so many bytes.
    pub fn new(capacity: usize) -> Passage {
        Passage { bytes: vec![0; capacity], sent: 0, approved: 0, filled: 0, start: 0, ended: false }
    }

    /// Whether something may be sent that has not been.
    pub fn has_pending(&self) -> bool {
        self.sent < self.approved
    }

    /// Whether everything that has come was sent.
    pub fn is_empty(&self) -> bool {
        self.sent == self.filled
    }

    /// Whether more can be received.
    pub fn wants_more(&self) -> bool {
        !self.ended && self.bytes.len() - (self.filled - self.sent) >= ROOM_MIN
    }

    /// Receives what is there; how many bytes are new, none if none are.
    pub fn receive(&mut self, from: &Socket) -> io::Result<usize> {
        if !self.wants_more() {
            if self.ended || !from.has_left() {
                return Ok(0);
            }
            // It must be known how it ends, and what is left of it is no more than the system holds.
            self.bytes.resize(self.bytes.len() + REST_BYTES, 0);
        }
        if self.sent == self.filled || self.bytes.len() - self.filled < ROOM_MIN {
            self.bytes.copy_within(self.sent..self.filled, 0);
            self.start += self.sent as u64;
            self.filled -= self.sent;
            self.approved -= self.sent;
            self.sent = 0;
        }
        match from.recv(&mut self.bytes[self.filled..]) {
            Ok(0) => self.ended = true,
            Ok(n) => {
                self.filled += n;
                return Ok(n);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        Ok(0)
    }

    /// Puts bytes in front of everything that will be received.
    pub fn begin_with(&mut self, bytes: &[u8]) {
        self.bytes[..bytes.len()].copy_from_slice(bytes);
        self.filled = bytes.len();
    }

    /// The last `count` bytes that have come.
    pub fn newest(&self, count: usize) -> &[u8] {
        &self.bytes[self.filled - count..self.filled]
    }

    /// Everything before this byte of the stream may be sent.
    pub fn approve(&mut self, at: u64) {
        let upto = usize::try_from(at.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.approved = upto.clamp(self.approved, self.filled);
    }

    /// What may be sent, and where in the stream it begins.
    pub fn pending(&self) -> (u64, &[u8]) {
        (self.start + self.sent as u64, &self.bytes[self.sent..self.approved])
    }

    /// The first byte that has come and was not sent.
    pub fn next_unsent(&self) -> Option<u8> {
        self.bytes[self.sent..self.filled].first().copied()
    }

    /// The last `count` bytes that were sent, none of which is older than the last [`Passage::receive`].
    pub fn newest_sent(&self, count: usize) -> &[u8] {
        &self.bytes[self.sent - count..self.sent]
    }

    /// Sends what it may, as far as the socket takes it at once; how many bytes.
    pub fn send(&mut self, to: &Socket) -> io::Result<usize> {
        let before = self.sent;
        while self.has_pending() {
            match to.send(&self.bytes[self.sent..self.approved]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(self.sent - before)
    }

    /// Drops what may not be sent yet, and sends `last` behind the rest.
    pub fn end_with(&mut self, last: &[u8], to: &Socket) -> io::Result<()> {
        self.bytes.truncate(self.approved);
        self.bytes.extend_from_slice(last);
        (self.approved, self.filled, self.ended) = (self.bytes.len(), self.bytes.len(), true);
        self.send(to).map(drop)
    }
}
