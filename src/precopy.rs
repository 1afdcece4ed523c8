#![forbid(unsafe_code)]
//! The policy of pre-copy: another round, switch over, or give up. Pure functions, no I/O, no clock.

use std::time::Duration;

/// What is asked of a migration.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// The longest the guest may stand still.
    pub downtime_limit: Duration,
    /// The most rounds before the guest is paused: then it is not converging.
    pub rounds_max: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { downtime_limit: Duration::from_millis(300), rounds_max: 64 }
    }
}

/// What is known when a round has been pushed.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Estimate {
    /// Rounds pushed so far.
    pub rounds: u32,
    /// Bytes harvested and not yet shipped, wherever they are queued.
    pub queued_bytes: u64,
    /// Bytes that are dirty now and not yet harvested.
    pub dirty_bytes: u64,
    /// Measured bytes per second of the link; 0 is unknown.
    pub rate: u64,
    /// What a switchover costs even if nothing is left: pause, state, load, run.
    pub fixed_cost: Duration,
}

impl Estimate {
    /// How long the guest would stand still if it were paused now; `None` while the rate is unknown and bytes are left.
    pub fn downtime(&self) -> Option<Duration> {
        let left = self.queued_bytes.saturating_add(self.dirty_bytes);
        if left == 0 {
            return Some(self.fixed_cost);
        }
        if self.rate == 0 {
            return None;
        }
        // At most 2^63 ns: more is as good as for ever.
        let ns = (u128::from(left) * 1_000_000_000 / u128::from(self.rate)).min(u128::from(u64::MAX / 2)) as u64;
        Some(self.fixed_cost.saturating_add(Duration::from_nanos(ns)))
    }
}

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Ship another round while the guest runs.
    AnotherRound,
    /// What is dirty would fit; what is queued before it does not. Let the queues run down, and look again: a round now
    /// would only push the same pages twice.
    Wait,
    /// Pause the guest and ship the rest.
    SwitchOver,
    /// The guest outruns the link, and the limit on rounds is reached.
    NotConverging,
}

/// Decides, after a round, what comes next.
///
/// ```
/// use pageferry::precopy::{decide, Decision, Estimate, Limits};
/// let left = Estimate { rounds: 1, dirty_bytes: 10 << 20, rate: 1 << 30, ..Estimate::default() };
/// assert_eq!(decide(&Limits::default(), &left), Decision::SwitchOver); // 10 ms fit into 300
/// let left = Estimate { dirty_bytes: 1 << 30, ..left };
/// assert_eq!(decide(&Limits::default(), &left), Decision::AnotherRound);
/// ```
pub fn decide(limits: &Limits, now: &Estimate) -> Decision {
    let fits = |estimate: &Estimate| estimate.downtime().is_some_and(|expected| expected <= limits.downtime_limit);
    if fits(now) {
        Decision::SwitchOver
    } else if now.queued_bytes > 0 && (now.rate == 0 || fits(&Estimate { queued_bytes: 0, ..*now })) {
        Decision::Wait
    } else if now.rounds >= limits.rounds_max {
        Decision::NotConverging
    } else {
        Decision::AnotherRound
    }
}

/// The bytes the link carries per second: a mean that forgets, weighted by the bytes behind each sample.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rate {
    bytes: f64,
    seconds: f64,
    /// A sample that is still too short to count.
    young: (f64, f64),
}

impl Rate {
    /// Samples older than about this many bytes no longer count.
    const MEMORY_BYTES: f64 = 256.0 * 1024.0 * 1024.0;
    /// A sample shorter than this says more about the scheduler, and about socket buffers, than about the link.
    const SAMPLE_SECONDS_MIN: f64 = 0.005;

    /// Adds what was shipped in a stretch of time in which the link was kept busy.
    pub fn add(&mut self, bytes: u64, time: Duration) {
        self.young.0 += bytes as f64;
        self.young.1 += time.as_secs_f64();
        let (bytes, seconds) = self.young;
        if seconds < Self::SAMPLE_SECONDS_MIN {
            return;
        }
        let keep = (1.0 - bytes / Self::MEMORY_BYTES).max(0.0);
        self.bytes = self.bytes * keep + bytes;
        self.seconds = self.seconds * keep + seconds;
        self.young = (0.0, 0.0);
    }

    /// Bytes per second; 0 while nothing is known. A short sample is better than none.
    pub fn bytes_per_second(&self) -> u64 {
        let (bytes, seconds) = if self.bytes > 0.0 { (self.bytes, self.seconds) } else { self.young };
        if seconds > 0.0 { (bytes / seconds) as u64 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_left_switches_over_even_when_the_rate_is_unknown() {
        assert_eq!(decide(&Limits::default(), &Estimate::default()), Decision::SwitchOver);
    }

    #[test]
    fn unknown_rate_with_bytes_left_ships_another_round() {
        let now = Estimate { dirty_bytes: 4096, ..Estimate::default() };
        assert_eq!(decide(&Limits::default(), &now), Decision::AnotherRound);
    }

    #[test]
    fn queues_run_down_before_another_round_is_begun_for_little() {
        let now = Estimate { queued_bytes: 1 << 30, dirty_bytes: 4096, rate: 1 << 30, ..Estimate::default() };
        assert_eq!(decide(&Limits::default(), &now), Decision::Wait);
        let now = Estimate { dirty_bytes: 1 << 30, ..now };
        assert_eq!(decide(&Limits::default(), &now), Decision::AnotherRound, "there is plenty to do");
        let now = Estimate { queued_bytes: 4096, dirty_bytes: 4096, ..Estimate::default() };
        assert_eq!(decide(&Limits::default(), &now), Decision::Wait, "nobody knows the link yet");
    }

    #[test]
    fn the_limit_on_rounds_ends_a_migration_that_does_not_converge() {
        let limits = Limits { rounds_max: 3, ..Limits::default() };
        let now = Estimate { rounds: 3, dirty_bytes: 1 << 40, rate: 1, ..Estimate::default() };
        assert_eq!(decide(&limits, &now), Decision::NotConverging);
        assert!(now.downtime().unwrap() > Duration::from_secs(1 << 30), "no overflow");
    }

    #[test]
    fn fixed_costs_count_against_the_limit() {
        let now = Estimate { fixed_cost: Duration::from_secs(1), ..Estimate::default() };
        assert_eq!(decide(&Limits::default(), &now), Decision::AnotherRound);
    }

    #[test]
    fn the_rate_forgets_old_samples() {
        let mut rate = Rate::default();
        rate.add(1 << 30, Duration::from_secs(10));
        rate.add(1 << 30, Duration::from_secs(1));
        assert_eq!(rate.bytes_per_second(), 1 << 30);
        rate.add(1 << 30, Duration::from_micros(1));
        assert_eq!(rate.bytes_per_second(), 1 << 30, "too short a sample says nothing yet");
    }
}
