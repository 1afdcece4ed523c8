//! Guest memory of rust-vmm's `vm-memory`: its regions as RAM blocks, and its bitmaps as a dirty source.
#![cfg(all(not(loom), feature = "vm-memory"))]

#[path = "support/vmm.rs"]
mod vmm;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use pageferry::dirty::combined::Combined;
use pageferry::dirty::vm_memory::{PageBits, TrackedRegion};
use pageferry::memory::vm_memory::Mapping;
use pageferry::memory::{Backing, Initial, MemoryError, Presence, PresenceMap};
use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::Setup;
use pageferry::{
    DirtyBitmap, DirtyError, DirtySource, Failure, GuestRam, HookError, Incoming, Outcome, Ram, RamBlock,
    RegionBitmaps, Source, Target, Verify,
};
use proptest::prelude::*;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};
use vmm::{TestGuest, TestIncoming, Transport, assert_arrived, assert_stayed};

type Tracked = GuestMemoryMmap<AtomicBitmap>;

const PAGE: u64 = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Where region `index` begins: far apart, and none at 0, so that a guest address is no offset.
fn start_of(index: usize) -> u64 {
    (index as u64 + 1) << 40
}

/// Memory of regions of so many pages each.
fn memory(pages: &[u64]) -> Arc<Tracked> {
    let range = |(index, pages): (usize, &u64)| (GuestAddress(start_of(index)), (pages * PAGE) as usize);
    Arc::new(Tracked::from_ranges(&pages.iter().enumerate().map(range).collect::<Vec<_>>()).unwrap())
}

fn ram_of(memory: &Arc<Tracked>) -> Ram {
    GuestRam::new(memory.clone()).mapped_as(Mapping::of).ram().unwrap()
}

fn armed(memory: &Arc<Tracked>) -> (Ram, RegionBitmaps<Tracked>) {
    let (ram, mut dirty) = (ram_of(memory), RegionBitmaps::new(memory.clone()));
    dirty.arm(&ram).unwrap();
    (ram, dirty)
}

/// Writes a page full of bytes that no other page has.
fn write_page(memory: &Tracked, region: usize, page: u64, version: u64) {
    let words = (0..PAGE / 8).map(|i| vmm::mix(version ^ page << 20 ^ (region as u64) << 52 ^ i).to_ne_bytes());
    let bytes: Vec<u8> = words.flatten().collect();
    memory.write_slice(&bytes, GuestAddress(start_of(region) + page * PAGE)).unwrap();
}

/// The pages that are marked in the bitmaps, read in the slowest way there is.
fn marked(memory: &Tracked) -> Vec<BTreeSet<u64>> {
    let of = |region: &GuestRegionMmap<AtomicBitmap>| {
        let bits = region.page_bits();
        (0..bits.len()).filter(|page| bits.is_bit_set(*page)).map(|page| page as u64).collect()
    };
    memory.iter().map(of).collect()
}

/// Harvests a whole region.
fn harvest(dirty: &mut impl DirtySource, ram: &Ram, region: usize) -> BTreeSet<u64> {
    let mut words = vec![0; ram.blocks()[region].pages().div_ceil(64) as usize];
    dirty.harvest(BlockId(region as u16), 0, &mut words).unwrap();
    bits(&words, 0)
}

fn bits(words: &[u64], first: u64) -> BTreeSet<u64> {
    let is_set = |bit: &u64| words[*bit as usize / 64] >> (bit % 64) & 1 == 1;
    (0..words.len() as u64 * 64).filter(is_set).map(|bit| first + bit).collect()
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

/// A file that is gone when it is closed, of so many bytes, all of them a hole.
fn scratch_file(bytes: u64) -> File {
    let path = vmm::unix_address();
    let path = path.strip_prefix("unix:").unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// Memory of one region, mapped with these flags over this file, if any.
fn mapped(file: Option<File>, flags: i32, pages: u64) -> Arc<GuestMemoryMmap> {
    let file = file.map(|file| FileOffset::new(file, 0));
    let mapping = MmapRegion::build(file, (pages * PAGE) as usize, READ_WRITE, flags).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap())
}

#[test]
fn blocks_are_the_regions() {
    let memory = memory(&[5, 64, 1000]);
    let ram = ram_of(&memory);
    assert_eq!(ram.blocks().len(), memory.num_regions());
    for (index, (block, region)) in ram.blocks().iter().zip(memory.iter()).enumerate() {
        assert_eq!(block.name(), format!("ram{index}"));
        assert_eq!((block.guest_address(), block.bytes()), (region.start_addr().0, region.len()));
        let host = region.get_host_address(MemoryRegionAddress(0)).unwrap();
        assert_eq!((block.host_address(), block.page_size()), (host as u64, PageSize::SIZE_4K));
        assert_eq!(block.initial(), Initial::Overwrite);
    }
    memory.write_obj(7u8, GuestAddress(start_of(1) + 3 * PAGE + 5)).unwrap();
    assert_eq!(vmm::read_page(&ram, BlockId(1), 3)[5], 7);

    let named = GuestRam::new(memory.clone()).named(|index, region| format!("{index} at {:x}", region.start_addr().0));
    let named = named.page_size(PageSize::SIZE_4K).initial(Initial::Zeroed).ram().unwrap();
    assert_eq!(named.blocks()[1].name(), "1 at 20000000000");
    assert_eq!(named.blocks()[1].initial(), Initial::Zeroed);
}

#[test]
fn what_exists_is_asked_only_of_mappings_that_can_tell() {
    /// Pages that count as existing of 100 of which page 7 alone was touched.
    fn existing(memory: Arc<GuestMemoryMmap>, mapping: fn(&GuestRegionMmap) -> Mapping) -> u64 {
        memory.write_obj(1u8, GuestAddress(7 * PAGE)).unwrap();
        let ram = GuestRam::new(memory).mapped_as(mapping).ram().unwrap();
        let mut words = [u64::MAX; 2];
        PresenceMap::new(&ram).keep_present(BlockId(0), 0, &mut words).unwrap();
        pageferry::dirty::runs::count(&words)
    }
    let anonymous = || mapped(None, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE, 100);
    let shared = || mapped(Some(scratch_file(100 * PAGE)), libc::MAP_SHARED, 100);
    let private_file = || mapped(Some(scratch_file(100 * PAGE)), libc::MAP_PRIVATE, 100);
    let shared_anonymous = || mapped(None, libc::MAP_ANONYMOUS | libc::MAP_SHARED, 100);

    assert_eq!(existing(anonymous(), Mapping::of), 1);
    // The last page of a shared mapping always counts.
    assert_eq!(existing(shared(), Mapping::of), 2);
    assert_eq!(existing(private_file(), Mapping::of), 100, "the file knows nothing of private pages");
    assert_eq!(existing(shared_anonymous(), Mapping::of), 100);
    // Nothing is claimed unless the VMM does, and a claim that the region contradicts is not believed.
    assert_eq!(existing(anonymous(), |_| Mapping::Unknown), 100);
    assert_eq!(existing(private_file(), |_| Mapping::PrivateAnonymous), 100);
    assert_eq!(existing(anonymous(), |_| Mapping::SharedFile), 100);
}

#[test]
fn a_shared_file_is_asked_from_where_the_region_begins() {
    let file = FileOffset::new(scratch_file(200 * PAGE), 64 * PAGE);
    let ranges = [(GuestAddress(0), 100 * PAGE as usize, Some(file))];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap());
    memory.write_obj(1u8, GuestAddress(70 * PAGE)).unwrap();
    let ram = GuestRam::new(memory).mapped_as(Mapping::of).ram().unwrap();
    assert!(matches!(ram.blocks()[0].presence(), Presence::Shared { offset, .. } if *offset == 64 * PAGE));
    let mut words = [u64::MAX; 2];
    PresenceMap::new(&ram).keep_present(BlockId(0), 0, &mut words).unwrap();
    assert_eq!(bits(&words, 0), set([70, 99]));
}

#[test]
fn a_region_that_is_no_whole_number_of_pages_is_refused() {
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 3 * 4096 + 512)]).unwrap());
    let refused = GuestRam::new(memory.clone()).ram();
    assert!(matches!(refused, Err(MemoryError::BadLength { bytes: 12800, page_bytes: 4096, .. })), "{refused:?}");
    let twice = GuestRam::new(self::memory(&[1, 1])).named(|_, _| "ram".to_owned()).ram();
    assert!(matches!(twice, Err(MemoryError::SameName { .. })), "{twice:?}");
}

#[test]
fn a_bitmap_that_does_not_fit_cannot_be_armed() {
    let bitmap = |bytes: u64, page: usize| AtomicBitmap::new(bytes as usize, NonZeroUsize::new(page).unwrap());
    let with = |bitmap: Option<AtomicBitmap>, start: u64| {
        let mapping = MmapRegionBuilder::new_with_bitmap(64 << 12, bitmap).with_mmap_prot(READ_WRITE).build().unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap();
        Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap())
    };
    let ram =
        |page_size| Ram::new([RamBlock::anonymous("ram", 0, 64 << 12, page_size, Backing::Base).unwrap()]).unwrap();
    let arm = |memory: Arc<GuestMemoryMmap<Option<AtomicBitmap>>>, ram: &Ram| RegionBitmaps::new(memory).arm(ram);
    let small = ram(PageSize::SIZE_4K);
    let good = |at| with(Some(bitmap(64 << 12, 4096)), at);
    assert!(arm(good(0), &small).is_ok());
    assert!(matches!(arm(with(None, 0), &small), Err(DirtyError::NoBitmap { block: BlockId(0) })));
    let other_shape = |done| matches!(done, Err(DirtyError::OtherShape { block: BlockId(0) }));
    assert!(other_shape(arm(good(0), &ram(PageSize::SIZE_16K))), "tracked by larger pages");
    assert!(other_shape(arm(with(Some(bitmap(64 << 12, 8192)), 0), &small)), "marked by larger pages");
    assert!(other_shape(arm(with(Some(bitmap(64 << 12, 1024)), 0), &small)), "marked by smaller pages");
    assert!(other_shape(arm(with(Some(bitmap(63 << 12, 4096)), 0), &small)), "a page without a bit");
    assert!(matches!(arm(with(Some(bitmap(0, 4096)), 0), &small), Err(DirtyError::NoBitmap { .. })), "no bit at all");
    assert!(other_shape(arm(good(1 << 30), &small)), "elsewhere in the guest");
    let (one, two) = (memory(&[3]), memory(&[3, 4]));
    assert!(matches!(
        RegionBitmaps::new(one.clone()).arm(&ram_of(&two)),
        Err(DirtyError::OtherShape { block: BlockId(1) })
    ));
    assert!(matches!(RegionBitmaps::new(two).arm(&ram_of(&one)), Err(DirtyError::OtherShape { block: BlockId(1) })));
}

#[test]
fn a_range_that_is_not_there_or_not_armed_is_refused() {
    let memory = memory(&[130]);
    let mut dirty = RegionBitmaps::new(memory.clone());
    assert!(matches!(dirty.begin_round(), Err(DirtyError::NotArmed)));
    assert!(matches!(dirty.harvest(BlockId(0), 0, &mut [0]), Err(DirtyError::NotArmed)));
    assert!(matches!(dirty.give_back(BlockId(0), 0, &[1]), Err(DirtyError::NotArmed)));
    assert_eq!(marked(&memory), [set([])]);
    dirty.arm(&ram_of(&memory)).unwrap();
    for (block, first, words) in [(1, 0, 1), (0, 1, 1), (0, 64, 3), (0, 192, 1), (0, u64::MAX - 63, 1)] {
        let mut room = vec![0; words];
        assert!(matches!(dirty.harvest(BlockId(block), first, &mut room), Err(DirtyError::OutOfRange { .. })));
        assert!(matches!(dirty.give_back(BlockId(block), first, &room), Err(DirtyError::OutOfRange { .. })));
    }
    dirty.disarm();
    dirty.disarm();
    assert!(matches!(dirty.begin_round(), Err(DirtyError::NotArmed)));
}

#[test]
fn a_write_is_found_once_and_again_when_it_is_written_again() {
    // Lengths around a word of the bitmap, and writes at both ends of each.
    for pages in [1, 2, 63, 64, 65, 127, 128, 130] {
        let memory = memory(&[7, pages]);
        let (ram, mut dirty) = armed(&memory);
        for page in [0, pages / 2, pages - 1] {
            for _ in 0..2 {
                memory.write_obj(0x55u8, GuestAddress(start_of(1) + page * PAGE + 77)).unwrap();
                assert_eq!(dirty.begin_round().unwrap(), 1);
                assert_eq!(harvest(&mut dirty, &ram, 1), set([page]));
                assert_eq!(marked(&memory), [set([]), set([])], "cleared when the harvest returns");
                assert_eq!(harvest(&mut dirty, &ram, 1), set([]), "in the same round");
                assert_eq!((dirty.begin_round().unwrap(), harvest(&mut dirty, &ram, 1)), (0, set([])), "in the next");
            }
        }
        let all = vec![9u8; (pages * PAGE) as usize];
        memory.write_slice(&all, GuestAddress(start_of(1))).unwrap();
        assert_eq!(dirty.begin_round().unwrap(), pages);
        assert_eq!(harvest(&mut dirty, &ram, 1), set(0..pages));
    }
}

#[test]
fn a_write_over_the_end_of_a_page_is_found_in_both() {
    let memory = memory(&[200]);
    let (ram, mut dirty) = armed(&memory);
    memory.write_slice(&[1; 2], GuestAddress(start_of(0) + 64 * PAGE - 1)).unwrap();
    dirty.begin_round().unwrap();
    assert_eq!(harvest(&mut dirty, &ram, 0), set([63, 64]));
}

#[test]
fn what_was_written_before_arming_goes_with_round_0() {
    let memory = memory(&[100]);
    write_page(&memory, 0, 42, 1);
    let (ram, mut dirty) = armed(&memory);
    assert_eq!(marked(&memory), [set([42])], "arming clears nothing: it may fail yet");
    assert_eq!(harvest(&mut dirty, &ram, 0), set([42]));
    assert_eq!(dirty.begin_round().unwrap(), 0);
}

#[test]
fn a_write_between_a_rounds_begin_and_its_harvest_is_not_lost() {
    let memory = memory(&[100]);
    let (ram, mut dirty) = armed(&memory);
    write_page(&memory, 0, 1, 1);
    dirty.begin_round().unwrap();
    // Page 1 is seen already, and travels as it is now. Page 2 waits.
    write_page(&memory, 0, 1, 2);
    write_page(&memory, 0, 2, 2);
    assert_eq!(harvest(&mut dirty, &ram, 0), set([1]));
    assert_eq!(marked(&memory), [set([2])]);
    dirty.begin_round().unwrap();
    assert_eq!(harvest(&mut dirty, &ram, 0), set([2]));
}

#[test]
fn the_shape_of_a_bitmap_follows_from_its_lengths() {
    for page_shift in [9, 12, 14, 16, 21] {
        for bytes in [1, 4095, 4096, 4097, 3 << 12, 65 << 12, 1000 << 16, (5 << 21) + 1] {
            let page = 1u64 << page_shift;
            let pages = u64::div_ceil(bytes, page);
            let bitmap = AtomicBitmap::new(bytes as usize, NonZeroUsize::new(page as usize).unwrap());
            let (found, found_bytes) = bitmap.shape().unwrap();
            assert_eq!(found, pages);
            // One page of any size covers everything.
            assert!(found_bytes == page || pages == 1 && found_bytes >= bytes, "{bytes} in pages of {page}");
        }
    }
}

/// The VMM at the target: its memory is `vm-memory`'s as well, and new.
#[derive(Default)]
struct Arriving {
    memory: Option<Arc<Tracked>>,
    state: Vec<u8>,
}

impl Incoming for Arriving {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        let ranges: Vec<_> = setup.blocks.iter().map(|b| (GuestAddress(b.guest_address), b.bytes as usize)).collect();
        let names: Vec<_> = setup.blocks.iter().map(|b| b.name.clone()).collect();
        let memory = self.memory.insert(Arc::new(Tracked::from_ranges(&ranges)?));
        let ram = GuestRam::new(memory.clone()).named(move |index, _| names[index].clone()).mapped_as(Mapping::of);
        Ok(ram.initial(Initial::Zeroed).ram()?)
    }
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        state.read_to_end(&mut self.state)?;
        Ok(())
    }
    fn run(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

#[test]
fn the_ram_alone_keeps_the_memory_mapped() {
    let memory = memory(&[30, 65]);
    (0..65).for_each(|page| write_page(&memory, 1, page, 3));
    let (ram, weak) = (ram_of(&memory), Arc::downgrade(&memory));
    drop(memory);
    assert!(weak.upgrade().is_some());

    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let mut dirty = guest.dirty.clone();
    let source = Source::builder(ram).verify(Verify::Full);
    let (source, target) = Transport::Tcp4.connect(source, Target::builder(), 2);
    let receiving = std::thread::spawn(move || {
        let mut arriving = Arriving::default();
        (target.receive(&mut arriving), arriving)
    });
    let sent = source.migrate(&mut dirty, &mut guest);
    let (received, arriving) = receiving.join().unwrap();
    assert_eq!((&sent.outcome, &received.outcome), (&Outcome::Completed, &Outcome::Completed));
    assert_eq!((sent.payload_bytes, sent.untouched_bytes), (65 * PAGE, 30 * PAGE));
    let there = arriving.memory.unwrap();
    assert_eq!(vmm::first_difference(&guest.ram, &ram_of(&there)), None);
    assert_eq!(arriving.state, guest.state);
    assert_eq!(marked(&there), [set([]), set([])], "what arrives is written behind the bitmap's back");

    drop(guest);
    assert!(weak.upgrade().is_none(), "the last handle lets it go");
}

/// A guest of this memory whose devices write through `Bytes`, over and over, until it is paused.
fn busy_guest(memory: &Arc<Tracked>, ram: &Ram) -> TestGuest {
    let stop = Arc::new(AtomicBool::new(false));
    let device = std::thread::spawn({
        let (memory, stop) = (memory.clone(), stop.clone());
        move || {
            for version in (1u64..).take_while(|_| !stop.load(Relaxed)) {
                let (page, offset) = (vmm::mix(version) % 150, vmm::mix(!version) % 5000);
                let length = 1 + vmm::mix(version << 1) % 3000;
                let bytes = vec![version as u8; length as usize];
                memory.write_slice(&bytes, GuestAddress(start_of(1) + page * PAGE + offset)).unwrap();
                memory.write_obj(version, GuestAddress(start_of(0) + version % 64 * PAGE)).unwrap();
            }
        }
    });
    let mut guest = TestGuest::new(ram, &DirtyBitmap::for_ram(ram));
    let mut device = Some(device);
    guest.on_pause = Some(Box::new(move || {
        stop.store(true, Relaxed);
        device.take().unwrap().join().unwrap();
    }));
    guest
}

#[test]
fn a_guest_whose_devices_never_stop_writing_arrives() {
    for channels in [1, 3] {
        let memory = memory(&[64, 700]);
        (0..500).for_each(|page| write_page(&memory, 1, page, 9));
        let ram = ram_of(&memory);
        let mut guest = busy_guest(&memory, &ram);
        // While state is saved a device completes what it had begun.
        let late = memory.clone();
        guest.on_save = Some(Box::new(move |_, _| write_page(&late, 1, 699, 11)));
        let mut dirty = RegionBitmaps::new(memory.clone());
        let source = Source::builder(ram).verify(Verify::Full);
        let (source, target) = Transport::Tcp4.connect(source, Target::builder(), channels);
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_arrived(&guest, &trip);
        assert_eq!(marked(&memory), [set([]), set([])], "everything was harvested");
    }
}

/// Marks nothing itself; does something when it is asked how much is dirty: between two rounds, that is.
struct Between<F>(u64, F);

impl<F: FnMut(u64) + Send> DirtySource for Between<F> {
    fn arm(&mut self, _: &Ram) -> Result<(), DirtyError> {
        Ok(())
    }
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        (self.1)(self.0);
        self.0 += 1;
        Ok(0)
    }
    fn harvest(&mut self, _: BlockId, _: u64, _: &mut [u64]) -> Result<(), DirtyError> {
        Ok(())
    }
    fn give_back(&mut self, _: BlockId, _: u64, _: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }
    fn disarm(&mut self) {}
}

#[test]
fn a_page_that_a_device_and_a_vcpu_marked_travels_once() {
    let memory = memory(&[300]);
    (0..300).for_each(|page| write_page(&memory, 0, page, 1));
    let ram = ram_of(&memory);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let vcpus = guest.dirty.clone();
    let device = memory.clone();
    // After round 0: pages 10 to 29 by the device, 20 to 39 by the vCPU, which are 30.
    let between = Between(0, move |round| {
        if round == 0 {
            (10..30).for_each(|page| write_page(&device, 0, page, 2));
            vcpus.mark_range(BlockId(0), 20, 20);
        }
    });
    let mut dirty =
        Combined::new(vec![Box::new(between), Box::new(RegionBitmaps::new(memory)), Box::new(guest.dirty.clone())]);
    let source = Source::builder(ram).verify(Verify::Full);
    let (source, target) = Transport::Fds.connect(source, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    assert_eq!(trip.sent.payload_bytes, (300 + 30) * PAGE);
}

#[test]
fn after_a_failed_migration_the_bitmaps_have_back_what_was_harvested() {
    let memory = memory(&[200, 65]);
    write_page(&memory, 0, 150, 1);
    write_page(&memory, 1, 64, 1);
    let before = [set([150]), set([64])];
    assert_eq!(marked(&memory), before);

    // Nobody is there: it was never armed.
    let ram = ram_of(&memory);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let nowhere = Source::builder(ram.clone()).connect(&vmm::unix_address()).unwrap();
    let sent = nowhere.migrate(&mut RegionBitmaps::new(memory.clone()), &mut guest);
    assert!(matches!(sent.outcome, Outcome::Failed(Failure::Connect { .. })), "{}", sent.outcome);
    assert_eq!(marked(&memory), before);

    // The target refuses the machine.
    let refusing = TestIncoming { refuse: Some("not here".to_owned()), ..TestIncoming::new() };
    let (source, target) = Transport::Fds.connect(Source::builder(ram.clone()), Target::builder(), 2);
    let trip = vmm::travel(source, &mut RegionBitmaps::new(memory.clone()), &mut guest, target, refusing);
    assert_stayed(&guest, &trip);
    assert_eq!(marked(&memory), before);

    // The target gives up at the very end, when all has travelled. Page 10 r is written before round r.
    let rounds = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let device = memory.clone();
    let between = Between(0, {
        let rounds = rounds.clone();
        move |round| {
            write_page(&device, 0, 10 * round, 1);
            rounds.store(round + 1, Relaxed);
        }
    });
    let mut dirty = Combined::new(vec![Box::new(between), Box::new(RegionBitmaps::new(memory.clone()))]);
    let failing = TestIncoming { fail_load: Some("no such device".to_owned()), ..TestIncoming::new() };
    let (source, target) = Transport::Fds.connect(Source::builder(ram.clone()), Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, failing);
    assert_stayed(&guest, &trip);
    assert!(trip.sent.outcome.to_string().contains("no such device"), "{}", trip.sent.outcome);
    let mut after = before;
    after[0].extend((0..rounds.load(Relaxed)).map(|round| 10 * round));
    assert!(after[0].len() >= 4, "three rounds at least");
    assert_eq!(marked(&memory), after);

    // And the second attempt has all it needs.
    (guest.paused, guest.resumed) = (0, 0);
    let source = Source::builder(ram).verify(Verify::Full).downtime_limit(Duration::from_secs(1));
    let (source, target) = Transport::Fds.connect(source, Target::builder(), 2);
    let trip = vmm::travel(source, &mut RegionBitmaps::new(memory.clone()), &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    assert_eq!(marked(&memory), [set([]), set([])]);
}

#[derive(Clone, Debug)]
enum Operation {
    Write {
        region: usize,
        offset: u64,
        bytes: u64,
    },
    BeginRound,
    Harvest {
        region: usize,
        word: u64,
        words: usize,
    },
    HarvestAndGiveBack {
        region: usize,
        word: u64,
        words: usize,
    },
    /// Bits that were never harvested: of pages past the end, too.
    GiveBack {
        region: usize,
        word: u64,
        bits: u64,
    },
    ArmAnew,
}

const SHAPE: [u64; 3] = [1, 64, 333];

fn operation() -> impl Strategy<Value = Operation> {
    let region = || 0..3usize;
    let range = || (region(), 0..8u64, 0..8usize);
    prop_oneof![
        4 => (region(), 0..400 * PAGE, 0..5 * PAGE).prop_map(|(region, offset, bytes)| Operation::Write { region, offset, bytes }),
        2 => Just(Operation::BeginRound),
        3 => range().prop_map(|(region, word, words)| Operation::Harvest { region, word, words }),
        2 => range().prop_map(|(region, word, words)| Operation::HarvestAndGiveBack { region, word, words }),
        1 => (region(), 0..8u64, any::<u64>()).prop_map(|(region, word, bits)| Operation::GiveBack { region, word, bits }),
        1 => Just(Operation::ArmAnew),
    ]
}

proptest! {
    /// Against two sets of pages a region: those that are dirty, and those of them that were so as the round began.
    #[test]
    fn a_harvest_finds_what_was_dirty_as_the_round_began(operations in prop::collection::vec(operation(), 0..60)) {
        let memory = memory(&SHAPE);
        let (ram, mut source) = armed(&memory);
        let mut dirty: Vec<BTreeSet<u64>> = vec![BTreeSet::new(); 3];
        let mut seen = dirty.clone();
        for operation in operations {
            match operation {
                Operation::Write { region, offset, bytes } => {
                    let end = (offset + bytes).min(SHAPE[region] * PAGE);
                    if offset < end {
                        let data = vec![1; (end - offset) as usize];
                        memory.write_slice(&data, GuestAddress(start_of(region) + offset)).unwrap();
                        dirty[region].extend(offset / PAGE..end.div_ceil(PAGE));
                    }
                }
                Operation::BeginRound => {
                    seen.clone_from(&dirty);
                    let pages = dirty.iter().map(|pages| pages.len() as u64).sum::<u64>();
                    prop_assert_eq!(source.begin_round().unwrap(), pages);
                }
                Operation::Harvest { region, word, words } | Operation::HarvestAndGiveBack { region, word, words } => {
                    let (block, first) = (BlockId(region as u16), word * 64);
                    let mut found = vec![0; words];
                    let inside = word + words as u64 <= SHAPE[region].div_ceil(64);
                    prop_assert_eq!(source.harvest(block, first, &mut found).is_ok(), inside);
                    let expected: BTreeSet<u64> = if inside {
                        seen[region].range(first..first + 64 * words as u64).copied().collect()
                    } else {
                        BTreeSet::new()
                    };
                    prop_assert_eq!(bits(&found, first), expected.clone());
                    if inside && matches!(operation, Operation::HarvestAndGiveBack { .. }) {
                        source.give_back(block, first, &found).unwrap();
                    } else {
                        seen[region].retain(|page| !expected.contains(page));
                        dirty[region].retain(|page| !expected.contains(page));
                    }
                }
                Operation::GiveBack { region, word, bits: given } => {
                    let inside = word < SHAPE[region].div_ceil(64);
                    prop_assert_eq!(source.give_back(BlockId(region as u16), word * 64, &[given]).is_ok(), inside);
                    if inside {
                        let pages: Vec<_> = bits(&[given], word * 64).into_iter().filter(|p| *p < SHAPE[region]).collect();
                        seen[region].extend(&pages);
                        dirty[region].extend(&pages);
                    }
                }
                Operation::ArmAnew => {
                    source.arm(&ram).unwrap();
                    seen.clone_from(&dirty);
                }
            }
            prop_assert_eq!(marked(&memory), dirty.clone());
        }
    }
}
