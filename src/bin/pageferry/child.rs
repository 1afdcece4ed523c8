//! The target's process of `demo`, seen from the one that started it: it never outlives its starter.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{self, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::net::Address;
use serde::{Deserialize, Serialize};

use crate::report::TargetPart;

/// What the target's process says, one JSON object a line on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Said {
    /// It may be connected to.
    Listening { addr: String },
    /// It is over.
    Report(TargetPart),
}

/// How long it may take to start.
const START: Duration = Duration::from_secs(10);
/// How long it may take to end once it was told to. It joins its threads within 100 ms; the rest is a slow machine.
const END: Duration = Duration::from_secs(5);

/// A running target.
pub struct Child {
    process: process::Child,
    /// It ends when this closes: when this is dropped, and when this process ends in whatever way.
    stdin: Option<ChildStdin>,
    said: Receiver<Said>,
    complaints: Option<JoinHandle<String>>,
    pub address: Address,
    reaped: bool,
}

impl Child {
    /// Starts it, and waits until it listens.
    pub fn start(arguments: &[OsString]) -> Result<Child, String> {
        let cannot = |what: &str, e: &dyn std::fmt::Display| format!("cannot {what} the target's process: {e}");
        let program = std::env::current_exe().map_err(|e| cannot("find the program of", &e))?;
        let mut command = Command::new(program);
        command.arg("demo-target").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C in a terminal reaches every process of the group, and this one is to hear of it
        // from the source.
        command.process_group(0);
        let mut process = command.spawn().map_err(|e| cannot("start", &e))?;
        let stdin = process.stdin.take();
        let said = process.stdout.take().map(listen).transpose().map_err(|e| cannot("listen to", &e))?;
        let complaints = process.stderr.take().map(collect).transpose().map_err(|e| cannot("listen to", &e))?;
        let Some(said) = said else { return Err("the target's process has no standard output".to_owned()) };
        // Not an address yet; replaced below, and from here on the process is reaped whatever happens.
        let address = Address::Unix(PathBuf::new());
        let mut child = Child { process, stdin, said, complaints, address, reaped: false };
        match child.said.recv_timeout(START) {
            Ok(Said::Listening { addr }) => {
                child.address = addr.parse().map_err(|e| cannot("understand", &e))?;
                Ok(child)
            }
            Ok(Said::Report(part)) => Err(cannot("start", &part.error.unwrap_or_default())),
            Err(_) => {
                child.reap();
                let why = child.complaints();
                Err(cannot("start", &if why.is_empty() { "it said nothing".to_owned() } else { why }))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends it, if it has not ended by itself, and gives its last word and its complaints.
    pub fn finish(mut self) -> (Option<TargetPart>, String) {
        let mut report = None;
        self.stdin = None;
        let until = Instant::now() + END;
        while let Ok(said) = self.said.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if let Said::Report(part) = said {
                report = Some(part);
            }
        }
        self.reap();
        (report, self.complaints())
    }

    /// Its output has ended, or it has been waited for long enough: in the first case it is gone, or as good as gone.
    fn reap(&mut self) {
        self.stdin = None;
        if !self.reaped {
            let _ = self.process.kill();
            let _ = self.process.wait();
            self.reaped = true;
        }
        // It removes these itself, unless it was killed.
        if let Address::Unix(path) = &self.address {
            if let Some(folder) = path.parent().filter(|_| fs::remove_file(path).is_ok()) {
                let _ = fs::remove_dir(folder);
            }
        }
    }

    fn complaints(&mut self) -> String {
        self.complaints.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.reap();
    }
}

fn listen(stdout: ChildStdout) -> std::io::Result<Receiver<Said>> {
    let (to, said) = mpsc::channel();
    thread::Builder::new().name("target-out".to_owned()).spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Ok(said) = serde_json::from_str(&line) {
                if to.send(said).is_err() {
                    return;
                }
            }
        }
    })?;
    Ok(said)
}

fn collect(mut stderr: ChildStderr) -> std::io::Result<JoinHandle<String>> {
    thread::Builder::new().name("target-err".to_owned()).spawn(move || {
        let mut text = Vec::new();
        // What was read before an error is what it said.
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).trim().replace('\n', "; ")
    })
}
