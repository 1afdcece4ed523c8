//! A look at one page on its way: is it all zeros, and what is its hash. Safe, by bounds proven here.
// UNSAFETY: reads guest RAM through raw pointers, which `zero` and `hash` need.
#![expect(unsafe_code)]

use crate::memory::hash::PageHash;
use crate::memory::{RamBlock, zero};

/// Of a page that is longer, the CPU fetches the rest by itself.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const AHEAD_BYTES: usize = 4096;

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// Nothing but zeros.
    Zero,
    /// Something else; its content hash, or 0 where nobody asked for one.
    Data(u64),
}

/// How pages are looked at: chosen once a migration.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    hash: Option<PageHash>,
    zero_test: bool,
}

impl Look {
    /// Looks for zeros if `zero_test`, and hashes if `hash`.
    pub fn new(hash: bool, zero_test: bool) -> Look {
        Look { hash: hash.then(PageHash::detect), zero_test }
    }

    /// Has a page fetched into the second-level cache, to be looked at next: its first 4 KiB. The CPU does so by
    /// itself for pages in order, but learns too late what a page is like that stands alone.
    /// (Measured on Zen 4, in a loop that only reads: 150 ns a page in order, 370 where every second page is read. With
    /// `benches/ship.rs`: 6 to 10 % more of every second page; into the first-level cache it was slower than without, as
    /// few lines can be on their way there.)
    #[inline]
    pub fn expect(&self, block: &RamBlock, page: u64) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if let Some(range) = block.range(page, 1) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            for line in (0..range.len.min(AHEAD_BYTES)).step_by(64) {
                // SAFETY: every x86-64 has the instruction; it gives the program nothing to see, and never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(range.ptr.wrapping_add(line).cast()) };
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = (block, page);
    }

    /// Looks at a page; `None` if the block has no such page.
    pub fn at(&self, block: &RamBlock, page: u64) -> Option<Seen> {
        let range = block.range(page, 1)?;
        // SAFETY: RamBlock::range proved that the page is inside the block, which its Ram keeps mapped and aligned to
        // its page size. The guest may write meanwhile: then the page is dirty again, and what is seen now is replaced.
        if self.zero_test && unsafe { zero::is_zero(range.ptr, range.len) } {
            return Some(Seen::Zero);
        }
        // SAFETY: as above.
        Some(Seen::Data(self.hash.map_or(0, |h| unsafe { h.hash(range.ptr, range.len) })))
    }

    /// The content hash of a page, zeros or not; `None` if the block has no such page or nobody asked for hashes.
    pub fn hash_at(&self, block: &RamBlock, page: u64) -> Option<u64> {
        let range = block.range(page, 1)?;
        // SAFETY: as in `at`.
        self.hash.map(|h| unsafe { h.hash(range.ptr, range.len) })
    }
}
