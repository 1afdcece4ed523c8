//! Which stretch of which memory slot shows which pages of which RAM block. Pure: numbers in, numbers out.
#![forbid(unsafe_code)]

use crate::dirty::runs::mask_in_word;
use std::ops::Range;

/// A stretch of pages that one slot shows of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The index of the slot.
    pub slot: usize,
    /// Where the stretch begins in the slot, in pages.
    pub slot_page: u64,
    /// The index of the block.
    pub block: usize,
    /// Where the stretch begins in the block, in pages.
    pub block_page: u64,
    /// Its length in pages, at least 1.
    pub pages: u64,
}

impl Piece {
    /// The part of it between these pages of its block.
    fn cut(self, first_page: u64, end_page: u64) -> Option<Piece> {
        let first = self.block_page.max(first_page);
        let end = (self.block_page + self.pages).min(end_page);
        let slot_page = self.slot_page + first.checked_sub(self.block_page)?;
        (first < end).then(|| Piece { slot_page, block_page: first, pages: end - first, ..self })
    }
}

/// Pages of a block that no slot shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Uncovered {
    /// The index of the block.
    pub block: usize,
    /// The first such page.
    pub page: u64,
}

/// Blocks and slots, put in relation by where they lie in this process. A block may lie across several slots, a slot
/// across several blocks or parts of them, and slots may show the same memory.
///
/// ```
/// use pageferry::dirty::kvm::slots::{Piece, SlotMap, Uncovered};
///
/// // A block of 8 pages, and two slots that meet in its middle; the first begins one page before it.
/// let block = 0x1_0000..0x1_8000;
/// let slots = [0xF000..0x1_4000, 0x1_4000..0x1_8000];
/// let map = SlotMap::new(&[block.clone()], &slots, 4096).unwrap();
/// let second = Piece { slot: 1, slot_page: 0, block: 0, block_page: 4, pages: 4 };
/// assert_eq!(map.of_block(0), [Piece { slot: 0, slot_page: 1, block: 0, block_page: 0, pages: 4 }, second]);
/// assert_eq!(map.of_slot(1), [second]);
///
/// let half = SlotMap::new(&[block], &slots[..1], 4096);
/// assert_eq!(half.unwrap_err(), Uncovered { block: 0, page: 4 });
/// ```
#[derive(Debug)]
pub struct SlotMap {
    by_block: Vec<Vec<Piece>>,
    by_slot: Vec<Vec<Piece>>,
}

impl SlotMap {
    /// Relates the addresses of the blocks to those of the slots; all are multiples of the page.
    ///
    /// # Errors
    /// The first page that no slot shows: nobody would report writes to it.
    pub fn new(blocks: &[Range<u64>], slots: &[Range<u64>], page_bytes: u64) -> Result<SlotMap, Uncovered> {
        let mut map = SlotMap { by_block: vec![Vec::new(); blocks.len()], by_slot: vec![Vec::new(); slots.len()] };
        for (block, at) in blocks.iter().enumerate() {
            let pieces = &mut map.by_block[block];
            for (slot, seen_at) in slots.iter().enumerate() {
                let (start, end) = (at.start.max(seen_at.start), at.end.min(seen_at.end));
                if start < end {
                    pieces.push(Piece {
                        slot,
                        slot_page: (start - seen_at.start) / page_bytes,
                        block,
                        block_page: (start - at.start) / page_bytes,
                        pages: (end - start) / page_bytes,
                    });
                }
            }
            pieces.sort_by_key(|piece| piece.block_page);
            let mut covered = 0;
            for piece in pieces.iter() {
                if piece.block_page > covered {
                    break;
                }
                covered = covered.max(piece.block_page + piece.pages);
            }
            if covered < (at.end - at.start) / page_bytes {
                return Err(Uncovered { block, page: covered });
            }
            pieces.iter().for_each(|piece| map.by_slot[piece.slot].push(*piece));
        }
        Ok(map)
    }

    /// All pieces of a block, by page.
    pub fn of_block(&self, block: usize) -> &[Piece] {
        self.by_block.get(block).map_or(&[], Vec::as_slice)
    }

    /// All pieces of a slot, by block.
    pub fn of_slot(&self, slot: usize) -> &[Piece] {
        self.by_slot.get(slot).map_or(&[], Vec::as_slice)
    }

    /// The pieces of `block` between two of its pages, cut off there.
    pub fn within(&self, block: usize, first_page: u64, end_page: u64) -> impl Iterator<Item = Piece> + '_ {
        self.of_block(block).iter().filter_map(move |piece| piece.cut(first_page, end_page))
    }
}

/// ORs `bits` bits of `from`, from bit `from_first` on, into `into` from bit `into_first` on. Bits that `from` does not
/// have count as 0; bits of `into` past its end are left out.
///
/// ```
/// use pageferry::dirty::kvm::slots::or_bits;
///
/// let mut into = [1, 0];
/// or_bits(&mut into, 62, &[0b1011_0000], 4, 3);
/// assert_eq!(into, [1 | 0b11 << 62, 0]);
/// ```
pub fn or_bits(into: &mut [u64], into_first: u64, from: &[u64], from_first: u64, bits: u64) {
    let end = into_first.saturating_add(bits).min(into.len() as u64 * 64);
    if into_first >= end {
        return;
    }
    // Bit `at` of `into` is bit `at - into_first + from_first` of `from`; in words and bits, both kept positive.
    let shift = from_first.wrapping_sub(into_first) % 64;
    let word_of = |index: i128| usize::try_from(index).ok().and_then(|index| from.get(index)).copied().unwrap_or(0);
    for index in into_first / 64..end.div_ceil(64) {
        let at = (i128::from(index * 64) - i128::from(into_first) + i128::from(from_first)).div_euclid(64);
        let word = match shift {
            0 => word_of(at),
            _ => word_of(at) >> shift | word_of(at + 1) << (64 - shift),
        };
        into[index as usize] |= word & mask_in_word(index, into_first, end);
    }
}
