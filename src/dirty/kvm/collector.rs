//! Takes entries out of all vCPUs' dirty rings, resets these, and only then says which pages are dirty.
#![forbid(unsafe_code)]

use super::costs::{KvmCallKind, Recorder};
use super::toggle::pages_of;
use super::turn::{MyTurn, Turn};
use crate::dirty::bitmap::DirtyBitmap;
use crate::sync::{AtomicU32, AtomicU64, AtomicUsize, DynArc, Ordering::Relaxed};
use crate::sys::kvm::{self, KvmSlot, VcpuRing};
use crate::sys::thread::with_signals_blocked;
use crate::units::BlockId;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The most slots: KVM has up to 32764 in each of two address spaces.
const SLOTS_MAX: usize = 1 << 16;
/// A staged entry is the slot's index above, and the page below these bits.
const PAGE_BITS: u32 = 48;
/// Words of the bitmap that are taken at once.
const WINDOW_WORDS: usize = 64;

/// Nothing is lost.
const INTACT: u32 = 0;
/// KVM broke a reset off: some pages may be writable without anybody knowing, until logging is turned on anew.
const INTERRUPTED: u32 = 1;
/// A vCPU went round its ring: entries are overwritten, and the vCPU will never find room again.
const OVERRUN: u32 = 2;

/// What the thread that migrates and the threads of the vCPUs share. Everything is made before any of them asks.
#[derive(Debug)]
pub(super) struct Collector {
    pub(super) vm: OwnedFd,
    rings: Box<[VcpuRing]>,
    /// Ids of the slots with their indices, sorted: entries name ids.
    ids: Box<[(u32, usize)]>,
    slot_pages: Box<[u64]>,
    /// What was reset and not harvested, slot by slot; it calls them blocks.
    published: DirtyBitmap,
    turn: Turn,
    /// Entries that were taken and not yet published: a full ring's worth for every vCPU. This and the two counts below
    /// are written by whoever has the turn; Relaxed, as the turn orders them.
    staged: Box<[AtomicU64]>,
    staged_count: AtomicUsize,
    /// Entries that were taken since the last reset, among them those that name nothing we know.
    taken: AtomicU64,
    /// Whether writes may have been missed, as above. Written in a turn; Relaxed, as a reader who comes too early learns
    /// of it in its next round.
    lost: AtomicU32,
    pub(super) recorder: Recorder,
}

impl Collector {
    pub(super) fn new(vm: OwnedFd, rings: Box<[VcpuRing]>, slots: &[KvmSlot]) -> io::Result<Collector> {
        let slot_pages: Box<[u64]> = slots.iter().map(pages_of).collect();
        if slots.len() > SLOTS_MAX || slot_pages.iter().any(|pages| pages >> PAGE_BITS != 0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more slots or pages than KVM can have"));
        }
        let mut ids: Box<[(u32, usize)]> = slots.iter().enumerate().map(|(i, slot)| (slot.slot(), i)).collect();
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|two| two[0].0 == two[1].0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("slot {:#x} is named twice", twice[0].0)));
        }
        let room: usize = rings.iter().map(|ring| ring.count() as usize).sum();
        Ok(Collector {
            vm,
            rings,
            ids,
            published: DirtyBitmap::new(&slot_pages),
            slot_pages,
            turn: Turn::default(),
            staged: (0..room).map(|_| AtomicU64::new(0)).collect(),
            staged_count: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            lost: AtomicU32::new(INTACT),
            recorder: Recorder::default(),
        })
    }

    /// Collects, after whoever is at it now.
    ///
    /// # Errors
    /// KVM could not reset the rings: what was taken stays staged, and the next collection resets and publishes it. Or
    /// writes may have been missed, as [`check`](Self::check) says from then on.
    pub(super) fn collect(&self) -> io::Result<()> {
        let mine = self.turn.take();
        self.collect_in(&mine)?;
        self.check()
    }

    /// Takes what is in the rings, has KVM protect those pages again, and publishes them.
    ///
    /// In this order: a page whose entry was taken stays writable, without a new entry, until the reset has returned.
    /// Were it published before, it could be harvested, read and shipped, then written, and nobody would know.
    fn collect_in(&self, _mine: &MyTurn<'_>) -> io::Result<()> {
        let (mut staged, mut taken, mut ignored) = (self.staged_count.load(Relaxed), self.taken.load(Relaxed), 0);
        for ring in &self.rings {
            // A ring refills while it is emptied; what has been taken is not free before the reset, so that no ring
            // gives more than it has entries, and there is room for all. The bound holds whatever the kernel does.
            let mut left = ring.count().min((self.staged.len() - staged) as u32);
            while let Some((slot, page)) = (left > 0).then(|| ring.pop()).flatten() {
                (taken, left) = (taken + 1, left - 1);
                match self.index_of(slot, page) {
                    Some(index) => {
                        self.staged[staged].store((index as u64) << PAGE_BITS | page, Relaxed);
                        staged += 1;
                    }
                    None => ignored += 1,
                }
            }
            if left == 0 {
                // KVM stops a vCPU when some entries are left. One that filled them all has not been stopped in time,
                // and has gone on over the oldest for all that anybody can tell.
                self.lost.store(OVERRUN, Relaxed);
            }
        }
        self.staged_count.store(staged, Relaxed);
        self.taken.store(taken, Relaxed);
        self.recorder.meter.ignored(ignored);
        if taken == 0 {
            return Ok(());
        }
        let reset = || with_signals_blocked(|| kvm::reset_dirty_rings(self.vm.as_fd()));
        let done = self.recorder.call(KvmCallKind::Reset, None, reset, |reset| reset.copied().unwrap_or(0))?;
        if done < taken {
            // Signals are blocked, but a debugger's stop cannot be.
            self.lost.fetch_max(INTERRUPTED, Relaxed);
        }
        for entry in &self.staged[..staged] {
            let entry = entry.load(Relaxed);
            // No truncation: there are at most SLOTS_MAX slots.
            self.published.mark(BlockId((entry >> PAGE_BITS) as u16), entry & ((1 << PAGE_BITS) - 1));
        }
        self.staged_count.store(0, Relaxed);
        self.taken.store(0, Relaxed);
        Ok(())
    }

    /// Whether every write so far is in the rings or in what was published.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.lost.load(Relaxed) {
            INTACT => Ok(()),
            INTERRUPTED => Err(io::Error::other("KVM broke the reset of the dirty rings off, and may have missed writes")),
            _ => Err(io::Error::other("KVM let a vCPU overrun its dirty ring, and has missed writes: no way on")),
        }
    }

    fn index_of(&self, slot: u32, page: u64) -> Option<usize> {
        let found = self.ids.binary_search_by_key(&slot, |(id, _)| *id).ok()?;
        let index = self.ids[found].1;
        (page < self.slot_pages[index]).then_some(index)
    }

    /// Adds what KVM knows of a slot from elsewhere than the rings.
    pub(super) fn publish(&self, slot: usize, words: &[u64]) {
        self.published.put_back(BlockId(slot as u16), 0, words);
    }

    /// How many pages of a slot are published, from one on.
    pub(super) fn count(&self, slot: usize, first_page: u64, pages: u64) -> u64 {
        self.published.count_range(BlockId(slot as u16), first_page, pages)
    }

    /// Takes the published bits of some pages of a slot: calls `taken` with words, the page that bit 0 of the first of
    /// them stands for, and the pages that are meant.
    pub(super) fn take(&self, slot: usize, first_page: u64, pages: u64, mut taken: impl FnMut(&[u64], u64, u64, u64)) {
        let (block, end) = (BlockId(slot as u16), first_page + pages);
        let mut at = first_page & !63;
        while at < end {
            let past = end.next_multiple_of(64).min(at + WINDOW_WORDS as u64 * 64);
            let mut window = [0u64; WINDOW_WORDS];
            let words = &mut window[..((past - at) / 64) as usize];
            self.published.take(block, at, words);
            let (from, to) = (first_page.max(at), end.min(past));
            taken(words, at, from, to);
            // A word is taken whole: what is beside the range goes back.
            crate::dirty::runs::clear_range(words, from - at, to - at);
            self.published.put_back(block, at, words);
            at = past;
        }
    }

    /// Empties the rings, and forgets what was in them. For when nothing is logged: all is protected anew after that.
    ///
    /// # Errors
    /// As for [`collect`](Self::collect).
    pub(super) fn drain(&self) -> io::Result<()> {
        let mine = self.turn.take();
        self.collect_in(&mine)?;
        if self.lost.load(Relaxed) == INTERRUPTED {
            self.lost.store(INTACT, Relaxed);
        }
        self.check()?;
        for (slot, &pages) in self.slot_pages.iter().enumerate() {
            self.take(slot, 0, pages, |_, _, _, _| {});
        }
        Ok(())
    }
}

/// What a vCPU's thread needs when its ring is full. A clone does the same; it stays harmless when the source has been
/// disarmed or is gone.
#[derive(Clone, Debug)]
pub struct RingFull {
    pub(super) collector: DynArc<Collector>,
}

impl RingFull {
    /// Makes room in the rings of all vCPUs: to be called on KVM_EXIT_DIRTY_RING_FULL (31), before KVM_RUN is called
    /// again. From any thread, any number at once: each waits until the one before has passed over the rings, and then
    /// passes over them itself. Allocates nothing.
    ///
    /// It does not rely on the pass of another thread, which may have been past this vCPU's ring when it filled up:
    /// there are kernels where a vCPU gets a little further each time it is run with a full ring.
    ///
    /// # Errors
    /// KVM could not reset the rings, or has missed writes: rounds of the source fail then, too. After an overrun the
    /// vCPU cannot run any further while it is logged.
    pub fn relieve(&self) -> io::Result<()> {
        self.collector.collect()
    }

    /// How many pages were collected and not harvested yet, in all slots. A reading, not a promise.
    pub fn collected(&self) -> u64 {
        self.collector.published.count()
    }
}
