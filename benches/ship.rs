//! Question: what does the library cost beside the system calls that any shipper of pages must make?
//!
//! Rival: the bare loop of `support/bare.rs`, over the same RAM, the same loopback TCP, the same two processes; for
//! scattered pages, and over Unix sockets, the same loop over the same list of pages (`support/pages_loop.rs`).
//! Limits, with default settings, into warm memory, over TCP, on 1, 2 and 4 channels:
//! - full RAM: no slower than the rival; the zero test costs at most 5 % of it, the verification at most 8 %;
//! - every second page dirty: at least 0.8 of our own rate for full RAM, in bytes of pages that travel;
//! - mostly zeros: at least twice the rival's rate; RAM that nobody touched: at least 50 times.
//!
//! Clock: from the moment when everything is connected until the target has all of it and has said so. For the library
//! that is from the arming of the dirty source, which comes right before round 0, until `migrate` returns: the hand-over
//! and the end of all threads are counted against it. Scattered pages are those of a later round, and there the clock
//! begins with its harvest. CPU seconds are those of both processes.
//!
//! Runs are interleaved, each ratio is of two runs of one turn, and every run is checked to have brought every page.
//!
//! `--kinds full,every-2nd,...`, `--channels 1,2`, `--over tcp|unix`, `--memory warm|cold`, `--turns N` and `--ram-mib N`
//! choose what is measured. `--profile bare|pageferry [--runs N]` repeats one contender, for a profiler.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/kinds.rs"]
mod kinds;
#[path = "support/pages_loop.rs"]
mod pages_loop;
#[path = "support/peer.rs"]
mod peer;
mod support;

use std::process::ExitCode;

use kinds::still::NoDevices;
use kinds::{DirtyAt, Kind, PAGE, Still};
use pageferry::source::SourceBuilder;
use pageferry::{Outcome, Ram, Source, Verify};
use pages_loop::Over;
use peer::{Memory, Order, Peer, Shipper};
use support::{Options, Spread, Verdict, cpu_seconds, interleave};

const GIB: f64 = (1u64 << 30) as f64;

/// Full RAM, of the bare loop's rate, at least.
const LIMIT_FULL: f64 = 1.0;
/// Full RAM, of the rate without the zero test and without verification, at least.
const LIMIT_ZERO_TEST: f64 = 0.95;
const LIMIT_VERIFY: f64 = 0.92;
/// Every second page, of our own rate for full RAM, at least.
const LIMIT_SCATTERED: f64 = 0.8;
/// Of the bare loop's rate, at least.
const LIMIT_MOSTLY_ZERO: f64 = 2.0;
const LIMIT_UNTOUCHED: f64 = 50.0;
/// Numbers of channels that limits hold for.
const LIMITED_CHANNELS: [usize; 3] = [1, 2, 4];

/// Sets something about a source.
type Set = fn(SourceBuilder) -> SourceBuilder;

/// Who takes part: a name, and what is set beside the defaults.
#[derive(Clone, Copy)]
struct Contender {
    name: &'static str,
    kind: Kind,
    shipper: Shipper,
    set: Set,
}

const BARE: &str = "bare loop";
const DEFAULT: &str = "pageferry";
const NO_ZERO_TEST: &str = "  no zero test";
const VERIFY_OFF: &str = "  verify off";

/// The library's settings that are measured beside its defaults, where all RAM travels.
const VARIANTS: [(&str, Set); 2] =
    [(NO_ZERO_TEST, |builder| builder.zero_test(false)), (VERIFY_OFF, |builder| builder.verify(Verify::Off))];

impl Contender {
    fn pair(kind: Kind) -> [Contender; 2] {
        let of = |name, shipper| Contender { name, kind, shipper, set: |builder| builder };
        [of(BARE, Shipper::Bare), of(DEFAULT, Shipper::Pageferry)]
    }

    fn variants(kind: Kind) -> impl Iterator<Item = Contender> {
        VARIANTS.into_iter().map(move |(name, set)| Contender { name, kind, shipper: Shipper::Pageferry, set })
    }
}

/// One run.
#[derive(Clone, Copy)]
struct Run {
    seconds: f64,
    cpu_seconds: f64,
    sends: u64,
    receives: u64,
}

/// Two processes, and memory of one content on both sides.
struct Field {
    ram: Ram,
    passed_off_as_untouched: Ram,
    peer: Peer,
}

impl Field {
    fn new(bytes: u64, kind: Kind) -> Field {
        let ram = kinds::ram(bytes);
        kind.content().fill(&ram);
        let passed_off_as_untouched = kinds::passed_off_as_untouched(&ram);
        Field { ram, passed_off_as_untouched, peer: Peer::start(bytes, kind) }
    }

    fn run(&mut self, contender: &Contender, memory: Memory, over: Over, channels: usize) -> Run {
        let Contender { kind, shipper, .. } = *contender;
        let to = self.peer.listen(&Order { shipper, kind, memory, over, channels });
        let ram = match kind {
            // The rival's reading it touches it.
            Kind::Untouched => kinds::ram(self.ram.bytes()),
            _ => self.ram.clone(),
        };
        let pages = kind.pages(ram.pages());
        let cpu = cpu_seconds();
        let (seconds, sends) = match shipper {
            Shipper::Bare if shipper.is_frozen_loop(kind, over) => {
                let to = to.parse().expect("TCP addresses parse");
                let taken = bare::send(&ram.blocks()[0], to, channels).expect("the bare loop sends");
                (taken.time.as_secs_f64(), taken.syscalls)
            }
            Shipper::Bare => {
                let sent = pages_loop::send(&ram.blocks()[0], &pages, &to, channels).expect("the loop sends");
                (sent.0.as_secs_f64(), sent.1)
            }
            Shipper::Pageferry => {
                let ram = if kind.is_scattered() { &self.passed_off_as_untouched } else { &ram };
                migrate(contender, ram, pages, &to, channels)
            }
        };
        let cpu = cpu_seconds() - cpu;
        let received = self.peer.received();
        Run { seconds, cpu_seconds: cpu + received.cpu_seconds, sends, receives: received.syscalls }
    }
}

fn migrate(contender: &Contender, ram: &Ram, pages: Vec<u64>, to: &str, channels: usize) -> (f64, u64) {
    let kind = contender.kind;
    let builder = (contender.set)(Source::builder(ram.clone()).channels(channels as u8));
    let source = builder.connect(to).expect("the settings make sense");
    let count = pages.len() as u64;
    let dirty = if kind.is_scattered() { pages } else { Vec::new() };
    let mut dirty = Still::new(ram.pages(), dirty, DirtyAt::RoundZero);
    let report = source.migrate(&mut dirty, &mut NoDevices);
    let seconds = dirty.begun().elapsed().as_secs_f64();
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    let travelled = report.payload_bytes + report.zero_bytes;
    let expected = match kind {
        Kind::Untouched => 0,
        // Round 0 ships the last page: see `passed_off_as_untouched`.
        _ if kind.is_scattered() => (count + 1) * PAGE,
        _ => ram.bytes(),
    };
    assert_eq!(travelled, expected, "every page travels once: {report:?}");
    (seconds, report.send_syscalls)
}

/// What one table is about.
struct Table {
    memory: Memory,
    over: Over,
    channels: usize,
    turns: usize,
    contenders: Vec<Contender>,
}

impl Table {
    fn print(&self, field: &mut Field, verdict: &mut Verdict) {
        let Table { memory, over, channels, turns, .. } = *self;
        let gib_of = |kind: Kind| (kind.pages(field.ram.pages()).len() as u64 * PAGE) as f64 / GIB;
        let gib: Vec<f64> = self.contenders.iter().map(|contender| gib_of(contender.kind)).collect();
        let runs = interleave(turns, self.contenders.len(), |which| {
            field.run(&self.contenders[which], memory, over, channels)
        });
        let rates: Vec<Vec<f64>> =
            runs.iter().zip(&gib).map(|(runs, gib)| runs.iter().map(|run| gib / run.seconds).collect()).collect();
        println!("\n{memory:?} target memory, {channels} channels over {over:?}, {turns} turns");
        println!(
            "{:<13}{:<16}{:>24}{:>24}{:>11}{:>11}{:>11}",
            "", "", "GiB/s", "ratio to bare", "CPU s/GiB", "sends/GiB", "recvs/GiB"
        );
        for (which, contender) in self.contenders.iter().enumerate() {
            let per_gib = |of: fn(&Run) -> f64| Spread::of(runs[which].iter().map(of)).median / gib[which];
            let bare = self.find(contender.kind, BARE).unwrap_or(which);
            println!(
                "{:<13}{:<16}{:>24}{:>24}{:>11.3}{:>11.0}{:>11.0}",
                if contender.name == BARE { contender.kind.name() } else { "" },
                contender.name,
                format!("{:.2}", Spread::of(rates[which].iter().copied())),
                format!("{:.2}", Spread::of_ratios(&rates[which], &rates[bare])),
                per_gib(|run| run.cpu_seconds),
                per_gib(|run| run.sends as f64),
                per_gib(|run| run.receives as f64),
            );
        }
        let limited = memory == Memory::Warm || self.find(Kind::Untouched, DEFAULT).is_some();
        if limited && over == Over::Tcp && LIMITED_CHANNELS.contains(&channels) {
            self.judge(&rates, verdict);
        }
    }

    fn find(&self, kind: Kind, name: &str) -> Option<usize> {
        self.contenders.iter().position(|contender| contender.kind == kind && contender.name == name)
    }

    fn judge(&self, rates: &[Vec<f64>], verdict: &mut Verdict) {
        for (what, kind, (to_kind, to_name), limit) in [
            ("full RAM to the bare loop", Kind::Full, (Kind::Full, BARE), LIMIT_FULL),
            ("with the zero test to without", Kind::Full, (Kind::Full, NO_ZERO_TEST), LIMIT_ZERO_TEST),
            ("with verification to without", Kind::Full, (Kind::Full, VERIFY_OFF), LIMIT_VERIFY),
            ("every second page to full RAM", Kind::Every(2), (Kind::Full, DEFAULT), LIMIT_SCATTERED),
            ("mostly zeros to the bare loop", Kind::MostlyZero, (Kind::MostlyZero, BARE), LIMIT_MOSTLY_ZERO),
            ("untouched RAM to the bare loop", Kind::Untouched, (Kind::Untouched, BARE), LIMIT_UNTOUCHED),
        ] {
            let (Some(ours), Some(to)) = (self.find(kind, DEFAULT), self.find(to_kind, to_name)) else { continue };
            let ratio = Spread::of_ratios(&rates[ours], &rates[to]);
            println!("  {what}: {ratio:.2}, limit {limit}");
            let channels = self.channels;
            verdict.limit(ratio.median >= limit, || {
                format!("{what}, {channels} channels: {:.3}, at least {limit} wanted", ratio.median)
            });
        }
    }
}

/// The contenders for these kinds, in memory of one content.
fn contenders(kinds: &[Kind], variants: bool) -> Vec<Contender> {
    let of = |&kind: &Kind| {
        let variants = (variants && kind == Kind::Full).then(|| Contender::variants(kind));
        Contender::pair(kind).into_iter().chain(variants.into_iter().flatten())
    };
    kinds.iter().flat_map(of).collect()
}

fn profile(options: &Options, which: &str, bytes: u64) -> ExitCode {
    let kind = options.list("--kinds", Kind::named).map_or(Kind::Full, |kinds| kinds[0]);
    let over = options.value("--over").map_or(Over::Tcp, Over::named);
    let mut field = Field::new(bytes, kind);
    let contender = Contender::pair(kind)[usize::from(which != "bare")];
    let channels = options.number("--channels").unwrap_or(2);
    for _ in 0..options.number("--runs").unwrap_or(10) {
        let run = field.run(&contender, Memory::Warm, over, channels);
        let gib = (kind.pages(field.ram.pages()).len() as u64 * PAGE) as f64 / GIB;
        println!("{}, {channels} channels: {:.2} GiB/s", contender.name, gib / run.seconds);
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Some(bytes) = options.number(peer::FLAG) {
        let kind = options.value("--content").map_or(Kind::Full, Kind::named);
        return peer::serve(bytes as u64, kind.content());
    }
    let bytes = match options.number("--ram-mib") {
        Some(mib) => (mib as u64) << 20,
        None => options.pick(8 << 20, 256 << 20, 1 << 30),
    };
    if let Some(which) = options.value("--profile") {
        return profile(&options, which, bytes);
    }
    let number = |text: &str| text.parse().unwrap_or_else(|e| panic!("--channels {text:?}: {e}"));
    let channels = options.list("--channels", number).unwrap_or(options.pick(vec![2], vec![1, 2, 4], vec![1, 2, 4, 8]));
    let wanted = options.list("--kinds", Kind::named).unwrap_or(Kind::ALL.map(|(_, kind)| kind).to_vec());
    let of = |kinds: &[Kind]| kinds.iter().copied().filter(|kind| wanted.contains(kind)).collect::<Vec<_>>();
    let full_and_half = [Kind::Full, Kind::Every(2)];
    let dirty = [Kind::Full, Kind::Every(2), Kind::Every(8), Kind::Every(64), Kind::RandomTenth];
    let (warm, cold) = (options.pick(1, 5, 7), options.pick(1, 3, 3));
    let turns = options.number("--turns");

    let mut verdict = Verdict::default();
    println!("{} MiB of RAM", bytes >> 20);
    for (kinds, variants, over, memory, default_turns) in [
        (of(&dirty), true, Over::Tcp, Memory::Warm, warm),
        (of(&full_and_half), false, Over::Tcp, Memory::Cold, cold),
        (of(&full_and_half), false, Over::Unix, Memory::Warm, warm),
        (of(&[Kind::MostlyZero]), false, Over::Tcp, Memory::Warm, warm),
        (of(&[Kind::MostlyZero]), false, Over::Tcp, Memory::Cold, cold),
        (of(&[Kind::Untouched]), false, Over::Tcp, Memory::Cold, cold),
    ] {
        let chosen = |flag: &str, of: String| options.value(flag).is_none_or(|text| text == of.to_lowercase());
        if kinds.is_empty() || !chosen("--over", format!("{over:?}")) || !chosen("--memory", format!("{memory:?}")) {
            continue;
        }
        let mut field = Field::new(bytes, kinds[0]);
        for &channels in &channels {
            let turns = turns.unwrap_or(default_turns);
            let contenders = contenders(&kinds, variants);
            Table { memory, over, channels, turns, contenders }.print(&mut field, &mut verdict);
        }
    }
    verdict.finish(&options)
}
