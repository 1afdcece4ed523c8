#![forbid(unsafe_code)]
//! What the policy is told, and everybody else is shown: measurements, and what is left to ship.

use crate::precopy::Estimate;
use crate::source::driver::Driver;

impl Driver<'_> {
    /// Takes note of what was sent since the last look, and how long that took.
    pub fn sample_rate(&mut self) {
        let counts = self.progress.channels();
        self.gauge.sample(counts.wire_bytes, counts.busy_ns);
    }

    /// What is known now, with so much dirty that has not been harvested.
    pub fn estimate(&self, dirty_bytes: u64) -> Estimate {
        Estimate {
            rounds: self.session.round().0,
            elapsed: self.armed_at.elapsed(),
            queued_bytes: self.lanes.as_ref().map_or(0, |lanes| lanes.queued_bytes()),
            in_flight_bytes: self.in_flight_bytes(),
            dirty_bytes,
            // What was dirty in each round so far is taken to be dirty again, and is counted once.
            deferred_bytes: self.scanner.as_ref().map_or(0, |s| s.deferred_bytes()).saturating_sub(dirty_bytes),
            rate: self.gauge.rate(),
            dirty_rate: self.dirty_rate,
            fixed_cost: self.gauge.fixed_cost(),
        }
    }

    /// Bytes that were sent and that the target had not read when it last said how far it is: never too few, and exact
    /// where nothing was sent since.
    pub fn in_flight_bytes(&self) -> u64 {
        let of = |index: usize| {
            let sent = self.progress.channel(index).map_or(0, |counts| counts.wire_bytes);
            let read = self.pongs.iter().find(|pong| usize::from(pong.channel.0) == index).map_or(0, |pong| pong.bytes);
            sent.saturating_sub(read)
        };
        (0..usize::from(self.settings.channels)).map(of).sum()
    }

    /// Shows what the policy goes by.
    pub fn show(&self, now: &Estimate) {
        let left = now.left_bytes();
        self.progress.set(|c| &c.rate, now.rate);
        self.progress.set(|c| &c.bytes_left, left);
        self.progress.set(|c| &c.dirty_rate, now.dirty_rate);
        let expected = now.downtime().map_or(u64::MAX, |d| d.as_micros() as u64);
        self.progress.set(|c| &c.expected_downtime_us, expected);
    }
}
