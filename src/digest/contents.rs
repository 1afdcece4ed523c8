//! What each page holds, as its hash, noted by whoever moves it: so that nobody has to read all of RAM when the guest
//! stands still.

use crate::digest::{BlockShape, FullDigest, zeroed};
use crate::sync::{AtomicU8, AtomicU64, Ordering};
use crate::units::{BlockId, Round};
use std::collections::TryReserveError;
use std::fmt;

/// In a mark: the page has been written to.
const WRITTEN: u8 = 1 << 7;

/// A mark, without [`WRITTEN`]: the page was noted twice in one round.
const TWICE: u8 = WRITTEN - 1;

/// Rounds have marks from 1 on, and share them with every round that is this many behind.
const MARKS: u32 = TWICE as u32 - 1;

/// The content hash of each page, as it was sent or has landed last: of one migration.
///
/// The workers of a migration note what they move while it is in their cache: see
/// [`Incoming::contents`](crate::Incoming::contents) and
/// [`SourceBuilder::contents`](crate::source::SourceBuilder::contents). When they are done, [`hashes`](Contents::hashes)
/// says what RAM holds.
///
/// # What it rests on
/// Rounds are kept apart, at a target by its barrier, at a source by waiting until one has been sent: what is noted of a later
/// round is noted later, and so the last note of a page is that of what it holds. Within one round that is true of a page that moves once. One that moves
/// twice may hold what either brought: it is marked, for good, and [`hashes`](Contents::hashes) has it read. (A mark names
/// its round only up to a multiple of 126. A page that is taken for one that moved twice is read in vain, no more.)
///
/// A page that was never noted counts as zeros: at a source because none is left out that was ever touched, at a target
/// because its memory reads as zeros before anything lands.
///
/// # When not to use it
/// To compare two ends while the guest runs: [`DigestTable`](crate::digest::DigestTable) is for that.
///
/// ```
/// use pageferry::digest::{BlockShape, Contents};
/// use pageferry::units::{BlockId, PageSize, Round};
///
/// let contents = Contents::new(&[BlockShape { pages: 4, page_size: PageSize::SIZE_4K }])?;
/// let ram = BlockId(0);
/// let mut notes = contents.notes(ram, Round(0));
/// notes.data(1, 0x1234);
/// notes.data(2, 0x5678);
/// contents.notes(ram, Round(1)).zero(2);
///
/// let nobody_reads = |_| unreachable!("no page moved twice in one round");
/// let hashes: Result<Vec<u64>, ()> = contents.hashes(ram, nobody_reads).collect();
/// assert_eq!(hashes, Ok(vec![0, 0x1234, 0, 0]));
/// // Page 2 is zeros that somebody wrote over something else.
/// assert_eq!(contents.written_zeros(ram).collect::<Vec<_>>(), [2]);
/// # Ok::<(), std::collections::TryReserveError>(())
/// ```
pub struct Contents {
    shapes: Vec<BlockShape>,
    blocks: Vec<Block>,
}

/// Both by page. Written by whoever moves the page; neither publishes anything.
struct Block {
    hashes: Vec<AtomicU64>,
    marks: Vec<AtomicU8>,
}

impl Contents {
    /// For blocks of these shapes, named `BlockId(0)`, `BlockId(1)` and so on; all zeros.
    ///
    /// It takes 9 bytes of address space a page, and of memory only what is noted in.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn new(blocks: &[BlockShape]) -> Result<Contents, TryReserveError> {
        let block = |shape: &BlockShape| -> Result<Block, TryReserveError> {
            Ok(Block { hashes: zeroed(shape.pages, AtomicU64::new)?, marks: zeroed(shape.pages, AtomicU8::new)? })
        };
        let shapes = blocks.to_vec();
        Ok(Contents { shapes, blocks: blocks.iter().map(block).collect::<Result<_, _>>()? })
    }

    /// Whether it is for blocks of these shapes.
    pub fn fits(&self, blocks: &[BlockShape]) -> bool {
        self.shapes == blocks
    }

    /// Begins to note pages of one block, moved in one round. A block that does not exist takes whatever is noted and
    /// forgets it; a debug build asserts.
    #[inline]
    pub fn notes(&self, block: BlockId, round: Round) -> Notes<'_> {
        let block = self.blocks.get(usize::from(block.0));
        debug_assert!(block.is_some(), "no such block");
        Notes { block, mark: 1 + (round.0 % MARKS) as u8 }
    }

    /// The hashes of all pages of a block, in order, once nobody notes any more. `read` gives that of a page that moved
    /// twice in one round.
    ///
    /// # Errors
    /// Those of `read`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn hashes<E>(
        &self,
        block: BlockId,
        mut read: impl FnMut(u64) -> Result<u64, E>,
    ) -> impl Iterator<Item = Result<u64, E>> {
        let block = &self.blocks[usize::from(block.0)];
        (0..).zip(block.hashes.iter().zip(&block.marks)).map(move |(page, (hash, mark))| {
            match mark.load(Ordering::Relaxed) & !WRITTEN {
                TWICE => read(page),
                _ => Ok(hash.load(Ordering::Relaxed)),
            }
        })
    }

    /// The digest of a block, to which `empty` belongs: as [`FullDigest`] has it of all of its pages.
    ///
    /// # Errors
    /// Those of `read`: see [`hashes`](Contents::hashes).
    ///
    /// # Panics
    /// If there is no such block.
    pub fn digest<E>(
        &self,
        block: BlockId,
        empty: FullDigest,
        read: impl FnMut(u64) -> Result<u64, E>,
    ) -> Result<FullDigest, E> {
        let mut digest = empty;
        for (page, hash) in (0..).zip(self.hashes(block, read)) {
            digest.page(page, hash?);
        }
        Ok(digest)
    }

    /// Pages of a block that have been written to, and whose hash is that of zeros: in order, once nobody notes any more.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn written_zeros(&self, block: BlockId) -> impl Iterator<Item = u64> + '_ {
        let block = &self.blocks[usize::from(block.0)];
        let is_written_zero = |(hash, mark): (&AtomicU64, &AtomicU8)| {
            mark.load(Ordering::Relaxed) & WRITTEN != 0 && hash.load(Ordering::Relaxed) == super::ZERO_CONTENT
        };
        (0..)
            .zip(block.hashes.iter().zip(&block.marks))
            .filter(move |(_, page)| is_written_zero(*page))
            .map(|(page, _)| page)
    }
}

impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contents").field("shapes", &self.shapes).finish_non_exhaustive()
    }
}

/// Notes pages of one block, moved in one round. It allocates nothing, blocks nobody and never panics.
pub struct Notes<'a> {
    block: Option<&'a Block>,
    mark: u8,
}

impl Notes<'_> {
    /// Notes a page that came as data, by the hash of its content (see [`PageHash`](crate::memory::hash::PageHash)).
    #[inline]
    pub fn data(&mut self, page: u64, content_hash: u64) {
        self.note(page, content_hash, WRITTEN);
    }

    /// Notes a page of zeros that nobody had to read or to write.
    #[inline]
    pub fn zero(&mut self, page: u64) {
        self.note(page, super::ZERO_CONTENT, 0);
    }

    #[inline]
    fn note(&self, page: u64, content_hash: u64, written: u8) {
        let Some(block) = self.block else { return };
        let page = usize::try_from(page).unwrap_or(usize::MAX);
        let (Some(hash), Some(mark)) = (block.hashes.get(page), block.marks.get(page)) else {
            debug_assert!(false, "no such page");
            return;
        };
        hash.store(content_hash, Ordering::Relaxed);
        // One of two that note a page in one round swaps second, and sees the other's mark, whatever came of the hash.
        let old = mark.load(Ordering::Relaxed);
        let was = mark.swap(self.mark | written | (old & WRITTEN), Ordering::Relaxed);
        let is_twice = [self.mark, TWICE].contains(&(was & !WRITTEN));
        if is_twice && !crate::sync::mutated("contents/forget-twice") {
            mark.store(TWICE | written | (was & WRITTEN), Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Notes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notes").field("mark", &self.mark).finish_non_exhaustive()
    }
}
