#![forbid(unsafe_code)]
//! What the policy is told.

use std::time::Duration;

/// What is known when a round has been pushed, or while its bytes drain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Estimate {
    /// Rounds pushed so far.
    pub rounds: u32,
    /// Time since round 0 began.
    pub elapsed: Duration,
    /// Bytes harvested and not yet sent, in rings and workers' hands.
    pub queued_bytes: u64,
    /// Bytes sent that may not have landed at the target yet: an upper bound.
    pub in_flight_bytes: u64,
    /// Bytes that are dirty now and not yet harvested.
    pub dirty_bytes: u64,
    /// Bytes harvested and kept back for the paused round, and not dirty again. Those that are count as dirty: a page that
    /// counts twice makes the guest seem far from fitting, and costs rounds.
    pub deferred_bytes: u64,
    /// Measured bytes per second of the link, or of the harvest where that is slower; 0 is unknown.
    pub rate: u64,
    /// Bytes per second that the guest dirtied during the last round, slowed down as it was then.
    pub dirty_rate: u64,
    /// What a switchover costs even if nothing is left: pause, scan, state, load, run. Once it reaches the downtime
    /// limit no switchover fits any more, so a single slow hook should not be taken for the rule.
    pub fixed_cost: Duration,
}

impl Estimate {
    /// Bytes that the target does not have yet.
    pub fn left_bytes(&self) -> u64 {
        self.queued_bytes.saturating_add(self.in_flight_bytes).saturating_add(self.unharvested_bytes())
    }

    /// Bytes that no ring has seen: what the next round, or the paused one, is made of.
    pub(super) fn unharvested_bytes(&self) -> u64 {
        self.dirty_bytes.saturating_add(self.deferred_bytes)
    }

    /// How long the guest would stand still if it were paused now; `None` while the rate is unknown and bytes are left.
    pub fn downtime(&self) -> Option<Duration> {
        self.downtime_for(self.left_bytes(), 100)
    }

    /// The fixed cost, and `percent` of the time that so many bytes take.
    pub(super) fn downtime_for(&self, bytes: u64, percent: u64) -> Option<Duration> {
        if bytes == 0 {
            return Some(self.fixed_cost);
        }
        if self.rate == 0 {
            return None;
        }
        // At most 2^63 ns: more is as good as for ever.
        let ns = u128::from(bytes) * u128::from(percent) * 10_000_000 / u128::from(self.rate);
        let ns = ns.min(u128::from(u64::MAX / 2)) as u64;
        Some(self.fixed_cost.saturating_add(Duration::from_nanos(ns)))
    }
}
