//! What is known when it is over: for machines as one line of JSON, for people as a few lines of text.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::Ticks;
use crate::ferry::{KvmCosts, Outcome, SourceReport, TargetReport};
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
    pub downtime_expected_ms: Option<f64>,
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
    /// Guest bytes sent, times the least that was possible: all of RAM once, and the hot set once more.
    pub sent_over_least: f64,
    /// What tracking cost at this side since the VM was made.
    pub kvm: Costs,
}

/// What calls into KVM cost.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Costs {
    pub arm_ms: f64,
    pub disarm_ms: f64,
    /// KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS: how many, and the longest.
    pub gets: u64,
    pub longest_get_us: f64,
    pub clears: u64,
    pub longest_clear_us: f64,
    pub largest_clear_pages: u64,
    pub resets: u64,
    pub longest_reset_us: f64,
}

impl From<&KvmCosts> for Costs {
    fn from(costs: &KvmCosts) -> Costs {
        let us = |time: Duration| ms(time) * 1e3;
        Costs {
            arm_ms: ms(costs.arm),
            disarm_ms: ms(costs.disarm),
            gets: costs.get.calls,
            longest_get_us: us(costs.get.longest),
            clears: costs.clear.calls,
            longest_clear_us: us(costs.clear.longest),
            largest_clear_pages: costs.clear.pages_max,
            resets: costs.reset.calls,
            longest_reset_us: us(costs.reset.longest),
        }
    }
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
    pub fn new(report: SourceReport, ticks: Ticks, hot_bytes: u64, costs: &KvmCosts) -> Departure {
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
            downtime_expected_ms: report.downtime_expected.map(ms),
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
            sent_over_least: report.payload_bytes as f64 / (report.ram_bytes + hot_bytes) as f64,
            kvm: costs.into(),
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
    /// Of the migrations that completed: how many kept the downtime limit, by the report and by the guest's ticks around
    /// the hand-over, and both downtimes in the middle and at the worst.
    pub kept_limit: u32,
    pub kept_limit_outside: u32,
    pub downtime_median_ms: f64,
    pub downtime_worst_ms: f64,
    pub gap_median_ms: f64,
    pub gap_worst_ms: f64,
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
            kept_limit: 0,
            kept_limit_outside: 0,
            downtime_median_ms: 0.0,
            downtime_worst_ms: 0.0,
            gap_median_ms: 0.0,
            gap_worst_ms: 0.0,
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

    /// Sums up all migrations that completed.
    pub fn sum_up(&mut self, limit_ms: f64) {
        let completed = || self.attempts.iter().filter(|attempt| attempt.source.outcome == End::Completed);
        let downtimes = sorted(completed().map(|attempt| attempt.source.numbers.downtime_ms));
        let gaps = sorted(completed().filter_map(|attempt| attempt.gap_ms));
        let kept = |times: &[f64]| times.iter().filter(|time| **time <= limit_ms).count() as u32;
        (self.kept_limit, self.kept_limit_outside) = (kept(&downtimes), kept(&gaps));
        (self.downtime_median_ms, self.downtime_worst_ms) = median_and_worst(&downtimes);
        (self.gap_median_ms, self.gap_worst_ms) = median_and_worst(&gaps);
    }

    /// What the last check has found wrong.
    pub fn damage(&self) -> Option<String> {
        let bad = |who: &str, found: &str| (found != "ok").then(|| format!("{who} says: {found}"));
        bad("the guest", &self.guest_check).or(bad("the device", &self.device_check))
    }
}

fn sorted(times: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut times: Vec<_> = times.collect();
    times.sort_by(f64::total_cmp);
    times
}

fn median_and_worst(sorted: &[f64]) -> (f64, f64) {
    (sorted.get(sorted.len() / 2).copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0))
}

/// Milliseconds for machines.
pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
