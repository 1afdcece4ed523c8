#![forbid(unsafe_code)]
//! The policy of pre-copy: another round, wait, switch over, or give up; and how far the guest is slowed down for it.
//! No I/O, no clock: what is known comes in as an [`Estimate`], what is to be done goes out as a [`Verdict`].

mod estimate;
mod limits;
mod rate;

use std::time::Duration;

pub use crate::error::Why;
pub use estimate::Estimate;
pub use limits::{AtLimit, Limits, Overrun};
pub use rate::Rate;

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Ship another round while the guest runs.
    AnotherRound,
    /// What is dirty would fit; what is on its way before it does not. Let that run down, and ask again: a round now
    /// would only push the same pages twice.
    Wait,
    /// Pause the guest and ship the rest.
    SwitchOver,
    /// Leave the guest here.
    GiveUp(Why),
}

/// What [`Precopy::decide`] says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// What to do next.
    pub decision: Decision,
    /// How far the guest is to be slowed down from now on, in percent of its time.
    pub throttle: u8,
}

/// What slowing the guest down took, and what it brought: for reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Throttled {
    /// The most that was in force, in percent of the guest's time; 0 if it was never slowed down.
    pub highest: u8,
    /// Rounds that the guest was slowed down for.
    pub rounds: u32,
    /// Time before the pause that the guest was slowed down for.
    pub time: Duration,
    /// Bytes per second that the guest dirtied in the last round before it was slowed down. A guest that dirties the
    /// same pages again and again seems to dirty no more than the link carries.
    pub dirty_rate_before: u64,
    /// Bytes per second that it dirtied in the rounds in which it was slowed down, all together.
    pub dirty_rate_after: u64,
    /// Bytes of the round for which it was first slowed down.
    pub round_bytes_before: u64,
    /// Bytes that another round would have had to carry at the last decision.
    pub round_bytes_after: u64,
}

/// The policy and its memory. See [`Precopy::decide`].
///
/// ```
/// use pageferry::precopy::{Decision, Estimate, Limits, Precopy};
/// let mut precopy = Precopy::new(Limits::default());
/// let left = Estimate { rounds: 1, dirty_bytes: 1 << 30, rate: 1 << 30, ..Estimate::default() };
/// assert_eq!(precopy.decide(&left).decision, Decision::AnotherRound);
/// let left = Estimate { rounds: 2, dirty_bytes: 10 << 20, ..left };
/// assert_eq!(precopy.decide(&left).decision, Decision::SwitchOver); // 10 ms fit into 300
/// ```
#[derive(Clone, PartialEq, Debug)]
pub struct Precopy {
    limits: Limits,
    /// Rounds and time at the last decision.
    rounds: u32,
    elapsed: Duration,
    /// Whether a round after `rounds` makes sense; `None` until it is judged by its size.
    stalled: Option<bool>,
    /// The smallest that another round had to be, in bytes, since the last step of the throttle.
    smallest: u64,
    /// Rounds since then that had to be about as large, or larger.
    fruitless: u32,
    /// When the smallest, or that step, was.
    fruitless_since: Duration,
    /// What the guest's throttle should be, and what the VMM's hook said that it is.
    throttle: u8,
    throttle_in_force: u8,
    /// The hook failed, or the throttle went as far as it may and changed nothing: it stays where it is from now on.
    throttle_settled: bool,
    throttled: Throttled,
    /// Of the rounds in which the guest was slowed down: bytes dirtied, and time.
    throttled_dirty: (f64, f64),
    /// When the last round ended.
    round_ended: Duration,
    /// What the time to ship the rest is taken for, in percent of what the measured rate makes it.
    caution_percent: u64,
    /// Tries to switch over that took too long.
    overruns: u32,
    /// What ended the rounds, if it was not that the rest fits.
    forced: Option<Why>,
}

impl Precopy {
    /// A link's rate varies from one moment to the next. Simulated, with rates that vary by up to 30 percent: 9 of 1198
    /// switchovers took too long, by 18 percent at the most; at 100 it was 34, by 29 percent.
    const CAUTION_PERCENT: u64 = 110;
    /// What so many overruns have shown is no matter of the link's rate any more.
    const CAUTION_PERCENT_MAX: u64 = 1000;
    /// Fruitless rounds before the guest is slowed down. Not one: a burst of writes that happens to fall into a round is
    /// over in the next.
    const FRUITLESS_BEFORE_THROTTLE: u32 = 2;
    /// Fruitless rounds at the highest throttle after which it is seen whether it does anything.
    const FRUITLESS_AT_MAX: u32 = 2;
    /// Fruitless rounds, and the time they took, before the guest is given up on. Small rounds are over in milliseconds,
    /// and a guest that is busy for that long is no reason to give up.
    const FRUITLESS_MAX: u32 = 4;
    const FRUITLESS_TIME_MIN: Duration = Duration::from_secs(1);
    /// So little on its way is not waited for.
    const DRAINED_BYTES: u64 = 256 << 10;
    /// A throttle that makes vCPUs run and stand in turn acts over some of these turns.
    const STEP_TIME_MIN: Duration = Duration::from_millis(20);

    /// The policy at the start of round 0.
    pub fn new(limits: Limits) -> Precopy {
        Precopy {
            limits: Limits { throttle_max: limits.throttle_max.min(99), ..limits },
            rounds: 0,
            elapsed: Duration::ZERO,
            stalled: None,
            smallest: u64::MAX,
            fruitless: 0,
            fruitless_since: Duration::ZERO,
            throttle: 0,
            throttle_in_force: 0,
            throttle_settled: false,
            throttled: Throttled::default(),
            throttled_dirty: (0.0, 0.0),
            round_ended: Duration::ZERO,
            caution_percent: Self::CAUTION_PERCENT,
            overruns: 0,
            forced: None,
        }
    }

    /// Decides what comes next. To be asked when a round has been pushed, and again and again while it answers
    /// [`Decision::Wait`]; only a change of [`Estimate::rounds`] counts as another round.
    ///
    /// 1. Everything that is left fits into the downtime limit: switch over; but first let run down what is on its way, if
    ///    that is most of it and the guest dirties less meanwhile. That costs the guest nothing.
    /// 2. It would, or nothing is left, but for what is on its way already: wait. Either that lands or more becomes dirty;
    ///    a link on which nothing moves is noticed elsewhere.
    ///    So does a round that is smaller than what is still in the rings: pages would stand in them twice.
    /// 3. Otherwise another round, unless there were enough of them, or enough time has passed.
    /// 4. A round is *fruitless* if the round that must follow is not 10 % smaller than any before it. After two of them
    ///    the guest is slowed down, and further with each one more, until rounds shrink again. Each step leaves it half of
    ///    its time, or less if it dirties more than the link carries. As long as the guest dirties all of its hot set in
    ///    each round no step shows an effect: so that is no reason to stop before the last.
    /// 5. If rounds do not shrink at the highest throttle either, and are as large as before the first step, and the guest
    ///    dirties as much, it is let go.
    /// 6. After four fruitless rounds in a row and a second, with nothing more to try: give up.
    pub fn decide(&mut self, now: &Estimate) -> Verdict {
        self.account(now);
        let on_its_way = now.queued_bytes > 0 || now.in_flight_bytes > 0;
        let nothing_new = now.unharvested_bytes() == 0;
        let time_is_up = self.limits.precopy_time_max.is_some_and(|limit| now.elapsed >= limit);
        let decision = if self.fits(now, now.left_bytes()) {
            self.forced = None;
            if Self::draining_helps(now) && !time_is_up { Decision::Wait } else { Decision::SwitchOver }
        } else if time_is_up {
            self.end(Why::Time)
        } else if on_its_way && (now.rate == 0 || nothing_new || self.fits(now, now.unharvested_bytes())) {
            Decision::Wait
        } else if now.queued_bytes > now.unharvested_bytes() {
            // What is in the rings is older: pushed behind it, the next round would wait for its turn, and what the guest
            // dirties meanwhile would be a round again.
            Decision::Wait
        } else if now.rounds >= self.limits.rounds_max {
            self.end(Why::Rounds)
        } else if self.is_stalled(now) {
            self.end(Why::Stalled)
        } else {
            Decision::AnotherRound
        };
        Verdict { decision, throttle: self.throttle }
    }

    /// A try to hand over took this long, and the limit less. Whether the guest is to be resumed and rounds are to go on;
    /// otherwise the overrun is accepted. From then on more must be to spare before the next try. A try that was due to
    /// [`AtLimit::SwitchOver`] is always accepted: it was not expected to keep the limit.
    pub fn overran(&mut self, took: Duration) -> bool {
        if !self.may_retry() {
            return false;
        }
        self.overruns += 1;
        // As much more caution as would have been right this time, within reason.
        let limit_us = self.limits.downtime_limit.as_micros().max(1);
        let over_percent = (took.as_micros() * 100 / limit_us).clamp(125, 200) as u64;
        self.caution_percent = (self.caution_percent * over_percent / 100).min(Self::CAUTION_PERCENT_MAX);
        self.begin_count(self.elapsed, u64::MAX);
        true
    }

    /// Whether a try to hand over that takes too long would be followed by another one.
    pub fn may_retry(&self) -> bool {
        let tries = match self.limits.overrun {
            Overrun::Accept => 0,
            Overrun::Retry { tries } => tries,
        };
        self.forced.is_none() && self.overruns < tries
    }

    /// The VMM's hook was told the throttle of the last verdict: whether it did as told. If not, the throttle stays what
    /// it was.
    pub fn throttled(&mut self, works: bool) {
        if works {
            self.throttle_in_force = self.throttle;
            self.throttled.highest = self.throttled.highest.max(self.throttle);
        } else {
            self.throttle = self.throttle_in_force;
            self.throttle_settled = true;
        }
    }

    /// Bytes that may be kept back for the paused round: half of what fits into it, so that the other half is there for
    /// what happens to be dirty besides. Kept back they cost nothing as long as the guest dirties them again anyway.
    pub fn defer_budget_bytes(&self, now: &Estimate) -> u64 {
        let time = self.limits.downtime_limit.saturating_sub(now.fixed_cost);
        let bytes = time.as_nanos() * u128::from(now.rate) / 1_000_000_000 * 100 / u128::from(self.caution_percent);
        u64::try_from(bytes / 2).unwrap_or(u64::MAX)
    }

    /// What slowing the guest down took and brought.
    pub fn summary(&self) -> Throttled {
        let (bytes, seconds) = self.throttled_dirty;
        let dirty_rate_after = if seconds > 0.0 { (bytes / seconds) as u64 } else { 0 };
        Throttled { dirty_rate_after, ..self.throttled }
    }

    /// Why the last [`Decision::SwitchOver`] came although the rest did not fit; `None` if it did.
    pub fn forced(&self) -> Option<Why> {
        self.forced
    }

    /// Whether so many bytes can be shipped within the downtime limit.
    fn fits(&self, now: &Estimate, bytes: u64) -> bool {
        now.downtime_for(bytes, self.caution_percent).is_some_and(|expected| expected <= self.limits.downtime_limit)
    }

    /// Whether the guest would stand still mostly for bytes that move just as well while it runs.
    fn draining_helps(now: &Estimate) -> bool {
        let on_its_way = now.queued_bytes.saturating_add(now.in_flight_bytes);
        on_its_way > now.unharvested_bytes().max(Self::DRAINED_BYTES) && now.dirty_rate < now.rate / 2
    }

    fn end(&mut self, why: Why) -> Decision {
        match self.limits.at_limit {
            AtLimit::GiveUp => {
                self.throttle = 0;
                Decision::GiveUp(why)
            }
            AtLimit::SwitchOver => {
                self.forced = Some(why);
                Decision::SwitchOver
            }
        }
    }

    /// Keeps the books.
    fn account(&mut self, now: &Estimate) {
        if self.throttle_in_force > 0 {
            self.throttled.time += now.elapsed.saturating_sub(self.elapsed);
            self.throttled.round_bytes_after = now.unharvested_bytes();
        }
        self.elapsed = now.elapsed;
        if now.rounds != self.rounds {
            self.rounds = now.rounds;
            self.stalled = None;
            if self.throttle_in_force > 0 {
                let seconds = now.elapsed.saturating_sub(self.round_ended).as_secs_f64();
                self.throttled.rounds += 1;
                self.throttled_dirty.0 += now.dirty_rate as f64 * seconds;
                self.throttled_dirty.1 += seconds;
            }
            self.round_ended = now.elapsed;
        }
    }

    fn is_stalled(&mut self, now: &Estimate) -> bool {
        let stalled = self.stalled.unwrap_or_else(|| self.judge(now));
        self.stalled = Some(stalled);
        stalled
    }

    /// Judges by the size of the round that would follow whether it makes sense, and moves the throttle.
    fn judge(&mut self, now: &Estimate) -> bool {
        let next_bytes = now.unharvested_bytes();
        if next_bytes < tenth_less(self.smallest) {
            self.begin_count(now.elapsed, next_bytes);
            return false;
        }
        self.fruitless += 1;
        let fruitless_time = now.elapsed.saturating_sub(self.fruitless_since);
        let patience = if self.throttle == 0 { Self::FRUITLESS_BEFORE_THROTTLE } else { 1 };
        if self.can_throttle_more(now) {
            if self.fruitless >= patience && fruitless_time >= Self::STEP_TIME_MIN {
                self.throttle_more(now);
                self.begin_count(now.elapsed, next_bytes);
            }
            return false;
        }
        if self.throttle > 0 && !self.throttle_settled && self.fruitless >= Self::FRUITLESS_AT_MAX {
            self.throttle_settled = true;
            let before = &self.throttled;
            if now.dirty_rate > tenth_less(before.dirty_rate_before) && next_bytes > tenth_less(before.round_bytes_before) {
                self.throttle = 0;
            }
        }
        self.fruitless >= Self::FRUITLESS_MAX && fruitless_time >= Self::FRUITLESS_TIME_MIN
    }

    /// Nothing that the guest does matters if the fixed cost alone is too much; but where more is dirty than that, it may
    /// be what makes it so high.
    fn can_throttle_more(&self, now: &Estimate) -> bool {
        let bytes_count = now.downtime().is_none_or(|expected| expected / 2 > now.fixed_cost);
        let of_use = bytes_count || now.fixed_cost < self.limits.downtime_limit;
        !self.throttle_settled && self.throttle < self.limits.throttle_max && of_use
    }

    /// One step: so that the next round is half of this one, as far as the dirty rate tells. What is not visible, because
    /// the guest dirtied pages that were dirty already, is for the next step. A guest that outruns its link loses no more
    /// work by a large step than by a small one: the rounds are over that much sooner.
    fn throttle_more(&mut self, now: &Estimate) {
        if self.throttle == 0 {
            self.throttled.dirty_rate_before = now.dirty_rate;
            self.throttled.round_bytes_before = now.unharvested_bytes();
        }
        let share = u64::from(100 - self.throttle);
        let wanted = (u128::from(share) * u128::from(now.rate) / u128::from(now.dirty_rate.max(1)) / 2) as u64;
        let share = wanted.clamp(share / 4, share / 2).max(u64::from(100 - self.limits.throttle_max));
        self.throttle = 100 - share as u8;
    }

    /// What comes is measured by this.
    fn begin_count(&mut self, at: Duration, smallest: u64) {
        self.smallest = smallest;
        self.fruitless = 0;
        self.fruitless_since = at;
    }
}

fn tenth_less(n: u64) -> u64 {
    n - n / 10
}

#[cfg(test)]
mod tests;
