//! A channel whose lane waits at the barrier is healthy, however long it waits: no clock of ours or of the kernel ends it.
// UNSAFETY: getsockopt(2) is a C call.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pageferry::net::{Connector, Opening};
use pageferry::units::{BlockId, ChannelId, PageSize};
use pageferry::{DirtyBitmap, Source, Target, Timeouts, Verify};
use vmm::{TestGuest, TestIncoming};

/// The limit for data that does not move.
const STALL: Duration = Duration::from_millis(800);
/// How long the healthy channel waits for the slow one: five times as long.
const WAIT: Duration = Duration::from_secs(4);

/// Channel 1 goes over a link that carries a few pages at a time, until it is told to hurry.
struct OneSlow {
    to: String,
    relay: String,
}

impl Connector for OneSlow {
    fn open(&mut self, opening: Opening) -> std::io::Result<OwnedFd> {
        let slow = matches!(opening, Opening::Data { channel: ChannelId(1), .. });
        TcpStream::connect(if slow { &self.relay } else { &self.to }).map(OwnedFd::from)
    }
}

/// Carries what comes on, 16 KiB each 8 ms, for [`WAIT`] from the first page on; then as fast as it comes.
fn slow_relay(to: String, hurries: Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // It ends with the connection.
    std::thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut onward = TcpStream::connect(to).unwrap();
        let mut hello = [0; 64];
        from.read_exact(&mut hello).and_then(|()| onward.write_all(&hello)).unwrap();
        let mut bytes = vec![0; 16 << 10];
        let mut begun = None;
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            if onward.write_all(&bytes[..n]).is_err() {
                return;
            }
            if begun.get_or_insert_with(Instant::now).elapsed() < WAIT {
                // The pace of the link.
                vmm::wait(Duration::from_millis(8));
            } else {
                hurries.store(true, Ordering::Relaxed);
            }
        }
    });
    address
}

/// TCP_USER_TIMEOUT of every TCP connection of this process, in milliseconds.
fn user_timeouts() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().map_while(Result::ok) {
        let Ok(fd) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let mut value: libc::c_uint = 0;
        let mut len = size_of::<libc::c_uint>() as libc::socklen_t;
        // SAFETY: both pointers are to locals, and `len` is the size of the first; a descriptor that is no TCP socket,
        // or not open any more, gives an error.
        let got = unsafe {
            libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, (&raw mut value).cast(), &raw mut len)
        };
        if got == 0 {
            found.push(value);
        }
    }
    found
}

#[test]
fn a_channel_that_waits_at_the_barrier_for_five_times_the_stall_limit_is_not_ended() {
    const PAGES: u64 = 8192;
    let timeouts = Timeouts { stall: STALL, ..Timeouts::default() };
    let target = Target::builder().timeouts(timeouts).listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let hurries = Arc::new(AtomicBool::new(false));
    let relay = slow_relay(to.clone(), hurries.clone());
    let ram = vmm::ram(PageSize::SIZE_4K, &[PAGES]);
    (0..PAGES).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let source = Source::builder(ram).channels(2).verify(Verify::Wire).timeouts(timeouts);
    let source = source.connector(OneSlow { to, relay }).unwrap();
    // Each round begins while channel 1 is behind: what channel 0 is sent of it lies in front of the barrier.
    let begun = Instant::now();
    let mut script = vmm::Script {
        bitmap: guest.dirty.clone(),
        rounds: 0,
        between: Box::new(move |_, dirty| {
            let seen = user_timeouts();
            assert!(seen.len() >= 3 && seen.iter().all(|ms| *ms == 0), "{seen:?}");
            if !hurries.load(Ordering::Relaxed) && begun.elapsed() < 3 * WAIT {
                dirty.mark_range(BlockId(0), 0, 2048);
            }
        }),
    };
    let trip = vmm::travel(source, &mut script, &mut guest, target, TestIncoming::new());
    let took = begun.elapsed();
    vmm::assert_arrived(&guest, &trip);
    assert_eq!((trip.sent.channels_lost, trip.received.channels_lost), (0, 0));
    assert!(took >= WAIT, "nobody waited: {took:?}");
}
