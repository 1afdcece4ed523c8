//! Who may be inside the guest: lets vCPU threads in, gets them out, and slows them down.
#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is wanted of the vCPUs, and where they are. One for all of them.
pub struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    running: bool,
    /// The throttle holds them.
    held: bool,
    ended: bool,
    /// How many threads were let in and have not come out.
    inside: usize,
    /// How much of the time they are held.
    percent: u8,
    /// Why a vCPU cannot go on: it stays out.
    broken: Option<String>,
}

/// The throttle's period, and the least that it lets the vCPUs run: a shorter slice would go by while they are let in.
/// Above 96 % the period grows instead.
const PERIOD: Duration = Duration::from_millis(5);
const SLICE_MIN: Duration = Duration::from_micros(200);
const PERCENT_MAX: u8 = 99;
/// The longest slice that is made up for.
const LATE_MAX: Duration = PERIOD;

impl Control {
    /// Everybody stays out.
    pub fn new() -> Control {
        let inner = Inner { running: false, held: false, ended: false, inside: 0, percent: 0, broken: None };
        Control { inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// For a vCPU's thread: waits to be let in; false if it is to end. `enter` runs before anybody may kick the thread
    /// out again, so that no kick is lost.
    pub fn wait_to_enter(&self, enter: impl FnOnce()) -> bool {
        let may_not = |inner: &mut Inner| !inner.ended && !inner.may_run();
        let mut inner = self.changed.wait_while(self.lock(), may_not).unwrap_or_else(PoisonError::into_inner);
        if inner.ended {
            return false;
        }
        enter();
        inner.inside += 1;
        true
    }

    /// For a vCPU's thread: it has come out, all of its port I/O is completed.
    pub fn left(&self) {
        self.lock().inside -= 1;
        self.changed.notify_all();
    }

    /// For a vCPU's thread inside: waits until then, or until it is wanted outside.
    pub fn wait_inside(&self, until: Instant) {
        let mut inner = self.lock();
        while inner.may_run() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// For a vCPU's thread inside: it cannot go on. Nobody is let in from now on.
    pub fn break_down(&self, why: String) {
        self.lock().broken.get_or_insert(why);
        self.changed.notify_all();
    }

    /// Why a vCPU cannot go on, if that has happened.
    pub fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    pub fn resume(&self) {
        self.lock().running = true;
        self.changed.notify_all();
    }

    /// Gets everybody out, and returns when they are. `kick` gets out who is inside.
    pub fn pause(&self, kick: &dyn Fn()) {
        let mut inner = self.lock();
        inner.running = false;
        kick();
        // Those who wait inside.
        self.changed.notify_all();
        drop(self.changed.wait_while(inner, |inner| inner.inside > 0).unwrap_or_else(PoisonError::into_inner));
    }

    /// As [`Control::pause`], for good.
    pub fn end(&self, kick: &dyn Fn()) {
        let mut inner = self.lock();
        inner.ended = true;
        inner.running = false;
        kick();
        drop(inner);
        self.changed.notify_all();
    }

    /// From now on the vCPUs run `100 - percent` of the time.
    pub fn throttle(&self, percent: u8) {
        self.lock().percent = percent.min(PERCENT_MAX);
        self.changed.notify_all();
    }

    /// The throttle's thread: holds the vCPUs and lets them go, until the end. What the guest does plays no part in it.
    pub fn run_throttle(&self, kick: &dyn Fn()) {
        let mut inner = self.lock();
        while !inner.ended {
            if inner.percent == 0 {
                inner.held = false;
                self.changed.notify_all();
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let percent = inner.percent;
            let slice = (PERIOD * u32::from(100 - percent) / 100).max(SLICE_MIN);
            inner.held = false;
            self.changed.notify_all();
            let begun = Instant::now();
            inner = self.wait_throttled(inner, percent, slice);
            inner.held = true;
            kick();
            self.changed.notify_all();
            // On a busy machine this thread may come late: what they ran too long they are held longer.
            let ran = begun.elapsed().min(LATE_MAX);
            inner = self.wait_throttled(inner, percent, ran * u32::from(percent) / u32::from(100 - percent));
        }
    }

    /// Waits as long as nothing about the throttle changes.
    fn wait_throttled<'a>(&self, inner: MutexGuard<'a, Inner>, percent: u8, time: Duration) -> MutexGuard<'a, Inner> {
        let same = |inner: &mut Inner| !inner.ended && inner.percent == percent;
        self.changed.wait_timeout_while(inner, time, same).unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn may_run(&self) -> bool {
        self.running && !self.held && self.broken.is_none()
    }
}
