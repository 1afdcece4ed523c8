//! Nobody who is stuck holds up a cancel, and whoever is slow is waited for.

use std::io::{Read, Write};
use std::thread;
use std::time::Instant;

use pageferry::qemu::wire::Dialect::V10_0;
use pageferry::qemu::wire::Record;
use pageferry::{CancelAnswer, Outcome};

use crate::ends::{HALF, UNDESCRIBED};
use crate::world::{
    HELLO, Main, PATIENCE, PONG, SHUT_ERROR, SHUT_OK, SILENCE, SOON, STALL, TAIL, TEN, Through, Tongue, World, packet,
    read, rest, shut, sync,
};

/// Cancels, and looks at what the source is told.
fn cancel(world: World, through: Through) {
    let asked = Instant::now();
    assert_eq!(world.cancel.cancel(), CancelAnswer::Accepted);
    let Through { mut main, channels, .. } = through;
    assert_eq!(read(&mut main, 8), SHUT_ERROR);
    let report = world.end();
    assert_eq!(report.outcome, Outcome::Cancelled);
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    drop(channels);
}

/// Writes pages on this channel until nobody takes more, which is long.
fn fill(through: &mut Through) -> u64 {
    let channel = &mut through.channels[0];
    channel.set_write_timeout(Some(STALL)).unwrap();
    let page = packet(V10_0, 0);
    let mut written = 0;
    while channel.write_all(&page).is_ok() {
        written += page.len() as u64;
    }
    written
}

#[test]
fn a_cancel_ends_it_while_nobody_has_come() {
    let world = World::new(None);
    world.cancel.cancel();
    assert_eq!(world.end().outcome, Outcome::Cancelled);
}

#[test]
fn a_cancel_ends_it_while_a_source_is_half_there_which_is_told() {
    let world = World::new(2);
    let mut source = world.connect(&Main::usual(TEN).start);
    let _channel = world.connect(&crate::world::init(0));
    world.settle();
    assert!(world.is_untouched(), "it waits for the second channel");
    world.cancel.cancel();
    assert_eq!(read(&mut source, 8), SHUT_ERROR);
    assert_eq!(world.end().outcome, Outcome::Cancelled);
}

#[test]
fn a_cancel_ends_it_while_both_ends_are_silent() {
    let world = World::new(2);
    let through = world.through(TEN, 2);
    cancel(world, through);
}

#[test]
fn a_cancel_ends_it_while_the_destination_reads_nothing() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    fill(&mut through);
    cancel(world, through);
}

#[test]
fn a_cancel_ends_it_within_the_devices_as_long_as_they_are_not_all_there() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.say_main(HALF);
    assert_eq!(world.cancel.cancel(), CancelAnswer::TooLate, "it may be, as far as a cancel knows");
    world.stop.stop();
    assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
    assert_eq!(world.end().outcome, Outcome::Cancelled);
}

#[test]
fn a_destination_that_never_answers_is_waited_for_until_somebody_asks_to_stop_and_a_while_longer() {
    for asks in [1, 2] {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        through.say_ram(TEN);
        through.say_main(TAIL);
        let asked = Instant::now();
        for _ in 0..asks {
            assert_eq!(world.stop.stop(), CancelAnswer::TooLate);
        }
        assert_eq!(rest(&mut through.main), [0; 0], "nobody says what nobody knows");
        let took = asked.elapsed();
        assert!((took >= SILENCE) == (asks == 1), "{took:?}");
        drop((through.main, through.channels));
        let outcome = world.end().outcome;
        assert!(matches!(outcome, Outcome::Uncertain(_)), "{outcome}");
    }
}

#[test]
fn a_destination_that_has_an_end_mark_may_run_the_guest_whatever_is_cut_off_behind_it() {
    for description in [&b""[..], b"\x06", b"\x06\x00\x00\x00\x1f", b"\x06\x00\x00\x00\x1f{"] {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        through.say_ram(TEN);
        through.say_main(&[UNDESCRIBED, description].concat());
        world.settle();
        (0..2).for_each(|_| assert_eq!(world.stop.stop(), CancelAnswer::TooLate));
        assert_eq!(rest(&mut through.main), [0; 0], "nobody says what nobody knows");
        drop((through.main, through.channels));
        let outcome = world.end().outcome;
        assert!(matches!(outcome, Outcome::Uncertain(_)), "{outcome} with {description:?}");
    }
}

#[test]
fn an_answer_that_comes_after_somebody_has_asked_to_stop_counts() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.say_main(TAIL);
    world.stop.stop();
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    assert_eq!(world.end().outcome, Outcome::Completed);
}

#[test]
fn a_destination_that_is_slow_holds_up_the_source_and_is_no_error() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    let progress = world.progress.clone();
    let written = fill(&mut through);
    // What the kernel holds on four sockets, and one buffer: nothing that grows with what is sent.
    let on_its_way = written - progress.now().channels.wire_bytes;
    assert!(on_its_way < 16 << 20, "{on_its_way} of {written} bytes");
    // The last packet was cut off somewhere; a new source would not be. Time passes, in which nothing moves.
    through.main.set_read_timeout(Some(2 * STALL)).unwrap();
    assert!(through.main.read(&mut [0]).is_err(), "nobody says anything");
    cancel(world, through);
}

#[test]
fn a_slow_destination_gets_the_barrier_when_it_has_the_pages() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    const PAGES: usize = 8000;
    let pages = packet(V10_0, 0).repeat(PAGES);
    let mut channel = through.channels.remove(0);
    let source = thread::spawn(move || {
        channel.write_all(&pages).unwrap();
        channel.write_all(&sync(V10_0)).unwrap();
        channel
    });
    // The source's word for the barrier is there long before, and nothing moves for longer than anything may stall.
    let part = Main::usual(TEN).parts.remove(0);
    through.main.write_all(&part).unwrap();
    through.main.set_read_timeout(Some(2 * STALL)).unwrap();
    assert!(through.main.read(&mut [0]).is_err(), "nobody says anything");
    assert_eq!(read(&mut through.main_there, 5), part[..5]);
    read(&mut through.channels_there[0], PAGES * (1344 + 4096) + 1344);
    assert_eq!(read(&mut through.main_there, part.len() - 5), part[5..]);
    through.channels.push(source.join().unwrap());
    through.main.set_read_timeout(Some(crate::world::PATIENCE)).unwrap();
    cancel(world, through);
}

#[test]
fn a_source_that_gives_up_gets_its_channels_back_though_the_destination_reads_nothing() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    fill(&mut through);
    // What QEMU does at migrate_cancel: it shuts the main connection down, and waits for its channels.
    through.main.shutdown(std::net::Shutdown::Both).unwrap();
    let asked = Instant::now();
    rest(&mut through.channels[0]);
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    let outcome = world.end().outcome;
    assert!(matches!(outcome, Outcome::Failed(_)), "{outcome}");
}

/// Has the main connection name pages of zeros, and the destination read none of it, until the relay holds all that it may
/// and some more waits at its door.
fn fill_main(world: &World, through: &mut Through) {
    const HELD: u64 = 520 << 10;
    let zeros: Vec<_> = (0..8000).map(|page| Record::ZeroPage { block: 0, offset: page % 256 * 4096 }).collect();
    let part = &Main::new(TEN, 1, &zeros).parts[0];
    let passed_on = || world.progress.now().channels.wire_bytes;
    world.settle();
    let (before, mut written) = (passed_on(), 0);
    while written - (passed_on() - before) < HELD {
        through.main.write_all(part).unwrap();
        written += part.len() as u64;
        world.settle();
    }
}

#[test]
fn a_source_that_gives_up_is_noticed_where_the_relay_holds_all_it_may() {
    for resets in [false, true] {
        let world = World::new(1);
        let mut through = world.through(TEN, 1);
        fill_main(&world, &mut through);
        match resets {
            false => through.main.shutdown(std::net::Shutdown::Both).unwrap(),
            true => {
                // To close it with unread bytes resets it.
                through.main_there.write_all(&PONG).unwrap();
                through.main.peek(&mut [0; 8]).unwrap();
                drop(through.main);
            }
        }
        let asked = Instant::now();
        rest(&mut through.channels[0]);
        assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
        let outcome = world.end().outcome;
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome}");
    }
}

#[test]
fn a_destination_that_does_not_begin_is_not_given_the_guest_and_is_not_waited_for_for_ever() {
    // As one of QEMU's that wants a channel more than the source has.
    let tongue = Tongue { pings: true, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    let main = Main::usual(tongue);
    through.channels[0].write_all(&sync(V10_0).repeat(2)).unwrap();
    through.main.write_all(&[&main.parts[0][..], &main.end, TAIL].concat()).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
    drop((through.main, through.channels));
    assert!(rest(&mut through.main_there).len() < main.parts[0].len() + main.end.len(), "RAM is not complete there");
    let report = world.end();
    let Outcome::Failed(why) = &report.outcome else { panic!("{}", report.outcome) };
    assert!(why.to_string().contains("are multifd and multifd-channels the same at both ends?"), "{why}");
    assert!(report.total >= HELLO, "{:?}", report.total);
}

#[test]
fn a_source_may_pause_for_as_long_as_it_likes_once_the_destination_has_begun() {
    let tongue = Tongue { pings: true, ..TEN };
    let world = World::new(1);
    let mut through = world.through(tongue, 1);
    through.main_there.write_all(&PONG).unwrap();
    assert_eq!(read(&mut through.main, 8), PONG);
    for _ in 0..2 {
        through.main.set_read_timeout(Some(HELLO + STALL)).unwrap();
        assert!(through.main.read(&mut [0]).is_err(), "nobody says anything");
        through.say(&sync(V10_0));
        through.say_main(&Main::usual(tongue).parts[0]);
    }
    through.say_ram(tongue);
    through.say_main(TAIL);
    through.main_there.write_all(&SHUT_OK).unwrap();
    through.main.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    assert_eq!(world.end().outcome, Outcome::Completed);
}

#[test]
fn a_cancel_ends_it_while_more_comes_than_the_relay_can_pass_on() {
    let tongue = Tongue { flushes: false, ..TEN };
    let main = Main::new(tongue, 1, &vec![Record::ZeroPage { block: 0, offset: 0 }; 500]);
    let section = main.parts[0].as_slice();
    let (begin, pages) = (&section[..5], &section[5..section.len() - 13]);
    // Many sections, and one that does not end.
    for (first, then) in [(&[][..], section.repeat(50)), (begin, pages.repeat(50))] {
        let world = World::new(0);
        let source = world.connect(&main.start);
        let mut through = world.arrive(source, Vec::new(), &main.start, tongue);
        through.say_main(first);
        let (mut says, mut reads) = (through.main.try_clone().unwrap(), through.main_there.try_clone().unwrap());
        let said = thread::spawn(move || while says.write_all(&then).is_ok() {});
        let heard = thread::spawn(move || while matches!(reads.read(&mut [0; 1 << 16]), Ok(1..)) {});
        world.settle();
        assert_eq!(world.cancel.cancel(), CancelAnswer::Accepted);
        assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
        assert_eq!(world.end().outcome, Outcome::Cancelled);
        said.join().unwrap();
        heard.join().unwrap();
    }
}
