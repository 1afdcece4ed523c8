//! Write protection against the real kernel: what it reports, compared with what was written, page by page.

// UNSAFETY: plays the guest: writes to RAM through raw pointers.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(not(loom))]

#[path = "support/mod.rs"]
mod support;

use pageferry::dirty::runs::count;
use pageferry::dirty::write_protect::WriteProtect;
use pageferry::dirty::{DirtyError, DirtySource};
use pageferry::memory::{Backing, PresenceMap, Ram, RamBlock};
use pageferry::units::{BlockId, PageSize};
use std::collections::BTreeSet;

const BLOCK: BlockId = BlockId(0);
const MIB: u64 = 1 << 20;

/// Tracking, or `None` and a line on stderr where this system has none.
fn tracking(test: &str) -> Option<WriteProtect> {
    match WriteProtect::new() {
        Ok(tracking) => Some(tracking),
        Err(e @ DirtyError::Unsupported { .. }) => {
            support::skip(test, &format!("{e}"));
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn anonymous(bytes: u64) -> Ram {
    Ram::new([RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap()]).unwrap()
}

fn memfd(bytes: u64) -> Ram {
    Ram::new([RamBlock::memfd("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap()]).unwrap()
}

fn write(ram: &Ram, page: u64, value: u8) {
    let range = ram.block(BLOCK).unwrap().range(page, 1).unwrap();
    // SAFETY: the page is in the block (`range`), which is mapped writable.
    unsafe { range.ptr.add(100).write_volatile(value) };
}

fn read(ram: &Ram, page: u64) -> u8 {
    let range = ram.block(BLOCK).unwrap().range(page, 1).unwrap();
    // SAFETY: the page is in the block (`range`), which is mapped.
    unsafe { range.ptr.add(100).read_volatile() }
}

fn advise(ram: &Ram, first: u64, pages: u64, advice: i32) -> std::io::Result<()> {
    let range = ram.block(BLOCK).unwrap().range(first, pages).unwrap();
    // SAFETY: the range is in the block (`range`); tests know what the advice does to its content.
    let ret = unsafe { libc::madvise(range.ptr.cast(), range.len, advice) };
    if ret == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Harvests all of block 0 in chunks of `chunk_words` words.
fn harvest_by(source: &mut dyn DirtySource, ram: &Ram, chunk_words: usize) -> BTreeSet<u64> {
    let pages = ram.block(BLOCK).unwrap().pages();
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

fn harvest(source: &mut dyn DirtySource, ram: &Ram) -> BTreeSet<u64> {
    harvest_by(source, ram, 64)
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

fn existing(ram: &Ram) -> u64 {
    let mut words = vec![u64::MAX; ram.pages().div_ceil(64) as usize];
    PresenceMap::new(ram).keep_present(BLOCK, 0, &mut words).unwrap();
    count(&words)
}

/// Numbers that look random and are the same in every run.
fn scattered(pages: u64, below: u64) -> BTreeSet<u64> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..pages)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        })
        .collect()
}

#[test]
fn every_write_is_reported_exactly_once() {
    let Some(mut tracking) = tracking("every_write_is_reported_exactly_once") else { return };
    for ram in [anonymous(16 * MIB), memfd(16 * MIB)] {
        (0..ram.pages() / 2).for_each(|page| write(&ram, page, 1));
        tracking.arm(&ram).unwrap();
        assert_eq!(harvest(&mut tracking, &ram), set([]), "what was written before arming");
        let written = scattered(700, ram.pages());
        written.iter().for_each(|&page| write(&ram, page, 2));
        assert_eq!(tracking.begin_round().unwrap(), written.len() as u64);
        assert_eq!(tracking.begin_round().unwrap(), written.len() as u64, "counting clears nothing");
        assert_eq!(harvest(&mut tracking, &ram), written);
        assert_eq!(harvest(&mut tracking, &ram), set([]));
        let again: BTreeSet<u64> = written.iter().copied().filter(|page| page % 3 == 0).collect();
        again.iter().for_each(|&page| write(&ram, page, 3));
        assert_eq!(harvest_by(&mut tracking, &ram, 1), again);
        assert_eq!(tracking.begin_round().unwrap(), 0);
    }
}

#[test]
fn holes_of_anonymous_memory_stay_holes() {
    let Some(mut tracking) = tracking("holes_of_anonymous_memory_stay_holes") else { return };
    let ram = anonymous(64 * MIB);
    [3, 511, 512, 9000].iter().for_each(|&page| write(&ram, page, 1));
    tracking.arm(&ram).unwrap();
    assert_eq!(tracking.begin_round().unwrap(), 0);
    assert_eq!(harvest(&mut tracking, &ram), set([]));
    // A marker would count as swapped, and so as existing.
    assert_eq!(existing(&ram), 4);
    write(&ram, 4, 1);
    write(&ram, 16000, 1);
    assert_eq!(harvest(&mut tracking, &ram), set([4, 16000]));
    assert_eq!(existing(&ram), 6);
}

#[test]
fn a_read_reports_a_page_once_at_most_and_never_hides_a_write() {
    let Some(mut tracking) = tracking("a_read_reports_a_page_once_at_most_and_never_hides_a_write") else { return };
    for (ram, populated) in [(anonymous(4 * MIB), false), (memfd(4 * MIB), false), (anonymous(4 * MIB), true)] {
        if populated {
            (0..ram.pages()).for_each(|page| write(&ram, page, 1));
        }
        tracking.arm(&ram).unwrap();
        assert_eq!(harvest(&mut tracking, &ram), set([]));
        (10..20).for_each(|page| assert!(read(&ram, page) < 2));
        let reported = harvest(&mut tracking, &ram);
        assert!(reported.is_subset(&set(10..20)), "{reported:?}");
        assert!(!populated || reported.is_empty(), "{reported:?}");
        (10..20).for_each(|page| assert!(read(&ram, page) < 2));
        assert_eq!(harvest(&mut tracking, &ram), set([]));
        (15..25).for_each(|page| write(&ram, page, 2));
        assert_eq!(harvest(&mut tracking, &ram), set(15..25));
    }
}

#[test]
fn discarded_pages_are_reported_when_written_again() {
    let Some(mut tracking) = tracking("discarded_pages_are_reported_when_written_again") else { return };
    let ram = anonymous(4 * MIB);
    (0..100).for_each(|page| write(&ram, page, 1));
    tracking.arm(&ram).unwrap();
    advise(&ram, 10, 20, libc::MADV_DONTNEED).unwrap();
    assert_eq!(harvest(&mut tracking, &ram), set([]), "a discard is no write");
    assert_eq!(existing(&ram), 80);
    (15..40).for_each(|page| write(&ram, page, 2));
    assert_eq!(harvest(&mut tracking, &ram), set(15..40));
}

#[test]
fn entries_of_shared_memory_that_vanish_count_as_written() {
    let Some(mut tracking) = tracking("entries_of_shared_memory_that_vanish_count_as_written") else { return };
    let ram = memfd(8 * MIB);
    (0..2048).for_each(|page| write(&ram, page, 1));
    tracking.arm(&ram).unwrap();
    // Written, then dropped from the page table while the bytes stay in the memfd: as reclaim does. Single entries and
    // whole page tables.
    let gone: Vec<u64> = (7..9).chain(512..1536).collect();
    gone.iter().for_each(|&page| write(&ram, page, 2));
    advise(&ram, 7, 2, libc::MADV_DONTNEED).unwrap();
    advise(&ram, 512, 1024, libc::MADV_DONTNEED).unwrap();
    // Not written, and dropped: the marker stays, and says so.
    advise(&ram, 100, 10, libc::MADV_DONTNEED).unwrap();
    assert_eq!(tracking.begin_round().unwrap(), gone.len() as u64);
    assert_eq!(harvest(&mut tracking, &ram), set(gone.iter().copied()));
    assert_eq!(harvest(&mut tracking, &ram), set([]), "the harvest has left markers");
    assert!(gone.iter().all(|&page| read(&ram, page) == 2));
    assert_eq!(harvest(&mut tracking, &ram), set([]), "reading what has a marker is no write");
    [8, 105, 600].iter().for_each(|&page| write(&ram, page, 3));
    assert_eq!(harvest(&mut tracking, &ram), set([8, 105, 600]));
}

#[test]
fn a_file_on_disk_that_is_paged_out_keeps_its_dirty_pages() {
    let test = "a_file_on_disk_that_is_paged_out_keeps_its_dirty_pages";
    let Some(mut tracking) = tracking(test) else { return };
    let directory = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let path = directory.join(format!("{test}-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(2 * MIB).unwrap();
    let block = RamBlock::file("ram", 0, &file, 2 * MIB, PageSize::SIZE_4K, true).unwrap();
    let ram = Ram::new([block]).unwrap();
    (0..512).for_each(|page| write(&ram, page, 1));
    tracking.arm(&ram).unwrap();
    (20..30).for_each(|page| write(&ram, page, 2));
    file.sync_all().unwrap();
    // Clean now, so the kernel may drop both the entries and the pages.
    if let Err(e) = advise(&ram, 0, 512, libc::MADV_PAGEOUT) {
        support::skip(test, &format!("paging out: {e}"));
        return;
    }
    let dirty = harvest(&mut tracking, &ram);
    assert_eq!(dirty, set(20..30));
    assert!((20..30).all(|page| read(&ram, page) == 2));
    write(&ram, 300, 3);
    assert!(harvest(&mut tracking, &ram).contains(&300));
}

#[test]
fn swapped_pages_keep_their_state() {
    let test = "swapped_pages_keep_their_state";
    let Some(mut tracking) = tracking(test) else { return };
    if std::fs::read_to_string("/proc/swaps").unwrap_or_default().lines().count() < 2 {
        support::skip(test, "no swap");
        return;
    }
    let ram = anonymous(4 * MIB);
    (0..1024).for_each(|page| write(&ram, page, page as u8));
    tracking.arm(&ram).unwrap();
    (100..200).for_each(|page| write(&ram, page, 7));
    advise(&ram, 0, 1024, libc::MADV_PAGEOUT).unwrap();
    assert_eq!(existing(&ram), 1024);
    assert_eq!(harvest(&mut tracking, &ram), set(100..200));
    assert_eq!(harvest(&mut tracking, &ram), set([]));
    assert!((100..200).all(|page| read(&ram, page) == 7));
    assert_eq!(harvest(&mut tracking, &ram), set([]), "swapping in is no write");
    (150..160).for_each(|page| write(&ram, page, 8));
    assert_eq!(harvest(&mut tracking, &ram), set(150..160));
}

#[test]
fn transparent_huge_pages_are_tracked_by_small_pages() {
    let Some(mut tracking) = tracking("transparent_huge_pages_are_tracked_by_small_pages") else { return };
    let block = RamBlock::anonymous("ram", 0, 32 * MIB, PageSize::SIZE_4K, Backing::TransparentHuge).unwrap();
    let ram = Ram::new([block]).unwrap();
    (0..ram.pages() / 2).step_by(512).for_each(|page| write(&ram, page, 1));
    if existing(&ram) != ram.pages() / 2 {
        support::skip("transparent_huge_pages_are_tracked_by_small_pages", "the kernel gave no huge pages");
        return;
    }
    tracking.arm(&ram).unwrap();
    assert_eq!(harvest(&mut tracking, &ram), set([]));
    [5, 513, 514, 1500].iter().for_each(|&page| write(&ram, page, 2));
    // By chunks smaller than a huge page, so that a scan covers a part of one.
    assert_eq!(harvest_by(&mut tracking, &ram, 2), set([5, 513, 514, 1500]));
    // A huge page that comes into being is written as a whole, as far as anybody can tell.
    write(&ram, 6000, 1);
    let huge = 6000 / 512 * 512;
    let fresh = harvest_by(&mut tracking, &ram, 2);
    assert!(fresh.contains(&6000) && fresh.is_subset(&set(huge..huge + 512)), "{fresh:?}");
    assert_eq!(harvest(&mut tracking, &ram), set([]));
}

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Sets the number of 2 MiB huge pages where we may, and puts it back.
struct HugePages {
    before: String,
}

impl HugePages {
    fn more(pages: u64) -> Result<Self, String> {
        let before = std::fs::read_to_string(NR_HUGEPAGES).map_err(|e| e.to_string())?;
        let have: u64 = before.trim().parse().map_err(|_| before.clone())?;
        let guard = HugePages { before };
        std::fs::write(NR_HUGEPAGES, (have + pages).to_string()).map_err(|e| e.to_string())?;
        Ok(guard)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_HUGEPAGES, &self.before);
    }
}

#[test]
fn hugetlb_pages_are_tracked_whole_whatever_the_chunk() {
    let test = "hugetlb_pages_are_tracked_whole_whatever_the_chunk";
    let Some(mut tracking) = tracking(test) else { return };
    let _guard = match HugePages::more(16) {
        Ok(guard) => guard,
        Err(e) => return support::skip(test, &format!("cannot reserve huge pages: {e}")),
    };
    for make in [RamBlock::anonymous, RamBlock::memfd] {
        let block = match make("ram", 0, 16 * MIB, PageSize::SIZE_4K, Backing::HugeTlb(2 * MIB)) {
            // A wrong claim on purpose: what the kernel does must not depend on it.
            Ok(block) => block.with_backing_page_bytes(4096),
            Err(e) => return support::skip(test, &format!("{e}")),
        };
        let ram = Ram::new([block]).unwrap();
        (0..5 * 512).step_by(512).for_each(|page| write(&ram, page, 1));
        tracking.arm(&ram).unwrap();
        assert_eq!(harvest_by(&mut tracking, &ram, 1), set([]));
        for chunk_words in [1, 3, 8, 64] {
            write(&ram, 700, 2);
            write(&ram, 2047, 2);
            assert_eq!(tracking.begin_round().unwrap(), 1024);
            assert_eq!(harvest_by(&mut tracking, &ram, chunk_words), set((512..1024).chain(1536..2048)));
            assert_eq!(harvest_by(&mut tracking, &ram, chunk_words), set([]));
        }
        write(&ram, 3600, 1);
        assert_eq!(harvest_by(&mut tracking, &ram, 1), set(3584..4096));
        // Written, then dropped from the page table: the kernel reports this entry as nothing at all.
        let is_shared = ram.block(BLOCK).unwrap().fd().is_some();
        write(&ram, 512, 3);
        advise(&ram, 512, 512, libc::MADV_DONTNEED).unwrap();
        let dropped = if is_shared { set(512..1024) } else { set([]) };
        assert_eq!(tracking.begin_round().unwrap(), dropped.len() as u64);
        assert_eq!(harvest_by(&mut tracking, &ram, 1), dropped);
        assert_eq!(harvest_by(&mut tracking, &ram, 1), set([]), "the harvest has left a marker");
        assert_eq!(read(&ram, 512), if is_shared { 3 } else { 0 });
    }
}

#[test]
fn a_large_tracking_page_is_dirty_if_any_of_its_host_pages_is() {
    let Some(mut tracking) = tracking("a_large_tracking_page_is_dirty_if_any_of_its_host_pages_is") else { return };
    for make in [RamBlock::anonymous, RamBlock::memfd] {
        let ram = Ram::new([make("ram", 0, 8 * MIB, PageSize::SIZE_64K, Backing::Base).unwrap()]).unwrap();
        let write_at = |byte: u64| {
            let range = ram.block(BLOCK).unwrap().range(byte >> 16, 1).unwrap();
            // SAFETY: the byte is in the page that `range` proved to be in the block.
            unsafe { range.ptr.add((byte & 0xFFFF) as usize).write_volatile(9) };
        };
        tracking.arm(&ram).unwrap();
        [0x0_0000, 0x1_F000, 0x4_8000, 0x4_A000].into_iter().for_each(write_at);
        assert_eq!(tracking.begin_round().unwrap(), 3, "two host pages of one tracking page count once");
        assert_eq!(harvest(&mut tracking, &ram), set([0, 1, 4]));
        assert_eq!(harvest(&mut tracking, &ram), set([]));
    }
}

#[test]
fn what_is_given_back_is_harvested_again_and_counted_once() {
    let Some(mut tracking) = tracking("what_is_given_back_is_harvested_again_and_counted_once") else { return };
    let ram = anonymous(4 * MIB);
    tracking.arm(&ram).unwrap();
    [70, 71].iter().for_each(|&page| write(&ram, page, 1));
    assert_eq!(harvest(&mut tracking, &ram), set([70, 71]));
    tracking.give_back(BLOCK, 64, &[1 << 6 | 1 << 7]).unwrap();
    [71, 72].iter().for_each(|&page| write(&ram, page, 2));
    assert_eq!(tracking.begin_round().unwrap(), 3);
    assert_eq!(harvest(&mut tracking, &ram), set([70, 71, 72]));
    assert_eq!(harvest(&mut tracking, &ram), set([]));
}

#[test]
fn writes_by_the_kernel_are_seen() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let Some(mut tracking) = tracking("writes_by_the_kernel_are_seen") else { return };
    let ram = anonymous(4 * MIB);
    (0..1024).for_each(|page| write(&ram, page, 1));
    tracking.arm(&ram).unwrap();
    let range = ram.block(BLOCK).unwrap().range(30, 3).unwrap();
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    theirs.write_all(&[5; 100]).unwrap();
    // SAFETY: 100 bytes at an address in the block; the kernel writes them.
    let got = unsafe { libc::read(ours.as_raw_fd(), range.ptr.add(4090).cast(), 100) };
    assert_eq!(got, 100);
    assert_eq!(harvest(&mut tracking, &ram), set([30, 31]));
}

#[test]
fn arming_works_again_after_disarming_and_twice_is_harmless() {
    let Some(mut tracking) = tracking("arming_works_again_after_disarming_and_twice_is_harmless") else { return };
    let ram = anonymous(4 * MIB);
    tracking.disarm();
    assert!(matches!(tracking.begin_round(), Err(DirtyError::NotArmed)));
    for _ in 0..3 {
        tracking.arm(&ram).unwrap();
        write(&ram, 1, 1);
        tracking.arm(&ram).unwrap();
        write(&ram, 2, 1);
        assert_eq!(harvest(&mut tracking, &ram), set([2]));
        tracking.disarm();
        tracking.disarm();
        assert!(matches!(tracking.harvest(BLOCK, 0, &mut [0]), Err(DirtyError::NotArmed)));
        assert!(matches!(tracking.give_back(BLOCK, 0, &[1]), Err(DirtyError::NotArmed)));
        write(&ram, 3, 1);
    }
    // Another userfaultfd can have the memory now: nothing was left registered.
    let mut other = WriteProtect::new().unwrap();
    other.arm(&ram).unwrap();
    let refused = tracking.arm(&ram);
    assert!(matches!(refused, Err(DirtyError::Arm { block: BLOCK, .. })), "{refused:?}");
    drop(other);
    tracking.arm(&ram).unwrap();
}

#[test]
fn memory_that_lost_its_registration_counts_as_dirty() {
    let Some(mut tracking) = tracking("memory_that_lost_its_registration_counts_as_dirty") else { return };
    let ram = anonymous(4 * MIB);
    (0..1024).for_each(|page| write(&ram, page, 1));
    tracking.arm(&ram).unwrap();
    let range = ram.block(BLOCK).unwrap().range(128, 8).unwrap();
    // SAFETY: replaces pages of the block by fresh ones, as a VMM might: they stay mapped.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        libc::mmap(range.ptr.cast(), range.len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_eq!(mapped, range.ptr.cast());
    write(&ram, 1000, 2);
    let mut words = [0u64; 16];
    assert!(matches!(tracking.harvest(BLOCK, 0, &mut words), Err(DirtyError::Scan { block: BLOCK, .. })));
    assert_eq!(words, [u64::MAX; 16]);
}

#[test]
fn a_range_outside_the_block_is_refused() {
    let Some(mut tracking) = tracking("a_range_outside_the_block_is_refused") else { return };
    let ram = anonymous(4096 * 100);
    tracking.arm(&ram).unwrap();
    for (block, first_page, words) in [(1, 0, 1), (0, 1, 1), (0, 128, 1), (0, 0, 3), (0, u64::MAX - 63, 1)] {
        let got = tracking.harvest(BlockId(block), first_page, &mut vec![0; words]);
        assert!(matches!(got, Err(DirtyError::OutOfRange { .. })), "{block} {first_page} {words}: {got:?}");
    }
    tracking.harvest(BLOCK, 64, &mut [0]).unwrap();
}

#[test]
fn a_concurrent_writer_loses_no_write() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    let Some(mut tracking) = tracking("a_concurrent_writer_loses_no_write") else { return };
    for ram in [anonymous(2 * MIB), memfd(2 * MIB)] {
        tracking.arm(&ram).unwrap();
        let stop = AtomicBool::new(false);
        // What a target would hold: each page as it was read after the harvest that reported it.
        let mut copy = vec![0u8; ram.pages() as usize];
        std::thread::scope(|scope| {
            let (guest, stop) = (ram.clone(), &stop);
            scope.spawn(move || {
                let mut value = 0u8;
                while !stop.load(Relaxed) {
                    value = value.wrapping_add(1);
                    scattered(200, guest.pages()).into_iter().for_each(|page| write(&guest, page, value));
                }
            });
            for _ in 0..200 {
                harvest(&mut tracking, &ram).into_iter().for_each(|page| copy[page as usize] = read(&ram, page));
            }
            stop.store(true, Relaxed);
        });
        harvest(&mut tracking, &ram).into_iter().for_each(|page| copy[page as usize] = read(&ram, page));
        assert!((0..ram.pages()).all(|page| copy[page as usize] == read(&ram, page)));
    }
}
