//! The presence map against per-page truth: what was touched exists, and asking creates nothing.

// UNSAFETY: touches RAM through raw pointers, as a guest does.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(not(loom))]

#[path = "support/mod.rs"]
mod support;

use pageferry::memory::{Backing, Presence, PresenceMap, Ram, RamBlock};
use pageferry::units::{BlockId, PageSize};
use std::collections::BTreeSet;
use std::io::Seek;
use std::os::fd::AsFd;

const MIB: u64 = 1 << 20;
const BLOCK: BlockId = BlockId(0);

fn touch(block: &RamBlock, page: u64) {
    let range = block.range(page, 1).unwrap();
    // SAFETY: `range` proved that the page is in the block, which is writable.
    unsafe { range.ptr.add(77).write_volatile(1) };
}

/// The pages that exist, asked for in chunks of `chunk_words` words.
fn existing_by(ram: &Ram, chunk_words: usize) -> BTreeSet<u64> {
    let mut map = PresenceMap::new(ram);
    let mut pages = BTreeSet::new();
    for first in (0..ram.blocks()[0].pages()).step_by(chunk_words * 64) {
        let mut words = vec![u64::MAX; chunk_words];
        map.keep_present(BLOCK, first, &mut words).unwrap();
        let is_set = |bit: &u64| words[*bit as usize / 64] >> (bit % 64) & 1 == 1;
        pages.extend((0..words.len() as u64 * 64).filter(is_set).map(|bit| first + bit));
    }
    pages
}

/// Numbers that look random and are the same in every run.
fn scattered(pages: u64, below: u64) -> BTreeSet<u64> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
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
fn exactly_the_touched_pages_of_anonymous_memory_exist() {
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_64K] {
        let block = RamBlock::anonymous("ram", 0, 100 * MIB, page_size, Backing::Base).unwrap();
        let touched = scattered(block.pages() / 5, block.pages());
        touched.iter().for_each(|&page| touch(&block, page));
        let ram = Ram::new([block]).unwrap();
        for chunk_words in [1, 2, 7, 64, 1000] {
            assert_eq!(existing_by(&ram, chunk_words), touched, "{page_size} {chunk_words}");
        }
    }
}

#[test]
fn exactly_the_touched_pages_of_shared_memory_exist() {
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_64K] {
        let block = RamBlock::memfd("ram", 0, 20 * MIB, page_size, Backing::Base).unwrap();
        let mut touched = scattered(block.pages() / 5, block.pages());
        touched.iter().for_each(|&page| touch(&block, page));
        touched.insert(block.pages() - 1);
        let ram = Ram::new([block]).unwrap();
        for chunk_words in [1, 7, 1000] {
            assert_eq!(existing_by(&ram, chunk_words), touched, "{page_size} {chunk_words}");
        }
    }
}

#[test]
fn only_bits_that_were_set_are_kept() {
    let block = RamBlock::anonymous("ram", 0, MIB, PageSize::SIZE_4K, Backing::Base).unwrap();
    (0..128).for_each(|page| touch(&block, page));
    let ram = Ram::new([block]).unwrap();
    let mut words = [0xF0F0, 0, 0xFF, 0];
    PresenceMap::new(&ram).keep_present(BLOCK, 0, &mut words).unwrap();
    assert_eq!(words, [0xF0F0, 0, 0, 0]);
}

#[test]
fn memory_written_by_another_mapping_of_the_file_exists() {
    let block = RamBlock::memfd("ram", 0, MIB, PageSize::SIZE_4K, Backing::Base).unwrap();
    let mut other = std::fs::File::from(block.fd().unwrap().try_clone_to_owned().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&other, b"x", 40 * 4096).unwrap();
    other.seek(std::io::SeekFrom::Start(123)).unwrap();
    let ram = Ram::new([block]).unwrap();
    assert_eq!(existing_by(&ram, 1), [40, 255].into());
    assert_eq!(other.stream_position().unwrap(), 123, "the VMM's file offset stays where it is");
}

#[test]
fn a_block_in_the_middle_of_a_file_is_asked_at_its_offset() {
    let owner = RamBlock::memfd("owner", 0, MIB, PageSize::SIZE_4K, Backing::Base).unwrap();
    [99, 100, 130, 199, 200].iter().for_each(|&page| touch(&owner, page));
    let range = owner.range(100, 100).unwrap();
    // SAFETY: the range is in `owner`, which the block gets to hold below.
    let block = unsafe { RamBlock::new("ram", 0, range.ptr, range.len as u64, PageSize::SIZE_4K) }.unwrap();
    let fd = owner.fd().unwrap().try_clone_to_owned().unwrap();
    let block = block.with_shared_file(fd.as_fd(), 100 * 4096).unwrap().with_keep_alive(owner);
    assert_eq!(existing_by(&Ram::new([block]).unwrap(), 1), [0, 30, 99].into());
}

#[test]
fn a_sparse_file_exists_where_it_has_data() {
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("sparse-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(MIB + 100).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 10 * 65536).unwrap();
    let block = RamBlock::file("ram", 0, &file, MIB + 100, PageSize::SIZE_64K, true).unwrap();
    touch(&block, 3);
    let existing = existing_by(&Ram::new([block]).unwrap(), 1);
    assert!([3, 10, 16].iter().all(|page| existing.contains(page)), "{existing:?}");
    // A file system may keep data in large pieces, but hardly all of it.
    if existing.len() == 17 {
        support::skip("a_sparse_file_exists_where_it_has_data", "this file system knows no holes");
    }
}

#[test]
fn memory_of_unknown_kind_exists() {
    let block = RamBlock::anonymous("ram", 0, 100 * 4096, PageSize::SIZE_4K, Backing::Base).unwrap();
    let ram = Ram::new([block.with_presence(Presence::All)]).unwrap();
    assert_eq!(existing_by(&ram, 1), (0..100).collect());
    assert_eq!(existing_by(&ram, 4), (0..100).collect(), "and nothing past its end");
}

#[test]
fn asking_outside_the_block_is_an_error_and_clears_nothing() {
    let block = RamBlock::anonymous("ram", 0, 100 * 4096, PageSize::SIZE_4K, Backing::Base).unwrap();
    let mut map = PresenceMap::new(&Ram::new([block]).unwrap());
    for (block, first) in [(1, 0), (0, 1), (0, 128), (0, u64::MAX - 63)] {
        let mut words = [u64::MAX];
        assert!(map.keep_present(BlockId(block), first, &mut words).is_err());
        assert_eq!(words, [u64::MAX]);
    }
}

#[test]
fn every_page_of_a_huge_page_exists() {
    let block = RamBlock::anonymous("ram", 0, 16 * MIB, PageSize::SIZE_4K, Backing::TransparentHuge).unwrap();
    touch(&block, 1000);
    let ram = Ram::new([block]).unwrap();
    let existing = existing_by(&ram, 1);
    if existing.len() == 1 {
        return support::skip("every_page_of_a_huge_page_exists", "the kernel gave no huge page");
    }
    assert_eq!(existing, (512..1024).collect());
}
