//! Question: how much guest RAM do we search for dirty pages in a second, and what does that cost beside touching the
//! bitmap at all?
//!
//! Rival: a bare pass over the same words, each of which goes to a sink that does nothing: loaded and overwritten with
//! zero where they are private (what KVM's log was read into), swapped with zero where they are shared with those who
//! mark.
//! Limit: at most 1.5 times the bare pass's time and 3 ns for each run found: for 64 GiB of guest of which 10 % of the
//! pages are dirty and scattered, and for 512 GiB all clean and all dirty.
//!
//! Pages have 4 KiB. The cost is one of words and one of runs: beside each time stands what a run costs beyond the
//! bare pass. Clustered: dirty pages in stretches of 512, as of 2 MiB buffers. Scattered: any page.

#[path = "support/bitmaps.rs"]
mod bitmaps;
mod support;

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bitmaps::{Shape, bitmap, timed};
use pageferry::dirty::runs::Runs;
use pageferry::scanner::{CHUNK_PAGES, Scanner, Which, chunks};
use pageferry::units::{BlockId, Run};
use pageferry::{DirtyBitmap, Ram};
use support::{Options, Spread, Verdict, consume, cpus, interleave, run_undisturbed};

/// Pages of a run at the most, as the scanner has it: a whole chunk. Whoever batches runs cuts them.
const RUN_PAGES_MAX: u32 = CHUNK_PAGES as u32;
/// Pages of a piece that is handed to a ring: 1 MiB. Cutting is no part of the scan; what it costs stands beside it.
const PIECE_PAGES_MAX: u32 = 256;
const CHUNK_WORDS: usize = CHUNK_PAGES as usize / 64;
/// Of the bare pass's time, at most, and seconds for each run besides.
const LIMIT: f64 = 1.5;
const LIMIT_PER_RUN: f64 = 3e-9;
const BLOCK: BlockId = BlockId(0);

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
        let ram = Ram::new([bitmaps::block("ram", 0, pages)]).expect("one block is RAM");
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
}

/// One pass: puts the bitmap back where the last pass took it, then times itself. Seconds.
type Pass = fn(&mut Field, &[u64]) -> f64;

fn bare_load(field: &mut Field, words: &[u64]) -> f64 {
    field.words.copy_from_slice(words);
    let words = black_box(&field.words[..]);
    timed(|| words.iter().for_each(|word| consume(*word)))
}

fn vector_or(field: &mut Field, words: &[u64]) -> f64 {
    field.words.copy_from_slice(words);
    let words = black_box(&field.words[..]);
    timed(|| consume(words.iter().fold(0, |all, word| all | word)))
}

fn runs(field: &mut Field, words: &[u64]) -> f64 {
    field.words.copy_from_slice(words);
    let words = black_box(&field.words[..]);
    timed(|| Runs::new(words, 0, RUN_PAGES_MAX).for_each(consume))
}

fn pieces(field: &mut Field, words: &[u64]) -> f64 {
    field.words.copy_from_slice(words);
    let words = black_box(&field.words[..]);
    timed(|| {
        let whole = |(first, pages)| Run { block: BLOCK, first, pages };
        Runs::new(words, 0, RUN_PAGES_MAX).map(whole).flat_map(|run| run.pieces(PIECE_PAGES_MAX)).for_each(consume);
    })
}

fn bare_load_store(field: &mut Field, words: &[u64]) -> f64 {
    field.words.copy_from_slice(words);
    let words = black_box(&mut field.words[..]);
    timed(|| words.iter_mut().for_each(|word| consume(std::mem::take(word))))
}

/// As the source harvests what it has read from KVM's log.
fn harvest(field: &mut Field, words: &[u64]) -> f64 {
    field.words.copy_from_slice(words);
    let Field { words, taken, .. } = field;
    timed(|| {
        for (first, words) in (0..).step_by(CHUNK_PAGES as usize).zip(words.chunks_mut(CHUNK_WORDS)) {
            let taken = &mut taken[..words.len()];
            taken.fill(0);
            taken.iter_mut().zip(&*words).for_each(|(taken, word)| *taken |= word);
            words.fill(0);
            Runs::new(taken, first, RUN_PAGES_MAX).for_each(consume);
        }
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

/// A round that may keep nothing back, as while the guest stands still.
fn scanner(field: &mut Field, words: &[u64]) -> f64 {
    scan(field, words, 0)
}

/// A round that may keep a page back, and so compares with what the rounds before it found.
fn keeps_back(field: &mut Field, words: &[u64]) -> f64 {
    scan(field, words, 4096)
}

fn scan(field: &mut Field, words: &[u64], defer_bytes: u64) -> f64 {
    assert!(field.dirty.put_back(BLOCK, 0, words));
    let Field { ram, dirty, scanner, .. } = field;
    timed(|| {
        scanner.begin_round(defer_bytes);
        for chunk in chunks(ram) {
            let failed = scanner.harvest(ram, dirty, chunk, Which::Dirty);
            assert!(failed.is_none(), "a bitmap of our own does not fail");
            scanner.runs(chunk).for_each(consume);
        }
    })
}

/// One contender: its name, what it does, its rival's index, and whether the limit holds for it.
type Contender = (&'static str, Pass, usize, bool);

const PASSES: [Contender; 10] = [
    ("private, bare load", bare_load, 0, false),
    // No rival: what memory gives if no single word matters.
    ("private, vector OR", vector_or, 0, false),
    // A part of the scan.
    ("private, Runs", runs, 0, false),
    // More than the scan.
    ("private, Runs, cut", pieces, 0, false),
    ("private, bare pass", bare_load_store, 4, false),
    ("private, harvest", harvest, 4, true),
    ("shared, bare swap", bare_swap, 6, false),
    ("shared, take + Runs", take, 6, true),
    ("shared, Scanner", scanner, 6, true),
    // No limit: three bitmaps more, in rounds that take hundreds of times as long to send.
    ("  that keeps back", keeps_back, 6, false),
];

/// One table: all passes over one bitmap.
fn table(field: &mut Field, gib: u64, what: (u64, Shape, bool), turns: usize, verdict: &mut Verdict) {
    let (per_mille, shape, limited) = what;
    let words = bitmap(gib << 18, per_mille, shape);
    let found = Runs::new(&words, 0, RUN_PAGES_MAX).count();
    let lie = if [0, 1000].contains(&per_mille) { String::new() } else { format!(", {shape:?}").to_lowercase() };
    println!("\n{gib} GiB of guest, {} % dirty{lie}: {found} runs, {turns} turns", per_mille as f64 / 10.0);
    println!("  {:<22}{:>24}{:>28}{:>20}", "", "GiB in a ms", "times the bare pass's time", "ns a run beyond it");
    let seconds = interleave(turns, PASSES.len(), |which| PASSES[which].1(field, &words));
    for (which, (name, _, bare, holds)) in PASSES.iter().enumerate() {
        let times = Spread::of_ratios(&seconds[which], &seconds[*bare]);
        let turns = || seconds[which].iter().zip(&seconds[*bare]);
        let per_run = Spread::of(turns().map(|(own, bare)| (own - bare) * 1e9 / found.max(1) as f64));
        println!(
            "  {name:<22}{:>24}{:>28}{:>20}",
            format!("{:.1}", Spread::of(seconds[which].iter().map(|seconds| gib as f64 / seconds / 1e3))),
            format!("{times:.2}"),
            if found == 0 || which == *bare { String::new() } else { format!("{:.2}", per_run.median) },
        );
        if limited && *holds {
            let share = Spread::of(turns().map(|(own, bare)| own / (LIMIT * bare + LIMIT_PER_RUN * found as f64)));
            verdict.limit(share.median <= 1.0, || {
                let percent = per_mille / 10;
                format!("{name}, {gib} GiB, {percent} % dirty: takes {:.2} times what it may", share.median)
            });
        }
    }
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Some(cpu) = cpus().last() {
        core_affinity::set_for_current(*cpu);
        run_undisturbed();
    }
    let turns = options.pick(1, 21, 61);
    let mut verdict = Verdict::default();
    let (small, large) = options.pick((1, 2), (64, 512), (64, 512));
    let mut field = Field::new(small << 18);
    for (shape, densities) in
        [(Shape::Clustered, &[0, 1, 10, 100, 500][..]), (Shape::Scattered, &[1, 10, 100, 500, 1000])]
    {
        for &per_mille in densities {
            let limited = shape == Shape::Scattered && per_mille == 100;
            table(&mut field, small, (per_mille, shape, limited), turns, &mut verdict);
        }
    }
    let mut field = Field::new(large << 18);
    for per_mille in [0, 1000] {
        table(&mut field, large, (per_mille, Shape::Scattered, true), turns, &mut verdict);
    }
    println!("\nLimit: at most {LIMIT} times the bare pass's time and {} ns a run.", LIMIT_PER_RUN * 1e9);
    verdict.finish(&options)
}
