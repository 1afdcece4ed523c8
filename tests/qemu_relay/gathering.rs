//! The destination hears of nobody before the source is all there, and of no stranger.

use std::time::Instant;

use pageferry::Outcome;
use pageferry::qemu::wire::Dialect::{V7_2, V10_0};

use crate::world::{
    HELLO, Main, SEVEN, SHUT_ERROR, TEN, Tongue, World, close, hang_up, init, packet, read, rest, sync,
};

fn greeting(channel: u8) -> Vec<u8> {
    [&init(channel)[..], &sync(V10_0)].concat()
}

fn fails(world: World, why: &str) {
    let outcome = world.end().outcome;
    assert!(matches!(&outcome, Outcome::Failed(failure) if failure.to_string().contains(why)), "{outcome}");
}

#[test]
fn strangers_before_the_source_and_after_it_reach_nobody_however_well_they_begin() {
    for told in [Some(2), None] {
        let world = World::new(told);
        let mut strangers: Vec<_> = [0, 2, 40, 64].map(|n| world.connect(&init(1)[..n])).into();
        // A channel more than there are: QEMU 10.0 would die of it.
        strangers.push(world.connect(&init(2)));
        strangers.push(world.connect(b"QEVM"));
        strangers.push(world.connect(b"GET / HTTP/1.1\r\n\r\n"));
        strangers.push(world.connect(&[&init(0)[..], &packet(V10_0, 0)].concat()));
        let mut through = world.through(TEN, 2);
        let mut late = world.connect(&greeting(2));
        assert_eq!(rest(&mut late), [0; 0]);
        assert_eq!(rest(&mut world.connect(b"QEVM")), [0; 0]);
        assert!(world.is_untouched(), "there are no other connections");
        through.say_ram(TEN);
        let outcome = world.cancel.cancel();
        assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
        let report = world.end();
        assert_eq!((&report.outcome, report.channels), (&Outcome::Cancelled, 2), "{outcome:?}");
        assert!(report.turned_away >= 4, "{report:?}");
        assert!(report.remarks.iter().any(|remark| remark.contains("2 channels")), "{:?}", report.remarks);
    }
}

#[test]
fn channels_may_come_before_the_main_connection_and_in_any_order() {
    for told in [Some(3), None] {
        let world = World::new(told);
        let mut channels: Vec<_> = [2, 0, 1].map(|id| (id, world.connect(&greeting(id)))).into();
        channels.sort_by_key(|(id, _)| *id);
        assert!(world.is_untouched());
        let start = Main::usual(TEN).start;
        let main = world.connect(&start);
        let through = world.arrive(main, channels.into_iter().map(|(_, channel)| channel).collect(), &start, TEN);
        drop((through.main, through.channels));
        fails(world, "main stream");
    }
}

#[test]
fn a_channel_that_comes_a_little_late_is_waited_for() {
    let world = World::new(None);
    let start = Main::usual(SEVEN).start;
    // QEMU 7.2 says this before it has connected its channels.
    let main = world.connect(&start);
    let said = [&init(1)[..], &sync(V7_2)].concat();
    let one = world.connect(&said);
    assert!(world.is_untouched(), "there must be a channel 0");
    let zero = world.connect(&[&init(0)[..], &sync(V7_2)].concat());
    let through = world.arrive(main, vec![zero, one], &start, SEVEN);
    drop((through.main, through.channels));
    fails(world, "main stream");
}

#[test]
fn channels_that_do_not_come_end_it_in_bounded_time() {
    let missing = "of 2 channels, the source has 1: [1]";
    for (told, said, why) in
        [(Some(2), 1, missing), (None, 1, "which cannot be all"), (None, 255, "which cannot be all")]
    {
        let world = World::new(told);
        let asked = Instant::now();
        let mut main = world.connect(&Main::usual(TEN).start);
        let channel = (said != 255).then(|| world.connect(&greeting(said)));
        assert_eq!(read(&mut main, 8), SHUT_ERROR);
        assert!(asked.elapsed() >= HELLO / 2 && world.is_untouched(), "{:?}", asked.elapsed());
        drop((main, channel));
        fails(world, why);
    }
}

#[test]
fn a_first_barrier_that_does_not_come_ends_it_in_bounded_time() {
    let world = World::new(1);
    let start = Main::usual(TEN).start;
    let mut main = world.connect(&start[..start.len() - 22]);
    assert_eq!(read(&mut main, 8), SHUT_ERROR);
    drop(main);
    fails(world, "the first barrier");
}

#[test]
fn a_source_that_dies_before_its_first_barrier_ends_it() {
    let world = World::new(1);
    let start = Main::usual(TEN).start;
    drop(world.connect(&start[..40]));
    fails(world, "main stream");
}

#[test]
fn channels_of_an_attempt_that_was_given_up_are_not_those_of_the_next() {
    for told in [Some(2), None] {
        let world = World::new(told);
        // One more than the next has, too; and what the source said on its main connection was lost.
        let given_up: Vec<_> = (0..3).map(|id| world.connect(&greeting(id))).collect();
        world.settle();
        drop(given_up);
        let through = world.through(TEN, 2);
        drop((through.main, through.channels));
        let report = world.end();
        let failure = report.outcome.failure().unwrap().to_string();
        assert!(failure.contains("main stream"), "{failure}");
        assert!(report.remarks.iter().any(|remark| remark.contains("channel 1 has left")), "{:?}", report.remarks);
    }
}

#[test]
fn channels_that_have_said_all_and_left_before_their_source_are_its_own() {
    for told in [Some(2), None] {
        let world = World::new(told);
        let start = Main::usual(TEN).start;
        let channels: Vec<_> = (0..2).map(|id| world.connect(&greeting(id))).collect();
        channels.iter().for_each(hang_up);
        let main = world.connect(&start);
        let through = world.arrive(main, channels, &start, TEN);
        drop((through.main, through.channels));
        fails(world, "main stream");
    }
}

#[test]
fn a_channel_that_has_said_all_and_left_counts_beside_one_that_stays() {
    let world = World::new(None);
    let start = Main::usual(TEN).start;
    let main = world.connect(&start);
    let channels: Vec<_> = (0..2).map(|id| world.connect(&greeting(id))).collect();
    hang_up(&channels[1]);
    let through = world.arrive(main, channels, &start, TEN);
    drop((through.main, through.channels));
    fails(world, "main stream");
}

#[test]
fn two_sources_at_once_are_not_mixed() {
    let world = World::new(2);
    let mut main = world.connect(&Main::usual(TEN).start);
    let channels = [0, 0, 1].map(|id| world.connect(&greeting(id)));
    assert_eq!(read(&mut main, 8), SHUT_ERROR);
    assert!(world.is_untouched());
    drop((main, channels));
    fails(world, "two sources");
}

#[test]
fn a_source_with_multifd_is_refused_where_it_was_said_to_have_none() {
    let world = World::new(0);
    let mut main = world.connect(&Main::usual(TEN).start);
    assert_eq!(read(&mut main, 8), SHUT_ERROR);
    assert!(world.is_untouched());
    drop(main);
    fails(world, "multifd on");
}

#[test]
fn a_destination_that_cannot_be_reached_is_told_to_the_source() {
    let world = World::new(1);
    // Nobody listens there any more.
    close(&world.destination);
    let mut main = world.connect(&Main::usual(TEN).start);
    let channel = world.connect(&greeting(0));
    assert_eq!(read(&mut main, 8), SHUT_ERROR);
    drop((main, channel));
    fails(world, "cannot connect");
}

#[test]
fn a_whole_migration_may_be_there_before_the_destination_is() {
    let tongue = Tongue { return_path: false, ..TEN };
    let world = World::new(1);
    let main = Main::usual(tongue);
    let source = world.connect(&main.whole());
    hang_up(&source);
    let channel = world.connect(&[&init(0)[..], &sync(V10_0).repeat(3)].concat());
    hang_up(&channel);
    let (mut main_there, said) = world.accept(main.whole().len());
    assert_eq!(said, main.whole());
    let (mut channel_there, _) = world.accept(64 + 3 * 1344);
    assert_eq!((rest(&mut main_there), rest(&mut channel_there)), (vec![], vec![]));
    drop(main_there);
    assert_eq!(world.end().outcome, Outcome::Completed);
}

#[test]
fn a_source_that_keeps_the_rest_of_start_back_until_its_channels_are_read_is_relayed() {
    // Behind the flush word there are the end word and the footer; without flush words, the footer.
    for (tongue, kept) in [(TEN, 13), (SEVEN, 5)] {
        for told in [Some(1), None] {
            let world = World::new(told);
            let start = Main::usual(tongue).start;
            let (first, rest_of_start) = start.split_at(start.len() - kept);
            let main = world.connect(first);
            let channel = world.connect(&[&init(0)[..], &sync(tongue.dialect), &packet(tongue.dialect, 0)].concat());
            let mut through = world.arrive(main, vec![channel], first, tongue);
            assert_eq!(read(&mut through.channels_there[0], 1344 + 4096), packet(tongue.dialect, 0));
            through.say_main(rest_of_start);
            drop((through.main, through.channels));
            fails(world, "main stream");
        }
    }
}
