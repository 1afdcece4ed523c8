//! Pages of zeros for QEMU 7.2, whose packets have no word for them: from the channels, which meet them, to the main
//! connection, which names them.

#![forbid(unsafe_code)]

use crate::framing::Garbled;
use crate::qemu::wire::{MainEncoder, PAGE_BYTES, Record};
use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;
use crate::units::{BlockId, Round};
use crate::wire::packet::RunEntry;

use super::opening::words;

/// A bit a page of all blocks, in words.
type Bits<W> = Box<[Box<[W]>]>;

/// What channels have met and nobody has named: two bits a page.
///
/// A round is taken when all channels have sent its end, and they may be at the next one by then, but not at the one behind
/// that: two rounds take turns. All changes are Relaxed: whoever has seen that a channel has sent the end of a round, by the
/// barrier of the channels, sees what it noted before.
#[derive(Debug)]
pub(super) struct ZeroPages([Bits<AtomicU64>; 2]);

impl ZeroPages {
    /// For blocks of so many pages.
    pub fn new(pages: impl Iterator<Item = u64> + Clone) -> ZeroPages {
        let bits = || pages.clone().map(|pages| (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()).collect();
        ZeroPages([bits(), bits()])
    }

    fn of(&self, round: Round) -> &Bits<AtomicU64> {
        &self.0[round.0 as usize % 2]
    }

    /// A channel has met these pages in this round.
    pub fn note(&self, round: Round, block: BlockId, entry: &RunEntry) {
        let Some(bits) = self.of(round).get(usize::from(block.0)) else { return };
        let (mut page, end) = (entry.first, entry.first + u64::from(entry.pages));
        while page < end {
            let next = end.min((page / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (next - page))) << (page % 64);
            if let Some(word) = bits.get((page / 64) as usize) {
                word.fetch_or(mask, Relaxed);
            }
            page = next;
        }
    }

    /// What all channels have met in this round, to be named once; nothing is left of it.
    pub fn take(&self, round: Round) -> Unnamed {
        Unnamed::of(self.of(round), |word| word.swap(0, Relaxed))
    }

    /// What all channels have met in this round. It is still there: it may be asked for again.
    pub fn look(&self, round: Round) -> Unnamed {
        Unnamed::of(self.of(round), |word| word.load(Relaxed))
    }
}

/// Pages of zeros of one round that are still to be named.
#[derive(Default, Debug)]
pub(super) struct Unnamed {
    bits: Bits<u64>,
    /// The block and the word that come next.
    at: (usize, usize),
}

impl Unnamed {
    fn of(bits: &Bits<AtomicU64>, read: impl Fn(&AtomicU64) -> u64) -> Unnamed {
        Unnamed { bits: bits.iter().map(|block| block.iter().map(&read).collect()).collect(), at: (0, 0) }
    }

    /// Names pages until there are no more, or `out` has so many bytes; how many it has named, and whether that is all.
    ///
    /// # Errors
    /// None, for pages of blocks that the encoder knows.
    pub fn put(&mut self, encoder: &mut MainEncoder, out: &mut Vec<u8>, bytes: usize) -> Result<(u64, bool), Garbled> {
        let mut named = 0;
        while let Some(block) = self.bits.get(self.at.0) {
            let Some(word) = block.get(self.at.1) else {
                self.at = (self.at.0 + 1, 0);
                continue;
            };
            if out.len() >= bytes {
                return Ok((named, false));
            }
            let (mut left, first) = (*word, self.at.1 as u64 * 64);
            while left != 0 {
                let offset = (first + u64::from(left.trailing_zeros())) * PAGE_BYTES;
                encoder.encode(&Record::ZeroPage { block: self.at.0, offset }, out).map_err(words)?;
                left &= left - 1;
                named += 1;
            }
            self.at.1 += 1;
        }
        Ok((named, true))
    }
}
