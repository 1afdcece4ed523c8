//! A source against targets made by hand.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use pageferry::net::{Connector, Opening};
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId};
use pageferry::wire::control::{LanePong, SourceFrame, TargetFrame};
use pageferry::wire::hello::{HelloRole, Side};
use pageferry::{DirtyBitmap, Failure, Outcome, Source, SourceReport, Verify};

use super::peer::*;
use super::vmm::{self, TestGuest};
use super::{IN_TIME, timeouts};

fn guest(pages: u64) -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[pages]);
    // Every second page, so that each is a run of its own.
    (0..pages).step_by(2).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}

/// More than sockets and rings take while nobody reads.
const MANY_PAGES: u64 = 2 * 16384;

/// Runs a source until it ends, and `script` as its target.
fn against(pages: u64, script: impl FnOnce(TcpListener) + Send) -> (SourceReport, TestGuest) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let mut guest = guest(pages);
    // An unoptimised build takes its time to hash.
    let verify = if pages > 64 { Verify::Off } else { Verify::Wire };
    let source = Source::builder(guest.ram.clone()).timeouts(timeouts()).verify(verify).connect(&to).unwrap();
    std::thread::scope(|scope| {
        let script = scope.spawn(move || script(listener));
        let mut dirty = guest.dirty.clone();
        let begun = Instant::now();
        let report = source.migrate(&mut dirty, &mut guest);
        assert!(begun.elapsed() < IN_TIME, "it took {:?}", begun.elapsed());
        script.join().unwrap();
        (report, guest)
    })
}

/// The script must end the migration for a reason that says this (or that), with the guest running here again.
#[track_caller]
fn fails(what: &str, says: &str, script: impl FnOnce(TcpListener) + Send) {
    fails_with(what, says, 64, script);
}

#[track_caller]
fn fails_with(what: &str, says: &str, pages: u64, script: impl FnOnce(TcpListener) + Send) {
    let (report, guest) = against(pages, script);
    assert!(matches!(report.outcome, Outcome::Failed(_)), "{what}: {}", report.outcome);
    let why = report.outcome.to_string();
    assert!(says.split('|').any(|says| why.contains(says)), "{what}: {why:?} does not say {says:?}");
    assert_eq!(guest.resumed, guest.paused, "{what}: resumed iff it was paused");
}

/// The script must leave it open who runs the guest, for a reason that says this: it stays paused here.
#[track_caller]
fn leaves_open(what: &str, says: &str, script: impl FnOnce(TcpListener) + Send) {
    let (report, guest) = against(64, script);
    assert!(matches!(report.outcome, Outcome::Uncertain(_)), "{what}: {}", report.outcome);
    let why = report.outcome.to_string();
    assert!(why.contains(says), "{what}: {why:?} does not say {says:?}");
    assert_eq!((guest.paused, guest.resumed), (1, 0), "{what}");
}

#[test]
fn a_target_that_does_not_speak_the_protocol_is_named() {
    fails("nobody answers", "the target's Hello", |listener| {
        silence(&mut FakeTarget::accept(listener));
    });
    let answer = |bytes: Vec<u8>| {
        move |listener| {
            let mut target = FakeTarget::accept(listener);
            target.control.raw(&bytes);
            target.until_closed();
        }
    };
    let http = b"HTTP/1.1 400 Bad Request\r\nServer: not what you think\r\nContent-Length: 0\r\n\r\n";
    fails("a web server", "not a pageferry peer: its first bytes were \"HTTP/1.1\"", answer(http.to_vec()));
    fails("garbage", "not a pageferry peer", answer(vec![0xa5; 64]));
    let mut version = hello(HelloRole::Control, Side::Target, SESSION).encode();
    version[8] = 2;
    fails("another version", "a newer version of the protocol: 2; this side speaks 1", answer(version.to_vec()));
    let other = hello(HelloRole::Control, Side::Target, SessionId([3; 16])).encode();
    fails("another session", "its Hello is for another connection", answer(other.to_vec()));
    fails("half a Hello, then the end", "failed while waiting for the target's Hello", |listener| {
        let mut target = FakeTarget::accept(listener);
        target.control.raw(&hello(HelloRole::Control, Side::Target, SESSION).encode()[..20]);
    });
    fails("a source that mirrors", "its Hello is for another connection", |listener| {
        let mut target = FakeTarget::accept(listener);
        let mirrored = hello(HelloRole::Control, Side::Source, target.session);
        target.control.raw(&mirrored.encode());
        target.until_closed();
    });
}

fn ready(target: &mut FakeTarget) {
    target.control.send(&TargetFrame::Ready { instance: InstanceId([1; 16]), features: 0 });
}

/// Says nothing any more, not even Pong.
fn silence(target: &mut FakeTarget) {
    target.pongs = false;
    target.until_closed();
}

#[test]
fn a_target_that_falls_silent_is_given_up_at_every_step() {
    fails("after Hello", "Ready (the target's prepare)", |listener| {
        silence(&mut FakeTarget::greet(listener));
    });
    fails("after Ready", "did not take it in within", |listener| {
        silence(&mut FakeTarget::connected(listener));
    });
    fails_with("in round 0", "nothing moved for|a sign of life", MANY_PAGES, |listener| {
        silence(&mut FakeTarget::live(listener));
    });
    fails("after Final", "Loaded (the target's load_state)", |listener| {
        silence(&mut FakeTarget::until_final(listener).0);
    });
    leaves_open("after Commit", "Running (the target's run)", |listener| {
        silence(&mut FakeTarget::until_commit(listener));
    });
}

#[test]
fn a_target_that_answers_pings_and_nothing_else_is_given_up_at_every_step() {
    fails("after Hello", "Ready (the target's prepare)", |listener| {
        FakeTarget::greet(listener).until_closed();
    });
    fails("after Ready", "did not take it in within", |listener| {
        FakeTarget::connected(listener).until_closed();
    });
    fails_with("without reading a byte of data", "nothing moved for", MANY_PAGES, |listener| {
        FakeTarget::live(listener).until_closed();
    });
    // More single pages than three epochs hold: the source must wait for EpochApplied.
    fails_with("without applying an epoch", "nothing moved for", 4 * 2 * 16384, |listener| {
        let mut target = FakeTarget::live(listener);
        target.swallow();
        target.until_closed();
    });
    fails("after Final", "Loaded (the target's load_state)", |listener| {
        FakeTarget::until_final(listener).0.until_closed();
    });
    leaves_open("after Commit", "Running (the target's run)", |listener| {
        FakeTarget::until_commit(listener).until_closed();
    });
}

#[test]
fn progress_that_a_target_makes_up_does_not_pass_for_progress() {
    fails_with("ever more bytes", "nothing moved for", MANY_PAGES, |listener| {
        let mut target = FakeTarget::live(listener);
        let mut bytes = 0;
        while let Some(frame) = target.control.next() {
            if let SourceFrame::Ping { nonce } = frame {
                bytes += 1 << 30;
                let (channel, generation) = (ChannelId(0), FIRST);
                let lane = LanePong { channel, generation, rounds_passed: 0, at_barrier: false, bytes };
                target.control.send(&TargetFrame::Pong { nonce, lanes: vec![lane] });
            }
        }
    });
}

/// Answers each Ping with these lanes, and this nonce if it is not the Ping's own.
fn answer_pings(target: &mut FakeTarget, own_nonce: Option<u64>, lanes: &[LanePong]) {
    while let Some(frame) = target.control.next() {
        if let SourceFrame::Ping { nonce } = frame {
            let nonce = own_nonce.unwrap_or(nonce);
            target.control.send(&TargetFrame::Pong { nonce, lanes: lanes.to_vec() });
        }
    }
}

fn lane(channel: u8, rounds_passed: u32, bytes: u64) -> LanePong {
    LanePong { channel: ChannelId(channel), generation: FIRST, rounds_passed, at_barrier: false, bytes }
}

#[test]
fn a_target_that_never_says_where_the_bytes_went_is_not_waited_for() {
    // Everything is read, and the guest is idle: all that is missing is the target's word.
    let says = [
        ("no lane", vec![]),
        ("one lane of two", vec![lane(0, 1000, u64::MAX)]),
        ("no bytes", vec![lane(0, 1000, 0), lane(1, 1000, 0)]),
        ("lanes that are not there", vec![lane(2, 1000, u64::MAX), lane(254, 1000, u64::MAX)]),
    ];
    for (what, lanes) in says {
        fails_with(what, "nothing moved for|in vain for ChannelRetired", MANY_PAGES, |listener| {
            let mut target = FakeTarget::live(listener);
            target.swallow();
            answer_pings(&mut target, None, &lanes);
        });
    }
}

#[test]
fn a_target_that_answers_another_ping_than_the_one_it_got_is_not_waited_for() {
    fails("the answer to another Ping", "the answer to a Ping", |listener| {
        let mut target = FakeTarget::live(listener);
        target.swallow();
        answer_pings(&mut target, Some(0), &[lane(0, 1000, u64::MAX), lane(1, 1000, u64::MAX)]);
    });
}

#[test]
fn a_target_that_leaves_is_named_at_every_step() {
    /// All connections end at once, and one of them is found first.
    const EITHER: &str = "the control connection failed|data channel";
    fails(
        "after Hello",
        "the control connection failed while waiting for the target: the peer closed it",
        |listener| {
            drop(FakeTarget::greet(listener));
        },
    );
    fails("after Ready", "closed", |listener| drop(FakeTarget::connected(listener)));
    fails("while pages travel", EITHER, |listener| drop(FakeTarget::live(listener)));
    fails("after Final", EITHER, |listener| drop(FakeTarget::until_final(listener)));
    leaves_open("after Commit", "the control connection failed", |listener| drop(FakeTarget::until_commit(listener)));
}

#[test]
fn what_the_target_says_before_it_leaves_is_the_reason() {
    fails("Refused", "no such machine", |listener| {
        FakeTarget::greet(listener).control.send(&TargetFrame::Refused { reason: "no such machine".to_owned() });
    });
    let discarded = TargetFrame::Discarded { reason: "changed my mind".to_owned() };
    fails_with("Discarded in round 0", "changed my mind", MANY_PAGES, |listener| {
        FakeTarget::live(listener).control.send(&discarded);
    });
    fails("RunFailed", "could not start the guest, which did not run there: no vCPU", |listener| {
        let mut target = FakeTarget::until_commit(listener);
        target.control.send(&TargetFrame::RunFailed { reason: "no vCPU".to_owned() });
    });
}

#[test]
fn frames_out_of_turn_end_the_migration_and_are_named() {
    let told = |mut target: FakeTarget, frame: &TargetFrame| {
        target.control.send(frame);
        let heard = target.until_closed();
        assert!(matches!(heard.last(), Some(SourceFrame::Error(_))), "the target heard {heard:?}");
    };
    let loaded = TargetFrame::Loaded { round: Round(0) };
    let applied = |epoch, lanes: &[u8]| TargetFrame::EpochApplied {
        epoch: Epoch(epoch),
        lanes: lanes.iter().map(|lane| (ChannelId(*lane), FIRST)).collect(),
    };
    let joined = |channel| TargetFrame::ChannelJoined { channel: ChannelId(channel), generation: FIRST };
    fails("Loaded instead of Ready", "Loaded came", |l| told(FakeTarget::greet(l), &loaded));
    fails("Running instead of Ready", "Running came", |l| told(FakeTarget::greet(l), &TargetFrame::Running));
    fails("Running before Commit", "Running came", |l| told(FakeTarget::until_final(l).0, &TargetFrame::Running));
    fails("an epoch at once", "epoch 0 cannot be applied", |l| told(FakeTarget::greet(l), &applied(0, &[0])));
    fails("a far epoch", "cannot be applied", |l| told(FakeTarget::until_final(l).0, &applied(u64::MAX, &[0, 1])));
    fails("an unknown channel joins", "ChannelJoined", |l| told(FakeTarget::connected(l), &joined(7)));
    fails("a channel joins twice", "ChannelJoined for channel 0", |l| {
        let mut target = FakeTarget::connected(l);
        target.control.send(&joined(0));
        told(target, &joined(0));
    });
    fails("Loaded for another round", "Loaded for round 9", |l| {
        told(FakeTarget::until_final(l).0, &TargetFrame::Loaded { round: Round(9) });
    });
    fails("a second Ready", "Ready came", |l| {
        let mut target = FakeTarget::connected(l);
        ready(&mut target);
        target.until_closed();
    });
    fails("an answer to a question not asked", "QueryAnswer came", |l| {
        told(FakeTarget::until_final(l).0, &TargetFrame::QueryAnswer { running: true });
    });
    leaves_open("Ready after Commit", "Ready came", |l| {
        let mut target = FakeTarget::until_commit(l);
        ready(&mut target);
        target.until_closed();
    });
    leaves_open("Discarded after Commit", "changed my mind", |l| {
        let discarded = TargetFrame::Discarded { reason: "changed my mind".to_owned() };
        FakeTarget::until_commit(l).control.send(&discarded);
    });
}

/// Reads all, in round 0 of many pages, until the source asks; then says this.
fn in_round_0(frame: TargetFrame) -> impl FnOnce(TcpListener) + Send {
    move |listener| {
        let mut target = FakeTarget::live(listener);
        while !matches!(target.control.next(), Some(SourceFrame::Ping { .. })) {}
        target.control.send(&frame);
        let heard = target.until_closed();
        assert!(matches!(heard.last(), Some(SourceFrame::Error(_))), "the target heard {heard:?}");
    }
}

#[test]
fn words_about_what_was_never_sent_end_the_migration_in_the_middle_of_a_round() {
    let applied = |epoch, lanes: &[(u8, u32)]| TargetFrame::EpochApplied {
        epoch: Epoch(epoch),
        lanes: lanes.iter().map(|lane| (ChannelId(lane.0), Generation(lane.1))).collect(),
    };
    let says = "epoch 0 cannot be applied now";
    fails_with("an epoch that is still open", says, MANY_PAGES, in_round_0(applied(0, &[(0, 1)])));
    let says = "epoch 18446744073709551615 cannot be applied now";
    fails_with("the last of all epochs", says, MANY_PAGES, in_round_0(applied(u64::MAX, &[])));
    let loaded = TargetFrame::Loaded { round: Round(0) };
    fails_with("Loaded before Final", "Loaded came", MANY_PAGES, in_round_0(loaded));
    let says = "DigestMismatch came";
    let differs = TargetFrame::DigestMismatch { round: Round(0), block: BlockId(0), chunk_digests: vec![7; 65_536] };
    fails_with("a mismatch before Final", says, MANY_PAGES, in_round_0(differs));
    let joined = TargetFrame::ChannelJoined { channel: ChannelId(0), generation: FIRST };
    fails_with("a channel that has joined", "ChannelJoined", MANY_PAGES, in_round_0(joined));
    let other = TargetFrame::ChannelJoined { channel: ChannelId(0), generation: Generation(u32::MAX) };
    fails_with("a generation that never was", "ChannelJoined", MANY_PAGES, in_round_0(other));
}

#[test]
fn an_epoch_that_is_closed_and_not_sent_is_not_applied_whatever_the_target_says() {
    // Two epochs of single pages lie in rings and sockets: nobody has read a byte, and both are said to be applied.
    for lanes in [vec![(ChannelId(0), FIRST), (ChannelId(1), FIRST)], vec![(ChannelId(9), FIRST)]] {
        let says = "was applied before it was sent|EpochApplied names channel 9|cannot be applied now";
        fails_with("an epoch on its way", says, 4 * MANY_PAGES, |listener| {
            let mut target = FakeTarget::live(listener);
            for _ in 0..2 {
                while !matches!(target.control.next(), Some(SourceFrame::Ping { .. })) {}
            }
            target.control.send(&TargetFrame::EpochApplied { epoch: Epoch(1), lanes: lanes.clone() });
            target.until_closed();
        });
    }
}

#[test]
fn a_mismatch_in_a_block_that_is_not_there_is_no_panic() {
    let cases =
        [(999, 1, "names block 999, which does not exist"), (1023, 0, "names block 1023, which does not exist")];
    for (block, digests, says) in cases {
        fails("DigestMismatch", says, |listener| {
            let (mut target, last) = FakeTarget::until_final(listener);
            let (round, block, chunk_digests) = (last.round, BlockId(block), vec![1; digests]);
            target.control.send(&TargetFrame::DigestMismatch { round, block, chunk_digests });
            target.until_closed();
        });
    }
}

#[test]
fn a_target_that_never_agrees_is_given_up_after_a_bounded_number_of_repairs() {
    let (report, _) = against(64, |listener| {
        let (mut target, mut last) = FakeTarget::until_final(listener);
        loop {
            let (round, block, chunk_digests) = (last.round, BlockId(0), vec![1; 3]);
            target.control.send(&TargetFrame::DigestMismatch { round, block, chunk_digests });
            last = loop {
                match target.next() {
                    Some(SourceFrame::Final(next)) => break next,
                    Some(_) => {}
                    None => return,
                }
            };
        }
    });
    assert!(report.outcome.to_string().contains("disagree on the contents of RAM block 0"), "{}", report.outcome);
    assert_eq!(report.repairs, pageferry::session::REPAIRS_MAX);
}

#[test]
fn control_frames_that_make_no_sense_end_the_migration() {
    fails("a bad CRC", "is damaged: its CRC says", |listener| {
        let mut target = FakeTarget::greet(listener);
        let mut bytes = target.control.bytes_of(&TargetFrame::Ready { instance: InstanceId([1; 16]), features: 0 });
        bytes[20] ^= 1;
        target.control.raw(&bytes);
        target.until_closed();
    });
    fails("a frame of 4 GiB", "the limit is 1048576", |listener| {
        let mut target = FakeTarget::greet(listener);
        let mut bytes = target.control.bytes_of(&TargetFrame::Running);
        bytes[4..8].fill(0xff);
        target.control.raw(&bytes);
        target.until_closed();
    });
    leaves_open("a bad CRC after Commit", "is damaged: its CRC says", |listener| {
        let mut target = FakeTarget::until_commit(listener);
        let mut bytes = target.control.bytes_of(&TargetFrame::Running);
        bytes[12] ^= 1;
        target.control.raw(&bytes);
        target.until_closed();
    });
}

#[test]
fn a_flood_of_pongs_does_not_keep_the_source_from_its_work() {
    let (report, _) = against(64, |listener| {
        let mut target = FakeTarget::greet(listener);
        let pong = TargetFrame::Pong { nonce: 1, lanes: Vec::new() };
        while {
            let flood: Vec<u8> = (0..1 << 14).flat_map(|_| target.control.bytes_of(&pong)).collect();
            target.control.raw(&flood)
        } {}
    });
    assert!(report.outcome.to_string().contains("Ready (the target's prepare)"), "{}", report.outcome);
}

/// Control over TCP, and one data channel with a buffer so small that a few marks fill it.
struct Narrow {
    to: String,
    data: Option<OwnedFd>,
}

impl Connector for Narrow {
    fn open(&mut self, opening: Opening) -> io::Result<OwnedFd> {
        match opening {
            Opening::Control => TcpStream::connect(&self.to).map(OwnedFd::from),
            Opening::Data { .. } => self.data.take().ok_or_else(|| io::ErrorKind::NotFound.into()),
        }
    }
}

#[test]
fn a_target_that_says_running_and_never_read_a_byte_does_not_hold_the_source() {
    // Each block is a packet of its own, and each packet takes its share of the buffer. For some number of blocks the
    // last mark fills the buffer: whatever the source would send after Running, it would wait for ever.
    let mut completed = 0;
    for blocks in 1..=6 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ram = vmm::ram(PageSize::SIZE_4K, &vec![1; blocks]);
        ram.iter().for_each(|(id, _)| vmm::zero_page(&ram, id, 0));
        let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
        let (near, far) = UnixStream::pair().unwrap();
        vmm::set_smallest_send_buffer(&near);
        let narrow = Narrow { to: listener.local_addr().unwrap().to_string(), data: Some(near.into()) };
        let source = Source::builder(ram.clone()).channels(1).timeouts(timeouts()).connector(narrow).unwrap();
        let script = std::thread::spawn(move || {
            let mut target = FakeTarget::greet(listener);
            ready(&mut target);
            // The source has nothing but zeros to go by, which show no rate: it waits until it hears that they were read.
            target.claim_all();
            target.control.send(&TargetFrame::ChannelJoined { channel: ChannelId(0), generation: FIRST });
            while let Some(frame) = target.next() {
                match frame {
                    SourceFrame::Final(last) => target.control.send(&TargetFrame::Loaded { round: last.round }),
                    SourceFrame::Commit => target.control.send(&TargetFrame::Running),
                    _ => true,
                };
            }
            drop(far);
        });
        let begun = Instant::now();
        let mut dirty = guest.dirty.clone();
        let report = source.migrate(&mut dirty, &mut guest);
        assert!(begun.elapsed() < IN_TIME, "{blocks} blocks: it took {:?}", begun.elapsed());
        script.join().unwrap();
        match report.outcome {
            Outcome::Completed => completed += 1,
            Outcome::Failed(Failure::Stalled { .. }) => {}
            other => panic!("{blocks} blocks: {other}"),
        }
    }
    assert!((1..6).contains(&completed), "{completed} completed: the buffer was never, or always, too small");
}
