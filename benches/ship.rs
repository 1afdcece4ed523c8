//! Question: what does the library cost beside the system calls that any shipper of pages must make?
//!
//! Rival: the bare loop of `support/bare.rs`, over the same RAM, the same loopback TCP, the same two processes.
//! Limit: with default settings, on 1, 2 and 4 channels, at least 0.90 of the rival's throughput, into warm memory.
//!
//! Clock: from the moment when everything is connected until the target has all of it and has said so. For the library
//! that is from the arming of the dirty source, which comes right before round 0, until `migrate` returns: the hand-over
//! and the end of all threads are counted against it.
//!
//! Runs are interleaved, each ratio is of two runs of one turn, and every run is checked to have brought every page.
//!
//! `--profile bare|pageferry [--channels N] [--runs N] [--ram-mib N]` repeats one contender, for a profiler.

#[path = "support/bare.rs"]
mod bare;
#[path = "support/peer.rs"]
mod peer;
mod support;

use std::process::ExitCode;
use std::time::Instant;

use pageferry::units::BlockId;
use pageferry::{DirtyError, DirtySource, Guest, HookError, Outcome, Ram, Source, StateWriter, Verify};
use peer::{Memory, Peer, Shipper};
use support::{Options, Spread, Verdict, cpu_seconds, interleave};

/// Of the bare loop's throughput, at least.
const LIMIT: f64 = 0.90;

const GIB: f64 = (1u64 << 30) as f64;

/// What a contender is, and whether a limit holds for it.
#[derive(Clone, Copy)]
struct Contender {
    name: &'static str,
    shipper: Shipper,
    verify: Verify,
    zero_test: bool,
}

const BARE: Contender = Contender { name: "bare loop", shipper: Shipper::Bare, verify: Verify::Off, zero_test: false };
const DEFAULT: Contender =
    Contender { name: "pageferry, default", shipper: Shipper::Pageferry, verify: Verify::Wire, zero_test: true };
const CONTENDERS: [Contender; 5] = [
    BARE,
    DEFAULT,
    Contender { name: "  no zero test", zero_test: false, ..DEFAULT },
    Contender { name: "  verify off", verify: Verify::Off, ..DEFAULT },
    Contender { name: "  neither", verify: Verify::Off, zero_test: false, ..DEFAULT },
];

/// One run.
#[derive(Clone, Copy)]
struct Run {
    seconds: f64,
    cpu_seconds: f64,
    sends: u64,
    receives: u64,
}

/// A guest that stands still and has no devices; as a dirty source, it tells when round 0 begins.
#[derive(Default)]
struct Still {
    armed: Option<Instant>,
}

impl DirtySource for Still {
    fn arm(&mut self, _: &Ram) -> Result<(), DirtyError> {
        self.armed = Some(Instant::now());
        Ok(())
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        Ok(0)
    }

    fn harvest(&mut self, _: BlockId, _: u64, _: &mut [u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn give_back(&mut self, _: BlockId, _: u64, _: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn disarm(&mut self) {}
}

struct NoDevices;

impl Guest for NoDevices {
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self, _: &mut StateWriter) -> Result<(), HookError> {
        Ok(())
    }
}

fn run(contender: &Contender, ram: &Ram, peer: &mut Peer, memory: Memory, channels: usize) -> Run {
    let to = peer.listen(contender.shipper, memory, channels);
    let cpu = cpu_seconds();
    let (seconds, sends) = match contender.shipper {
        Shipper::Bare => {
            let taken = bare::send(&ram.blocks()[0], to, channels).expect("the bare loop sends");
            (taken.time.as_secs_f64(), taken.syscalls)
        }
        Shipper::Pageferry => {
            let source = Source::builder(ram.clone())
                .channels(channels as u8)
                .verify(contender.verify)
                .zero_test(contender.zero_test)
                .connect(&to.to_string())
                .expect("the settings make sense");
            let mut dirty = Still::default();
            let report = source.migrate(&mut dirty, &mut NoDevices);
            let seconds = dirty.armed.expect("it was armed").elapsed().as_secs_f64();
            assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
            assert_eq!(report.payload_bytes, ram.bytes(), "every page travels once: {report:?}");
            (seconds, report.send_syscalls)
        }
    };
    let cpu = cpu_seconds() - cpu;
    let received = peer.received();
    Run { seconds, cpu_seconds: cpu + received.cpu_seconds, sends, receives: received.syscalls }
}

/// One table: all contenders at these numbers of channels.
fn table(
    ram: &Ram,
    peer: &mut Peer,
    memory: Memory,
    contenders: &[Contender],
    channels: &[usize],
    turns: usize,
    verdict: &mut Verdict,
) {
    let gib = ram.bytes() as f64 / GIB;
    let title =
        if memory == Memory::Warm { "WARM: target memory used before" } else { "COLD: target memory never touched" };
    println!("\n{title}; {:.2} GiB, {turns} turns", gib);
    println!(
        "{:<4}{:<20}{:>24}{:>24}{:>12}{:>12}{:>12}",
        "ch", "", "GiB/s", "ratio to bare", "CPU s/GiB", "sends/GiB", "recvs/GiB"
    );
    for &channels in channels {
        let runs = interleave(turns, contenders.len(), |which| run(&contenders[which], ram, peer, memory, channels));
        let rates: Vec<Vec<f64>> = runs.iter().map(|runs| runs.iter().map(|run| gib / run.seconds).collect()).collect();
        for (which, contender) in contenders.iter().enumerate() {
            let ratio = Spread::of_ratios(&rates[which], &rates[0]);
            let per_gib = |of: fn(&Run) -> f64| Spread::of(runs[which].iter().map(of)).median / gib;
            println!(
                "{channels:<4}{:<20}{:>24}{:>24}{:>12.3}{:>12.0}{:>12.0}",
                contender.name,
                format!("{:.2}", Spread::of(rates[which].iter().copied())),
                format!("{ratio:.3}"),
                per_gib(|run| run.cpu_seconds),
                per_gib(|run| run.sends as f64),
                per_gib(|run| run.receives as f64),
            );
            if which == 1 && memory == Memory::Warm {
                verdict.limit(ratio.median >= LIMIT, || {
                    format!("{channels} channels: {:.3} of the bare loop, at least {LIMIT} wanted", ratio.median)
                });
            }
        }
    }
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Some(bytes) = options.number(peer::FLAG) {
        return peer::serve(bytes as u64);
    }
    let bytes = match options.number("--ram-mib") {
        Some(mib) => (mib as u64) << 20,
        None => options.pick(8 << 20, 256 << 20, 1 << 30),
    };
    let ram = peer::ram(bytes);
    peer::fill(&ram);
    let mut peer = Peer::start(bytes);
    if let Some(which) = options.value("--profile") {
        let contender = if which == "bare" { BARE } else { DEFAULT };
        let channels = options.number("--channels").unwrap_or(2);
        for _ in 0..options.number("--runs").unwrap_or(10) {
            let run = run(&contender, &ram, &mut peer, Memory::Warm, channels);
            println!("{}, {channels} channels: {:.2} GiB/s", contender.name, bytes as f64 / GIB / run.seconds);
        }
        return ExitCode::SUCCESS;
    }
    let mut verdict = Verdict::default();
    let channels = options.pick(&[2][..], &[1, 2, 4], &[1, 2, 4]);
    let turns = options.number("--turns").unwrap_or(options.pick(1, 7, 9));
    table(&ram, &mut peer, Memory::Warm, &CONTENDERS, channels, turns, &mut verdict);
    table(&ram, &mut peer, Memory::Cold, &[BARE, DEFAULT], channels, options.pick(1, 5, 7), &mut verdict);
    println!("\nLimit: pageferry with default settings into warm memory, at least {LIMIT} of the bare loop.");
    verdict.finish(&options)
}
