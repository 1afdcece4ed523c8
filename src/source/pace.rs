#![forbid(unsafe_code)]
//! A cap on the bandwidth of the rounds before the pause: what is pushed is paid for in time.

use std::time::{Duration, Instant};

/// How far what is pushed may run ahead of the clock: the workers need something to do between two looks at it.
const AHEAD: Duration = Duration::from_millis(10);

/// A cap of so many bytes a second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    /// When all that was pushed is paid for. Once that is past it no longer matters when: an idle time buys no burst.
    paid_at: Instant,
    /// Bytes found to be zeros so far, which cost the link nothing and are paid back.
    zero_bytes: u64,
}

impl Pace {
    pub fn new(bytes_per_second: u64, now: Instant) -> Pace {
        Pace { bytes_per_second: bytes_per_second.max(1), paid_at: now, zero_bytes: 0 }
    }

    /// When to ask again whether the next push may go, with so many bytes found to be zeros since the beginning; `None`
    /// if it may. Not long after `now`: what was pushed last may turn out to be zeros meanwhile.
    pub fn waits_until(&mut self, zero_bytes: u64, now: Instant) -> Option<Instant> {
        let back = self.cost(zero_bytes.saturating_sub(self.zero_bytes));
        self.zero_bytes = zero_bytes;
        self.paid_at = self.paid_at.checked_sub(back).unwrap_or(now);
        let earliest = self.paid_at.checked_sub(AHEAD).unwrap_or(self.paid_at);
        (earliest > now).then(|| earliest.min(now + AHEAD))
    }

    /// So much was pushed.
    pub fn pushed(&mut self, bytes: u64, now: Instant) {
        self.paid_at = self.paid_at.max(now) + self.cost(bytes);
    }

    fn cost(&self, bytes: u64) -> Duration {
        // No single push is larger than a batch: a year is more than enough.
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        Duration::from_nanos(ns.min(365 * 24 * 3600 * 1_000_000_000) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Pushes this many MiB, each as early as it may; how long that takes.
    fn takes(pace: &mut Pace, start: Instant, pushes: u64, zero_bytes: impl Fn(u64) -> u64) -> Duration {
        let mut now = start;
        for push in 0..pushes {
            while let Some(until) = pace.waits_until(zero_bytes(push), now) {
                now = until;
            }
            pace.pushed(MIB, now);
        }
        now - start
    }

    #[test]
    fn what_is_pushed_keeps_to_the_cap() {
        let start = Instant::now();
        let time = takes(&mut Pace::new(100 * MIB, start), start, 200, |_| 0);
        assert!((Duration::from_millis(1970)..=Duration::from_millis(2000)).contains(&time), "{time:?}");
    }

    #[test]
    fn zeros_cost_nothing() {
        let start = Instant::now();
        for cap in [100 * MIB, MIB / 4] {
            let time = takes(&mut Pace::new(cap, start), start, 200, |push| push * MIB);
            assert!(time < Duration::from_millis(50), "{time:?} at {cap} bytes a second");
        }
    }

    #[test]
    fn an_idle_time_buys_no_burst() {
        let start = Instant::now();
        let mut pace = Pace::new(100 * MIB, start);
        let later = start + Duration::from_secs(60);
        let time = takes(&mut pace, later, 100, |_| 0);
        assert!(time >= Duration::from_millis(970), "{time:?}");
    }
}
