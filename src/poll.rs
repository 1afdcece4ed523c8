#![forbid(unsafe_code)]
//! The controllers' sleeper: an eventfd for the bell, and sockets and a time limit beside it.

use std::io;
use std::sync::Arc;

use crate::bell::{Bell, Sleeper, Slept, Waker};
use crate::sys::event::{EventFd, PollSet};

/// Sleeps in poll(2). The owner sets what else to watch before each wait, through [`PollSleeper::set`].
#[derive(Debug)]
pub struct PollSleeper(PollSet);

/// Wakes a [`PollSleeper`]. It keeps the eventfd open: a late wake never writes into a recycled descriptor.
#[derive(Clone, Debug)]
pub struct PollWaker(Arc<EventFd>);

impl PollSleeper {
    /// A bell whose owner sleeps in poll(2). Unlike a parked one it may move between threads.
    ///
    /// # Errors
    /// What eventfd(2) says.
    pub fn bell() -> io::Result<Bell<PollSleeper>> {
        Ok(Bell::new(PollSleeper(PollSet::new(Arc::new(EventFd::new()?)))))
    }

    /// What to watch besides the bell.
    pub fn set(&mut self) -> &mut PollSet {
        &mut self.0
    }
}

impl Sleeper for PollSleeper {
    type Waker = PollWaker;

    fn sleep(&mut self) -> Slept {
        if self.0.wait() { Slept::Elsewhere } else { Slept::Again }
    }

    fn waker(&self) -> PollWaker {
        PollWaker(self.0.event().clone())
    }
}

impl Waker for PollWaker {
    fn wake(&self) {
        self.0.signal();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bell::{Close, Wake};
    use std::time::Instant;

    #[test]
    fn a_ring_from_another_thread_ends_the_wait() {
        let mut bell = PollSleeper::bell().unwrap();
        let ringer = bell.ringer();
        let other = std::thread::spawn(move || ringer.ring());
        assert_eq!(bell.wait(), Wake::Rung);
        other.join().unwrap();
    }

    #[test]
    fn the_time_limit_ends_the_wait_elsewhere_and_an_abort_outlives_it() {
        let mut bell = PollSleeper::bell().unwrap();
        bell.sleeper().set().until(Instant::now());
        assert_eq!(bell.wait(), Wake::Elsewhere);
        bell.ringer().close(Close::Abort);
        assert_eq!(bell.wait(), Wake::Abort);
        assert_eq!(bell.wait(), Wake::Abort);
    }
}
