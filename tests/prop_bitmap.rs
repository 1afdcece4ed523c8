//! The dirty bitmap, and sources combined, against a set of pages.
#![cfg(not(loom))]
#![forbid(unsafe_code)]

use pageferry::dirty::bitmap::DirtyBitmap;
use pageferry::dirty::combined::{Combined, Still};
use pageferry::dirty::{DirtyError, DirtySource};
use pageferry::memory::{Backing, Ram, RamBlock};
use pageferry::units::{BlockId, PageSize};
use proptest::prelude::*;
use std::collections::BTreeSet;

const SHAPE: [(u64, PageSize); 3] = [(1000, PageSize::SIZE_4K), (64, PageSize::SIZE_64K), (1, PageSize::SIZE_4K)];

#[derive(Clone, Debug)]
enum Operation {
    Mark(u16, u64),
    MarkRange(u16, u64, u64),
    MarkBytes(u16, u64, u64),
    Take(u16, u64, usize),
    TakeAndPutBack(u16, u64, usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    let block = || 0..4u16;
    let page = || prop_oneof![8 => 0..1100u64, 1 => Just(u64::MAX), 1 => Just(u64::MAX - 5)];
    let bytes = || prop_oneof![8 => 0..5_000_000u64, 1 => Just(u64::MAX)];
    prop_oneof![
        (block(), page()).prop_map(|(b, p)| Operation::Mark(b, p)),
        (block(), page(), page()).prop_map(|(b, p, n)| Operation::MarkRange(b, p, n)),
        (block(), bytes(), bytes()).prop_map(|(b, o, n)| Operation::MarkBytes(b, o, n)),
        (block(), 0..17u64, 0..18usize).prop_map(|(b, f, n)| Operation::Take(b, f * 64, n)),
        (block(), 0..17u64, 0..18usize).prop_map(|(b, f, n)| Operation::TakeAndPutBack(b, f * 64, n)),
    ]
}

fn bits(words: &[u64], first: u64) -> BTreeSet<u64> {
    (0..words.len() as u64 * 64)
        .filter(|bit| words[*bit as usize / 64] >> (bit % 64) & 1 == 1)
        .map(|b| first + b)
        .collect()
}

proptest! {
    #[test]
    fn the_bitmap_holds_what_was_marked_and_not_taken(operations in prop::collection::vec(operation(), 0..40)) {
        let bitmap = DirtyBitmap::with_page_sizes(SHAPE);
        let mut model: [BTreeSet<u64>; 3] = Default::default();
        let mark = |model: &mut [BTreeSet<u64>; 3], block: u16, first: u64, end: u64| {
            if let Some(&(pages, _)) = SHAPE.get(block as usize) {
                model[block as usize].extend(first..end.min(pages));
            }
        };
        for operation in operations {
            match operation {
                Operation::Mark(block, page) => {
                    bitmap.mark(BlockId(block), page);
                    mark(&mut model, block, page, page.saturating_add(1));
                }
                Operation::MarkRange(block, first, pages) => {
                    bitmap.mark_range(BlockId(block), first, pages);
                    mark(&mut model, block, first, first.saturating_add(pages));
                }
                Operation::MarkBytes(block, offset, bytes) => {
                    bitmap.mark_bytes(BlockId(block), offset, bytes);
                    if let (Some(&(_, page_size)), true) = (SHAPE.get(block as usize), bytes > 0) {
                        let last = offset.saturating_add(bytes - 1) / page_size.bytes();
                        mark(&mut model, block, offset / page_size.bytes(), last + 1);
                    }
                }
                Operation::Take(block, first, count) | Operation::TakeAndPutBack(block, first, count) => {
                    let mut words = vec![0; count];
                    let inside = SHAPE.get(block as usize).is_some_and(|s| first / 64 + count as u64 <= s.0.div_ceil(64));
                    prop_assert_eq!(bitmap.take(BlockId(block), first, &mut words), inside);
                    let mut expected = BTreeSet::new();
                    if inside {
                        let range = first..first + count as u64 * 64;
                        expected.extend(model[block as usize].iter().filter(|page| range.contains(page)));
                    }
                    prop_assert_eq!(&bits(&words, first), &expected);
                    if matches!(operation, Operation::TakeAndPutBack(..)) {
                        prop_assert_eq!(bitmap.put_back(BlockId(block), first, &words), inside);
                    } else if inside {
                        model[block as usize].retain(|page| !expected.contains(page));
                    }
                }
            }
            prop_assert_eq!(bitmap.count(), model.iter().map(|pages| pages.len() as u64).sum::<u64>());
            prop_assert_eq!(bitmap.count_range(BlockId(0), 3, 500), model[0].range(3..503).count() as u64);
        }
    }
}

fn ram(pages: u64) -> Ram {
    Ram::new([RamBlock::anonymous("ram", 0, pages * 4096, PageSize::SIZE_4K, Backing::Base).unwrap()]).unwrap()
}

#[test]
fn harvesting_ors_into_what_is_there() {
    let bitmap = DirtyBitmap::new(&[640]);
    bitmap.mark(BlockId(0), 1);
    bitmap.mark(BlockId(0), 600);
    let mut words = [1u64; 10];
    assert!(bitmap.take(BlockId(0), 0, &mut words));
    assert_eq!((words[0], words[9]), (0b11, 1 | 1 << 24));
    assert!(words[1..9].iter().all(|&word| word == 1));
}

#[test]
fn bits_past_the_end_of_a_block_are_never_set() {
    let bitmap = DirtyBitmap::new(&[70]);
    assert!(bitmap.put_back(BlockId(0), 0, &[u64::MAX; 2]));
    bitmap.mark_range(BlockId(0), 0, u64::MAX);
    assert_eq!(bitmap.count(), 70);
}

#[test]
fn a_bitmap_of_another_shape_cannot_be_armed() {
    let ram = ram(100);
    let shaped = |shape: &[(u64, PageSize)]| DirtyBitmap::with_page_sizes(shape.iter().copied()).arm(&ram);
    assert!(shaped(&[(100, PageSize::SIZE_4K)]).is_ok());
    assert!(matches!(shaped(&[(101, PageSize::SIZE_4K)]), Err(DirtyError::OtherShape { block: BlockId(0) })));
    assert!(matches!(shaped(&[(100, PageSize::SIZE_16K)]), Err(DirtyError::OtherShape { block: BlockId(0) })));
    let two = [(100, PageSize::SIZE_4K); 2];
    assert!(matches!(shaped(&two), Err(DirtyError::OtherShape { block: BlockId(1) })));
    assert!(matches!(shaped(&[]), Err(DirtyError::OtherShape { block: BlockId(0) })));
}

#[test]
fn marks_from_before_arming_stay() {
    let ram = ram(100);
    let mut bitmap = DirtyBitmap::for_ram(&ram);
    bitmap.mark(BlockId(0), 5);
    bitmap.arm(&ram).unwrap();
    assert_eq!(bitmap.begin_round().unwrap(), 1);
    bitmap.disarm();
    bitmap.disarm();
    assert_eq!(bitmap.count(), 1);
}

/// A source that fails at the calls it is told to, and counts how often it is armed and disarmed.
#[derive(Default)]
struct Failing {
    arm: bool,
    begin: bool,
    harvest: bool,
    give_back: bool,
    armed: std::sync::Arc<std::sync::atomic::AtomicI32>,
}

fn fail_if(fails: bool) -> Result<(), DirtyError> {
    if fails {
        Err(DirtyError::Scan { block: BlockId(0), first_page: 0, source: std::io::Error::other("told to") })
    } else {
        Ok(())
    }
}

impl DirtySource for Failing {
    fn arm(&mut self, _: &Ram) -> Result<(), DirtyError> {
        fail_if(self.arm)?;
        self.armed.store(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        fail_if(self.begin).map(|()| 3)
    }
    fn harvest(&mut self, _: BlockId, _: u64, _: &mut [u64]) -> Result<(), DirtyError> {
        fail_if(self.harvest)
    }
    fn give_back(&mut self, _: BlockId, _: u64, _: &[u64]) -> Result<(), DirtyError> {
        fail_if(self.give_back)
    }
    fn disarm(&mut self) {
        self.armed.store(0, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn combined_sources_report_the_union() {
    let ram = ram(130);
    let (one, other) = (DirtyBitmap::for_ram(&ram), DirtyBitmap::for_ram(&ram));
    let mut both = Combined::new(vec![Box::new(one.clone()), Box::new(other.clone())]);
    assert!(matches!(both.harvest(BlockId(0), 0, &mut [0]), Err(DirtyError::NotArmed)));
    both.arm(&ram).unwrap();
    one.mark_range(BlockId(0), 0, 3);
    other.mark_range(BlockId(0), 2, 3);
    assert_eq!(both.begin_round().unwrap(), 6);
    let mut words = [0; 3];
    both.harvest(BlockId(0), 0, &mut words).unwrap();
    assert_eq!(words, [0b11111, 0, 0]);
    both.give_back(BlockId(0), 0, &[0b100, 0, 0]).unwrap();
    let mut words = [0; 3];
    both.harvest(BlockId(0), 0, &mut words).unwrap();
    assert_eq!(words, [0b100, 0, 0]);
    one.mark_range(BlockId(0), 0, 130);
    other.mark_range(BlockId(0), 0, 130);
    assert_eq!(both.begin_round().unwrap(), 130);
}

#[test]
fn if_one_source_fails_the_whole_range_is_dirty() {
    for failing_first in [true, false] {
        let ram = ram(130);
        let bitmap = DirtyBitmap::for_ram(&ram);
        let failing: Box<dyn DirtySource> = Box::new(Failing { harvest: true, begin: true, ..Failing::default() });
        let mut sources = vec![failing, Box::new(bitmap.clone())];
        if !failing_first {
            sources.reverse();
        }
        let mut both = Combined::new(sources);
        both.arm(&ram).unwrap();
        bitmap.mark(BlockId(0), 129);
        assert!(matches!(both.begin_round(), Err(DirtyError::Scan { .. })));
        let mut words = [0; 3];
        assert!(matches!(both.harvest(BlockId(0), 0, &mut words), Err(DirtyError::Scan { .. })));
        assert_eq!(words, [u64::MAX, u64::MAX, 0b11]);
        let mut words = [0; 1];
        assert!(both.harvest(BlockId(0), 128, &mut words).is_err());
        assert_eq!(words, [0b11]);
    }
}

#[test]
fn what_is_given_back_goes_to_a_source_that_takes_it() {
    let ram = ram(64);
    let refusing = || Box::new(Failing { give_back: true, ..Failing::default() });
    let mut both = Combined::new(vec![refusing(), Box::new(Still::new())]);
    both.arm(&ram).unwrap();
    both.give_back(BlockId(0), 0, &[0b110]).unwrap();
    let mut words = [0];
    both.harvest(BlockId(0), 0, &mut words).unwrap();
    assert_eq!(words, [0b110]);
    let mut none = Combined::new(vec![refusing(), refusing()]);
    assert!(matches!(none.give_back(BlockId(0), 0, &[1]), Err(DirtyError::Scan { .. })));
}

#[test]
fn a_source_that_cannot_be_armed_disarms_the_others() {
    let ram = ram(64);
    let armed = std::sync::Arc::new(std::sync::atomic::AtomicI32::new(-1));
    let fine = Failing { armed: armed.clone(), ..Failing::default() };
    let mut both = Combined::new(vec![Box::new(fine), Box::new(Failing { arm: true, ..Failing::default() })]);
    assert!(matches!(both.arm(&ram), Err(DirtyError::Scan { .. })));
    assert_eq!(armed.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert!(matches!(both.begin_round(), Err(DirtyError::NotArmed)));
}

#[test]
fn still_memory_reports_what_was_given_back_and_nothing_else() {
    let ram = ram(130);
    let mut still = Still::new();
    assert!(matches!(still.begin_round(), Err(DirtyError::NotArmed)));
    still.arm(&ram).unwrap();
    let mut words = [0; 3];
    still.harvest(BlockId(0), 0, &mut words).unwrap();
    assert_eq!(words, [0; 3]);
    still.give_back(BlockId(0), 64, &[1, u64::MAX]).unwrap();
    assert_eq!(still.begin_round().unwrap(), 3);
    still.harvest(BlockId(0), 0, &mut words).unwrap();
    assert_eq!(words, [0, 1, 0b11]);
    still.disarm();
    still.disarm();
    assert!(matches!(still.give_back(BlockId(0), 0, &[1]), Err(DirtyError::NotArmed)));
}

/// Blocks of these guest addresses and pages; each is named by its place.
fn ram_at(blocks: &[(u64, u64)]) -> Ram {
    let block = |(i, &(at, pages)): (usize, &(u64, u64))| {
        RamBlock::anonymous(&i.to_string(), at, pages * 4096, PageSize::SIZE_4K, Backing::Base).unwrap()
    };
    Ram::new(blocks.iter().enumerate().map(block)).unwrap()
}

#[test]
fn a_guest_address_is_found_in_its_block_and_nowhere_else() {
    let ram = ram_at(&[(1 << 20, 2), (0, 1), ((1 << 20) + 8192, 1), (u64::MAX - 8191, 1)]);
    let places = [
        (0, Some((1, 0))),
        (4095, Some((1, 4095))),
        (4096, None),
        ((1 << 20) - 1, None),
        ((1 << 20) + 8191, Some((0, 8191))),
        ((1 << 20) + 8192, Some((2, 0))),
        ((1 << 20) + 12288, None),
        (u64::MAX - 8191, Some((3, 0))),
        (u64::MAX - 4096, Some((3, 4095))),
        (u64::MAX, None),
    ];
    for (address, place) in places {
        assert_eq!(ram.locate(address), place.map(|(block, offset)| (BlockId(block), offset)), "{address:#x}");
    }
}

#[test]
fn bytes_at_a_guest_address_are_marked_in_every_block_that_has_some_of_them() {
    // Two adjacent blocks, a gap, and two blocks that overlap in the guest's address space.
    let ram = ram_at(&[(4096, 2), (12288, 3), (1 << 20, 2), ((1 << 20) + 4096, 2)]);
    let marked = |address: u64, bytes: u64| {
        let dirty = DirtyBitmap::for_ram(&ram);
        dirty.mark_guest_bytes(&ram, address, bytes);
        let pages = ram.iter().flat_map(|(id, block)| (0..block.pages()).map(move |page| (id.0, page)));
        pages.filter(|&(block, page)| dirty.is_marked(BlockId(block), page)).collect::<Vec<_>>()
    };
    assert_eq!(marked(4096, 0), []);
    assert_eq!(marked(0, 4096), []);
    assert_eq!(marked(0, 4097), [(0, 0)]);
    assert_eq!(marked(12287, 2), [(0, 1), (1, 0)]);
    assert_eq!(marked(24575, 4096), [(1, 2)]);
    assert_eq!(marked((1 << 20) + 8191, 1), [(2, 1), (3, 0)]);
    assert_eq!(marked(0, u64::MAX).len(), 9);
    assert_eq!(marked(u64::MAX, u64::MAX), []);
}
