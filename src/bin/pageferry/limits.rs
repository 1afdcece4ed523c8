//! What bounds a migration of a guest that keeps writing, as options; and what they did, for the report.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::SourceReport;
use pageferry::precopy::{AtLimit, Overrun};
use pageferry::source::SourceBuilder;
use serde::Serialize;

use crate::sizes::{human, human_rate, ms, parse_size};

/// Limits, and what happens at each.
#[derive(Clone, Debug, clap::Args)]
pub struct Limits {
    /// Milliseconds that the guest may stand still: it is paused when the rest would fit into them
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime_limit: u32,
    /// What happens when a pause takes longer than that, and the guest can still be kept
    #[arg(long, value_name = "HOW", default_value = "accept")]
    on_overrun: OnOverrun,
    /// Rounds after which --at-limit says what happens to a guest that outruns the link
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: u32,
    /// Seconds of rounds after which --at-limit says what happens [default: none]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// What happens at --max-rounds, at --timeout, and with a guest that outruns the link for good
    #[arg(long, value_name = "HOW", default_value = "give-up")]
    at_limit: AtLimitArg,
    /// Percent by which the guest may be slowed down when it outruns the link, 0 to 99; 0 is never. If that does not help,
    /// --at-limit says what happens
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=99))]
    throttle_max: u8,
    /// Bytes a second, such as 500M, that rounds may send while the guest runs; a paused guest is sent as fast as the link
    /// carries [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bandwidth_max: Option<u64>,
}

/// [`Overrun`], as an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum OnOverrun {
    /// The guest goes all the same
    Accept,
    /// The guest runs on here, and is tried again up to three times
    Retry,
}

/// [`AtLimit`], as an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum AtLimitArg {
    /// The migration fails; the guest runs on here
    GiveUp,
    /// The guest is paused for as long as the rest takes
    SwitchOver,
}

/// Tries after the first, with `--on-overrun retry`.
const RETRIES: u32 = 3;

impl Limits {
    pub fn set(&self, source: SourceBuilder) -> Result<SourceBuilder, String> {
        let source = source
            .downtime_limit(Duration::from_millis(self.downtime_limit.into()))
            .rounds_max(self.max_rounds)
            .throttle_max(self.throttle_max)
            .bandwidth_max(self.bandwidth_max.unwrap_or(0))
            .overrun(match self.on_overrun {
                OnOverrun::Accept => Overrun::Accept,
                OnOverrun::Retry => Overrun::Retry { tries: RETRIES },
            })
            .at_limit(match self.at_limit {
                AtLimitArg::GiveUp => AtLimit::GiveUp,
                AtLimitArg::SwitchOver => AtLimit::SwitchOver,
            });
        let Some(seconds) = self.timeout else { return Ok(source) };
        let time = Duration::try_from_secs_f64(seconds).map_err(|e| format!("--timeout {seconds}: {e}"))?;
        Ok(source.precopy_time_max(time))
    }
}

/// How rounds ended, where that took more than rounds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Convergence {
    /// Attempts to hand over that were withdrawn, and the time the guest stood still for them.
    pub overruns: u32,
    pub interrupted_ms: f64,
    /// The most that was kept back at once for the end, because it was dirty in every round.
    pub deferred_bytes: u64,
    /// How the guest was slowed down: at the most, for how long, and what it dirtied before and then.
    pub throttle_percent: u8,
    pub throttle_ms: f64,
    pub dirty_rate_before_bytes_s: u64,
    pub dirty_rate_throttled_bytes_s: u64,
}

impl From<&SourceReport> for Convergence {
    fn from(report: &SourceReport) -> Convergence {
        let throttled = report.throttling;
        Convergence {
            overruns: report.overruns,
            interrupted_ms: ms(report.interrupted),
            deferred_bytes: report.deferred_bytes,
            throttle_percent: throttled.highest,
            throttle_ms: ms(throttled.time),
            dirty_rate_before_bytes_s: throttled.dirty_rate_before,
            dirty_rate_throttled_bytes_s: throttled.dirty_rate_after,
        }
    }
}

impl fmt::Display for Convergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.overruns > 0 {
            let attempts = if self.overruns == 1 { "attempt" } else { "attempts" };
            writeln!(
                f,
                "  withdrawn   {} {attempts} over the limit, {:.1} ms in all",
                self.overruns, self.interrupted_ms
            )?;
        }
        if self.throttle_percent > 0 {
            writeln!(
                f,
                "  throttled   by up to {} % for {:.0} ms; it dirtied {} before and {} then",
                self.throttle_percent,
                self.throttle_ms,
                human_rate(self.dirty_rate_before_bytes_s),
                human_rate(self.dirty_rate_throttled_bytes_s)
            )?;
        }
        if self.deferred_bytes > 0 {
            writeln!(f, "  kept back   {} that were dirty in every round", human(self.deferred_bytes))?;
        }
        Ok(())
    }
}
