//! RAM blocks: bounds, geometry, and making memory read as zeros.

// UNSAFETY: maps and touches RAM through raw pointers, as a VMM does.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(not(loom))]

#[path = "support/mod.rs"]
mod support;

use pageferry::memory::{
    BLOCKS_MAX, Backing, Initial, MadeZero, MemoryError, Presence, PresenceMap, Ram, RamBlock, RawRange,
};
use pageferry::units::{BlockId, PageSize};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const MIB: u64 = 1 << 20;
const PAGE: PageSize = PageSize::SIZE_4K;

fn anonymous(name: &str, bytes: u64) -> RamBlock {
    RamBlock::anonymous(name, 0, bytes, PAGE, Backing::Base).unwrap()
}

fn fill(block: &RamBlock, page: u64, value: u8) {
    let RawRange { ptr, len } = block.range(page, 1).unwrap();
    // SAFETY: `range` proved that the page is in the block, which is writable.
    unsafe { ptr.write_bytes(value, len) };
}

/// The one byte that a page consists of.
fn filled_with(block: &RamBlock, page: u64) -> Option<u8> {
    let RawRange { ptr, len } = block.range(page, 1).unwrap();
    // SAFETY: `range` proved that the page is in the block.
    let byte = |at: usize| unsafe { ptr.add(at).read_volatile() };
    (1..len).all(|at| byte(at) == byte(0)).then(|| byte(0))
}

fn existing(ram: &Ram) -> u64 {
    let mut words = vec![u64::MAX; ram.pages().div_ceil(64) as usize];
    PresenceMap::new(ram).keep_present(BlockId(0), 0, &mut words).unwrap();
    pageferry::dirty::runs::count(&words)
}

fn temporary_file(test: &str, content: &[u8]) -> File {
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}", std::process::id()));
    std::fs::write(&path, content).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file
}

#[test]
fn a_range_is_in_the_block_or_is_none() {
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_64K] {
        let block = RamBlock::anonymous("ram", 0, 16 * page_size.bytes(), page_size, Backing::Base).unwrap();
        let base = block.host_address();
        for first in (0..20).chain([u64::MAX - 1, u64::MAX, 1 << 52, 1 << 63]) {
            for pages in (0..20).chain([u64::MAX - 1, u64::MAX, 1 << 52, 1 << 63]) {
                let inside = pages > 0 && first < 16 && pages <= 16 - first;
                let range = block.range(first, pages);
                assert_eq!(range.is_some(), inside, "{first} {pages}");
                if let Some(range) = range {
                    assert_eq!(range.ptr as u64, base + first * page_size.bytes());
                    assert_eq!(range.len as u64, pages * page_size.bytes());
                }
            }
        }
    }
}

#[test]
fn a_mapping_is_aligned_to_its_tracking_page_and_fits_to_the_last_byte() {
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_16K, PageSize::SIZE_64K] {
        for backing in [Backing::Base, Backing::TransparentHuge] {
            for make in [RamBlock::anonymous, RamBlock::memfd] {
                let block = make("ram", 0, 3 * page_size.bytes(), page_size, backing).unwrap();
                assert_eq!(block.host_address() % page_size.bytes(), 0);
                fill(&block, 0, 7);
                fill(&block, 2, 9);
                assert_eq!([0, 1, 2].map(|page| filled_with(&block, page)), [Some(7), Some(0), Some(9)]);
            }
        }
    }
}

#[test]
fn bad_geometry_is_refused() {
    let bytes = |bytes| RamBlock::anonymous("ram", 0, bytes, PAGE, Backing::Base);
    for bad in [0, 1, 4095, 4097, u64::MAX, u64::MAX - 4095, 1 << 63] {
        assert!(matches!(bytes(bad), Err(MemoryError::BadLength { .. })), "{bad}");
    }
    let named = |name: &str| RamBlock::anonymous(name, 0, MIB, PAGE, Backing::Base);
    assert!(matches!(named(""), Err(MemoryError::BadName { .. })));
    assert!(matches!(named(&"x".repeat(256)), Err(MemoryError::BadName { .. })));
    assert!(named(&"x".repeat(255)).is_ok());
    let past_the_guest = RamBlock::anonymous("ram", u64::MAX - 4096, MIB, PAGE, Backing::Base);
    assert!(matches!(past_the_guest, Err(MemoryError::BadLength { .. })));
    for huge in [0, 3, 4096, 3 << 20] {
        let got = RamBlock::anonymous("ram", 0, MIB, PageSize::SIZE_64K, Backing::HugeTlb(huge));
        assert!(matches!(got, Err(MemoryError::BadLength { .. })), "{huge}: {got:?}");
    }
    let owner = anonymous("owner", MIB);
    let at = |offset: u64, page_size| {
        let host = (owner.host_address() + offset) as *mut u8;
        // SAFETY: the range is in `owner`, which outlives the block that is made of it.
        unsafe { RamBlock::new("ram", 0, host, page_size, PageSize::new(page_size as u32).unwrap()) }
    };
    assert!(at(4096, 4096).is_ok());
    assert!(matches!(at(1, 4096), Err(MemoryError::BadPointer { .. })));
    let unaligned = if owner.host_address() % 65536 == 0 { 4096 } else { 0 };
    assert!(matches!(at(unaligned, 65536), Err(MemoryError::BadPointer { .. })));
    // SAFETY: nothing is mapped at null, and nothing is made of it: it is refused.
    let null = unsafe { RamBlock::new("ram", 0, std::ptr::null_mut(), 4096, PAGE) };
    assert!(matches!(null, Err(MemoryError::BadPointer { .. })));
}

#[test]
fn blocks_that_do_not_go_together_are_refused() {
    assert!(matches!(Ram::new([]), Err(MemoryError::NoBlocks)));
    let same = Ram::new([anonymous("a", 4096), anonymous("b", 4096), anonymous("a", 4096)]);
    assert!(matches!(same, Err(MemoryError::SameName { name }) if name == "a"));
    let many = |count: usize| Ram::new((0..count).map(|i| anonymous(&i.to_string(), 4096)));
    assert!(matches!(many(BLOCKS_MAX + 1), Err(MemoryError::TooManyBlocks)));
    let most = many(BLOCKS_MAX).unwrap();
    assert!(most.iter().all(|(id, block)| block.name() == id.to_string()), "ids are places");
    assert!(most.block(BlockId(1024)).is_none());

    let owner = Arc::new(anonymous("owner", MIB));
    let part = |name: &str, first: u64, pages: u64| {
        let range = owner.range(first, pages).unwrap();
        // SAFETY: the range is in `owner`, which the block holds.
        let block = unsafe { RamBlock::new(name, 0, range.ptr, range.len as u64, PAGE) }.unwrap();
        block.with_keep_alive(owner.clone())
    };
    let overlap = Ram::new([part("high", 10, 5), part("low", 0, 11)]);
    assert!(matches!(overlap, Err(MemoryError::Overlap { one, other }) if one == "low" && other == "high"));
    let ram = Ram::new([part("high", 10, 5), part("low", 0, 10)]).unwrap();
    assert_eq!((ram.bytes(), ram.pages()), (15 * 4096, 15));
}

#[test]
fn keep_alives_live_as_long_as_the_last_clone() {
    struct Owner(Arc<AtomicBool>);
    impl Drop for Owner {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let gone = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    // A block that owns its mapping holds that as well as what it is given.
    let block = anonymous("ram", MIB).with_keep_alive(Owner(gone[0].clone()));
    let ram = Ram::with_keep_alive(Owner(gone[1].clone()), [block]).unwrap();
    let clone = ram.clone();
    drop(ram);
    fill(clone.block(BlockId(0)).unwrap(), 255, 1);
    assert_eq!(gone.each_ref().map(|gone| gone.load(Relaxed)), [false, false]);
    drop(clone);
    assert_eq!(gone.each_ref().map(|gone| gone.load(Relaxed)), [true, true]);
}

#[test]
fn overwriting_writes_only_what_is_not_zero_and_creates_nothing() {
    for (block, existing_before) in [
        (anonymous("ram", 64 * MIB), 6),
        // The last page of a shared mapping always counts as existing.
        (RamBlock::memfd("ram", 0, 64 * MIB, PAGE, Backing::Base).unwrap(), 7),
    ] {
        [0, 5, 6, 8000, 16000].iter().for_each(|&page| fill(&block, page, 3));
        fill(&block, 9000, 0);
        let ram = Ram::new([block]).unwrap();
        let block = ram.block(BlockId(0)).unwrap();
        assert_eq!(existing(&ram), existing_before);
        assert_eq!(block.make_zero().unwrap(), MadeZero { punched: false, pages_overwritten: 5 });
        assert_eq!(existing(&ram), existing_before, "holes stay holes");
        assert!([0, 5, 6, 8000, 9000, 16000].iter().all(|&page| filled_with(block, page) == Some(0)));
        assert_eq!(block.make_zero().unwrap().pages_overwritten, 0);
    }
}

#[test]
fn punching_gives_the_memory_back() {
    for (block, existing_after) in
        [(anonymous("ram", 8 * MIB), 0), (RamBlock::memfd("ram", 0, 8 * MIB, PAGE, Backing::Base).unwrap(), 1)]
    {
        (0..2048).for_each(|page| fill(&block, page, 4));
        let ram = Ram::new([block.with_initial(Initial::Punch)]).unwrap();
        let made = ram.block(BlockId(0)).unwrap().make_zero().unwrap();
        assert_eq!(made, MadeZero { punched: true, pages_overwritten: 0 });
        assert_eq!(existing(&ram), existing_after);
        assert!((0..2048).all(|page| filled_with(ram.block(BlockId(0)).unwrap(), page) == Some(0)));
    }
}

#[test]
fn what_cannot_be_punched_is_overwritten() {
    let file = temporary_file("what_cannot_be_punched_is_overwritten", &[5; 3 * 4096]);
    // SAFETY: a private mapping that the block holds and nobody else uses.
    let mapping = memmap2::MmapRaw::from(unsafe { memmap2::MmapOptions::new().map_copy(&file) }.unwrap());
    // SAFETY: as above; three pages long.
    let block = unsafe { RamBlock::new("rom", 0, mapping.as_mut_ptr(), 3 * 4096, PAGE) }.unwrap();
    let block = block.with_keep_alive(mapping).with_initial(Initial::Punch);
    assert!(matches!(block.presence(), Presence::All));
    assert_eq!(block.make_zero().unwrap(), MadeZero { punched: false, pages_overwritten: 3 });
    assert!((0..3).all(|page| filled_with(&block, page) == Some(0)));

    let locked = anonymous("ram", 16 * 4096).with_initial(Initial::Punch);
    let all = locked.range(0, 16).unwrap();
    fill(&locked, 3, 1);
    // SAFETY: the range is in the block.
    if unsafe { libc::mlock(all.ptr.cast(), all.len) } != 0 {
        return support::skip(
            "what_cannot_be_punched_is_overwritten",
            &format!("mlock: {}", std::io::Error::last_os_error()),
        );
    }
    assert_eq!(locked.make_zero().unwrap(), MadeZero { punched: false, pages_overwritten: 1 });
}

#[test]
fn a_block_that_vouches_for_zeros_is_left_alone() {
    let block = anonymous("ram", MIB).with_initial(Initial::Zeroed);
    fill(&block, 1, 9);
    assert_eq!(block.make_zero().unwrap(), MadeZero::default());
    assert_eq!(filled_with(&block, 1), Some(9));
}

#[test]
fn a_file_of_any_length_is_mapped_and_its_tail_reads_as_zeros() {
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_64K] {
        let file = temporary_file("a_file_of_any_length", &[6; 70_000]);
        let block = RamBlock::file("ram", 0, &file, 70_000, page_size, true).unwrap();
        assert_eq!(block.bytes(), 70_000u64.next_multiple_of(page_size.bytes()));
        let all = block.range(0, block.pages()).unwrap();
        // SAFETY: `range` proved that these bytes are in the block.
        let byte = |at: usize| unsafe { all.ptr.add(at).read_volatile() };
        assert!((0..70_000).all(|at| byte(at) == 6));
        assert!((70_000..all.len).all(|at| byte(at) == 0));
        // SAFETY: as above, and the file is mapped for writing.
        unsafe { all.ptr.add(69_999).write_volatile(1) };
        let mut last = [0u8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut last, 69_999).unwrap();
        assert_eq!(last, [1], "the mapping is shared");
        // SAFETY: as above.
        unsafe { all.ptr.add(all.len - 1).write_volatile(1) };
        let made = block.with_initial(Initial::Punch);
        assert!(made.make_zero().unwrap().punched);
        assert!((0..all.len).all(|at| byte(at) == 0), "the tail is made zero, too");
    }
}

#[test]
fn a_file_mapped_for_reading_is_never_written() {
    let file = temporary_file("a_file_mapped_for_reading", &[6; 8192]);
    let read_only = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    assert!(matches!(RamBlock::file("ram", 0, &read_only, 8192, PAGE, true), Err(MemoryError::Map { .. })));
    let block = RamBlock::file("ram", 0, &read_only, 8192, PAGE, false).unwrap();
    assert!(!block.is_writable());
    assert_eq!(filled_with(&block, 1), Some(6));
    assert_eq!(block.make_zero().unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    block.prefault(0, 2).unwrap();
    assert!(matches!(RamBlock::file("ram", 0, &file, 8193, PAGE, true), Err(MemoryError::FileTooShort { .. })));
}

#[test]
fn prefaulting_creates_pages_and_keeps_their_bytes() {
    let block = anonymous("ram", MIB);
    fill(&block, 10, 8);
    let ram = Ram::new([block]).unwrap();
    let block = ram.block(BlockId(0)).unwrap();
    block.prefault(8, 16).unwrap();
    assert_eq!(existing(&ram), 16);
    assert_eq!(filled_with(block, 10), Some(8));
    assert_eq!(block.prefault(250, 7).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}

/// KiB of a block that are in this process's page tables.
fn mapped_kib(block: &RamBlock) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = smaps.split_once(&format!("{:x}-", block.host_address())).unwrap().1;
    let rss = mapping.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    rss.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn unmapping_takes_shared_files_out_of_the_tables_and_keeps_every_byte() {
    let shared = |name: &str, pages: u64| {
        let bytes = pages * PAGE.bytes();
        let block = RamBlock::memfd(name, 0, bytes, PAGE, Backing::Base).unwrap();
        block.prefault(0, pages).unwrap();
        for page in [0, 1, pages / 3, pages / 2, pages - 1] {
            fill(&block, page, (page % 200) as u8 + 1);
        }
        block
    };
    // Worth three threads, and not a whole number of page tables.
    let (large, small, private) = (shared("large", (200 << 8) + 3), shared("small", 5), anonymous("private", MIB));
    fill(&private, 7, 9);
    let ram = Ram::new([large, small, private]).unwrap();
    for threads in [3, 1, 100] {
        ram.blocks()[0].prefault(0, 1000).unwrap();
        ram.unmap(std::num::NonZeroUsize::new(threads).unwrap());
        assert_eq!((mapped_kib(&ram.blocks()[0]), mapped_kib(&ram.blocks()[1])), (0, 0), "{threads} threads");
        for block in &ram.blocks()[..2] {
            for page in [0, 1, block.pages() / 3, block.pages() / 2, block.pages() - 1] {
                assert_eq!(filled_with(block, page), Some((page % 200) as u8 + 1), "{} {page}", block.name());
            }
        }
        assert_eq!(filled_with(&ram.blocks()[2], 7), Some(9), "private memory is nowhere else");
    }
}
