//! Reads and writes little-endian fields within bounds: what every message is laid out with.

#![forbid(unsafe_code)]

use super::crc::Crc32c;
use super::{CHANNELS_MAX, WireError};
use crate::units::{ChannelId, Round};

/// Takes fields from the front of a slice. It never reads past the end, and names the message in its errors.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    message: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which are a `message`.
    pub fn new(message: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes, message }
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let Some((field, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.cut_short(N));
        };
        self.rest = rest;
        Ok(*field)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The next byte as a truth value. Anything but 0 and 1 is refused, so that a message has one encoding only.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::BadValue { field, value: other.into() }),
        }
    }

    /// The next `N` bytes, which a later version may give a meaning: they must be zero until then.
    pub fn reserved<const N: usize>(&mut self) -> Result<(), WireError> {
        if self.array::<N>()? == [0; N] { Ok(()) } else { Err(WireError::ReservedNotZero { message: self.message }) }
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let Some((field, rest)) = self.rest.split_at_checked(count) else {
            return Err(self.cut_short(count));
        };
        self.rest = rest;
        Ok(field)
    }

    /// Checks a count the peer stated against its limit and against the bytes that are there, and makes room for that
    /// many. The only place where a number of the peer turns into memory: so a list never holds more elements than
    /// the bytes that really came can fill.
    pub fn room_for<T>(
        &self,
        field: &'static str,
        count: usize,
        count_max: usize,
        element_bytes_min: usize,
    ) -> Result<Vec<T>, WireError> {
        check_count(field, count, count_max)?;
        let needed = count.saturating_mul(element_bytes_min);
        if needed > self.rest.len() {
            return Err(self.cut_short(needed));
        }
        Ok(Vec::with_capacity(count))
    }

    /// The end of the message: bytes after it are an error.
    pub fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(WireError::TrailingBytes { message: self.message, bytes }),
        }
    }

    fn cut_short(&self, wanted: usize) -> WireError {
        WireError::CutShort { message: self.message, wanted, left: self.rest.len() }
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
        self.bytes(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// One byte: 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.u8(value.into());
    }

    /// All of `bytes`.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
}

/// Refuses more than `count_max` of something.
pub fn check_count(field: &'static str, count: usize, count_max: usize) -> Result<(), WireError> {
    if count <= count_max {
        Ok(())
    } else {
        Err(WireError::TooLarge { field, value: count as u64, limit: count_max as u64 })
    }
}

/// Passes on a channel that a migration can have.
pub fn check_channel(channel: ChannelId) -> Result<ChannelId, WireError> {
    check_count("channel", channel.0.into(), CHANNELS_MAX - 1)?;
    Ok(channel)
}

/// Passes on a round that a migration can have.
pub fn check_round(round: Round) -> Result<Round, WireError> {
    if round <= Round::MAX {
        Ok(round)
    } else {
        Err(WireError::TooLarge { field: "round", value: round.0.into(), limit: Round::MAX.0.into() })
    }
}

/// The CRC of `head`, four zero bytes in the place of the CRC itself, and `tail`.
pub fn crc_around(head: &[u8], tail: &[u8]) -> u32 {
    let mut crc = Crc32c::new();
    crc.update(head);
    crc.update(&[0; 4]);
    crc.update(tail);
    crc.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        writer.u8(1);
        writer.u16(0x0203);
        writer.u32(0x0405_0607);
        writer.u64(0x0809_0A0B_0C0D_0E0F);
        writer.bool(true);
        writer.bytes(b"end");
        assert_eq!(bytes, b"\x01\x03\x02\x07\x06\x05\x04\x0f\x0e\x0d\x0c\x0b\x0a\x09\x08\x01end");

        let mut reader = Reader::new("test", &bytes);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(reader.u16(), Ok(0x0203));
        assert_eq!(reader.u32(), Ok(0x0405_0607));
        assert_eq!(reader.u64(), Ok(0x0809_0A0B_0C0D_0E0F));
        assert_eq!(reader.bool("flag"), Ok(true));
        assert_eq!(reader.bytes(3), Ok(&b"end"[..]));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn a_field_past_the_end_is_cut_short() {
        let mut reader = Reader::new("test", &[1, 2, 3]);
        let error = WireError::CutShort { message: "test", wanted: 4, left: 3 };
        assert_eq!(reader.u32(), Err(error));
        assert_eq!(reader.bytes(4), Err(WireError::CutShort { message: "test", wanted: 4, left: 3 }));
        assert_eq!(reader.bytes(3), Ok(&[1, 2, 3][..]), "a refused read takes nothing");
    }

    #[test]
    fn bytes_after_the_end_are_refused() {
        let reader = Reader::new("test", &[0, 0]);
        assert_eq!(reader.finish(), Err(WireError::TrailingBytes { message: "test", bytes: 2 }));
    }

    #[test]
    fn reserved_bytes_must_be_zero() {
        assert_eq!(Reader::new("test", &[0; 4]).reserved::<4>(), Ok(()));
        let error = WireError::ReservedNotZero { message: "test" };
        assert_eq!(Reader::new("test", &[0, 0, 0, 1]).reserved::<4>(), Err(error));
    }

    #[test]
    fn a_count_makes_no_more_room_than_the_bytes_that_came_can_fill() {
        let reader = Reader::new("test", &[0; 64]);
        let room: Vec<u64> = reader.room_for("digests", 8, 100, 8).unwrap();
        assert_eq!((room.len(), room.capacity()), (0, 8));
        let cut_short = WireError::CutShort { message: "test", wanted: 72, left: 64 };
        assert_eq!(reader.room_for::<u64>("digests", 9, 100, 8), Err(cut_short));
        let too_large = WireError::TooLarge { field: "digests", value: 101, limit: 100 };
        assert_eq!(reader.room_for::<u64>("digests", 101, 100, 0), Err(too_large));
        assert!(reader.room_for::<u64>("digests", usize::MAX, usize::MAX, 8).is_err());
    }
}
