//! eventfd and poll: how a controller sleeps on its bell and on its sockets at once.
// UNSAFETY: eventfd(2), poll(2), and the read and write of an eventfd are C calls.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{cvt, cvt_retry};

/// An eventfd: sticky, level-triggered, and never blocking.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new eventfd with a count of zero.
    ///
    /// # Errors
    /// What eventfd(2) says: too many open files, above all.
    pub fn new() -> io::Result<EventFd> {
        // SAFETY: takes no pointers; the fd it returns is new and ours alone.
        let fd = cvt(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }.into())?;
        // SAFETY: `fd` was just returned by eventfd and has no other owner.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    /// Adds one to the count. A full count (2^64 - 2) is as good as one more.
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: reads 8 bytes from a local; the fd is open for as long as self lives.
        let _ = cvt_retry(|| unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) } as i64);
    }

    /// Takes the count back to zero.
    pub fn drain(&self) {
        let mut count = 0u64;
        // SAFETY: writes 8 bytes into a local; the fd is open for as long as self lives.
        let _ = cvt_retry(|| unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) } as i64);
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What poll(2) found on one descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ready {
    /// There is something to read, or the peer has closed.
    pub readable: bool,
    /// There is room to write, or writing would fail at once.
    pub writable: bool,
}

/// A set of descriptors to wait for, an eventfd among them, and a time to wait until.
#[derive(Debug)]
pub struct PollSet {
    event: Arc<EventFd>,
    fds: Vec<libc::pollfd>,
    until: Option<Instant>,
}

impl PollSet {
    /// A set that holds the eventfd alone, and waits without limit.
    pub fn new(event: Arc<EventFd>) -> PollSet {
        let own = libc::pollfd { fd: event.raw(), events: libc::POLLIN, revents: 0 };
        // Room for one more, so that whoever waits for one socket allocates nothing later.
        let mut fds = Vec::with_capacity(2);
        fds.push(own);
        PollSet { event, fds, until: None }
    }

    /// The eventfd of this set.
    pub fn event(&self) -> &Arc<EventFd> {
        &self.event
    }

    /// Forgets every descriptor but the eventfd, and the time limit.
    pub fn clear(&mut self) {
        self.fds.truncate(1);
        self.until = None;
    }

    /// Also wait for this descriptor; gives its place, for [`PollSet::ready`].
    pub fn watch(&mut self, fd: BorrowedFd<'_>, readable: bool, writable: bool) -> usize {
        let events = if readable { libc::POLLIN } else { 0 } | if writable { libc::POLLOUT } else { 0 };
        self.fds.push(libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 });
        self.fds.len() - 1
    }

    /// Also wait for the peer to end its direction, and for the connection to break, whatever there is to read.
    pub fn watch_end(&mut self, fd: BorrowedFd<'_>) {
        self.fds.push(libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 });
    }

    /// Wait no longer than until then.
    pub fn until(&mut self, when: Instant) {
        self.until = Some(self.until.map_or(when, |t| t.min(when)));
    }

    /// Whether the last wait found the eventfd signalled.
    pub fn is_signalled(&self) -> bool {
        self.fds[0].revents != 0
    }

    /// What the last wait found at a place that [`PollSet::watch`] gave.
    pub fn ready(&self, place: usize) -> Ready {
        let got = self.fds.get(place).map_or(0, |p| p.revents);
        let failed = got & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0;
        Ready { readable: failed || got & libc::POLLIN != 0, writable: failed || got & libc::POLLOUT != 0 }
    }

    /// Waits. Returns true where something other than the eventfd wants the caller: a descriptor, or the time.
    pub fn wait(&mut self) -> bool {
        let timeout = match self.until {
            None => -1,
            Some(when) => {
                let left = when.saturating_duration_since(Instant::now());
                // Rounded up: a wait that ends a little early would only spin.
                left.saturating_add(Duration::from_micros(999)).as_millis().min(60_000) as i32
            }
        };
        for p in &mut self.fds {
            p.revents = 0;
        }
        // SAFETY: the pointer and the count describe the vector, which outlives the call; a descriptor in it that has
        // been closed is reported as POLLNVAL, not dereferenced.
        let got = cvt(unsafe { libc::poll(self.fds.as_mut_ptr(), self.fds.len() as libc::nfds_t, timeout) }.into());
        match got {
            Err(_) => true, // EINTR: the caller looks around and waits again
            Ok(0) => true,
            Ok(_) => {
                if self.fds[0].revents != 0 {
                    self.event.drain();
                }
                self.fds[1..].iter().any(|p| p.revents != 0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_signal_before_the_wait_is_not_lost() {
        let event = Arc::new(EventFd::new().unwrap());
        let mut set = PollSet::new(event.clone());
        event.signal();
        event.signal();
        assert!(!set.wait(), "the eventfd alone is no reason to leave");
        set.until(Instant::now());
        assert!(set.wait(), "drained: only the time ends this wait");
    }

    #[test]
    fn a_closed_peer_is_readable() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut set = PollSet::new(Arc::new(EventFd::new().unwrap()));
        let place = set.watch(a.as_fd(), true, false);
        drop(b);
        assert!(set.wait());
        assert!(set.ready(place).readable);
    }

    #[test]
    fn the_end_is_waited_for_behind_bytes_that_nobody_reads() {
        let (a, mut b) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut b, b"unread").unwrap();
        let mut set = PollSet::new(Arc::new(EventFd::new().unwrap()));
        set.watch_end(a.as_fd());
        set.until(Instant::now());
        assert!(set.wait() && !set.ready(1).readable, "only the time has ended this wait");
        b.shutdown(std::net::Shutdown::Write).unwrap();
        set.clear();
        set.watch_end(a.as_fd());
        assert!(set.wait());
    }
}
