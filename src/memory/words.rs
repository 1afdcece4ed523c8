//! Guest RAM by words of eight bytes: for devices, loaders and test guests, which have no vCPU to write it for them.
// UNSAFETY: writes guest RAM through the raw pointers that `RamBlock::range` gives.
#![expect(unsafe_code)]

use super::RamBlock;
use crate::sync::{AtomicU64, Ordering};

/// Bytes of a word.
pub const WORD_BYTES: u64 = 8;

/// Writes one word of a page. False, and nothing done, if the block has no such word or may only be read.
///
/// The dirty tracking must learn of it, as of any other write: a bitmap is marked after this.
///
/// ```
/// use pageferry::memory::{Backing, RamBlock, words};
/// use pageferry::units::PageSize;
///
/// let block = RamBlock::anonymous("ram", 0, 8192, PageSize::SIZE_4K, Backing::Base)?;
/// assert!(words::store(&block, 1, 511, 7));
/// assert!(!words::store(&block, 1, 512, 7));
/// assert_eq!(words::load(&block, 1, 511), Some(7));
/// # Ok::<(), pageferry::memory::MemoryError>(())
/// ```
#[inline]
pub fn store(block: &RamBlock, page: u64, word: u64, value: u64) -> bool {
    let at = if block.is_writable() { word_at(block, page, word) } else { None };
    match at {
        // SAFETY: see `word_at`; the block is writable.
        Some(at) => unsafe { AtomicU64::from_ptr(at) }.store(value, Ordering::Relaxed),
        None => return false,
    }
    true
}

/// Reads one word of a page; `None` if the block has no such word.
#[inline]
pub fn load(block: &RamBlock, page: u64, word: u64) -> Option<u64> {
    // SAFETY: see `word_at`. `from_ptr` asks for writable memory because its atomic may be written; this one is not.
    word_at(block, page, word).map(|at| unsafe { AtomicU64::from_ptr(at) }.load(Ordering::Relaxed))
}

/// Writes every word of a page; as [`store`] otherwise.
pub fn fill(block: &RamBlock, page: u64, mut value: impl FnMut(u64) -> u64) -> bool {
    let words = block.page_size().bytes() / WORD_BYTES;
    (0..words).all(|word| store(block, page, word, value(word)))
}

/// Where a word is: inside a page that [`RamBlock::range`] proved to be inside the block, and aligned, as pages are.
/// Mapped for as long as the block is borrowed. Every access of ours is atomic or volatile, and what the kernel and
/// vCPUs do at the same time is what guest RAM is for.
#[inline]
fn word_at(block: &RamBlock, page: u64, word: u64) -> Option<*mut u64> {
    let range = block.range(page, 1)?;
    (word < range.len as u64 / WORD_BYTES).then(|| range.ptr.cast::<u64>().wrapping_add(word as usize))
}
