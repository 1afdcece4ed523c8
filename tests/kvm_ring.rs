//! KVM's dirty rings against real KVM: what is collected, when it is published, and what happens when a ring is full.

// UNSAFETY: plays the VMM: memory slots, and reading guest RAM through raw pointers.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(all(not(loom), feature = "kvm", target_arch = "x86_64"))]

#[path = "support/kvm_guest.rs"]
mod kvm_guest;
#[path = "support/mod.rs"]
mod support;

use kvm_guest::{Machine, PAGE, Vcpu};
use pageferry::dirty::kvm::{KvmCallKind, KvmDirtyLog, KvmDirtyRing, KvmSlot, RingEnabled, RingFull};
use pageferry::dirty::{DirtyError, DirtySource};
use pageferry::memory::{Backing, Ram, RamBlock};
use pageferry::units::{BlockId, PageSize};
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

const BLOCK: BlockId = BlockId(0);
/// Where the guest sees block 0.
const BASE: u64 = 1 << 20;
/// The smallest ring: a page of entries. KVM keeps 64 of them to itself.
const ENTRIES_MIN: u32 = 256;

/// A VM whose vCPUs will have rings, and RAM of one block.
struct Guest {
    machine: Machine,
    ram: Ram,
    enabled: Option<RingEnabled>,
}

impl Guest {
    fn new(test: &str, pages: u64, entries: u32) -> Option<Guest> {
        let machine = Machine::new().map_err(|why| support::skip(test, &why)).ok()?;
        let enabled = match KvmDirtyRing::enable(machine.fd(), entries) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                support::skip(test, &e.to_string());
                return None;
            }
            enabled => Some(enabled.unwrap()),
        };
        let block = RamBlock::anonymous("ram", BASE, pages * PAGE, PageSize::SIZE_4K, Backing::Base).unwrap();
        Some(Guest { machine, ram: Ram::new([block]).unwrap(), enabled })
    }

    /// Slot `slot` shows these pages of the block at this address of the guest's.
    fn slot_at(&self, slot: u32, guest_address: u64, first: u64, pages: u64) -> KvmSlot {
        let host_address = self.ram.block(BLOCK).unwrap().host_address() + first * PAGE;
        self.machine.add_slot(slot, guest_address, pages * PAGE, host_address)
    }

    /// One slot for all of the block.
    fn slot(&self) -> KvmSlot {
        self.slot_at(0, BASE, 0, self.ram.pages())
    }

    fn ring(&mut self, vcpus: &[Vcpu], slots: &[KvmSlot]) -> KvmDirtyRing {
        let (fds, slots) = (vcpus.iter().map(Vcpu::fd), slots.iter().copied());
        KvmDirtyRing::new(self.machine.fd(), self.enabled.take().unwrap(), fds, slots).unwrap()
    }
}

fn read(ram: &Ram, page: u64) -> u32 {
    let range = ram.block(BLOCK).unwrap().range(page, 1).unwrap();
    // SAFETY: the page is in the block (`range`), which is mapped.
    unsafe { range.ptr.cast::<u32>().read_volatile() }
}

fn harvest(source: &mut dyn DirtySource, ram: &Ram, chunk_words: usize) -> BTreeSet<u64> {
    let pages = ram.pages();
    let mut dirty = BTreeSet::new();
    for first in (0..pages).step_by(chunk_words * 64) {
        let mut words = vec![0u64; chunk_words.min((pages - first).div_ceil(64) as usize)];
        source.harvest(BLOCK, first, &mut words).unwrap();
        let is_set = |bit: &u64| words[*bit as usize / 64] >> (bit % 64) & 1 == 1;
        dirty.extend((0..words.len() as u64 * 64).filter(is_set).map(|bit| first + bit));
    }
    assert!(dirty.iter().all(|&page| page < pages), "bits past the end of the block");
    dirty
}

fn round(source: &mut dyn DirtySource, ram: &Ram) -> BTreeSet<u64> {
    source.begin_round().unwrap();
    harvest(source, ram, 256)
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

fn write(vcpu: &mut Vcpu, pages: impl IntoIterator<Item = u64>, value: u32) {
    vcpu.write(pages.into_iter().map(|page| BASE + page * PAGE), value, || panic!("a full ring"));
}

#[test]
fn every_page_the_guest_writes_is_reported_once_and_no_other() {
    let test = "every_page_the_guest_writes_is_reported_once_and_no_other";
    let Some(mut guest) = Guest::new(test, 1000, ENTRIES_MIN) else { return };
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu(), guest.machine.add_vcpu()]);
    let mut ring = guest.ring(&vcpus, &[slot]);
    write(&mut vcpus[0], [1], 1);
    assert!(matches!(ring.begin_round(), Err(DirtyError::NotArmed)));
    for again in 0..3 {
        ring.arm(&guest.ram).unwrap();
        assert_eq!(harvest(&mut ring, &guest.ram, 3), set([]), "what was written before arming");
        for value in 2..6 {
            write(&mut vcpus[0], [0, 7, 130], value);
            write(&mut vcpus[1], [7, 64, 999], value);
            assert_eq!(ring.begin_round().unwrap(), 5);
            assert_eq!(ring.begin_round().unwrap(), 5, "counting clears nothing");
            assert_eq!(harvest(&mut ring, &guest.ram, 3), set([0, 7, 64, 130, 999]), "{again}");
            assert_eq!(round(&mut ring, &guest.ram), set([]));
        }
        // Given back, and written again: counted and reported.
        ring.give_back(BLOCK, 64, &[1 << 6 | 1 << 7]).unwrap();
        write(&mut vcpus[1], [72], 9);
        assert_eq!(ring.begin_round().unwrap(), 3);
        assert_eq!(harvest(&mut ring, &guest.ram, 1), set([70, 71, 72]));
        write(&mut vcpus[0], [5], 9);
        ring.disarm();
        ring.disarm();
        write(&mut vcpus[0], [6], 9);
        assert!(matches!(ring.harvest(BLOCK, 0, &mut [0]), Err(DirtyError::NotArmed)));
        assert!(matches!(ring.give_back(BLOCK, 0, &[1]), Err(DirtyError::NotArmed)));
    }
    ring.arm(&guest.ram).unwrap();
    for (block, first_page, words) in [(1, 0, 1), (0, 1, 1), (0, 1024, 1), (0, 0, 17), (0, u64::MAX - 63, 1)] {
        let got = ring.harvest(BlockId(block), first_page, &mut vec![0; words]);
        assert!(matches!(got, Err(DirtyError::OutOfRange { .. })), "{block} {first_page} {words}: {got:?}");
    }
}

#[test]
fn pages_are_published_only_when_the_reset_has_returned() {
    let test = "pages_are_published_only_when_the_reset_has_returned";
    let Some(mut guest) = Guest::new(test, 200, ENTRIES_MIN) else { return };
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu()]);
    let handle: Arc<OnceLock<RingFull>> = Arc::default();
    let at_reset = Arc::new(AtomicU64::new(u64::MAX));
    let (told, seen) = (handle.clone(), at_reset.clone());
    let mut ring = guest.ring(&vcpus, &[slot]).on_call(move |call| {
        assert_eq!((call.kind, call.slot, call.done), (KvmCallKind::Reset, None, true));
        // The reset has returned: before that nobody may have heard of these pages.
        seen.store(told.get().unwrap().collected(), Relaxed);
    });
    let handle = handle.get_or_init(|| ring.vcpu_handle());
    ring.arm(&guest.ram).unwrap();
    write(&mut vcpus[0], 10..40, 1);
    assert_eq!(handle.collected(), 0);
    handle.relieve().unwrap();
    assert_eq!(at_reset.load(Relaxed), 0, "published before the reset");
    assert_eq!(handle.collected(), 30);
    let costs = ring.costs();
    assert_eq!((costs.reset.calls, costs.reset.pages, costs.get.calls, costs.clear.calls), (1, 30, 0, 0));
    assert_eq!(harvest(&mut ring, &guest.ram, 1), set(10..40));
    handle.relieve().unwrap();
    assert_eq!(ring.costs().reset.calls, 1, "nothing was taken, so nothing is reset");
}

/// Counts down when it goes, also in a panic: others wait for that.
struct CountsDown<'a>(&'a AtomicUsize);

impl Drop for CountsDown<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Three vCPUs write all pages over and over, and relieve their rings; meanwhile this thread ships. With `kicks`,
/// another one signals them all the time, as a VMM that wants to pause them. At the end the copy must equal the memory.
fn ships_everything_under_load(test: &str, passes: u32, kicks: bool) {
    const PAGES: u64 = 1500;
    let Some(mut guest) = Guest::new(test, PAGES, ENTRIES_MIN) else { return };
    let slot = guest.slot();
    let mut vcpus: Vec<Vcpu> = (0..3).map(|_| guest.machine.add_vcpu()).collect();
    let mut ring = guest.ring(&vcpus, &[slot]);
    ring.arm(&guest.ram).unwrap();
    // What a target would hold: each page as it was read after the harvest that reported it.
    let mut copy = vec![0u32; PAGES as usize];
    let ship = |ring: &mut KvmDirtyRing, copy: &mut Vec<u32>| {
        round(ring, &guest.ram).into_iter().for_each(|page| copy[page as usize] = read(&guest.ram, page));
    };
    let (running, full, kicked) = (AtomicUsize::new(vcpus.len()), AtomicU64::new(0), AtomicU64::new(0));
    let threads: Vec<AtomicU64> = vcpus.iter().map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        // The handles are kept until nobody signals any more: a thread that nobody has joined can be named.
        let mut writers = Vec::new();
        for (index, vcpu) in vcpus.iter_mut().enumerate() {
            let (handle, running, full, me) = (ring.vcpu_handle(), &running, &full, &threads[index]);
            writers.push(scope.spawn(move || {
                let _running = CountsDown(running);
                // SAFETY: takes nothing.
                me.store(unsafe { libc::pthread_self() }, Relaxed);
                for pass in 1..=passes {
                    // Each vCPU has every third page, and all of them have the first ten.
                    let pages = (0..10).chain((10..PAGES).filter(|page| *page as usize % 3 == index));
                    vcpu.write(pages.map(|page| BASE + page * PAGE), pass, || {
                        full.fetch_add(1, Relaxed);
                        handle.relieve().unwrap();
                    });
                }
            }));
        }
        let kicker = kicks.then(|| {
            scope.spawn(|| {
                while running.load(Relaxed) > 0 {
                    for thread in threads.iter().map(|thread| thread.load(Relaxed)).filter(|thread| *thread != 0) {
                        // SAFETY: nobody has joined the thread; the signal has a handler.
                        unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
                        kicked.fetch_add(1, Relaxed);
                    }
                    std::thread::yield_now();
                }
            })
        });
        let mut rounds = 0;
        while running.load(Relaxed) > 0 {
            ship(&mut ring, &mut copy);
            rounds += 1;
            // Every other time the vCPUs are left alone until a ring is full.
            let seen = full.load(Relaxed);
            while rounds % 2 == 0 && running.load(Relaxed) > 0 && full.load(Relaxed) == seen {
                std::thread::yield_now();
            }
        }
        kicker.into_iter().for_each(|kicker| kicker.join().unwrap());
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    // The guest is paused: one more round has all the rest.
    ship(&mut ring, &mut copy);
    let lost: Vec<u64> = (0..PAGES).filter(|page| copy[*page as usize] != read(&guest.ram, *page)).collect();
    assert!(lost.is_empty(), "{} pages were lost, first {:?}", lost.len(), &lost[..lost.len().min(5)]);
    assert!(copy.iter().all(|value| *value == passes));
    assert!(full.load(Relaxed) > 0, "no ring was ever full: this has tested nothing");
    assert!(!kicks || kicked.load(Relaxed) > 0);
    let costs = ring.costs();
    assert!(costs.reset.pages >= PAGES && costs.entries_ignored == 0, "{costs:?}");
}

#[test]
fn a_full_ring_on_every_vcpu_loses_no_page() {
    ships_everything_under_load("a_full_ring_on_every_vcpu_loses_no_page", 60, false);
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn a_signal_in_the_middle_of_a_reset_loses_no_page() {
    register_signal_handler(SIGRTMIN(), kicked).unwrap();
    ships_everything_under_load("a_signal_in_the_middle_of_a_reset_loses_no_page", 15, true);
}

#[test]
fn a_ring_that_kvm_lets_overrun_is_an_error_and_never_a_silent_loss() {
    let test = "a_ring_that_kvm_lets_overrun_is_an_error_and_never_a_silent_loss";
    let Some(mut guest) = Guest::new(test, 4000, ENTRIES_MIN) else { return };
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu()]);
    let mut ring = guest.ring(&vcpus, &[slot]);
    ring.arm(&guest.ram).unwrap();
    let handle = ring.vcpu_handle();
    let (mut refused, mut exits) = (None, 0);
    // It leaves KVM_RUN by itself only when it is through: KVM that runs it in software is not in time to stop it.
    vcpus[0].write_in_bursts(1 << 31, (0..4000).map(|page| BASE + page * PAGE), 1, || {
        (refused, exits) = (handle.relieve().err(), exits + 1);
        // Bounded: a vCPU that finds no room for ever must not hang the test.
        refused.is_none() && exits < 4000
    });
    match ring.begin_round() {
        Ok(pages) => {
            assert!(refused.is_none() && pages == 4000, "{refused:?} {pages}");
            assert_eq!(harvest(&mut ring, &guest.ram, 256), set(0..4000));
        }
        Err(e) => {
            assert!(matches!(e, DirtyError::Rings { .. }), "{e:?}");
            let mut words = [0; 63];
            assert!(matches!(ring.harvest(BLOCK, 0, &mut words), Err(DirtyError::Rings { .. })));
            assert_eq!((words[0], words[62]), (u64::MAX, (1 << 32) - 1), "all pages count as dirty");
            // Nothing brings such a ring back: no second attempt pretends that it did.
            assert!(matches!(ring.arm(&guest.ram), Err(DirtyError::Rings { .. })));
            assert!(handle.relieve().is_err());
        }
    }
}

#[test]
fn slots_at_odd_offsets_and_aliases_meet_in_the_right_pages() {
    let test = "slots_at_odd_offsets_and_aliases_meet_in_the_right_pages";
    const ALIAS: u64 = 32 << 20;
    let Some(mut guest) = Guest::new(test, 700, ENTRIES_MIN) else { return };
    // Over pages 0 to 100, 101 to 699, and again 50 to 649 elsewhere.
    let slots = [
        guest.slot_at(4, BASE, 0, 101),
        guest.slot_at(2, BASE + 101 * PAGE, 101, 599),
        guest.slot_at(9, ALIAS, 50, 600),
    ];
    let mut vcpus = [guest.machine.add_vcpu()];
    let mut ring = guest.ring(&vcpus, &slots);
    ring.arm(&guest.ram).unwrap();
    for chunk_words in [1, 2, 5, 256] {
        write(&mut vcpus[0], [0, 63, 64, 100, 101, 128, 699], 1);
        vcpus[0].write([50, 51, 101, 320, 649].map(|page| ALIAS + (page - 50) * PAGE), 2, || panic!("a full ring"));
        let count = ring.begin_round().unwrap();
        assert!((11..=12).contains(&count), "a page that two slots show may count twice: {count}");
        let expected = set([0, 50, 51, 63, 64, 100, 101, 128, 320, 649, 699]);
        assert_eq!(harvest(&mut ring, &guest.ram, chunk_words), expected, "{chunk_words}");
        assert_eq!(round(&mut ring, &guest.ram), set([]));
    }
}

#[test]
fn entries_of_slots_we_were_not_told_of_are_counted_and_left_out() {
    let test = "entries_of_slots_we_were_not_told_of_are_counted_and_left_out";
    let Some(mut guest) = Guest::new(test, 100, ENTRIES_MIN) else { return };
    let other = RamBlock::anonymous("other", 0, 10 * PAGE, PageSize::SIZE_4K, Backing::Base).unwrap();
    const OTHER: u64 = 64 << 20;
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu()]);
    // Logged by the VMM for itself.
    guest.machine.set_slot(7, 1, OTHER, 10 * PAGE, other.host_address());
    let mut ring = guest.ring(&vcpus, &[slot]);
    ring.arm(&guest.ram).unwrap();
    vcpus[0].write([OTHER, OTHER + 3 * PAGE, BASE + PAGE], 1, || panic!("a full ring"));
    assert_eq!(ring.begin_round().unwrap(), 1);
    assert_eq!(harvest(&mut ring, &guest.ram, 2), set([1]));
    assert_eq!(ring.costs().entries_ignored, 2);
    // They were reset with the rest: written again, they come again.
    vcpus[0].write([OTHER], 2, || panic!("a full ring"));
    assert_eq!(round(&mut ring, &guest.ram), set([]));
    assert_eq!(ring.meter().read().entries_ignored, 3);
}

#[test]
fn a_handle_does_no_harm_when_its_source_is_disarmed_or_gone() {
    let test = "a_handle_does_no_harm_when_its_source_is_disarmed_or_gone";
    let Some(mut guest) = Guest::new(test, 100, ENTRIES_MIN) else { return };
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu()]);
    let mut ring = guest.ring(&vcpus, &[slot]);
    let handle = ring.vcpu_handle();
    handle.relieve().unwrap();
    ring.arm(&guest.ram).unwrap();
    write(&mut vcpus[0], [1], 1);
    ring.disarm();
    handle.relieve().unwrap();
    assert_eq!(handle.collected(), 0);
    ring.arm(&guest.ram).unwrap();
    write(&mut vcpus[0], [2], 2);
    drop(ring);
    handle.relieve().unwrap();
    write(&mut vcpus[0], 0..100, 3);
    handle.clone().relieve().unwrap();
    assert_eq!(handle.collected(), 0);
}

#[test]
fn a_ring_that_cannot_be_is_refused_with_the_reason() {
    let test = "a_ring_that_cannot_be_is_refused_with_the_reason";
    let Some(mut guest) = Guest::new(test, 100, ENTRIES_MIN) else { return };
    let fresh = Machine::new().unwrap();
    for entries in [0, 1, 128, 300, 1 << 17] {
        let refused = KvmDirtyRing::enable(fresh.fd(), entries).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{entries}");
        assert!(refused.to_string().contains("from 256 to 65536"), "{refused}");
    }
    let twice = KvmDirtyRing::enable(guest.machine.fd(), ENTRIES_MIN).unwrap_err();
    assert!(twice.to_string().contains("once, before the first vCPU"), "{twice}");
    let mut late = Machine::new().unwrap();
    let vcpu = late.add_vcpu();
    assert!(KvmDirtyRing::enable(late.fd(), ENTRIES_MIN).is_err());
    let slot = guest.slot();
    // A vCPU of another VM has no ring; a slot that is named twice has two owners.
    let enabled = guest.enabled.take().unwrap();
    let no_ring = KvmDirtyRing::new(guest.machine.fd(), enabled, [vcpu.fd()], [slot]);
    assert_eq!(no_ring.unwrap_err().raw_os_error(), Some(libc::EFAULT));
    let other = Machine::new().unwrap();
    let enabled = KvmDirtyRing::enable(other.fd(), 512).unwrap();
    assert_eq!(enabled.entries(), 512);
    let twice = KvmDirtyRing::new(other.fd(), enabled, Vec::<Vcpu>::new().iter().map(Vcpu::fd), [slot, slot]);
    assert_eq!(twice.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    // And the log is not to be had beside the ring: found out when it is armed, not when the pages are gone.
    let mut log = KvmDirtyLog::new(guest.machine.fd(), [slot]).unwrap();
    let refused = log.arm(&guest.ram);
    assert!(matches!(refused, Err(DirtyError::Slot { slot: 0, .. })), "{refused:?}");
}

#[test]
fn a_vm_that_was_set_up_for_manual_clearing_is_protected_all_the_same() {
    let test = "a_vm_that_was_set_up_for_manual_clearing_is_protected_all_the_same";
    let Some(mut guest) = Guest::new(test, 100, ENTRIES_MIN) else { return };
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu()]);
    // INITIALLY_SET: a slot whose logging begins would not be protected.
    let manual = kvm_bindings::kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [3, 0, 0, 0],
        ..Default::default()
    };
    guest.machine.vm.enable_cap(&manual).unwrap();
    let mut ring = guest.ring(&vcpus, &[slot]);
    write(&mut vcpus[0], 0..100, 1);
    ring.arm(&guest.ram).unwrap();
    write(&mut vcpus[0], [3, 77], 2);
    assert_eq!(round(&mut ring, &guest.ram), set([3, 77]));
}

#[test]
fn the_log_beside_the_rings_is_fetched_where_there_is_one() {
    let test = "the_log_beside_the_rings_is_fetched_where_there_is_one";
    let Some(mut guest) = Guest::new(test, 100, ENTRIES_MIN) else { return };
    if !guest.enabled.as_ref().unwrap().with_bitmap() {
        return support::skip(test, "this kernel has no KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP");
    }
    let (slot, mut vcpus) = (guest.slot(), [guest.machine.add_vcpu()]);
    let mut ring = guest.ring(&vcpus, &[slot]);
    ring.arm(&guest.ram).unwrap();
    write(&mut vcpus[0], [3], 1);
    assert_eq!(round(&mut ring, &guest.ram), set([3]));
    assert_eq!(ring.costs().get.calls, 1);
}

#[test]
fn a_toggle_that_fails_leaves_the_source_disarmed() {
    let test = "a_toggle_that_fails_leaves_the_source_disarmed";
    let Some(mut guest) = Guest::new(test, 100, ENTRIES_MIN) else { return };
    let slots = [guest.slot_at(0, BASE, 0, 50), guest.slot_at(1, BASE + 50 * PAGE, 50, 50)];
    let vcpus = [guest.machine.add_vcpu()];
    let calls = Arc::new(AtomicU64::new(0));
    let told = calls.clone();
    let mut ring = guest.ring(&vcpus, &slots).with_toggle(move |slot, log| {
        // A decimal digit for each call: 1 is slot 0 on, 2 slot 1 on, 3 slot 0 off.
        let digit = if log { 1 + u64::from(slot.slot()) } else { 3 + u64::from(slot.slot()) };
        told.fetch_update(Relaxed, Relaxed, |calls| Some(calls * 10 + digit)).unwrap();
        if slot.slot() == 1 && log { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    });
    let refused = ring.arm(&guest.ram);
    assert!(matches!(refused, Err(DirtyError::Slot { slot: 1, .. })), "{refused:?}");
    assert_eq!(calls.load(Relaxed), 123);
    assert!(matches!(ring.begin_round(), Err(DirtyError::NotArmed)));
}
