//! Cancel at every stage, with a peer that is well, dead, deaf, or gone without a word: it ends at once, and nothing is left.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::dirty::write_protect::WriteProtect;
use pageferry::gate::CancelAnswer;
use pageferry::units::{BlockId, ChannelId, Epoch, PageSize, Round};
use pageferry::wire::control::{SourceFrame, TargetFrame};
use pageferry::wire::hello::{HelloRole, Side};
use pageferry::wire::packet::PacketHeader;
use pageferry::{DirtyBitmap, DirtyError, DirtySource, Outcome, Ram, Source, Target, Timeouts, Verify};

use super::cancel::{canceller, in_one_of_five};
use super::leaks::{alone, assert_holds, holdings, mapped_bytes, registrations};
use super::peer::*;
use super::support::skip;
use super::vmm::{self, TestGuest, TestIncoming};

/// How the other side is when the cancel comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Peer {
    /// It reads all that comes, and answers.
    Alive,
    /// Its process has ended: resets and ends of connections are on their way here.
    Dead,
    /// It reads nothing any more: windows fill up.
    Stalled,
    /// Its machine has vanished: nothing is acknowledged, and nothing comes.
    Gone,
}

const PEERS: [Peer; 4] = [Peer::Alive, Peer::Dead, Peer::Stalled, Peer::Gone];

/// How far the source is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// No answer to its connect; there is no peer yet.
    Connecting,
    /// The target's Hello is awaited.
    Hello,
    /// The target prepares.
    Setup,
    /// Data channels have been opened, and have not joined.
    Joining,
    /// Pages travel: its workers are blocked, or about to be.
    Round,
    /// The guest stands still, and its state is being saved.
    Paused,
    /// Its state has been saved, and the pages of the last round do not get away.
    LastRound,
    /// Final has been sent.
    Final,
}

/// Dirty tracking that knows whether it was left on.
struct Watched {
    inner: Box<dyn DirtySource>,
    on: bool,
    /// Mappings that were registered with a userfaultfd while it was on.
    registrations: usize,
}

impl Watched {
    fn new(inner: impl DirtySource + 'static) -> Watched {
        Watched { inner: Box::new(inner), on: false, registrations: 0 }
    }
}

impl DirtySource for Watched {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.on = true;
        self.inner.arm(ram)?;
        self.registrations = registrations();
        Ok(())
    }
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        self.inner.begin_round()
    }
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.inner.harvest(block, first_page, words)
    }
    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.inner.give_back(block, first_page, words)
    }
    fn disarm(&mut self) {
        self.on = false;
        self.inner.disarm();
    }
}

/// Long enough that only the cancel ends anything.
fn patient() -> Timeouts {
    let long = Duration::from_secs(60);
    Timeouts { connect: long, hello: long, silence: long, hook: long, stall: long }
}

/// More than sockets and rings take while nobody reads.
const MANY_PAGES: u64 = 20_000;

/// What happens to the target's end of everything.
fn befall(peer: Peer, target: FakeTarget, reading: &AtomicBool) -> Option<FakeTarget> {
    match peer {
        Peer::Alive => {}
        Peer::Stalled => reading.store(false, Ordering::Relaxed),
        Peer::Gone => {
            vmm::vanish(&target.listener);
            vmm::vanish(&target.control.stream);
            target.data.iter().for_each(vmm::vanish);
        }
        Peer::Dead => {
            target.data.iter().for_each(vmm::reset_on_close);
            vmm::reset_on_close(&target.control.stream);
            return None;
        }
    }
    Some(target)
}

/// The target's end up to a stage.
fn lead_to(stage: Stage, listener: TcpListener, paused: &Receiver<()>, reading: &Arc<AtomicBool>) -> FakeTarget {
    let reads = |mut target: FakeTarget| {
        target.swallow_while(reading);
        target.claim_all();
        target
    };
    match stage {
        Stage::Connecting => unreachable!("there is no connection yet"),
        Stage::Hello => FakeTarget::accept(listener),
        Stage::Setup => FakeTarget::greet(listener),
        Stage::Joining => FakeTarget::connected(listener),
        Stage::Round => {
            // Nobody reads the pages. Two heartbeats: nothing has moved for a while.
            let mut target = FakeTarget::live(listener);
            for _ in 0..2 {
                while !matches!(target.control.next(), Some(SourceFrame::Ping { .. })) {}
            }
            target
        }
        Stage::Paused | Stage::LastRound => {
            let mut target = reads(FakeTarget::live(listener));
            while paused.try_recv().is_err() {
                if let Some(SourceFrame::Ping { nonce }) = target.control.next() {
                    target.control.send(&TargetFrame::Pong { nonce, lanes: target.lanes.clone() });
                }
            }
            target
        }
        Stage::Final => {
            let mut target = reads(FakeTarget::live(listener));
            let mut frames = std::iter::from_fn(|| target.next());
            assert!(frames.any(|frame| matches!(frame, SourceFrame::Final(_))));
            target
        }
    }
}

/// Cancels a source at a stage; gives how long it went on.
fn cancel_source(stage: Stage, peer: Peer, tracking: &mut Watched) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let pages = if stage == Stage::Round { MANY_PAGES } else { 64 };
    let ram = vmm::ram(PageSize::SIZE_4K, &[MANY_PAGES]);
    (0..pages).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let source = Source::builder(ram).channels(3).verify(Verify::Off).timeouts(patient()).connect(&to).unwrap();
    let (tell, cancelling) = canceller(source.cancel_handle());
    let (stands, paused) = channel();
    let (go, released) = channel::<()>();
    guest.on_save = Some(Box::new(move |ram, dirty| {
        if stage == Stage::LastRound {
            for page in 0..MANY_PAGES {
                vmm::touch_page(ram, BlockId(0), page);
                dirty.mark(BlockId(0), page);
            }
        }
        stands.send(()).unwrap();
        // Until the peer is as it is to be. Final is for a source whose hooks return.
        if stage != Stage::Final {
            released.recv().unwrap();
        }
    }));
    let (ended, end) = channel::<()>();
    if stage == Stage::Connecting {
        vmm::vanish(&listener);
    }
    let script = std::thread::spawn(move || {
        if stage == Stage::Connecting {
            // Nothing tells from outside that it waits for an answer.
            vmm::wait(Duration::from_millis(50));
            tell.send(()).unwrap();
            return end.recv().unwrap();
        }
        let reading = Arc::new(AtomicBool::new(true));
        let target = lead_to(stage, listener, &paused, &reading);
        if stage == Stage::LastRound {
            // Whatever befalls it, it reads the last round no more: that is what keeps the source there.
            reading.store(false, Ordering::Relaxed);
        }
        let target = befall(peer, target, &reading);
        let _ = go.send(());
        if stage == Stage::LastRound && peer != Peer::Dead {
            // The hook has returned. Nothing tells from outside when the workers are blocked.
            vmm::wait(Duration::from_millis(100));
        }
        tell.send(()).unwrap();
        match target {
            Some(mut target) if peer == Peer::Alive => drop(target.until_closed()),
            target => {
                end.recv().unwrap();
                drop(target);
            }
        }
    });
    let report = source.migrate(tracking, &mut guest);
    let returned = Instant::now();
    let _ = ended.send(());
    script.join().unwrap();
    let (answer, at) = cancelling.join().unwrap();
    let what = format!("{stage:?}, {peer:?}");
    match report.outcome {
        Outcome::Cancelled => assert_eq!(answer, CancelAnswer::Accepted, "{what}"),
        // Its end may have been noticed before the cancel.
        Outcome::Failed(_) if peer == Peer::Dead => {}
        other => panic!("{what}: {other}"),
    }
    assert!(!tracking.on && registrations() == 0, "{what}: dirty pages are still tracked");
    assert_eq!(guest.paused, guest.resumed, "{what}: resumed iff it was paused");
    let stood = [Stage::Paused, Stage::LastRound, Stage::Final].contains(&stage);
    assert_eq!(guest.paused > 0, stood, "{what}: the stage was missed");
    returned.saturating_duration_since(at)
}

#[test]
fn a_source_is_cancelled_at_every_stage_whatever_has_become_of_the_target() {
    alone("stages::a_source_is_cancelled_at_every_stage_whatever_has_become_of_the_target", || {
        use Stage::*;
        let mut cases = vec![(Connecting, Peer::Gone)];
        for stage in [Hello, Setup, Joining, Round, Paused, LastRound, Final] {
            cases.extend(PEERS.map(|peer| (stage, peer)));
        }
        let mapped = mapped_bytes();
        for (stage, peer) in cases {
            let what = format!("the source, {stage:?}, {peer:?}");
            let before = holdings();
            let time = in_one_of_five(&what, || {
                let ram = vmm::ram(PageSize::SIZE_4K, &[MANY_PAGES]);
                cancel_source(stage, peer, &mut Watched::new(DirtyBitmap::for_ram(&ram)))
            });
            assert_holds(&before, &what);
            eprintln!("{what}: {time:?}");
        }
        // Stacks of threads that have ended are kept for the next ones. Guest RAM is not.
        let now = mapped_bytes();
        assert!(now < mapped + (MANY_PAGES << 12), "{mapped} bytes were mapped before, {now} after");
    });
}

#[test]
fn a_cancel_leaves_no_page_write_protected() {
    alone("stages::a_cancel_leaves_no_page_write_protected", || {
        let mut protected = 0;
        for peer in PEERS {
            for stage in [Stage::Round, Stage::Paused] {
                let before = holdings();
                let mut tracking = match WriteProtect::new() {
                    Ok(tracking) => Watched::new(tracking),
                    Err(e) => return skip("a_cancel_leaves_no_page_write_protected", &e.to_string()),
                };
                cancel_source(stage, peer, &mut tracking);
                // One whose peer dies may end before tracking begins.
                protected += usize::from(tracking.registrations > 0);
                drop(tracking);
                assert_holds(&before, &format!("{stage:?}, {peer:?}"));
            }
        }
        assert!(protected >= 4, "pages were protected {protected} times only: there was nothing to be left");
    });
}

/// How far the target is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// A part of the source's Hello is there.
    HalfHello,
    /// Setup is awaited.
    Setup,
    /// One of two data channels is there.
    Channels,
    /// In the middle of a packet.
    Packet,
    /// One of two lanes has ended the round.
    Barrier,
    /// Final has come, and one lane is not through.
    Final,
    /// The device state is loaded, and Commit awaited.
    Loaded,
}

fn lead_target_to(at: At, to: &str) -> FakeSource {
    let mut source = match at {
        At::HalfHello => FakeSource::connect(to),
        At::Setup => FakeSource::greet(to),
        At::Channels => FakeSource::ready(to, 2),
        At::Packet | At::Barrier | At::Final => FakeSource::live(to, 2),
        At::Loaded => FakeSource::loaded(to),
    };
    let round_end = mark(PacketHeader::round_end(Round(0), Epoch(0), 0));
    match at {
        At::HalfHello => {
            source.control.raw(&hello(HelloRole::Control, Side::Source, SESSION).encode()[..40]);
        }
        At::Channels => {
            source.join(ChannelId(0));
            assert!(matches!(source.next(), Some(TargetFrame::ChannelJoined { .. })));
        }
        At::Packet => source.send_data(1, &page_packet(0, Round(0), &[1; 4096])[..2000]),
        At::Barrier => source.send_data(0, &round_end),
        At::Final => {
            source.send_data(0, &round_end);
            source.control.send(&SourceFrame::Final(last(2)));
        }
        At::Setup | At::Loaded => {}
    }
    if at != At::HalfHello {
        // What was sent before it on this connection has been heard once this is answered.
        let asked = Instant::now();
        source.control.send(&SourceFrame::Ping { nonce: 7 });
        while !matches!(source.control.next(), Some(TargetFrame::Pong { nonce: 7, .. })) {}
        assert!(asked.elapsed() < Duration::from_secs(10));
    }
    source
}

/// Cancels a target at a stage; gives how long it went on.
fn cancel_target(at: At, peer: Peer) -> Duration {
    let target = Target::builder().timeouts(patient()).listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let (tell, cancelling) = canceller(target.cancel_handle());
    let (ended, end) = channel::<()>();
    let end = Mutex::new(end);
    std::thread::scope(|scope| {
        let script = scope.spawn(move || {
            let mut source = lead_target_to(at, &to);
            match peer {
                Peer::Alive | Peer::Stalled => {}
                Peer::Gone => source.data.iter().chain([&source.control.stream]).for_each(vmm::vanish),
                Peer::Dead => {
                    source.data.iter().chain([&source.control.stream]).for_each(vmm::reset_on_close);
                    drop(source);
                    return tell.send(()).unwrap();
                }
            }
            tell.send(()).unwrap();
            if peer == Peer::Alive {
                source.until_closed();
            }
            end.lock().unwrap().recv().unwrap();
        });
        let mut incoming = TestIncoming::new();
        let report = target.receive(&mut incoming);
        let returned = Instant::now();
        let _ = ended.send(());
        script.join().unwrap();
        let (answer, at_time) = cancelling.join().unwrap();
        let what = format!("{at:?}, {peer:?}");
        match report.outcome {
            Outcome::Cancelled => assert_eq!(answer, CancelAnswer::Accepted, "{what}"),
            Outcome::Failed(_) if peer == Peer::Dead => {}
            other => panic!("{what}: {other}"),
        }
        assert_eq!((incoming.runs, incoming.discards), (0, u32::from(incoming.ram.is_some())), "{what}");
        returned.saturating_duration_since(at_time)
    })
}

#[test]
fn a_target_is_cancelled_at_every_stage_whatever_has_become_of_the_source() {
    alone("stages::a_target_is_cancelled_at_every_stage_whatever_has_become_of_the_source", || {
        for at in [At::HalfHello, At::Setup, At::Channels, At::Packet, At::Barrier, At::Final, At::Loaded] {
            for peer in PEERS {
                let what = format!("the target, {at:?}, {peer:?}");
                let before = holdings();
                let time = in_one_of_five(&what, || cancel_target(at, peer));
                assert_holds(&before, &what);
                eprintln!("{what}: {time:?}");
            }
        }
    });
}

/// After Commit a cancel is too late, and the source waits for Running: as long as its limits say, and no longer.
#[test]
fn after_commit_a_cancel_changes_nothing_whatever_has_become_of_the_target() {
    alone("stages::after_commit_a_cancel_changes_nothing_whatever_has_become_of_the_target", || {
        for peer in PEERS {
            let before = holdings();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let to = listener.local_addr().unwrap().to_string();
            let mut guest = super::guest(64);
            let timeouts = Timeouts { hook: Duration::from_millis(600), ..patient() };
            let source = Source::builder(guest.ram.clone()).timeouts(timeouts).connect(&to).unwrap();
            let handle = source.cancel_handle();
            let (ended, end) = channel::<()>();
            let script = std::thread::spawn(move || {
                let mut target = FakeTarget::live(listener);
                target.swallow();
                target.claim_all();
                while let Some(frame) = target.next() {
                    match frame {
                        SourceFrame::Final(last) => target.control.send(&TargetFrame::Loaded { round: last.round }),
                        SourceFrame::Commit => break,
                        _ => true,
                    };
                }
                assert_eq!(handle.cancel(), CancelAnswer::TooLate);
                let mut target = befall(peer, target, &AtomicBool::new(true));
                if let (Peer::Alive, Some(target)) = (peer, &mut target) {
                    target.control.send(&TargetFrame::Running);
                    target.until_closed();
                }
                end.recv().unwrap();
            });
            let mut dirty = guest.dirty.clone();
            let report = source.migrate(&mut dirty, &mut guest);
            ended.send(()).unwrap();
            script.join().unwrap();
            match report.outcome {
                Outcome::Completed => assert_eq!(peer, Peer::Alive),
                Outcome::Uncertain(_) => assert_ne!(peer, Peer::Alive),
                other => panic!("{peer:?}: {other}"),
            }
            assert_eq!((guest.paused, guest.resumed), (1, 0), "{peer:?}");
            assert_holds(&before, &format!("{peer:?}"));
        }
    });
}

#[test]
fn a_cancel_ends_any_round() {
    alone("stages::a_cancel_ends_any_round", || {
        for round in 0..4 {
            in_one_of_five(&format!("round {round}"), || {
                let mut guest = super::guest(3000);
                // Every round finds half of the pages dirty again: the limit is never met.
                let source = Source::builder(guest.ram.clone()).downtime_limit(Duration::from_micros(1));
                let source = source.rounds_max(60_000).timeouts(patient());
                let (source, target) = vmm::Transport::Tcp4.connect(source, Target::builder(), 2);
                let (tell, cancelling) = canceller(source.cancel_handle());
                // What is dirty may be counted more than once before a round.
                let (progress, mut tell) = (source.progress(), Some(tell));
                let mut script = vmm::Script {
                    bitmap: guest.dirty.clone(),
                    rounds: 0,
                    between: Box::new(move |_, dirty| {
                        if let Some(tell) = tell.take_if(|_| progress.now().rounds >= round) {
                            tell.send(()).unwrap();
                        }
                        dirty.mark_range(BlockId(0), 0, 1500);
                    }),
                };
                let trip = vmm::travel(source, &mut script, &mut guest, target, TestIncoming::new());
                let returned = Instant::now();
                let (_, at) = cancelling.join().unwrap();
                assert_eq!(trip.sent.outcome, Outcome::Cancelled);
                assert!(u64::from(trip.sent.rounds) >= round, "round {round}: {} rounds", trip.sent.rounds);
                vmm::assert_stayed(&guest, &trip);
                // Both sides have ended, and all threads of both are joined.
                returned.saturating_duration_since(at)
            });
        }
    });
}
