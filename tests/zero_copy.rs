//! Pages by reference, over real sockets: what arrives, what the kernel says of it, and how it ends early.
#![cfg(not(loom))]

#[path = "support/peer.rs"]
mod peer;
#[path = "support/mod.rs"]
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use pageferry::config::WhyCopied;
use pageferry::precopy::AtLimit;
use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyBitmap, Failure, Outcome, Source, Target, Timeouts, Verify, ZeroCopy};
use peer::FakeTarget;
use vmm::{TestGuest, TestIncoming, Transport, Trip, assert_arrived};

const PAGES: u64 = 4000;

/// A guest of which every page is full.
fn guest() -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[PAGES]);
    vmm::fill(&ram, 1);
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}

fn migrate(how: ZeroCopy, transport: Transport, channels: u8, guest: &mut TestGuest) -> Trip {
    let source = Source::builder(guest.ram.clone()).verify(Verify::Full).zero_copy(how).at_limit(AtLimit::SwitchOver);
    let (source, target) = transport.connect(source, Target::builder(), channels);
    let mut dirty = guest.dirty.clone();
    vmm::travel(source, &mut dirty, guest, target, TestIncoming::new())
}

#[test]
fn a_guest_that_writes_arrives_and_every_send_is_completed() {
    for transport in Transport::all().into_iter().filter(|t| matches!(t, Transport::Tcp4 | Transport::Tcp6)) {
        for channels in [1, 2, 8] {
            let mut guest = guest();
            guest.start(500);
            let trip = migrate(ZeroCopy::On, transport, channels, &mut guest);
            assert_arrived(&guest, &trip);
            let (report, payload) = (&trip.sent.zero_copy, trip.sent.payload_bytes);
            // Round 0 goes in large packets; the last rounds need not.
            assert!((PAGES / 2) << 12 <= report.bytes && report.bytes <= payload, "{report:?} of {payload}");
            // Loopback copies, and says so with the completion. None is missing: the last round was waited for.
            assert_eq!(report.copied_bytes, report.bytes, "{transport:?}, {channels} channels");
            assert_eq!(report.why_copied, vec![None; channels.into()], "it was insisted on");
        }
    }
}

#[test]
fn by_itself_it_is_not_used_within_the_host_and_never_if_not_wanted() {
    for (how, transport, why) in [
        (ZeroCopy::Auto, Transport::Tcp4, WhyCopied::PeerIsHere),
        (ZeroCopy::Auto, Transport::Unix, WhyCopied::NotTcp),
        (ZeroCopy::Auto, Transport::Fds, WhyCopied::NotTcp),
        (ZeroCopy::Off, Transport::Tcp4, WhyCopied::Asked),
    ] {
        let mut guest = guest();
        let trip = migrate(how, transport, 2, &mut guest);
        assert_arrived(&guest, &trip);
        let report = &trip.sent.zero_copy;
        assert_eq!((report.bytes, &report.why_copied[..]), (0, &[Some(why); 2][..]), "{how:?} over {transport:?}");
    }
}

/// An address of this host that is not the loopback's.
fn own_address() -> Option<IpAddr> {
    // Nothing is sent: this asks which address would be.
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_loopback())
}

#[test]
fn by_itself_it_is_not_used_to_an_address_of_this_host() {
    let test = "by_itself_it_is_not_used_to_an_address_of_this_host";
    let Some(address) = own_address() else { return support::skip(test, "this machine has no route anywhere") };
    let mut guest = guest();
    let target = Target::builder().listen(&format!("{address}:0")).unwrap();
    let source = Source::builder(guest.ram.clone()).connect(&target.address().unwrap().to_string()).unwrap();
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    assert_eq!(trip.sent.zero_copy.why_copied, [Some(WhyCopied::PeerIsHere); 2]);
}

#[test]
fn where_it_is_demanded_and_cannot_be_had_that_is_an_error_that_says_so() {
    let mut guest = guest();
    let source = || Source::builder(guest.ram.clone()).zero_copy(ZeroCopy::On);
    let refused = [source().connect("unix:/nowhere").unwrap_err(), source().connect_unix("/nowhere").unwrap_err()];
    for why in refused {
        assert!(matches!(why, Failure::Config(_)) && why.to_string().contains("not TCP"), "{why}");
    }
    // Of sockets that the VMM hands out it is known when they are there.
    let trip = migrate(ZeroCopy::On, Transport::Fds, 2, &mut guest);
    vmm::assert_stayed(&guest, &trip);
    let why = trip.sent.outcome.to_string();
    assert!(why.contains("no zero copy on data channel 0: its connection is not TCP"), "{why}");
}

/// A migration to a target that never reads its data channels, which is at a standstill when `then` gets the target.
fn to_a_deaf_target<T: Send + 'static>(
    timeouts: Timeouts,
    then: impl FnOnce(&mut FakeTarget, pageferry::CancelHandle) -> T + Send + 'static,
) -> (Outcome, T, Instant) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ram = vmm::ram(PageSize::SIZE_4K, &[20_000]);
    (0..20_000).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let source =
        Source::builder(ram.clone()).verify(Verify::Off).channels(3).zero_copy(ZeroCopy::On).timeouts(timeouts);
    let source = source.connect(&listener.local_addr().unwrap().to_string()).unwrap();
    let (progress, cancel) = (source.progress(), source.cancel_handle());
    let peer = std::thread::spawn(move || {
        let mut target = FakeTarget::live(listener);
        target.until_stuck(&progress);
        let value = then(&mut target, cancel);
        target.until_closed();
        value
    });
    let mut dirty = guest.dirty.clone();
    let report = source.migrate(&mut dirty, &mut guest);
    let end = Instant::now();
    assert!(report.zero_copy.bytes > report.zero_copy.copied_bytes, "nothing was outstanding: {:?}", report.zero_copy);
    // The kernel holds by itself what it has not sent: guest RAM may go at once.
    drop((ram, guest, dirty));
    (report.outcome, peer.join().unwrap(), end)
}

#[test]
fn a_cancel_does_not_wait_for_pages_that_the_kernel_still_holds() {
    let mut times = Vec::new();
    // A machine that is busy can hold up one or two; a wait that nobody ends holds up all of them.
    while times.len() < 5 {
        let cancel = |_: &mut FakeTarget, handle: pageferry::CancelHandle| {
            let at = Instant::now();
            handle.cancel();
            at
        };
        let (outcome, at, end) = to_a_deaf_target(Timeouts::default(), cancel);
        assert_eq!(outcome, Outcome::Cancelled);
        times.push(end.saturating_duration_since(at));
        if times.last() < Some(&Duration::from_millis(100)) {
            return;
        }
    }
    panic!("from the cancel to the end it took {times:?}");
}

#[test]
fn a_target_that_stops_reading_is_a_stall_as_ever() {
    let timeouts = Timeouts { stall: Duration::from_millis(600), ..Timeouts::default() };
    let answer = |target: &mut FakeTarget, _| {
        // It answers, and reads nothing.
        while target.next().is_some() {}
    };
    let (outcome, (), _) = to_a_deaf_target(timeouts, answer);
    assert!(matches!(outcome, Outcome::Failed(Failure::Stalled { .. })), "{outcome}");
}
