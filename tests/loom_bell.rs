//! Models of the bell and a ring together: no wake-up is lost, and what was pushed before a ring is popped after it.
//!
//! Loom also has the sleeper return once without cause. Exhaustive within seconds if LOOM_MAX_PREEMPTIONS is unset:
//! `an_item_pushed_before_a_drain_is_popped`, `every_ring_ends_a_wait` and
//! `a_ring_of_a_third_thread_does_not_hide_what_the_closer_wrote`. The others are bounded: give them three.
#![cfg(loom)]

use loom::thread;
use pageferry::bell::{Bell, Close, Park, Wake};
use pageferry::ring::{Consumer, ring};
use pageferry::sync::Ordering::Relaxed;
use pageferry::sync::{Arc, AtomicU32};

/// What every worker does: pop until empty, wait, and on drain pop once more.
fn drain_loop(mut consumer: Consumer<u32>, bell: &mut Bell<Park>) -> Vec<u32> {
    let mut popped = Vec::with_capacity(4);
    loop {
        while let Some(item) = consumer.pop() {
            popped.push(item);
        }
        match bell.wait() {
            Wake::Rung | Wake::Elsewhere => {}
            Wake::Drain => {
                while let Some(item) = consumer.pop() {
                    popped.push(item);
                }
                return popped;
            }
            Wake::Abort => return popped,
        }
    }
}

fn drains(items: u32) {
    loom::model(move || {
        let (mut producer, consumer) = ring(2);
        let mut bell = Bell::here();
        let ringer = bell.ringer();
        let pusher = thread::spawn(move || {
            for item in 0..items {
                producer.push(item).unwrap();
                ringer.ring();
            }
            assert!(ringer.close(Close::Drain));
            assert!(!ringer.close(Close::Drain), "close twice is harmless");
        });
        assert_eq!(drain_loop(consumer, &mut bell), (0..items).collect::<Vec<_>>());
        pusher.join().unwrap();
    });
}

#[test]
fn an_item_pushed_before_a_drain_is_popped() {
    drains(1);
}

#[test]
fn two_items_pushed_before_a_drain_are_popped_in_order() {
    drains(2);
}

#[test]
fn every_ring_ends_a_wait() {
    // No close at the end: a ring that is lost, or hidden by an older one, leaves the owner asleep for ever.
    loom::model(|| {
        let (mut producer, mut consumer) = ring(2);
        let mut bell = Bell::here();
        let ringer = bell.ringer();
        let pusher = thread::spawn(move || {
            for item in 0..2 {
                producer.push(item).unwrap();
                ringer.ring();
            }
        });
        let mut popped = 0;
        while popped < 2 {
            match consumer.pop() {
                Some(item) => {
                    assert_eq!(item, popped);
                    popped += 1;
                }
                None => assert_eq!(bell.wait(), Wake::Rung),
            }
        }
        pusher.join().unwrap();
    });
}

#[test]
fn an_abort_from_a_third_thread_wakes_the_owner_and_is_first_once() {
    loom::model(|| {
        let (mut producer, consumer) = ring(1);
        let mut bell = Bell::here();
        let (ringer, closer) = (bell.ringer(), bell.ringer());
        let pusher = thread::spawn(move || {
            producer.push(0).unwrap();
            ringer.ring();
            ringer.close(Close::Abort)
        });
        let aborter = thread::spawn(move || closer.close(Close::Abort));
        let popped = drain_loop(consumer, &mut bell);
        assert!(popped.len() <= 1);
        assert!(bell.aborted());
        let first = [pusher.join().unwrap(), aborter.join().unwrap()];
        assert_eq!(first.iter().filter(|first| **first).count(), 1);
    });
}

#[test]
fn a_ring_of_a_third_thread_does_not_hide_what_the_closer_wrote() {
    loom::model(|| {
        let note = Arc::new(AtomicU32::new(0));
        let mut bell = Bell::here();
        let (ringer, closer) = (bell.ringer(), bell.ringer());
        let written = note.clone();
        let writer = thread::spawn(move || {
            written.store(1, Relaxed);
            closer.close(Close::Drain);
        });
        let other = thread::spawn(move || ringer.ring());
        while bell.wait() != Wake::Drain {}
        assert_eq!(note.load(Relaxed), 1);
        writer.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn a_full_ring_wakes_its_producer() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(1);
        let mut items = Bell::here();
        let to_consumer = items.ringer();
        let pusher = thread::spawn(move || {
            let mut room = Bell::here();
            producer.push((0, room.ringer())).unwrap();
            to_consumer.ring();
            let mut next = (1, room.ringer());
            while let Err(full) = producer.push(next) {
                next = full.0;
                assert_eq!(room.wait(), Wake::Rung);
            }
            to_consumer.ring();
        });
        for expected in 0..2 {
            let (item, producer_bell) = loop {
                match consumer.pop() {
                    Some(popped) => break popped,
                    None => assert_eq!(items.wait(), Wake::Rung),
                }
            };
            assert_eq!(item, expected);
            producer_bell.ring();
        }
        pusher.join().unwrap();
    });
}
