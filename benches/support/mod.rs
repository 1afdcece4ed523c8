//! What the benchmarks share: sizes from the command line, interleaved runs, medians with their spread, and verdicts.
// UNSAFETY: getrusage(2) and sched_setscheduler(2) are C calls.
#![expect(unsafe_code)]
// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::fmt;
use std::process::ExitCode;

/// How much to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// Under `cargo test --benches`: proves that the benchmark runs; its figures mean nothing.
    Smoke,
    /// With `--quick`: less than a minute.
    Quick,
    /// A few minutes.
    Full,
}

/// What the command line asks for.
#[derive(Clone, Debug)]
pub struct Options {
    /// How much to measure.
    pub size: Size,
    /// Whether a limit that is missed makes the process fail.
    pub strict: bool,
    args: Vec<String>,
}

impl Options {
    /// Reads the command line. `cargo bench` says `--bench`; `cargo test --benches` does not.
    pub fn from_args() -> Options {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let has = |name: &str| args.iter().any(|arg| arg == name);
        let size = match (has("--bench") && !has("--test"), has("--quick")) {
            (false, _) => Size::Smoke,
            (true, true) => Size::Quick,
            (true, false) => Size::Full,
        };
        Options { size, strict: has("--strict"), args }
    }

    /// Whether a flag was given.
    pub fn has(&self, name: &str) -> bool {
        self.args.iter().any(|arg| arg == name)
    }

    /// What follows a flag.
    pub fn value(&self, name: &str) -> Option<&str> {
        let at = self.args.iter().position(|arg| arg == name)?;
        self.args.get(at + 1).map(String::as_str)
    }

    /// The list, with commas between its parts, that follows a flag; each part is read by `part`.
    pub fn list<T>(&self, name: &str, part: impl Fn(&str) -> T) -> Option<Vec<T>> {
        self.value(name).map(|text| text.split(',').map(part).collect())
    }

    /// The number that follows a flag.
    ///
    /// # Panics
    /// If it is none.
    pub fn number(&self, name: &str) -> Option<usize> {
        self.value(name).map(|text| text.parse().unwrap_or_else(|e| panic!("{name} {text:?}: {e}")))
    }

    /// One of three, by size.
    pub fn pick<T>(&self, smoke: T, quick: T, full: T) -> T {
        match self.size {
            Size::Smoke => smoke,
            Size::Quick => quick,
            Size::Full => full,
        }
    }
}

/// Runs contenders 0, 1, 2, ... in turns, after one turn that does not count; gives the results of each in order.
///
/// Every second turn goes backwards (A B B A A B ...): a machine that grows slower while it is measured then slows all
/// of them alike.
pub fn interleave<T>(turns: usize, contenders: usize, mut run: impl FnMut(usize) -> T) -> Vec<Vec<T>> {
    let mut results: Vec<Vec<T>> = (0..contenders).map(|_| Vec::with_capacity(turns)).collect();
    (0..contenders).for_each(|contender| drop(run(contender)));
    for turn in 0..turns {
        for place in 0..contenders {
            let contender = if turn % 2 == 0 { place } else { contenders - 1 - place };
            results[contender].push(run(contender));
        }
    }
    results
}

/// The middle of some measurements, and how far they lie apart.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Spread {
    /// The middle one; the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of these.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else { return Spread::default() };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Spread { median, min, max }
    }

    /// Of the ratios `of[i] / to[i]`: both of one turn, so that a drift of the machine falls out.
    pub fn of_ratios(of: &[f64], to: &[f64]) -> Spread {
        Spread::of(of.iter().zip(to).map(|(of, to)| of / to))
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(2);
        let text = format!("{:.*} ({:.*} to {:.*})", digits, self.median, digits, self.min, digits, self.max);
        f.pad_integral(true, "", &text)
    }
}

/// Limits and what became of them.
#[derive(Debug, Default)]
pub struct Verdict {
    missed: Vec<String>,
    kept: usize,
}

impl Verdict {
    /// Notes one limit.
    pub fn limit(&mut self, kept: bool, what: impl FnOnce() -> String) {
        if kept {
            self.kept += 1;
        } else {
            self.missed.push(what());
        }
    }

    /// Prints PASS or FAIL. The process fails only if it was asked to: figures of a busy machine are no test.
    pub fn finish(self, options: &Options) -> ExitCode {
        if options.size == Size::Smoke {
            println!("smoke run: every contender works; the figures mean nothing");
            return ExitCode::SUCCESS;
        }
        for missed in &self.missed {
            println!("missed: {missed}");
        }
        let all = self.kept + self.missed.len();
        if all == 0 {
            println!("no limit holds for what was measured");
            return ExitCode::SUCCESS;
        }
        println!("{}: {} of {all} limits kept", if self.missed.is_empty() { "PASS" } else { "FAIL" }, self.kept);
        if options.strict && !self.missed.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}

/// CPU seconds that this process has used so far, the kernel's on its behalf included.
pub fn cpu_seconds() -> f64 {
    // SAFETY: rusage is plain integers, for which all zeros is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a local of the right type.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    assert_eq!(result, 0, "getrusage cannot fail for RUSAGE_SELF");
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Gives the calling thread real-time priority where that is allowed: on a busy machine a thread that spins for one
/// that the scheduler has taken its CPU from measures the scheduler. False where it is not allowed.
pub fn run_undisturbed() -> bool {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads a local of the right type; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest) == 0 }
}

/// The CPUs this process may use.
pub fn cpus() -> Vec<core_affinity::CoreId> {
    core_affinity::get_core_ids().unwrap_or_default()
}

/// Makes the compiler believe that somebody wants the value.
#[inline]
pub fn consume<T>(value: T) {
    std::hint::black_box(value);
}
