//! The target of `ship`, in a process of its own: the benchmark's program again, told what to do line by line.
// UNSAFETY: guest RAM is a pointer and a length; here it is filled, spoiled and looked at.
#![expect(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pageferry::memory::{Backing, Initial, Ram, RamBlock};
use pageferry::units::PageSize;
use pageferry::wire::control::Setup;
use pageferry::{HookError, Incoming, Outcome, Target};

use super::bare;
use super::support::cpu_seconds;

/// The flag that makes the program the target.
pub const FLAG: &str = "--as-target";

const PAGE: u64 = 4096;
/// 8-byte words of a page.
const WORDS: u64 = PAGE / 8;

/// Who ships.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shipper {
    /// The bare loop.
    Bare,
    /// The library.
    Pageferry,
}

/// What the target's memory was before a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// Mapped, touched and used many times.
    Warm,
    /// Mapped and never touched.
    Cold,
}

/// What the target says after a run.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// CPU seconds of the target's process.
    pub cpu_seconds: f64,
    /// System calls of its receivers.
    pub syscalls: u64,
}

/// Memory of so many bytes, not touched.
///
/// Its initial state is [`Initial::Zeroed`], though in a warm run it holds the bytes of the run before. That is harmless
/// here and nowhere else: no page of the source is zero, so every page is overwritten by data, and none is left alone on
/// the strength of reading as zero. Zeroing it would be counted against the library, and never against the bare loop.
pub fn ram(bytes: u64) -> Ram {
    let block =
        RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).expect("memory for the benchmark");
    Ram::new([block.with_initial(Initial::Zeroed)]).expect("one block is RAM")
}

/// The word that stands at this place: noise that no page of zeros and no equal neighbours come from.
fn noise(index: u64) -> u64 {
    let x = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 31)
}

fn word(ram: &Ram, page: u64, word: u64) -> &AtomicU64 {
    let range = ram.blocks()[0].range(page, 1).expect("a page of the block");
    assert!(word < WORDS);
    // SAFETY: an aligned word inside the page, mapped for as long as `ram` lives, and only ever used through atomics
    // while a run is not on.
    unsafe { AtomicU64::from_ptr(range.ptr.cast::<u64>().add(word as usize)) }
}

/// Fills all of it with noise.
pub fn fill(ram: &Ram) {
    for page in 0..ram.pages() {
        (0..WORDS).for_each(|at| word(ram, page, at).store(noise(page * WORDS + at), Relaxed));
    }
}

/// Spoils one word of every page, so that [`all_arrived`] proves that the run brought it.
fn spoil(ram: &Ram, at: u64) {
    (0..ram.pages()).for_each(|page| word(ram, page, at).store(0, Relaxed));
}

/// Whether every page has, in two places, what the source has there.
fn all_arrived(ram: &Ram, at: u64) -> bool {
    let same = |page, at| word(ram, page, at).load(Relaxed) == noise(page * WORDS + at);
    (0..ram.pages()).all(|page| same(page, at) && same(page, WORDS - 1 - at))
}

struct Vmm(Ram);

impl Incoming for Vmm {
    fn prepare(&mut self, _: &Setup) -> Result<Ram, HookError> {
        Ok(self.0.clone())
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        io::copy(state, &mut io::sink())?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

/// Is the target until the parent closes the pipe.
pub fn serve(ram_bytes: u64) -> ExitCode {
    let kept = ram(ram_bytes);
    fill(&kept);
    let mut turn = 0;
    for line in io::stdin().lock().lines() {
        let line = line.expect("commands are text");
        let words: Vec<&str> = line.split_whitespace().collect();
        let [shipper, memory, channels] = words[..] else { panic!("no command: {line:?}") };
        let ram = if memory == "warm" { kept.clone() } else { ram(ram_bytes) };
        turn = (turn + 37) % WORDS;
        if memory == "warm" {
            spoil(&ram, turn);
        }
        let syscalls;
        let cpu;
        if shipper == "bare" {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            say(&format!("at {}", listener.local_addr().expect("a bound port has an address")));
            cpu = cpu_seconds();
            let channels = channels.parse().expect("a number of channels");
            syscalls = bare::receive(&ram.blocks()[0], &listener, channels).expect("the bare loop receives").syscalls;
        } else {
            let target = Target::builder().listen("127.0.0.1:0").expect("a port");
            say(&format!("at {}", target.address().expect("it listens on TCP")));
            cpu = cpu_seconds();
            let report = target.receive(&mut Vmm(ram.clone()));
            assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
            syscalls = report.recv_syscalls;
        }
        let cpu = cpu_seconds() - cpu;
        assert!(all_arrived(&ram, turn), "{line}: a page is not what was sent");
        drop(ram);
        say(&format!("done {cpu} {syscalls}"));
    }
    ExitCode::SUCCESS
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).expect("the parent listens");
}

/// The target's process. It ends when this is dropped.
pub struct Peer {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts it, with RAM of this many bytes.
    pub fn start(ram_bytes: u64) -> Peer {
        let program = std::env::current_exe().expect("the benchmark's own program");
        let mut child = Command::new(program)
            .args([FLAG, &ram_bytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the target's process starts");
        let answers = BufReader::new(child.stdout.take().expect("its output is piped"));
        Peer { commands: child.stdin.take(), child, answers }
    }

    /// Tells it to listen; where it does.
    pub fn listen(&mut self, shipper: Shipper, memory: Memory, channels: usize) -> SocketAddr {
        let shipper = if shipper == Shipper::Bare { "bare" } else { "pageferry" };
        let memory = if memory == Memory::Warm { "warm" } else { "cold" };
        let commands = self.commands.as_mut().expect("it is open until drop");
        writeln!(commands, "{shipper} {memory} {channels}").expect("the target listens to commands");
        let line = self.answer();
        line.strip_prefix("at ").and_then(|at| at.parse().ok()).unwrap_or_else(|| panic!("the target said {line:?}"))
    }

    /// What it says at the end of the run.
    pub fn received(&mut self) -> Received {
        let line = self.answer();
        let mut words = line.split_whitespace().skip(1);
        let mut next = || words.next().unwrap_or_else(|| panic!("the target said {line:?}"));
        let cpu_seconds = next().parse().expect("seconds");
        Received { cpu_seconds, syscalls: next().parse().expect("a count") }
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        let got = self.answers.read_line(&mut line).expect("answers are text");
        assert!(got > 0, "the target's process ended early: see what it says above");
        line.trim_end().to_owned()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // End of file is the command to end.
        self.commands = None;
        if let Ok(status) = self.child.wait() {
            if !status.success() && !std::thread::panicking() {
                panic!("the target's process: {status}");
            }
        }
    }
}
