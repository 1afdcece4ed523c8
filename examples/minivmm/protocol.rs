//! What the demo and its two VMM processes say to each other: JSON objects, one a line.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::device::Ticks;
use crate::guest::Config;
use crate::options::Shipping;
use crate::report::{Arrival, Departure};
use crate::with_mutants::Mutant;

/// To a VMM. Each is answered, in the end, by what is named here, or by [`Said::Error`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Order {
    /// Make a VM, fill its RAM, run its guest: [`Said::Running`].
    Boot { config: Config },
    /// Take a guest in: [`Said::Listening`], then [`Said::Received`].
    Receive,
    /// Send the guest away: [`Said::Progress`] now and then, then [`Said::Sent`].
    Send { to: String, how: Shipping, trial: Trial },
    /// Cancel what is under way. Not answered by itself.
    Cancel,
    /// Wait for some ticks of the guest: [`Said::Running`].
    Watch { ticks: u64 },
    /// Have the guest and the device check all RAM, or wait for the check that a guest begins with that has arrived:
    /// [`Said::Checked`].
    Check { anew: bool },
}

/// What is to go wrong.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Trial {
    /// Cancel when this time has gone by.
    pub cancel_after_us: Option<u64>,
    /// Cancel when the guest has been paused.
    pub cancel_while_paused: bool,
    /// Make a mistake with dirty bits.
    pub mutant: Option<Mutant>,
}

/// From a VMM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Said {
    Running { ticks: Ticks },
    Listening { addr: String },
    Progress(Line),
    Sent(Box<Departure>),
    Received(Box<Arrival>),
    Checked(CheckedPart),
    Error { error: String },
}

/// How far a migration is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    pub stage: String,
    pub rounds: u64,
    pub ram_bytes: u64,
    pub untouched_bytes: u64,
    pub pushed_bytes: u64,
    pub payload_bytes: u64,
    pub wire_bytes: u64,
    pub rate_bytes_s: u64,
    pub dirty_rate_bytes_s: u64,
    pub bytes_left: u64,
    pub throttle: u8,
}

/// What a check of all RAM has found: `ok`, or what is wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckedPart {
    pub guest_pages: u64,
    pub guest: String,
    pub device: String,
    pub ticks_lost: u64,
    pub ticks_doubled: u64,
    pub ms: f64,
}
