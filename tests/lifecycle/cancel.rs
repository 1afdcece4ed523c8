//! Cancel, from another thread, at every stage: it ends at once, the guest has one owner, and the other side hears of it.

use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::gate::CancelAnswer;
use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::SourceFrame;
use pageferry::{CancelHandle, DirtyBitmap, Failure, Outcome, Progress, Source, SourceReport, Target, Verify};

use super::leaks::alone;
use super::peer::FakeTarget;
use super::vmm::{self, TestGuest, TestIncoming, Transport, Trip};

/// From the cancel to the end of the call, the VMM's own hooks apart.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Cancels a migration over and over until it took no longer than it may: a machine that is busy can hold up one or two,
/// and a wait that nobody ends holds up all of them.
#[track_caller]
fn at_once(test: &str, cancel: impl FnMut() -> Duration) {
    alone(test, || {
        in_one_of_five(test, cancel);
    });
}

/// The time of the first that took no longer than it may.
#[track_caller]
pub fn in_one_of_five(what: &str, mut cancel: impl FnMut() -> Duration) -> Duration {
    let mut times = Vec::new();
    while times.len() < 5 {
        let time = cancel();
        times.push(time);
        if time < AT_ONCE {
            return time;
        }
    }
    panic!("{what}: from the cancel to the end it took {times:?}");
}

/// Cancels when it is told to, by whoever holds the other end, and says when that was.
pub fn canceller(handle: CancelHandle) -> (Sender<()>, std::thread::JoinHandle<(CancelAnswer, Instant)>) {
    let (tell, told) = channel();
    let thread = std::thread::spawn(move || {
        told.recv().unwrap();
        let at = Instant::now();
        (handle.cancel(), at)
    });
    (tell, thread)
}

pub fn migrate(source: Source, guest: &mut TestGuest) -> (SourceReport, Instant) {
    let mut dirty = guest.dirty.clone();
    let report = source.migrate(&mut dirty, guest);
    (report, Instant::now())
}

#[test]
fn a_cancel_before_the_call_connects_to_nobody() {
    alone("cancel::a_cancel_before_the_call_connects_to_nobody", || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut guest = super::guest(10);
        let to = listener.local_addr().unwrap().to_string();
        let source = Source::builder(guest.ram.clone()).connect(&to).unwrap();
        let handle = source.cancel_handle();
        assert_eq!((handle.cancel(), handle.cancel()), (CancelAnswer::Accepted, CancelAnswer::AlreadyCancelled));
        let (report, _) = migrate(source, &mut guest);
        assert_eq!(report.outcome, Outcome::Cancelled);
        assert_eq!((guest.paused, guest.resumed), (0, 0));
        assert!(listener.accept().is_err(), "somebody connected");
        // The handle keeps an eventfd: it may outlive the migration.
        assert_eq!(handle.cancel(), CancelAnswer::AlreadyCancelled);
    });
}

#[test]
fn a_cancel_ends_a_connect_that_nobody_answers() {
    at_once("cancel::a_cancel_ends_a_connect_that_nobody_answers", || {
        // A queue of one that is full: further connects wait for an answer that does not come.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        vmm::shrink_backlog(&listener);
        let to = listener.local_addr().unwrap();
        let mut crowd = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&to, Duration::from_millis(100)) {
            crowd.push(stream);
            assert!(crowd.len() < 100, "the queue takes everybody");
        }
        let mut guest = super::guest(10);
        let source = Source::builder(guest.ram.clone()).connect(&to.to_string()).unwrap();
        let (tell, cancelling) = canceller(source.cancel_handle());
        tell.send(()).unwrap();
        let (report, end) = migrate(source, &mut guest);
        let (answer, at) = cancelling.join().unwrap();
        assert_eq!((report.outcome, answer), (Outcome::Cancelled, CancelAnswer::Accepted));
        end.saturating_duration_since(at)
    });
}

#[test]
fn a_cancel_ends_the_wait_for_hello() {
    at_once("cancel::a_cancel_ends_the_wait_for_hello", || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut guest = super::guest(10);
        let source = Source::builder(guest.ram.clone()).connect(&listener.local_addr().unwrap().to_string()).unwrap();
        let (tell, cancelling) = canceller(source.cancel_handle());
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // Hello and Setup are here: the source waits.
            std::io::Read::read_exact(&mut stream, &mut [0; 100]).unwrap();
            tell.send(()).unwrap();
            // Until the source leaves.
            std::io::Read::read_to_end(&mut stream, &mut Vec::new()).unwrap();
        });
        let (report, end) = migrate(source, &mut guest);
        let (_, at) = cancelling.join().unwrap();
        peer.join().unwrap();
        assert_eq!(report.outcome, Outcome::Cancelled);
        end.saturating_duration_since(at)
    });
}

/// A migration whose source is cancelled when `set` has it told so; and how long the source went on.
fn cancelled_at(
    set: impl FnOnce(&mut TestGuest, &mut TestIncoming, Sender<()>),
) -> (TestGuest, Trip, CancelAnswer, Duration) {
    let mut guest = super::guest(3000);
    let mut incoming = TestIncoming::new();
    let (source, target) = Transport::Tcp4.connect(Source::builder(guest.ram.clone()), Target::builder(), 2);
    let (tell, cancelling) = canceller(source.cancel_handle());
    set(&mut guest, &mut incoming, tell);
    let receiving = std::thread::spawn(move || (target.receive(&mut incoming), incoming));
    let (sent, end) = migrate(source, &mut guest);
    let (answer, at) = cancelling.join().unwrap();
    let (received, incoming) = receiving.join().unwrap();
    (guest, Trip { sent, received, incoming }, answer, end.saturating_duration_since(at))
}

#[track_caller]
fn assert_cancelled(guest: &TestGuest, trip: &Trip) {
    assert_eq!(trip.sent.outcome, Outcome::Cancelled, "{:?}", trip.sent.remarks);
    vmm::assert_stayed(guest, trip);
    let told = trip.received.outcome.failure();
    assert!(matches!(told, Some(Failure::CancelledBySource(_))), "the target: {}", trip.received.outcome);
}

#[test]
fn a_cancel_ends_the_wait_for_ready() {
    at_once("cancel::a_cancel_ends_the_wait_for_ready", || {
        let (guest, trip, _, time) = cancelled_at(|_, incoming, tell| {
            // The hook outlasts the source: only the target waits for it.
            incoming.on_prepare = Some(Box::new(move || {
                tell.send(()).unwrap();
                vmm::wait(Duration::from_millis(300));
            }));
        });
        assert_cancelled(&guest, &trip);
        assert_eq!(guest.paused, 0);
        time
    });
}

/// Cancels as soon as pages travel; the answer, and when it asked.
fn cancels_as_pages_travel(progress: Progress, handle: CancelHandle) -> JoinHandle<(CancelAnswer, Instant)> {
    std::thread::spawn(move || {
        while progress.now().channels.payload_bytes == 0 {
            std::thread::yield_now();
        }
        let at = Instant::now();
        (handle.cancel(), at)
    })
}

#[test]
fn a_cancel_ends_round_0() {
    at_once("cancel::a_cancel_ends_round_0", || {
        let mut guest = super::guest(3000);
        guest.start(3000);
        // The link is narrow and the limit short, so that rounds go on.
        let source = Source::builder(guest.ram.clone()).downtime_limit(Duration::from_micros(1)).rounds_max(60_000);
        let (source, target) = Transport::Tcp4.connect(source, Target::builder(), 2);
        let watching = cancels_as_pages_travel(source.progress(), source.cancel_handle());
        let mut incoming = TestIncoming::new();
        let receiving = std::thread::spawn(move || (target.receive(&mut incoming), incoming));
        let (sent, end) = migrate(source, &mut guest);
        let (answer, at) = watching.join().unwrap();
        let (received, incoming) = receiving.join().unwrap();
        guest.stop();
        assert_eq!(answer, CancelAnswer::Accepted);
        let trip = Trip { sent, received, incoming };
        assert_cancelled(&guest, &trip);
        assert_eq!(guest.paused, 0);
        end.saturating_duration_since(at)
    });
}

#[test]
fn a_cancel_ends_a_migration_whose_target_reads_no_more() {
    at_once("cancel::a_cancel_ends_a_migration_whose_target_reads_no_more", || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ram = vmm::ram(PageSize::SIZE_4K, &[20_000]);
        (0..20_000).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
        let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
        let source = Source::builder(ram.clone()).verify(Verify::Off).channels(3);
        let source = source.connect(&listener.local_addr().unwrap().to_string()).unwrap();
        let progress = source.progress();
        let (tell, cancelling) = canceller(source.cancel_handle());
        let peer = std::thread::spawn(move || {
            let mut target = FakeTarget::live(listener);
            target.until_stuck(&progress);
            tell.send(()).unwrap();
            target.until_closed()
        });
        let (report, end) = migrate(source, &mut guest);
        let (_, at) = cancelling.join().unwrap();
        let heard = peer.join().unwrap();
        assert_eq!((report.outcome, guest.paused), (Outcome::Cancelled, 0));
        assert!(heard.iter().any(|frame| matches!(frame, SourceFrame::Cancel { .. })), "{heard:?}");
        assert!(report.payload_bytes < 20_000 << 12, "everything was sent: nobody was blocked");
        end.saturating_duration_since(at)
    });
}

#[test]
fn a_cancel_while_the_guest_is_paused_resumes_it() {
    at_once("cancel::a_cancel_while_the_guest_is_paused_resumes_it", || {
        let (guest, trip, answer, time) = cancelled_at(|guest, _, tell| {
            guest.on_save = Some(Box::new(move |_, _| tell.send(()).unwrap()));
        });
        // The state is saved before the cancel is looked at, so the gate decides which of the two came first.
        assert_eq!(answer, CancelAnswer::Accepted);
        assert_cancelled(&guest, &trip);
        assert_eq!((guest.paused, guest.resumed), (1, 1));
        time
    });
}

#[test]
fn a_cancel_ends_the_wait_for_loaded() {
    at_once("cancel::a_cancel_ends_the_wait_for_loaded", || {
        let (guest, trip, _, time) = cancelled_at(|_, incoming, tell| {
            incoming.on_load = Some(Box::new(move || {
                tell.send(()).unwrap();
                vmm::wait(Duration::from_millis(300));
            }));
        });
        assert_cancelled(&guest, &trip);
        assert_eq!((guest.paused, guest.resumed), (1, 1));
        time
    });
}

#[test]
fn after_commit_a_cancel_is_too_late() {
    alone("cancel::after_commit_a_cancel_is_too_late", || {
        let (guest, trip, answer, _) = cancelled_at(|_, incoming, tell| {
            incoming.on_run = Some(Box::new(move || {
                tell.send(()).unwrap();
                vmm::wait(Duration::from_millis(100));
            }));
        });
        assert_eq!(answer, CancelAnswer::TooLate);
        assert_eq!((trip.sent.outcome, trip.received.outcome), (Outcome::Completed, Outcome::Completed));
        assert_eq!((guest.paused, guest.resumed, trip.incoming.runs), (1, 0, 1));
    });
}

#[test]
fn a_target_can_be_cancelled_while_nobody_has_come() {
    at_once("cancel::a_target_can_be_cancelled_while_nobody_has_come", || {
        let mut longest = Duration::ZERO;
        for address in ["127.0.0.1:0".to_owned(), vmm::unix_address()] {
            let target = Target::builder().listen(&address).unwrap();
            let (tell, cancelling) = canceller(target.cancel_handle());
            let receiving = std::thread::spawn(move || {
                tell.send(()).unwrap();
                let mut incoming = TestIncoming::new();
                (target.receive(&mut incoming), incoming.discards, Instant::now())
            });
            let (report, discards, end) = receiving.join().unwrap();
            let (_, at) = cancelling.join().unwrap();
            assert_eq!((report.outcome, discards), (Outcome::Cancelled, 0));
            longest = longest.max(end.saturating_duration_since(at));
        }
        longest
    });
}

#[test]
fn a_target_that_is_cancelled_while_pages_travel_discards_and_the_source_hears_of_it() {
    at_once("cancel::a_target_that_is_cancelled_while_pages_travel_discards_and_the_source_hears_of_it", || {
        let mut guest = super::guest(3000);
        guest.start(3000);
        let source = Source::builder(guest.ram.clone()).downtime_limit(Duration::from_micros(1)).rounds_max(60_000);
        let (source, target) = Transport::Tcp4.connect(source, Target::builder(), 2);
        let watching = cancels_as_pages_travel(target.progress(), target.cancel_handle());
        let mut incoming = TestIncoming::new();
        let receiving = std::thread::spawn(move || {
            let report = target.receive(&mut incoming);
            (report, incoming, Instant::now())
        });
        let (sent, _) = migrate(source, &mut guest);
        guest.stop();
        let (answer, at) = watching.join().unwrap();
        let (received, incoming, end) = receiving.join().unwrap();
        assert_eq!((&received.outcome, answer), (&Outcome::Cancelled, CancelAnswer::Accepted));
        assert!(sent.outcome.to_string().contains("cancelled at the target"), "{}", sent.outcome);
        vmm::assert_stayed(&guest, &Trip { sent, received, incoming });
        end.saturating_duration_since(at)
    });
}
