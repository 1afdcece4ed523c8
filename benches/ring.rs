//! Question: what does it cost to hand descriptors from the scanner's thread to a worker's, one by one and in batches?
//!
//! Rivals: rtrb, crossbeam_queue's ArrayQueue, std's bounded channel, each with as many slots. rtrb's batches are its
//! chunks (`push_partial_slice`, and `read_chunk` to be read in place); the other two know none.
//! Limit: no slower than rtrb, one by one and in batches of 32 and 256; 5 % are left for noise.
//!
//! A producer and a consumer on two CPUs of their own hand over items of 24 bytes, as a ring of the source carries; who
//! finds the ring full or empty backs off for a moment. Both have real-time priority where that is allowed. Samples are short and many:
//! one in which the scheduler took a CPU away all the same shows in the spread, not in the median.

mod support;

use std::process::ExitCode;
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::Instant;

use crossbeam_queue::ArrayQueue;
use crossbeam_utils::CachePadded;
use pageferry::ring::ring;
use support::{Options, Size, Spread, Verdict, cpus, interleave, run_undisturbed};

/// Slots, as in the source's rings.
const SLOTS: usize = 4096;
/// Of rtrb's throughput, at least: that much lies between two runs of the same ring.
const NO_SLOWER: f64 = 0.95;

/// What travels: as large as `pageferry::units::Item`.
#[derive(Clone, Copy, Default)]
struct Descriptor {
    first: u64,
    _rest: [u64; 2],
}

fn descriptor(number: u64) -> Descriptor {
    Descriptor { first: number, _rest: [1, 2] }
}

/// Runs both halves on CPUs of their own; millions of items a second.
///
/// The consumer's closure gives the sum of what it popped, which proves that all of it came through, and once each.
fn measure(items: u64, produce: impl FnOnce() + Send, consume: impl FnOnce() -> u64 + Send) -> f64 {
    // Each half in cache lines of its own: their thread's packets lie side by side on the heap.
    let (produce, consume) = (CachePadded::new(produce), CachePadded::new(consume));
    let cpus = cpus();
    let start = Barrier::new(2);
    let pin = |which: usize| cpus.get(which).copied().is_some_and(core_affinity::set_for_current);
    let seconds = thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            pin(1);
            run_undisturbed();
            start.wait();
            let begun = Instant::now();
            let sum = consume.into_inner()();
            (sum, begun.elapsed().as_secs_f64())
        });
        scope.spawn(|| {
            pin(0);
            run_undisturbed();
            start.wait();
            produce.into_inner()();
        });
        let (sum, seconds) = consumer.join().expect("the consumer does not panic");
        assert_eq!(sum, items * (items - 1) / 2, "an item was lost or came twice");
        seconds
    });
    items as f64 / seconds / 1e6
}

/// What a side does that finds the ring full or empty. Not one glance after the other: then whoever is quicker takes
/// each item alone, each at the price of a cache line's way between the CPUs, and a slower ring looks faster. The
/// library's worker sleeps in this place.
fn back_off() {
    (0..32).for_each(|_| std::hint::spin_loop());
}

fn spin_until(mut done: impl FnMut() -> bool) {
    while !done() {
        back_off();
    }
}

/// Pops until all items have come; `pop` gives the sum of what it popped, and how many.
fn drain(items: u64, mut pop: impl FnMut() -> (u64, u64)) -> u64 {
    let (mut sum, mut got) = (0, 0);
    while got < items {
        let (more, count) = pop();
        if count == 0 {
            back_off();
        }
        sum += more;
        got += count;
    }
    sum
}

/// Pushes all items in batches; `push` says how many of those it was given it took.
fn feed(items: u64, batch: usize, mut push: impl FnMut(&[Descriptor]) -> usize) {
    let mut buffer = vec![Descriptor::default(); batch];
    let mut next = 0;
    while next < items {
        let count = batch.min((items - next) as usize);
        for (offset, slot) in buffer[..count].iter_mut().enumerate() {
            *slot = descriptor(next + offset as u64);
        }
        let mut left = &buffer[..count];
        while !left.is_empty() {
            let pushed = push(left);
            if pushed == 0 {
                back_off();
            }
            left = &left[pushed..];
        }
        next += count as u64;
    }
}

fn ours_one(items: u64) -> f64 {
    let (mut producer, mut consumer) = ring(SLOTS);
    measure(
        items,
        move || (0..items).for_each(|n| spin_until(|| producer.push(descriptor(n)).is_ok())),
        move || drain(items, || consumer.pop().map_or((0, 0), |item: Descriptor| (item.first, 1))),
    )
}

fn rtrb_one(items: u64) -> f64 {
    let (mut producer, mut consumer) = rtrb::RingBuffer::new(SLOTS);
    measure(
        items,
        move || (0..items).for_each(|n| spin_until(|| producer.push(descriptor(n)).is_ok())),
        move || drain(items, || consumer.pop().map_or((0, 0), |item: Descriptor| (item.first, 1))),
    )
}

fn array_queue_one(items: u64) -> f64 {
    let queue = ArrayQueue::new(SLOTS);
    measure(
        items,
        || (0..items).for_each(|n| spin_until(|| queue.push(descriptor(n)).is_ok())),
        || drain(items, || queue.pop().map_or((0, 0), |item| (item.first, 1))),
    )
}

fn std_one(items: u64) -> f64 {
    let (producer, consumer) = mpsc::sync_channel(SLOTS);
    measure(
        items,
        move || (0..items).for_each(|n| spin_until(|| producer.try_send(descriptor(n)).is_ok())),
        move || drain(items, || consumer.try_recv().map_or((0, 0), |item: Descriptor| (item.first, 1))),
    )
}

fn ours_batch(items: u64, batch: usize) -> f64 {
    let (mut producer, mut consumer) = ring(SLOTS);
    measure(
        items,
        move || feed(items, batch, |left| producer.push_batch(left)),
        move || {
            drain(items, || {
                let mut sum = 0;
                let count = consumer.pop_batch(batch, |item: Descriptor| sum += item.first);
                (sum, count as u64)
            })
        },
    )
}

fn rtrb_batch(items: u64, batch: usize) -> f64 {
    let (mut producer, mut consumer) = rtrb::RingBuffer::<Descriptor>::new(SLOTS);
    measure(
        items,
        move || feed(items, batch, |left| producer.push_partial_slice(left).0.len()),
        move || {
            drain(items, || {
                let there = consumer.slots().min(batch);
                let Ok(chunk) = consumer.read_chunk(there) else { return (0, 0) };
                let (one, two) = chunk.as_slices();
                let sum = one.iter().chain(two).map(|item| item.first).sum();
                chunk.commit_all();
                (sum, there as u64)
            })
        },
    )
}

type Contender<'a> = (&'static str, &'a dyn Fn(u64) -> f64);

/// One table; the ratio of ours, the first, to rtrb, the second.
fn table(title: &str, contenders: &[Contender<'_>], items: u64, turns: usize) -> f64 {
    println!("\n{title}: millions of items a second, {turns} turns of {items}");
    let rates = interleave(turns, contenders.len(), |which| contenders[which].1(items));
    let mut ratio = 0.0;
    for (which, (name, _)) in contenders.iter().enumerate() {
        let to_ours = Spread::of_ratios(&rates[0], &rates[which]);
        if which == 1 {
            ratio = to_ours.median;
        }
        let rate = format!("{:.0}", Spread::of(rates[which].iter().copied()));
        println!("  {name:<14}{rate:>24}   ours is {to_ours:.2} times that");
    }
    ratio
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if options.size != Size::Smoke && cpus().len() < 2 {
        println!("this machine has one CPU: a producer and a consumer on two cannot be measured");
        return ExitCode::SUCCESS;
    }
    let items = options.pick(2_000, 200_000, 200_000);
    let turns = options.pick(1, 31, 301);
    let mut verdict = Verdict::default();
    let one: [Contender<'_>; 4] =
        [("pageferry", &ours_one), ("rtrb", &rtrb_one), ("ArrayQueue", &array_queue_one), ("sync_channel", &std_one)];
    let ratio = table("one by one", &one, items, turns);
    verdict.limit(ratio >= NO_SLOWER, || format!("one by one: {ratio:.3} of rtrb, at least {NO_SLOWER} wanted"));
    for batch in [32, 256] {
        let ours = |items| ours_batch(items, batch);
        let rtrb = |items| rtrb_batch(items, batch);
        let ratio = table(&format!("batches of {batch}"), &[("pageferry", &ours), ("rtrb", &rtrb)], items, turns);
        verdict.limit(ratio >= NO_SLOWER, || {
            format!("batches of {batch}: {ratio:.3} of rtrb, at least {NO_SLOWER} wanted")
        });
    }
    println!("\nLimit: at least {NO_SLOWER} of rtrb's throughput, one by one and in batches.");
    verdict.finish(&options)
}
