//! Hands items from one thread to one other: a bounded ring without locks, in two typed halves.
// UNSAFETY: the slots. An item is written and read through a raw pointer, as no lifetime can say whose turn it is; the
// two indices say it. Nothing else in this file is unsafe.
#![expect(unsafe_code)]

use std::fmt;
use std::mem::MaybeUninit;

use crossbeam_utils::CachePadded;

use crate::sync::Ordering::Relaxed;
use crate::sync::{Arc, AtomicU64, AtomicUsize, CELLS_ARE_PLAIN, UnsafeCell, acquire, mutated, release};

// Whose slot is whose
//
// `head` and `tail` count items ever popped and ever pushed, and wrap around. The slots head..tail hold items and belong
// to the consumer; the other slots are empty and belong to the producer. The producer alone moves `tail`, the consumer
// alone moves `head`, each only over slots that are its own. So each keeps its own index in a plain field, and needs an
// atomic load only for the foreign one, of which it keeps the value seen last: that value can only be too careful.

struct Shared<T> {
    // The producer's line. Written by the producer, read by the consumer: publishes the items below it.
    tail: CachePadded<AtomicUsize>,
    // The consumer's line. Written by the consumer, read by the producer: publishes that the slots below it are empty.
    head: CachePadded<AtomicUsize>,
    // Bytes ever added by the producer, and ever taken by the consumer. They publish nothing: sums for balancing load.
    bytes_in: CachePadded<AtomicU64>,
    bytes_out: CachePadded<AtomicU64>,
    // A power of two of them, so that an index finds its slot by a mask, also after it has wrapped.
    slots: Box<[Slot<T>]>,
}

#[repr(transparent)]
struct Slot<T>(UnsafeCell<MaybeUninit<T>>);

impl<T> Slot<T> {
    /// # Safety
    /// The slot is empty and the caller's: its index is the producer's tail or after it, and less than slots after the
    /// consumer's head.
    #[inline(always)]
    unsafe fn put(&self, item: T) {
        // SAFETY: the caller owns the slot, so nobody else reads or writes it. It is aligned and alive: the cell is ours.
        self.0.with_mut(|slot| unsafe { slot.cast::<T>().write(item) });
    }

    /// Puts one item into each of `slots`.
    ///
    /// # Safety
    /// All of them are empty and the caller's, and there are as many as items.
    #[inline(always)]
    unsafe fn put_all(slots: &[Slot<T>], items: &[T])
    where
        T: Copy,
    {
        if CELLS_ARE_PLAIN {
            // One copy of memory, which the compiler does not make of the loop below: it cannot know that they lie apart.
            let to = slots.as_ptr().cast_mut().cast::<T>();
            // SAFETY: a slot is a cell is an item (both are transparent), and there are as many; the caller owns the
            // slots, whose cells allow writing behind `&`, and `items` is not among them: it was borrowed from elsewhere.
            unsafe { to.copy_from_nonoverlapping(items.as_ptr(), items.len()) };
        } else {
            // SAFETY: each is empty and the caller's.
            slots.iter().zip(items).for_each(|(slot, item)| unsafe { slot.put(*item) });
        }
    }

    /// # Safety
    /// The slot holds an item and is the caller's: its index is the consumer's head or after it, and before the
    /// producer's tail. The caller moves its head past it before anybody takes it again.
    #[inline(always)]
    unsafe fn take(&self) -> T {
        // SAFETY: the caller owns the slot, and it was written by `put` before the tail that the caller has seen. It is
        // read mutably, so that loom reports any other access at the same time.
        self.0.with_mut(|slot| unsafe { slot.cast::<T>().read() })
    }
}

// SAFETY: the threads share slots only. `Producer` and `Consumer` exist once each, all their methods that touch a slot
// take `&mut self`, and `put` and `take` name the index check that makes the slot theirs. Items cross threads by
// value, hence T: Send; no `&T` ever does.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The `count` slots from `index` on, in order: those up to the end of the box, and those from its start.
    fn stretch(&self, index: usize, count: usize) -> (&[Slot<T>], &[Slot<T>]) {
        let from = index & (self.slots.len() - 1);
        let first = count.min(self.slots.len() - from);
        (&self.slots[from..from + first], &self.slots[..count - first])
    }

    #[inline(always)]
    fn slot(&self, index: usize) -> &Slot<T> {
        // SAFETY: `ring` makes a power of two of slots, at least one, and so the mask ends below their number.
        unsafe { self.slots.get_unchecked(index & (self.slots.len() - 1)) }
    }

    fn publish_head(&self, head: usize) {
        // Release: the slots below the new head have been read and may be written. Pairs with the Acquire in
        // `Producer::free_slots`.
        self.head.store(head, release("ring/publish-head"));
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // Both halves are gone, and the Arc has ordered what they did before this.
        let tail = self.tail.load(Relaxed);
        let mut head = self.head.load(Relaxed);
        while head != tail {
            // SAFETY: head != tail, so the slot holds an item; nobody else is left.
            drop(unsafe { self.slot(head).take() });
            head = head.wrapping_add(1);
        }
    }
}

/// The ring was full; here is the item back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Full<T>(pub T);

impl<T> fmt::Debug for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Full(..)")
    }
}

impl<T> fmt::Display for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the ring is full")
    }
}

impl<T> std::error::Error for Full<T> {}

/// A ring of at least `slots` slots: rounded up to a power of two, and at least one.
///
/// It neither waits nor wakes: whoever pushes rings the consumer's [bell](crate::bell), and the other way round.
///
/// ```
/// let (mut producer, mut consumer) = pageferry::ring::ring(2);
/// producer.push('a').unwrap();
/// producer.push('b').unwrap();
/// assert_eq!(producer.push('c').unwrap_err().0, 'c');
/// assert_eq!(consumer.pop(), Some('a'));
/// assert_eq!(producer.free_slots(), 1);
/// ```
///
/// # Panics
/// If so many slots do not fit in memory.
pub fn ring<T: Send>(slots: usize) -> (Producer<T>, Consumer<T>) {
    let slots = slots.max(1).checked_next_power_of_two().expect("the ring's slots fit in memory");
    let shared = Arc::new(Shared {
        tail: CachePadded::new(AtomicUsize::new(0)),
        head: CachePadded::new(AtomicUsize::new(0)),
        bytes_in: CachePadded::new(AtomicU64::new(0)),
        bytes_out: CachePadded::new(AtomicU64::new(0)),
        slots: (0..slots).map(|_| Slot(UnsafeCell::new(MaybeUninit::uninit()))).collect(),
    });
    let producer = Producer { shared: shared.clone(), tail: 0, full_at: slots, bytes_in: 0 };
    (producer, Consumer { shared, head: 0, tail_seen: 0, bytes_out: 0 })
}

/// The half that pushes. One thread at a time owns it; it can move to another. Made by [`ring`].
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
    // Equal to shared.tail, which nobody else writes.
    tail: usize,
    // The tail at which the ring is full as far as we know: the head seen last, which is at or below shared.head, plus
    // the number of slots. So there is at least as much room as it says.
    full_at: usize,
    // Equal to shared.bytes_in, which nobody else writes.
    bytes_in: u64,
}

impl<T: Send> Producer<T> {
    /// Pushes one item, or gives it back.
    ///
    /// # Errors
    /// [`Full`] if there is no empty slot.
    #[inline]
    pub fn push(&mut self, item: T) -> Result<(), Full<T>> {
        if self.room() == 0 && self.free_slots() == 0 {
            return Err(Full(item));
        }
        if mutated("ring/publish-before-write") {
            self.publish(1);
            // SAFETY: not sound, and loom says so: the consumer may already read the slot.
            unsafe { self.shared.slot(self.tail.wrapping_sub(1)).put(item) };
            return Ok(());
        }
        // SAFETY: checked above that the ring is not full, so the slot at the tail is empty and ours.
        unsafe { self.shared.slot(self.tail).put(item) };
        self.publish(1);
        Ok(())
    }

    /// Pushes as many of `items` as there is room for, in order, and publishes them all at once. Returns how many.
    #[inline]
    pub fn push_batch(&mut self, items: &[T]) -> usize
    where
        T: Copy,
    {
        let room = if self.room() < items.len() { self.free_slots() } else { self.room() };
        let pushed = room.min(items.len());
        let (one, two) = self.shared.stretch(self.tail, pushed);
        let (for_one, for_two) = items[..pushed].split_at(one.len());
        // SAFETY: the first of the `pushed` <= room slots from the tail on, so they are empty and ours.
        unsafe { Slot::put_all(one, for_one) };
        // SAFETY: the rest of them.
        unsafe { Slot::put_all(two, for_two) };
        if pushed > 0 {
            self.publish(pushed);
        }
        pushed
    }

    /// The number of empty slots. At least so many pushes will succeed.
    #[inline]
    pub fn free_slots(&mut self) -> usize {
        // Acquire: the consumer has read the slots below this head before it published it. Pairs with the Release in
        // `Consumer::publish`.
        self.full_at = self.shared.head.load(acquire("ring/read-head")).wrapping_add(self.shared.slots.len());
        self.room()
    }

    /// Adds to the bytes that are queued. Call it before the push of the item that they belong to: then the sum is
    /// never less than what is queued.
    #[inline]
    pub fn add_bytes(&mut self, bytes: u64) {
        self.bytes_in = self.bytes_in.wrapping_add(bytes);
        self.shared.bytes_in.store(self.bytes_in, Relaxed);
    }

    /// Bytes added and not yet taken. It may be too large for a moment, never too small.
    #[inline]
    pub fn queued_bytes(&self) -> u64 {
        self.bytes_in.wrapping_sub(self.shared.bytes_out.load(Relaxed))
    }

    /// Whether the consumer is gone. A hint: nothing pushed will be popped, but it may still be in the ring.
    pub fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.shared) < 2
    }

    fn room(&self) -> usize {
        self.full_at.wrapping_sub(self.tail)
    }

    fn publish(&mut self, items: usize) {
        self.tail = self.tail.wrapping_add(items);
        // Release: publishes the slots below the new tail. Pairs with the Acquire in `Consumer::ready`.
        self.shared.tail.store(self.tail, release("ring/publish-tail"));
    }
}

/// The half that pops. One thread at a time owns it; it can move to another. Made by [`ring`].
///
/// ```
/// let (mut producer, mut consumer) = pageferry::ring::ring(4);
/// assert_eq!(producer.push_batch(&[1, 2, 3]), 3);
/// let mut batch = Vec::with_capacity(2);
/// assert_eq!(consumer.pop_batch(2, |item| batch.push(item)), 2);
/// assert_eq!(batch, [1, 2]);
/// ```
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    // The first slot not yet taken. Equal to shared.head, which nobody else writes.
    head: usize,
    // At or below shared.tail, so at least the items below it are there.
    tail_seen: usize,
    // Equal to shared.bytes_out, which nobody else writes.
    bytes_out: u64,
}

impl<T: Send> Consumer<T> {
    /// Pops the oldest item, if there is one.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.ready(1) == 0 {
            return None;
        }
        // SAFETY: an item is ready, so the slot at the head holds it and is ours; the head moves past it below.
        let item = unsafe { self.shared.slot(self.head).take() };
        self.head = self.head.wrapping_add(1);
        self.shared.publish_head(self.head);
        Some(item)
    }

    /// The oldest item, if there is one; it stays where it is.
    ///
    /// ```
    /// let (mut producer, mut consumer) = pageferry::ring::ring(4);
    /// producer.push_batch(&[1, 2]);
    /// assert_eq!([consumer.peek(), consumer.pop(), consumer.peek(), consumer.pop()], [Some(1), Some(1), Some(2), Some(2)]);
    /// assert_eq!(consumer.peek(), None);
    /// ```
    #[inline]
    pub fn peek(&mut self) -> Option<T>
    where
        T: Copy,
    {
        if self.ready(1) == 0 {
            return None;
        }
        // SAFETY: as in `pop`, but the head stays, so the item is read again: it is Copy, and reading leaves it there.
        Some(unsafe { self.shared.slot(self.head).take() })
    }

    /// Pops up to `max` items, oldest first, into `each`, and gives their slots back all at once. Returns how many.
    ///
    /// If `each` panics, the items it was given are gone and the others stay in the ring.
    #[inline]
    pub fn pop_batch(&mut self, max: usize, mut each: impl FnMut(T)) -> usize {
        /// Moves the head past what was taken and publishes it, also if `each` panics.
        struct Taken<'a, T> {
            head: &'a mut usize,
            shared: &'a Shared<T>,
            count: usize,
        }
        impl<T> Drop for Taken<'_, T> {
            fn drop(&mut self) {
                *self.head = self.head.wrapping_add(self.count);
                self.shared.publish_head(*self.head);
            }
        }

        let popped = self.ready(max).min(max);
        if popped == 0 {
            return 0;
        }
        let (one, two) = self.shared.stretch(self.head, popped);
        let mut taken = Taken { head: &mut self.head, shared: &self.shared, count: 0 };
        for slots in [one, two] {
            for slot in slots {
                // SAFETY: at least `popped` items were ready, so this slot holds one and is ours; it counts as taken
                // before `each` can panic.
                let item = unsafe { slot.take() };
                taken.count += 1;
                each(item);
            }
        }
        popped
    }

    /// Takes from the bytes that are queued: these are done with.
    #[inline]
    pub fn take_bytes(&mut self, bytes: u64) {
        self.bytes_out = self.bytes_out.wrapping_add(bytes);
        self.shared.bytes_out.store(self.bytes_out, Relaxed);
    }

    /// Bytes added and not yet taken. It may be too small for a moment: what was added just now may not show yet.
    #[inline]
    pub fn queued_bytes(&self) -> u64 {
        let bytes_in = self.shared.bytes_in.load(Relaxed);
        // An old value of bytes_in may be below bytes_out: then nothing known is queued.
        let queued = bytes_in.wrapping_sub(self.bytes_out);
        if queued > u64::MAX / 2 { 0 } else { queued }
    }

    /// The number of items that can be popped, looking again at what was pushed if it seems less than `wanted`.
    fn ready(&mut self, wanted: usize) -> usize {
        let ready = self.tail_seen.wrapping_sub(self.head);
        if ready >= wanted {
            return ready;
        }
        // Acquire: sees the slots below this tail. Pairs with the Release in `Producer::publish`.
        self.tail_seen = self.shared.tail.load(acquire("ring/read-tail"));
        self.tail_seen.wrapping_sub(self.head)
    }
}

impl<T> fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("pushed", &self.tail).finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("popped", &self.head).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn indices_may_wrap_around() {
        let (mut producer, mut consumer) = ring(2);
        let start = usize::MAX - 2;
        producer.shared.head.store(start, Relaxed);
        producer.shared.tail.store(start, Relaxed);
        (producer.tail, producer.full_at, consumer.head, consumer.tail_seen) =
            (start, start.wrapping_add(2), start, start);
        for item in 0..8 {
            assert_eq!(producer.free_slots(), 2);
            assert_eq!(producer.push_batch(&[item, item + 100, item + 200]), 2);
            assert!(producer.push(0).is_err());
            assert_eq!((consumer.pop(), consumer.pop(), consumer.pop()), (Some(item), Some(item + 100), None));
        }
        assert!(producer.tail < 100, "it has wrapped");
    }

    #[test]
    fn leftover_items_are_dropped_exactly_once() {
        let alive = Arc::new(());
        let (mut producer, mut consumer) = ring(4);
        for _ in 0..4 {
            producer.push(alive.clone()).unwrap();
        }
        drop(consumer.pop());
        assert!(producer.push(alive.clone()).is_ok());
        assert_eq!(Arc::strong_count(&alive), 5);
        assert!(!producer.is_abandoned());
        drop(consumer);
        assert!(producer.is_abandoned());
        assert_eq!(Arc::strong_count(&alive), 5, "an abandoned ring keeps its items until both halves are gone");
        drop(producer);
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn a_panic_in_a_batch_neither_loses_nor_doubles_an_item() {
        let alive = Arc::new(());
        let (mut producer, mut consumer) = ring(4);
        for number in 0..4 {
            producer.push((number, alive.clone())).unwrap();
        }
        let each = |(number, _)| assert!(number != 1, "on purpose");
        assert!(catch_unwind(AssertUnwindSafe(|| consumer.pop_batch(4, each))).is_err());
        assert_eq!(producer.free_slots(), 2, "the two items that were handed out are gone");
        assert_eq!(consumer.pop().unwrap().0, 2);
        drop((producer, consumer));
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn queued_bytes_are_added_minus_taken_on_both_sides() {
        let (mut producer, mut consumer) = ring::<u8>(1);
        producer.add_bytes(1000);
        consumer.take_bytes(300);
        assert_eq!((producer.queued_bytes(), consumer.queued_bytes()), (700, 700));
        consumer.take_bytes(800);
        assert_eq!(consumer.queued_bytes(), 0, "taking more than was seen counts as nothing queued");
    }
}
