//! Data packets: a fixed header and a table of runs in front of the bytes of guest RAM.
//!
//! ```text
//! header, 64 bytes
//!   0  magic          u32      "PFpk"
//!   4  kind           u8       1 pages, 2 flush, 3 round end, 4 bye
//!   5  flags          u8       zero
//!   6  block          u16      0 in a mark
//!   8  run count      u32      1 to 1024; 0 in a mark
//!  12  round          u32      in a round end mark: the round that ended
//!  16  epoch          u64      in a flush mark: the epoch that ended
//!  24  sequence       u64      of this channel's packets, from 0
//!  32  payload bytes  u64      at most 4 MiB; 0 in a mark
//!  40  reserved       20 bytes zero
//!  60  crc            u32      CRC-32C of the header, these four bytes as zero, and the table
//! table, 16 bytes a run
//!   0  first page     u64
//!   8  pages          u32
//!  12  kind           u32      1 data, 2 zero
//! payload: the bytes of the data runs, in the order of the table
//! ```
//!
//! The payload has no checksum in the packet: the guest may write between the moment of hashing and that of sending.
//!
//! Everything here is on the page path: nothing allocates, and nothing panics, whatever the bytes are.

#![forbid(unsafe_code)]

mod table;

use std::fmt;

pub use table::{RunEntry, RunKind, TableSum, entries, validate_table};

use super::codec::{Reader, check_round, crc_around};
use super::{BLOCKS_MAX, WireError};
use crate::units::{BlockId, Epoch, Round};

/// Bytes of a packet's header.
pub const PACKET_HEADER_BYTES: usize = 64;

/// Bytes of one run in the table.
pub const RUN_ENTRY_BYTES: usize = 16;

/// Most runs in one packet. Linux takes 1024 pieces of memory in one system call; a longer table could not be read or
/// written in one.
pub const RUNS_PER_PACKET_MAX: usize = 1024;

/// Most bytes of pages in one packet. Larger packets save nothing (one header in 4 MiB is noise) and make a lane deaf
/// for longer.
pub const PAYLOAD_BYTES_MAX: u64 = 4 << 20;

/// Room for the largest header and table: what a sender or a receiver sets aside once.
pub const HEADER_AND_TABLE_BYTES_MAX: usize = PACKET_HEADER_BYTES + RUNS_PER_PACKET_MAX * RUN_ENTRY_BYTES;

/// The first four bytes of every packet, read as a little-endian number.
pub const PACKET_MAGIC: u32 = u32::from_le_bytes(*b"PFpk");

/// Where the CRC stands in the header: at its end, so that it covers one stretch before it and one after.
const CRC_AT: usize = PACKET_HEADER_BYTES - 4;

/// What errors call it.
const NAME: &str = "packet header";

/// What a packet is.
///
/// ```
/// assert_eq!(pageferry::wire::packet::PacketKind::RoundEnd.to_string(), "round end");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PacketKind {
    /// Runs of pages of one block.
    Pages,
    /// A mark: the epoch has ended on this channel.
    Flush,
    /// A mark: the round has ended on this channel.
    RoundEnd,
    /// A mark: nothing more will come. A connection that ends without it was cut.
    Bye,
}

impl PacketKind {
    const fn code(self) -> u8 {
        match self {
            PacketKind::Pages => 1,
            PacketKind::Flush => 2,
            PacketKind::RoundEnd => 3,
            PacketKind::Bye => 4,
        }
    }

    fn from_code(code: u8) -> Result<PacketKind, WireError> {
        match code {
            1 => Ok(PacketKind::Pages),
            2 => Ok(PacketKind::Flush),
            3 => Ok(PacketKind::RoundEnd),
            4 => Ok(PacketKind::Bye),
            other => Err(WireError::BadValue { field: "packet kind", value: other.into() }),
        }
    }
}

impl fmt::Display for PacketKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PacketKind::Pages => "pages",
            PacketKind::Flush => "flush",
            PacketKind::RoundEnd => "round end",
            PacketKind::Bye => "bye",
        })
    }
}

/// What the header of a packet says. Magic, flags, reserved bytes and CRC are not kept: they are the same for all, or
/// follow from the rest.
///
/// ```
/// use pageferry::units::{BlockId, Epoch, PageSize, Round};
/// use pageferry::wire::packet::*;
///
/// let table = [RunEntry { first: 8, pages: 1, kind: RunKind::Data }, RunEntry { first: 9, pages: 7, kind: RunKind::Zero }];
/// let header = PacketHeader {
///     kind: PacketKind::Pages,
///     block: BlockId(2),
///     run_count: 2,
///     round: Round(1),
///     epoch: Epoch(5),
///     sequence: 77,
///     payload_bytes: 4096,
/// };
/// let mut bytes = [0; HEADER_AND_TABLE_BYTES_MAX];
/// let len = header.encode_into(&table, &mut bytes)?;
///
/// // What a lane does: the header first, then the table, whose length the header tells.
/// let (head, rest) = bytes[..len].split_first_chunk().unwrap();
/// let header = PacketHeader::decode(head)?;
/// let table = &rest[..header.table_bytes()];
/// check_crc(head, table)?;
/// let sum = validate_table(&header, table, PageSize::SIZE_4K, 16)?;
/// assert_eq!((sum.data_pages, sum.zero_pages), (1, 7));
/// # Ok::<(), pageferry::wire::WireError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PacketHeader {
    /// What the packet is.
    pub kind: PacketKind,
    /// The block that its runs lie in; block 0 in a mark.
    pub block: BlockId,
    /// Rows of the table; 0 in a mark.
    pub run_count: u32,
    /// The round in which the pages were harvested; in a round end mark, the round that ended.
    pub round: Round,
    /// The epoch that it belongs to; in a flush mark, the epoch that ended.
    pub epoch: Epoch,
    /// Its number among the packets of this connection, from 0.
    pub sequence: u64,
    /// Bytes of pages after the table; 0 in a mark.
    pub payload_bytes: u64,
}

impl PacketHeader {
    /// A flush mark: `epoch` has ended on this channel, in `round`.
    pub const fn flush(epoch: Epoch, round: Round, sequence: u64) -> PacketHeader {
        PacketHeader::mark(PacketKind::Flush, epoch, round, sequence)
    }

    /// A round end mark: `round` has ended on this channel, in `epoch`.
    pub const fn round_end(round: Round, epoch: Epoch, sequence: u64) -> PacketHeader {
        PacketHeader::mark(PacketKind::RoundEnd, epoch, round, sequence)
    }

    /// A bye mark: nothing more will come on this channel.
    pub const fn bye(round: Round, epoch: Epoch, sequence: u64) -> PacketHeader {
        PacketHeader::mark(PacketKind::Bye, epoch, round, sequence)
    }

    const fn mark(kind: PacketKind, epoch: Epoch, round: Round, sequence: u64) -> PacketHeader {
        PacketHeader { kind, block: BlockId(0), run_count: 0, round, epoch, sequence, payload_bytes: 0 }
    }

    /// Bytes of the table that follows.
    pub const fn table_bytes(&self) -> usize {
        (self.run_count as usize).saturating_mul(RUN_ENTRY_BYTES)
    }

    /// Writes this header and `table` to the front of `out`, with their CRC, and returns how many bytes they are.
    /// Nothing is allocated. Whether the runs fit the block is not looked at: the scanner cut them from it.
    ///
    /// # Errors
    ///
    /// [`WireError::TableLength`] if `table` has not `run_count` rows, [`WireError::BufferTooSmall`] if `out` is
    /// shorter than both; and whatever [`PacketHeader::decode`] would find wrong with the header. Errors, not panics,
    /// though only a bug leads to them: a VMM that aborts on panic must not lose its guest to one.
    pub fn encode_into(&self, table: &[RunEntry], out: &mut [u8]) -> Result<usize, WireError> {
        self.check()?;
        if table.len() != self.run_count as usize {
            let table_bytes = table.len().saturating_mul(RUN_ENTRY_BYTES);
            return Err(WireError::TableLength { run_count: self.run_count, table_bytes });
        }
        let needed = PACKET_HEADER_BYTES + self.table_bytes();
        let given = out.len();
        let too_small = WireError::BufferTooSmall { needed, given };
        let out = out.get_mut(..needed).ok_or(too_small)?;
        let (header, rows) = out.split_first_chunk_mut::<PACKET_HEADER_BYTES>().ok_or(too_small)?;

        for (row, run) in rows.chunks_exact_mut(RUN_ENTRY_BYTES).zip(table) {
            row.copy_from_slice(&run.encode());
        }
        header.fill(0);
        header[0..4].copy_from_slice(&PACKET_MAGIC.to_le_bytes());
        header[4] = self.kind.code();
        header[6..8].copy_from_slice(&self.block.0.to_le_bytes());
        header[8..12].copy_from_slice(&self.run_count.to_le_bytes());
        header[12..16].copy_from_slice(&self.round.0.to_le_bytes());
        header[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        header[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        header[32..40].copy_from_slice(&self.payload_bytes.to_le_bytes());
        let crc = crc_around(&header[..CRC_AT], rows);
        header[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        Ok(needed)
    }

    /// Reads a header and checks all of it but the CRC, which covers the table too: [`check_crc`] must follow before
    /// anything is believed except the length of the table.
    ///
    /// # Errors
    ///
    /// [`WireError::NotAPacket`] if the magic is wrong; [`WireError::BadValue`], [`WireError::TooLarge`],
    /// [`WireError::ReservedNotZero`], [`WireError::PacketWithoutRuns`] and [`WireError::MarkNotEmpty`] if a field is.
    pub fn decode(bytes: &[u8; PACKET_HEADER_BYTES]) -> Result<PacketHeader, WireError> {
        let mut fields = Reader::new(NAME, bytes);
        let magic = fields.u32()?;
        if magic != PACKET_MAGIC {
            return Err(WireError::NotAPacket { magic });
        }
        let kind = PacketKind::from_code(fields.u8()?)?;
        fields.reserved::<1>()?;
        let header = PacketHeader {
            kind,
            block: BlockId(fields.u16()?),
            run_count: fields.u32()?,
            round: Round(fields.u32()?),
            epoch: Epoch(fields.u64()?),
            sequence: fields.u64()?,
            payload_bytes: fields.u64()?,
        };
        fields.reserved::<20>()?;
        header.check()?;
        Ok(header)
    }

    /// What can be wrong with a header by itself, whoever made it.
    fn check(&self) -> Result<(), WireError> {
        check_round(self.round)?;
        if self.kind != PacketKind::Pages {
            if self.block != BlockId(0) || self.run_count != 0 || self.payload_bytes != 0 {
                let PacketHeader { kind, block, run_count, payload_bytes, .. } = *self;
                return Err(WireError::MarkNotEmpty { kind, block, run_count, payload_bytes });
            }
            return Ok(());
        }
        at_most("block of a packet", self.block.0.into(), BLOCKS_MAX as u64 - 1)?;
        at_most("run count of a packet", self.run_count.into(), RUNS_PER_PACKET_MAX as u64)?;
        at_most("payload length of a packet", self.payload_bytes, PAYLOAD_BYTES_MAX)?;
        if self.run_count == 0 { Err(WireError::PacketWithoutRuns) } else { Ok(()) }
    }
}

fn at_most(field: &'static str, value: u64, limit: u64) -> Result<(), WireError> {
    if value <= limit { Ok(()) } else { Err(WireError::TooLarge { field, value, limit }) }
}

/// Checks a header and its table, as they came, against the CRC in the header.
///
/// # Errors
///
/// [`WireError::BadCrc`] if they were damaged on the way.
pub fn check_crc(header: &[u8; PACKET_HEADER_BYTES], table: &[u8]) -> Result<(), WireError> {
    let (covered, stated) = header.split_at(CRC_AT);
    let stated = Reader::new(NAME, stated).u32()?;
    let computed = crc_around(covered, table);
    if stated == computed {
        Ok(())
    } else {
        Err(WireError::BadCrc { message: "packet header or table", stated, computed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: PacketHeader = PacketHeader {
        kind: PacketKind::Pages,
        block: BlockId(1),
        run_count: 1,
        round: Round(2),
        epoch: Epoch(3),
        sequence: 4,
        payload_bytes: 4096,
    };
    const RUN: RunEntry = RunEntry { first: 5, pages: 1, kind: RunKind::Data };

    /// The bytes of `PAGES` with some of them changed.
    fn with(at: usize, new: &[u8]) -> [u8; PACKET_HEADER_BYTES] {
        let mut bytes = [0; PACKET_HEADER_BYTES + RUN_ENTRY_BYTES];
        PAGES.encode_into(&[RUN], &mut bytes).unwrap();
        bytes[at..at + new.len()].copy_from_slice(new);
        *bytes.first_chunk().unwrap()
    }

    fn too_large(field: &'static str, value: u64, limit: u64) -> Result<PacketHeader, WireError> {
        Err(WireError::TooLarge { field, value, limit })
    }

    #[test]
    fn each_wrong_header_has_its_own_error() {
        assert_eq!(PacketHeader::decode(&with(0, &[])), Ok(PAGES));
        assert_eq!(PacketHeader::decode(&with(0, &[1, 0, 0, 0])), Err(WireError::NotAPacket { magic: 1 }));
        for (kind, value) in [(0u8, 0), (5, 5), (255, 255)] {
            assert_eq!(
                PacketHeader::decode(&with(4, &[kind])),
                Err(WireError::BadValue { field: "packet kind", value })
            );
        }
        for reserved in [5, 40, 59] {
            assert_eq!(
                PacketHeader::decode(&with(reserved, &[0x80])),
                Err(WireError::ReservedNotZero { message: "packet header" }),
                "byte {reserved}"
            );
        }
        assert_eq!(PacketHeader::decode(&with(6, &[0, 4])), too_large("block of a packet", 1024, 1023));
        assert_eq!(PacketHeader::decode(&with(8, &[0; 4])), Err(WireError::PacketWithoutRuns));
        assert_eq!(PacketHeader::decode(&with(8, &[1, 4])), too_large("run count of a packet", 1025, 1024));
        assert_eq!(PacketHeader::decode(&with(12, &[0, 0, 1])), too_large("round", 65536, 65534));
        let one_more = PAYLOAD_BYTES_MAX + 1;
        assert_eq!(
            PacketHeader::decode(&with(32, &one_more.to_le_bytes())),
            too_large("payload length of a packet", one_more, PAYLOAD_BYTES_MAX)
        );
    }

    #[test]
    fn a_mark_that_carries_something_is_refused() {
        for kind in [PacketKind::Flush, PacketKind::RoundEnd, PacketKind::Bye] {
            let error = WireError::MarkNotEmpty { kind, block: BlockId(1), run_count: 1, payload_bytes: 4096 };
            assert_eq!(PacketHeader::decode(&with(4, &[kind.code()])), Err(error));
            for (block, run_count, payload_bytes) in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
                let mark = PacketHeader { kind, block: BlockId(block), run_count, payload_bytes, ..PAGES };
                let error = mark.encode_into(&[], &mut [0; 64]).unwrap_err();
                assert!(matches!(error, WireError::MarkNotEmpty { .. }), "{error:?}");
            }
        }
    }

    #[test]
    fn the_largest_header_is_taken_both_ways() {
        let header = PacketHeader {
            block: BlockId(1023),
            run_count: 1024,
            round: Round::MAX,
            epoch: Epoch(u64::MAX),
            sequence: u64::MAX,
            payload_bytes: PAYLOAD_BYTES_MAX,
            ..PAGES
        };
        let table = [RUN; RUNS_PER_PACKET_MAX];
        let mut out = [0; HEADER_AND_TABLE_BYTES_MAX];
        assert_eq!(header.encode_into(&table, &mut out), Ok(HEADER_AND_TABLE_BYTES_MAX));
        let (head, rows) = out.split_first_chunk().unwrap();
        assert_eq!(PacketHeader::decode(head), Ok(header));
        assert_eq!(check_crc(head, rows), Ok(()));
    }

    #[test]
    fn an_encoder_that_is_asked_wrongly_says_so_and_does_not_panic() {
        let mut out = [0xEE; 80];
        let length = WireError::TableLength { run_count: 1, table_bytes: 0 };
        assert_eq!(PAGES.encode_into(&[], &mut out), Err(length));
        assert!(PAGES.encode_into(&[RUN, RUN], &mut out).is_err());
        let too_small = WireError::BufferTooSmall { needed: 80, given: 79 };
        assert_eq!(PAGES.encode_into(&[RUN], &mut out[..79]), Err(too_small));
        let hand_made = PacketHeader { run_count: u32::MAX, ..PAGES };
        assert!(hand_made.encode_into(&[RUN], &mut out).is_err());
        assert_eq!(out, [0xEE; 80], "a refused packet writes nothing");
    }

    #[test]
    fn stale_bytes_in_the_buffer_do_not_travel() {
        let mut used = [0xEE; 80];
        let mut fresh = [0; 80];
        PAGES.encode_into(&[RUN], &mut used).unwrap();
        PAGES.encode_into(&[RUN], &mut fresh).unwrap();
        assert_eq!(used, fresh);
    }
}
