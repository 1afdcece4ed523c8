//! The dirty bitmaps that rust-vmm's `vm-memory` keeps beside its regions, as a dirty source.
//!
//! **Why this order loses nothing.** `vm-memory` marks after the write: each of its accessors copies, then sets the
//! pages' bits, each by a sequentially consistent read-modify-write. A harvest clears a bit the same way, and the page is
//! read after that. All changes of a bitmap word have one order. If the mark comes before the clearing in it, the clearing
//! reads from the mark, directly or through the changes between them, acquires what it released, and the page that
//! is read has the bytes written. If the mark comes after the clearing, the bit is set again, and a later round finds it.
//!
//! The bits are not tested one by one: that would take 23 ms for each look at a guest of 64 GiB. A round begins by reading
//! all words (2.7 ms; 2 cores of an AMD EPYC, Zen 4). What was read is only a hint where to clear: it orders nothing, and
//! it is never wrong the bad way, because nobody else clears. A bit set later waits for the next round.
#![forbid(unsafe_code)]

use super::{DirtyError, DirtySource, runs};
use crate::memory::Ram;
use crate::units::BlockId;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// A bitmap with one bit a page, that any thread may set while one thread harvests it.
pub trait PageBits {
    /// How many pages it has, and their size in bytes. `None` if it tracks nothing.
    fn shape(&self) -> Option<(u64, u64)>;

    /// All bits as they are now, page 0 in the lowest bit of the first word. Clears nothing. May allocate.
    fn words(&self) -> Vec<u64>;

    /// Clears one bit, by a read-modify-write that acquires what was written before the bit was set.
    fn clear(&self, page: u64);

    /// Sets one bit.
    fn mark(&self, page: u64);
}

/// The page size is taken to be a power of two: the bitmap does not tell it, but no two powers of two cut so many bytes
/// into so many pages, unless there is one page.
impl PageBits for AtomicBitmap {
    fn shape(&self) -> Option<(u64, u64)> {
        let (pages, bytes) = (self.len() as u64, self.byte_size() as u64);
        let page_bytes = bytes.div_ceil(pages.max(1)).checked_next_power_of_two()?;
        (pages > 0 && bytes.div_ceil(page_bytes) == pages).then_some((pages, page_bytes))
    }

    fn words(&self) -> Vec<u64> {
        // Of the clone, which nobody else knows: there is no other way to get at whole words.
        self.clone().get_and_reset()
    }

    fn clear(&self, page: u64) {
        self.reset_bit(page as usize);
    }

    fn mark(&self, page: u64) {
        self.set_bit(page as usize);
    }
}

/// A VMM whose tracking is a choice made at boot has bitmaps that may not be there.
impl<B: PageBits> PageBits for Option<B> {
    fn shape(&self) -> Option<(u64, u64)> {
        self.as_ref()?.shape()
    }

    fn words(&self) -> Vec<u64> {
        self.as_ref().map_or_else(Vec::new, PageBits::words)
    }

    fn clear(&self, page: u64) {
        self.iter().for_each(|bits| bits.clear(page));
    }

    fn mark(&self, page: u64) {
        self.iter().for_each(|bits| bits.mark(page));
    }
}

/// A region of guest memory that gives its dirty bitmap out. `GuestMemoryRegion::bitmap` gives a slice of it that can be
/// marked and not cleared; a VMM with a region type of its own implements this in one line.
pub trait TrackedRegion: GuestMemoryRegion {
    /// The bitmap.
    type Bits: PageBits;

    /// The bitmap of the region's pages, from its first one on.
    fn page_bits(&self) -> &Self::Bits;
}

impl<B: Bitmap + PageBits> TrackedRegion for GuestRegionMmap<B> {
    type Bits = B;

    fn page_bits(&self) -> &B {
        // The mapping's own method: the region's of the same name gives a slice.
        self.deref().bitmap()
    }
}

/// The dirty bitmaps of a VMM's guest memory: what its devices write through `vm-memory` is learned here, and what KVM's
/// vCPUs write is learned elsewhere: put both into a [`Combined`](crate::dirty::combined::Combined).
///
/// For the very memory that [`GuestRam`](crate::memory::vm_memory::GuestRam) made the blocks of: arming compares region by
/// region. Nobody else may clear bits between arm and disarm. After a failed migration the bitmaps have back everything
/// that was harvested since arm; nothing else changes them, so that a VMM can use them for snapshots as well.
///
/// `vm-memory` does not mark what is written through a host address, a pointer guard or an atomic reference, nor what
/// another process writes (vhost-user): whoever does that marks after the write.
///
/// ```
/// use std::sync::Arc;
/// use pageferry::{DirtySource, GuestRam, RegionBitmaps};
/// use pageferry::units::BlockId;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let ranges = [(GuestAddress(0x10_0000), 1 << 20)];
/// let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?);
/// let ram = GuestRam::new(memory.clone()).ram()?;
/// let mut dirty = RegionBitmaps::new(memory.clone());
/// dirty.arm(&ram)?;
///
/// memory.write_obj(42u64, GuestAddress(0x10_0000 + 3 * 4096))?; // a device
/// assert_eq!(dirty.begin_round()?, 1);
/// let mut words = [0; 4];
/// dirty.harvest(BlockId(0), 0, &mut words)?;
/// assert_eq!(words, [0b1000, 0, 0, 0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RegionBitmaps<M> {
    memory: Arc<M>,
    /// The words of each region as the round began, less those harvested since. `None` while not armed.
    seen: Option<Vec<Vec<u64>>>,
}

impl<M> fmt::Debug for RegionBitmaps<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionBitmaps").field("armed", &self.seen.is_some()).finish_non_exhaustive()
    }
}

impl<M: GuestMemoryBackend<R: TrackedRegion>> RegionBitmaps<M> {
    /// The bitmaps of this memory.
    pub fn new(memory: Arc<M>) -> RegionBitmaps<M> {
        RegionBitmaps { memory, seen: None }
    }

    fn look(&self) -> Vec<Vec<u64>> {
        self.memory.iter().map(|region| region.page_bits().words()).collect()
    }

    /// What was seen of some pages, and the bitmap that they are in.
    fn part(
        &mut self,
        block: BlockId,
        first_page: u64,
        words: usize,
    ) -> Result<(&mut [u64], &<M::R as TrackedRegion>::Bits), DirtyError> {
        let out_of_range = || DirtyError::OutOfRange { block, first_page, words };
        let seen = self.seen.as_mut().ok_or(DirtyError::NotArmed)?;
        let seen = seen.get_mut(usize::from(block.0)).ok_or_else(out_of_range)?;
        let first = usize::try_from(first_page / 64).ok().filter(|_| first_page % 64 == 0).ok_or_else(out_of_range)?;
        let end = first.checked_add(words).ok_or_else(out_of_range)?;
        let seen = seen.get_mut(first..end).ok_or_else(out_of_range)?;
        let region = self.memory.iter().nth(usize::from(block.0)).ok_or_else(out_of_range)?;
        Ok((seen, region.page_bits()))
    }
}

impl<M: GuestMemoryBackend<R: TrackedRegion> + Send + Sync> DirtySource for RegionBitmaps<M> {
    /// # Errors
    /// A region without a bitmap, or one that is not a block of `ram`, address, length and page size: a bitmap of another
    /// page size than the block's tracking page is refused.
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.seen = None;
        let mut regions = self.memory.iter();
        for (id, block) in ram.iter() {
            let region = regions.next().ok_or(DirtyError::OtherShape { block: id })?;
            let shape = region.page_bits().shape().ok_or(DirtyError::NoBitmap { block: id })?;
            let place = (region.start_addr().raw_value(), region.len());
            if place != (block.guest_address(), block.bytes()) || shape != (block.pages(), block.page_size().bytes()) {
                return Err(DirtyError::OtherShape { block: id });
            }
        }
        if regions.next().is_some() {
            // No truncation: there are fewer than BLOCKS_MAX blocks.
            return Err(DirtyError::OtherShape { block: BlockId(ram.blocks().len() as u16) });
        }
        drop(regions);
        // What was dirty before is seen here, so that round 0 clears it: its pages travel then.
        self.seen = Some(self.look());
        Ok(())
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        if self.seen.is_none() {
            return Err(DirtyError::NotArmed);
        }
        // The old words first: the new ones take their place in memory.
        self.seen = None;
        let seen = self.seen.insert(self.look());
        Ok(seen.iter().map(|words| runs::count(words)).sum())
    }

    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        let (seen, bits) = self.part(block, first_page, words.len())?;
        for ((seen, word), first) in seen.iter_mut().zip(words).zip((first_page..).step_by(64)) {
            if *seen != 0 {
                *word |= *seen;
                // Cleared before anybody reads the page: a write after this marks again.
                pages_of(std::mem::take(seen), first).for_each(|page| bits.clear(page));
            }
        }
        Ok(())
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let pages = self.memory.iter().nth(block.0.into()).and_then(|r| r.page_bits().shape()).map_or(0, |s| s.0);
        let (seen, bits) = self.part(block, first_page, words.len())?;
        for ((seen, &word), first) in seen.iter_mut().zip(words).zip((first_page..).step_by(64)) {
            let word = word & runs::mask_in_word(first / 64, 0, pages);
            *seen |= word;
            pages_of(word, first).for_each(|page| bits.mark(page));
        }
        Ok(())
    }

    fn disarm(&mut self) {
        self.seen = None;
    }
}

/// The pages whose bits are set in a word that begins with page `first`.
fn pages_of(mut word: u64, first: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros())?;
        word &= word - 1;
        Some(first + u64::from(bit))
    })
}
