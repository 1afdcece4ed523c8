//! Question: how much guest RAM do we search for dirty pages in a second, and what does that cost beside touching the
//! bitmap at all?
//!
//! Rival: a bare pass over the same words: each is loaded where they are private, and swapped with zero where they are
//! shared with those who mark, and goes to a sink that does nothing.
//! Limit: at most 1.5 times the bare pass's time, for a bitmap that is clean and for one that is full.
//!
//! The bitmap of a guest of 64 GiB in pages of 4 KiB; runs are cut at 256 pages, as the source cuts them, and go to the
//! same sink. Clustered: dirty pages in stretches of 512, as of 2 MiB buffers. Scattered: any page.

mod support;

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use pageferry::dirty::runs::Runs;
use pageferry::memory::{Backing, RamBlock};
use pageferry::scanner::{CHUNK_PAGES, Scanner, Which, chunks};
use pageferry::units::{BlockId, PageSize, Run};
use pageferry::{DirtyBitmap, Ram};
use support::{Options, Spread, Verdict, consume, cpus, interleave, run_undisturbed};

/// Pages of a run at the most, as the scanner has it: a whole chunk. Whoever batches runs cuts them.
const RUN_PAGES_MAX: u32 = CHUNK_PAGES as u32;
/// Pages of a piece that is handed to a ring: 1 MiB. Cutting is no part of the scan; what it costs stands beside it.
const PIECE_PAGES_MAX: u32 = 256;
/// Pages of a stretch in a clustered bitmap.
const CLUSTER_PAGES: u64 = 512;
const CHUNK_WORDS: usize = CHUNK_PAGES as usize / 64;
/// Of the bare pass's time, at most.
const LIMIT: f64 = 1.5;
const BLOCK: BlockId = BlockId(0);

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A bitmap of so many pages of which about so many in a thousand are dirty.
fn bitmap(pages: u64, per_mille: u64, unit: u64) -> Vec<u64> {
    let mut words = vec![0; (pages / 64) as usize];
    for first in (0..pages).step_by(unit as usize) {
        if mix(first + 1) % 1000 < per_mille {
            (first..first + unit).for_each(|page| words[(page / 64) as usize] |= 1 << (page % 64));
        }
    }
    words
}

/// What the passes run over.
struct Field {
    ram: Ram,
    words: Vec<u64>,
    shared: Vec<AtomicU64>,
    dirty: DirtyBitmap,
    scanner: Scanner,
    taken: Vec<u64>,
}

impl Field {
    fn new(pages: u64) -> Field {
        // Address space only: nobody touches a page of it.
        let block = RamBlock::memfd("ram", 0, pages * 4096, PageSize::SIZE_4K, Backing::Base).expect("address space");
        let ram = Ram::new([block]).expect("one block is RAM");
        let words = (pages / 64) as usize;
        Field {
            words: vec![0; words],
            shared: (0..words).map(|_| AtomicU64::new(0)).collect(),
            dirty: DirtyBitmap::for_ram(&ram),
            scanner: Scanner::new(&ram),
            taken: vec![0; CHUNK_WORDS],
            ram,
        }
    }

    /// Makes all bitmaps hold these words.
    fn set(&mut self, words: &[u64]) {
        self.words.copy_from_slice(words);
        self.shared.iter().zip(words).for_each(|(shared, word)| shared.store(*word, Relaxed));
        assert!(self.dirty.put_back(BLOCK, 0, words));
    }
}

/// One pass: puts the bitmap back where the last pass took it, then times itself. Seconds.
type Pass = fn(&mut Field, &[u64]) -> f64;

fn timed(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64()
}

fn bare_load(field: &mut Field, _: &[u64]) -> f64 {
    let words = black_box(&field.words[..]);
    timed(|| words.iter().for_each(|word| consume(*word)))
}

fn vector_or(field: &mut Field, _: &[u64]) -> f64 {
    let words = black_box(&field.words[..]);
    timed(|| consume(words.iter().fold(0, |all, word| all | word)))
}

fn runs(field: &mut Field, _: &[u64]) -> f64 {
    let words = black_box(&field.words[..]);
    timed(|| Runs::new(words, 0, RUN_PAGES_MAX).for_each(consume))
}

fn pieces(field: &mut Field, _: &[u64]) -> f64 {
    let words = black_box(&field.words[..]);
    timed(|| {
        let whole = |(first, pages)| Run { block: BLOCK, first, pages };
        Runs::new(words, 0, RUN_PAGES_MAX).map(whole).flat_map(|run| run.pieces(PIECE_PAGES_MAX)).for_each(consume);
    })
}

fn bare_swap(field: &mut Field, words: &[u64]) -> f64 {
    field.shared.iter().zip(words).for_each(|(shared, word)| shared.store(*word, Relaxed));
    let shared = black_box(&field.shared[..]);
    timed(|| shared.iter().for_each(|word| consume(word.swap(0, Relaxed))))
}

fn take(field: &mut Field, words: &[u64]) -> f64 {
    assert!(field.dirty.put_back(BLOCK, 0, words));
    let Field { dirty, taken, words, .. } = field;
    let pages = words.len() as u64 * 64;
    timed(|| {
        for first in (0..pages).step_by(CHUNK_PAGES as usize) {
            let words = ((pages - first).min(CHUNK_PAGES) / 64) as usize;
            taken[..words].fill(0);
            dirty.take(BLOCK, first, &mut taken[..words]);
            Runs::new(&taken[..words], first, RUN_PAGES_MAX).for_each(consume);
        }
    })
}

fn scanner(field: &mut Field, words: &[u64]) -> f64 {
    assert!(field.dirty.put_back(BLOCK, 0, words));
    let Field { ram, dirty, scanner, .. } = field;
    timed(|| {
        for chunk in chunks(ram) {
            let failed = scanner.harvest(ram, dirty, chunk, Which::Dirty);
            assert!(failed.is_none(), "a bitmap of our own does not fail");
            scanner.runs(chunk).for_each(consume);
        }
    })
}

/// Beside the point and no rival: what memory gives if no single word matters.
const VECTOR_OR: usize = 1;
/// Not the scan alone: shown, and held against no limit.
const CUT: usize = 3;

/// The passes; each is compared with the bare pass at the index given.
const PASSES: [(&str, Pass, usize); 7] = [
    ("private, bare load", bare_load, 0),
    ("private, vector OR", vector_or, 0),
    ("private, Runs", runs, 0),
    ("private, Runs, cut", pieces, 0),
    ("shared, bare swap", bare_swap, 4),
    ("shared, take + Runs", take, 4),
    ("shared, Scanner", scanner, 4),
];

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Some(cpu) = cpus().last() {
        core_affinity::set_for_current(*cpu);
        run_undisturbed();
    }
    let guest_gib = options.pick(1, 64, 64);
    let pages = guest_gib << 18;
    let turns = options.pick(1, 21, 61);
    let mut field = Field::new(pages);
    let mut verdict = Verdict::default();
    println!("GiB of guest RAM searched in a millisecond; a guest of {guest_gib} GiB, {turns} turns");
    for (shape, unit, densities) in [
        ("", 1, &[0][..]),
        ("clustered", CLUSTER_PAGES, &[1, 10, 100, 500]),
        ("scattered", 1, &[1, 10, 100, 500]),
        ("", 1, &[1000]),
    ] {
        for &per_mille in densities {
            let words = bitmap(pages, per_mille, unit);
            field.set(&words);
            let found = Runs::new(&words, 0, RUN_PAGES_MAX).count();
            println!("\n{} % dirty {shape}: {found} runs", per_mille as f64 / 10.0);
            let seconds = interleave(turns, PASSES.len(), |which| PASSES[which].1(&mut field, &words));
            for (which, (name, _, bare)) in PASSES.iter().enumerate() {
                let rates = seconds[which].iter().map(|seconds| guest_gib as f64 / seconds / 1e3);
                let times = Spread::of_ratios(&seconds[which], &seconds[*bare]);
                println!(
                    "  {name:<22}{:>30}   {times:.2} times the bare pass's time",
                    format!("{:.1}", Spread::of(rates))
                );
                if [0, 1000].contains(&per_mille) && ![*bare, VECTOR_OR, CUT].contains(&which) {
                    verdict.limit(times.median <= LIMIT, || {
                        format!("{name}, {} % dirty: {:.2} times, at most {LIMIT} wanted", per_mille / 10, times.median)
                    });
                }
            }
        }
    }
    println!("\nLimit: at most {LIMIT} times the bare pass's time, for a clean and for a full bitmap.");
    verdict.finish(&options)
}
