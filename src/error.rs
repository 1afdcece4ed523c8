#![forbid(unsafe_code)]
//! Why a migration ended as it did: one enum, plain data, each variant with what a person needs to act.

use std::time::Duration;
use std::{error, fmt, io};

use crate::units::{BlockId, ChannelId, Generation};

/// What a hook of the VMM says went wrong.
pub type HookError = Box<dyn error::Error + Send + Sync>;

/// What the operating system said, kept as plain data so that it can be compared, sent and shown.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct OsReason {
    /// The error number, where there is one.
    pub errno: Option<i32>,
    /// The sentence that goes with it.
    pub text: String,
}

impl From<&io::Error> for OsReason {
    fn from(e: &io::Error) -> OsReason {
        OsReason { errno: e.raw_os_error(), text: e.to_string() }
    }
}

impl From<io::Error> for OsReason {
    fn from(e: io::Error) -> OsReason {
        OsReason::from(&e)
    }
}

impl fmt::Display for OsReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // io::Error already appends "(os error N)" where there is a number.
        f.write_str(&self.text)
    }
}

/// Why the rounds came to an end although the rest does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Why {
    /// The limit on rounds is reached.
    Rounds,
    /// The limit on their time is reached.
    Time,
    /// Rounds no longer shrink, and the guest is slowed down as far as it may be, or as is of any use.
    Stalled,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::Rounds => "the limit on rounds is reached",
            Why::Time => "the time limit for the rounds is reached",
            Why::Stalled => "rounds no longer shrink",
        })
    }
}

/// Why a migration failed, was cancelled by the other side, or is uncertain.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Failure {
    /// What was asked for is impossible.
    Config(String),
    /// The address could not be reached.
    Connect {
        /// The address as given.
        address: String,
        /// What the system said.
        reason: OsReason,
    },
    /// The address could not be listened on.
    Listen {
        /// The address as given.
        address: String,
        /// What the system said.
        reason: OsReason,
    },
    /// Connected, and no hands were shaken: one side does not trust the other, or speaks no TLS.
    Tls {
        /// The address as given.
        peer: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// The control connection failed.
    Control {
        /// What was being done on it.
        doing: &'static str,
        /// What the system said.
        reason: OsReason,
    },
    /// A data channel failed.
    Channel {
        /// The channel.
        channel: ChannelId,
        /// Its generation.
        generation: Generation,
        /// What happened on it.
        reason: String,
    },
    /// The peer said nothing for too long, or not what was waited for.
    Silent {
        /// What was waited for.
        waiting_for: &'static str,
        /// For how long.
        ms: u64,
    },
    /// All connections were lost, and the source did not come back, or could not, while the session was kept.
    NotResumed {
        /// For how long it was kept.
        ms: u64,
        /// How the control connection was lost.
        lost: String,
    },
    /// Data was outstanding and nothing moved for too long.
    Stalled {
        /// The channel that others wait for; `None` where the control connection is what has no room.
        channel: Option<ChannelId>,
        /// For how long nothing moved.
        ms: u64,
    },
    /// The target does not take this machine.
    Refused(String),
    /// The peer ended the migration and said why.
    Peer(String),
    /// The source asked to stop.
    CancelledBySource(String),
    /// The peer broke the protocol.
    Protocol(String),
    /// A hook of the VMM failed.
    Hook {
        /// Which hook.
        hook: &'static str,
        /// What it said.
        reason: String,
    },
    /// Dirty tracking failed.
    Dirty(String),
    /// Guest memory could not be mapped, read or made zero.
    Memory(String),
    /// A worker thread could not be started, or panicked.
    Worker(String),
    /// Source and target disagree on the contents of guest RAM.
    Digest {
        /// The first block that differs.
        block: BlockId,
        /// Its 2 MiB chunks that differ, where they are known: at the source, and for what was sent.
        chunks: Vec<u32>,
    },
    /// A hand-over would take longer than it may: the guest dirties memory faster than the link carries it, or what a
    /// hand-over costs beside the bytes is too much by itself.
    NotConverging {
        /// Which limit was met.
        why: Why,
        /// Rounds done.
        rounds: u32,
        /// Bytes left after the last of them.
        bytes_left: u64,
        /// Measured bytes per second of the link, or of the harvest where that is slower.
        rate: u64,
        /// Bytes per second that the guest dirtied in the last round.
        dirty_rate: u64,
        /// By how many percent it was slowed down, at the most.
        throttle: u8,
        /// What a hand-over costs beside the bytes, as measured.
        fixed_cost: Duration,
    },
    /// The target's `run` hook failed: no vCPU ran there, and none will.
    RunFailed(String),
    /// The target gave the guest up before it was told to run it.
    Discarded(String),
    /// The target was asked whether the guest runs there before it was told to run it, and has given it up for good.
    Fenced,
    /// Whoever listens there knows nothing of the session that was asked about: it is another process than the target,
    /// or has begun anew.
    UnknownSession,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Config(what) => f.write_str(what),
            Failure::Connect { address, reason } => {
                write!(f, "cannot connect to {address}: {reason}; is the target listening there?")
            }
            Failure::Listen { address, reason } => write!(f, "cannot listen on {address}: {reason}"),
            Failure::Tls { peer, reason } => write!(f, "no TLS with {peer}: {reason}"),
            Failure::Control { doing, reason } => write!(f, "the control connection failed while {doing}: {reason}"),
            Failure::Channel { channel, generation, reason } => {
                write!(f, "data channel {channel} (generation {generation}) failed: {reason}")
            }
            Failure::Silent { waiting_for, ms } => {
                write!(f, "waited for {ms} ms in vain for {waiting_for}")
            }
            Failure::NotResumed { ms, lost } => {
                write!(f, "the connection did not come back within the resume window of {ms} ms: {lost}")
            }
            Failure::Stalled { channel, ms } => {
                write!(f, "nothing moved for {ms} ms although data was waiting; ")?;
                match channel {
                    Some(channel) => write!(f, "channel {channel} is the one that lags"),
                    None => f.write_str("the peer does not read the control connection"),
                }
            }
            Failure::Refused(reason) => write!(f, "the target refused this machine: {reason}"),
            Failure::Peer(text) => write!(f, "the peer ended the migration: {text}"),
            Failure::CancelledBySource(reason) => write!(f, "the source cancelled: {reason}"),
            Failure::Protocol(what) => write!(f, "the peer broke the protocol: {what}"),
            Failure::Hook { hook, reason } => write!(f, "the VMM's {hook} hook failed: {reason}"),
            Failure::Dirty(reason) => write!(f, "dirty tracking failed: {reason}"),
            Failure::Memory(reason) => write!(f, "guest memory failed: {reason}"),
            Failure::Worker(reason) => f.write_str(reason),
            Failure::Digest { block, chunks } => {
                write!(f, "source and target disagree on the contents of RAM block {block}")?;
                match chunks.first() {
                    Some(first) => write!(f, ": {} chunks of 2 MiB differ, the first is chunk {first}", chunks.len()),
                    None => Ok(()),
                }
            }
            Failure::NotConverging { why, rounds, bytes_left, rate, dirty_rate, throttle, fixed_cost } => {
                let mib = |bytes: &u64| bytes >> 20;
                let bytes_in_fixed_cost = u128::from(*rate) * fixed_cost.as_nanos() / 1_000_000_000;
                let too_much = if u128::from(*bytes_left) > bytes_in_fixed_cost {
                    "the guest dirties memory faster than it can be shipped"
                } else {
                    "a hand-over takes too long even of a guest that is idle"
                };
                write!(
                    f,
                    "{too_much}: after {rounds} rounds {} MiB were left, the link \
                     carries {} MiB/s and the guest dirties {} MiB/s",
                    mib(bytes_left),
                    mib(rate),
                    mib(dirty_rate)
                )?;
                if *throttle > 0 {
                    write!(f, ", throttled by up to {throttle} %")?;
                }
                let fixed_ms = fixed_cost.as_secs_f64() * 1e3;
                write!(f, ", and a hand-over takes {fixed_ms:.1} ms beside that ({why}); allow a longer downtime, more bandwidth, or more throttling")
            }
            Failure::RunFailed(reason) => write!(f, "the target could not start the guest, which did not run there: {reason}"),
            Failure::Discarded(reason) => write!(f, "the target discarded the guest: {reason}"),
            Failure::Fenced => f.write_str("asked whether the guest runs here, the target gave it up for good"),
            Failure::UnknownSession => {
                f.write_str("who listens there knows nothing of this session: it is not the target, or not any more")
            }
        }
    }
}

impl error::Error for Failure {}

/// How a migration ended. It is never better than the truth.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// The guest runs at the target, and only there.
    Completed,
    /// Cancelled on request before the point of no return: the guest runs on at the source.
    Cancelled,
    /// The guest belongs to the source: it was resumed there if it had been paused. If it could not be, the failure is
    /// that of the `resume` hook.
    Failed(Failure),
    /// Commit was sent and no answer came: the target may run the guest. The source stays paused, and must not be
    /// resumed before the target is known not to run.
    Uncertain(Failure),
}

impl Outcome {
    /// The word for reports: `completed`, `cancelled`, `failed` or `uncertain`.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::Cancelled => "cancelled",
            Outcome::Failed(_) => "failed",
            Outcome::Uncertain(_) => "uncertain",
        }
    }

    /// Why, where it did not complete for a reason.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Outcome::Completed | Outcome::Cancelled => None,
            Outcome::Failed(why) | Outcome::Uncertain(why) => Some(why),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failure() {
            Some(why) => write!(f, "{}: {why}", self.word()),
            None => f.write_str(self.word()),
        }
    }
}
