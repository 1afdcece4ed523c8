//! RAM on a multifd channel: a header of 1344 bytes, however few pages it names, and the bytes of its normal pages.
//!
//! ```text
//!   0  magic             u32       0x11223344
//!   4  version           u32       1
//!   8  flags             u32       0x01 SYNC; 0x02 zlib, 0x04 zstd; 0x40 another layout: see `device`
//!  12  pages_alloc       u32       pages it has room for: 1 to 128; in a SYNC of QEMU 10.0, 0
//!  16  normal_pages      u32       pages whose bytes follow
//!  20  next_packet_size  u32       bytes that follow
//!  24  packet_num        u64
//!  32  zero_pages        u32       pages of zeros; in QEMU 7.2, 0
//!  36  reserved          28 bytes  zero
//!  64  ramblock          256 bytes the block of all its pages, filled up with zeros
//! 320  offset            128 u64   in bytes: first of the normal pages, then of the zero pages
//! ```

#![forbid(unsafe_code)]

use super::PAGE_BYTES;
use super::codec::{Reader, Stop};
use super::dialect::Dialect;
use super::error::{Fault, Stream, StreamError};
use super::name::Name;

/// Bytes that all packets begin with: enough to see which kind it is.
pub const COMMON_BYTES: usize = 12;

/// Bytes of the header of a RAM packet.
pub const RAM_PACKET_BYTES: usize = 1344;

/// Most pages of one packet.
pub const PACKET_PAGES_MAX: usize = 128;

/// Most bytes that follow a compressed packet: twice its pages.
pub const COMPRESSED_BYTES_MAX: u32 = 1 << 20;

pub(super) const MAGIC: u32 = 0x1122_3344;
pub(super) const VERSION: u32 = 1;
pub(super) const FLAG_DEVICE_STATE: u32 = 0x40;
const FLAG_SYNC: u32 = 0x01;
const FLAGS_COMPRESSION: u32 = 0x3E;
const OFFSETS_AT: usize = 320;
/// What errors call it.
const NAME: &str = "header of a RAM packet";

/// The two kinds of packets on a channel.
///
/// ```
/// assert_eq!(pageferry::qemu::wire::PacketKind::Ram.header_bytes(), 1344);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PacketKind {
    /// Pages, a SYNC, or both.
    Ram,
    /// State of a device.
    DeviceState,
}

impl PacketKind {
    /// Bytes of its header, with the [`COMMON_BYTES`].
    pub const fn header_bytes(self) -> usize {
        match self {
            PacketKind::Ram => RAM_PACKET_BYTES,
            PacketKind::DeviceState => super::device::DEVICE_PACKET_BYTES,
        }
    }
}

/// How the pages of a packet are compressed. The state of a compressor lives as long as its channel, so the packets of
/// a channel can be read only in order and from the first one on.
///
/// ```
/// assert_ne!(pageferry::qemu::wire::Compression::Zlib, pageferry::qemu::wire::Compression::Zstd);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Compression {
    /// Not at all: 4096 bytes a page.
    None,
    /// One deflate stream a channel, cut at each packet by a sync flush.
    Zlib,
    /// One zstd frame a channel, cut at each packet by a flush.
    Zstd,
}

impl Compression {
    const fn bits(self) -> u32 {
        match self {
            Compression::None => 0,
            Compression::Zlib => 0x02,
            Compression::Zstd => 0x04,
        }
    }
}

/// Reads the beginning of any packet, which is byte `at` of the channel, and says which kind of packet it is.
///
/// # Errors
///
/// If the magic or the version is another. The rest is for [`RamPacket::decode`] and
/// [`super::DevicePacket::decode`], which read these bytes again.
pub fn packet_kind(bytes: &[u8; COMMON_BYTES], at: u64) -> Result<PacketKind, StreamError> {
    let mut fields = Reader::new(Stream::Channel, at, bytes);
    let flags = common(&mut fields).map_err(|stop| fields.whole("beginning of a packet", stop))?;
    Ok(if flags & FLAG_DEVICE_STATE == 0 { PacketKind::Ram } else { PacketKind::DeviceState })
}

/// The magic and the version, which an init packet has too.
pub(super) fn magic_and_version(fields: &mut Reader<'_>) -> Result<(), Stop> {
    fields.expect_u32("magic", MAGIC, "0x11223344")?;
    fields.expect_u32("version", VERSION, "1")
}

/// The magic, the version, and the flags, which it returns.
pub(super) fn common(fields: &mut Reader<'_>) -> Result<u32, Stop> {
    magic_and_version(fields)?;
    fields.u32()
}

/// Offsets of pages in their block, in bytes: multiples of [`PAGE_BYTES`], in the order in which the pages follow.
///
/// ```
/// use pageferry::qemu::wire::{Dialect, Name, NewRamPacket, RamPacket};
///
/// let block = Name::new("pc.ram").unwrap();
/// let bytes = NewRamPacket { normal: &[0x9000, 0x7000], ..NewRamPacket::pages(7, &block) }.encode(Dialect::V10_0)?;
/// let packet = RamPacket::decode(&bytes, Dialect::V10_0, 64)?;
/// assert!(packet.normal.iter().eq([0x9000, 0x7000]));
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offsets<'a>(&'a [u8]);

impl<'a> Offsets<'a> {
    /// How many there are: at most [`PACKET_PAGES_MAX`].
    pub const fn len(&self) -> usize {
        self.0.len() / 8
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u64> + Clone + use<'a> {
self.0.chunks_exact(8).map(|bytes| bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)))
    }
}

/// The header of a RAM packet, read and checked as far as it can be without its block.
///
/// A packet that has pages and is a SYNC is one that comes before the barrier: place its pages, then treat it as SYNC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RamPacket<'a> {
    /// Where its first byte stands in the channel.
    pub at: u64,
    /// Whether the barrier follows it on this channel.
    pub sync: bool,
    /// How its data is compressed. A caller knows which way was agreed.
    pub compression: Compression,
    /// The source's number for it. QEMU 10.0 counts all packets of a migration; 7.2's are neither unique nor without
    /// gaps.
    pub number: u64,
    /// The block of its pages; `None` if it has no pages.
    pub block: Option<&'a str>,
    /// The pages whose bytes follow.
    pub normal: Offsets<'a>,
    /// The pages that hold zeros only. Nothing follows for them.
    pub zero: Offsets<'a>,
    /// Bytes that follow this header: 4096 for each of the normal pages, or what they were compressed to, which is at
    /// most [`COMPRESSED_BYTES_MAX`].
    pub data_bytes: u32,
}

impl<'a> RamPacket<'a> {
    /// Reads a header whose first byte is byte `at` of the channel.
    ///
    /// # Errors
    ///
    /// If a flag is unknown or not the dialect's, a count is over what the packet has room for, the length does not fit
    /// the pages, the block has no name, an offset is not aligned or comes twice, or a byte that must be zero is not.
    pub fn decode(bytes: &'a [u8; RAM_PACKET_BYTES], dialect: Dialect, at: u64) -> Result<RamPacket<'a>, StreamError> {
        let mut fields = Reader::new(Stream::Channel, at, bytes);
        RamPacket::read(&mut fields, dialect).map_err(|stop| fields.whole(NAME, stop))
    }

    fn read(fields: &mut Reader<'a>, dialect: Dialect) -> Result<RamPacket<'a>, Stop> {
        let at = fields.at();
        let (sync, compression) = flags(fields)?;
        let (alloc, normal, size) = (counted(fields, "pages_alloc", PACKET_PAGES_MAX as u32)?, fields.u32()?, fields.u32()?);
        let number = fields.u64()?;
        let zero = fields.u32()?;
        let room = alloc;
        if normal > room {
            return Err(fields.bad(20, Fault::TooLarge { field: "normal_pages", found: normal.into(), limit: room.into() }));
        }
        // Before 9.0 the field was reserved, and 0.
        let zero_max = room - normal;
        if zero > zero_max {
            return Err(fields.bad(4, Fault::TooLarge { field: "zero_pages", found: zero.into(), limit: zero_max.into() }));
        }
        let pages = normal + zero;
        if dialect == Dialect::V10_0 && (pages == 0) != sync {
            let expected = if sync { "none in a SYNC packet" } else { "pages, or the flag SYNC" };
            return Err(fields.bad(20, Fault::Value { field: "number of pages", found: pages.into(), expected }));
        }
        if dialect == Dialect::V10_0 && sync && alloc != 0 {
            let expected = "0 in a SYNC packet";
            return Err(fields.bad(24, Fault::Value { field: "pages_alloc", found: alloc.into(), expected }));
        }
        let data_bytes = data_bytes(fields, dialect, compression, normal, size)?;
        fields.zeros("reserved byte of a RAM packet", 28)?;

        // QEMU 7.2 leaves what it sent before in whatever a packet does not use.
        let stale = dialect == Dialect::V7_2;
        let name = fields.bytes(256)?;
        let block = match pages {
            0 => None,
            _ => Some(Name::check_padded("ramblock", name, stale).map_err(|fault| fields.bad(256, fault))?),
        };
        if pages == 0 && !stale && name.iter().fold(0, |any, byte| any | byte) != 0 {
            return Err(fields.bad(256, Fault::Text { field: "ramblock", expected: "empty in a packet without pages" }));
        }
        let normal = Offsets(fields.bytes(8 * normal as usize)?);
        let zero = Offsets(fields.bytes(8 * zero as usize)?);
        let packet = RamPacket { at, sync, compression, number, block, normal, zero, data_bytes };
        packet.check_offsets(fields)?;
        if !stale {
            fields.zeros("unused offset", RAM_PACKET_BYTES - fields.taken())?;
        }
        Ok(packet)
    }

    /// Whether all its pages lie inside their block, which has `block_bytes` bytes.
    ///
    /// # Errors
    ///
    /// The first page that does not.
    pub fn check_inside(&self, block_bytes: u64) -> Result<(), StreamError> {
        let outside = |offset: u64| offset.checked_add(PAGE_BYTES).is_none_or(|end| end > block_bytes);
        let Some(index) = self.offsets().position(outside) else { return Ok(()) };
        let offset = self.offsets().nth(index).unwrap_or_default();
        let at = self.at.saturating_add((OFFSETS_AT + 8 * index) as u64);
        Err(StreamError { stream: Stream::Channel, at, fault: Fault::Offset { offset, block_bytes } })
    }

    fn offsets(&self) -> impl Iterator<Item = u64> + Clone + use<'a> {
        self.normal.iter().chain(self.zero.iter())
    }

    /// Whether every offset is aligned, and none comes twice.
    fn check_offsets(&self, fields: &Reader<'_>) -> Result<(), Stop> {
        let back = |index: usize| fields.taken() - OFFSETS_AT - 8 * index;
        // A page's place among 1024 bits is its number modulo 1024. A packet is filled from one stretch of a block, so
        // two pages seldom meet there, and only then are all of them compared.
        let mut seen = [0_u64; 16];
        let mut met = false;
        for (index, offset) in self.offsets().enumerate() {
            if offset % PAGE_BYTES != 0 {
                let expected = "a multiple of 4096";
                return Err(fields.bad(back(index), Fault::Value { field: "offset of a page", found: offset, expected }));
            }
            let place = (offset / PAGE_BYTES % 1024) as usize;
            let bit = 1 << (place % 64);
            met |= seen[place / 64] & bit != 0;
            seen[place / 64] |= bit;
        }
        if !met {
            return Ok(());
        }
        let mut sorted = [0; PACKET_PAGES_MAX];
        let pages = self.offsets().zip(&mut sorted).map(|(offset, slot)| *slot = offset).count();
        let sorted = &mut sorted[..pages];
        sorted.sort_unstable();
        let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]) else { return Ok(()) };
        let index = self.offsets().position(|offset| offset == twice).unwrap_or_default();
        Err(fields.bad(back(index), Fault::Twice { what: "the page at offset", name: format!("{twice:#x}") }))
    }
}

/// The flags of a RAM packet: whether it is a SYNC, and how it is compressed.
fn flags(fields: &mut Reader<'_>) -> Result<(bool, Compression), Stop> {
    let flags = common(fields)?;
    let compression = match flags & FLAGS_COMPRESSION {
        0 => Compression::None,
        0x02 => Compression::Zlib,
        0x04 => Compression::Zstd,
        _ => {
            let expected = "no compression, zlib (0x2) or zstd (0x4)";
            return Err(fields.bad(4, Fault::Value { field: "flag word", found: flags.into(), expected }));
        }
    };
    if flags & !(FLAG_SYNC | FLAGS_COMPRESSION) != 0 {
        let expected = "SYNC (0x1) and one way of compression";
        return Err(fields.bad(4, Fault::Value { field: "flag word", found: flags.into(), expected }));
    }
    Ok((flags & FLAG_SYNC != 0, compression))
}

/// Four bytes that hold a number of at most `limit`.
fn counted(fields: &mut Reader<'_>, field: &'static str, limit: u32) -> Result<u32, Stop> {
    let found = fields.u32()?;
    if found <= limit {
        return Ok(found);
    }
    Err(fields.bad(4, Fault::TooLarge { field, found: found.into(), limit: limit.into() }))
}

/// How many bytes follow, with `size` in next_packet_size; the field after zero_pages is the next one.
fn data_bytes(
    fields: &Reader<'_>,
    dialect: Dialect,
    compression: Compression,
    normal: u32,
    size: u32,
) -> Result<u32, Stop> {
    const BACK: usize = 16;
    let (field, found) = ("next_packet_size", u64::from(size));
    let plain = normal * PAGE_BYTES as u32;
    match (compression, dialect) {
        // QEMU 7.2 may leave the size of an earlier packet in one without data.
        (Compression::None, Dialect::V7_2) => Ok(plain),
        (_, Dialect::V7_2) if normal == 0 => Ok(0),
        (Compression::None, Dialect::V10_0) if size != plain => {
            Err(fields.bad(BACK, Fault::Length { field, found, expected: plain.into() }))
        }
        (_, Dialect::V10_0) if normal == 0 && size != 0 => {
            Err(fields.bad(BACK, Fault::Length { field, found, expected: 0 }))
        }
        _ if normal > 0 && size == 0 => {
            Err(fields.bad(BACK, Fault::Value { field, found, expected: "the length of the compressed pages" }))
        }
        _ if size > COMPRESSED_BYTES_MAX => {
            Err(fields.bad(BACK, Fault::TooLarge { field, found, limit: COMPRESSED_BYTES_MAX.into() }))
        }
        _ => Ok(size),
    }
}

/// A RAM packet that is to be written.
///
/// ```
/// use pageferry::qemu::wire::{Dialect, NewRamPacket, RamPacket};
///
/// let bytes = NewRamPacket::sync(3).encode(Dialect::V10_0)?;
/// let packet = RamPacket::decode(&bytes, Dialect::V10_0, 64)?;
/// assert!(packet.sync && packet.block.is_none() && packet.number == 3);
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewRamPacket<'a> {
    /// Whether the barrier follows it on this channel.
    pub sync: bool,
    /// How its data is compressed.
    pub compression: Compression,
    /// Its number.
    pub number: u64,
    /// The block of its pages; `None` if it has no pages.
    pub block: Option<&'a Name>,
    /// Offsets of the pages whose bytes follow.
    pub normal: &'a [u64],
    /// Offsets of the pages that hold zeros only. QEMU 7.2 does not read them: to it they go as data, or on the main
    /// stream.
    pub zero: &'a [u64],
    /// Bytes of the compressed pages; not looked at without compression.
    pub compressed_bytes: u32,
}

impl<'a> NewRamPacket<'a> {
    /// A packet with pages of `block`, not compressed; the pages are still to be named.
    pub const fn pages(number: u64, block: &'a Name) -> NewRamPacket<'a> {
        NewRamPacket { block: Some(block), sync: false, ..NewRamPacket::sync(number) }
    }

    /// A SYNC without pages.
    pub const fn sync(number: u64) -> NewRamPacket<'a> {
        let (compression, block) = (Compression::None, None);
        NewRamPacket { sync: true, compression, number, block, normal: &[], zero: &[], compressed_bytes: 0 }
    }

    /// The header of this packet. [`RamPacket::data_bytes`] of data must follow it.
    ///
    /// # Errors
    ///
    /// Whatever [`RamPacket::decode`] would find wrong with it.
    pub fn encode(&self, dialect: Dialect) -> Result<[u8; RAM_PACKET_BYTES], StreamError> {
        let mut bytes = [0; RAM_PACKET_BYTES];
        let (normal, pages) = (self.normal.len(), self.normal.len().saturating_add(self.zero.len()));
        let refuse = |at: u64, fault| Err(StreamError { stream: Stream::Channel, at, fault });
        if pages > PACKET_PAGES_MAX {
            let limit = PACKET_PAGES_MAX as u64;
            return refuse(16, Fault::TooLarge { field: "number of pages", found: pages as u64, limit });
        }
        if self.block.is_some() != (pages > 0) {
            return refuse(64, Fault::Text { field: "ramblock", expected: "there for pages, and only for pages" });
        }
        let size = match (self.compression, normal) {
            (Compression::None, _) => normal as u32 * PAGE_BYTES as u32,
            (_, 0) => 0,
            _ => self.compressed_bytes,
        };
        let alloc = if pages == 0 && dialect == Dialect::V10_0 { 0 } else { PACKET_PAGES_MAX as u32 };
        let flags = (u32::from(self.sync) * FLAG_SYNC) | self.compression.bits();
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_be_bytes());
        bytes[8..12].copy_from_slice(&flags.to_be_bytes());
        bytes[12..16].copy_from_slice(&alloc.to_be_bytes());
        bytes[16..20].copy_from_slice(&(normal as u32).to_be_bytes());
        bytes[20..24].copy_from_slice(&size.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.number.to_be_bytes());
        bytes[32..36].copy_from_slice(&(self.zero.len() as u32).to_be_bytes());
        if let Some(name) = self.block {
            let name = name.as_str().as_bytes();
            bytes[64..64 + name.len()].copy_from_slice(name);
        }
        let slots = bytes[OFFSETS_AT..].chunks_exact_mut(8);
        slots.zip(self.normal.iter().chain(self.zero)).for_each(|(slot, offset)| slot.copy_from_slice(&offset.to_be_bytes()));
        RamPacket::decode(&bytes, dialect, 0)?;
        Ok(bytes)
    }
}
