//! The device that the guest talks to through ports: it counts ticks, misses none, and asks for checks.
#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::now_ns;
use crate::guest::port;

/// What the device is: travels with the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// The last tick of each vCPU.
    last: Vec<u32>,
    /// Ticks that never came, and ticks that came again, since the guest was made.
    pub ticks_lost: u64,
    pub ticks_doubled: u64,
    /// The check of each vCPU: none, or one that is wanted, under way or over.
    checks: Vec<Option<Check>>,
}

/// One vCPU's check of its pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Check {
    begun: bool,
    over: bool,
    /// Pages that hold what they should.
    pub good_pages: u64,
    pub bad: Option<BadPage>,
}

/// The first page that does not hold what it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BadPage {
    pub address: u32,
    pub found: u32,
    pub expected: u32,
}

impl std::fmt::Display for BadPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let BadPage { address, found, expected } = self;
        write!(f, "the page at {address:#x} holds {found:#010x} and not {expected:#010x}")
    }
}

/// When ticks came to this process, of all vCPUs together: nanoseconds of CLOCK_MONOTONIC, which all processes of a
/// machine share.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Ticks {
    pub count: u64,
    /// The first sign of life: a tick, or the guest's question whether to check itself.
    pub first_ns: u64,
    pub last_ns: u64,
    /// The longest time between two ticks since [`Device::mark`].
    pub longest_gap_ns: u64,
}

impl Ticks {
    fn sign_of_life(&mut self, now: u64) {
        if self.first_ns == 0 {
            self.first_ns = now;
        }
    }
}

pub struct Device {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    state: DeviceState,
    ticks: Ticks,
    /// How many ticks somebody waits for.
    awaited: u64,
    /// The guest is gone: nobody need wait for it.
    gone: bool,
}

impl Device {
    pub fn new(vcpus: u64) -> Device {
        let vcpus = vcpus as usize;
        let state = DeviceState { last: vec![0; vcpus], ticks_lost: 0, ticks_doubled: 0, checks: vec![None; vcpus] };
        let inner = Inner { state, ticks: Ticks::default(), awaited: u64::MAX, gone: false };
        Device { inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// A vCPU has written to a port. False if there is no such port.
    pub fn out(&self, vcpu: usize, at: u16, value: u32) -> bool {
        let mut inner = self.lock();
        if at == port::TICK {
            inner.tick(vcpu, value);
            if inner.ticks.count == inner.awaited {
                self.changed.notify_all();
            }
            return true;
        }
        let inner = &mut *inner;
        let Some(check) = inner.state.checks[vcpu].as_mut() else { return false };
        match at {
            port::BAD_ADDRESS => check.bad = Some(BadPage { address: value, ..BadPage::default() }),
            port::BAD_FOUND => check.bad.get_or_insert_default().found = value,
            port::BAD_EXPECTED => check.bad.get_or_insert_default().expected = value,
            port::CHECKED => {
                check.good_pages = value.into();
                check.over = true;
                // The time that it took is no gap.
                inner.ticks.last_ns = now_ns();
                self.changed.notify_all();
            }
            _ => return false,
        }
        true
    }

    /// What a vCPU is to do: the answer to a read of the command port.
    pub fn command(&self, vcpu: usize) -> u32 {
        let mut inner = self.lock();
        match &mut inner.state.checks[vcpu] {
            Some(check) if !check.begun => {
                check.begun = true;
                // A guest that was stopped between its tick and this question shows here that it runs.
                inner.ticks.sign_of_life(now_ns());
                1
            }
            _ => 0,
        }
    }

    /// Has every vCPU check its pages after its next tick.
    pub fn ask_for_check(&self) {
        self.lock().state.checks.fill(Some(Check::default()));
    }

    /// Waits until all have. What is missing after `patience` is not over.
    pub fn await_check(&self, patience: Duration) -> Vec<Check> {
        let mut inner = self.lock();
        let is_over = |check: &Option<Check>| check.is_some_and(|check| check.over);
        let pending = |inner: &mut Inner| !inner.state.checks.iter().all(is_over);
        inner = self.wait(inner, patience, pending);
        inner.state.checks.iter().map(|check| check.unwrap_or_default()).collect()
    }

    /// Waits until this many more ticks have come; false if they do not within `patience`.
    pub fn await_ticks(&self, more: u64, patience: Duration) -> bool {
        let mut inner = self.lock();
        let awaited = inner.ticks.count + more;
        inner.awaited = awaited;
        inner = self.wait(inner, patience, |inner| inner.ticks.count < awaited);
        inner.awaited = u64::MAX;
        inner.ticks.count >= awaited
    }

    /// The guest is gone: whoever waits for it waits no longer.
    pub fn give_up(&self) {
        self.lock().gone = true;
        self.changed.notify_all();
    }

    /// Forgets the longest gap, so that the next one found is of the time from now on.
    pub fn mark(&self) {
        self.lock().ticks.longest_gap_ns = 0;
    }

    pub fn ticks(&self) -> Ticks {
        self.lock().ticks
    }

    pub fn state(&self) -> DeviceState {
        self.lock().state.clone()
    }

    /// Becomes what it was at the source.
    pub fn load(&self, state: DeviceState) -> Result<(), String> {
        let mut inner = self.lock();
        if state.last.len() != inner.state.last.len() || state.checks.len() != inner.state.checks.len() {
            return Err("the device's state is of a machine with other vCPUs".to_owned());
        }
        inner.state = state;
        Ok(())
    }

    fn wait<'a>(
        &self,
        inner: MutexGuard<'a, Inner>,
        patience: Duration,
        mut pending: impl FnMut(&mut Inner) -> bool,
    ) -> MutexGuard<'a, Inner> {
        let pending = |inner: &mut Inner| !inner.gone && pending(inner);
        let waited = self.changed.wait_timeout_while(inner, patience, pending);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn tick(&mut self, vcpu: usize, number: u32) {
        let expected = self.state.last[vcpu].wrapping_add(1);
        // Which of the two it is shows in the sign of the distance: a tick lost is a number left out.
        match number.wrapping_sub(expected) as i32 {
            0 => {}
            ahead @ 1.. => self.state.ticks_lost += ahead as u64,
            behind => self.state.ticks_doubled += behind.unsigned_abs() as u64,
        }
        self.state.last[vcpu] = number;
        let now = now_ns();
        let ticks = &mut self.ticks;
        ticks.sign_of_life(now);
        if ticks.last_ns != 0 {
            ticks.longest_gap_ns = ticks.longest_gap_ns.max(now.saturating_sub(ticks.last_ns));
        }
        ticks.last_ns = now;
        ticks.count += 1;
    }
}
