//! One damaged byte, anywhere on any connection: no migration completes with a guest that is not what it was.
#![cfg(not(loom))]

#[path = "damage/proxy.rs"]
mod proxy;
#[path = "support/vmm.rs"]
mod vmm;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::{FrameEncoder, SourceFrame, TargetFrame};
use pageferry::wire::hello::HELLO_BYTES;
use pageferry::wire::packet::{PACKET_HEADER_BYTES, PacketHeader, RunKind, entries};
use pageferry::{DirtyBitmap, Failure, Outcome, Ram, Source, Target, Timeouts, Verify};
use proxy::{FRAME_HEADER_BYTES, Flip, Proxy, Way};
use vmm::{TestGuest, TestIncoming, Trip};

const CHANNELS: u8 = 2;

/// Migrations that run at the same time: most of the time of one that is damaged is waiting.
const AT_ONCE: usize = 8;

/// The longest time limit, with time for a machine that is busy.
const IN_TIME: Duration = Duration::from_secs(8);

fn timeouts() -> Timeouts {
    let ms = Duration::from_millis;
    Timeouts { connect: ms(2000), hello: ms(500), silence: ms(900), hook: ms(900), stall: ms(700) }
}

/// Pages in two chunks of a block and in a second block; some are zero, some were never touched.
fn ram() -> Ram {
    let ram = vmm::ram(PageSize::SIZE_4K, &[640, 20]);
    for page in (0..24).chain(600..624) {
        match page % 6 {
            5 => vmm::zero_page(&ram, BlockId(0), page),
            _ => vmm::write_page(&ram, BlockId(0), page, 3),
        }
    }
    (0..20).step_by(2).for_each(|page| vmm::write_page(&ram, BlockId(1), page, 4));
    ram
}

/// One migration with at most one damaged byte, and all the bytes that the damaged stream should have had.
fn travel(ram: &Ram, verify: Verify, flip: Option<Flip>) -> (TestGuest, Trip, proxy::Seen) {
    travel_within(ram, verify, flip, Duration::ZERO)
}

/// The same, with a resume window on both sides.
fn travel_within(ram: &Ram, verify: Verify, flip: Option<Flip>, window: Duration) -> (TestGuest, Trip, proxy::Seen) {
    let mut guest = TestGuest::new(ram, &DirtyBitmap::for_ram(ram));
    guest.state = (0..3000u32).map(|i| i as u8).collect();
    let target = Target::builder().timeouts(timeouts()).resume_window(window).listen("127.0.0.1:0").unwrap();
    let proxy = Proxy::before(&target.address().unwrap().to_string(), flip);
    let source =
        Source::builder(ram.clone()).channels(CHANNELS).verify(verify).timeouts(timeouts()).resume_window(window);
    let source = source.connect(proxy.address()).unwrap();
    let cancel = target.cancel_handle();
    let receiving = std::thread::spawn(move || {
        let mut incoming = TestIncoming::new();
        (target.receive(&mut incoming), incoming)
    });
    let mut dirty = guest.dirty.clone();
    let begun = Instant::now();
    let sent = source.migrate(&mut dirty, &mut guest);
    assert!(begun.elapsed() < IN_TIME, "it took {:?}", begun.elapsed());
    // The proxy passes on what is under way, and closes when the source has; a target that has not even seen a good
    // Hello still waits for a source.
    let seen = proxy.end();
    cancel.cancel();
    let (received, incoming) = receiving.join().unwrap();
    (guest, Trip { sent, received, incoming }, seen)
}

/// Whatever was damaged: what the two sides say is true, and at most one of them has the guest.
fn assert_truthful(guest: &TestGuest, trip: &Trip) {
    let Trip { sent, received, incoming } = trip;
    match &sent.outcome {
        Outcome::Completed => {
            assert_eq!(received.outcome, Outcome::Completed);
            vmm::assert_arrived(guest, trip);
        }
        Outcome::Failed(_) | Outcome::Cancelled => {
            assert_eq!(guest.resumed, guest.paused, "resumed iff it was paused");
            assert_eq!(incoming.runs, 0, "it runs on both sides: {} and {}", sent.outcome, received.outcome);
        }
        // Commit was sent: the source must not resume, and the target may have got it or not.
        Outcome::Uncertain(_) => assert_eq!((guest.paused, guest.resumed), (1, 0)),
    }
    if received.outcome == Outcome::Completed {
        assert!(matches!(sent.outcome, Outcome::Completed | Outcome::Uncertain(_)), "{}", sent.outcome);
        assert_eq!(vmm::first_difference(&guest.ram, incoming.ram.as_ref().unwrap()), None);
        assert!(incoming.state == guest.state);
    } else {
        assert_eq!(incoming.runs, 0);
    }
}

/// Runs `check` on all of `flips`, several at a time.
fn sweep(flips: Vec<Flip>, check: impl Fn(Flip) + Sync) {
    let queue = Mutex::new(flips.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap().next();
                    match next {
                        Some(flip) => check(flip),
                        None => return,
                    }
                }
            });
        }
    });
}

/// How many bytes an undamaged stream has.
fn length(ram: &Ram, connection: usize, way: Way) -> u64 {
    let nowhere = Flip { connection, way, offset: u64::MAX, in_frame: None, mask: 0 };
    let (guest, trip, seen) = travel(ram, Verify::Wire, Some(nowhere));
    vmm::assert_arrived(&guest, &trip);
    seen.bytes.len() as u64
}

/// Whether it is the source's last word that was damaged, by which it says that it has heard the end: then all is over.
fn is_in_last_word(flip: &Flip, seen: &proxy::Seen) -> bool {
    const PING_BYTES: u64 = FRAME_HEADER_BYTES as u64 + 8;
    flip.way == Way::ToTarget && flip.offset + PING_BYTES >= seen.bytes.len() as u64
}

/// Damage of the control connection in one direction, at every `step`-th byte.
fn sweep_control(way: Way, step: u64) {
    let ram = ram();
    let outcomes = Mutex::new(BTreeMap::new());
    let length = length(&ram, 0, way);
    // Each time another bit, so that all of them have their turn.
    let flips = (0..length).step_by(step as usize);
    let flips = flips.map(|offset| Flip { connection: 0, way, offset, in_frame: None, mask: 1 << (offset / step % 8) });
    sweep(flips.collect(), |flip| {
        let (guest, trip, seen) = travel(&ram, Verify::Wire, Some(flip));
        println!("{flip:?}: {} and {}", trip.sent.outcome, trip.received.outcome);
        assert_truthful(&guest, &trip);
        let noticed = trip.sent.outcome != Outcome::Completed || is_in_last_word(&flip, &seen);
        assert!(noticed || !seen.flipped, "nobody noticed {flip:?}");
        *outcomes.lock().unwrap().entry(trip.sent.outcome.word()).or_insert(0) += 1;
    });
    let outcomes = outcomes.into_inner().unwrap();
    println!("{way:?}: {outcomes:?}");
    assert!(outcomes.get("failed").is_some_and(|n| *n >= 10), "{outcomes:?}");
}

#[test]
fn damage_on_the_control_connection_to_the_target_ends_truthfully() {
    sweep_control(Way::ToTarget, 37);
}

/// With a resume window, damage on the control connection costs that connection. What is said before the session is
/// agreed on, and Commit and its answer, which nobody may say twice, are what it can still cost the migration.
#[test]
fn with_a_resume_window_a_damaged_control_frame_costs_the_connection_and_not_the_migration() {
    const WINDOW: Duration = Duration::from_secs(2);
    let ram = ram();
    for (way, step) in [(Way::ToTarget, 61), (Way::ToSource, 13)] {
        let outcomes = Mutex::new(BTreeMap::new());
        let length = length(&ram, 0, way);
        let flips = (0..length).step_by(step as usize);
        let flips =
            flips.map(|offset| Flip { connection: 0, way, offset, in_frame: None, mask: 1 << (offset / step % 8) });
        sweep(flips.collect(), |flip| {
            let (guest, trip, seen) = travel_within(&ram, Verify::Wire, Some(flip), WINDOW);
            println!("{flip:?}: {} and {}", trip.sent.outcome, trip.received.outcome);
            let resumed = trip.sent.resumes > 0;
            match &trip.sent.outcome {
                Outcome::Completed => {
                    assert_eq!(vmm::first_difference(&guest.ram, trip.incoming.ram.as_ref().unwrap()), None);
                    assert_eq!(trip.incoming.runs, 1, "{flip:?}");
                    assert!(resumed == seen.flipped || is_in_last_word(&flip, &seen), "{flip:?}");
                }
                _ => assert_truthful(&guest, &trip),
            }
            let at_commit = matches!(trip.sent.outcome, Outcome::Uncertain(_))
                || matches!(trip.received.outcome, Outcome::Failed(Failure::Fenced));
            let mended = resumed || !seen.flipped || is_in_last_word(&flip, &seen);
            assert!(mended || at_commit || trip.sent.rounds == 0, "{flip:?}: {}", trip.sent.outcome);
            let word = if resumed { "resumed" } else { trip.sent.outcome.word() };
            *outcomes.lock().unwrap().entry(word).or_insert(0) += 1;
        });
        let outcomes = outcomes.into_inner().unwrap();
        println!("{way:?}: {outcomes:?}");
        assert!(outcomes.get("resumed").is_some_and(|n| *n >= 10), "{outcomes:?}");
    }
}

#[test]
fn damage_on_the_control_connection_to_the_source_ends_truthfully() {
    sweep_control(Way::ToSource, 5);
}

#[test]
fn a_damaged_commit_or_its_answer_never_gives_the_guest_two_owners() {
    // Both are a header and nothing else.
    let ram = ram();
    let mut flips = Vec::new();
    let (mut commit, mut running) = (Vec::new(), Vec::new());
    FrameEncoder::default().encode(&SourceFrame::Commit, &mut commit).unwrap();
    FrameEncoder::default().encode(&TargetFrame::Running, &mut running).unwrap();
    for (way, frame) in [(Way::ToTarget, commit), (Way::ToSource, running)] {
        assert_eq!(frame.len(), FRAME_HEADER_BYTES);
        let in_frame = Some(u16::from_le_bytes([frame[0], frame[1]]));
        let flip = |offset| Flip { connection: 0, way, offset, in_frame, mask: 1 << (offset % 8) };
        flips.extend((0..FRAME_HEADER_BYTES as u64).map(flip));
    }
    let (all, uncertain) = (flips.len() as u32, Mutex::new(0));
    sweep(flips, |flip| {
        let (guest, trip, _) = travel(&ram, Verify::Wire, Some(flip));
        assert_truthful(&guest, &trip);
        *uncertain.lock().unwrap() += u32::from(matches!(trip.sent.outcome, Outcome::Uncertain(_)));
    });
    assert_eq!(uncertain.into_inner().unwrap(), all);
}

/// What stands at an offset of the stream of a data connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Hello,
    Head,
    Payload,
}

fn place(bytes: &[u8], offset: u64) -> Place {
    let offset = offset as usize;
    let mut at = HELLO_BYTES;
    if offset < at {
        return Place::Hello;
    }
    loop {
        let head = bytes[at..at + PACKET_HEADER_BYTES].try_into().unwrap();
        let header = PacketHeader::decode(head).unwrap();
        let table = &bytes[at + PACKET_HEADER_BYTES..][..header.table_bytes()];
        at += PACKET_HEADER_BYTES + table.len();
        if offset < at {
            return Place::Head;
        }
        for run in entries(table).map(Result::unwrap).filter(|run| run.kind == RunKind::Data) {
            let end = at + ((run.pages as usize) << 12);
            if offset < end {
                return Place::Payload;
            }
            at = end;
        }
    }
}

/// Damage of a data connection at these offsets.
fn sweep_data(verify: Verify, channel: usize, offsets: impl Fn(u64) -> Vec<u64>) -> (u32, u32) {
    let ram = ram();
    let connection = 1 + channel;
    let length = length(&ram, connection, Way::ToTarget);
    let flips = offsets(length).into_iter().enumerate().map(|(turn, offset)| {
        let mask = 1 << (turn % 8);
        Flip { connection, way: Way::ToTarget, offset, in_frame: None, mask }
    });
    let found = Mutex::new((0, 0));
    sweep(flips.collect(), |flip| {
        let (guest, trip, seen) = travel(&ram, verify, Some(flip));
        assert_truthful(&guest, &trip);
        // The two channels share the pages anew each time: this stream may have ended earlier.
        if !seen.flipped {
            return vmm::assert_arrived(&guest, &trip);
        }
        let place = place(&seen.bytes, flip.offset);
        println!("{flip:?}, {place:?}: {} and {}", trip.sent.outcome, trip.received.outcome);
        match place {
            Place::Payload => {
                assert_eq!(trip.sent.outcome, Outcome::Completed, "{flip:?}");
                vmm::assert_arrived(&guest, &trip);
                // A chunk of 2 MiB at the most, of which this page is one.
                assert_eq!((trip.sent.repairs, trip.received.repairs), (1, 1), "{flip:?}");
                assert!((1..=2 << 20).contains(&trip.sent.repaired_bytes), "{flip:?}: {}", trip.sent.repaired_bytes);
                found.lock().unwrap().0 += 1;
            }
            Place::Head => {
                assert_eq!(trip.sent.outcome, Outcome::Completed, "{flip:?}: {:?}", trip.sent.remarks);
                vmm::assert_arrived(&guest, &trip);
                assert!(trip.sent.channels_lost >= 1, "{flip:?}");
                found.lock().unwrap().1 += 1;
            }
            // The target turns such a connection away: it never joins, and is made anew.
            Place::Hello => {
                assert_eq!(trip.sent.outcome, Outcome::Completed, "{flip:?}: {:?}", trip.sent.remarks);
                found.lock().unwrap().1 += 1;
            }
        }
    });
    found.into_inner().unwrap()
}

#[test]
fn every_damaged_payload_is_caught_before_commit_and_its_chunk_travels_again() {
    for verify in [Verify::Wire, Verify::Full] {
        let (payload, _) = sweep_data(verify, 0, |length| (0..length).step_by(1913).collect());
        let (more, _) = sweep_data(verify, 1, |length| (0..length).step_by(1913).collect());
        assert!(payload + more >= 40, "{payload} and {more} bytes of payload were damaged");
    }
}

#[test]
fn every_damaged_byte_of_hello_header_and_table_costs_the_channel_and_not_the_migration() {
    let (_, heads) = sweep_data(Verify::Wire, 0, |_| (0..HELLO_BYTES as u64 + 200).step_by(3).collect());
    assert!(heads >= 40, "{heads} bytes were damaged");
}
