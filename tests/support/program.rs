//! The program in processes of its own, for tests: its lines of JSON as they come, signals, and a link that stalls.
#![allow(dead_code)]
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take: far more than it does, so that only what hangs is caught.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running `pageferry`; killed when dropped.
pub struct Program {
    child: Child,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
    seen: Vec<Value>,
}

/// What is left of one.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its lines of JSON.
    pub lines: Vec<Value>,
    pub stderr: String,
}

pub const PAGEFERRY: &str = env!("CARGO_BIN_EXE_pageferry");

pub fn start(arguments: &[&str]) -> Program {
    let mut command = Command::new(PAGEFERRY);
    command.args(arguments);
    launch(command)
}

/// Starts a command that becomes the program.
pub fn launch(mut command: Command) -> Program {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (to, lines) = channel();
    let (out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).try_for_each(|line| to.send(line)));
    let stderr = thread::spawn(move || {
        let mut text = String::new();
        err.read_to_string(&mut text).unwrap();
        text
    });
    Program { child, lines, stderr: Some(stderr), seen: Vec::new() }
}

/// Runs it with `--json` to its end.
pub fn run(arguments: &[&str]) -> Ended {
    start(&[arguments, &["--json"]].concat()).end()
}

impl Program {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Reads lines until one is what is wanted.
    pub fn wait_for(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("it ended, or said nothing for too long, before {what}; its last line: {:?}", self.seen.last())
            };
            let line = parse(&line);
            self.seen.push(line.clone());
            if wanted(&line) {
                return line;
            }
        }
    }

    /// The address of its `listening` line.
    pub fn address(&mut self) -> String {
        self.wait_for("it listened", |line| line["event"] == "listening")["addr"].as_str().unwrap().to_owned()
    }

    /// Waits until pages are on their way.
    pub fn wait_for_pages(&mut self) {
        // The stages after this one may come before anybody looks.
        let stages = ["precopy", "paused", "handover"].map(Value::from);
        self.wait_for("pages were on their way", |line| line["event"] == "progress" && stages.contains(&line["stage"]));
    }

    pub fn signal(&self, name: &str) {
        signal(name, self.pid());
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen.push(parse(&line));
        }
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "its output has ended, and it has not: {:?}", self.seen);
            thread::park_timeout(Duration::from_millis(1));
        };
        let stderr = self.stderr.take().unwrap().join().unwrap();
        Ended { code: status.code(), lines: std::mem::take(&mut self.seen), stderr }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("not a line of JSON: {e}: {line}"))
}

impl Ended {
    /// The last line, which is a report, the only one.
    pub fn report(&self) -> &Value {
        let reports = self.lines.iter().filter(|line| line["event"] == "report").count();
        assert_eq!(reports, 1, "{self:#?}");
        self.lines.last().unwrap()
    }

    /// Checks exit code and outcome; gives the report.
    pub fn expect(&self, code: i32, outcome: &str) -> &Value {
        let report = self.report();
        assert_eq!((self.code, report["outcome"].as_str()), (Some(code), Some(outcome)), "{self:#?}");
        let has_error = report["error"].as_str().is_some_and(|error| !error.is_empty());
        assert_eq!(has_error, outcome != "completed", "{self:#?}");
        report
    }
}

pub fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("{field} is no whole number in {report}"))
}

pub fn signal(name: &str, pid: u32) {
    let sent = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap();
    assert!(sent.success(), "kill -{name} {pid}");
}

/// Whether a process runs: one that has ended, and that nobody has waited for yet, does not.
pub fn runs(pid: u32) -> bool {
    // "pid (name) state ...": the name may hold anything but is followed by the last parenthesis.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Waits until a process that is not our child has ended.
pub fn wait_until_gone(pid: u32) {
    let until = Instant::now() + PATIENCE;
    while runs(pid) {
        assert!(Instant::now() < until, "process {pid} still runs");
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// A folder of a test's own, removed when it is dropped.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pageferry-cli-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// The names of what is in it, hidden ones, too.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A link to a target that carries the control connection, and of each data connection the Hello and not a byte more:
/// a migration over it stands in the middle of its first round until the link is released, or somebody ends it.
pub struct StallingLink {
    pub address: SocketAddr,
    held: Arc<Held>,
}

/// Data connections, from the source and to the target.
#[derive(Default)]
struct Held {
    connections: Mutex<Vec<(TcpStream, TcpStream)>>,
    arrived: Condvar,
}

const HELLO_BYTES: usize = 64;

impl StallingLink {
    pub fn to(target: &str) -> StallingLink {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, target) = (listener.local_addr().unwrap(), target.to_owned());
        let held = Arc::new(Held::default());
        let hold = held.clone();
        // These threads end with the test's process, or with the connections; nobody waits for them.
        thread::spawn(move || {
            for (index, mut source) in listener.incoming().map_while(Result::ok).enumerate() {
                let Ok(mut onward) = TcpStream::connect(&target) else { return };
                if index == 0 {
                    carry(source.try_clone().unwrap(), onward.try_clone().unwrap());
                    carry(onward, source);
                    continue;
                }
                let mut hello = [0; HELLO_BYTES];
                if source.read_exact(&mut hello).and_then(|()| onward.write_all(&hello)).is_ok() {
                    hold.connections.lock().unwrap().push((source, onward));
                    hold.arrived.notify_all();
                }
            }
        });
        StallingLink { address, held }
    }

    /// Lets so many data connections go on.
    pub fn release(&self, connections: usize) {
        let held = self.held.connections.lock().unwrap();
        let (mut held, _) =
            self.held.arrived.wait_timeout_while(held, PATIENCE, |held| held.len() < connections).unwrap();
        assert_eq!(held.len(), connections);
        for (source, onward) in held.drain(..) {
            carry(source, onward);
        }
    }
}

/// Carries bytes one way, and the end of the stream.
fn carry(mut from: TcpStream, mut to: TcpStream) {
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}
