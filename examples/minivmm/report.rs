//! What is known when it is over: for machines as one line of JSON, for people as a few lines of text.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::Ticks;
use crate::ferry::{Outcome, SourceReport, TargetReport};
use crate::protocol::CheckedPart;

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    Completed,
    Failed,
    Uncertain,
    Cancelled,
    /// Every migration completed, and the guest or its device found that something did not arrive.
    Damaged,
}

impl End {
    /// What the shell is told.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            End::Completed => 0,
            End::Failed => 1,
            End::Uncertain => 3,
            End::Damaged => 4,
            End::Cancelled => 130,
        })
    }

    fn of(outcome: &Outcome) -> (End, Option<String>) {
        match outcome {
            Outcome::Completed => (End::Completed, None),
            Outcome::Cancelled => (End::Cancelled, Some("cancelled".to_owned())),
            Outcome::Failed(why) => (End::Failed, Some(why.to_string())),
            Outcome::Uncertain(why) => {
                (End::Uncertain, Some(format!("uncertain: the other side may have taken over: {why}")))
            }
        }
    }
}

/// An attempt to migrate, as the source tells it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Departure {
    pub outcome: End,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(flatten)]
    pub numbers: Numbers,
    pub remarks: Vec<String>,
    /// At the source, from the beginning of the attempt on.
    pub ticks: Ticks,
}

/// What an attempt took. The names are those of `pageferry demo --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Numbers {
    pub verify: String,
    pub verified: bool,
    pub ram_bytes: u64,
    pub payload_bytes: u64,
    pub wire_bytes: u64,
    pub zero_bytes: u64,
    pub untouched_bytes: u64,
    pub state_bytes: u64,
    pub rounds: u32,
    pub channels: u8,
    pub total_ms: f64,
    pub downtime_ms: f64,
    pub downtime_parts: Parts,
    pub throughput_gib_s: f64,
    /// Hand-overs that were withdrawn because they took too long, and how long the guest stood still for them.
    pub overruns: u32,
    pub interrupted_ms: f64,
    /// The most that was kept back at once for the end, because it was dirty in every round.
    pub deferred_bytes: u64,
    /// How far the guest was held back, for how long, and what it dirtied before and then.
    pub throttle_percent: u8,
    pub throttle_ms: f64,
    pub dirty_rate_before_bytes_s: u64,
    pub dirty_rate_throttled_bytes_s: u64,
    pub send_syscalls: u64,
}

/// What a downtime was made of, in the order of time.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Parts {
    pub pause_ms: f64,
    pub ship_ms: f64,
    pub load_ms: f64,
    pub run_ms: f64,
}

impl Departure {
    pub fn new(report: SourceReport, ticks: Ticks) -> Departure {
        let (outcome, error) = End::of(&report.outcome);
        let touched = (report.ram_bytes - report.untouched_bytes) as f64 / (1u64 << 30) as f64;
        let rate = if outcome == End::Completed { touched / report.total.as_secs_f64().max(1e-9) } else { 0.0 };
        let parts = report.downtime_parts;
        let numbers = Numbers {
            verify: format!("{:?}", report.verify).to_lowercase(),
            verified: report.verified,
            ram_bytes: report.ram_bytes,
            payload_bytes: report.payload_bytes,
            wire_bytes: report.wire_bytes,
            zero_bytes: report.zero_bytes,
            untouched_bytes: report.untouched_bytes,
            state_bytes: report.state_bytes,
            rounds: report.rounds,
            channels: report.channels,
            total_ms: ms(report.total),
            downtime_ms: ms(report.downtime),
            downtime_parts: Parts {
                pause_ms: ms(parts.pause),
                ship_ms: ms(parts.ship),
                load_ms: ms(parts.load),
                run_ms: ms(parts.run),
            },
            throughput_gib_s: rate,
            overruns: report.overruns,
            interrupted_ms: ms(report.interrupted),
            deferred_bytes: report.deferred_bytes,
            throttle_percent: report.throttling.highest,
            throttle_ms: ms(report.throttling.time),
            dirty_rate_before_bytes_s: report.throttling.dirty_rate_before,
            dirty_rate_throttled_bytes_s: report.throttling.dirty_rate_after,
            send_syscalls: report.send_syscalls,
        };
        Departure { outcome, error, numbers, remarks: report.remarks, ticks }
    }
}

/// The same attempt, as the target tells it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Arrival {
    pub outcome: End,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub verified: bool,
    pub downtime_ms: f64,
    pub recv_syscalls: u64,
    pub turned_away: u64,
    pub remarks: Vec<String>,
}

impl Arrival {
    pub fn new(report: TargetReport) -> Arrival {
        let (outcome, error) = End::of(&report.outcome);
        Arrival {
            outcome,
            error,
            verified: report.verified,
            downtime_ms: ms(report.downtime),
            recv_syscalls: report.recv_syscalls,
            turned_away: report.turned_away,
            remarks: report.remarks,
        }
    }
}

/// One attempt, from outside.
#[derive(Clone, Debug, Serialize)]
pub struct Attempt {
    /// Which migration it belongs to, from 1 on.
    pub migration: u32,
    #[serde(flatten)]
    pub source: Departure,
    pub target: Option<Arrival>,
    /// From the last tick at the source to the first at the target.
    pub gap_ms: Option<f64>,
    /// The longest time between two ticks of the guest, wherever it was, from the beginning of the attempt on.
    pub downtime_outside_ms: Option<f64>,
    /// What the guest and its device found where the guest was afterwards.
    pub check: Option<CheckedPart>,
}

/// The last line of `--json`. Numbers are those of the last attempt.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    event: &'static str,
    command: &'static str,
    pub outcome: End,
    /// Why, where it did not complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(flatten)]
    pub numbers: Numbers,
    /// `ok`, or what is wrong with which page; `none` if the guest was not asked.
    pub guest_check: String,
    /// The same for what the device wrote, for the program, and for the ticks.
    pub device_check: String,
    pub guest_pages: u64,
    pub ticks_lost: u64,
    pub ticks_doubled: u64,
    pub gap_ms: Option<f64>,
    pub downtime_outside_ms: Option<f64>,
    pub dirty_source: &'static str,
    pub vcpus: u64,
    pub hot_bytes: u64,
    pub dirty_rate_asked_mib_s: u64,
    pub seed: u64,
    pub migrations_completed: u32,
    pub attempts_cancelled: u32,
    pub attempts: Vec<Attempt>,
}

impl Report {
    /// Of nothing yet.
    pub fn new(dirty_source: &'static str) -> Report {
        Report {
            event: "report",
            command: "minivmm demo",
            outcome: End::Failed,
            error: None,
            numbers: Numbers::default(),
            guest_check: "none".to_owned(),
            device_check: "none".to_owned(),
            guest_pages: 0,
            ticks_lost: 0,
            ticks_doubled: 0,
            gap_ms: None,
            downtime_outside_ms: None,
            dirty_source,
            vcpus: 0,
            hot_bytes: 0,
            dirty_rate_asked_mib_s: 0,
            seed: 0,
            migrations_completed: 0,
            attempts_cancelled: 0,
            attempts: Vec::new(),
        }
    }

    /// Takes an attempt in. Once something was found bad, that stays.
    pub fn add(&mut self, attempt: Attempt) {
        match attempt.source.outcome {
            End::Completed => self.migrations_completed += 1,
            End::Cancelled => self.attempts_cancelled += 1,
            _ => {}
        }
        self.numbers = attempt.source.numbers.clone();
        (self.gap_ms, self.downtime_outside_ms) = (attempt.gap_ms, attempt.downtime_outside_ms);
        if let Some(check) = &attempt.check {
            for (all, this) in [(&mut self.guest_check, &check.guest), (&mut self.device_check, &check.device)] {
                if all == "ok" || all == "none" {
                    all.clone_from(this);
                }
            }
            self.guest_pages = check.guest_pages;
            (self.ticks_lost, self.ticks_doubled) = (check.ticks_lost, check.ticks_doubled);
        }
        self.attempts.push(attempt);
    }

    /// What the last check has found wrong.
    pub fn damage(&self) -> Option<String> {
        let bad = |who: &str, found: &str| (found != "ok").then(|| format!("{who} says: {found}"));
        bad("the guest", &self.guest_check).or(bad("the device", &self.device_check))
    }
}

/// Milliseconds for machines.
pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
