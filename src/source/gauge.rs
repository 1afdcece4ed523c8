#![forbid(unsafe_code)]
//! What the policy goes by, as it is measured: the link's rate, what is on its way, and what a hand-over costs beside
//! the bytes.

use std::time::{Duration, Instant};

use crate::precopy::Rate;
use crate::progress::ChannelCounts;

/// What the VMM's hooks are taken to cost until an attempt to hand over has shown it: pause, save_state, load_state, run.
/// Not more than a part of a small limit, which a guess alone must not keep anybody from.
const HOOKS_ALLOWANCE: Duration = Duration::from_millis(3);
const HOOKS_PART_OF_LIMIT: u32 = 4;
/// What an attempt has shown is believed up to this part of the limit: more would rule out every later attempt, for what
/// may have been a hiccup. Should it be the rule, these attempts show it, and the last one is accepted.
const SHOWN_PART_OF_LIMIT: u32 = 2;

/// How soon after an answer the target is asked again how far it is, while something hangs on it.
const ASK_AGAIN: Duration = Duration::from_millis(1);

/// Measurements of one migration.
#[derive(Debug)]
pub(super) struct Gauge {
    rate: Rate,
    /// Bytes of pages on the wire, nanoseconds that its channels were busy, one by one added up, and when that was.
    sampled: (u64, u64, Instant),
    /// Something was sent, and no page but zeros.
    only_zeros: bool,
    /// The Ping that was sent last, while no answer has come.
    pinged: Option<(u64, Instant)>,
    /// One way and back on the control connection: a mean that forgets, and believes a shorter time at once.
    round_trip: Option<Duration>,
    /// What it took to ask what is dirty, at the least: it takes longer the more there is, and at the end there is little.
    count: Duration,
    /// Dirty bytes harvested, and the time that took: where that is slower than the link, the link does not matter.
    harvest: Rate,
    /// What the hooks took, on both sides: a guess at first, then what the slowest attempt has shown.
    hooks: Duration,
    hooks_max: Duration,
}

impl Gauge {
    pub fn new(downtime_limit: Duration) -> Gauge {
        Gauge {
            rate: Rate::default(),
            sampled: (0, 0, Instant::now()),
            only_zeros: false,
            pinged: None,
            round_trip: None,
            count: Duration::ZERO,
            harvest: Rate::default(),
            hooks: HOOKS_ALLOWANCE.min(downtime_limit / HOOKS_PART_OF_LIMIT),
            hooks_max: downtime_limit / SHOWN_PART_OF_LIMIT,
        }
    }

    /// One Ping is timed at once: over a long way the next heartbeat comes before the answer to the last one.
    pub fn ping_sent(&mut self, nonce: u64) {
        self.pinged.get_or_insert((nonce, Instant::now()));
    }

    /// Leaves the Ping that is under way alone: its answer waits for a hook, on this side or the other, and says nothing
    /// about the way.
    pub fn forget_ping(&mut self) {
        self.pinged = None;
    }

    /// Forgets the Pings so far.
    pub fn forget_pings(&mut self) {
        (self.pinged, self.round_trip) = (None, None);
    }

    /// Whether the way to the target has been measured.
    pub fn knows_the_way(&self) -> bool {
        self.round_trip.is_some()
    }

    /// Whether the answer to a Ping is still to come.
    pub fn awaits_pong(&self) -> bool {
        self.pinged.is_some()
    }

    pub fn pong_came(&mut self, nonce: u64) {
        let Some((asked, at)) = self.pinged else { return };
        if asked != nonce {
            return; // not the answer to the one that is timed
        }
        self.pinged = None;
        let took = at.elapsed();
        let longer = self.round_trip.filter(|known| took > *known);
        self.round_trip = Some(longer.map_or(took, |known| known + (took - known) / 8));
    }

    /// When to ask the target again how far it is, if that is not on its way already.
    pub fn ask_at(&self) -> Option<Instant> {
        self.pinged.is_none().then(|| Instant::now() + ASK_AGAIN)
    }

    pub fn counted(&mut self, took: Duration) {
        self.count = if self.count.is_zero() { took } else { self.count.min(took) };
    }

    pub fn round_harvested(&mut self, bytes: u64, took: Duration) {
        // What a harvest takes that finds nothing is in the fixed cost.
        if bytes > 0 {
            self.harvest.add(bytes, took.saturating_sub(self.count));
        }
    }

    /// Takes note of how many bytes of pages were sent so far, and for how long channels were busy with it, one by one added
    /// up: a link that is idle says nothing of its rate. At least one channel was busy for no longer than all of them were
    /// together, and no longer than since the last look; where only some of them had something to send now and then, that
    /// makes the link slower than it is, never faster.
    pub fn sample(&mut self, counts: &ChannelCounts) {
        let &ChannelCounts { payload_bytes, zero_bytes, busy_ns, .. } = counts;
        self.only_zeros = zero_bytes > 0 && payload_bytes == 0;
        let (bytes, busy_before, at) = self.sampled;
        let (now, together) = (Instant::now(), Duration::from_nanos(busy_ns.saturating_sub(busy_before)));
        self.rate.add(payload_bytes.saturating_sub(bytes), together.min(now - at));
        self.sampled = (payload_bytes, busy_ns, now);
    }

    /// Bytes a second that can be harvested and sent, the one beside the other; 0 while it is unknown.
    pub fn rate(&self) -> u64 {
        match (self.rate.bytes_per_second(), self.harvest.bytes_per_second()) {
            (link, 0) => link,
            // Zeros take next to nothing of the link, and show as little of it.
            (0, harvest) if self.only_zeros => harvest,
            (link, harvest) => link.min(harvest),
        }
    }

    /// What an attempt took beside its bytes: the VMM's pause, and the wait for Loaded, in which Final and Loaded crossed
    /// the link.
    pub fn attempt_took(&mut self, pause: Duration, load: Duration) {
        let took = pause + load.saturating_sub(self.commit_cost());
        self.hooks = self.hooks.max(took.min(self.hooks_max));
    }

    /// Bytes that the link carries in this time; 0 while its rate is unknown.
    pub fn bytes_in(&self, time: Duration) -> u64 {
        let bytes = u128::from(self.rate()) * time.as_nanos() / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// From Commit to Running, should the target's `run` hook take no time.
    pub fn commit_cost(&self) -> Duration {
        self.round_trip.unwrap_or_default()
    }

    /// From Commit to Running with the target's `run` hook, which is taken for half of what all hooks cost: once Commit is
    /// out, nothing can be taken back any more.
    pub fn run_cost(&self) -> Duration {
        self.commit_cost() + self.hooks / 2
    }

    /// What a switchover costs even if nothing is left: what is dirty is counted twice and harvested twice, which finds
    /// nothing in about the time of a count; Final and Loaded, Commit and Running cross the link; hooks run.
    pub fn fixed_cost(&self) -> Duration {
        self.count * 4 + self.commit_cost() * 2 + self.hooks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_answer_that_comes_after_the_next_heartbeat_is_an_answer_all_the_same() {
        let mut gauge = Gauge::new(MS);
        for nonce in 1..=3 {
            gauge.ping_sent(nonce);
        }
        gauge.pong_came(1);
        assert!(gauge.knows_the_way() && !gauge.awaits_pong());
    }

    #[test]
    fn one_slow_attempt_does_not_rule_out_all_that_follow() {
        let limit = 100 * MS;
        let mut gauge = Gauge::new(limit);
        gauge.attempt_took(MS, 150 * MS);
        assert_eq!(gauge.fixed_cost(), limit / 2);
        gauge.attempt_took(MS, 2 * MS);
        assert_eq!(gauge.fixed_cost(), limit / 2, "and it is not forgotten");
    }

    #[test]
    fn the_way_of_final_and_loaded_counts_once() {
        let mut gauge = Gauge::new(1000 * MS);
        gauge.round_trip = Some(100 * MS);
        gauge.attempt_took(10 * MS, 120 * MS);
        assert_eq!(gauge.fixed_cost(), (2 * 100 + 30) * MS);
    }

    #[test]
    fn a_harvest_that_finds_nothing_says_nothing_of_the_rate() {
        let mut gauge = Gauge::new(MS);
        (0..100).for_each(|_| gauge.round_harvested(0, 10 * MS));
        gauge.rate.add(1 << 30, 1000 * MS);
        gauge.round_harvested(1 << 30, 1000 * MS);
        assert_eq!(gauge.rate(), 1 << 30);
    }
}
