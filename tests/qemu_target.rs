//! A target that takes QEMU's stream, fed with streams that are made up: what comes late, twice, too early, out of step or
//! not at all.
#![cfg(all(not(loom), feature = "qemu"))]

#[path = "qemu_mutants/capture.rs"]
mod capture;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::config::Timeouts;
use pageferry::dirty::combined::Still;
use pageferry::progress::Stage;
use pageferry::qemu::Qemu;
use pageferry::qemu::wire::{
    Barrier, Dialect, InitPacket, MAIN_MAGIC, Name, NewRamPacket, ReturnDecoder, ReturnMessage,
};
use pageferry::target::TargetBuilder;
use pageferry::units::PageSize;
use pageferry::{Guest, HookError, Outcome, Source, StateWriter, Target, TargetReport, Verify};

use capture::{BLOCKS, CHANNELS, Capture, PAGE, capture};
use vmm::TestIncoming;

/// How long a target waits for the rest once some have come.
const SILENCE: Duration = Duration::from_millis(300);
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A target at work on a thread of its own, and the far ends of its connections: the main one first.
struct Play {
    wires: Vec<UnixStream>,
    ended: Receiver<(TargetReport, TestIncoming)>,
    thread: JoinHandle<()>,
}

fn target() -> TargetBuilder {
    let timeouts = Timeouts { silence: SILENCE, hook: SILENCE, hello: Duration::from_secs(1), ..Timeouts::default() };
    Target::builder().framing(Qemu::new(CHANNELS)).timeouts(timeouts)
}

fn receive(target: Target, mut vmm: TestIncoming) -> (Receiver<(TargetReport, TestIncoming)>, JoinHandle<()>) {
    let (sender, ended) = channel();
    let thread = std::thread::spawn(move || {
        let report = target.receive(&mut vmm);
        sender.send((report, vmm)).unwrap();
    });
    (ended, thread)
}

impl Play {
    fn begin() -> Play {
        Play::with(TestIncoming::new())
    }

    fn with(vmm: TestIncoming) -> Play {
        Play::of(target(), vmm)
    }

    fn of(target: TargetBuilder, vmm: TestIncoming) -> Play {
        let pair = |_| UnixStream::pair().unwrap();
        let (near, wires): (Vec<_>, Vec<_>) = (0..=CHANNELS).map(pair).unzip();
        let target = target.connections(near.into_iter().map(OwnedFd::from)).unwrap();
        let (ended, thread) = receive(target, vmm);
        Play { wires, ended, thread }
    }

    /// Says these records on a connection.
    fn say(&mut self, wire: usize, records: &[Vec<u8>]) {
        // A target that has seen enough may be gone.
        let _ = self.wires[wire].write_all(&records.concat());
    }

    fn say_no_more(&self, wire: usize) {
        let _ = self.wires[wire].shutdown(Shutdown::Write);
    }

    /// Says a whole migration but for the last words of the main stream.
    fn say_all_but_the_last(&mut self, capture: &Capture) -> Vec<u8> {
        let (last, first) = capture.streams[0].split_last().unwrap();
        for (wire, records) in capture.streams.iter().enumerate().skip(1) {
            self.say(wire, records);
        }
        self.say(0, first);
        last.clone()
    }

    fn goes_on(&self, time: Duration) {
        let early = self.ended.recv_timeout(time).map(|(report, _)| report);
        assert_eq!(early.unwrap_err(), RecvTimeoutError::Timeout);
    }

    /// How it ended, and what was said on the return path.
    fn end(mut self) -> (TargetReport, TestIncoming, Vec<ReturnMessage>) {
        let (report, vmm) = self.ended.recv_timeout(PATIENCE).expect("it hangs");
        self.thread.join().unwrap();
        let (mut said, mut messages) = (Vec::new(), Vec::new());
        let _ = self.wires[0].set_read_timeout(Some(PATIENCE));
        let _ = self.wires[0].read_to_end(&mut said);
        let (mut decoder, mut input) = (ReturnDecoder::new(), &said[..]);
        while let Some(message) = decoder.pull(&mut input).unwrap() {
            messages.push(message);
        }
        (report, vmm, messages)
    }

    /// It fails for a reason with these words in it, within a time; the source is told so, if it can be.
    fn fails(self, words: &str) {
        let (report, vmm, messages) = self.end();
        let Outcome::Failed(why) = &report.outcome else { panic!("{report:#?}") };
        assert!(why.to_string().contains(words), "{why}");
        assert_eq!((vmm.runs, vmm.discards), (0, 1));
        let shuts: Vec<_> = messages.iter().filter(|message| matches!(message, ReturnMessage::Shut { .. })).collect();
        assert!(shuts.iter().all(|shut| **shut == ReturnMessage::Shut { error: 1 }), "{messages:?}");
    }

    /// It completes with what was sent.
    fn completes(self, capture: &Capture) -> TargetReport {
        let (report, vmm, messages) = self.end();
        assert_eq!(report.outcome, Outcome::Completed, "{report:#?}");
        assert_eq!((vmm.runs, vmm.discards), (1, 0));
        assert_eq!(messages.last() == Some(&ReturnMessage::Shut { error: 0 }), capture.return_path, "{messages:?}");
        report
    }
}

fn captures() -> impl Iterator<Item = Capture> {
    [Dialect::V10_0, Dialect::V7_2].into_iter().flat_map(|dialect| [true, false].map(|back| capture(dialect, back)))
}

/// What may come behind the last SYNC of a channel, but must not; and how it is told.
fn surplus(dialect: Dialect) -> [(Vec<u8>, &'static str); 4] {
    let name = Name::new(BLOCKS[0].0).unwrap();
    let pages = NewRamPacket { normal: &[0], ..NewRamPacket::pages(99, &name) }.encode(dialect).unwrap();
    let sync = NewRamPacket::sync(99).encode(dialect).unwrap();
    [
        (sync.to_vec(), "last SYNC"),
        ([&pages[..], &[7; PAGE]].concat(), "last SYNC"),
        (sync[..700].to_vec(), "closed the connection where a packet was expected"),
        (vec![0x55; 64], "magic"),
    ]
}

/// A packet that says nothing, as QEMU 7.2 sends one behind a SYNC with pages.
fn empty() -> Vec<u8> {
    NewRamPacket { sync: false, ..NewRamPacket::sync(98) }.encode(Dialect::V7_2).unwrap().to_vec()
}

#[test]
fn a_migration_is_taken_as_it_was_sent() {
    for capture in captures() {
        let mut play = Play::begin();
        let last = play.say_all_but_the_last(&capture);
        play.say(0, &[last]);
        (0..=usize::from(CHANNELS)).for_each(|wire| play.say_no_more(wire));
        let report = play.completes(&capture);
        assert_eq!((report.channels, report.rounds), (CHANNELS, 4));
    }
}

#[test]
fn a_source_that_waits_for_an_answer_need_not_end_its_channels() {
    for capture in captures().filter(|capture| capture.return_path) {
        let mut play = Play::begin();
        let last = play.say_all_but_the_last(&capture);
        play.say(0, &[last]);
        let report = play.completes(&capture);
        assert!(report.downtime < SILENCE, "{:?}", report.downtime);
    }
}

#[test]
fn a_channel_that_goes_on_behind_the_last_barrier_fails_the_migration() {
    for whole in captures() {
        for (more, words) in surplus(whole.dialect) {
            let (mut play, mut capture) = (Play::begin(), whole.clone());
            // Behind some that mean nothing, which take time to be read.
            if capture.dialect == Dialect::V7_2 {
                capture.streams[2].extend((0..40).map(|_| empty()));
            }
            let last = play.say_all_but_the_last(&capture);
            let more_bytes = more.len();
            play.say(2, &[more]);
            play.say(0, &[last]);
            if !capture.return_path {
                (0..=usize::from(CHANNELS)).for_each(|wire| play.say_no_more(wire));
            }
            // The rest of a packet is waited for.
            let is_cut = more_bytes < 1344 && more_bytes > 64;
            play.fails(if is_cut && capture.return_path { "in vain for the end of its channels" } else { words });
        }
    }
}

#[test]
fn without_a_return_path_a_channel_has_its_say_until_it_ends() {
    for capture in captures().filter(|capture| !capture.return_path) {
        for (more, words) in surplus(capture.dialect).into_iter().map(Some).chain([None]).map(Option::unzip) {
            let mut play = Play::begin();
            let last = play.say_all_but_the_last(&capture);
            play.say(0, &[last]);
            play.say_no_more(0);
            play.goes_on(SILENCE / 3);
            more.iter().for_each(|more| play.say(3, std::slice::from_ref(more)));
            (1..=usize::from(CHANNELS)).for_each(|wire| play.say_no_more(wire));
            match words {
                Some(words) => play.fails(words),
                None => drop(play.completes(&capture)),
            }
        }
    }
}

#[test]
fn channels_that_a_source_leaves_open_behind_its_end_are_waited_for_no_longer_than_for_anything() {
    let capture = capture(Dialect::V10_0, false);
    let mut play = Play::begin();
    let last = play.say_all_but_the_last(&capture);
    play.say(0, &[last]);
    play.say_no_more(0);
    let report = play.completes(&capture);
    assert!(report.downtime >= SILENCE, "{:?}", report.downtime);
    assert!(report.remarks.iter().any(|remark| remark.contains("not its channels")), "{:?}", report.remarks);
}

#[test]
fn a_target_that_waits_for_channels_to_end_can_be_cancelled() {
    let (near, mut wires): (Vec<_>, Vec<_>) = (0..=CHANNELS).map(|_| UnixStream::pair().unwrap()).unzip();
    let patient = target().timeouts(Timeouts { silence: PATIENCE, ..Timeouts::default() });
    let target = patient.connections(near.into_iter().map(OwnedFd::from)).unwrap();
    let (cancel, progress) = (target.cancel_handle(), target.progress());
    let (ended, thread) = receive(target, TestIncoming::new());
    for (wire, records) in wires.iter_mut().zip(&capture(Dialect::V10_0, false).streams).rev() {
        wire.write_all(&records.concat()).unwrap();
    }
    wires[0].shutdown(Shutdown::Write).unwrap();
    while progress.now().stage != Stage::HandOver {
        std::thread::yield_now();
    }
    cancel.cancel();
    let (report, vmm) = ended.recv_timeout(PATIENCE / 2).expect("it hangs");
    assert_eq!((report.outcome, vmm.runs, vmm.discards), (Outcome::Cancelled, 0, 1));
    thread.join().unwrap();
}

#[test]
fn an_empty_packet_behind_the_last_sync_says_nothing() {
    for capture in captures().filter(|capture| capture.dialect == Dialect::V7_2) {
        let mut play = Play::begin();
        let last = play.say_all_but_the_last(&capture);
        play.say(1, &[empty()]);
        play.say(0, &[last]);
        if !capture.return_path {
            (0..=usize::from(CHANNELS)).for_each(|wire| play.say_no_more(wire));
        }
        let report = play.completes(&capture);
        assert_eq!(report.rounds, 4);
    }
}

#[test]
fn device_state_without_its_description_holds_the_guest_up_for_a_time() {
    for dialect in [Dialect::V10_0, Dialect::V7_2] {
        let mut play = Play::begin();
        let last = play.say_all_but_the_last(&capture(dialect, true));
        // Its end mark is there; what describes it is not.
        let end = last.windows(2).rposition(|mark| mark == [0, 6]).unwrap();
        play.say(0, &[last[..=end].to_vec()]);
        play.fails("the rest of the device state");
    }
}

#[test]
fn a_source_may_flush_its_disks_in_the_midst_of_its_device_state() {
    let capture = capture(Dialect::V10_0, true);
    let timeouts = Timeouts { silence: SILENCE, hook: PATIENCE, ..Timeouts::default() };
    let mut play = Play::of(target().timeouts(timeouts), TestIncoming::new());
    let last = play.say_all_but_the_last(&capture);
    let (state, rest) = last.split_at(last.len() / 2);
    play.say(0, &[state.to_vec()]);
    play.goes_on(SILENCE * 2);
    play.say(0, &[rest.to_vec()]);
    drop(play.completes(&capture));
}

#[test]
fn what_was_answered_goes_out_while_a_barrier_is_waited_for() {
    // More answers than a socket takes.
    const PINGS: usize = 60_000;
    let capture = capture(Dialect::V10_0, true);
    let timeouts = Timeouts { silence: PATIENCE, ..Timeouts::default() };
    let mut play = Play::of(target().timeouts(timeouts), TestIncoming::new());
    let syncs = capture.streams.iter().map(|records| records[..records.len().min(2)].to_vec()).collect::<Vec<_>>();
    (1..syncs.len()).for_each(|wire| play.say(wire, &syncs[wire]));
    let begun = capture.streams[0].iter().position(|record| record[0] == 2).unwrap();
    let ping = b"\x08\0\x02\0\x04\0\0\0\x01".to_vec();
    play.say(0, &capture.streams[0][..begun]);
    play.say(0, &vec![ping; PINGS]);
    // Its channels have not come to the end of the round that this part ends.
    play.say(0, &capture.streams[0][begun..]);
    play.wires[0].set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut decoder, mut pongs) = (ReturnDecoder::new(), 0);
    while pongs <= PINGS || decoder.finish().is_err() {
        let mut bytes = [0; 4096];
        let n = play.wires[0].read(&mut bytes).expect("every answer");
        let mut input = &bytes[..n];
        while let Some(message) = decoder.pull(&mut input).unwrap() {
            pongs += usize::from(matches!(message, ReturnMessage::Pong { .. }));
        }
    }
    (1..syncs.len()).for_each(|wire| play.say(wire, &capture.streams[wire][2..]));
    drop(play.completes(&capture));
}

#[test]
fn a_source_that_never_comes_to_its_end_holds_nobody_up() {
    let capture = capture(Dialect::V7_2, true);
    let target = target().listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let (ended, thread) = receive(target, TestIncoming::new());
    let mut wires: Vec<_> = (0..=CHANNELS).map(|_| TcpStream::connect(&address).unwrap()).collect();
    for (wire, records) in wires.iter_mut().zip(&capture.streams).skip(1) {
        wire.write_all(&records.concat()).unwrap();
    }
    let mut talker = wires[1].try_clone().unwrap();
    let talks = std::thread::spawn(move || {
        let empties = empty().repeat(64);
        while talker.write_all(&empties).is_ok() {}
    });
    wires[0].write_all(&capture.streams[0].concat()).unwrap();
    let (report, _) = ended.recv_timeout(PATIENCE).expect("it hangs");
    // Where the machine let the talker rest for a moment, all was read by then; and empty packets say nothing.
    let is_given_up = report.outcome.to_string().contains("the end of its channels");
    assert!(is_given_up || report.outcome == Outcome::Completed, "{}", report.outcome);
    thread.join().unwrap();
    talks.join().unwrap();
}

#[test]
fn bytes_behind_the_end_that_come_while_the_guest_is_loaded_fail_the_migration() {
    let capture = capture(Dialect::V10_0, true);
    let (near, mut wires): (Vec<_>, Vec<_>) = (0..=CHANNELS).map(|_| UnixStream::pair().unwrap()).unzip();
    let mut vmm = TestIncoming::new();
    let mut main = wires[0].try_clone().unwrap();
    vmm.on_load = Some(Box::new(move || main.write_all(b"more").unwrap()));
    let target = target().connections(near.into_iter().map(OwnedFd::from)).unwrap();
    let (ended, thread) = receive(target, vmm);
    for (wire, records) in wires.iter_mut().zip(&capture.streams).rev() {
        wire.write_all(&records.concat()).unwrap();
    }
    Play { wires, ended, thread }.fails("behind the end");
}

/// Every connection stays open: what is missing is not coming, and nobody says so.
#[test]
fn channels_and_main_stream_that_are_out_of_step_fail_in_bounded_time() {
    let sync = |dialect| NewRamPacket::sync(50).encode(dialect).unwrap().to_vec();
    for whole in captures() {
        let last = whole.streams[2].len() - 1;
        // A word, or a section of nothing.
        let flush = match whole.dialect {
            Dialect::V10_0 => whole.streams[0].iter().position(|record| record[..] == 0x200_u64.to_be_bytes()),
            Dialect::V7_2 => None,
        };
        let mut plays: Vec<Capture> = (0..3).map(|_| whole.clone()).collect();
        plays[0].streams[2].remove(last);
        plays[1].streams[2].insert(3, sync(whole.dialect));
        plays[2].streams[2].insert(1, sync(whole.dialect));
        if let Some(flush) = flush {
            let word = whole.streams[0][flush].clone();
            plays.extend([whole.clone(), whole.clone()]);
            // Behind a part's own: START has one at the most.
            let later = whole.streams[0].iter().rposition(|record| *record == word).unwrap();
            plays[3].streams[0].insert(later, word);
            plays[4].streams[0].remove(flush + 4);
            let at =
                plays[4].streams[0].iter().skip(flush + 1).position(|record| record[..] == 0x200_u64.to_be_bytes());
            plays[4].streams[0].remove(flush + 1 + at.unwrap());
        }
        for (index, capture) in plays.iter().enumerate() {
            let mut play = Play::begin();
            let last = play.say_all_but_the_last(capture);
            play.say(0, &[last]);
            let begun = Instant::now();
            let (report, vmm, _) = play.end();
            assert!(matches!(report.outcome, Outcome::Failed(_)), "{index}: {report:#?}");
            assert_eq!((vmm.runs, vmm.discards), (0, 1), "{index}");
            assert!(begun.elapsed() < PATIENCE / 4, "{index}: {:?}", begun.elapsed());
        }
    }
}

#[test]
fn a_channel_or_the_main_stream_that_ends_early_fails_the_migration() {
    for whole in captures() {
        for wire in 0..=usize::from(CHANNELS) {
            for kept in (1..whole.streams[wire].len()).step_by(7) {
                let mut play = Play::begin();
                let mut cut = whole.clone();
                cut.streams[wire].truncate(kept);
                cut.streams.iter().enumerate().skip(1).for_each(|(wire, records)| play.say(wire, records));
                play.say(0, &cut.streams[0]);
                (0..=usize::from(CHANNELS)).for_each(|wire| play.say_no_more(wire));
                let (report, vmm, _) = play.end();
                assert!(matches!(report.outcome, Outcome::Failed(_)), "wire {wire}, {kept} records: {report:#?}");
                assert_eq!(vmm.runs, 0);
            }
        }
    }
}

fn init(channel: u8, uuid: u8) -> Vec<u8> {
    InitPacket { uuid: [uuid; 16], channel }.encode().to_vec()
}

#[test]
fn strangers_and_doubles_cost_a_migration_nothing() {
    let capture = capture(Dialect::V10_0, true);
    let target = target().listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let (ended, thread) = receive(target, TestIncoming::new());
    let say = |bytes: &[u8]| {
        let mut wire = TcpStream::connect(&address).unwrap();
        wire.write_all(bytes).unwrap();
        wire
    };
    let whole: Vec<Vec<u8>> = capture.streams.iter().map(|records| records.concat()).collect();
    // Silent ones, parts of an init packet, other languages, channels that there are not.
    let mut strangers = vec![say(b""), say(b"QE"), say(&init(1, 0)[..40]), say(b"GET / HTTP/1.1\r\n\r\n")];
    strangers.extend([say(&init(CHANNELS, 0)), say(&init(254, 0)), say(&[0xFF; 200])]);
    let mut wires: Vec<_> = whole[1..].iter().map(|stream| say(stream)).collect();
    let mut main = say(&MAIN_MAGIC);
    // They stand in for the target's word that it has heard the main connection: it has gone through those before.
    main.write_all(&whole[0][4..8]).unwrap();
    strangers.extend([say(&init(0, 0)), say(&init(1, 9)), say(&MAIN_MAGIC)]);
    main.write_all(&whole[0][8..]).unwrap();
    wires.push(main);
    let (report, vmm) = ended.recv_timeout(PATIENCE).expect("it hangs");
    thread.join().unwrap();
    assert_eq!((&report.outcome, vmm.runs), (&Outcome::Completed, 1), "{report:#?}");
}

#[test]
fn channels_whose_source_gave_up_before_it_began_make_room_for_those_of_another() {
    let capture = capture(Dialect::V10_0, true);
    let target = target().listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let (ended, thread) = receive(target, TestIncoming::new());
    for channel in 0..CHANNELS {
        // Another VM's; it is closed again.
        TcpStream::connect(&address).unwrap().write_all(&init(channel, 7)).unwrap();
    }
    let say = |records: &Vec<Vec<u8>>| {
        let mut wire = TcpStream::connect(&address).unwrap();
        wire.write_all(&records.concat()).unwrap();
        wire
    };
    let wires: Vec<_> = capture.streams[1..].iter().map(say).collect();
    let main = say(&capture.streams[0]);
    let (report, vmm) = ended.recv_timeout(PATIENCE).expect("it hangs");
    thread.join().unwrap();
    drop((wires, main));
    assert_eq!((&report.outcome, vmm.runs), (&Outcome::Completed, 1), "{report:#?}");
}

/// A machine that stands still, as QEMU would describe it.
struct Standing;

impl Guest for Standing {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(b"\x07\0\0\0\x0bpc-q35-10.0".to_vec())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        Ok(out.write_all(b"\0\x06\0\0\0\x1f{\"page_size\":4096,\"devices\":[]}")?)
    }
}

#[test]
fn a_source_of_this_library_is_taken_through_any_number_of_channels() {
    vmm::allow_many_descriptors();
    let ram = vmm::ram(PageSize::SIZE_4K, &[700, 3]);
    vmm::fill(&ram, 1);
    for (channels, dialect, barrier, return_path) in [
        (0, Dialect::V10_0, Barrier::PerSection, true),
        (1, Dialect::V10_0, Barrier::PerRound, false),
        (3, Dialect::V7_2, Barrier::PerSection, false),
        (255, Dialect::V10_0, Barrier::PerRound, true),
    ] {
        let target = Target::builder().framing(Qemu::new(channels)).listen("127.0.0.1:0").unwrap();
        let address = target.address().unwrap().to_string();
        let (ended, thread) = receive(target, TestIncoming::new());
        let qemu = Qemu::new(channels).dialect(dialect, barrier).return_path(return_path);
        let source = Source::builder(ram.clone()).verify(Verify::Off).framing(qemu).connect(&address).unwrap();
        let sent = source.migrate(&mut Still::new(), &mut Standing);
        let (report, vmm) = ended.recv_timeout(PATIENCE).expect("it hangs");
        thread.join().unwrap();
        assert_eq!((&sent.outcome, &report.outcome), (&Outcome::Completed, &Outcome::Completed), "{channels} channels");
        assert_eq!(vmm::first_difference(&ram, vmm.ram.as_ref().unwrap()), None);
        assert!(report.downtime < Duration::from_secs(5), "{channels} channels: {:?}", report.downtime);
    }
}
