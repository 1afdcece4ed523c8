//! A target that is far away: each thing that is said on the control connection arrives a while later.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use pageferry::net::{Connector, Opening};
use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Failure, Outcome, Source, Target, Verify};
use vmm::{TestGuest, TestIncoming, Trip, assert_stayed};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Connects to an address; its control connection takes this long one way.
struct FarAway {
    to: String,
    one_way: Duration,
}

impl Connector for FarAway {
    fn open(&mut self, opening: Opening) -> io::Result<OwnedFd> {
        let far = TcpStream::connect(&self.to)?;
        if matches!(opening, Opening::Data { .. }) {
            return Ok(far.into());
        }
        far.set_nodelay(true)?;
        let (source, near) = UnixStream::pair()?;
        let (near_again, far_again) = (near.try_clone()?, far.try_clone()?);
        delay(near, far_again, self.one_way, |to| to.shutdown(Shutdown::Write));
        delay(far, near_again, self.one_way, |to| to.shutdown(Shutdown::Write));
        Ok(source.into())
    }
}

/// Passes on what it reads, so much later. Its threads end with the connection.
fn delay<R, W>(mut from: R, mut to: W, by: Duration, end: fn(&W) -> io::Result<()>)
where
    R: io::Read + Send + 'static,
    W: io::Write + Send + 'static,
{
    let (reader, arrivals) = channel();
    std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            if reader.send((Instant::now() + by, bytes[..n].to_vec())).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        let mut waiting: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut open = true;
        while open || !waiting.is_empty() {
            let patience = waiting.front().map_or(ms(60_000), |(due, _)| due.saturating_duration_since(Instant::now()));
            if open {
                match arrivals.recv_timeout(patience) {
                    Ok(arrival) => waiting.push_back(arrival),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => open = false,
                }
            } else {
                vmm::wait(patience);
            }
            while waiting.front().is_some_and(|(due, _)| *due <= Instant::now()) {
                let Some((_, bytes)) = waiting.pop_front() else { return };
                if to.write_all(&bytes).is_err() {
                    return;
                }
            }
        }
        // The other side may have left already.
        let _ = end(&to);
    });
}

/// Migrates a guest that is idle, and so small that nothing is waited for but the way, with a limit on its downtime.
fn travel_far(one_way: Duration, limit: Duration) -> (TestGuest, Trip) {
    let ram = vmm::ram(PageSize::SIZE_4K, &[10]);
    vmm::fill(&ram, 1);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let builder = Source::builder(ram).verify(Verify::Off).downtime_limit(limit).rounds_max(8);
    let source = builder.connector(FarAway { to, one_way }).unwrap();
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    (guest, trip)
}

#[test]
fn the_way_is_known_before_the_guest_is_paused_for_it() {
    // There and back twice, for Loaded and for Running: that is more than the limit, even for a guest that is idle.
    let (guest, trip) = travel_far(ms(50), ms(150));
    assert_stayed(&guest, &trip);
    assert_eq!(guest.paused, 0);
    let Outcome::Failed(why @ Failure::NotConverging { fixed_cost, .. }) = &trip.sent.outcome else {
        panic!("{}", trip.sent.outcome)
    };
    assert!(*fixed_cost >= ms(200), "{fixed_cost:?}");
    assert!(why.to_string().contains("a hand-over takes too long"), "{why}");
}

#[test]
fn a_way_longer_than_a_heartbeat_is_measured_like_any_other() {
    let (guest, trip) = travel_far(ms(150), ms(400));
    assert_stayed(&guest, &trip);
    assert_eq!(guest.paused, 0);
    let Outcome::Failed(Failure::NotConverging { fixed_cost, .. }) = trip.sent.outcome else {
        panic!("{}", trip.sent.outcome)
    };
    assert!((ms(600)..ms(900)).contains(&fixed_cost), "{fixed_cost:?}");
}
