//! Question: what would a user get from what they would use instead of this library?
//!
//! Rivals: QEMU 10.0 and 7.2 with multifd, and the bare loop in C and in Rust. Limits: those that `perf/RESULTS.md` lists.
//!
//! The figures are taken by `perf/peers/run.sh`, which runs all rivals by turns over the same memory. This program is one
//! side of a run, the library's or the bare loop's, and talks to that script line by line:
//!
//! `--as target` maps the memory (`--file FILE`, or `--anonymous-mib N`), says `at ADDRESS`, receives, and says
//! `done NAME=FIGURE...`. `--as source` maps the memory, says `ready`, waits for `go ADDRESS`, ships, and says the same.
//! Both live on until their input ends, so that their CPU time can be read. `--fill FILE --with noise|zeros` and
//! `--spoil FILE` make the memory.
//!
//! Without a role it runs a few small pairs and checks that every page arrived: it may not rot.

use std::io::{self, Write};
use std::net::TcpListener;
use std::process::ExitCode;
use std::time::Instant;

use pageferry::progress::Progress;
use pageferry::units::BlockId;
use pageferry::{DirtyBitmap, DirtyError, DirtySource, Outcome, Ram, Source, Target, Verify};
use still::{NoDevices, Vmm};
use support::Options;

#[path = "support/bare.rs"]
mod bare;
#[path = "peers/memory.rs"]
mod memory;
#[path = "peers/smoke.rs"]
mod smoke;
#[path = "support/still.rs"]
mod still;
mod support;

const PAGE: u64 = 4096;

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Some(path) = options.value("--fill") {
        memory::fill(path, &options).expect("the file takes it");
    } else if let Some(path) = options.value("--spoil") {
        memory::spoil(path).expect("the file takes it");
    } else {
        match options.value("--as") {
            Some("source") => source(&options),
            Some("target") => target(&options),
            Some(role) => panic!("--as {role:?}: source or target"),
            None => smoke::run(),
        }
    }
    ExitCode::SUCCESS
}

/// Which of the two ships.
fn by_the_bare_loop(options: &Options) -> bool {
    match options.value("--by") {
        Some("bare") => true,
        Some("pageferry") => false,
        by => panic!("--by {by:?}: bare or pageferry"),
    }
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).expect("somebody listens");
}

/// Lives on until whoever started it has seen enough.
fn linger() {
    io::copy(&mut io::stdin().lock(), &mut io::sink()).expect("the input ends");
}

fn target(options: &Options) {
    let channels = options.number("--channels").expect("--channels is given");
    let ram = memory::ram(options);
    if by_the_bare_loop(options) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        say(&format!("at {}", listener.local_addr().expect("a bound port has an address")));
        let taken = bare::receive(&ram.blocks()[0], &listener, channels).expect("the bare loop receives");
        say(&format!("done syscalls={}", taken.syscalls));
    } else {
        let target = Target::builder().listen("127.0.0.1:0").expect("a port");
        say(&format!("at {}", target.address().expect("it listens on TCP")));
        let report = target.receive(&mut Vmm(ram));
        assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
        say(&format!("done syscalls={}", report.recv_syscalls));
    }
    linger();
}

fn source(options: &Options) {
    let channels = options.number("--channels").expect("--channels is given");
    let ram = memory::ram(options);
    say("ready");
    let mut line = String::new();
    io::stdin().read_line(&mut line).expect("commands are text");
    let to = line.trim().strip_prefix("go ").unwrap_or_else(|| panic!("no command: {line:?}"));
    if by_the_bare_loop(options) {
        let to = to.parse().expect("an address");
        let taken = bare::send(&ram.blocks()[0], to, channels).expect("the bare loop sends");
        say(&format!("done seconds={} syscalls={}", taken.time.as_secs_f64(), taken.syscalls));
    } else {
        ship(options, ram, channels as u8, to);
    }
    linger();
}

/// Ships with the library, and says how long it took: from the arming of the dirty source, which comes right before round
/// 0, until `migrate` returns.
fn ship(options: &Options, ram: Ram, channels: u8, to: &str) {
    let verify = match options.value("--verify") {
        None => Verify::Wire,
        Some("off") => Verify::Off,
        Some(other) => panic!("--verify {other:?}: off, or left out"),
    };
    let bytes = ram.bytes();
    let bitmap = DirtyBitmap::for_ram(&ram);
    let source = Source::builder(ram).channels(channels).verify(verify).connect(to).expect("the settings make sense");
    let again_every = options.number("--again-every").map(|stride| stride as u64);
    let again = again_every.map(|stride| Again { stride, bytes, progress: source.progress() });
    let mut dirty = Still { bitmap, begun: None, again };
    let report = source.migrate(&mut dirty, &mut NoDevices);
    let seconds = dirty.begun.expect("it was armed").elapsed().as_secs_f64();
    assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
    let wanted = bytes + again_every.map_or(0, |stride| bytes / stride);
    let accounted = report.payload_bytes + report.zero_bytes + report.untouched_bytes;
    assert_eq!(accounted, wanted, "every page is dealt with once: {report:?}");
    say(&format!("done seconds={seconds} syscalls={} rounds={}", report.send_syscalls, report.rounds));
}

/// A guest that stands still; as a dirty source, it tells when round 0 begins, or when the round begins that it was told
/// to make work for.
struct Still {
    bitmap: DirtyBitmap,
    begun: Option<Instant>,
    again: Option<Again>,
}

/// One more round, of every so many-th page, that begins when round 0 has left: nothing of that is in its time.
struct Again {
    stride: u64,
    bytes: u64,
    progress: Progress,
}

impl DirtySource for Still {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.begun = Some(Instant::now());
        self.bitmap.arm(ram)
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        if let Some(Again { stride, bytes, progress }) = self.again.take() {
            while progress.channels().payload_bytes < bytes {
                std::hint::spin_loop();
            }
            (0..bytes / PAGE).step_by(stride as usize).for_each(|page| self.bitmap.mark(BlockId(0), page));
            say("mark");
            self.begun = Some(Instant::now());
        }
        self.bitmap.begin_round()
    }

    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.bitmap.harvest(block, first_page, words)
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.bitmap.give_back(block, first_page, words)
    }

    fn disarm(&mut self) {
        self.bitmap.disarm();
    }
}
