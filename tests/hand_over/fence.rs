//! A query is a fence: once it is answered with no, nothing that still arrives starts the guest.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::settle::Settled;
use pageferry::target::Witness;
use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Failure, Outcome, Source, SourceReport, Target, TargetReport, Timeouts};

use crate::Kinds;
use crate::proxy::{Harm, Place, Proxy};
use crate::vmm::{self, TestGuest, TestIncoming};
use crate::witness::{ask, before};

/// Plays at the same time.
const AT_ONCE: usize = 8;

/// The source gives up soon, and the target waits for as long as it may.
fn timeouts(hook: Duration) -> Timeouts {
    let seconds = Duration::from_secs;
    Timeouts { connect: seconds(5), hello: seconds(5), silence: seconds(30), hook, stall: seconds(30) }
}

/// A migration whose control connection stalls at some place, until it is released.
struct Stalled {
    address: String,
    proxy: Proxy,
    /// The report, how often it was paused, and how often resumed.
    source: JoinHandle<(SourceReport, (u32, u32))>,
    target: JoinHandle<(TargetReport, Witness, TestIncoming)>,
}

fn stalled(place: Place) -> Stalled {
    let ram = vmm::ram(PageSize::SIZE_4K, &[16]);
    vmm::fill(&ram, 1);
    let dirty = DirtyBitmap::for_ram(&ram);
    let target = Target::builder().timeouts(timeouts(Duration::from_secs(30))).listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let proxy = Proxy::before(&address, Some((place, Harm::Stall)), Box::new(|harm| panic!("{harm:?}")));
    let source = Source::builder(ram.clone()).channels(1).timeouts(timeouts(Duration::from_millis(1500)));
    let source = source.connect(proxy.address()).unwrap();
    let target = thread::spawn(move || {
        let mut incoming = TestIncoming::new();
        let (report, witness) = target.receive_and_witness(&mut incoming);
        (report, witness, incoming)
    });
    let source = thread::spawn(move || {
        let mut guest = TestGuest::new(&ram, &dirty);
        let report = source.migrate(&mut dirty.clone(), &mut guest);
        (report, (guest.paused, guest.resumed))
    });
    Stalled { address, proxy, source, target }
}

/// Runs `play` for each, several at a time.
fn for_each<T: Send>(all: impl Iterator<Item = T> + Send, play: impl Fn(T) + Sync) {
    let all = Mutex::new(all);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(next) = all.lock().unwrap().next() else { return };
                    play(next);
                }
            });
        }
    });
}

#[test]
fn a_commit_that_arrives_after_the_answer_no_starts_nothing() {
    let commit = before(Kinds::new().commit);
    for_each(0..16, |offset| {
        let Stalled { address, proxy, source, target } = stalled(Place { offset, ..commit });
        let (sent, paused_and_resumed) = source.join().unwrap();
        assert!(matches!(sent.outcome, Outcome::Uncertain(_)), "{}", sent.outcome);
        assert!(!target.is_finished(), "the target still waits for Commit");
        let begun = Instant::now();
        assert_eq!(ask(&address, sent.session), Ok(Settled::NeverWillRunThere), "{offset} bytes of Commit are there");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        proxy.release();
        let (received, mut witness, incoming) = target.join().unwrap();
        assert_eq!(received.outcome, Outcome::Failed(Failure::Fenced));
        assert_eq!((incoming.runs, incoming.discards), (0, 1));
        assert_eq!(paused_and_resumed, (1, 0));
        // The answer may have been lost: it is there to be had again, and is the same.
        assert!(witness.is_needed());
        let cancel = witness.cancel_handle();
        let answering = thread::spawn(move || witness.answer(Duration::from_secs(20)));
        assert_eq!(ask(&address, sent.session), Ok(Settled::NeverWillRunThere));
        cancel.cancel();
        assert_eq!(answering.join().unwrap(), 1);
    });
}

#[test]
fn of_a_commit_and_a_query_that_arrive_together_one_wins_and_the_answer_says_which() {
    let commit = before(Kinds::new().commit);
    let ran = AtomicU32::new(0);
    for_each(0..24u64, |turn| {
        let Stalled { address, proxy, source, target } = stalled(Place { offset: 8, ..commit });
        let (sent, _) = source.join().unwrap();
        // Whichever of them answers, the target or what it leaves behind.
        let answering = thread::spawn(move || {
            let (received, mut witness, incoming) = target.join().unwrap();
            let cancel = witness.cancel_handle();
            let answering = thread::spawn(move || witness.answer(Duration::from_secs(20)));
            (received, incoming, cancel, answering)
        });
        proxy.release();
        // It takes the proxy some 2 ms: now one is ahead, now the other.
        thread::park_timeout(Duration::from_micros(turn * 100));
        let settled = ask(&address, sent.session);
        let (received, incoming, cancel, answers) = answering.join().unwrap();
        cancel.cancel();
        answers.join().unwrap();
        match settled {
            Ok(Settled::RunsThere) => assert_eq!((incoming.runs, &received.outcome), (1, &Outcome::Completed)),
            Ok(Settled::NeverWillRunThere) => assert_eq!((incoming.runs, incoming.discards), (0, 1)),
            Err(why) => panic!("{why}: {}", received.outcome),
        }
        ran.fetch_add(incoming.runs, Ordering::Relaxed);
    });
    println!("Commit was first {} times of 24", ran.into_inner());
}

#[test]
fn asked_before_commit_the_target_gives_up_and_the_guest_runs_on_at_the_source() {
    let Stalled { address, proxy, source, target } = stalled(before(Kinds::new().last));
    while !proxy.seen().harmed {
        thread::park_timeout(Duration::from_millis(2));
    }
    assert_eq!(ask(&address, proxy.session()), Ok(Settled::NeverWillRunThere));
    proxy.release();
    let (sent, paused_and_resumed) = source.join().unwrap();
    assert!(matches!(sent.outcome, Outcome::Failed(_)), "{}", sent.outcome);
    assert_eq!(paused_and_resumed, (1, 1));
    let (received, witness, incoming) = target.join().unwrap();
    assert_eq!(received.outcome, Outcome::Failed(Failure::Fenced));
    assert!(!witness.is_needed(), "Loaded was never said");
    assert_eq!((incoming.runs, incoming.discards), (0, 1));
}
