//! How it ended is never told better than it was, nor to the source.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use pageferry::qemu::relay::Relay;
use pageferry::qemu::wire::Dialect::V10_0;
use pageferry::qemu::wire::Record;
use pageferry::{Outcome, Timeouts};

use crate::world::{
    BLOCK_BYTES, Main, PATIENCE, SHUT_ERROR, SHUT_OK, SILENCE, SOON, STALL, TAIL, TEN, Tongue, World, hang_up, packet,
    read, rest, shut, sync, timeouts,
};

/// A tail that is cut off within a device, at a byte that is no end mark, and one that may be whole without a description.
pub const HALF: &[u8] = b"\x04some dev";
pub const UNDESCRIBED: &[u8] = b"\x04some device\x01\x00";

fn failed(outcome: &Outcome, why: &str) {
    assert!(matches!(outcome, Outcome::Failed(failure) if failure.to_string().contains(why)), "{outcome}");
}

fn uncertain(outcome: &Outcome, why: &str) {
    assert!(matches!(outcome, Outcome::Uncertain(failure) if failure.to_string().contains(why)), "{outcome}");
}

#[test]
fn what_the_destination_says_against_it_travels_back_at_any_time() {
    for at_end in [false, true] {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        if at_end {
            through.say_ram(TEN);
            through.say_main(TAIL);
        }
        through.main_there.write_all(&shut(7)).unwrap();
        assert_eq!(read(&mut through.main, 8), shut(7));
        drop((through.main, through.channels));
        failed(&world.end().outcome, "SHUT with error 7");
    }
}

#[test]
fn a_destination_that_says_all_is_well_before_it_can_be_is_not_believed() {
    for tail in [None, Some(HALF)] {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        if let Some(tail) = tail {
            through.say_ram(TEN);
            through.say_main(tail);
        }
        through.main_there.write_all(&shut(0)).unwrap();
        assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
        drop((through.main, through.channels));
        failed(&world.end().outcome, "before the source's stream has ended");
    }
}

#[test]
fn a_destination_that_has_taken_a_guest_whose_devices_are_not_described_is_believed() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.say_main(UNDESCRIBED);
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    assert_eq!(world.end().outcome, Outcome::Completed);
}

#[test]
fn a_destination_that_dies_during_the_rounds_leaves_the_guest_to_the_source() {
    for main_dies in [true, false] {
        let world = World::new(2);
        let mut through = world.through(TEN, 2);
        through.channels[0].write_all(&packet(V10_0, 0)).unwrap();
        let dead = if main_dies { through.main_there } else { through.channels_there.remove(1) };
        drop(dead);
        assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
        drop((through.main, through.channels));
        failed(&world.end().outcome, if main_dies { "main connection" } else { "channel 1" });
    }
}

#[test]
fn a_destination_that_goes_away_with_the_whole_guest_may_run_it() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.say_main(TAIL);
    drop(through.main_there);
    assert_eq!(rest(&mut through.main), [0; 0], "nobody says what nobody knows");
    drop((through.main, through.channels));
    uncertain(&world.end().outcome, "without an answer");
}

#[test]
fn a_source_that_dies_during_the_rounds_ends_it_and_the_destination_gets_nothing_more() {
    for main_dies in [true, false] {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        // Half a packet.
        through.say(&packet(V10_0, 0)[..2000]);
        match main_dies {
            true => drop(through.main),
            false => drop(through.channels),
        }
        assert_eq!(rest(&mut through.main_there), [0; 0]);
        failed(&world.end().outcome, if main_dies { "main stream" } else { "data of a packet" });
    }
}

#[test]
fn a_source_that_dies_within_the_devices_has_not_given_its_guest_away() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.say_main(HALF);
    drop(through.main);
    failed(&world.end().outcome, "devices");
}

#[test]
fn a_source_that_dies_with_everything_said_leaves_the_answer_to_the_destination() {
    for (tail, answer) in [(TAIL, Some(0)), (TAIL, Some(5)), (TAIL, None), (UNDESCRIBED, Some(1)), (UNDESCRIBED, None)]
    {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        through.say_ram(TEN);
        through.say_main(tail);
        let died = Instant::now();
        drop((through.main, through.channels));
        assert_eq!(rest(&mut through.main_there), [0; 0], "the end of the stream passes");
        match answer {
            Some(error) => through.main_there.write_all(&shut(error)).unwrap(),
            None => assert!(died.elapsed() < SILENCE),
        }
        let outcome = world.end().outcome;
        match answer {
            Some(0) => uncertain(&outcome, "the destination has taken the guest, and the source does not know"),
            // It may have run the guest, and have missed only what describes it.
            Some(_) if tail == UNDESCRIBED => uncertain(&outcome, "main stream"),
            Some(error) => failed(&outcome, &format!("SHUT with error {error}")),
            None => {
                uncertain(&outcome, if tail == TAIL { "before the destination has answered" } else { "main stream" });
                assert!(died.elapsed() >= SILENCE, "{:?}", died.elapsed());
            }
        }
    }
}

#[test]
fn without_a_return_path_a_stream_that_may_be_whole_is_not_called_so() {
    let tongue = Tongue { return_path: false, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    through.say_ram(tongue);
    through.say_main(UNDESCRIBED);
    hang_up(&through.main);
    assert_eq!(rest(&mut through.main_there), [0; 0]);
    drop((through.main_there, through.main));
    uncertain(&world.end().outcome, "main connection");
}

#[test]
fn a_destination_that_speaks_unasked_is_no_destination() {
    let tongue = Tongue { return_path: false, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(rest(&mut through.main), [0; 0], "the source did not ask to be told");
    failed(&world.end().outcome, "nobody has opened the return path");
}

#[test]
fn what_comes_in_single_bytes_passes_all_the_same() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    TAIL.iter().for_each(|byte| through.say_main(&[*byte]));
    for byte in shut(0) {
        through.main_there.write_all(&[byte]).unwrap();
    }
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    let report = world.end();
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!(report.counters.main_bytes, Main::usual(TEN).whole().len() as u64);
}

#[test]
fn what_a_source_has_said_before_it_died_reaches_a_destination_that_is_slow() {
    let folder = std::env::temp_dir().join(format!("pageferry-relay-slow-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = |name: &str| format!("unix:{}", folder.join(name).display());
    let destination = UnixListener::bind(folder.join("there")).unwrap();
    // Longer than a moment of the destination's, and shorter than all of them.
    let (moment, silence) = (Duration::from_millis(200), Duration::from_millis(1500));
    let builder = Relay::builder().channels(0).timeouts(Timeouts { silence, ..timeouts() });
    let relay = builder.listen(&path("here")).unwrap().to(&path("there")).unwrap();
    let (tell, ended) = channel();
    std::thread::spawn(move || tell.send(relay.run()).unwrap());
    let zeros: Vec<_> = (0..100_000).map(|page| Record::ZeroPage { block: 0, offset: page % 256 * 4096 }).collect();
    let said = Main::new(Tongue { flushes: false, ..TEN }, 1, &zeros).whole();
    let (mut source, from) = (UnixStream::connect(folder.join("here")).unwrap(), said.clone());
    std::thread::spawn(move || source.write_all(&from).unwrap());
    let (mut there, mut got) = (destination.accept().unwrap().0, Vec::new());
    loop {
        if let Ok(report) = ended.recv_timeout(moment) {
            panic!("{} after {} of {} bytes", report.outcome, got.len(), said.len());
        }
        if (&there).take(64 << 10).read_to_end(&mut got).unwrap() == 0 {
            break;
        }
    }
    assert_eq!(got.len(), said.len());
    there.write_all(&SHUT_OK).unwrap();
    uncertain(&ended.recv().unwrap().outcome, "the destination has taken the guest, and the source does not know");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_source_that_leaves_with_the_answer_unread_does_not_know_it() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.say_main(TAIL);
    through.main_there.write_all(&shut(0)).unwrap();
    // It is at its system, and no further.
    through.main.peek(&mut [0]).unwrap();
    drop((through.main, through.channels));
    uncertain(&world.end().outcome, "the destination has taken the guest, and the source does not know");
}

#[test]
fn a_source_without_a_return_path_is_read_on_where_its_guest_may_run_at_the_destination() {
    let tongue = Tongue { return_path: false, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    through.say_ram(tongue);
    through.say_main(UNDESCRIBED);
    drop(through.main_there);
    assert_eq!(rest(&mut through.main), [0; 0], "nobody says what nobody knows");
    // Nobody is let in any more, and nobody is sent away before the relay has ended.
    let mut late = world.connect(b"");
    late.set_read_timeout(Some(STALL)).unwrap();
    assert_eq!(late.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it waits for the source to end");
    // What that says now nobody needs, but without a reader it would take its guest back.
    through.main.write_all(&TAIL[UNDESCRIBED.len()..]).unwrap();
    hang_up(&through.main);
    uncertain(&world.end().outcome, "without an answer");
    assert!(through.main.take_error().unwrap().is_none(), "it was cut off");
}

#[test]
fn a_source_without_a_return_path_that_is_refused_is_cut_off_at_once() {
    let tongue = Tongue { return_path: false, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    through.channels[0].write_all(&packet(V10_0, BLOCK_BYTES)).unwrap();
    let refused = Instant::now();
    assert_eq!(rest(&mut through.main), [0; 0]);
    // It would take all that it is rid of for received.
    let part = &Main::new(tongue, 1, &[]).parts[0];
    while through.main.write_all(part).is_ok() {}
    assert!(refused.elapsed() < SOON, "{:?}", refused.elapsed());
    failed(&world.end().outcome, "0x100000");
}

#[test]
fn a_source_without_a_return_path_that_has_said_everything_may_have_to_be_continued_by_hand() {
    let tongue = Tongue { return_path: false, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    // The last SYNC does not come.
    through.say(&sync(V10_0));
    through.main.write_all(&[&Main::usual(tongue).parts[0], &Main::usual(tongue).end, TAIL].concat()).unwrap();
    hang_up(&through.main);
    let report = world.end();
    failed(&report.outcome, "nothing moves: 2 SYNCs on channel 0, 3 barriers");
    assert!(report.remarks.iter().any(|remark| remark.contains("continue it there")), "{:?}", report.remarks);
}

/// Whether the system asks after the peer of this TCP connection of ours: its keep-alive timer runs.
fn is_asked_after(local: u16, peer: u16) -> bool {
    let connections = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let mut fields = connections.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = |fields: &Vec<&str>| {
        fields[1].ends_with(&format!(":{local:04X}")) && fields[2].ends_with(&format!(":{peer:04X}"))
    };
    fields.find(ours).expect("it is there")[5].starts_with("02:")
}

#[test]
fn a_machine_that_is_gone_is_noticed_at_either_end() {
    let world = World::new(1);
    let through = world.through(TEN, 1);
    let listens = world.at.rsplit(':').next().unwrap().parse().unwrap();
    let sources = [&through.main, &through.channels[0]].map(|s| (listens, s.local_addr().unwrap().port()));
    let ports = |s: &TcpStream| (s.peer_addr().unwrap().port(), s.local_addr().unwrap().port());
    let destinations = [&through.main_there, &through.channels_there[0]].map(ports);
    let until = Instant::now() + PATIENCE;
    // For a moment, what it was sent last is asked after instead.
    while !sources.iter().chain(&destinations).all(|(local, peer)| is_asked_after(*local, *peer)) {
        assert!(Instant::now() < until);
        world.settle();
    }
}
