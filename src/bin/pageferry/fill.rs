//! What the demo guest's RAM holds before the migration: a mix like that of a machine that has run for a while.

use pageferry::digest::FullDigest;
use pageferry::memory::look::Look;
use pageferry::memory::words;
use pageferry::units::{BlockId, SessionId};
use pageferry::{Ram, RamBlock};

use crate::state::mix;

/// What a stretch of RAM holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Bytes without a pattern: what is compressed or encrypted.
    Random,
    /// Words and spaces.
    Text,
    /// Was written once, and is zero now: freed memory.
    Zeroed,
    /// Nobody has ever been here.
    Untouched,
}

/// Of twenty stretches: half of them random, and so on.
const CYCLE: [(Kind, usize); 4] = [(Kind::Random, 10), (Kind::Text, 4), (Kind::Zeroed, 3), (Kind::Untouched, 3)];
const CYCLE_STRETCHES: u64 = 20;
/// Pages of a stretch at the most: 1 MiB of 4 KiB pages.
const STRETCH_PAGES_MAX: u64 = 256;
/// Bytes of text that pages are cut from.
const TEXT_BYTES: usize = 64 << 10;

/// Which stretch holds what; the same for the same size and seed.
#[derive(Clone, Debug)]
pub struct Plan {
    seed: u64,
    pages: u64,
    stretch_pages: u64,
    kinds: Vec<Kind>,
}

impl Plan {
    pub fn new(pages: u64, seed: u64) -> Plan {
        let stretch_pages = (pages / CYCLE_STRETCHES).clamp(1, STRETCH_PAGES_MAX);
        let stretches = pages.div_ceil(stretch_pages) as usize;
        let mut kinds = Vec::with_capacity(stretches + CYCLE_STRETCHES as usize);
        while kinds.len() < stretches {
            let mut cycle: Vec<_> = CYCLE.iter().flat_map(|&(kind, n)| std::iter::repeat_n(kind, n)).collect();
            for last in (1..cycle.len()).rev() {
                let other = mix(seed ^ ((kinds.len() + last) as u64) << 8) % (last as u64 + 1);
                cycle.swap(last, other as usize);
            }
            kinds.append(&mut cycle);
        }
        kinds.truncate(stretches);
        Plan { seed, pages, stretch_pages, kinds }
    }

    /// The pages of a stretch.
    fn range(&self, stretch: usize) -> std::ops::Range<u64> {
        let first = stretch as u64 * self.stretch_pages;
        first..(first + self.stretch_pages).min(self.pages)
    }

    /// How many pages hold this.
    pub fn pages_of(&self, kind: Kind) -> u64 {
        let ranges = self.kinds.iter().enumerate().filter(|(_, k)| **k == kind).map(|(i, _)| self.range(i));
        ranges.map(|range| range.end - range.start).sum()
    }

    /// The stretches that were touched, as ranges of pages: where a guest has its data, and writes.
    pub fn touched(&self) -> Vec<std::ops::Range<u64>> {
        let touched = self.kinds.iter().enumerate().filter(|(_, kind)| **kind != Kind::Untouched);
        touched.map(|(stretch, _)| self.range(stretch)).collect()
    }
}

/// Fills block 0 as planned, on as many threads. A digest of everything that was filled in; `None` if `stop` said so.
pub fn fill(ram: &Ram, plan: &Plan, threads: usize, stop: &(dyn Fn() -> bool + Sync)) -> Option<u64> {
    let id = BlockId(0);
    let block = ram.block(id)?;
    let text = text(plan.seed);
    let part = |worker: usize| {
        // Keyed by nothing that changes from run to run: the same RAM has the same digest.
        let mut digest = FullDigest::new(SessionId([0; 16]), id);
        let look = Look::new(true, false);
        for stretch in (worker..plan.kinds.len()).step_by(threads) {
            if stop() {
                return None;
            }
            let kind = plan.kinds[stretch];
            for page in plan.range(stretch).filter(|_| kind != Kind::Untouched) {
                fill_page(block, page, kind, plan.seed, &text);
                digest.page(page, look.hash_at(block, page)?);
            }
        }
        Some(digest)
    };
    std::thread::scope(|scope| {
        let part = &part;
        let others: Vec<_> = (1..threads).map(|worker| scope.spawn(move || part(worker))).collect();
        let mut sum = part(0);
        for other in others {
            let other = other.join().ok().flatten();
            sum = sum.zip(other).map(|(mut sum, other)| {
                sum.merge(other);
                sum
            });
        }
        sum.map(FullDigest::value)
    })
}

fn fill_page(block: &RamBlock, page: u64, kind: Kind, seed: u64, text: &[u64]) {
    let of_page = mix(seed ^ mix(page));
    match kind {
        Kind::Random => words::fill(block, page, |word| mix(of_page ^ word)),
        Kind::Text => words::fill(block, page, |word| text[(of_page.wrapping_add(word) % text.len() as u64) as usize]),
        Kind::Zeroed => words::store(block, page, 0, of_page) && words::fill(block, page, |_| 0),
        Kind::Untouched => true,
    };
}

/// Words of a few letters, in words of eight bytes.
fn text(seed: u64) -> Vec<u64> {
    const VOCABULARY: [&str; 16] = [
        "the ", "page ", "of ", "memory ", "guest ", "and ", "a ", "writes ", "to ", "in ", "kernel ", "error: ",
        "open ", "file\n", "0x7f", "while ",
    ];
    let mut bytes = Vec::with_capacity(TEXT_BYTES + 16);
    for n in 0.. {
        if bytes.len() >= TEXT_BYTES {
            break;
        }
        let word = VOCABULARY[(mix(seed ^ n) % VOCABULARY.len() as u64) as usize];
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.chunks_exact(8).map(|eight| u64::from_le_bytes(eight.try_into().unwrap_or_default())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::memory::Backing;
    use pageferry::units::PageSize;

    #[test]
    fn the_mix_is_the_one_that_is_promised() {
        let plan = Plan::new(20 * 256, 1);
        let share = |kind| plan.pages_of(kind) * 100 / plan.pages;
        assert_eq!(
            [Kind::Random, Kind::Text, Kind::Zeroed, Kind::Untouched].map(share),
            [50, 20, 15, 15],
            "percent of all pages"
        );
        let touched: u64 = plan.touched().iter().map(|range| range.end - range.start).sum();
        assert_eq!(touched + plan.pages_of(Kind::Untouched), plan.pages);
    }

    #[test]
    fn the_digest_depends_on_the_seed_and_not_on_the_threads() {
        let digest = |seed, threads| {
            let block = RamBlock::anonymous("ram", 0, 4 << 20, PageSize::SIZE_4K, Backing::Base).unwrap();
            let ram = Ram::new([block]).unwrap();
            fill(&ram, &Plan::new(1024, seed), threads, &|| false).unwrap()
        };
        assert_eq!(digest(1, 1), digest(1, 3));
        assert_ne!(digest(1, 2), digest(2, 2));
    }

    #[test]
    fn filling_stops_when_it_is_told_to() {
        let block = RamBlock::anonymous("ram", 0, 4 << 20, PageSize::SIZE_4K, Backing::Base).unwrap();
        assert_eq!(fill(&Ram::new([block]).unwrap(), &Plan::new(1024, 1), 2, &|| true), None);
    }
}
