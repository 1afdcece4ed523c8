//! The ring against an oracle: whatever is done to it in whatever order, it is a bounded `VecDeque`.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::Arc;

use pageferry::ring::{Consumer, Producer, ring};
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Operation {
    Push,
    PushBatch(usize),
    Pop,
    PopBatch(usize),
    FreeSlots,
    AddBytes(u32),
    TakeBytes(u32),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => Just(Operation::Push),
        2 => (0..12_usize).prop_map(Operation::PushBatch),
        3 => Just(Operation::Pop),
        2 => (0..12_usize).prop_map(Operation::PopBatch),
        1 => Just(Operation::FreeSlots),
        1 => any::<u32>().prop_map(Operation::AddBytes),
        1 => any::<u32>().prop_map(Operation::TakeBytes),
    ]
}

struct Oracle {
    slots: usize,
    queue: VecDeque<u64>,
    bytes: u64,
    next: u64,
}

impl Oracle {
    fn room(&self) -> usize {
        self.slots - self.queue.len()
    }

    /// Does the same to the ring and to the queue, and compares.
    fn step(&mut self, operation: &Operation, producer: &mut Producer<u64>, consumer: &mut Consumer<u64>) {
        match *operation {
            Operation::Push => {
                let pushed = producer.push(self.next);
                if self.room() > 0 {
                    assert_eq!(pushed, Ok(()));
                    self.queue.push_back(self.next);
                } else {
                    assert_eq!(pushed.unwrap_err().0, self.next, "a full ring gives the item back");
                }
                self.next += 1;
            }
            Operation::PushBatch(len) => {
                let items: Vec<u64> = (self.next..).take(len).collect();
                let pushed = producer.push_batch(&items);
                assert_eq!(pushed, len.min(self.room()));
                self.queue.extend(&items[..pushed]);
                self.next += len as u64;
            }
            Operation::Pop => assert_eq!(consumer.pop(), self.queue.pop_front()),
            Operation::PopBatch(max) => {
                let mut popped = Vec::new();
                assert_eq!(consumer.pop_batch(max, |item| popped.push(item)), max.min(self.queue.len()));
                assert_eq!(popped, self.queue.drain(..popped.len()).collect::<Vec<_>>());
            }
            Operation::FreeSlots => assert_eq!(producer.free_slots(), self.room()),
            Operation::AddBytes(bytes) => {
                producer.add_bytes(bytes.into());
                self.bytes += u64::from(bytes);
            }
            Operation::TakeBytes(bytes) => {
                let bytes = self.bytes.min(bytes.into());
                consumer.take_bytes(bytes);
                self.bytes -= bytes;
            }
        }
        assert_eq!((producer.queued_bytes(), consumer.queued_bytes()), (self.bytes, self.bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 8 } else { 512 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_ring_is_a_bounded_queue(slots in 0..9_usize, operations in vec(operation(), 0..200)) {
        let (mut producer, mut consumer) = ring(slots);
        let rounded = slots.max(1).next_power_of_two();
        let mut oracle = Oracle { slots: rounded, queue: VecDeque::new(), bytes: 0, next: 0 };
        for operation in &operations {
            oracle.step(operation, &mut producer, &mut consumer);
        }
        prop_assert_eq!(std::iter::from_fn(|| consumer.pop()).collect::<VecDeque<_>>(), oracle.queue);
    }

    #[test]
    fn every_item_is_dropped_exactly_once(slots in 1..9_usize, moves in vec((0..6_usize, 0..6_usize), 0..20)) {
        let alive = Arc::new(());
        let (mut producer, mut consumer) = ring(slots);
        let mut queued = 0;
        for (pushes, pops) in moves {
            for _ in 0..pushes {
                queued += usize::from(producer.push(alive.clone()).is_ok());
            }
            queued -= consumer.pop_batch(pops, drop);
            prop_assert_eq!(Arc::strong_count(&alive), 1 + queued);
        }
        drop(consumer);
        drop(producer);
        prop_assert_eq!(Arc::strong_count(&alive), 1);
    }
}

#[test]
fn two_threads_see_the_same_sequence() {
    let items: u64 = if cfg!(miri) { 300 } else { 200_000 };
    let (mut producer, mut consumer) = ring(8);
    let pusher = std::thread::spawn(move || {
        let mut next = 0;
        while next < items {
            let batch: Vec<u64> = (next..items.min(next + 5)).collect();
            let pushed = producer.push_batch(&batch);
            next += pushed as u64;
            if pushed == 0 {
                std::thread::yield_now();
            }
        }
    });
    let mut expected = 0;
    while expected < items {
        let popped = consumer.pop_batch(7, |item| {
            assert_eq!(item, expected);
            expected += 1;
        });
        if popped == 0 {
            std::thread::yield_now();
        }
    }
    assert_eq!(consumer.pop(), None);
    pusher.join().unwrap();
}
