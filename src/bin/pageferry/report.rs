//! What is known when it is over: for machines as one line of JSON, for people as a few lines of text.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use pageferry::source::DowntimeParts;
use pageferry::{Outcome, SourceReport, TargetReport, Verify};
use serde::{Deserialize, Serialize};

use crate::encrypted::Encrypted;
use crate::limits::Convergence;
use crate::mended::Mended;
use crate::sizes::{Cpus, human, ms};
use crate::store::Counters;
use crate::zero_copy::ByReference;

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    Completed,
    Failed,
    Uncertain,
    Cancelled,
}

/// The exit code of a failure.
pub const FAILED: u8 = 1;

impl End {
    /// What the shell is told.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            End::Completed => 0,
            End::Failed => FAILED,
            End::Uncertain => 3,
            End::Cancelled => 130,
        })
    }

    fn of(outcome: &Outcome) -> End {
        match outcome {
            Outcome::Completed => End::Completed,
            Outcome::Cancelled => End::Cancelled,
            Outcome::Failed(_) => End::Failed,
            Outcome::Uncertain(_) => End::Uncertain,
        }
    }
}

/// The last line of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    event: &'static str,
    command: &'static str,
    pub outcome: End,
    /// Why, where it did not complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What tells the migration from every other, where it came to that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// The command that asks the target how an uncertain migration ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settle: Option<String>,
    pub verify: &'static str,
    pub verified: bool,
    /// What was checked, for people, where that is not what `verify` says.
    #[serde(skip)]
    pub checked: Option<&'static str>,
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
    /// What the downtime was expected to be when the guest was paused, and what it was made of, at a source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_expected_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_parts: Option<PartsMs>,
    /// RAM that was ever touched, over the time from the first connection to the end.
    pub throughput_gib_s: f64,
    /// Processor time of the migration, user and system.
    pub cpu_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_syscalls: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recv_syscalls: Option<u64>,
    pub cpus: Vec<Option<usize>>,
    pub remarks: Vec<String>,
    #[serde(flatten)]
    pub mended: Option<Mended>,
    /// What became of sending by reference, at a source.
    #[serde(flatten)]
    pub by_reference: Option<ByReference>,
    /// How the connections were encrypted, at a source.
    #[serde(flatten)]
    pub encrypted: Option<Encrypted>,
    /// What it took to let the rounds of a guest that keeps writing end.
    #[serde(flatten)]
    pub convergence: Option<Convergence>,
    #[serde(flatten)]
    pub demo: Option<DemoPart>,
    /// A file that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// How long it took to hash it, which is part of the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest_ms: Option<f64>,
    /// How long its disk took: no part of the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fsync_ms: Option<f64>,
    /// Whether the source's system has taken in that all is stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_told: Option<bool>,
    /// What was counted of a migration by QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<Counters>,
}

/// What only `demo` has to say.
#[derive(Clone, Debug, Serialize)]
pub struct DemoPart {
    pub seed: u64,
    pub transport: &'static str,
    /// How writes were tracked.
    pub tracking: &'static str,
    pub random_bytes: u64,
    pub text_bytes: u64,
    pub zeroed_bytes: u64,
    pub never_touched_bytes: u64,
    /// Of everything that was filled in, before the writers began.
    pub ram_digest: String,
    pub fill_ms: f64,
    pub writers: usize,
    pub dirty_rate_asked_mib_s: f64,
    /// What the writers got to write, on the average, while they ran.
    pub dirty_rate_mib_s: f64,
    pub pages_written: u64,
    /// Whether the writers ran on at the source after the end.
    pub guest_runs_on: bool,
    /// What the target's process said at its end.
    pub target: Option<TargetPart>,
}

/// The last line of the target's process of `demo`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TargetPart {
    pub pid: u32,
    pub outcome: End,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub verified: bool,
    /// Writers whose last write was found in RAM, as the device state has it.
    pub writers_checked: usize,
    pub recv_syscalls: u64,
    pub cpu_s: f64,
    pub cpus: Vec<Option<usize>>,
    pub remarks: Vec<String>,
}

/// [`DowntimeParts`], in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PartsMs {
    pause_ms: f64,
    ship_ms: f64,
    load_ms: f64,
    run_ms: f64,
}

impl From<DowntimeParts> for PartsMs {
    fn from(parts: DowntimeParts) -> PartsMs {
        let DowntimeParts { pause, ship, load, run } = parts;
        PartsMs { pause_ms: ms(pause), ship_ms: ms(ship), load_ms: ms(load), run_ms: ms(run) }
    }
}

pub fn verify_word(verify: Verify) -> &'static str {
    match verify {
        Verify::Off => "off",
        Verify::Wire => "wire",
        Verify::Full => "full",
    }
}

impl Report {
    /// Of something that ended before there was a migration.
    pub fn early(command: &'static str, outcome: End, error: Option<String>) -> Report {
        Report {
            event: "report",
            command,
            outcome,
            error,
            session: None,
            settle: None,
            verify: verify_word(Verify::Off),
            verified: false,
            checked: None,
            ram_bytes: 0,
            payload_bytes: 0,
            wire_bytes: 0,
            zero_bytes: 0,
            untouched_bytes: 0,
            state_bytes: 0,
            rounds: 0,
            channels: 0,
            total_ms: 0.0,
            downtime_ms: 0.0,
            downtime_expected_ms: None,
            downtime_parts: None,
            throughput_gib_s: 0.0,
            cpu_s: 0.0,
            send_syscalls: None,
            recv_syscalls: None,
            cpus: Vec::new(),
            remarks: Vec::new(),
            mended: None,
            by_reference: None,
            encrypted: None,
            convergence: None,
            demo: None,
            file: None,
            digest_ms: None,
            fsync_ms: None,
            source_told: None,
            counters: None,
        }
    }

    /// Of a source.
    pub fn of_source(command: &'static str, report: SourceReport, cpu: Duration) -> Report {
        let error = error_of(&report.outcome);
        let convergence = Some(Convergence::from(&report));
        Report {
            downtime_expected_ms: report.downtime_expected.map(ms),
            downtime_parts: Some(PartsMs::from(report.downtime_parts)),
            mended: Some(Mended::from(&report)),
            by_reference: Some(ByReference::from(&report.zero_copy)),
            encrypted: Some(Encrypted::from(report.tls)),
            convergence,
            session: Some(report.session.to_string()),
            verify: verify_word(report.verify),
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
            throughput_gib_s: throughput(&report.outcome, report.ram_bytes - report.untouched_bytes, report.total),
            cpu_s: cpu.as_secs_f64(),
            send_syscalls: Some(report.send_syscalls),
            cpus: report.cpus,
            remarks: report.remarks,
            ..Report::early(command, End::of(&report.outcome), error)
        }
    }

    /// Of a target.
    pub fn of_target(command: &'static str, report: TargetReport, cpu: Duration) -> Report {
        let error = error_of(&report.outcome);
        Report {
            mended: Some(Mended::from(&report)),
            verify: verify_word(report.verify),
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
            throughput_gib_s: throughput(&report.outcome, report.ram_bytes - report.untouched_bytes, report.total),
            cpu_s: cpu.as_secs_f64(),
            recv_syscalls: Some(report.recv_syscalls),
            cpus: report.cpus,
            remarks: report.remarks,
            ..Report::early(command, End::of(&report.outcome), error)
        }
    }
}

impl Report {
    /// Takes the time of the disk out of the times in which it is.
    pub fn take_fsync_out(&mut self) {
        let (fsync_ms, with_ms) = (self.fsync_ms.unwrap_or(0.0), self.total_ms);
        self.total_ms = (with_ms - fsync_ms).max(0.0);
        self.downtime_ms = (self.downtime_ms - fsync_ms).max(0.0);
        if self.total_ms > 0.0 {
            self.throughput_gib_s *= with_ms / self.total_ms;
        }
    }

    /// Adds what is known of a page that the kernel could not have when it was `doing` this, where that is the error: it met
    /// the page before a look at it could raise a bus error.
    pub fn explain_missing_page(&mut self, doing: &str, what: &str) {
        let is_missing = |error: &str| error.contains(doing) && error.contains(&format!("(os error {})", libc::EFAULT));
        if let Some(error) = self.error.as_mut().filter(|error| is_missing(error)) {
            error.push_str("; ");
            error.push_str(what);
        }
    }

    /// Says which threads did not get their CPU, where CPUs were asked for.
    pub fn note_cpus(&mut self, asked: Option<&Cpus>) {
        let missing: Vec<_> = self.cpus.iter().enumerate().filter(|(_, cpu)| cpu.is_none()).collect();
        if let (Some(_), false) = (asked, missing.is_empty()) {
            let channels: Vec<_> = missing.iter().map(|(channel, _)| channel.to_string()).collect();
            self.remarks.push(format!("not on the CPU asked for: the thread of channel {}", channels.join(", ")));
        }
    }
}

fn error_of(outcome: &Outcome) -> Option<String> {
    match outcome {
        Outcome::Completed => None,
        Outcome::Cancelled => Some("cancelled".to_owned()),
        Outcome::Failed(why) => Some(why.to_string()),
        Outcome::Uncertain(why) => Some(format!("uncertain: the other side may have taken over: {why}")),
    }
}

fn throughput(outcome: &Outcome, bytes: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if *outcome != Outcome::Completed || seconds == 0.0 {
        return 0.0;
    }
    bytes as f64 / (1u64 << 30) as f64 / seconds
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.outcome == End::Completed {
            let proof = match (self.checked, self.verified, self.verify) {
                // QEMU's wire has no digests.
                (Some(checked), ..) => checked,
                (None, true, "full") => "; every byte was compared, by digests of all of RAM on both sides",
                (None, true, _) => "; what landed is what was sent, by digests of every page",
                (None, false, _) => "; not verified",
            };
            writeln!(f, "completed{proof}")?;
        }
        if let Some(file) = &self.file {
            writeln!(f, "  file        {file}")?;
        }
        if let Some(settle) = &self.settle {
            writeln!(f, "uncertain; this asks the other side, which answers for a while: {settle}")?;
        }
        writeln!(
            f,
            "  RAM         {}: {} never touched, {} of zero pages, {} of data sent",
            human(self.ram_bytes),
            human(self.untouched_bytes),
            human(self.zero_bytes),
            human(self.payload_bytes)
        )?;
        write!(f, "  time        {:.0} ms", self.total_ms)?;
        if self.outcome == End::Completed {
            write!(f, ", {:.2} GiB/s", self.throughput_gib_s)?;
        }
        let channels = if self.channels == 1 { "channel" } else { "channels" };
        let rounds = if self.rounds == 1 { "round" } else { "rounds" };
        writeln!(f, " over {} {channels}, {} {rounds}", self.channels, self.rounds)?;
        if let (Some(digest), Some(fsync)) = (self.digest_ms, self.fsync_ms) {
            writeln!(
                f,
                "  disk        {digest:.0} ms to hash it, and {fsync:.0} ms more until all of it was on the disk"
            )?;
        }
        if let Some(demo) = &self.demo {
            demo.fmt_downtime(f, self)?;
        }
        if let Some(convergence) = &self.convergence {
            convergence.fmt(f)?;
        }
        if let Some(by_reference) = &self.by_reference {
            by_reference.fmt(f)?;
        }
        if let Some(encrypted) = &self.encrypted {
            encrypted.fmt(f)?;
        }
        if let Some(mended) = &self.mended {
            mended.fmt(f)?;
        }
        let calls = match (self.send_syscalls, self.recv_syscalls) {
            (Some(sends), Some(receives)) => format!("; {sends} system calls to send, {receives} to receive"),
            (Some(sends), None) => format!("; {sends} system calls to send"),
            (None, Some(receives)) => format!("; {receives} system calls to receive"),
            (None, None) => String::new(),
        };
        writeln!(f, "  cost        {:.2} s of CPU{calls}; {} on the wire", self.cpu_s, human(self.wire_bytes))?;
        if let Some(counters) = &self.counters {
            let Counters { main_bytes, channel_bytes, normal_pages, zero_pages, sync_packets, rounds: _ } = counters;
            let (main, channels) = (human(*main_bytes), human(*channel_bytes));
            write!(f, "  QEMU        {main} on the main connection, {channels} on channels; ")?;
            writeln!(f, "{normal_pages} pages with data, {zero_pages} of zeros, {sync_packets} SYNC packets")?;
        }
        if let Some(demo) = &self.demo {
            demo.fmt_guest(f)?;
        }
        self.remarks.iter().try_for_each(|remark| writeln!(f, "  remark      {remark}"))
    }
}

impl DemoPart {
    fn fmt_downtime(&self, f: &mut fmt::Formatter<'_>, report: &Report) -> fmt::Result {
        if report.downtime_ms == 0.0 {
            return writeln!(f, "  downtime    none: the guest never stood still");
        }
        let why = match report.verify {
            "full" => " (hashing all of RAM is in it; --verify wire leaves that out)",
            _ => "",
        };
        write!(f, "  downtime    {:.1} ms{why}", report.downtime_ms)?;
        match report.downtime_parts {
            Some(PartsMs { pause_ms, ship_ms, load_ms, run_ms }) if report.outcome == End::Completed => writeln!(
                f,
                ": {pause_ms:.1} to pause, {ship_ms:.1} to ship the rest, {load_ms:.1} to check and load, {run_ms:.1} to run"
            ),
            _ => writeln!(f),
        }
    }

    fn fmt_guest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pages_written > 0 {
            writeln!(
                f,
                "  guest       {} writes, {:.0} MiB/s of {:.0} asked for; tracked by {}",
                self.pages_written, self.dirty_rate_mib_s, self.dirty_rate_asked_mib_s, self.tracking
            )?;
        }
        match &self.target {
            Some(target) if target.outcome == End::Completed => writeln!(
                f,
                "  target      runs the guest; its device state agrees with its RAM for {} of {} writers",
                target.writers_checked, self.writers
            ),
            _ if self.guest_runs_on => writeln!(f, "  guest       runs on here, at the source"),
            _ => Ok(()),
        }
    }
}
