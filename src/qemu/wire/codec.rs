//! Reads and writes big-endian fields, and knows where in the stream they stand.

#![forbid(unsafe_code)]

use super::error::{Fault, Stream, StreamError};
use super::name::Name;

/// Why a record could not be read from the bytes at hand.
#[derive(Clone, PartialEq, Debug)]
pub enum Stop {
    /// The record has at least so many bytes, and not all of them are there.
    Need(usize),
    /// It is wrong, whatever follows.
    Bad(StreamError),
}

/// Takes fields from the front of a record.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    stream: Stream,
    start: u64,
    bytes: &'a [u8],
    taken: usize,
}

impl<'a> Reader<'a> {
    /// Reads a record of which `bytes` are there; its first byte is byte `start` of the stream.
    pub fn new(stream: Stream, start: u64, bytes: &'a [u8]) -> Reader<'a> {
        Reader { stream, start, bytes, taken: 0 }
    }

    /// Bytes read so far.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Where the next field stands in the stream.
    pub fn at(&self) -> u64 {
        self.start.saturating_add(self.taken as u64)
    }

    /// `fault`, in the field that begins `back` bytes before the next one.
    pub fn bad(&self, back: usize, fault: Fault) -> Stop {
        let at = self.at().saturating_sub(back as u64);
        Stop::Bad(StreamError { stream: self.stream, at, fault })
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Stop> {
        let end = self.taken.saturating_add(count);
        let field = self.bytes.get(self.taken..end).ok_or(Stop::Need(end))?;
        self.taken = end;
        Ok(field)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let mut field = [0; N];
        field.copy_from_slice(self.bytes(N)?);
        Ok(field)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, Stop> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Result<u16, Stop> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, Stop> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, Stop> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Four bytes that must hold `value`, which errors call `expected`.
    pub fn expect_u32(&mut self, field: &'static str, value: u32, expected: &'static str) -> Result<(), Stop> {
        let found = self.u32()?;
        if found == value {
            return Ok(());
        }
        Err(self.bad(4, Fault::Value { field, found: found.into(), expected }))
    }

    /// The next `count` bytes, which must be zero.
    pub fn zeros(&mut self, field: &'static str, count: usize) -> Result<(), Stop> {
        let bytes = self.bytes(count)?;
        // All of them at once: unlike a search, the compiler makes vectors of it. Every packet has a KiB of them.
        if bytes.iter().fold(0, |any, byte| any | byte) == 0 {
            return Ok(());
        }
        let first = bytes.iter().position(|byte| *byte != 0).unwrap_or_default();
        let found = bytes[first].into();
        Err(self.bad(count - first, Fault::Value { field, found, expected: "zero" }))
    }

    /// A length in one byte, and a name.
    pub fn name(&mut self, field: &'static str) -> Result<Name, Stop> {
        let length = self.u8()?;
        let bytes = self.bytes(length.into())?;
        Name::read(field, bytes).map_err(|fault| self.bad(bytes.len() + 1, fault))
    }

    /// What `stop` is where all the bytes of a message of fixed length were there.
    pub fn whole(&self, message: &'static str, stop: Stop) -> StreamError {
        match stop {
            Stop::Bad(error) => error,
            Stop::Need(total) => {
                let wanted = total.saturating_sub(self.bytes.len()) as u64;
                let at = self.start.saturating_add(self.bytes.len() as u64);
                StreamError { stream: self.stream, at, fault: Fault::CutShort { message, wanted } }
            }
        }
    }
}

/// Appends fields to a vector.
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Appends to `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Writer<'a> {
        Writer { out }
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_be_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_be_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_be_bytes());
    }

    /// All of `bytes`.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// A length in one byte, and `name`.
    pub fn name(&mut self, name: &Name) {
        self.u8(name.length());
        self.bytes(name.as_str().as_bytes());
    }
}
