//! A VMM process, seen from the demo that started it: it never outlives its starter.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::protocol::{Order, Said};

/// How long it may say nothing: more than the library's own time limits and the guest's check.
const SILENCE: Duration = Duration::from_secs(150);

/// Killed when dropped.
pub struct Process {
    child: Child,
    orders: Orders,
    said: Receiver<Said>,
}

/// Gives orders; for the signal handler, too.
#[derive(Clone)]
pub struct Orders(Arc<Mutex<ChildStdin>>);

impl Orders {
    pub fn give(&self, order: &Order) -> Result<(), String> {
        let cannot = |e: &dyn std::fmt::Display| format!("cannot give an order to a VMM process: {e}");
        let line = serde_json::to_string(order).map_err(|e| cannot(&e))?;
        let mut stdin = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).map_err(|e| cannot(&e))
    }
}

impl Process {
    pub fn start() -> Result<Process, String> {
        Process::try_start().map_err(|e| format!("cannot start a VMM process: {e}"))
    }

    fn try_start() -> io::Result<Process> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("vmm").stdin(Stdio::piped()).stdout(Stdio::piped());
        // A group of its own: Ctrl-C reaches every process of the terminal's group, and this one is to hear of it from
        // the demo.
        command.process_group(0);
        let mut child = command.spawn()?;
        let no_pipe = || io::Error::other("no pipe to it");
        let stdin = child.stdin.take().ok_or_else(no_pipe)?;
        let stdout = child.stdout.take().ok_or_else(no_pipe)?;
        let (to, said) = mpsc::channel();
        thread::Builder::new().name(format!("said-{}", child.id())).spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let what = serde_json::from_str(&line)
                    .unwrap_or_else(|e| Said::Error { error: format!("it said what nobody understands: {e}: {line}") });
                if to.send(what).is_err() {
                    return;
                }
            }
        })?;
        Ok(Process { child, orders: Orders(Arc::new(Mutex::new(stdin))), said })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn orders(&self) -> Orders {
        self.orders.clone()
    }

    pub fn order(&self, order: &Order) -> Result<(), String> {
        self.orders.give(order)
    }

    /// The next that it says; `None` if it says nothing until then.
    ///
    /// # Errors
    /// What it complains of, or that it is gone.
    pub fn next(&self, until: Option<Instant>) -> Result<Option<Said>, String> {
        let patience = until.map_or(SILENCE, |until| until.saturating_duration_since(Instant::now()));
        match self.said.recv_timeout(patience) {
            Ok(Said::Error { error }) => Err(error),
            Ok(said) => Ok(Some(said)),
            Err(RecvTimeoutError::Timeout) if until.is_some() => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(format!("the VMM process {} says nothing", self.pid())),
            Err(RecvTimeoutError::Disconnected) => Err(format!("the VMM process {} is gone", self.pid())),
        }
    }

    /// Gives an order and waits for what `wanted` makes of an answer.
    pub fn ask<T>(&self, order: &Order, wanted: impl Fn(Said) -> Option<T>) -> Result<T, String> {
        self.order(order)?;
        self.wait(wanted)
    }

    pub fn wait<T>(&self, wanted: impl Fn(Said) -> Option<T>) -> Result<T, String> {
        loop {
            if let Some(found) = self.next(None)?.and_then(&wanted) {
                return Ok(found);
            }
        }
    }

    /// Ends it the hard way, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
