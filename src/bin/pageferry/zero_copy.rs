//! Sending by reference, as an option; and what became of it, for the report.

use std::fmt;

use clap::ValueEnum;
use pageferry::ZeroCopy;
use pageferry::config::WhyCopied;
use pageferry::source::ZeroCopyReport;
use serde::Serialize;

use crate::sizes::human;

/// [`ZeroCopy`], as an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ZeroCopyArg {
    /// Over TCP to other hosts, unless the kernel copies after all
    Auto,
    /// Always, and fail where it cannot be had; for a test, as it costs more where the kernel copies after all
    On,
    /// Never
    Off,
}

impl From<ZeroCopyArg> for ZeroCopy {
    fn from(arg: ZeroCopyArg) -> ZeroCopy {
        match arg {
            ZeroCopyArg::Auto => ZeroCopy::Auto,
            ZeroCopyArg::On => ZeroCopy::On,
            ZeroCopyArg::Off => ZeroCopy::Off,
        }
    }
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
pub struct ByReference {
    pub zero_copy_bytes: u64,
    /// Of these, what the kernel copied after all.
    pub zero_copy_copied_bytes: u64,
    /// For each channel why it copied, or nothing.
    pub zero_copy_why_copied: Vec<Option<&'static str>>,
    /// The reasons that came up while pages travelled, and whose they are.
    #[serde(skip)]
    fell_back: Vec<(usize, WhyCopied)>,
}

impl From<&ZeroCopyReport> for ByReference {
    fn from(report: &ZeroCopyReport) -> ByReference {
        let fell_back = report.why_copied.iter().enumerate().filter_map(|(channel, why)| Some((channel, (*why)?)));
        ByReference {
            zero_copy_bytes: report.bytes,
            zero_copy_copied_bytes: report.copied_bytes,
            zero_copy_why_copied: report.why_copied.iter().map(|why| why.map(WhyCopied::word)).collect(),
            fell_back: fell_back.filter(|(_, why)| why.came_later()).collect(),
        }
    }
}

impl fmt::Display for ByReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.zero_copy_bytes > 0 {
            let copied = human(self.zero_copy_copied_bytes);
            writeln!(
                f,
                "  zero copy   {} by reference; the kernel copied {copied} after all",
                human(self.zero_copy_bytes)
            )?;
        }
        self.fell_back
            .iter()
            .try_for_each(|(channel, why)| writeln!(f, "  zero copy   not on channel {channel} to the end: {why}"))
    }
}
