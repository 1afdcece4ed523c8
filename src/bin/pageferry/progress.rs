//! Shows a migration while it runs: a bar on a terminal, or lines of JSON.

use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry::Progress;
use pageferry::progress::{Snapshot, Stage};
use serde::Serialize;

use crate::output::Output;
use crate::sizes::{human, human_rate};

/// How often it looks.
const LOOK: Duration = Duration::from_millis(50);
/// How often it prints a line of JSON while the stage stays the same.
const LINE: Duration = Duration::from_millis(250);

/// How often the bar may be drawn: at every look, or its words would lag behind its length.
const DRAWS_HZ: u8 = 100;

/// Which side is shown: they know different things.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Source,
    Target,
    /// Between the two: what comes is what goes.
    Relay,
}

/// Shows until it is dropped.
pub struct Watch {
    // Dropped first: that is what ends the thread.
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to show; nothing is shown where no thread is to be had, or nobody would see it.
    pub fn start(progress: Progress, side: Side, out: Output) -> Watch {
        if !out.is_json() && !std::io::stderr().is_terminal() {
            return Watch { stop: None, thread: None };
        }
        let (stop, stopped) = mpsc::channel();
        let show = move || {
            let mut shown = Shown::new(side, out);
            loop {
                shown.look(&progress.now());
                if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
            shown.bar.finish_and_clear();
        };
        let thread = thread::Builder::new().name("progress".to_owned()).spawn(show).ok();
        Watch { stop: Some(stop), thread }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A line of JSON.
#[derive(Serialize)]
struct Line {
    event: &'static str,
    stage: &'static str,
    rounds: u64,
    ram_bytes: u64,
    untouched_bytes: u64,
    pushed_bytes: u64,
    payload_bytes: u64,
    zero_bytes: u64,
    wire_bytes: u64,
    rate_bytes_s: u64,
    dirty_rate_bytes_s: u64,
    bytes_left: u64,
    /// Not there while nothing has been measured.
    expected_downtime_ms: Option<f64>,
}

struct Shown {
    side: Side,
    out: Output,
    bar: ProgressBar,
    stage: Option<Stage>,
    printed: Instant,
    /// Bytes and time of the look before, and the rate since.
    before: (u64, Instant),
    rate: u64,
}

impl Shown {
    fn new(side: Side, out: Output) -> Shown {
        let bar = match out.is_json() {
            true => ProgressBar::hidden(),
            false => ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(DRAWS_HZ)),
        };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}% {wide_msg}") {
            bar.set_style(style);
        }
        let now = Instant::now();
        Shown { side, out, bar, stage: None, printed: now, before: (0, now), rate: 0 }
    }

    fn look(&mut self, now: &Snapshot) {
        let at = Instant::now();
        let since = at.duration_since(self.before.1);
        if since >= LINE {
            let bytes = now.channels.wire_bytes.saturating_sub(self.before.0);
            self.rate = (bytes as f64 / since.as_secs_f64()) as u64;
            self.before = (now.channels.wire_bytes, at);
        }
        if self.stage != Some(now.stage) || at.duration_since(self.printed) >= LINE {
            self.stage = Some(now.stage);
            self.printed = at;
            self.out.event(&self.line(now));
        }
        self.bar.set_length(now.ram_bytes);
        self.bar.set_position(now.ram_bytes.saturating_sub(bytes_left(self.side, now)));
        self.bar.set_message(self.words(now));
    }

    fn line(&self, now: &Snapshot) -> Line {
        Line {
            event: "progress",
            stage: word(now.stage),
            rounds: now.rounds,
            ram_bytes: now.ram_bytes,
            untouched_bytes: now.untouched_bytes,
            pushed_bytes: now.pushed_bytes,
            payload_bytes: now.channels.payload_bytes,
            zero_bytes: now.channels.zero_bytes,
            wire_bytes: now.channels.wire_bytes,
            rate_bytes_s: if now.rate > 0 { now.rate } else { self.rate },
            dirty_rate_bytes_s: now.dirty_rate,
            bytes_left: bytes_left(self.side, now),
            expected_downtime_ms: downtime_ms(now),
        }
    }

    fn words(&self, now: &Snapshot) -> String {
        let mut words = vec![word(now.stage).to_owned()];
        if self.rate > 0 {
            words.push(human_rate(self.rate));
        }
        match self.side {
            Side::Target => words.push(format!("{} received", human(now.channels.payload_bytes))),
            Side::Relay if now.stage == Stage::HandOver => {
                words.push("waiting for the destination's answer".to_owned())
            }
            Side::Relay if now.stage != Stage::Connecting => {
                words.push(format!("round {}", now.rounds));
                words.push(format!("{} passed on", human(now.channels.wire_bytes)));
            }
            Side::Relay => {}
            Side::Source if now.stage == Stage::Precopy => {
                words.push(format!("round {}", now.rounds + 1));
                words.push(format!("{} left", human(bytes_left(self.side, now))));
                if now.dirty_rate > 0 {
                    words.push(format!("guest dirties {}", human_rate(now.dirty_rate)));
                }
                if now.throttle > 0 {
                    words.push(format!("throttled by {} %", now.throttle));
                }
                if let Some(ms) = downtime_ms(now) {
                    words.push(format!("downtime would be {ms:.0} ms"));
                }
            }
            Side::Source => {}
        }
        words.join(", ")
    }
}

/// What is left of RAM. The source has an exact number from the end of the first round on.
fn bytes_left(side: Side, now: &Snapshot) -> u64 {
    match (side, now.stage) {
        (_, Stage::Connecting) => now.ram_bytes,
        (_, Stage::HandOver | Stage::Ended) => 0,
        (Side::Target | Side::Relay, _) => {
            now.ram_bytes.saturating_sub(now.channels.payload_bytes + now.channels.zero_bytes)
        }
        (Side::Source, _) if downtime_ms(now).is_some() => now.bytes_left,
        (Side::Source, _) => now.ram_bytes.saturating_sub(now.untouched_bytes + now.pushed_bytes),
    }
}

fn downtime_ms(now: &Snapshot) -> Option<f64> {
    let measured = now.rate > 0 && now.expected_downtime != Duration::from_micros(u64::MAX);
    measured.then_some(now.expected_downtime.as_secs_f64() * 1e3)
}

fn word(stage: Stage) -> &'static str {
    match stage {
        Stage::Connecting => "connecting",
        Stage::Precopy => "precopy",
        Stage::Paused => "paused",
        Stage::HandOver => "handover",
        Stage::Ended => "ended",
    }
}
