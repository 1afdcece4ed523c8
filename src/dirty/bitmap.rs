//! A bitmap of dirty pages that the VMM and its devices mark, and that the migration harvests, without a lock.
#![forbid(unsafe_code)]

use super::runs::mask_in_word;
use crate::sync::{Arc, AtomicU64, Ordering, acquire, release};
use crate::units::{BlockId, PageSize};

/// One bit per tracking page of every RAM block; a clone is another handle to the same bits.
///
/// For a VMM that learns of writes by itself: devices that write guest RAM, an emulator, a vhost back end. As a
/// [`DirtySource`](crate::dirty::DirtySource) it can stand alone or be combined with what KVM or write protection
/// report. Not for catching writes of vCPUs that nobody reports: that is what the other sources are for.
///
/// **Mark after the write**, and DMA at its completion. A mark that comes first can be harvested, and the page read,
/// before the write lands; nobody would send that page again.
///
/// Pages and blocks that are not there are ignored: there is no such page to send.
///
/// ```
/// use pageferry::dirty::bitmap::DirtyBitmap;
/// use pageferry::units::BlockId;
///
/// let dirty = DirtyBitmap::new(&[1000]);
/// let device = dirty.clone();
/// device.mark_bytes(BlockId(0), 4095, 2);
///
/// let mut words = [0; 2];
/// assert!(dirty.take(BlockId(0), 0, &mut words));
/// assert_eq!(words, [0b11, 0]);
/// assert_eq!(dirty.count(), 0);
/// ```
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    blocks: Arc<Vec<BlockBits>>,
}

#[derive(Debug)]
struct BlockBits {
    pages: u64,
    page_size: PageSize,
    /// Written by whoever marks (`fetch_or`) and by whoever harvests (`swap`); a set bit publishes the page's bytes.
    /// Every change is a read-modify-write, so no bit is lost, and a bit that was given back still carries the
    /// release of whoever marked it first.
    words: Box<[AtomicU64]>,
}

impl DirtyBitmap {
    /// A clean bitmap for blocks of so many pages of 4096 bytes.
    pub fn new(block_pages: &[u64]) -> Self {
        DirtyBitmap::with_page_sizes(block_pages.iter().map(|&pages| (pages, PageSize::SIZE_4K)))
    }

    /// A clean bitmap for blocks of so many pages of that size each.
    pub fn with_page_sizes(blocks: impl IntoIterator<Item = (u64, PageSize)>) -> Self {
        let bits = |(pages, page_size): (u64, PageSize)| BlockBits {
            pages,
            page_size,
            words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        DirtyBitmap { blocks: Arc::new(blocks.into_iter().map(bits).collect()) }
    }

    /// Pages and page size of a block, `None` if there is no such block.
    pub fn shape(&self, block: BlockId) -> Option<(u64, PageSize)> {
        self.block(block).map(|bits| (bits.pages, bits.page_size))
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Marks one page, after it was written.
    #[inline]
    pub fn mark(&self, block: BlockId, page: u64) {
        let Some(bits) = self.block(block) else { return };
        if page < bits.pages {
            bits.mark_word(page / 64, 1 << (page % 64));
        }
    }

    /// Marks adjacent pages, after they were written: one read-modify-write per 64 pages.
    #[inline]
    pub fn mark_range(&self, block: BlockId, first: u64, pages: u64) {
        let Some(bits) = self.block(block) else { return };
        let end = first.saturating_add(pages).min(bits.pages);
        if first >= end {
            return;
        }
        for index in first / 64..end.div_ceil(64) {
            bits.mark_word(index, mask_in_word(index, first, end));
        }
    }

    /// Marks every page that `bytes` bytes at `offset` in the block touch, after they were written.
    #[inline]
    pub fn mark_bytes(&self, block: BlockId, offset: u64, bytes: u64) {
        let Some(bits) = self.block(block) else { return };
        let Some(last_byte) = bytes.checked_sub(1).map(|less| offset.saturating_add(less)) else { return };
        let shift = bits.page_size.shift();
        self.mark_range(block, offset >> shift, (last_byte >> shift) - (offset >> shift) + 1);
    }

    /// Takes the bits from `first_page` on: ORs them into `words` and clears them here. False, and nothing done, if
    /// there is no such block or the words are not all within it (`first_page` is a multiple of 64).
    ///
    /// The page may be read once this has returned: a bit that was taken shows every write that came before its mark,
    /// and a write that comes later marks anew.
    #[inline]
    pub fn take(&self, block: BlockId, first_page: u64, words: &mut [u64]) -> bool {
        let Some(bits) = self.block(block) else { return false };
        let Some(held) = bits.slice(first_page, words.len()) else { return false };
        let (held_eights, words_eights) = (held.chunks_exact(8), words.chunks_exact_mut(8));
        let rest = held_eights.remainder();
        for (held, words) in held_eights.zip(words_eights) {
            // Most words are clean: eight loads and one branch. A bit set meanwhile is found by the next harvest, which
            // is as good: its writer has not been told otherwise.
            if held.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed)) != 0 {
                held.iter().zip(words).for_each(|(held, word)| take_word(held, word));
            }
        }
        let rest_words = words.len() - rest.len();
        rest.iter().zip(&mut words[rest_words..]).for_each(|(held, word)| take_word(held, word));
        true
    }

    /// Puts bits back that were taken and not shipped. False, and nothing done, as for [`take`](Self::take).
    pub fn put_back(&self, block: BlockId, first_page: u64, words: &[u64]) -> bool {
        let Some(bits) = self.block(block) else { return false };
        let Some(held) = bits.slice(first_page, words.len()) else { return false };
        for (index, (held, &word)) in (first_page / 64..).zip(held.iter().zip(words)) {
            let word = word & mask_in_word(index, 0, bits.pages);
            if word != 0 {
                // Relaxed: it publishes nothing of its own. The swap that took the bit, and this, are both links of the
                // chain of read-modify-writes that the mark's release heads, so the next harvest still meets the mark.
                held.fetch_or(word, Ordering::Relaxed);
            }
        }
        true
    }

    /// How many pages are dirty now, in all blocks. A reading, not a promise: marks go on.
    pub fn count(&self) -> u64 {
        let of = |bits: &BlockBits| {
            bits.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum::<u64>()
        };
        self.blocks.iter().map(of).sum()
    }

    /// Whether a page is dirty now.
    #[inline]
    pub fn is_marked(&self, block: BlockId, page: u64) -> bool {
        let word = self.block(block).and_then(|bits| bits.words.get((page / 64) as usize));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 != 0)
    }

    /// How many of these pages of one block are dirty now.
    pub fn count_range(&self, block: BlockId, first: u64, pages: u64) -> u64 {
        let Some(bits) = self.block(block) else { return 0 };
        let end = first.saturating_add(pages).min(bits.pages);
        if first >= end {
            return 0;
        }
        (first / 64..end.div_ceil(64))
            .map(|index| bits.words[index as usize].load(Ordering::Relaxed) & mask_in_word(index, first, end))
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    #[inline]
    fn block(&self, block: BlockId) -> Option<&BlockBits> {
        self.blocks.get(usize::from(block.0))
    }
}

impl BlockBits {
    #[inline]
    fn mark_word(&self, index: u64, mask: u64) {
        // Release: publishes the bytes written to the page; pairs with the acquiring swap in `take_word`.
        self.words[index as usize].fetch_or(mask, release("bitmap/mark"));
    }

    #[inline]
    fn slice(&self, first_page: u64, words: usize) -> Option<&[AtomicU64]> {
        if first_page % 64 != 0 {
            return None;
        }
        let first = usize::try_from(first_page / 64).ok()?;
        self.words.get(first..first.checked_add(words)?)
    }
}

#[inline]
fn take_word(held: &AtomicU64, word: &mut u64) {
    if held.load(Ordering::Relaxed) != 0 {
        // Cleared before anybody reads the page: a write after this marks again.
        // Acquire: shows the bytes behind every bit taken; pairs with the release in `mark_word`.
        *word |= held.swap(0, acquire("bitmap/harvest"));
    }
}
