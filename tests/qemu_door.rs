//! A target of QEMU's wire, at whose door others were before the source: none of them may cost the migration.
#![cfg(all(not(loom), feature = "qemu"))]

#[path = "qemu_mutants/capture.rs"]
#[expect(dead_code, reason = "other tests use all of it")]
mod capture;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pageferry::config::Timeouts;
use pageferry::qemu::wire::{Dialect, InitPacket, MAIN_MAGIC};
use pageferry::qemu::{Qemu, Seen};
use pageferry::{CancelHandle, Outcome, Target, TargetReport};

use capture::{CHANNELS, Capture, capture};
use vmm::TestIncoming;

/// How long a connection may take to say who it is, and how long the channels may take.
const HELLO: Duration = Duration::from_secs(2);
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// A main stream that has gone no further.
const HALF_HEADER: &[u8] = b"QEVM\0\0\0\x03";

/// A target that listens, and those who are in its way.
struct Door {
    address: String,
    strangers: Vec<TcpStream>,
    seen: Seen,
    cancel: CancelHandle,
    ended: Receiver<TargetReport>,
}

impl Door {
    fn open() -> Door {
        let qemu = Qemu::new(CHANNELS);
        let seen = qemu.seen();
        let timeouts = Timeouts { hello: HELLO, ..Timeouts::default() };
        let target = Target::builder().framing(qemu).timeouts(timeouts).listen("127.0.0.1:0").unwrap();
        let (address, cancel) = (target.address().unwrap().to_string(), target.cancel_handle());
        let (sender, ended) = channel();
        std::thread::spawn(move || drop(sender.send(target.receive(&mut TestIncoming::new()))));
        Door { address, strangers: Vec::new(), seen, cancel, ended }
    }

    fn connect(&self, words: &[u8]) -> TcpStream {
        let mut wire = TcpStream::connect(&self.address).unwrap();
        wire.write_all(words).unwrap();
        wire
    }

    /// Somebody says this, and stays.
    fn stays(&mut self, words: &[u8]) {
        let stranger = self.connect(words);
        self.strangers.push(stranger);
    }

    /// Somebody says this, and leaves.
    fn leaves(&self, words: &[u8]) {
        drop(self.connect(words));
    }

    /// Waits until everybody who is here has been heard.
    fn settle(&self) {
        // It is heard behind them, and sent away at once: by a reset, as not all of it was read.
        let _ = self.connect(b"GET / HTTP/1.1\r\n\r\n").read_to_end(&mut Vec::new());
    }

    /// A source comes, in the order in which QEMU does all this.
    fn source_comes(&self, capture: &Capture) -> Vec<TcpStream> {
        let mut wires = self.channels_come(capture, b"");
        self.source_goes_on(&mut wires, capture, 0);
        wires
    }

    /// Its main connection, which says this much, and its channels, last.
    fn channels_come(&self, capture: &Capture, main: &[u8]) -> Vec<TcpStream> {
        let main = self.connect(main);
        let channels = capture.streams[1..].iter().map(|records| self.connect(&records[0]));
        [main].into_iter().chain(channels).collect()
    }

    /// All that there is to say, where main has said so much already.
    fn source_goes_on(&self, wires: &mut [TcpStream], capture: &Capture, main_bytes: usize) {
        wires[0].write_all(&capture.streams[0].concat()[main_bytes..]).unwrap();
        for (wire, records) in wires.iter_mut().zip(&capture.streams).skip(1) {
            wire.write_all(&records[1..].concat()).unwrap();
        }
    }

    fn completes(&self) -> TargetReport {
        let report = self.ended.recv_timeout(PATIENCE).expect("it hangs");
        assert_eq!(report.outcome, Outcome::Completed, "{report:#?}");
        report
    }

    /// A source comes, and its guest is taken in without a wait.
    /// Gives how many were turned away, and what is remarked.
    fn takes_the_source(self) -> (u64, Vec<String>) {
        let (capture, begun) = (capture(Dialect::V10_0, true), Instant::now());
        let wires = self.source_comes(&capture);
        let report = self.completes();
        drop((wires, self.strangers));
        assert!(begun.elapsed() < HELLO, "it waited for strangers: {:?}", begun.elapsed());
        (report.turned_away, report.remarks)
    }
}

fn init(channel: u8, uuid: u8) -> Vec<u8> {
    InitPacket { uuid: [uuid; 16], channel }.encode().to_vec()
}

#[test]
fn a_main_connection_that_left_before_its_block_list() {
    for words in [&MAIN_MAGIC[..], HALF_HEADER, b"QEVM\0\0\0\x03\x07\0\0\0\x06pc-q35"] {
        let door = Door::open();
        door.leaves(words);
        // It has read all of it, and more.
        let mut half = door.connect(words);
        half.shutdown(Shutdown::Write).unwrap();
        half.read_to_end(&mut Vec::new()).unwrap();
        let (turned_away, remarks) = door.takes_the_source();
        let told = remarks.iter().filter(|remark| remark.contains("before its list of RAM blocks")).count();
        assert!(turned_away >= 2 && told >= 2, "{turned_away}: {remarks:?}");
    }
}

#[test]
fn a_source_that_has_begun_and_left_ends_it() {
    let door = Door::open();
    // What no stranger says: a whole configuration, and something behind it.
    door.leaves(b"QEVM\0\0\0\x03\x07\0\0\0\x05other\x08\0\x01\0\0");
    let report = door.ended.recv_timeout(HELLO).expect("its user is left without a word");
    assert!(report.outcome.to_string().contains("the source gave up or died"), "{}", report.outcome);
}

/// What the kernel waits for on the target's end of a connection: its column `tr` of `/proc/net/tcp`.
fn timer(door: &Door, far_end: &TcpStream) -> String {
    let port = |at: std::net::SocketAddr| format!(":{:04X}", at.port());
    let own = port(door.address.parse().unwrap());
    let peer = port(far_end.local_addr().unwrap());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.into_iter().find(|row| row[1].ends_with(&own) && row[2].ends_with(&peer));
    row.expect("it is connected")[5].split(':').next().unwrap().to_owned()
}

#[test]
fn the_system_asks_after_those_who_say_no_more() {
    let mut door = Door::open();
    let silent = door.connect(b"");
    (0..CHANNELS).for_each(|id| door.stays(&init(id, 0)));
    door.stays(HALF_HEADER);
    door.settle();
    // 02 is a timer for keep-alive, and nothing else goes on.
    assert_eq!(timer(&door, &silent), "00", "one that has said nothing has a limit of its own");
    door.strangers.iter().for_each(|stranger| assert_eq!(timer(&door, stranger), "02"));
    door.takes_the_source();
}

#[test]
fn main_connections_that_stay_and_say_no_more() {
    let mut door = Door::open();
    (0..40).for_each(|_| door.stays(HALF_HEADER));
    door.stays(&MAIN_MAGIC);
    door.takes_the_source();
}

#[test]
fn a_main_connection_that_says_no_more_is_sent_away_in_time() {
    let mut door = Door::open();
    door.stays(HALF_HEADER);
    let begun = Instant::now();
    door.strangers[0].read_to_end(&mut Vec::new()).unwrap();
    assert!(begun.elapsed() < HELLO * 2, "{:?}", begun.elapsed());
    door.takes_the_source();
}

#[test]
fn a_main_connection_that_asks_and_does_not_read_the_answers() {
    let mut door = Door::open();
    door.stays(b"QEVM\0\0\0\x03\x07\0\0\0\x05other\x08\0\x01\0\0");
    // PING, over and over: until it is sent away.
    let pings = b"\x08\0\x02\0\x04\0\0\0\x01".repeat(4096);
    let begun = Instant::now();
    while door.strangers[0].write_all(&pings).is_ok() {
        assert!(begun.elapsed() < HELLO * 3);
    }
    door.takes_the_source();
}

#[test]
fn nothing_that_another_main_connection_said_is_kept() {
    let mut door = Door::open();
    door.stays(b"QEVM\0\0\0\x03\x07\0\0\0\x05other\x08\0\x01\0\0");
    let seen = door.seen.clone();
    let main_bytes = capture(Dialect::V10_0, true).streams[0].concat().len() as u64;
    door.takes_the_source();
    assert_ne!(seen.facts().machine.unwrap().as_str(), "other");
    assert_eq!(seen.counts().main_bytes, main_bytes);
}

#[test]
fn channels_of_another_machine() {
    for ids in [vec![1], (0..CHANNELS).collect()] {
        let mut door = Door::open();
        ids.iter().for_each(|id| door.stays(&init(*id, b'u')));
        door.takes_the_source();
    }
}

#[test]
fn a_channel_that_left_again() {
    let door = Door::open();
    (0..CHANNELS).for_each(|id| door.leaves(&init(id, 0)));
    door.takes_the_source();
}

#[test]
fn channels_that_stay_and_say_no_more() {
    let mut door = Door::open();
    (0..CHANNELS).for_each(|id| door.stays(&init(id, 0)));
    door.takes_the_source();
}

#[test]
fn more_channels_than_are_kept() {
    vmm::allow_many_descriptors();
    let mut door = Door::open();
    (0..300).for_each(|_| door.stays(&init(0, 0)));
    let (turned_away, _) = door.takes_the_source();
    assert!(turned_away >= 300, "{turned_away}");
}

#[test]
fn doubles_that_come_between_the_source_and_its_first_packet() {
    let (mut door, capture) = (Door::open(), capture(Dialect::V10_0, true));
    let mut wires = door.channels_come(&capture, b"");
    (0..CHANNELS).for_each(|id| door.stays(&init(id, 0)));
    door.settle();
    door.source_goes_on(&mut wires, &capture, 0);
    drop(door.completes());
}

#[test]
fn a_crowd_that_comes_between_the_source_and_its_first_packet() {
    vmm::allow_many_descriptors();
    for words in [init(0, 0), HALF_HEADER.to_vec()] {
        let (mut door, capture) = (Door::open(), capture(Dialect::V10_0, true));
        let mut wires = door.channels_come(&capture, HALF_HEADER);
        (0..300).for_each(|_| door.stays(&words));
        door.settle();
        door.source_goes_on(&mut wires, &capture, HALF_HEADER.len());
        let report = door.completes();
        assert!(report.turned_away >= 300, "{report:#?}");
    }
}

#[test]
fn a_source_that_has_just_given_up_and_comes_again() {
    let (door, capture) = (Door::open(), capture(Dialect::V10_0, true));
    let mut before = door.channels_come(&capture, HALF_HEADER);
    for (wire, records) in before.iter_mut().zip(&capture.streams).skip(1) {
        wire.write_all(&records[1]).unwrap();
    }
    drop(before);
    door.settle();
    let mut wires = door.channels_come(&capture, b"");
    let mut late = wires.pop().unwrap();
    let (last, first) = capture.streams.split_last().unwrap();
    door.source_goes_on(&mut wires, &Capture { streams: first.to_vec(), ..capture.clone() }, 0);
    // All but one of its channels have spoken, and all of the attempt before.
    let early = door.ended.recv_timeout(HELLO / 8);
    assert!(early.is_err(), "{:#?}", early.unwrap());
    late.write_all(&last[1..].concat()).unwrap();
    drop(door.completes());
}

#[test]
fn a_source_that_comes_again_and_says_its_blocks_before_it_connects_its_channels() {
    let (door, capture) = (Door::open(), capture(Dialect::V10_0, true));
    let given_up: Vec<_> = capture.streams[1..].iter().map(|records| door.connect(&records[..2].concat())).collect();
    door.settle();
    drop(given_up);
    let main = door.connect(&capture.streams[0].concat());
    let early = door.ended.recv_timeout(HELLO / 8);
    assert!(early.is_err(), "{:#?}", early.unwrap());
    let channels: Vec<_> = capture.streams[1..].iter().map(|records| door.connect(&records.concat())).collect();
    drop(door.completes());
    drop((main, channels));
}

#[test]
fn a_channel_that_has_said_all_and_left_counts_beside_one_that_stays() {
    let (door, capture) = (Door::open(), capture(Dialect::V10_0, true));
    let mut wires = door.channels_come(&capture, &capture.streams[0].concat());
    let mut late = wires.pop().unwrap();
    let (last, first) = capture.streams.split_last().unwrap();
    for (wire, records) in wires.iter_mut().zip(first).skip(1) {
        wire.write_all(&records[1..].concat()).unwrap();
        wire.shutdown(Shutdown::Write).unwrap();
    }
    door.settle();
    late.write_all(&last[1..].concat()).unwrap();
    drop(door.completes());
}

#[test]
fn a_source_that_has_said_all_and_left_is_heard_all_the_same() {
    let (mut door, capture) = (Door::open(), capture(Dialect::V10_0, false));
    (0..CHANNELS).for_each(|id| door.stays(&init(id, 0)));
    let (mut wires, begun) = (door.channels_come(&capture, b""), Instant::now());
    let mut main = wires.remove(0);
    for (wire, records) in wires.iter_mut().zip(&capture.streams[1..]) {
        wire.write_all(&records[1..].concat()).unwrap();
    }
    drop(wires);
    // Others are at the door of its channels; and it leaves the main connection later.
    main.write_all(&capture.streams[0].concat()).unwrap();
    let early = door.ended.recv_timeout(HELLO / 8);
    assert!(early.is_err(), "{:#?}", early.unwrap());
    drop(main);
    drop(door.completes());
    assert!(begun.elapsed() < HELLO, "it waited for strangers: {:?}", begun.elapsed());
}

#[test]
fn the_uuid_is_the_sources_whatever_others_have_said() {
    let (mut door, mut capture) = (Door::open(), capture(Dialect::V10_0, true));
    (0..CHANNELS).for_each(|id| door.stays(&init(id, b'u')));
    for (id, records) in capture.streams[1..].iter_mut().enumerate() {
        records[0] = init(id as u8, b's');
    }
    let _wires = door.source_comes(&capture);
    drop(door.completes());
    assert_eq!(door.seen.facts().uuid, Some([b's'; 16]));
    assert!(door.seen.facts().callers.len() >= 2 * usize::from(CHANNELS));
}

#[test]
fn all_of_them_together() {
    let mut door = Door::open();
    for words in [&MAIN_MAGIC[..], HALF_HEADER, b"", b"QE", &init(1, 0), &init(0, b'u'), &init(1, b'u'), &init(200, 0)]
    {
        door.stays(words);
        door.leaves(words);
    }
    door.takes_the_source();
}

#[test]
fn a_target_with_strangers_only_can_be_cancelled() {
    let mut door = Door::open();
    door.stays(HALF_HEADER);
    (0..CHANNELS).for_each(|id| door.stays(&init(id, 0)));
    door.cancel.cancel();
    let report = door.ended.recv_timeout(HELLO / 2).expect("it hangs");
    assert_eq!(report.outcome, Outcome::Cancelled);
}

#[test]
fn a_main_stream_that_makes_no_sense_is_told_to_both_sides() {
    let mut door = Door::open();
    door.stays(b"QEVM\0\0\0\x02");
    let report = door.ended.recv_timeout(PATIENCE).expect("it hangs");
    assert!(report.outcome.to_string().contains("version"), "{}", report.outcome);
}
