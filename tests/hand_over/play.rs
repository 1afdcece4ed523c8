//! One migration between two processes, harmed at one place, and what must be true of it afterwards.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use pageferry::Timeouts;
use pageferry::net::Endpoint;
use pageferry::settle::{Settled, settle};
use pageferry::units::SessionId;
use serde_json::Value;

use crate::part::{HUNG, PART, step};
use crate::program::{self, Folder};
use crate::proxy::{Harm, Kill, Place, Proxy, Seen};

/// Who plays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cast {
    /// Two processes of this test, whose guest writes down when it runs.
    Guests,
    /// `pageferry send` and `pageferry receive`: the image runs where it has landed.
    Program,
}

/// A process, and what it says.
struct Actor {
    child: Arc<Mutex<Child>>,
    out: BufReader<ChildStdout>,
}

/// How a process ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Its exit code; `None` if it was killed.
    pub code: Option<i32>,
    /// Its report; `None` if it was killed before.
    pub report: Option<Value>,
}

/// All there is to know afterwards.
#[derive(Debug)]
pub struct Scene {
    pub source: End,
    pub target: End,
    pub seen: Seen,
    /// What the target said when it was asked; `None` if nobody asked.
    pub settled: Option<Result<Settled, String>>,
    /// Whether the guest was run at the target, at any time.
    pub ran_at_target: bool,
    /// Of [`Cast::Guests`]: what they wrote down.
    pub log: Vec<u8>,
}

impl Actor {
    fn start(mut command: Command) -> Actor {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Actor { child: Arc::new(Mutex::new(child)), out }
    }

    /// The next line of JSON for this event; `None` if its output has ended.
    fn event(&mut self, event: &str) -> Option<Value> {
        loop {
            let mut line = String::new();
            if self.out.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            // The test harness speaks, too.
            let Some(Ok(line)) = line.strip_prefix('{').map(|_| serde_json::from_str::<Value>(&line)) else { continue };
            if line["event"] == event {
                return Some(line);
            }
        }
    }

    /// Tells it that nobody will come any more.
    fn dismiss(&mut self, cast: Cast) {
        let mut child = self.child.lock().unwrap();
        match cast {
            Cast::Guests => child.stdin = None,
            Cast::Program if child.try_wait().unwrap().is_none() => program::signal("INT", child.id()),
            Cast::Program => {}
        }
    }

    fn end(mut self, report: Option<Value>) -> End {
        let mut rest = Vec::new();
        self.child.lock().unwrap().stdin = None;
        self.out.read_to_end(&mut rest).unwrap();
        let code = self.child.lock().unwrap().wait().unwrap().code();
        assert_ne!(code, Some(HUNG), "it hung");
        End { code, report }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn part(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", crate::PLAYER, "--nocapture", "--test-threads=1"]).env(PART, words.join(" "));
    command
}

fn pageferry(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    command.args(words);
    command
}

/// Bytes of the image that [`Cast::Program`] ships.
const IMAGE_BYTES: usize = 40 << 12;

/// Plays it through, harmed or not, and asks the target if the source is left in doubt.
pub fn play(cast: Cast, harm: Option<(Place, Harm)>) -> Scene {
    let folder = Folder::new();
    let [log, from, to] = ["log", "from", "to"].map(|name| folder.file(name));
    let patience = if harm.is_some_and(|(_, harm)| harm == Harm::Stall) { "1200" } else { "20000" };
    let target = match cast {
        Cast::Guests => part(&["target", patience, &log]),
        Cast::Program => {
            std::fs::write(&from, (0..IMAGE_BYTES).map(|i| (i / 7) as u8).collect::<Vec<_>>()).unwrap();
            pageferry(&["receive", "--listen", "127.0.0.1:0", "--ram", &to, "--answer-queries", "20", "--json"])
        }
    };
    let mut target = Actor::start(target);
    let address = target.event("listening").unwrap()["addr"].as_str().unwrap().to_owned();

    let source_child = Arc::new(OnceLock::<Arc<Mutex<Child>>>::new());
    let kill: Box<Kill> = Box::new({
        let (source, target) = (source_child.clone(), target.child.clone());
        move |harm| {
            let child = if harm == Harm::KillTarget { &target } else { started(&source) };
            let mut child = child.lock().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
        }
    });
    let proxy = Proxy::before(&address, harm, kill);
    let mut source = Actor::start(match cast {
        Cast::Guests => part(&["source", patience, &log, proxy.address()]),
        Cast::Program => pageferry(&["send", "--to", proxy.address(), "--ram", &from, "--json"]),
    });
    assert!(source_child.set(source.child.clone()).is_ok());

    let report = source.event("report");
    let source = source.end(report);
    if harm.is_some_and(|(place, harm)| harm != Harm::KillTarget && place.is_within_first_word()) {
        target.dismiss(cast); // it has not met a source, and would wait for one for ever
    }
    // At once: the target may have ended, or not.
    let in_doubt = source.report.as_ref().filter(|report| report["outcome"] == "uncertain");
    let settled = in_doubt.map(|report| ask(cast, &address, report["session"].as_str().unwrap()));
    let report = target.event("report");
    // Commit may arrive now, for all that it can still do.
    proxy.release();
    target.dismiss(cast);
    let target = target.end(report);
    let seen = proxy.seen();
    drop(proxy);
    let log = std::fs::read(&log).unwrap_or_default();
    let ran_at_target = match cast {
        Cast::Guests => log.contains(&step::TARGET_RUNS),
        Cast::Program => std::fs::exists(&to).unwrap(),
    };
    Scene { source, target, seen, settled, ran_at_target, log }
}

/// The source's process, which is started right after the proxy.
fn started(source: &OnceLock<Arc<Mutex<Child>>>) -> &Arc<Mutex<Child>> {
    loop {
        match source.get() {
            Some(child) => return child,
            None => thread::park_timeout(Duration::from_millis(1)),
        }
    }
}

/// Asks the target how it ended, by the library or by the program.
fn ask(cast: Cast, address: &str, session: &str) -> Result<Settled, String> {
    match cast {
        Cast::Guests => {
            let seconds = Duration::from_secs;
            let timeouts = Timeouts { connect: seconds(20), hook: seconds(20), ..Timeouts::default() };
            let target = Endpoint::Addresses(vec![address.parse().unwrap()]);
            settle(target, SessionId::from_hex(session).unwrap(), &timeouts).map_err(|why| why.to_string())
        }
        Cast::Program => {
            let ended = program::run(&["settle", "--to", address, "--session", session, "--timeout", "20"]);
            let [answer] = &ended.lines[..] else { panic!("{ended:?}") };
            assert_eq!((answer["event"].as_str(), answer["session"].as_str()), (Some("settled"), Some(session)));
            match (ended.code, answer["settled"].as_str().unwrap()) {
                (Some(0), "runs-there") => Ok(Settled::RunsThere),
                (Some(4), "never-will-run-there") => Ok(Settled::NeverWillRunThere),
                (Some(3), "unknown") => Err(answer["error"].as_str().unwrap().to_owned()),
                _ => panic!("{ended:?}"),
            }
        }
    }
}

impl End {
    /// The outcome that it reports; `None` if it was killed before.
    pub fn outcome(&self) -> Option<&str> {
        self.report.as_ref().map(|report| report["outcome"].as_str().unwrap())
    }

    /// What it says is said alike by code and report, and with a reason.
    fn check(&self) {
        let Some(report) = &self.report else { return assert_eq!(self.code, None, "it ended without a report") };
        let code = match self.outcome().unwrap() {
            "completed" => 0,
            "failed" => 1,
            "uncertain" => 3,
            "cancelled" => 130, // dismissed
            other => panic!("no such outcome: {other}"),
        };
        // Killed after its report, it has no code.
        assert!(self.code.is_none_or(|own| own == code), "{self:?}");
        let has_error = report["error"].as_str().is_some_and(|error| !error.is_empty());
        assert_eq!(has_error, code != 0, "{report}");
    }
}

impl Scene {
    /// What must be true wherever it was harmed.
    pub fn check(&self, cast: Cast) {
        self.source.check();
        self.target.check();
        let stands_at_source = match cast {
            Cast::Guests => source_stands(&self.log),
            Cast::Program => true,
        };
        match self.source.outcome() {
            Some("completed") => assert!(self.ran_at_target, "nobody runs it"),
            Some("failed") => {
                assert!(!self.ran_at_target, "both sides have it");
                assert!(cast == Cast::Program || !stands_at_source, "nobody runs it");
            }
            Some("uncertain") => assert!(stands_at_source, "resumed in doubt"),
            _ => {}
        }
        match self.target.outcome() {
            Some("completed") => assert!(self.ran_at_target),
            Some(_) => assert!(!self.ran_at_target),
            None => {}
        }
        if let Some(settled) = &self.settled {
            // A target may have been killed after its report.
            match self.target.code {
                Some(_) if self.ran_at_target => assert_eq!(*settled, Ok(Settled::RunsThere)),
                Some(_) => assert_eq!(*settled, Ok(Settled::NeverWillRunThere)),
                None => assert!(settled.is_err(), "the dead have answered"),
            }
        }
    }
}

/// Reads the log: fails if ever two ran; says whether the guest stands still at the source in the end.
fn source_stands(log: &[u8]) -> bool {
    let (mut source, mut target) = (false, false);
    for (at, byte) in log.iter().enumerate() {
        match *byte {
            step::SOURCE_RUNS => source = true,
            step::SOURCE_STANDS => source = false,
            step::TARGET_RUNS => target = true,
            step::SOURCE_BEATS => assert!(source, "a beat at the source, which stands still: byte {at}"),
            step::TARGET_BEATS => assert!(target, "a beat at the target, which was not run: byte {at}"),
            other => panic!("who wrote {other}?"),
        }
        assert!(!(source && target), "two run: {}", String::from_utf8_lossy(&log[..=at]));
    }
    !source
}
