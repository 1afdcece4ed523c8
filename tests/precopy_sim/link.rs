//! The rings, the link and what is on it.

use std::collections::VecDeque;
use std::time::Duration;

use super::guest::Random;

/// A link, with the rings before it.
#[derive(Debug)]
pub struct Link {
    /// Bytes per second, on average.
    pub rate: f64,
    /// The rate varies by so much, up and down; 0.3 is 30 %.
    pub noise: f64,
    pub latency_ns: u64,
    /// Bytes in the rings.
    pub queued: u64,
    /// What was sent: when, and how many bytes.
    flight: VecDeque<(u64, u64)>,
    /// The rate of the moment, and how long it lasts.
    factor: f64,
    factor_until_ns: u64,
    due: f64,
    pub sent: u64,
    pub busy: Duration,
    random: Random,
}

impl Link {
    pub fn new(rate: u64, noise: f64, latency: Duration, seed: u64) -> Link {
        Link {
            rate: rate as f64,
            noise,
            latency_ns: latency.as_nanos() as u64,
            queued: 0,
            flight: VecDeque::new(),
            factor: 1.0,
            factor_until_ns: 0,
            due: 0.0,
            sent: 0,
            busy: Duration::ZERO,
            random: Random(seed ^ 0x11),
        }
    }

    /// Carries what it can from `now_ns` on.
    pub fn run(&mut self, now_ns: u64, ns: u64) {
        if now_ns >= self.factor_until_ns {
            self.factor = 1.0 + self.noise * (2.0 * self.random.share() - 1.0);
            self.factor_until_ns = now_ns + self.random.between(1e6, 20e6) as u64;
        }
        let room = self.rate * self.factor * ns as f64 / 1e9;
        let bytes = (self.due + room).min(self.queued as f64);
        if self.queued > 0 {
            self.busy += Duration::from_nanos((ns as f64 * (bytes / (self.due + room))) as u64);
        }
        // A busy link carries the fraction of a byte later; an idle one saves nothing up.
        self.due = if self.queued as f64 > bytes { self.due + room - bytes.floor() } else { 0.0 };
        let bytes = bytes as u64;
        self.queued -= bytes;
        self.sent += bytes;
        if bytes > 0 {
            self.flight.push_back((now_ns, bytes));
        }
        // The source learns that they landed one latency later than they do.
        while self.flight.front().is_some_and(|(at, _)| at + 2 * self.latency_ns <= now_ns) {
            self.flight.pop_front();
        }
    }

    /// As far as the source knows.
    pub fn in_flight(&self) -> u64 {
        self.flight.iter().map(|(_, bytes)| bytes).sum()
    }
}
