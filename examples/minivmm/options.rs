//! What a guest is made of, as options.
#![forbid(unsafe_code)]

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

/// Bytes for people.
pub fn human(bytes: u64) -> String {
    match bytes {
        0..0x40_0000 => format!("{} KiB", bytes >> 10),
        0x40_0000..0x1_0000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}
