//! Takes RAM out of the page tables by several threads: one alone, as a process's end has it, needs 0.1 s a GiB.

// UNSAFETY: madvise(2) takes addresses.
#![expect(unsafe_code)]

use super::{Presence, Ram, RawRange};
use crate::sys::memory::advise;
use std::num::NonZeroUsize;
use std::thread;

/// What is worth a thread of its own.
const THREAD_BYTES_MIN: u64 = 64 << 20;

impl Ram {
    /// Takes the pages of blocks that share a file out of this process's page tables, with up to `threads` threads, the
    /// caller's among them. The files keep their content, and whoever touches the blocks later faults it in again.
    /// Other blocks stay as they are.
    ///
    /// For whoever is done with large RAM and is waited for: munmap(2) and the end of a process do the same on one CPU. Not
    /// while a guest runs in it, which would fault at every page. Based on madvise(2), MADV_DONTNEED.
    ///
    /// ```
    /// use pageferry::Ram;
    /// use pageferry::memory::{Backing, RamBlock};
    /// use pageferry::units::PageSize;
    ///
    /// let block = RamBlock::memfd("ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?;
    /// block.prefault(0, 256)?;
    /// let ram = Ram::new([block])?;
    /// ram.unmap(std::thread::available_parallelism()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmap(&self, threads: NonZeroUsize) {
        let shared = |block: &&super::RamBlock| matches!(block.presence(), Presence::Shared { .. });
        let ranges = || self.blocks().iter().filter(shared).filter_map(|block| block.range(0, block.pages()));
        let worth = ranges().map(|range| range.len as u64).sum::<u64>() / THREAD_BYTES_MIN;
        let threads = (threads.get() as u64).min(worth).max(1) as usize;
        thread::scope(|scope| {
            let share = |nth| ranges().for_each(|range| unmap(part(range, nth, threads)));
            let started = (1..threads).map(|nth| (nth, thread::Builder::new().spawn_scoped(scope, move || share(nth))));
            // What no thread could be had for is done here.
            let left: Vec<usize> = started.filter_map(|(nth, thread)| thread.is_err().then_some(nth)).collect();
            [0].into_iter().chain(left).for_each(share);
        });
    }
}

/// The `nth` of `parts` pieces of a range, which begin at multiples of 2 MiB from its beginning: no page table is in two.
fn part(range: RawRange, nth: usize, parts: usize) -> RawRange {
    const TABLE_BYTES: usize = 2 << 20;
    let tables = range.len.div_ceil(TABLE_BYTES);
    let begin = |nth: usize| (tables * nth / parts * TABLE_BYTES).min(range.len);
    RawRange { ptr: range.ptr.wrapping_add(begin(nth)), len: begin(nth + 1) - begin(nth) }
}

fn unmap(range: RawRange) {
    // SAFETY: a part of a block's range, at multiples of its pages. The block is a MAP_SHARED mapping of a file (what
    // Presence::Shared claims), whose content lives in the file: the advice takes table entries, not bytes.
    // Where it is refused, munmap does the work later.
    let _ = unsafe { advise(range.ptr, range.len, libc::MADV_DONTNEED) };
}
