//! The table of a packet: which pages of its block it carries, and the proof that they lie in it.

#![forbid(unsafe_code)]

use super::{PacketHeader, RUN_ENTRY_BYTES};
use crate::units::PageSize;
use crate::wire::WireError;
use crate::wire::codec::Reader;

/// Whether the bytes of a run travel.
///
/// ```
/// assert_ne!(pageferry::wire::packet::RunKind::Data, pageferry::wire::packet::RunKind::Zero);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RunKind {
    /// They do.
    Data,
    /// They are all zero and do not.
    Zero,
}

/// One row of a packet's table: adjacent pages of the packet's block.
///
/// ```
/// use pageferry::wire::packet::{RunEntry, RunKind};
///
/// let run = RunEntry { first: 8, pages: 4, kind: RunKind::Data };
/// assert_eq!(RunEntry::decode(&run.encode()), Ok(run));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RunEntry {
    /// Index of the first page in the block.
    pub first: u64,
    /// Number of pages; never 0.
    pub pages: u32,
    /// Whether their bytes travel.
    pub kind: RunKind,
}

impl RunEntry {
    /// The bytes of this row.
    pub fn encode(&self) -> [u8; RUN_ENTRY_BYTES] {
        let kind: u32 = match self.kind {
            RunKind::Data => 1,
            RunKind::Zero => 2,
        };
        let mut bytes = [0; RUN_ENTRY_BYTES];
        bytes[0..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.pages.to_le_bytes());
        bytes[12..16].copy_from_slice(&kind.to_le_bytes());
        bytes
    }

    /// Reads a row. Whether the run fits its block is for [`validate_table`] to say.
    ///
    /// # Errors
    ///
    /// [`WireError::BadValue`] if the kind of run is neither data nor zero.
    pub fn decode(bytes: &[u8; RUN_ENTRY_BYTES]) -> Result<RunEntry, WireError> {
        let mut fields = Reader::new("packet table", bytes);
        let (first, pages) = (fields.u64()?, fields.u32()?);
        let kind = match fields.u32()? {
            1 => RunKind::Data,
            2 => RunKind::Zero,
            other => return Err(WireError::BadValue { field: "kind of a run", value: other.into() }),
        };
        Ok(RunEntry { first, pages, kind })
    }
}

/// The rows of a table as it came, one by one, without allocating. Bytes after the last whole row are not looked at;
/// [`validate_table`] finds them.
///
/// ```
/// use pageferry::wire::packet::{RunEntry, RunKind, entries};
///
/// let run = RunEntry { first: 8, pages: 4, kind: RunKind::Zero };
/// let pages: u32 = entries(&run.encode()).map(|run| run.map_or(0, |run| run.pages)).sum();
/// assert_eq!(pages, 4);
/// ```
pub fn entries(table: &[u8]) -> impl ExactSizeIterator<Item = Result<RunEntry, WireError>> + '_ {
    table.chunks_exact(RUN_ENTRY_BYTES).map(|row| {
        let mut bytes = [0; RUN_ENTRY_BYTES];
        bytes.copy_from_slice(row);
        RunEntry::decode(&bytes)
    })
}

/// What the runs of one packet add up to.
///
/// ```
/// use pageferry::units::{Epoch, PageSize, Round};
/// use pageferry::wire::packet::{PacketHeader, TableSum, validate_table};
///
/// let mark = PacketHeader::flush(Epoch(3), Round(0), 12);
/// let nothing = TableSum { data_pages: 0, zero_pages: 0 };
/// assert_eq!(validate_table(&mark, &[], PageSize::SIZE_4K, 0), Ok(nothing));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct TableSum {
    /// Pages whose bytes are in the payload.
    pub data_pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
}

/// Proves that a packet fits its block: every run has pages and lies in the block, the runs rise and do not overlap,
/// and the payload is exactly as long as the data runs. After this a lane may let the kernel write into the block.
///
/// `block_pages` is the length of the block that the header names, in pages of `page_size`. Whether there is such a
/// block is for the caller to know.
///
/// # Errors
///
/// [`WireError::TableLength`], [`WireError::EmptyRun`], [`WireError::RunOutOfBlock`], [`WireError::RunOutOfOrder`],
/// [`WireError::PayloadLength`], or what [`PacketHeader::decode`] finds wrong with the header.
pub fn validate_table(
    header: &PacketHeader,
    table: &[u8],
    page_size: PageSize,
    block_pages: u64,
) -> Result<TableSum, WireError> {
    header.check()?;
    if table.len() != header.table_bytes() {
        return Err(WireError::TableLength { run_count: header.run_count, table_bytes: table.len() });
    }
    let mut sum = TableSum::default();
    let mut previous_end = 0;
    for (index, run) in entries(table).enumerate() {
        let RunEntry { first, pages, kind } = run?;
        if pages == 0 {
            return Err(WireError::EmptyRun { index });
        }
        let end = first.checked_add(pages.into()).filter(|&end| end <= block_pages);
        let Some(end) = end else {
            return Err(WireError::RunOutOfBlock { index, block: header.block, first, pages, block_pages });
        };
        if first < previous_end {
            return Err(WireError::RunOutOfOrder { index, first, previous_end });
        }
        previous_end = end;
        match kind {
            RunKind::Data => sum.data_pages += u64::from(pages),
            RunKind::Zero => sum.zero_pages += u64::from(pages),
        }
    }
    // At most 1024 runs of 2^32 pages of 2^16 bytes: neither the sums nor this product come near 64 bits.
    if sum.data_pages * page_size.bytes() == header.payload_bytes {
        Ok(sum)
    } else {
        let payload_bytes = header.payload_bytes;
        Err(WireError::PayloadLength { payload_bytes, data_pages: sum.data_pages, page_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockId, Epoch, Round};
    use crate::wire::packet::PacketKind;

    const SIZE: PageSize = PageSize::SIZE_4K;
    const BLOCK_PAGES: u64 = 100;

    fn data(first: u64, pages: u32) -> RunEntry {
        RunEntry { first, pages, kind: RunKind::Data }
    }

    fn zero(first: u64, pages: u32) -> RunEntry {
        RunEntry { first, pages, kind: RunKind::Zero }
    }

    /// What the checks say about a packet of these runs and so many pages of payload, in a block of so many pages.
    fn judge_in(block_pages: u64, payload_pages: u64, runs: &[RunEntry]) -> Result<TableSum, WireError> {
        let header = PacketHeader {
            kind: PacketKind::Pages,
            block: BlockId(7),
            run_count: runs.len() as u32,
            round: Round(0),
            epoch: Epoch(0),
            sequence: 0,
            payload_bytes: payload_pages * SIZE.bytes(),
        };
        let table: Vec<u8> = runs.iter().flat_map(RunEntry::encode).collect();
        validate_table(&header, &table, SIZE, block_pages)
    }

    fn judge(payload_pages: u64, runs: &[RunEntry]) -> Result<TableSum, WireError> {
        judge_in(BLOCK_PAGES, payload_pages, runs)
    }

    #[test]
    fn runs_that_rise_within_the_block_are_summed() {
        let runs = [zero(0, 10), data(10, 1), data(11, 4), zero(50, 1), data(98, 2)];
        assert_eq!(judge(7, &runs), Ok(TableSum { data_pages: 7, zero_pages: 11 }));
        assert_eq!(judge(0, &[zero(0, 100)]), Ok(TableSum { data_pages: 0, zero_pages: 100 }));
    }

    #[test]
    fn a_run_that_leaves_its_block_is_refused() {
        for (first, pages) in [
            (100, 1),
            (99, 2),
            (0, 101),
            (101, 0x8000_0000),
            (u64::MAX, 1),
            (u64::MAX - 1, 2),
            (u64::MAX - u64::from(u32::MAX), u32::MAX),
        ] {
            for run in [data(first, pages), zero(first, pages)] {
                let block = BlockId(7);
                let error = WireError::RunOutOfBlock { index: 1, block, first, pages, block_pages: BLOCK_PAGES };
                assert_eq!(judge(1, &[data(0, 1), run]), Err(error));
            }
        }
    }

    #[test]
    fn a_run_without_pages_is_refused() {
        assert_eq!(judge(1, &[data(0, 1), zero(5, 0)]), Err(WireError::EmptyRun { index: 1 }));
        assert_eq!(judge(0, &[data(100, 0)]), Err(WireError::EmptyRun { index: 0 }));
    }

    #[test]
    fn runs_that_fall_repeat_or_overlap_are_refused() {
        for second in [data(9, 1), data(4, 1), data(5, 5), zero(5, 5), zero(0, 100)] {
            let error = WireError::RunOutOfOrder { index: 1, first: second.first, previous_end: 10 };
            assert_eq!(judge(6, &[data(5, 5), second]), Err(error));
        }
    }

    #[test]
    fn a_payload_of_another_length_than_the_data_runs_is_refused() {
        for payload_pages in [0, 2, 4] {
            let error =
                WireError::PayloadLength { payload_bytes: payload_pages * 4096, data_pages: 3, page_size: SIZE };
            assert_eq!(judge(payload_pages, &[data(0, 3), zero(3, 1)]), Err(error));
        }
    }

    #[test]
    fn the_longest_runs_at_the_end_of_64_bits_are_summed_without_wrapping() {
        let last = u64::MAX - u64::from(u32::MAX);
        let runs = [zero(0, u32::MAX), data(last, u32::MAX)];
        let error = judge_in(u64::MAX, 1, &runs).unwrap_err();
        assert!(matches!(error, WireError::PayloadLength { data_pages: 0xFFFF_FFFF, .. }), "{error:?}");
        assert!(judge_in(u64::MAX, 0, &[zero(last, u32::MAX)]).is_ok());
    }

    #[test]
    fn a_table_of_another_length_than_the_header_says_is_refused() {
        let mark = PacketHeader::round_end(Round(1), Epoch(0), 0);
        let error = WireError::TableLength { run_count: 0, table_bytes: 16 };
        assert_eq!(validate_table(&mark, &data(0, 1).encode(), SIZE, BLOCK_PAGES), Err(error));
        let pages = PacketHeader { kind: PacketKind::Pages, run_count: 2, ..mark };
        let error = WireError::TableLength { run_count: 2, table_bytes: 31 };
        assert_eq!(validate_table(&pages, &[0; 31], SIZE, BLOCK_PAGES), Err(error));
    }

    #[test]
    fn a_mark_that_was_made_by_hand_is_checked_too() {
        let mark = PacketHeader { payload_bytes: 4096, ..PacketHeader::bye(Round(0), Epoch(0), 0) };
        let error = validate_table(&mark, &[], SIZE, BLOCK_PAGES).unwrap_err();
        assert!(matches!(error, WireError::MarkNotEmpty { kind: PacketKind::Bye, .. }), "{error:?}");
    }

    #[test]
    fn a_run_of_unknown_kind_is_refused() {
        for kind in [0u32, 3, 0x0101, u32::MAX] {
            let mut bytes = data(1, 1).encode();
            bytes[12..].copy_from_slice(&kind.to_le_bytes());
            let error = WireError::BadValue { field: "kind of a run", value: kind.into() };
            assert_eq!(RunEntry::decode(&bytes), Err(error));
        }
    }
}
