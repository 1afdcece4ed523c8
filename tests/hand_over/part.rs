//! One side of a migration in a process of its own, with a guest that writes down every step of its life.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::Setup;
use pageferry::{DirtyBitmap, Guest, HookError, Incoming, Outcome, Ram, Source, StateWriter, Target, Timeouts};
use serde_json::json;

use crate::vmm::{self, TestIncoming};

/// What a process is to be: `target PATIENCE LOG` or `source PATIENCE LOG ADDRESS`; patience in milliseconds.
pub const PART: &str = "PAGEFERRY_HAND_OVER_PART";

/// What stands in the log, in one order for both processes: each byte is appended by itself. A side says that it is about
/// to run before it does, and that it has stopped after it has: where no two such stretches overlap, no two guests run.
pub mod step {
    pub const SOURCE_RUNS: u8 = b's';
    pub const SOURCE_BEATS: u8 = b'S';
    pub const SOURCE_STANDS: u8 = b'p';
    pub const TARGET_RUNS: u8 = b't';
    pub const TARGET_BEATS: u8 = b'T';
}

/// Far longer than anything takes: a part that hangs ends by itself, with a code of its own.
const HANGS: Duration = Duration::from_secs(60);
pub const HUNG: i32 = 99;

/// Short where a connection is to be given up that says nothing; else longer than any machine is too busy for.
fn timeouts(patience: &str) -> Timeouts {
    let patience = Duration::from_millis(patience.parse().unwrap());
    let connect = Duration::from_secs(20);
    Timeouts { connect, hello: patience, silence: patience, hook: patience, stall: patience }
}

/// Plays the part that this process was given, and ends it.
pub fn play(part: &str) -> ! {
    let _ = thread::spawn(|| {
        let until = Instant::now() + HANGS;
        while Instant::now() < until {
            thread::park_timeout(HANGS);
        }
        exit(HUNG);
    });
    let words: Vec<_> = part.split(' ').collect();
    exit(match words[..] {
        ["target", patience, log] => target(timeouts(patience), log),
        ["source", patience, log, address] => source(timeouts(patience), log, address),
        _ => panic!("no such part: {part}"),
    })
}

fn say(line: serde_json::Value) {
    // A line of its own: the test harness has begun one. Nobody may listen any more.
    let _ = writeln!(std::io::stdout().lock(), "\n{line}");
}

/// The exit codes of the program.
fn code(outcome: &Outcome) -> i32 {
    match outcome {
        Outcome::Completed => 0,
        Outcome::Failed(_) => 1,
        Outcome::Uncertain(_) => 3,
        Outcome::Cancelled => 130,
    }
}

fn error(outcome: &Outcome) -> Option<String> {
    (*outcome != Outcome::Completed).then(|| outcome.to_string())
}

/// A vCPU: beats until it is told to stop.
struct Vcpu {
    log: File,
    beat: u8,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    fn new(log: &str, beat: u8) -> Vcpu {
        let log = OpenOptions::new().append(true).create(true).open(log).unwrap();
        Vcpu { log, beat, stop: Arc::default(), thread: None }
    }

    fn write_down(&self, step: u8) {
        (&self.log).write_all(&[step]).unwrap();
    }

    /// Runs; comes back after the first beat.
    fn run(&mut self, work: impl Fn(u64) + Send + 'static) {
        self.stop.store(false, Ordering::Relaxed);
        let (log, beat, stop) = (self.log.try_clone().unwrap(), self.beat, self.stop.clone());
        let (first, beats) = std::sync::mpsc::channel();
        self.thread = Some(thread::spawn(move || {
            for count in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                (&log).write_all(&[beat]).unwrap();
                work(count);
                let _ = first.send(());
                thread::park_timeout(Duration::from_millis(2));
            }
        }));
        beats.recv().unwrap();
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            thread.join().unwrap();
        }
    }
}

struct Home {
    ram: Ram,
    dirty: DirtyBitmap,
    vcpu: Vcpu,
}

impl Home {
    fn run(&mut self) {
        let (ram, dirty) = (self.ram.clone(), self.dirty.clone());
        self.vcpu.write_down(step::SOURCE_RUNS);
        self.vcpu.run(move |count| {
            let page = count % 16;
            vmm::write_page(&ram, BlockId(0), page, count);
            dirty.mark(BlockId(0), page);
        });
    }
}

impl Guest for Home {
    fn pause(&mut self) -> Result<(), HookError> {
        self.vcpu.stop();
        self.vcpu.write_down(step::SOURCE_STANDS);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.run();
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        // In two pieces, so that there is a place between two of them.
        out.write_all(&[7; 300])?;
        out.flush()?;
        Ok(out.write_all(&[8; 300])?)
    }
}

fn source(timeouts: Timeouts, log: &str, address: &str) -> i32 {
    let ram = vmm::ram(PageSize::SIZE_4K, &[64]);
    (0..32).for_each(|page| vmm::write_page(&ram, BlockId(0), page, 1));
    let mut dirty = DirtyBitmap::for_ram(&ram);
    let mut home = Home { ram: ram.clone(), dirty: dirty.clone(), vcpu: Vcpu::new(log, step::SOURCE_BEATS) };
    home.run();
    let source = Source::builder(ram).channels(2).timeouts(timeouts).connect(address).unwrap();
    let report = source.migrate(&mut dirty, &mut home);
    say(json!({
        "event": "report",
        "outcome": report.outcome.word(),
        "error": error(&report.outcome),
        "session": report.session.to_string(),
    }));
    code(&report.outcome)
}

/// The VMM at the target: [`TestIncoming`], whose guest beats.
struct Berth {
    vmm: TestIncoming,
    vcpu: Vcpu,
}

impl Incoming for Berth {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        self.vmm.prepare(setup)
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        self.vmm.load_state(state)
    }

    fn run(&mut self) -> Result<(), HookError> {
        self.vcpu.write_down(step::TARGET_RUNS);
        self.vcpu.run(|_| {});
        self.vmm.run()
    }

    fn discard(&mut self) {
        self.vmm.discard();
    }
}

fn target(timeouts: Timeouts, log: &str) -> i32 {
    let mut berth = Berth { vmm: TestIncoming::new(), vcpu: Vcpu::new(log, step::TARGET_BEATS) };
    let target = Target::builder().timeouts(timeouts).listen("127.0.0.1:0").unwrap();
    // Whoever started this process closes its standard input when it has seen enough.
    let (enough, handles) = std::sync::mpsc::channel::<pageferry::CancelHandle>();
    let told = thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        for handle in handles {
            handle.cancel();
        }
    });
    enough.send(target.cancel_handle()).unwrap();
    say(json!({ "event": "listening", "addr": target.address().unwrap().to_string() }));
    let (report, mut witness) = target.receive_and_witness(&mut berth);
    say(json!({
        "event": "report",
        "outcome": report.outcome.word(),
        "error": error(&report.outcome),
        "session": witness.session().map(|session| session.to_string()),
    }));
    enough.send(witness.cancel_handle()).unwrap();
    drop(enough);
    witness.answer(HANGS);
    told.join().unwrap();
    code(&report.outcome)
}
