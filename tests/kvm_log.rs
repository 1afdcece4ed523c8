//! KVM's dirty log against real KVM: what it reports, compared with what a guest wrote, page by page.

// UNSAFETY: plays the VMM: memory slots, and reading guest RAM through raw pointers.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(all(not(loom), feature = "kvm", target_arch = "x86_64"))]

#[path = "support/kvm_guest.rs"]
mod kvm_guest;
#[path = "support/mod.rs"]
mod support;

use kvm_guest::{Machine, PAGE, Vcpu};
use pageferry::dirty::kvm::{KvmCallKind, KvmDirtyLog, KvmSlot, LogMode};
use pageferry::dirty::{DirtyError, DirtySource};
use pageferry::memory::{Backing, Ram, RamBlock};
use pageferry::units::{BlockId, PageSize};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

const BLOCK: BlockId = BlockId(0);
const MODES: [LogMode; 3] = [LogMode::Legacy, LogMode::Manual, LogMode::InitiallySet];
/// Where the guest sees block 0: page 256.
const BASE: u64 = 1 << 20;

/// A guest with one vCPU and RAM blocks of so many pages. Block 0 is at `BASE`; where else, is the test's to say.
struct Guest {
    machine: Machine,
    vcpu: Vcpu,
    ram: Ram,
}

impl Guest {
    fn new(test: &str, blocks: &[u64]) -> Option<Guest> {
        let mut machine = Machine::new().map_err(|why| support::skip(test, &why)).ok()?;
        let block = |(index, pages): (usize, &u64)| {
            let guest_address = BASE * (1 + 16 * index as u64);
            RamBlock::anonymous(&format!("ram{index}"), guest_address, pages * PAGE, PageSize::SIZE_4K, Backing::Base)
        };
        let ram = Ram::new(blocks.iter().enumerate().map(block).map(Result::unwrap)).unwrap();
        let vcpu = machine.add_vcpu();
        Some(Guest { machine, vcpu, ram })
    }

    /// Slot `slot` shows these pages of a block where the block says that the guest sees them.
    fn slot(&self, slot: u32, block: u16, first: u64, pages: u64) -> KvmSlot {
        let of = self.ram.block(BlockId(block)).unwrap();
        self.slot_at(slot, of.guest_address() + first * PAGE, block, first, pages)
    }

    fn slot_at(&self, slot: u32, guest_address: u64, block: u16, first: u64, pages: u64) -> KvmSlot {
        let host_address = self.ram.block(BlockId(block)).unwrap().host_address() + first * PAGE;
        self.machine.add_slot(slot, guest_address, pages * PAGE, host_address)
    }

    fn log(&self, slots: &[KvmSlot], mode: LogMode) -> KvmDirtyLog {
        let log = KvmDirtyLog::new(self.machine.fd(), slots.iter().copied()).unwrap().with_mode_at_most(mode);
        if log.mode() != mode {
            support::skip("a mode of the dirty log", &format!("this kernel has {:?} and not {mode:?}", log.mode()));
        }
        log
    }

    /// The guest writes these pages of block 0.
    fn write(&mut self, pages: impl IntoIterator<Item = u64>, value: u32) {
        self.write_at(pages.into_iter().map(|page| BASE + page * PAGE), value);
    }

    fn write_at(&mut self, addresses: impl IntoIterator<Item = u64>, value: u32) {
        self.vcpu.write(addresses, value, || panic!("a dirty ring"));
    }

    fn read(&self, block: u16, page: u64) -> u32 {
        let range = self.ram.block(BlockId(block)).unwrap().range(page, 1).unwrap();
        // SAFETY: the page is in the block (`range`), which is mapped.
        unsafe { range.ptr.cast::<u32>().read_volatile() }
    }
}

/// Harvests all of a block in chunks of `chunk_words` words.
fn harvest_by(source: &mut dyn DirtySource, ram: &Ram, block: u16, chunk_words: usize) -> BTreeSet<u64> {
    let pages = ram.block(BlockId(block)).unwrap().pages();
    let mut dirty = BTreeSet::new();
    for first in (0..pages).step_by(chunk_words * 64) {
        let mut words = vec![0u64; chunk_words.min((pages - first).div_ceil(64) as usize)];
        source.harvest(BlockId(block), first, &mut words).unwrap();
        let is_set = |bit: &u64| words[*bit as usize / 64] >> (bit % 64) & 1 == 1;
        dirty.extend((0..words.len() as u64 * 64).filter(is_set).map(|bit| first + bit));
    }
    assert!(dirty.iter().all(|&page| page < pages), "bits past the end of the block");
    dirty
}

/// A round: fetches, and harvests block 0.
fn round(source: &mut dyn DirtySource, ram: &Ram) -> BTreeSet<u64> {
    source.begin_round().unwrap();
    harvest_by(source, ram, 0, 256)
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

#[test]
fn every_page_the_guest_writes_is_reported_once_and_no_other() {
    let test = "every_page_the_guest_writes_is_reported_once_and_no_other";
    for mode in MODES {
        let Some(mut guest) = Guest::new(test, &[1000]) else { return };
        let slots = [guest.slot(0, 0, 0, 1000)];
        let mut log = guest.log(&slots, mode);
        guest.write([1, 2], 1);
        log.arm(&guest.ram).unwrap();
        // Round 0 harvests without a fetch. What is written before it may or may not be in it; it is in the next then.
        guest.write([5, 999], 2);
        let first = harvest_by(&mut log, &guest.ram, 0, 3);
        assert!(mode != LogMode::InitiallySet || first == set(0..1000), "{mode:?}: {first:?}");
        assert!(mode == LogMode::InitiallySet || first.is_empty(), "{mode:?}: {first:?}");
        guest.write([7, 64], 3);
        let second: BTreeSet<u64> = round(&mut log, &guest.ram);
        assert!(second.is_superset(&set([7, 64])), "{mode:?}: {second:?}");
        assert!(set([5, 7, 64, 999]).is_superset(&second), "{mode:?}: {second:?}");
        assert!(&first | &second == &first | &set([5, 7, 64, 999]), "{mode:?}: {first:?} {second:?}");
        assert_eq!(round(&mut log, &guest.ram), set([]), "{mode:?}");
        // Written again after the harvest: reported again.
        for value in 4..8 {
            guest.write([0, 7, 130, 998], value);
            assert_eq!(log.begin_round().unwrap(), 4);
            assert_eq!(log.begin_round().unwrap(), 4, "{mode:?}: counting clears nothing");
            assert_eq!(harvest_by(&mut log, &guest.ram, 0, 2), set([0, 7, 130, 998]), "{mode:?}");
            assert_eq!(harvest_by(&mut log, &guest.ram, 0, 2), set([]), "{mode:?}: it left the snapshot");
        }
        assert_eq!(guest.read(0, 130), 7);
        // Between the fetch and the harvest: shipped as it is now, or reported in the next round.
        guest.write([10], 9);
        log.begin_round().unwrap();
        guest.write([10, 11], 10);
        assert_eq!(harvest_by(&mut log, &guest.ram, 0, 2), set([10]));
        let next = round(&mut log, &guest.ram);
        assert!(next.contains(&11) && set([10, 11]).is_superset(&next), "{mode:?}: {next:?}");
    }
}

#[test]
fn slots_lie_across_blocks_and_blocks_across_slots_at_any_offset() {
    let test = "slots_lie_across_blocks_and_blocks_across_slots_at_any_offset";
    for mode in MODES {
        let Some(mut machine) = Machine::new().map_err(|why| support::skip(test, &why)).ok() else { return };
        let vcpu = machine.add_vcpu();
        // One mapping, cut into two blocks that touch: a slot can lie across both.
        let whole = RamBlock::anonymous("whole", 0, 900 * PAGE, PageSize::SIZE_4K, Backing::Base).unwrap();
        let host = whole.host_address();
        let whole = Arc::new(whole);
        let part = |name: &str, first: u64, pages: u64| {
            let at = whole.range(first, pages).unwrap().ptr;
            // SAFETY: the pages are in the mapping, which the keep-alive holds.
            let block = unsafe { RamBlock::new(name, BASE + first * PAGE, at, pages * PAGE, PageSize::SIZE_4K) };
            block.unwrap().with_keep_alive(whole.clone())
        };
        let ram = Ram::new([part("low", 0, 333), part("high", 333, 500)]).unwrap();
        let mut guest = Guest { machine, vcpu, ram };
        let add = |slot: u32, first: u64, pages: u64| {
            guest.machine.add_slot(slot, BASE + first * PAGE, pages * PAGE, host + first * PAGE)
        };
        // Lengths and offsets that are no multiples of 64; the second lies across the blocks, the last goes past them.
        let slots = [add(3, 0, 101), add(1, 101, 300), add(2, 401, 499)];
        let mut log = guest.log(&slots, mode);
        log.arm(&guest.ram).unwrap();
        for block in [0, 1] {
            harvest_by(&mut log, &guest.ram, block, 2);
        }
        // The guest's pages; the last is in no block.
        let written = [0, 63, 64, 100, 101, 164, 165, 332, 333, 334, 400, 401, 465, 832, 833];
        for chunk_words in [1, 2, 256] {
            guest.write(written, chunk_words as u32);
            assert_eq!(log.begin_round().unwrap(), 14, "{mode:?}: what no block has does not count");
            let low = harvest_by(&mut log, &guest.ram, 0, chunk_words);
            assert_eq!(low, set(written.into_iter().filter(|page| *page < 333)), "{mode:?}");
            guest.write([332], 7);
            let high = harvest_by(&mut log, &guest.ram, 1, chunk_words);
            let expected = written.into_iter().filter(|page| (333..833).contains(page)).map(|page| page - 333);
            assert_eq!(high, set(expected), "{mode:?}");
            log.begin_round().unwrap();
            assert_eq!(harvest_by(&mut log, &guest.ram, 0, 1), set([332]), "{mode:?}: a word that two blocks share");
            assert_eq!(harvest_by(&mut log, &guest.ram, 1, 1), set([]), "{mode:?}");
        }
    }
}

#[test]
fn slots_that_show_the_same_memory_are_ored_and_cleared_together() {
    let test = "slots_that_show_the_same_memory_are_ored_and_cleared_together";
    const ALIAS: u64 = 8 << 20;
    for mode in MODES {
        let Some(mut guest) = Guest::new(test, &[200]) else { return };
        let slots = [guest.slot(0, 0, 0, 200), guest.slot_at(1, ALIAS, 0, 10, 100)];
        let mut log = guest.log(&slots, mode);
        log.arm(&guest.ram).unwrap();
        harvest_by(&mut log, &guest.ram, 0, 4);
        for value in 1..4 {
            guest.write([9, 10, 50], value);
            guest.write_at([50, 51, 109].map(|page| ALIAS + (page - 10) * PAGE), value);
            assert_eq!(log.begin_round().unwrap(), 5, "{mode:?}: a page that both show counts once");
            assert_eq!(harvest_by(&mut log, &guest.ram, 0, 1), set([9, 10, 50, 51, 109]), "{mode:?}");
            assert_eq!(round(&mut log, &guest.ram), set([]), "{mode:?}");
        }
    }
}

#[test]
fn no_clear_is_longer_than_its_limit_and_none_is_made_where_nothing_is_dirty() {
    let test = "no_clear_is_longer_than_its_limit_and_none_is_made_where_nothing_is_dirty";
    const PAGES: u64 = 40_000;
    let Some(mut guest) = Guest::new(test, &[PAGES]) else { return };
    // The second slot begins where the block has no multiple of 64.
    let slots = [guest.slot(0, 0, 0, 3), guest.slot(1, 0, 3, PAGES - 3)];
    let calls = Arc::new(Mutex::new(Vec::new()));
    let told = calls.clone();
    let mut log = guest.log(&slots, LogMode::InitiallySet).on_call(move |call| told.lock().unwrap().push(*call));
    log.arm(&guest.ram).unwrap();
    let take = || std::mem::take(&mut *calls.lock().unwrap());
    assert!(take().is_empty(), "arming fetches nothing and clears nothing");
    let mut words = vec![0; PAGES as usize / 64];
    log.harvest(BLOCK, 0, &mut words).unwrap();
    assert!(words.iter().all(|word| *word == u64::MAX));
    let clears = take();
    assert!(clears.iter().all(|call| call.kind == KvmCallKind::Clear && call.done && call.pages <= 16384));
    assert_eq!(
        clears.iter().map(|call| (call.slot, call.pages)).collect::<Vec<_>>(),
        [(Some(0), 3), (Some(1), 16384), (Some(1), 16384), (Some(1), PAGES - 3 - 2 * 16384),]
    );
    guest.write([20_000], 1);
    assert_eq!(log.begin_round().unwrap(), 1);
    assert_eq!(
        take().iter().map(|call| (call.kind, call.pages)).collect::<Vec<_>>(),
        [(KvmCallKind::Get, 3), (KvmCallKind::Get, PAGES - 3),]
    );
    assert_eq!(harvest_by(&mut log, &guest.ram, 0, 16), set([20_000]));
    let clears = take();
    assert_eq!(clears.len(), 1, "{clears:?}");
    let costs = log.costs();
    assert_eq!((costs.get.calls, costs.clear.calls, costs.reset.calls), (2, 5, 0));
    assert_eq!(costs.clear.pages_max, 16384);
    assert!(costs.clear.longest <= costs.clear.time && !costs.arm.is_zero());
    assert_eq!(log.meter().read(), costs);
}

#[test]
fn what_is_given_back_is_harvested_again_and_counted_once() {
    for mode in MODES {
        let Some(mut guest) = Guest::new("what_is_given_back_is_harvested_again_and_counted_once", &[100]) else {
            return;
        };
        let slots = [guest.slot(0, 0, 0, 100)];
        let mut log = guest.log(&slots, mode);
        log.arm(&guest.ram).unwrap();
        harvest_by(&mut log, &guest.ram, 0, 2);
        guest.write([70, 71], 1);
        assert_eq!(round(&mut log, &guest.ram), set([70, 71]));
        // Bits past the end of the block are left out.
        log.give_back(BLOCK, 64, &[1 << 6 | 1 << 7 | 1 << 63]).unwrap();
        guest.write([71, 72], 2);
        assert_eq!(log.begin_round().unwrap(), 3, "{mode:?}");
        assert_eq!(harvest_by(&mut log, &guest.ram, 0, 1), set([70, 71, 72]), "{mode:?}");
        assert_eq!(round(&mut log, &guest.ram), set([]), "{mode:?}");
    }
}

#[test]
fn logging_is_on_between_arm_and_disarm_only() {
    for mode in MODES {
        let Some(mut guest) = Guest::new("logging_is_on_between_arm_and_disarm_only", &[100]) else { return };
        let slots = [guest.slot(0, 0, 0, 100)];
        // Not our RAM: it is left alone.
        let other = RamBlock::anonymous("other", 0, 4 * PAGE, PageSize::SIZE_4K, Backing::Base).unwrap();
        let elsewhere = guest.machine.add_slot(5, 64 << 20, 4 * PAGE, other.host_address());
        let logged = |guest: &Guest, slot| match guest.machine.vm.get_dirty_log(slot, (100 * PAGE) as usize) {
            Ok(_) => true,
            Err(e) => {
                assert_eq!(e.errno(), libc::ENOENT);
                false
            }
        };
        let mut log = guest.log(&[slots[0], elsewhere], mode);
        log.disarm();
        assert!(matches!(log.begin_round(), Err(DirtyError::NotArmed)));
        for _ in 0..2 {
            log.arm(&guest.ram).unwrap();
            assert!(logged(&guest, 0) && !logged(&guest, 5));
            guest.write([1], 1);
            log.arm(&guest.ram).unwrap();
            harvest_by(&mut log, &guest.ram, 0, 2);
            guest.write([2], 2);
            assert_eq!(round(&mut log, &guest.ram), set([2]), "{mode:?}");
            log.disarm();
            log.disarm();
            assert!(!logged(&guest, 0));
            assert!(matches!(log.harvest(BLOCK, 0, &mut [0]), Err(DirtyError::NotArmed)));
            assert!(matches!(log.give_back(BLOCK, 0, &[1]), Err(DirtyError::NotArmed)));
            guest.write([3], 3);
        }
        log.arm(&guest.ram).unwrap();
        drop(log);
        assert!(!logged(&guest, 0), "{mode:?}: dropping disarms");
    }
}

#[test]
fn a_slot_that_the_vmm_logs_itself_stays_logged() {
    let Some(mut guest) = Guest::new("a_slot_that_the_vmm_logs_itself_stays_logged", &[100]) else { return };
    let host = guest.ram.block(BLOCK).unwrap().host_address();
    guest.machine.set_slot(0, 1, BASE, 100 * PAGE, host);
    // SAFETY: these are the values of the slot.
    let slot = unsafe { KvmSlot::new(0, 1, BASE, 100 * PAGE, host) };
    for mode in MODES {
        guest.write([1], 1);
        let mut log = guest.log(&[slot], mode);
        log.arm(&guest.ram).unwrap();
        let first = harvest_by(&mut log, &guest.ram, 0, 2);
        let second = round(&mut log, &guest.ram);
        assert!((&first | &second).contains(&1), "{mode:?}");
        guest.write([2], 2);
        assert_eq!(round(&mut log, &guest.ram), set([2]), "{mode:?}");
        log.disarm();
        assert!(guest.machine.vm.get_dirty_log(0, (100 * PAGE) as usize).is_ok(), "{mode:?}");
    }
}

#[test]
fn a_toggle_that_fails_at_any_slot_undoes_those_before() {
    let Some(guest) = Guest::new("a_toggle_that_fails_at_any_slot_undoes_those_before", &[400]) else { return };
    let slots: Vec<_> = (0..4).map(|slot| guest.slot(slot, 0, u64::from(slot) * 100, 100)).collect();
    for fails_at in 0..4 {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        let toggle = move |slot: &KvmSlot, log: bool| {
            told.lock().unwrap().push((slot.slot(), log));
            if log && slot.slot() == fails_at { Err(io::Error::from_raw_os_error(libc::ENOMEM)) } else { Ok(()) }
        };
        let mut log = guest.log(&slots, LogMode::InitiallySet).with_toggle(toggle);
        let refused = log.arm(&guest.ram);
        assert!(matches!(refused, Err(DirtyError::Slot { slot, .. }) if slot == fails_at), "{refused:?}");
        let expected: Vec<_> =
            (0..=fails_at).map(|slot| (slot, true)).chain((0..fails_at).map(|s| (s, false))).collect();
        assert_eq!(*seen.lock().unwrap(), expected);
        assert!(matches!(log.begin_round(), Err(DirtyError::NotArmed)));
    }
    // A callback that says yes and does nothing is found out, and taken back.
    for mode in MODES {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let told = calls.clone();
        let lies = move |slot: &KvmSlot, log: bool| {
            told.lock().unwrap().push((slot.slot(), log));
            Ok(())
        };
        let mut log = guest.log(&slots[..], mode).with_toggle(lies);
        let refused = log.arm(&guest.ram);
        assert!(matches!(refused, Err(DirtyError::Slot { slot: 0, .. })), "{mode:?}: {refused:?}");
        let expected: Vec<_> = [true, false].into_iter().flat_map(|log| (0..4).map(move |slot| (slot, log))).collect();
        assert_eq!(*calls.lock().unwrap(), expected, "{mode:?}");
    }
}

#[test]
fn a_slot_that_is_gone_makes_the_harvest_fail_with_all_pages_dirty() {
    for mode in [LogMode::Manual, LogMode::InitiallySet] {
        let test = "a_slot_that_is_gone_makes_the_harvest_fail_with_all_pages_dirty";
        let Some(mut guest) = Guest::new(test, &[100]) else { return };
        let slots = [guest.slot(0, 0, 0, 100)];
        let mut log = guest.log(&slots, mode);
        log.arm(&guest.ram).unwrap();
        guest.write([3], 1);
        log.begin_round().unwrap();
        // The slot is deleted behind the source's back.
        guest.machine.set_slot(0, 0, BASE, 0, slots[0].host_address());
        let mut words = [0; 2];
        let failed = log.harvest(BLOCK, 0, &mut words);
        assert!(matches!(failed, Err(DirtyError::Scan { block: BLOCK, first_page: 0, .. })), "{mode:?}: {failed:?}");
        assert_eq!(words, [u64::MAX, (1 << 36) - 1]);
        assert!(matches!(log.begin_round(), Err(DirtyError::Slot { slot: 0, .. })), "{mode:?}");
        // Made anew, so that disarming finds what it expects: it would create the slot otherwise.
        guest.machine.set_slot(0, 0, BASE, 100 * PAGE, slots[0].host_address());
    }
}

#[test]
fn what_cannot_be_tracked_is_refused_by_name() {
    let Some(guest) = Guest::new("what_cannot_be_tracked_is_refused_by_name", &[100, 50]) else { return };
    let slots = [guest.slot(0, 0, 0, 100), guest.slot(1, 1, 0, 20), guest.slot(2, 1, 21, 29)];
    let mut log = guest.log(&slots, LogMode::InitiallySet);
    let refused = log.arm(&guest.ram).unwrap_err();
    assert!(matches!(refused, DirtyError::Uncovered { block: BlockId(1), first_page: 20 }), "{refused:?}");
    let large = RamBlock::anonymous("large", 0, 1 << 20, PageSize::SIZE_64K, Backing::Base).unwrap();
    let refused = log.arm(&Ram::new([large]).unwrap()).unwrap_err();
    assert!(matches!(refused, DirtyError::PageSize { page_bytes: 65536, .. }), "{refused:?}");
    // SAFETY: never used with a VM: it is refused.
    let odd = unsafe { KvmSlot::new(0, 0, 0, 100, 0) };
    let refused = KvmDirtyLog::new(guest.machine.fd(), [odd]).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    assert!(KvmDirtyLog::new(guest.vcpu.fd(), slots).is_err(), "a vCPU is no VM");
}

#[test]
fn a_range_outside_the_block_is_refused() {
    let Some(guest) = Guest::new("a_range_outside_the_block_is_refused", &[100]) else { return };
    let slots = [guest.slot(0, 0, 0, 100)];
    let mut log = guest.log(&slots, LogMode::InitiallySet);
    log.arm(&guest.ram).unwrap();
    for (block, first_page, words) in [(1, 0, 1), (0, 1, 1), (0, 128, 1), (0, 0, 3), (0, u64::MAX - 63, 1)] {
        let got = log.harvest(BlockId(block), first_page, &mut vec![0; words]);
        assert!(matches!(got, Err(DirtyError::OutOfRange { .. })), "{block} {first_page} {words}: {got:?}");
        let got = log.give_back(BlockId(block), first_page, &vec![0; words]);
        assert!(matches!(got, Err(DirtyError::OutOfRange { .. })), "{block} {first_page} {words}: {got:?}");
    }
    log.harvest(BLOCK, 64, &mut [0]).unwrap();
}
