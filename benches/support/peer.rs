//! The target of `ship`, in a process of its own: the benchmark's program again, told what to do line by line.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use pageferry::memory::Ram;
use pageferry::{Outcome, Target};

use super::bare;
use super::kinds::still::Vmm;
use super::kinds::{Content, Kind, WORDS, all_arrived, ram, spoil};
use super::pages_loop::{self, Listener, Over};
use super::support::cpu_seconds;

/// The flag that makes the program the target.
pub const FLAG: &str = "--as-target";

/// Who ships.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shipper {
    /// The bare loop of `bare.rs`, which knows all pages over TCP only; elsewhere that of `pages_loop.rs`.
    Bare,
    /// The library.
    Pageferry,
}

impl Shipper {
    /// Whether the frozen loop is the one that ships this.
    pub fn is_frozen_loop(self, kind: Kind, over: Over) -> bool {
        self == Shipper::Bare && over == Over::Tcp && !kind.is_scattered()
    }
}

/// What the target's memory was before a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// Mapped, touched and used many times.
    Warm,
    /// Mapped and never touched.
    Cold,
}

/// What is shipped, how, and into what.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// By whom.
    pub shipper: Shipper,
    /// Which pages.
    pub kind: Kind,
    /// Into what memory.
    pub memory: Memory,
    /// Over what.
    pub over: Over,
    /// Over how many channels.
    pub channels: usize,
}

impl Order {
    fn line(&self) -> String {
        let shipper = if self.shipper == Shipper::Bare { "bare" } else { "pageferry" };
        let memory = if self.memory == Memory::Warm { "warm" } else { "cold" };
        format!("{shipper} {} {memory} {} {}", self.kind.name(), self.over.name(), self.channels)
    }

    fn parse(line: &str) -> Order {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [shipper, kind, memory, over, channels] = words[..] else { panic!("no command: {line:?}") };
        Order {
            shipper: if shipper == "bare" { Shipper::Bare } else { Shipper::Pageferry },
            kind: Kind::named(kind),
            memory: if memory == "warm" { Memory::Warm } else { Memory::Cold },
            over: Over::named(over),
            channels: channels.parse().expect("a number of channels"),
        }
    }
}

/// What the target says after a run.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// CPU seconds of the target's process.
    pub cpu_seconds: f64,
    /// System calls of its receivers.
    pub syscalls: u64,
}

/// Is the target until the parent closes the pipe.
pub fn serve(ram_bytes: u64, content: Content) -> ExitCode {
    let kept = ram(ram_bytes);
    content.fill(&kept);
    let mut turn = 0;
    for line in io::stdin().lock().lines() {
        let line = line.expect("commands are text");
        let order = Order::parse(&line);
        let ram = if order.memory == Memory::Warm { kept.clone() } else { ram(ram_bytes) };
        let pages = order.kind.pages(ram.pages());
        turn = (turn + 37) % WORDS;
        if order.memory == Memory::Warm {
            spoil(&ram.blocks()[0], content, &pages, turn);
        }
        let (cpu, syscalls) = receive(&order, &ram, &pages);
        assert!(all_arrived(&ram.blocks()[0], content, &pages, turn), "{line}: a page is not what was sent");
        drop(ram);
        say(&format!("done {cpu} {syscalls}"));
    }
    ExitCode::SUCCESS
}

/// One run: its CPU seconds and system calls here.
fn receive(order: &Order, ram: &Ram, pages: &[u64]) -> (f64, u64) {
    let block = &ram.blocks()[0];
    let (cpu, syscalls);
    if order.shipper.is_frozen_loop(order.kind, order.over) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        say(&format!("at {}", listener.local_addr().expect("a bound port has an address")));
        cpu = cpu_seconds();
        syscalls = bare::receive(block, &listener, order.channels).expect("the bare loop receives").syscalls;
    } else if order.shipper == Shipper::Bare {
        let listener = Listener::bind(order.over).expect("an address");
        say(&format!("at {}", listener.address().expect("it is bound")));
        cpu = cpu_seconds();
        syscalls = pages_loop::receive(block, pages, &listener, order.channels).expect("the loop receives");
    } else {
        let target = Target::builder().listen(&order.over.address()).expect("an address");
        say(&format!("at {}", target.address().expect("it listens somewhere")));
        cpu = cpu_seconds();
        let report = target.receive(&mut Vmm(ram.clone()));
        assert_eq!(report.outcome, Outcome::Completed, "{report:?}");
        syscalls = report.recv_syscalls;
    }
    (cpu_seconds() - cpu, syscalls)
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
    /// Starts it, with RAM of this many bytes that hold what the pages of this kind hold.
    pub fn start(ram_bytes: u64, kind: Kind) -> Peer {
        let program = std::env::current_exe().expect("the benchmark's own program");
        let mut child = Command::new(program)
            .args([FLAG, &ram_bytes.to_string(), "--content", kind.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the target's process starts");
        let answers = BufReader::new(child.stdout.take().expect("its output is piped"));
        Peer { commands: child.stdin.take(), child, answers }
    }

    /// Tells it to listen; where it does.
    pub fn listen(&mut self, order: &Order) -> String {
        let commands = self.commands.as_mut().expect("it is open until drop");
        writeln!(commands, "{}", order.line()).expect("the target listens to commands");
        let line = self.answer();
        line.strip_prefix("at ").unwrap_or_else(|| panic!("the target said {line:?}")).to_owned()
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
