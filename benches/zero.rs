//! Question: how fast is a page told from one of zeros, in cache and out of it?
//!
//! Rivals: libc's `memcmp` against a page of zeros, `memcmp` of the page against itself one byte further on, and a plain
//! loop over words as the compiler makes it.
//! Limits: no slower than the best of them on pages that have to be read to their end (5 % are left for noise), and with
//! AVX2 at least 40 GB/s there in cache; at most 20 ns for a page of noise in cache, which is 5 % of what such a page
//! takes at 10 GB/s.
//!
//! Pages are all zeros, or zeros but for their last word, or zeros but for their first, or noise. What is measured is
//! what `is_zero` chooses on this CPU. Out of cache: 512 MiB, walked through.
// Unsafe because the function measured reads through a raw pointer; the buffers are the benchmark's own.
#![expect(unsafe_code)]

mod support;

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use pageferry::memory::zero::is_zero;
use support::{Options, Spread, Verdict, consume, cpus, interleave, run_undisturbed};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// Of the best rival's time, at most.
const NO_SLOWER: f64 = 1.05;
/// GB/s in cache with AVX2, at least.
const GB_PER_S_MIN: f64 = 40.0;
/// Nanoseconds for a page of noise in cache, at most.
const NOISE_NS_MAX: f64 = 20.0;

type Page = [u64; WORDS];

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fill {
    Zeros,
    LastWord,
    FirstWord,
    Noise,
}

impl Fill {
    fn word(self, page: usize, word: usize) -> u64 {
        match self {
            Fill::Zeros => 0,
            Fill::LastWord => u64::from(word == WORDS - 1),
            Fill::FirstWord => u64::from(word == 0),
            Fill::Noise => {
                let index = (page * WORDS + word + 1) as u64;
                index.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
            }
        }
    }

    /// Whether only its last word tells.
    fn is_read_to_the_end(self) -> bool {
        matches!(self, Fill::Zeros | Fill::LastWord)
    }
}

fn bytes(page: &Page) -> &[u8] {
    // SAFETY: the bytes of an array of words, which have no padding.
    unsafe { std::slice::from_raw_parts(page.as_ptr().cast(), PAGE) }
}

fn ours(page: &mut Page) -> bool {
    // SAFETY: `PAGE` bytes, aligned to words, reached through a `*mut`.
    unsafe { is_zero(page.as_mut_ptr().cast(), PAGE) }
}

fn memcmp(page: &mut Page) -> bool {
    static ZEROS: Page = [0; WORDS];
    bytes(page) == bytes(black_box(&ZEROS))
}

fn memcmp_with_itself(page: &mut Page) -> bool {
    let bytes = bytes(page);
    bytes[0] == 0 && bytes[1..] == bytes[..PAGE - 1]
}

fn loop_over_words(page: &mut Page) -> bool {
    page.iter().all(|word| *word == 0)
}

/// Whether a page holds nothing but zeros.
type Look = fn(&mut Page) -> bool;

/// Ours is the first.
const CONTENDERS: [(&str, Look); 4] =
    [("is_zero", ours), ("memcmp", memcmp), ("memcmp with itself", memcmp_with_itself), ("loop", loop_over_words)];

/// Pages, and where the next sample begins.
struct Field {
    pages: Vec<Page>,
    next: usize,
}

impl Field {
    fn fill(&mut self, fill: Fill) {
        for (at, page) in self.pages.iter_mut().enumerate() {
            page.iter_mut().enumerate().for_each(|(word, value)| *value = fill.word(at, word));
        }
    }

    /// Nanoseconds a page, of so many; goes on where the last sample ended.
    fn sample(&mut self, count: usize, look: Look) -> f64 {
        let begun = Instant::now();
        for _ in 0..count {
            consume(look(black_box(&mut self.pages[self.next])));
            self.next = if self.next + 1 == self.pages.len() { 0 } else { self.next + 1 };
        }
        begun.elapsed().as_secs_f64() * 1e9 / count as f64
    }
}

fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    let has = false;
    has
}

fn table(field: &mut Field, fill: Fill, in_cache: bool, turns: usize, verdict: &mut Verdict) {
    field.fill(fill);
    let count = 4096.min(field.pages.len().max(1024));
    for (name, look) in CONTENDERS {
        assert_eq!(look(&mut field.pages[0]), fill == Fill::Zeros, "{name} is wrong");
    }
    let times = interleave(turns, CONTENDERS.len(), |which| field.sample(count, CONTENDERS[which].1));
    let place = if in_cache { "in cache" } else { "out of cache" };
    println!("\n{fill:?}, {place}; {turns} turns of {count} pages");
    let gb_per_s = |which: usize| Spread::of(times[which].iter().map(|ns| PAGE as f64 / ns));
    let ns = |which: usize| Spread::of(times[which].iter().copied());
    for (which, (name, _)) in CONTENDERS.iter().enumerate() {
        let rate = if fill.is_read_to_the_end() { format!("{:.1}", gb_per_s(which)) } else { String::new() };
        let ratio = Spread::of_ratios(&times[0], &times[which]);
        let time = format!("{:.1}", ns(which));
        println!("  {name:<20}{time:>26} ns a page{rate:>24} GB/s   ours takes {ratio:.2} times that");
    }
    if fill.is_read_to_the_end() {
        let best = (1..CONTENDERS.len()).min_by(|a, b| ns(*a).median.total_cmp(&ns(*b).median)).unwrap_or(1);
        let ratio = Spread::of_ratios(&times[0], &times[best]).median;
        verdict.limit(ratio <= NO_SLOWER, || {
            format!("{fill:?} {place}: {ratio:.2} times {}, at most {NO_SLOWER} wanted", CONTENDERS[best].0)
        });
        if in_cache && has_avx2() {
            let rate = gb_per_s(0).median;
            verdict.limit(rate >= GB_PER_S_MIN, || format!("{fill:?} {place}: {rate:.1} of {GB_PER_S_MIN} GB/s"));
        }
    } else if in_cache {
        let took = ns(0).median;
        verdict.limit(took <= NOISE_NS_MAX, || format!("{fill:?} {place}: {took:.1} ns a page, not {NOISE_NS_MAX}"));
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
    for (pages, in_cache) in [(4, true), (options.pick(4 << 20, 512 << 20, 512 << 20) / PAGE, false)] {
        let mut field = Field { pages: vec![[1; WORDS]; pages], next: 0 };
        for fill in [Fill::Zeros, Fill::LastWord, Fill::FirstWord, Fill::Noise] {
            table(&mut field, fill, in_cache, turns, &mut verdict);
        }
    }
    println!("\nLimits: {NO_SLOWER} times the best rival's time; {GB_PER_S_MIN} GB/s and {NOISE_NS_MAX} ns in cache.");
    verdict.finish(&options)
}
