//! What was last sent, or landed, of each page: a table of hashes that folds into a digest per 2 MiB and per block.
//!
//! Source and target each keep a [`DigestTable`] of their own and record in it what they send, or what lands. When
//! everything sent has landed, both hold the same entries, and their digests agree: an end-to-end proof for the price
//! of one hash and one atomic operation a page. Where they do not, the chunks that differ name what must travel again.
//!
//! # One word a page
//!
//! An entry is `(round + 1) << 48 | 48 bits of hash`, and 0 means never sent. So one `fetch_max` both stores an entry
//! and makes sure that an older round never replaces a newer one, however late its worker comes to record it.
//!
//! # A fold that is never recomputed
//!
//! A chunk's digest is the wrapping sum of `fold(entry)` over its pages, kept up to date as entries change. That this
//! is right whatever threads do at the same time rests on two facts:
//!
//! - An entry changes only by `fetch_max`, and all changes of one word have one order: e0 < e1 < ... < en. Each step
//!   from e(i) to e(i+1) is made by exactly one `fetch_max`: the one that returned e(i) and brought e(i+1). That one
//!   caller, and no other, adds `fold(e(i+1)) - fold(e(i))` to the chunk. The sum telescopes to `fold(en) - fold(e0)`.
//! - Additions commute, so it does not matter when, or in which order, these differences reach the chunk.
//!
//! So once every recorder is done, the chunk holds the fold of its final entries. Until then a digest is a value in
//! between, good for nothing. That recorders are done, the reader knows from elsewhere: an acknowledgement, a join,
//! a barrier, whose Acquire makes everything recorded visible. Hence no ordering here is stronger than Relaxed.
#![forbid(unsafe_code)]

mod contents;

use crate::sync::{AtomicU64, Ordering};
use crate::units::{BlockId, PageSize, Round, SessionId};
use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;

pub use contents::{Contents, Notes};

/// Bytes of guest RAM whose pages share one digest.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// The last round an entry can hold. Later ones count as this one.
pub const ROUND_MAX: Round = Round(65534);

/// The content hash of a page of zeros: `memory::hash::ZERO_HASH`.
const ZERO_CONTENT: u64 = 0;

/// An odd number: multiples of it are all different.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

const HASH_BITS: u32 = 48;
const HASH_MASK: u64 = (1 << HASH_BITS) - 1;

/// The size of a RAM block, in tracking pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockShape {
    /// Number of pages.
    pub pages: u64,
    /// Bytes of each.
    pub page_size: PageSize,
}

/// The hash of each page as it was last sent or landed, and the digests made of them.
///
/// Any number of threads may record at the same time. Digests are for when none does.
///
/// ```
/// use pageferry::digest::{BlockShape, DigestTable};
/// use pageferry::units::{BlockId, PageSize, Round, SessionId};
///
/// let shape = [BlockShape { pages: 1024, page_size: PageSize::SIZE_4K }];
/// let source = DigestTable::new(SessionId([7; 16]), &shape)?;
/// let target = DigestTable::new(SessionId([7; 16]), &shape)?;
/// let ram = BlockId(0);
///
/// // Page 600 travels twice, and lands twice.
/// for table in [&source, &target] {
///     table.recorder(ram, Round(0)).page(600, 0x1234);
///     table.recorder(ram, Round(1)).page(600, 0x5678);
/// }
/// assert_eq!(source.block_digest(ram), target.block_digest(ram));
///
/// // One more is sent, and gets lost.
/// source.recorder(ram, Round(1)).page(601, 0x9abc);
/// let landed: Vec<u64> = (0..target.chunks(ram)).map(|chunk| target.chunk_digest(ram, chunk)).collect();
/// assert_eq!(source.differing_chunks(ram, &landed).collect::<Vec<_>>(), [1]);
/// assert_eq!(source.chunk_pages(ram, 1), 512..1024);
/// # Ok::<(), std::collections::TryReserveError>(())
/// ```
pub struct DigestTable {
    blocks: Vec<Block>,
}

struct Block {
    key: u64,
    /// log2 of the pages of a chunk.
    chunk_shift: u32,
    /// By page. Written by whoever records the page; publishes nothing.
    entries: Vec<AtomicU64>,
    /// By chunk. Added to by whoever raised an entry; publishes nothing.
    chunks: Vec<AtomicU64>,
}

impl DigestTable {
    /// A table for blocks of these shapes, named `BlockId(0)`, `BlockId(1)` and so on; no page was ever sent.
    ///
    /// It takes 8 bytes of address space a page, 1 GiB for a guest of 512 GiB; but of memory only what is recorded
    /// in: what was never touched stays with the kernel. (In a debug build all of it is touched here.)
    ///
    /// # Errors
    ///
    /// If there is no room for the table. A guest must not die of its migration, so this is no abort.
    pub fn new(session: SessionId, blocks: &[BlockShape]) -> Result<DigestTable, TryReserveError> {
        let block = |(id, shape): (usize, &BlockShape)| -> Result<Block, TryReserveError> {
            let chunk_shift = CHUNK_BYTES.trailing_zeros() - shape.page_size.shift();
            Ok(Block {
                key: block_key(session, id as u64),
                chunk_shift,
                entries: zeroed(shape.pages, AtomicU64::new)?,
                chunks: zeroed(shape.pages.div_ceil(1 << chunk_shift), AtomicU64::new)?,
            })
        };
        Ok(DigestTable { blocks: blocks.iter().enumerate().map(block).collect::<Result<_, _>>()? })
    }

    /// Begins to record pages of one block, sent or landed in one round: one recorder a run.
    ///
    /// Nothing on the way of a page may panic, so a block that does not exist takes whatever is recorded and forgets
    /// it; a debug build asserts. Rounds after [`ROUND_MAX`] count as that one.
    #[inline]
    pub fn recorder(&self, block: BlockId, round: Round) -> Recorder<'_> {
        let block = self.blocks.get(usize::from(block.0));
        debug_assert!(block.is_some(), "no such block");
        let stamp = (u64::from(round.0.min(ROUND_MAX.0)) + 1) << HASH_BITS;
        Recorder { block, stamp, chunk: 0, difference: 0 }
    }

    /// The digest of all pages of a block.
    ///
    /// # Panics
    ///
    /// If there is no such block.
    pub fn block_digest(&self, block: BlockId) -> u64 {
        self.block(block).chunks.iter().fold(0, |sum, chunk| sum.wrapping_add(chunk.load(Ordering::Relaxed)))
    }

    /// The digest of the pages of one chunk.
    ///
    /// # Panics
    ///
    /// If there is no such block, or no such chunk in it.
    pub fn chunk_digest(&self, block: BlockId, chunk: usize) -> u64 {
        self.block(block).chunks[chunk].load(Ordering::Relaxed)
    }

    /// The number of chunks of a block; the last may be shorter than [`CHUNK_BYTES`].
    ///
    /// # Panics
    ///
    /// If there is no such block.
    pub fn chunks(&self, block: BlockId) -> usize {
        self.block(block).chunks.len()
    }

    /// The pages of one chunk; none if there is no such chunk.
    ///
    /// # Panics
    ///
    /// If there is no such block.
    pub fn chunk_pages(&self, block: BlockId, chunk: usize) -> Range<u64> {
        let block = self.block(block);
        let pages = block.entries.len() as u64;
        let page = |chunk: usize| (chunk as u64).saturating_mul(1 << block.chunk_shift).min(pages);
        page(chunk)..page(chunk.saturating_add(1))
    }

    /// The chunks whose digests are not those that `peer` has, in order.
    ///
    /// Digests for another number of chunks than the block has cannot be of the same block: then all chunks differ.
    ///
    /// # Panics
    ///
    /// If there is no such block.
    pub fn differing_chunks<'a>(&'a self, block: BlockId, peer: &'a [u64]) -> impl Iterator<Item = usize> + 'a {
        let chunks = &self.block(block).chunks;
        let comparable = chunks.len() == peer.len();
        let differs = move |&at: &usize| !comparable || chunks[at].load(Ordering::Relaxed) != peer[at];
        (0..chunks.len()).filter(differs)
    }

    fn block(&self, block: BlockId) -> &Block {
        &self.blocks[usize::from(block.0)]
    }
}

impl fmt::Debug for DigestTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A table has millions of entries: only its shape is shown.
        let pages = self.blocks.iter().map(|block| block.entries.len());
        f.debug_struct("DigestTable").field("pages", &pages.collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

/// Records pages of one block and one round. Chunks learn of them at [`finish`](Recorder::finish) or drop, at latest.
///
/// It gathers the changes of a chunk and adds them at once: a run costs one addition for each chunk it touches.
/// It allocates nothing, blocks nobody and never panics.
///
/// ```
/// # use pageferry::digest::{BlockShape, DigestTable};
/// # use pageferry::units::{BlockId, PageSize, Round, SessionId};
/// # let shape = [BlockShape { pages: 1024, page_size: PageSize::SIZE_4K }];
/// # let table = DigestTable::new(SessionId([7; 16]), &shape)?;
/// let mut recorder = table.recorder(BlockId(0), Round(3));
/// recorder.page(510, 0x1234);
/// recorder.zero(511, 2);
/// recorder.finish();
/// assert_ne!(table.block_digest(BlockId(0)), 0);
/// # Ok::<(), std::collections::TryReserveError>(())
/// ```
pub struct Recorder<'a> {
    block: Option<&'a Block>,
    /// The round, where entries have it.
    stamp: u64,
    /// The chunk that `difference` is for.
    chunk: usize,
    difference: u64,
}

impl Recorder<'_> {
    /// Records a page by the hash of its content (see [`PageHash`](crate::memory::hash::PageHash)).
    ///
    /// A page that the block does not have is forgotten; a debug build asserts.
    #[inline]
    pub fn page(&mut self, page: u64, content_hash: u64) {
        let Some(block) = self.block else { return };
        let entry = usize::try_from(page).ok().and_then(|page| block.entries.get(page));
        debug_assert!(entry.is_some(), "no such page");
        let Some(entry) = entry else { return };
        let new = self.stamp | (keyed(block.key, page, content_hash) & HASH_MASK);
        // Relaxed: see the module's text; the order of changes to one word needs no more.
        let old = entry.fetch_max(new, Ordering::Relaxed);
        if old < new {
            let chunk = (page >> block.chunk_shift) as usize;
            if chunk != self.chunk {
                self.flush();
                self.chunk = chunk;
            }
            self.difference = self.difference.wrapping_add(fold(new)).wrapping_sub(fold(old));
        }
    }

    /// Records `pages` pages of zeros from page `first` on, without anybody reading them.
    #[inline]
    pub fn zero(&mut self, first: u64, pages: u32) {
        (first..first.saturating_add(u64::from(pages))).for_each(|page| self.page(page, ZERO_CONTENT));
    }

    /// Ends recording: the digests of the chunks now include these pages. Dropping does the same.
    pub fn finish(self) {}

    #[inline]
    fn flush(&mut self) {
        // A difference of 0 is none, or one that adds nothing.
        if let (Some(block), true) = (self.block, self.difference != 0) {
            // In bounds: a difference is only ever gathered for a chunk with a page in the block.
            block.chunks[self.chunk].fetch_add(self.difference, Ordering::Relaxed);
            self.difference = 0;
        }
    }
}

impl Drop for Recorder<'_> {
    #[inline]
    fn drop(&mut self) {
        self.flush();
    }
}

impl fmt::Debug for Recorder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let round = (self.stamp >> HASH_BITS) - 1;
        f.debug_struct("Recorder").field("round", &round).field("chunk", &self.chunk).finish_non_exhaustive()
    }
}

/// The digest of what a block holds, every page of it, whatever was sent and when: for `verify = full`.
///
/// Threads may share the work: each takes some pages and a digest of its own; merged, in any order, they are the
/// digest of all.
///
/// ```
/// use pageferry::digest::FullDigest;
/// use pageferry::units::{BlockId, SessionId};
///
/// let new = || FullDigest::new(SessionId([7; 16]), BlockId(0));
/// let (mut whole, mut left, mut right) = (new(), new(), new());
/// for page in 0..100 {
///     whole.page(page, page * page);
///     if page < 50 { &mut left } else { &mut right }.page(page, page * page);
/// }
/// right.merge(left);
/// assert_eq!(right, whole);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FullDigest {
    key: u64,
    sum: u64,
}

impl FullDigest {
    /// The digest of no page of this block.
    pub fn new(session: SessionId, block: BlockId) -> FullDigest {
        FullDigest { key: block_key(session, u64::from(block.0)), sum: 0 }
    }

    /// Takes in a page by the hash of its content. Each page must be taken in once.
    #[inline]
    pub fn page(&mut self, page: u64, content_hash: u64) {
        self.sum = self.sum.wrapping_add(keyed(self.key, page, content_hash));
    }

    /// Takes in what another digest of the same session and block has taken in, of other pages.
    ///
    /// # Panics
    ///
    /// If the other is of another session or block.
    pub fn merge(&mut self, other: FullDigest) {
        assert_eq!(self.key, other.key, "digests of different blocks");
        self.sum = self.sum.wrapping_add(other.sum);
    }

    /// The value to compare with the peer's.
    pub fn value(self) -> u64 {
        self.sum
    }
}

/// `len` zeros that take no memory until they are written to.
fn zeroed<T: Clone + Default, A>(len: u64, atomic: impl Fn(T) -> A) -> Result<Vec<A>, TryReserveError> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    // `vec!` gets its zeros from the kernel, untouched, but aborts the process where there is no room: so try first.
    // The black box keeps the compiler from leaving out an allocation that nobody uses.
    let mut room = Vec::<T>::new();
    room.try_reserve_exact(len)?;
    drop(std::hint::black_box(room));
    // Collecting reuses the allocation, and optimized, wrapping each word in an atomic is no code at all: the words
    // stay untouched. A test holds the compiler to that. (Under loom an atomic is no plain word, and this is a loop.)
    Ok(vec![T::default(); len].into_iter().map(atomic).collect())
}

/// What a block's hashes are keyed with: they mean nothing in another session, or for another block.
fn block_key(session: SessionId, block: u64) -> u64 {
    let session = u128::from_le_bytes(session.0);
    // Steps keep 0 from being mixed into 0.
    [session as u64, (session >> 64) as u64, block]
        .into_iter()
        .fold(0, |key: u64, word| mix64(key.wrapping_add(STEP) ^ word))
}

/// The hash of a page's content at its place: the same content elsewhere has another.
#[inline]
fn keyed(block_key: u64, page: u64, content_hash: u64) -> u64 {
    mix64(content_hash ^ block_key.wrapping_add(page.wrapping_mul(STEP)))
}

/// What an entry adds to its chunk's digest. Entries are no random numbers (their rounds hardly differ), and sums of
/// them could cancel out; sums of mixed ones do not. An entry of 0, a page never sent, adds 0.
#[inline]
fn fold(entry: u64) -> u64 {
    mix64(entry)
}

/// The finalizer of splitmix64: one to one, every bit in reaches every bit out, and 0 stays 0.
#[inline]
fn mix64(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
