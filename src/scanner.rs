#![forbid(unsafe_code)]
//! Walks guest RAM a chunk at a time: harvests dirty bits, leaves out what was never touched, keeps back what is dirty
//! again and again, remembers what it took.

use crate::dirty::runs::{Runs, count, set_range};
use crate::dirty::{DirtyError, DirtySource};
use crate::framing::Zeros;
use crate::memory::{Ram, RamBlock};
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
    /// What becomes of pages that nobody has ever touched, for each block.
    untouched: Vec<Zeros>,
    /// The chunk that was harvested last.
    words: Vec<u64>,
    /// Its pages that nobody has ever touched and that are to be named.
    named: Vec<u64>,
    /// Everything taken from the dirty source since it was armed: it is given back if the migration fails.
    taken: Vec<Vec<u64>>,
    /// What the last rounds found, for each block.
    past: Vec<Past>,
    /// Whether this round may keep anything back, how many bytes it still may, and how many are kept back by now.
    keeps_back: bool,
    defer_left: u64,
    deferred_bytes: u64,
    /// How many this round has kept back, and the most that one has.
    kept_bytes: u64,
    deferred_bytes_max: u64,
    untouched_bytes: u64,
}

/// What the last rounds found dirty in one block, those that might keep something back. A page that is dirty in three of
/// them in a row would be sent in each, and once more at the end: it is kept back for the end instead, if there is time
/// for it then.
#[derive(Debug)]
struct Past {
    /// Dirty in the last round.
    once: Vec<u64>,
    /// Dirty in each of the last two rounds.
    twice: Vec<u64>,
    /// Taken from the dirty source, and not handed out.
    deferred: Vec<u64>,
    page_bytes: u64,
}

impl Scanner {
    /// A scanner with everything allocated that it will need.
    pub fn new(ram: &Ram) -> Scanner {
        let bits = |block: &RamBlock| vec![0; block.pages().div_ceil(64) as usize];
        let past = |block: &RamBlock| Past {
            once: bits(block),
            twice: bits(block),
            deferred: bits(block),
            page_bytes: block.page_size().bytes(),
        };
        Scanner {
            presence: PresenceMap::new(ram),
            untouched: vec![Zeros::LeftOut; ram.blocks().len()],
            words: vec![0; CHUNK_WORDS],
            named: vec![0; CHUNK_WORDS],
            taken: ram.blocks().iter().map(bits).collect(),
            past: ram.blocks().iter().map(past).collect(),
            keeps_back: false,
            defer_left: 0,
            deferred_bytes: 0,
            kept_bytes: 0,
            deferred_bytes_max: 0,
            untouched_bytes: 0,
        }
    }

    /// Treats pages that nobody has ever touched as the wire wants it; left to itself, it leaves them out.
    pub fn treating(mut self, ram: &Ram, untouched: impl Fn(&RamBlock) -> Zeros) -> Scanner {
        self.untouched = ram.blocks().iter().map(untouched).collect();
        self
    }

    /// A round begins that may keep back so many bytes for the end. 0 hands out everything, as every round does in which
    /// the guest stands still; what is dirty in such a round says nothing about how often a page is, and is not noted.
    pub fn begin_round(&mut self, defer_bytes: u64) {
        self.kept_bytes = 0;
        self.keeps_back = defer_bytes > 0;
        self.defer_left = defer_bytes;
    }

    /// Bytes of pages that were harvested and kept back.
    pub fn deferred_bytes(&self) -> u64 {
        self.deferred_bytes
    }

    /// Bytes that were left out because nobody ever touched them.
    pub fn untouched_bytes(&self) -> u64 {
        self.untouched_bytes
    }

    /// The most bytes that a round has kept back for the end.
    pub fn deferred_bytes_max(&self) -> u64 {
        self.deferred_bytes_max
    }

    /// Harvests a chunk. After this its bits are clear at the source, and **only then** may its pages be read: a write
    /// from now on makes them dirty again.
    ///
    /// A source that fails may have forgotten bits: all pages of the chunk count as dirty, and go out. The error comes
    /// back beside that, for the report.
    pub fn harvest(&mut self, ram: &Ram, dirty: &mut dyn DirtySource, chunk: Chunk, which: Which) -> Option<DirtyError> {
        let words = &mut self.words[..chunk.pages.div_ceil(64) as usize];
        words.fill(0);
        let named = &mut self.named[..words.len()];
        named.fill(0);
        let failed = dirty.harvest(chunk.block, chunk.first, words).err();
        if failed.is_some() {
            fill_ones(words, chunk.pages);
        }
        let taken = &mut self.taken[usize::from(chunk.block.0)][(chunk.first / 64) as usize..];
        note_taken(taken, words);
        if which == Which::All {
            fill_ones(words, chunk.pages);
            // Asked after the harvest: a page that comes into being later is dirty, and goes with the next round.
            // An error leaves the bits set that it could not decide on: they count as present.
            let untouched = self.untouched[usize::from(chunk.block.0)];
            if untouched != Zeros::Data {
                let _ = self.presence.keep_present(chunk.block, chunk.first, words);
            }
            if untouched == Zeros::Named {
                fill_ones(named, chunk.pages);
                named.iter_mut().zip(&*words).for_each(|(named, present)| *named &= !present);
            } else {
                let bytes = ram.block(chunk.block).map_or(0, |b| b.page_size().bytes());
                self.untouched_bytes += (chunk.pages - count(words)) * bytes;
            }
        } else {
            let (past, at) = (&mut self.past[usize::from(chunk.block.0)], (chunk.first / 64) as usize);
            if self.keeps_back {
                let left = self.defer_left;
                past.defer(at, words, &mut self.defer_left, &mut self.deferred_bytes);
                self.kept_bytes += left - self.defer_left;
                self.deferred_bytes_max = self.deferred_bytes_max.max(self.kept_bytes);
            } else if self.deferred_bytes > 0 {
                self.deferred_bytes -= past.hand_out(at, words);
            }
        }
        failed
    }

    /// The runs of the chunk that was harvested last, as long as they are: whoever batches them cuts them.
    #[inline]
    pub fn runs(&self, chunk: Chunk) -> impl Iterator<Item = Run> + '_ {
        runs_of(&self.words, chunk)
    }

    /// The runs of its pages that nobody has ever touched and that are to be named: in round 0, if the wire wants it.
    pub fn untouched_runs(&self, chunk: Chunk) -> impl Iterator<Item = Run> + '_ {
        runs_of(&self.named, chunk)
    }

    /// Takes back runs of pages that were harvested and handed out, and went nowhere: the next round has them.
    pub fn keep_back(&mut self, runs: &[Run]) {
        for run in runs {
            let past = &mut self.past[usize::from(run.block.0)];
            let (first, pages) = (run.first, u64::from(run.pages));
            let before = count(&past.deferred[(first / 64) as usize..][..words_of(first, pages)]);
            set_range(&mut past.deferred, first, first + pages);
            let after = count(&past.deferred[(first / 64) as usize..][..words_of(first, pages)]);
            self.deferred_bytes += (after - before) * past.page_bytes;
        }
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

impl Past {
    /// Takes the pages out of `words` that are kept back, and adds those that no longer are.
    fn defer(&mut self, at: usize, words: &mut [u64], left: &mut u64, deferred_bytes: &mut u64) {
        let Past { once, twice, deferred, page_bytes } = self;
        let past = once[at..].iter_mut().zip(&mut twice[at..]).zip(&mut deferred[at..]);
        for (word, ((once, twice), deferred)) in words.iter_mut().zip(past) {
            let fresh = *word;
            if fresh | *once | *deferred == 0 {
                continue; // and then nothing was dirty twice
            }
            let keep = highest(fresh & *twice, *left / *page_bytes);
            if keep | *deferred != 0 {
                let (kept, had) = (u64::from(keep.count_ones()), u64::from(deferred.count_ones()));
                *left -= kept * *page_bytes;
                *deferred_bytes = *deferred_bytes + kept * *page_bytes - had * *page_bytes;
                *word = (fresh | *deferred) & !keep;
                *deferred = keep;
            }
            // What stays as it was is not written: much memory need not go out of the cache then.
            if *twice != fresh & *once {
                *twice = fresh & *once;
            }
            if *once != fresh {
                *once = fresh;
            }
        }
    }

    /// Adds all that was kept back to `words`; how many bytes it was.
    fn hand_out(&mut self, at: usize, words: &mut [u64]) -> u64 {
        let mut pages = 0;
        for (word, deferred) in words.iter_mut().zip(&mut self.deferred[at..]) {
            if *deferred != 0 {
                *word |= *deferred;
                pages += u64::from(deferred.count_ones());
                *deferred = 0;
            }
        }
        pages * self.page_bytes
    }
}

/// So many of the bits that are set, the highest ones, or all if there are no more.
fn highest(bits: u64, count: u64) -> u64 {
    if bits == 0 || count == 0 {
        return 0;
    }
    // The loop runs for one word of a round, that in which the budget runs out.
    let surplus = u64::from(bits.count_ones()).saturating_sub(count);
    (0..surplus).fold(bits, |bits, _| bits & (bits - 1))
}

/// ORs `words` into `taken`. Writes only where that changes something: what is dirty in every round would else be
/// written back to memory in every round.
fn note_taken(taken: &mut [u64], words: &[u64]) {
    for (taken, words) in taken.chunks_mut(8).zip(words.chunks(8)) {
        let is_clean = words.iter().fold(0, |all, word| all | word) == 0;
        if !is_clean && taken.iter().zip(words).fold(0, |new, (taken, word)| new | (word & !taken)) != 0 {
            taken.iter_mut().zip(words).for_each(|(taken, word)| *taken |= word);
        }
    }
}

fn runs_of(words: &[u64], chunk: Chunk) -> impl Iterator<Item = Run> + '_ {
    let words = &words[..chunk.pages.div_ceil(64) as usize];
    let block = chunk.block;
    Runs::new(words, chunk.first, CHUNK_PAGES as u32).map(move |(first, pages)| Run { block, first, pages })
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

/// How many words so many pages from `first` on touch.
fn words_of(first: u64, pages: u64) -> usize {
    ((first + pages).div_ceil(64) - first / 64) as usize
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

    /// What a round hands out of the first 64 pages, when these are dirty and so many bytes may be kept back.
    fn round(scanner: &mut Scanner, ram: &Ram, dirty: u64, defer_bytes: u64) -> u64 {
        let mut bitmap = DirtyBitmap::for_ram(ram);
        bitmap.give_back(BlockId(0), 0, &[dirty]).unwrap();
        scanner.begin_round(defer_bytes);
        let chunk = chunks(ram).next().unwrap();
        scanner.harvest(ram, &mut bitmap, chunk, Which::Dirty);
        scanner.runs(chunk).flat_map(|run| run.first..run.first + u64::from(run.pages)).map(|page| 1 << page).sum()
    }

    #[test]
    fn a_page_that_is_dirty_in_three_rounds_waits_for_the_end() {
        let ram = ram(64);
        let mut scanner = Scanner::new(&ram);
        let mut next = |dirty, budget| round(&mut scanner, &ram, dirty, budget);
        assert_eq!(next(0b0111, u64::MAX), 0b0111);
        assert_eq!(next(0b1011, u64::MAX), 0b1011);
        assert_eq!(next(0b0011, u64::MAX), 0, "both were dirty three times");
        assert_eq!(next(0b0001, u64::MAX), 0b0010, "one is no longer dirty, and goes");
        assert_eq!(next(0b1000, 0), 0b1001, "at the end everything goes");
        assert_eq!(scanner.deferred_bytes(), 0);
    }

    #[test]
    fn what_was_handed_out_and_went_nowhere_comes_with_the_next_round() {
        let ram = ram(200);
        let mut scanner = Scanner::new(&ram);
        let run = |first, pages| Run { block: BlockId(0), first, pages };
        scanner.keep_back(&[run(3, 2), run(60, 10), run(199, 1), run(60, 1)]);
        assert_eq!(scanner.deferred_bytes(), 13 * 4096);
        scanner.begin_round(0);
        let chunk = chunks(&ram).next().unwrap();
        scanner.harvest(&ram, &mut DirtyBitmap::for_ram(&ram), chunk, Which::Dirty);
        let handed_out: Vec<_> = scanner.runs(chunk).map(|run| (run.first, run.pages)).collect();
        assert_eq!(handed_out, [(3, 2), (60, 10), (199, 1)]);
        assert_eq!(scanner.deferred_bytes(), 0);
    }

    #[test]
    fn no_more_is_kept_back_than_the_end_has_time_for() {
        let ram = ram(64);
        let mut scanner = Scanner::new(&ram);
        for _ in 0..2 {
            round(&mut scanner, &ram, 0b1111, 2 * 4096 + 4095);
        }
        let sent = round(&mut scanner, &ram, 0b1111, 2 * 4096 + 4095);
        assert_eq!((sent.count_ones(), scanner.deferred_bytes()), (2, 2 * 4096));
    }

    #[test]
    fn the_budget_may_end_anywhere_in_a_word() {
        for budget in [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000] {
            let ram = ram(192);
            let mut scanner = Scanner::new(&ram);
            let chunk = chunks(&ram).next().unwrap();
            for round in 1..=4 {
                let mut bitmap = DirtyBitmap::for_ram(&ram);
                bitmap.mark_range(BlockId(0), 0, 128);
                // One byte less than another page.
                scanner.begin_round(budget * 4096 + 4095);
                scanner.harvest(&ram, &mut bitmap, chunk, Which::Dirty);
                let handed_out: u64 = scanner.runs(chunk).map(|run| u64::from(run.pages)).sum();
                let kept = if round < 3 { 0 } else { budget.min(128) };
                assert_eq!((handed_out, scanner.deferred_bytes()), (128 - kept, kept * 4096), "{budget} {round}");
            }
        }
    }

    #[test]
    fn a_round_without_a_budget_hands_out_everything_and_leaves_no_trace() {
        let ram = ram(64);
        let mut scanner = Scanner::new(&ram);
        let mut next = |dirty, budget| round(&mut scanner, &ram, dirty, budget);
        next(0b0111, u64::MAX);
        next(0b0111, u64::MAX);
        assert_eq!(next(0b0011, u64::MAX), 0, "two are kept back, the third is clean");
        assert_eq!(next(0b1000, 0), 0b1011, "and come with the round that may keep nothing");
        assert_eq!(next(0b0011, u64::MAX), 0, "which has not made them less hot");
        assert_eq!(next(0b1000, u64::MAX), 0b1011, "in the end they go");
        assert_eq!(scanner.deferred_bytes(), 0);
    }

    #[test]
    fn what_is_kept_back_is_given_back_with_all_the_rest() {
        let ram = ram(64);
        let mut scanner = Scanner::new(&ram);
        for _ in 0..3 {
            round(&mut scanner, &ram, 0b11, u64::MAX);
        }
        let mut bitmap = DirtyBitmap::for_ram(&ram);
        scanner.give_back(&mut bitmap).unwrap();
        assert_eq!(bitmap.count(), 2);
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
