//! Question: what do two scanners bring, each over a block of its own and on a CPU of its own?
//!
//! Rival: one scanner over both blocks. Limit: two are at least 1.8 times as fast.
//!
//! Where one thread cannot harvest and scan as fast as all channels send, the way out is a scanner for each block or NUMA
//! node: they share nothing but the dirty source. Each harvests its block's half of a [`DirtyBitmap`] in chunks, and hands
//! the runs to a sink that does nothing, as in `scan`; the clock runs from a common start until the last has ended.

#[path = "support/bitmaps.rs"]
mod bitmaps;
mod support;

use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;

use bitmaps::{Shape, bitmap, timed};
use pageferry::scanner::{Scanner, Which, chunks};
use pageferry::{DirtyBitmap, Ram};
use support::{Options, Size, Spread, Verdict, consume, cpus, interleave, run_undisturbed};

/// Of one scanner's speed, at least.
const LIMIT: f64 = 1.8;

/// What one scanner works on.
struct Part {
    ram: Ram,
    dirty: DirtyBitmap,
    scanner: Scanner,
}

impl Part {
    fn new(blocks: &[(&str, u64)], pages: u64) -> Part {
        let block = |&(name, address): &(&str, u64)| bitmaps::block(name, address, pages);
        let ram = Ram::new(blocks.iter().map(block)).expect("blocks apart");
        Part { dirty: DirtyBitmap::for_ram(&ram), scanner: Scanner::new(&ram), ram }
    }

    fn mark(&self, words: &[u64]) {
        for (block, _) in self.ram.iter() {
            assert!(self.dirty.put_back(block, 0, words), "a bitmap of the block's length");
        }
    }

    /// Seconds for all of its RAM.
    fn scan(&mut self) -> f64 {
        let Part { ram, dirty, scanner } = self;
        timed(|| {
            for chunk in chunks(ram) {
                let failed = scanner.harvest(ram, dirty, chunk, Which::Dirty);
                assert!(failed.is_none(), "a bitmap of our own does not fail");
                scanner.runs(chunk).for_each(consume);
            }
        })
    }
}

/// Seconds until the last of these parts is scanned, each on a CPU of its own.
fn scan_all(parts: &mut [Part], words: &[u64]) -> f64 {
    parts.iter().for_each(|part| part.mark(words));
    let cpus = cpus();
    let start = Barrier::new(parts.len());
    thread::scope(|scope| {
        let (cpus, start) = (&cpus, &start);
        let scan = move |which: usize, part: &mut Part| {
            let _pinned = cpus.get(which).copied().is_some_and(core_affinity::set_for_current);
            run_undisturbed();
            start.wait();
            part.scan()
        };
        let parts = parts.iter_mut().enumerate();
        let threads: Vec<_> = parts.map(|(which, part)| scope.spawn(move || scan(which, part))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a scan does not panic")).fold(0.0, f64::max)
    })
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if options.size != Size::Smoke && cpus().len() < 2 {
        println!("this machine has one CPU: two scanners on two cannot be measured");
        return ExitCode::SUCCESS;
    }
    let turns = options.pick(1, 21, 61);
    let mut verdict = Verdict::default();
    let (small, large) = options.pick((1, 2), (64, 512), (64, 512));
    for (gib, per_mille) in [(small, 100), (small, 500), (large, 0), (large, 1000)] {
        let half = gib << 17;
        let (low, high) = (("low", 0), ("high", half * 4096));
        let mut one = [Part::new(&[low, high], half)];
        let mut two = [Part::new(&[low], half), Part::new(&[high], half)];
        let words = bitmap(half, per_mille, Shape::Scattered);
        let seconds = interleave(turns, 2, |which| match which {
            0 => scan_all(&mut one, &words),
            _ => scan_all(&mut two, &words),
        });
        let left = one.iter().chain(&two).any(|part| part.dirty.count() > 0);
        assert!(!left, "a page was not harvested");
        let speedup = Spread::of_ratios(&seconds[0], &seconds[1]);
        let ms = |which: usize| format!("{:.2}", Spread::of(seconds[which].iter().map(|seconds| seconds * 1e3)));
        println!("\n{gib} GiB of guest, {} % dirty and scattered, {turns} turns", per_mille as f64 / 10.0);
        println!("  one scanner  {:>28} ms", ms(0));
        println!("  two scanners {:>28} ms   {speedup:.2} times as fast", ms(1));
        verdict.limit(speedup.median >= LIMIT, || {
            format!("{gib} GiB, {} % dirty: {:.2} times as fast, {LIMIT} wanted", per_mille / 10, speedup.median)
        });
    }
    println!("\nLimit: two scanners at least {LIMIT} times as fast as one.");
    verdict.finish(&options)
}
