//! A target against sources and strangers made by hand.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use pageferry::target::TargetBuilder;
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, Round, SessionId};
use pageferry::wire::control::{Final, PeerError, SourceFrame, TargetFrame};
use pageferry::wire::hello::{Hello, HelloRole, Side};
use pageferry::wire::packet::{PacketHeader, RunEntry, RunKind};
use pageferry::{Outcome, Target, TargetReport};

use super::peer::*;
use super::vmm::{self, TestIncoming};
use super::{IN_TIME, timeouts};

/// Runs a target until it ends, and `script` against its address.
pub fn against(incoming: TestIncoming, script: impl FnOnce(&str) + Send) -> (TargetReport, TestIncoming) {
    against_target(Target::builder().timeouts(timeouts()), incoming, script)
}

/// As [`against`], of this kind.
pub fn against_target(
    target: TargetBuilder,
    incoming: TestIncoming,
    script: impl FnOnce(&str) + Send,
) -> (TargetReport, TestIncoming) {
    let target = target.listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let mut incoming = incoming;
    std::thread::scope(|scope| {
        let script = scope.spawn(move || script(&to));
        let begun = Instant::now();
        let report = target.receive(&mut incoming);
        assert!(begun.elapsed() < IN_TIME, "it took {:?}", begun.elapsed());
        script.join().unwrap();
        (report, incoming)
    })
}

/// The script must end the migration for a reason that says this, and the guest must never have run.
#[track_caller]
pub fn fails(what: &str, says: &str, script: impl FnOnce(&str) + Send) {
    let (report, incoming) = against(TestIncoming::new(), script);
    assert!(matches!(report.outcome, Outcome::Failed(_)), "{what}: {}", report.outcome);
    let why = report.outcome.to_string();
    assert!(why.contains(says), "{what}: {why:?} does not say {says:?}");
    assert_eq!(incoming.runs, 0, "{what}");
    assert_eq!(incoming.discards, u32::from(incoming.ram.is_some()), "{what}: discarded iff it was prepared");
}

#[test]
fn a_source_that_falls_silent_is_given_up() {
    fails("Hello, then silence", "in vain for Setup", |to| {
        FakeSource::greet(to).until_closed();
    });
    fails("silence after Ready", "the data channels", |to| {
        FakeSource::ready(to, 2).until_closed();
    });
    fails("silence in the middle of a packet", "pages or Final", |to| {
        let mut source = FakeSource::live(to, 1);
        source.send_data(0, &page_packet(0, Round(0), &[1; 4096])[..1000]);
        source.until_closed();
    });
    fails("silence after Loaded", "Commit", |to| {
        FakeSource::loaded(to).until_closed();
    });
}

#[test]
fn a_source_that_pings_and_never_says_setup_is_given_up() {
    fails("Pings instead of Setup", "Setup", |to| {
        let mut source = FakeSource::greet(to);
        while source.control.send(&SourceFrame::Ping { nonce: 1 }) && source.control.next().is_some() {}
    });
}

#[test]
fn a_source_that_pings_and_never_says_commit_is_given_up() {
    fails("Pings instead of Commit", "Commit", |to| {
        let mut source = FakeSource::loaded(to);
        while source.control.send(&SourceFrame::Ping { nonce: 1 }) && source.control.next().is_some() {}
    });
}

#[test]
fn a_source_that_leaves_is_named_at_every_step() {
    fails("after Hello", "the control connection failed while waiting for the source: the peer closed it", |to| {
        FakeSource::greet(to);
    });
    fails("after Ready", "the peer closed it", |to| drop(FakeSource::ready(to, 2)));
    fails("with one of two channels", "the peer closed it", |to| {
        let mut source = FakeSource::ready(to, 2);
        source.join(ChannelId(0));
        source.next();
    });
    fails("while pages travel", "closed", |to| drop(FakeSource::live(to, 3)));
    fails("after Loaded", "the peer closed it", |to| drop(FakeSource::loaded(to)));
    fails("in the middle of a frame", "ends early", |to| {
        let mut source = FakeSource::greet(to);
        let bytes = source.control.bytes_of(&SourceFrame::Setup(setup(1, &[16])));
        source.control.raw(&bytes[..30]);
    });
    let named = |heard: &[TargetFrame], says: &str| {
        let named = |frame: &TargetFrame| match frame {
            TargetFrame::ChannelFailed { channel: ChannelId(1), reason, .. } => reason.contains(says),
            _ => false,
        };
        assert!(heard.iter().any(named), "{heard:?}");
    };
    fails("in the middle of a packet", "in vain for pages or Final", |to| {
        let mut source = FakeSource::live(to, 2);
        source.send_data(1, &page_packet(0, Round(0), &[1; 4096])[..1000]);
        drop(source.data.remove(1));
        named(&source.until_closed(), "where the rest of a packet, or the next one was expected");
    });
    fails("in the middle of a header", "in vain for pages or Final", |to| {
        let mut source = FakeSource::live(to, 2);
        source.send_data(1, &page_packet(0, Round(0), &[1; 4096])[..10]);
        drop(source.data.remove(1));
        named(&source.until_closed(), "where a packet was expected");
    });
}

#[test]
fn a_source_that_gives_up_says_why() {
    fails("Cancel", "the operator said so", |to| {
        FakeSource::live(to, 1).control.send(&SourceFrame::Cancel { reason: "the operator said so".to_owned() });
    });
    fails("Error", "out of luck", |to| {
        let error = PeerError { code: pageferry::wire::control::ErrorCode::Guest, text: "out of luck".to_owned() };
        FakeSource::loaded(to).control.send(&SourceFrame::Error(error));
    });
}

#[test]
fn control_frames_that_make_no_sense_end_the_migration() {
    let ping = SourceFrame::Ping { nonce: 1 };
    fails("a frame with a bad CRC", "is damaged: its CRC says", |to| {
        let mut source = FakeSource::live(to, 1);
        let mut bytes = source.control.bytes_of(&ping);
        bytes[20] ^= 1;
        source.control.raw(&bytes);
        source.until_closed();
    });
    fails("a frame of 4 GiB", "the length of a control frame is 4294967295, the limit is 1048576", |to| {
        let mut source = FakeSource::live(to, 1);
        let mut bytes = source.control.bytes_of(&ping);
        bytes[4..8].fill(0xff);
        source.control.raw(&bytes);
        source.until_closed();
    });
    fails("a frame sent twice", "control frame 1 came when it was the turn of frame 2", |to| {
        let mut source = FakeSource::live(to, 1);
        let bytes = source.control.bytes_of(&ping);
        source.control.raw(&bytes);
        source.control.raw(&bytes);
        source.until_closed();
    });
    fails("a request for a web page", "control frame", |to| {
        let mut source = FakeSource::greet(to);
        source.control.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
        source.until_closed();
    });
}

#[test]
fn frames_out_of_turn_end_the_migration_and_are_named() {
    let out_of_turn = |what: &str, says: &str, frame: SourceFrame, at: fn(&str) -> FakeSource| {
        fails(what, says, |to| {
            let mut source = at(to);
            source.control.send(&frame);
            let heard = source.until_closed();
            let told = |frame: &TargetFrame| matches!(frame, TargetFrame::Error(e) if e.text.contains(says));
            assert!(heard.iter().any(told), "{what}: the source heard {heard:?}");
        });
    };
    let state = SourceFrame::State { offset: 0, bytes: vec![1] };
    let says = "Setup came while the target waited for";
    out_of_turn("a second Setup", says, SourceFrame::Setup(setup(1, &[16])), |to| FakeSource::ready(to, 1));
    out_of_turn("Setup in flight", says, SourceFrame::Setup(setup(1, &[16])), |to| FakeSource::live(to, 1));
    out_of_turn("State at once", "State came while the target waited for Setup", state.clone(), FakeSource::greet);
    let says = "State came while the target waited for the data channels";
    out_of_turn("State before the channels", says, state, |to| FakeSource::ready(to, 1));
    let middle = SourceFrame::State { offset: 1, bytes: vec![1] };
    out_of_turn("State in the middle after Loaded", "State at offset 1", middle, FakeSource::loaded);
    let says = "Commit came while the target waited for pages or Final";
    out_of_turn("Commit before Final", says, SourceFrame::Commit, |to| FakeSource::live(to, 1));
    let says = "Commit came while the target waited for Setup";
    out_of_turn("Commit at once", says, SourceFrame::Commit, FakeSource::greet);
    let state = SourceFrame::State { offset: 7, bytes: vec![1] };
    out_of_turn("State with a gap", "State at offset 7, 0 bytes are here", state, |to| FakeSource::live(to, 1));
    let says = "Final names other channels than have joined";
    out_of_turn("Final for others", says, SourceFrame::Final(last(2)), |to| FakeSource::live(to, 1));
    let lies = SourceFrame::Final(Final { state_bytes: 5, ..last(1) });
    out_of_turn("Final of more state", "Final says 5 bytes of state, 0 came", lies, |to| FakeSource::live(to, 1));
    let lost = SourceFrame::ChannelLost { channel: ChannelId(9), generation: FIRST };
    out_of_turn("a channel that is not there", "ChannelLost for channel 9", lost, |to| FakeSource::live(to, 1));
}

#[test]
fn a_commit_that_comes_before_everything_has_landed_does_not_run_the_guest() {
    fails("Final and Commit without pages", "Commit came while the target waited for the last round", |to| {
        let mut source = FakeSource::live(to, 1);
        source.control.send(&SourceFrame::Final(last(1)));
        source.control.send(&SourceFrame::Commit);
        source.until_closed();
    });
}

#[test]
fn a_state_that_differs_from_what_final_says_is_refused() {
    fails("another CRC", "its CRC differs", |to| {
        let mut source = FakeSource::live(to, 1);
        source.control.send(&SourceFrame::State { offset: 0, bytes: vec![1, 2, 3] });
        source.send_data(0, &mark(PacketHeader::round_end(Round(0), Epoch(0), 0)));
        source.control.send(&SourceFrame::Final(Final { state_bytes: 3, ..last(1) }));
        source.until_closed();
    });
}

#[test]
fn packets_that_make_no_sense_end_the_migration_and_the_channel_is_named() {
    let run = |first, pages, kind| RunEntry { first, pages, kind };
    let data = RunKind::Data;
    let in_block = |header: PacketHeader, block| PacketHeader { block: BlockId(block), ..header };
    let mut bad_crc = page_packet(0, Round(0), &[1; 4096]);
    bad_crc[65] ^= 1;
    let header = |payload_bytes| pages_header(0, Round(0), 1, payload_bytes);
    let late = PacketHeader { epoch: Epoch(3), ..header(4096) };
    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("a bad CRC", "is damaged: its CRC says", bad_crc),
        (
            "a run past the end",
            "reaches past the end of block 0",
            packet(header(8192), &[run(15, 2, data)], &[1; 8192]),
        ),
        ("a run at the end of numbers", "past the end", packet(header(4096), &[run(u64::MAX, 1, data)], &[1; 4096])),
        ("zeros past the end", "past the end", packet(header(0), &[run(0, u32::MAX, RunKind::Zero)], &[])),
        ("the wrong sequence", "sequence, round and epoch 5, 0, 0", page_packet(5, Round(0), &[1; 4096])),
        ("the wrong round", "sequence, round and epoch 0, 2, 0", page_packet(0, Round(2), &[1; 4096])),
        ("the wrong epoch", "sequence, round and epoch 0, 0, 3", packet(late, &[run(0, 1, data)], &[1; 4096])),
        ("an unknown block", "block 7", packet(in_block(header(4096), 7), &[run(3, 1, data)], &[1; 4096])),
        ("a payload that lies", "8192 payload bytes", packet(header(8192), &[run(3, 1, data)], &[1; 8192])),
        ("garbage", "out of step", vec![0xa5; 64]),
        ("a mark of another round", "round end", mark(PacketHeader::round_end(Round(4), Epoch(0), 0))),
        ("an early end", "ended", mark(PacketHeader::bye(Round(0), Epoch(0), 0))),
    ];
    for (what, says, bytes) in cases {
        fails(what, "", |to| {
            let mut source = FakeSource::live(to, 3);
            source.send_data(1, &bytes);
            // It stays in the set until its source says that it is lost; this one never does.
            let heard = source.until_closed();
            let named = |frame: &TargetFrame| match frame {
                TargetFrame::ChannelFailed { channel, reason, .. } => *channel == ChannelId(1) && reason.contains(says),
                _ => false,
            };
            assert!(heard.iter().any(named), "{what}: the source heard {heard:?}");
        });
    }
}

#[test]
fn a_thousand_blocks_are_prepared_and_more_channels_than_wanted_are_not_waited_for() {
    let (report, incoming) = against(TestIncoming::new(), |to| {
        let mut source = FakeSource::greet(to);
        source.control.send(&SourceFrame::Setup(setup(255, &[1; 1024])));
        assert!(matches!(source.next(), Some(TargetFrame::Ready { .. })));
    });
    assert!(report.outcome.to_string().contains("the peer closed it"), "{}", report.outcome);
    assert_eq!(incoming.ram.unwrap().blocks().len(), 1024);
    assert_eq!(incoming.discards, 1);
}

/// Connections that do not belong to the session.
fn strangers(source: &FakeSource, count: usize) -> Vec<TcpStream> {
    let mut version = hello(HelloRole::Control, Side::Source, SESSION).encode();
    version[8] = 9;
    let late = Hello { generation: Generation(2), ..hello(HelloRole::Data(ChannelId(0)), Side::Source, SESSION) };
    let greetings = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a browser, which is not awaited here\r\n\r\n"[..64].to_vec(),
        vec![0xa5; 64],
        version.to_vec(),
        hello(HelloRole::Data(ChannelId(0)), Side::Source, SessionId([1; 16])).encode().to_vec(),
        hello(HelloRole::Data(ChannelId(9)), Side::Source, SESSION).encode().to_vec(),
        hello(HelloRole::Data(ChannelId(0)), Side::Target, SESSION).encode().to_vec(),
        hello(HelloRole::Control, Side::Source, SESSION).encode().to_vec(),
        hello(HelloRole::Control, Side::Source, SessionId([2; 16])).encode().to_vec(),
        late.encode().to_vec(),
    ];
    greetings.iter().take(count).map(|bytes| source.visit(bytes)).collect()
}

/// Whether the target has closed a connection, after it was given time to.
pub fn was_closed(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(IN_TIME)).unwrap();
    !matches!(stream.read(&mut [0; 1]), Ok(1..)) && stream.write(&[0]).and_then(|_| stream.read(&mut [0; 1])).is_err()
        || matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn connections_of_others_are_dropped_and_counted_and_the_migration_completes() {
    let (report, incoming) = against(TestIncoming::new(), |to| {
        let mut source = FakeSource::ready(to, 1);
        for stranger in strangers(&source, 9) {
            assert!(was_closed(stranger));
        }
        source.join(ChannelId(0));
        assert!(matches!(source.next(), Some(TargetFrame::ChannelJoined { .. })));
        for stranger in strangers(&source, 9) {
            assert!(was_closed(stranger));
        }
        // The channel again, although it has joined.
        source.join(ChannelId(0));
        assert!(was_closed(source.data.pop().unwrap()));
        source.send_data(0, &page_packet(0, Round(0), &[1; 4096]));
        source.send_data(0, &mark(PacketHeader::round_end(Round(0), Epoch(0), 1)));
        source.control.send(&SourceFrame::Final(last(1)));
        assert_eq!(source.next(), Some(TargetFrame::Loaded { round: Round(0) }));
        source.control.send(&SourceFrame::Commit);
        assert_eq!(source.next(), Some(TargetFrame::Running));
    });
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!((incoming.runs, incoming.discards), (1, 0));
    assert_eq!(vmm::read_page(incoming.ram.as_ref().unwrap(), BlockId(0), 3), [1; 4096]);
    assert_eq!(report.turned_away, 9 + 9 + 1);
    assert!(report.remarks.iter().any(|remark| remark.contains("GET / HT")), "{:?}", report.remarks);
    assert!(report.remarks.iter().any(|remark| remark.contains("newer version")), "{:?}", report.remarks);
}

#[test]
fn strangers_who_come_before_the_source_do_not_end_the_wait_for_it() {
    let (report, incoming) = against(TestIncoming::new(), |to| {
        let first = FakeSource::connect(to);
        // Every one of them but those that say a source's Hello: who says that is the source.
        strangers(&first, 6).into_iter().for_each(|stranger| assert!(was_closed(stranger)));
        let mut source = FakeSource::loaded(to);
        source.control.send(&SourceFrame::Commit);
        assert_eq!(source.next(), Some(TargetFrame::Running));
    });
    assert_eq!((report.outcome, incoming.runs), (Outcome::Completed, 1));
    assert!(report.turned_away >= 6, "{}", report.turned_away);
}

#[test]
fn a_source_that_talks_without_listening_is_given_up_before_it_fills_memory() {
    fails("Pings whose answers nobody reads", "the peer does not read it", |to| {
        // Each answer names every lane: it is several times the question.
        let mut source = FakeSource::live(to, 16);
        let ping = SourceFrame::Ping { nonce: 1 };
        while {
            let flood: Vec<u8> = (0..1 << 14).flat_map(|_| source.control.bytes_of(&ping)).collect();
            source.control.raw(&flood)
        } {}
    });
}
