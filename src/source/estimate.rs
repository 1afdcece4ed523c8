#![forbid(unsafe_code)]
//! What the policy is told, and everybody else is shown: measurements, and what is left to ship.

use crate::precopy::Estimate;
use crate::source::driver::Driver;
use crate::units::ChannelId;
use crate::wire::control::LanePong;

impl Driver<'_> {
    /// Takes note of what was sent since the last look, and how long that took.
    pub fn sample_rate(&mut self) {
        self.gauge.sample(&self.progress.channels());
    }

    /// What is known now, with so much dirty that has not been harvested.
    pub fn estimate(&self, dirty_bytes: u64) -> Estimate {
        let deferred = self.scanner.as_ref().map_or(0, |scanner| scanner.deferred_bytes());
        let returned = self.losses.returned_bytes.min(deferred);
        Estimate {
            rounds: self.session.round().0,
            elapsed: self.armed_at.elapsed(),
            // What lost channels gave back is in no ring, and no waiting drains it: the scanner keeps it back for the next
            // round, and counts it.
            queued_bytes: self.lanes.as_ref().map_or(0, |lanes| lanes.queued_bytes()),
            in_flight_bytes: self.in_flight_bytes(),
            dirty_bytes,
            // What was dirty in each round so far is taken to be dirty again, and is counted once; what lost channels gave
            // back is not.
            deferred_bytes: (deferred - returned).saturating_sub(dirty_bytes) + returned,
            rate: self.gauge.rate(),
            dirty_rate: self.dirty_rate,
            fixed_cost: self.gauge.fixed_cost(),
        }
    }

    /// Bytes that were sent and that the target had not read when it last said how far it is: never too few, and exact
    /// where nothing was sent since.
    pub fn in_flight_bytes(&self) -> u64 {
        (0..usize::from(self.settings.channels)).map(|index| self.sent_and_landed(index)).map(|(s, l)| s - l).sum()
    }

    /// Bytes that a channel has sent over its present connection, and how many of them the target says it has read. What it
    /// says counts no further than what was sent: numbers that it makes up are no progress.
    pub fn sent_and_landed(&self, index: usize) -> (u64, u64) {
        let sent = self.lanes.as_ref().map_or(0, |lanes| lanes.sent_bytes(index, &self.progress));
        (sent, self.pong(index).map_or(0, |pong| pong.bytes).min(sent))
    }

    /// What the target said last of the present connection of a channel.
    pub fn pong(&self, index: usize) -> Option<&LanePong> {
        let channel = ChannelId(index as u8);
        let generation = self.session.generation(channel);
        self.pongs.iter().find(|pong| pong.channel == channel && pong.generation == generation)
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
