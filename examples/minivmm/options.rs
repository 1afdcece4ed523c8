//! What a guest is made of, and how it is to travel, as options.
#![forbid(unsafe_code)]

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::ferry::Verify;
use crate::ferry::precopy::{AtLimit, Overrun};
use crate::guest::{Config, MIB, VCPUS_MAX};

#[derive(clap::Args, Clone, Debug)]
pub struct Machine {
    /// RAM of the guest, such as 512M or 2G (powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub ram: u64,
    /// MiB that its vCPUs write round and round, all together; 0 for an idle guest
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    pub hot: u64,
    /// vCPUs, 1 to 4
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=VCPUS_MAX))]
    pub vcpus: u64,
    /// MiB that they dirty a second, all together; 0 for as fast as they can
    #[arg(long, value_name = "MIB_S", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1 << 20))]
    pub dirty_rate: u64,
    /// Number from which the contents of RAM are derived
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
    /// Leave RAM zero where the guest's own words do not stand, instead of filling it with random bytes
    #[arg(long)]
    pub zero_ram: bool,
}

impl Machine {
    pub fn config(&self, dirty_ring: bool) -> Result<Config, String> {
        let config = Config {
            ram_bytes: self.ram,
            hot_bytes: self.hot.saturating_mul(MIB),
            vcpus: self.vcpus,
            dirty_rate: self.dirty_rate * MIB,
            seed: (!self.zero_ram).then_some(self.seed),
            dirty_ring,
        };
        config.check().map(|()| config)
    }
}

/// How a guest is to travel.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Shipping {
    /// Data channels, 1 to 255: each is a connection, and a thread on both sides
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    pub channels: u8,
    /// What proves that everything arrived, beside the guest's own check
    #[arg(long, value_name = "HOW", default_value = "wire")]
    pub verify: VerifyArg,
    /// Milliseconds that the guest may stand still: it is paused when the rest would fit into them
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub downtime_limit: u64,
    /// Percent of its time that a guest that outruns the link may be held back; 0 for never
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=99))]
    pub throttle_max: u8,
    /// Bytes a second, such as 500M, that may be sent while the guest runs [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub bandwidth_max: Option<u64>,
    /// Rounds before the guest is paused
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub max_rounds: u32,
    /// Seconds that rounds may go on before the guest is paused [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub timeout: Option<Duration>,
    /// What happens at these two limits, and with a guest that outruns the link for good
    #[arg(long, value_name = "WHAT", default_value = "give-up")]
    pub at_limit: AtLimitArg,
    /// What happens when the hand-over takes longer than the downtime limit
    #[arg(long, value_name = "WHAT", default_value = "retry")]
    pub on_overrun: OverrunArg,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
pub enum VerifyArg {
    /// Nothing but what guards each message
    Off,
    /// Digests of what was sent and of what landed
    Wire,
    /// Digests of all of RAM on both sides
    Full,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
pub enum AtLimitArg {
    /// The migration fails, and the guest runs on
    GiveUp,
    /// The guest is paused all the same, for as long as the rest takes
    SwitchOver,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
pub enum OverrunArg {
    /// It goes on
    Accept,
    /// The guest runs on at the source for now, and it is tried again, three times
    Retry,
}

impl From<VerifyArg> for Verify {
    fn from(how: VerifyArg) -> Verify {
        match how {
            VerifyArg::Off => Verify::Off,
            VerifyArg::Wire => Verify::Wire,
            VerifyArg::Full => Verify::Full,
        }
    }
}

impl From<AtLimitArg> for AtLimit {
    fn from(what: AtLimitArg) -> AtLimit {
        match what {
            AtLimitArg::GiveUp => AtLimit::GiveUp,
            AtLimitArg::SwitchOver => AtLimit::SwitchOver,
        }
    }
}

impl From<OverrunArg> for Overrun {
    fn from(what: OverrunArg) -> Overrun {
        match what {
            OverrunArg::Accept => Overrun::Accept,
            OverrunArg::Retry => Overrun::Retry { tries: 3 },
        }
    }
}

/// How vCPUs' writes are noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Tracking {
    /// KVM's dirty log: a bitmap for each memory slot
    Log,
    /// KVM's dirty rings: a list of pages for each vCPU
    Ring,
}

impl Tracking {
    pub fn word(self) -> &'static str {
        match self {
            Tracking::Log => "log",
            Tracking::Ring => "ring",
        }
    }
}

/// Parses `64M` or `2G`; without a unit it is bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match text[digits..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => 64,
    };
    let number: u64 = text[..digits].parse().unwrap_or(u64::MAX);
    let bytes = number.checked_mul(1u64.checked_shl(shift).unwrap_or(0)).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| format!("{text:?} is no size; write for example 64M or 2G"))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|e| format!("{e}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// Bytes for people.
pub fn human(bytes: u64) -> String {
    match bytes {
        0..0x40_0000 => format!("{} KiB", bytes >> 10),
        0x40_0000..0x1_0000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}
