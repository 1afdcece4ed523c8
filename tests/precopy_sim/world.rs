//! A migration: the shipped policy, a driver that does as it says, a guest and a link.
//!
//! Time goes in steps of 100 us at most. The driver is that of the library in small: it harvests chunk by chunk, pushes
//! as the rings have room, asks the policy when a round is pushed, and counts as the library's dirty sources do.

use std::time::Duration;

use pageferry::precopy::{Decision, Estimate, Limits, Precopy, Rate, Throttled, Why};

use super::guest::{Guest, PAGE, Writer};
use super::link::Link;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

const STEP_NS: u64 = 100_000;
/// Pages that are harvested at once, and what that takes: 2 ms a GiB.
const CHUNK_PAGES: usize = 512;
const CHUNK_NS: u64 = 4_000;
/// Bytes in the rings at the most.
const QUEUE_BYTES: u64 = 16 * MIB;
/// The guest writes on while its vCPUs are being stopped, and after they were let go until the next try.
const STOPPING_NS: u64 = 200_000;
const RESUMED_NS: u64 = 20_000_000;
/// Rounds in a row a page must have been dirty to be kept back.
const HOT_ROUNDS: u8 = 3;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Scene {
    pub ram_bytes: u64,
    pub writers: Vec<Writer>,
    pub link_rate: u64,
    pub link_noise: f64,
    pub latency: Duration,
    /// The link's rate while the guest is paused, as a share of what it is otherwise, try by try; the last one stays.
    pub paused_link: Vec<f64>,
    pub fixed_cost: Duration,
    pub limits: Limits,
    /// Whether pages that are dirty in each round are kept back.
    pub defers: bool,
    /// Whether a page that was kept back and is dirty again counts twice.
    pub counts_twice: bool,
    /// Whether the VMM can slow its guest down.
    pub hook_works: bool,
    pub seed: u64,
}

impl Default for Scene {
    fn default() -> Scene {
        Scene {
            ram_bytes: 512 * MIB,
            writers: Vec::new(),
            link_rate: GIB,
            link_noise: 0.0,
            latency: Duration::from_micros(50),
            paused_link: vec![1.0],
            fixed_cost: Duration::from_millis(1),
            limits: Limits::default(),
            defers: false,
            counts_twice: false,
            hook_works: true,
            seed: 1,
        }
    }
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Trip {
    /// `None` if it switched over.
    pub gave_up: Option<Why>,
    /// Why it switched over although the rest did not fit.
    pub forced: Option<Why>,
    pub rounds: u32,
    pub sent: u64,
    /// From the start to the pause or the giving up.
    pub precopy: Duration,
    pub downtime: Duration,
    /// Downtimes of the tries before the last.
    pub overruns: Vec<Duration>,
    /// The throttle after each change of it.
    pub throttles: Vec<u8>,
    /// How many times the policy was asked.
    pub asked: u64,
    pub throttled: Throttled,
}

struct World {
    scene: Scene,
    now_ns: u64,
    guest: Guest,
    link: Link,
    policy: Precopy,
    rate: Rate,
    sampled: (u64, Duration),
    rounds: u32,
    dirty_rate: u64,
    /// Rounds in a row that each page was dirty in.
    streaks: Vec<u8>,
    kept_pages: u64,
    throttles: Vec<u8>,
    asked: u64,
}

impl Scene {
    pub fn run(&self) -> Trip {
        let pages = (self.ram_bytes / PAGE) as usize;
        World {
            now_ns: 0,
            guest: Guest::new(self.ram_bytes, self.writers.clone(), self.seed),
            link: Link::new(self.link_rate, self.link_noise, self.latency, self.seed),
            policy: Precopy::new(self.limits),
            rate: Rate::default(),
            sampled: (0, Duration::ZERO),
            rounds: 0,
            dirty_rate: 0,
            streaks: vec![0; pages],
            kept_pages: 0,
            throttles: Vec::new(),
            asked: 0,
            scene: self.clone(),
        }
        .run()
    }
}

impl World {
    fn run(mut self) -> Trip {
        let mut overruns = Vec::new();
        self.round();
        loop {
            let decision = self.ask();
            match decision {
                Decision::AnotherRound => self.round(),
                Decision::Wait => self.advance(STEP_NS, true),
                Decision::GiveUp(why) => {
                    let at = self.now_ns;
                    return self.trip(Some(why), at, Duration::ZERO, overruns);
                }
                Decision::SwitchOver => {
                    let paused_at = self.now_ns;
                    let downtime = self.switch_over(overruns.len());
                    if downtime <= self.scene.limits.downtime_limit || !self.policy.overran(downtime) {
                        return self.trip(None, paused_at, downtime, overruns);
                    }
                    overruns.push(downtime);
                    self.rounds += 2;
                    self.advance(RESUMED_NS, true);
                }
            }
        }
    }

    fn trip(self, gave_up: Option<Why>, at_ns: u64, downtime: Duration, overruns: Vec<Duration>) -> Trip {
        Trip {
            gave_up,
            forced: self.policy.forced(),
            rounds: self.rounds,
            sent: self.link.sent,
            precopy: Duration::from_nanos(at_ns),
            downtime,
            overruns,
            throttles: self.throttles,
            asked: self.asked,
            throttled: self.policy.summary(),
        }
    }

    /// Lets time pass.
    fn advance(&mut self, ns: u64, guest_runs: bool) {
        let until = self.now_ns + ns;
        while self.now_ns < until {
            let step = STEP_NS.min(until - self.now_ns);
            if guest_runs {
                self.guest.run(step);
            }
            self.link.run(self.now_ns, step);
            self.now_ns += step;
        }
    }

    fn ask(&mut self) -> Decision {
        self.asked += 1;
        let (sent, busy) = (self.link.sent, self.link.busy);
        self.rate.add(sent - self.sampled.0, busy - self.sampled.1);
        self.sampled = (sent, busy);
        let verdict = self.policy.decide(&self.estimate());
        if verdict.throttle != self.guest.throttle {
            self.throttles.push(verdict.throttle);
            if self.scene.hook_works {
                self.guest.throttle = verdict.throttle;
            }
            self.policy.throttled(self.scene.hook_works);
        }
        verdict.decision
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rounds: self.rounds,
            elapsed: Duration::from_nanos(self.now_ns),
            queued_bytes: self.link.queued,
            in_flight_bytes: self.link.in_flight(),
            dirty_bytes: self.guest.dirty_pages * PAGE,
            deferred_bytes: self.deferred_pages() * PAGE,
            rate: self.rate.bytes_per_second(),
            dirty_rate: self.dirty_rate,
            // Measured, so the latency of the messages of a hand-over is in it.
            fixed_cost: self.scene.fixed_cost + self.scene.latency,
        }
    }

    fn deferred_pages(&self) -> u64 {
        let twice = if self.scene.counts_twice { 0 } else { self.guest.dirty_kept_pages };
        self.kept_pages - twice
    }

    fn round(&mut self) {
        let begun_ns = self.now_ns;
        let budget_pages = if self.scene.defers { self.policy.defer_budget_bytes(&self.estimate()) / PAGE } else { 0 };
        for first in (0..self.guest.kept.len()).step_by(CHUNK_PAGES) {
            self.advance(CHUNK_NS, true);
            let mut pages = 0;
            for page in first..self.guest.kept.len().min(first + CHUNK_PAGES) {
                pages += u64::from(self.harvest(page, budget_pages));
            }
            while self.link.queued + pages * PAGE > QUEUE_BYTES {
                self.advance(STEP_NS, true);
            }
            self.link.queued += pages * PAGE;
        }
        self.rounds += 1;
        let ns = (self.now_ns - begun_ns).max(1_000_000);
        self.dirty_rate = self.guest.dirty_pages * PAGE * 1_000_000 / (ns / 1000);
    }

    /// Takes a page's dirty bit; whether the page travels now. It is kept back when it was dirty in each of the last
    /// rounds, and no longer when it was not dirty in this one.
    fn harvest(&mut self, page: usize, budget_pages: u64) -> bool {
        let (dirty, kept) = (self.guest.take(page), self.guest.kept[page]);
        self.streaks[page] = if dirty { self.streaks[page].saturating_add(1) } else { 0 };
        let others = self.kept_pages - u64::from(kept);
        self.guest.kept[page] = self.streaks[page] > HOT_ROUNDS && others < budget_pages;
        self.kept_pages = others + u64::from(self.guest.kept[page]);
        (dirty || kept) && !self.guest.kept[page]
    }

    /// Pauses the guest and ships the rest; how long that took.
    fn switch_over(&mut self, tries: usize) -> Duration {
        self.advance(STOPPING_NS, true);
        let paused_ns = self.now_ns;
        let mut pages = 0;
        for page in 0..self.guest.kept.len() {
            pages += u64::from(self.harvest(page, 0));
        }
        self.link.queued += pages * PAGE;
        let rate = self.link.rate;
        let paused_link = &self.scene.paused_link;
        self.link.rate *= paused_link[tries.min(paused_link.len() - 1)];
        while self.link.queued > 0 {
            self.advance(STEP_NS, false);
        }
        self.link.rate = rate;
        self.advance(self.link.latency_ns + self.scene.fixed_cost.as_nanos() as u64, false);
        Duration::from_nanos(self.now_ns - paused_ns)
    }
}
