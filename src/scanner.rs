#![forbid(unsafe_code)]
//! Walks guest RAM a chunk at a time: harvests dirty bits, leaves out what was never touched, remembers what it took.

use crate::dirty::runs::{Runs, count};
use crate::dirty::{DirtyError, DirtySource};
use crate::memory::Ram;
use crate::memory::presence::PresenceMap;
use crate::units::{BlockId, Run};

/// Pages that are harvested at once: 64 MiB of 4 KiB pages. A page is cleared no longer before it is sent than it takes
/// to send this much; more would send more pages twice, less would cost more calls into the kernel.
pub const CHUNK_PAGES: u64 = 16384;
const CHUNK_WORDS: usize = CHUNK_PAGES as usize / 64;

/// A stretch of one block, harvested as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// The block.
    pub block: BlockId,
    /// Its first page, a multiple of 64.
    pub first: u64,
    /// Its pages.
    pub pages: u64,
}

/// Which pages a round ships.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    /// All that exist: round 0.
    All,
    /// Those that are dirty.
    Dirty,
}

/// Dirty bits on their way from the source to the rings.
#[derive(Debug)]
pub struct Scanner {
    presence: PresenceMap,
    /// The chunk that was harvested last.
    words: Vec<u64>,
    /// Everything taken from the dirty source since it was armed: it is given back if the migration fails.
    taken: Vec<Vec<u64>>,
    untouched_bytes: u64,
}

impl Scanner {
    /// A scanner with everything allocated that it will need.
    pub fn new(ram: &Ram) -> Scanner {
        Scanner {
            presence: PresenceMap::new(ram),
            words: vec![0; CHUNK_WORDS],
            taken: ram.blocks().iter().map(|b| vec![0; b.pages().div_ceil(64) as usize]).collect(),
            untouched_bytes: 0,
        }
    }

    /// Bytes that were left out because nobody ever touched them.
    pub fn untouched_bytes(&self) -> u64 {
        self.untouched_bytes
    }

    /// Harvests a chunk. After this its bits are clear at the source, and **only then** may its pages be read: a write
    /// from now on makes them dirty again.
    ///
    /// A source that fails may have forgotten bits: all pages of the chunk count as dirty, and go out. The error comes
    /// back beside that, for the report.
    pub fn harvest(&mut self, ram: &Ram, dirty: &mut dyn DirtySource, chunk: Chunk, which: Which) -> Option<DirtyError> {
        let words = &mut self.words[..chunk.pages.div_ceil(64) as usize];
        words.fill(0);
        let failed = dirty.harvest(chunk.block, chunk.first, words).err();
        if failed.is_some() {
            fill_ones(words, chunk.pages);
        }
        let taken = &mut self.taken[usize::from(chunk.block.0)][(chunk.first / 64) as usize..];
        for (taken, dirty) in taken.iter_mut().zip(&*words) {
            *taken |= dirty;
        }
        if which == Which::All {
            fill_ones(words, chunk.pages);
            // Asked after the harvest: a page that comes into being later is dirty, and goes with the next round.
            // An error leaves the bits set that it could not decide on: they count as present.
            let _ = self.presence.keep_present(chunk.block, chunk.first, words);
            let bytes = ram.block(chunk.block).map_or(0, |b| b.page_size().bytes());
            self.untouched_bytes += (chunk.pages - count(words)) * bytes;
        }
        failed
    }

    /// The runs of the chunk that was harvested last, as long as they are: whoever batches them cuts them.
    pub fn runs(&self, chunk: Chunk) -> impl Iterator<Item = Run> + '_ {
        let words = chunk.pages.div_ceil(64) as usize;
        Runs::new(&self.words[..words], chunk.first, CHUNK_PAGES as u32).map(move |(first, pages)| Run {
            block: chunk.block,
            first,
            pages,
        })
    }

    /// Gives everything that was taken since arm back to the source. The first error, if there was one; the rest is
    /// given back all the same.
    pub fn give_back(&mut self, dirty: &mut dyn DirtySource) -> Result<(), DirtyError> {
        let mut result = Ok(());
        for (block, taken) in self.taken.iter_mut().enumerate() {
            for (index, words) in taken.chunks_mut(CHUNK_WORDS).enumerate() {
                if words.iter().any(|word| *word != 0) {
                    let first = (index * CHUNK_WORDS * 64) as u64;
                    result = result.and(dirty.give_back(BlockId(block as u16), first, words));
                    words.fill(0);
                }
            }
        }
        result
    }
}

/// All of RAM in chunks, block after block.
pub fn chunks(ram: &Ram) -> impl Iterator<Item = Chunk> + '_ {
    ram.blocks().iter().enumerate().flat_map(|(index, block)| {
        let pages = block.pages();
        (0..pages).step_by(CHUNK_PAGES as usize).map(move |first| Chunk {
            block: BlockId(index as u16),
            first,
            pages: CHUNK_PAGES.min(pages - first),
        })
    })
}

/// Sets the bits of the first `pages` pages, and clears those behind them.
fn fill_ones(words: &mut [u64], pages: u64) {
    for (index, word) in words.iter_mut().enumerate() {
        let left = pages.saturating_sub(index as u64 * 64);
        *word = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::bitmap::DirtyBitmap;
    use crate::dirty::combined::Still;
    use crate::memory::{Backing, RamBlock};
    use crate::units::PageSize;
    use std::io;

    fn ram(pages: u64) -> Ram {
        let block = RamBlock::anonymous("ram", 0, pages * 4096, PageSize::SIZE_4K, Backing::Base).unwrap();
        Ram::new([block]).unwrap()
    }

    #[test]
    fn a_block_that_is_no_multiple_of_64_pages_ends_where_it_ends() {
        let ram = ram(CHUNK_PAGES + 3);
        let all: Vec<_> = chunks(&ram).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[1].first, all[1].pages), (CHUNK_PAGES, 3));
        let mut words = [9; 2];
        fill_ones(&mut words, 67);
        assert_eq!(words, [u64::MAX, 7]);
    }

    #[test]
    fn what_was_never_touched_is_left_out_and_counted() {
        let ram = ram(128);
        let mut scanner = Scanner::new(&ram);
        let chunk = chunks(&ram).next().unwrap();
        let mut still = Still::new();
        still.arm(&ram).unwrap();
        assert!(scanner.harvest(&ram, &mut still, chunk, Which::All).is_none());
        assert_eq!(scanner.runs(chunk).count(), 0);
        assert_eq!(scanner.untouched_bytes(), 128 * 4096);
    }

    struct Broken;
    impl DirtySource for Broken {
        fn arm(&mut self, _: &Ram) -> Result<(), DirtyError> {
            Ok(())
        }
        fn begin_round(&mut self) -> Result<u64, DirtyError> {
            Ok(0)
        }
        fn harvest(&mut self, block: BlockId, first_page: u64, _: &mut [u64]) -> Result<(), DirtyError> {
            Err(DirtyError::Scan { block, first_page, source: io::ErrorKind::Other.into() })
        }
        fn give_back(&mut self, _: BlockId, _: u64, _: &[u64]) -> Result<(), DirtyError> {
            Ok(())
        }
        fn disarm(&mut self) {}
    }

    #[test]
    fn a_failed_harvest_counts_its_whole_range_as_dirty() {
        let ram = ram(100);
        let mut scanner = Scanner::new(&ram);
        let chunk = chunks(&ram).next().unwrap();
        assert!(scanner.harvest(&ram, &mut Broken, chunk, Which::Dirty).is_some());
        let runs: Vec<_> = scanner.runs(chunk).map(|r| (r.first, r.pages)).collect();
        assert_eq!(runs, [(0, 100)]);
    }

    #[test]
    fn everything_taken_since_arm_is_given_back() {
        let ram = ram(200);
        let mut bitmap = DirtyBitmap::for_ram(&ram);
        let mut scanner = Scanner::new(&ram);
        let chunk = chunks(&ram).next().unwrap();
        for page in [3, 77, 199] {
            bitmap.mark(BlockId(0), page);
            scanner.harvest(&ram, &mut bitmap, chunk, Which::Dirty);
        }
        assert_eq!(bitmap.count(), 0);
        scanner.give_back(&mut bitmap).unwrap();
        assert_eq!(bitmap.count(), 3);
    }
}
