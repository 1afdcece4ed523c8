//! Models of the ring, with real slots: loom reports a slot that two threads touch at once, and every stale read.
//!
//! Exhaustive, each within a second, if LOOM_MAX_PREEMPTIONS is unset. The test command sets three.
#![cfg(loom)]

use loom::thread;
use pageferry::ring::{Consumer, ring};
use pageferry::sync::Arc;

fn pop_spinning<T: Send>(consumer: &mut Consumer<T>) -> T {
    loop {
        match consumer.pop() {
            Some(item) => return item,
            None => thread::yield_now(),
        }
    }
}

#[test]
fn one_item_crosses() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(1);
        let pusher = thread::spawn(move || producer.push(7).unwrap());
        assert_eq!(pop_spinning(&mut consumer), 7);
        pusher.join().unwrap();
    });
}

#[test]
fn items_of_a_full_ring_cross_in_order() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(1);
        let pusher = thread::spawn(move || {
            for item in 0..2 {
                let mut back = Some(item);
                while let Some(item) = back.take() {
                    if let Err(full) = producer.push(item) {
                        back = Some(full.0);
                        thread::yield_now();
                    }
                }
            }
        });
        assert_eq!(pop_spinning(&mut consumer), 0);
        assert_eq!(pop_spinning(&mut consumer), 1);
        assert_eq!(consumer.pop(), None);
        pusher.join().unwrap();
    });
}

#[test]
fn a_batch_is_seen_in_order_whatever_part_of_it_is_seen_first() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(2);
        let pusher = thread::spawn(move || {
            let items = [1, 2, 3];
            let mut pushed = 0;
            while pushed < items.len() {
                match producer.push_batch(&items[pushed..]) {
                    0 => thread::yield_now(),
                    more => pushed += more,
                }
            }
        });
        let mut popped = Vec::with_capacity(3);
        while popped.len() < 3 {
            if consumer.pop_batch(2, |item| popped.push(item)) == 0 {
                thread::yield_now();
            }
        }
        assert_eq!(popped, [1, 2, 3]);
        pusher.join().unwrap();
    });
}

#[test]
fn an_item_left_behind_is_dropped_once_whoever_goes_last() {
    loom::model(|| {
        let alive = Arc::new(());
        let (mut producer, mut consumer) = ring(2);
        let (first, second) = (alive.clone(), alive.clone());
        let pusher = thread::spawn(move || {
            producer.push(first).unwrap();
            producer.push(second).unwrap();
        });
        drop(consumer.pop());
        drop(consumer);
        pusher.join().unwrap();
        assert_eq!(Arc::strong_count(&alive), 1);
    });
}

#[test]
fn queued_bytes_never_seem_negative() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(1);
        let pusher = thread::spawn(move || {
            producer.add_bytes(10);
            producer.push(10).unwrap();
            assert!(producer.queued_bytes() <= 10);
        });
        let bytes = pop_spinning(&mut consumer);
        assert_eq!(consumer.queued_bytes(), 10, "bytes are added before the push that publishes them");
        consumer.take_bytes(bytes);
        assert_eq!(consumer.queued_bytes(), 0);
        pusher.join().unwrap();
    });
}
