//! SYNCs and barriers that do not match: an error in bounded time, and a destination that was not made to wait.

use std::io::{Read, Write};
use std::thread;
use std::time::Instant;

use pageferry::Outcome;
use pageferry::qemu::wire::Dialect::{V7_2, V10_0};
use pageferry::qemu::wire::NewRamPacket;

use crate::world::{
    Main, PATIENCE, SEVEN, SHUT_ERROR, STALL, TAIL, TEN, Through, World, packet, ram, read, rest, sync,
};

fn fails(world: World, through: Through, why: &str) {
    let Through { mut main, mut main_there, channels, .. } = through;
    assert_eq!(read(&mut main, 8), SHUT_ERROR, "the source keeps its guest");
    drop((main, channels));
    let left = rest(&mut main_there);
    assert!(!left.ends_with(TAIL), "the destination does not get the devices");
    let outcome = world.end().outcome;
    assert!(matches!(&outcome, Outcome::Failed(failure) if failure.to_string().contains(why)), "{outcome}");
}

#[test]
fn a_barrier_without_its_sync_is_not_passed_on_and_ends_in_bounded_time() {
    let world = World::new(2);
    let mut through = world.through(TEN, 2);
    let asked = Instant::now();
    // One of two channels has said it.
    through.channels[1].write_all(&sync(V10_0)).unwrap();
    let part = &Main::usual(TEN).parts[0];
    through.main.write_all(part).unwrap();
    // What comes before the barrier comes through: the type and the number of the section.
    assert_eq!(read(&mut through.main_there, 5), part[..5]);
    let error = read(&mut through.main, 8);
    assert_eq!(error, SHUT_ERROR);
    assert!(asked.elapsed() >= STALL, "{:?}", asked.elapsed());
    assert_eq!(rest(&mut through.main_there), [0; 0], "the flush word has not been passed on");
    drop((through.main, through.channels));
    let outcome = world.end().outcome;
    let words = "1 SYNCs on channel 0, 2 barriers";
    assert!(matches!(&outcome, Outcome::Failed(why) if why.to_string().contains(words)), "{outcome}");
}

#[test]
fn a_sync_too_many_at_the_end_is_found_before_the_devices_pass() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    let main = Main::usual(TEN);
    through.say(&sync(V10_0));
    through.say_main(&main.parts[0]);
    through.say(&[sync(V10_0), sync(V10_0)].concat());
    through.main.write_all(&[&main.end, TAIL].concat()).unwrap();
    fails(world, through, "a SYNC too many: 4 SYNCs on channel 0, 3 barriers");
}

#[test]
fn a_sync_without_a_barrier_ends_in_bounded_time() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say(&[sync(V10_0), packet(V10_0, 0)].concat());
    fails(world, through, "nothing moves: 2 SYNCs on channel 0, 1 barriers");
}

#[test]
fn pages_behind_the_last_barrier_are_found_before_the_devices_pass() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    let main = Main::usual(TEN);
    through.say(&sync(V10_0));
    through.say_main(&main.parts[0]);
    through.say(&[sync(V10_0), packet(V10_0, 0)].concat());
    through.main.write_all(&[&main.end, TAIL].concat()).unwrap();
    fails(world, through, "pages came behind the last barrier");
}

#[test]
fn pages_behind_the_end_of_ram_do_not_pass() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.say_ram(TEN);
    through.channels[0].write_all(&packet(V10_0, 0)).unwrap();
    assert_eq!(rest(&mut through.channels_there[0]), [0; 0]);
    fails(world, through, "behind the last barrier");
}

#[test]
fn a_channel_that_ends_between_two_packets_is_an_error_and_no_end() {
    let world = World::new(2);
    let mut through = world.through(TEN, 2);
    through.say(&[packet(V10_0, 0), sync(V10_0)].concat());
    drop(through.channels.remove(1));
    through.say_main(&Main::usual(TEN).parts[0]);
    fails(world, through, "nothing moves: 2 SYNCs on channel 1, 2 barriers");
}

#[test]
fn a_channel_that_ends_before_its_sync_is_an_error_at_once() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    drop(through.channels.remove(0));
    through.main.write_all(&Main::usual(TEN).parts[0]).unwrap();
    fails(world, through, "ended a channel too early: 1 SYNCs on channel 0, 2 barriers");
}

#[test]
fn a_sync_that_never_comes_behind_what_a_slow_destination_takes_ends_it_in_bounded_time() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    const PAGES: usize = 8000;
    let pages = packet(V10_0, 0).repeat(PAGES);
    let mut channel = through.channels.remove(0);
    let source = thread::spawn(move || {
        channel.write_all(&pages).unwrap();
        channel
    });
    let part = &Main::usual(TEN).parts[0];
    through.say_main(&part[..5]);
    through.main.write_all(&part[5..]).unwrap();
    // Nothing moves for longer than anything may stall, and nobody has done wrong yet.
    through.main.set_read_timeout(Some(3 * STALL)).unwrap();
    assert!(through.main.read(&mut [0]).is_err(), "nobody says anything");
    through.main.set_read_timeout(Some(PATIENCE)).unwrap();
    read(&mut through.channels_there[0], PAGES * (1344 + 4096));
    through.channels.push(source.join().unwrap());
    fails(world, through, "nothing moves: 1 SYNCs on channel 0, 2 barriers");
}

#[test]
fn a_sync_whose_pages_never_come_ends_it_in_bounded_time() {
    let world = World::new(1);
    let mut through = world.through(SEVEN, 1);
    let name = ram();
    let with_page = NewRamPacket { sync: true, normal: &[0x5000], ..NewRamPacket::pages(7, &name) };
    through.say(&[&with_page.encode(V7_2).unwrap()[..], &[9; 100]].concat());
    let part = &Main::new(SEVEN, 1, &[]).parts[0];
    through.main.write_all(part).unwrap();
    fails(world, through, "nothing moves: 1 SYNCs on channel 0, 2 barriers");
}
