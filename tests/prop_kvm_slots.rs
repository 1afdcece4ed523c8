//! The relation of KVM's memory slots to RAM blocks, against an oracle that looks at every page by itself.
#![cfg(all(not(loom), feature = "kvm"))]
#![forbid(unsafe_code)]

use pageferry::dirty::kvm::slots::{Piece, SlotMap, Uncovered, or_bits};
use proptest::prelude::*;
use std::ops::Range;

const PAGE: u64 = 4096;
const PAGES: u64 = 300;

/// Blocks that do not overlap, as a `Ram` guarantees, and slots that may: all within `PAGES` pages.
fn memory() -> impl Strategy<Value = (Vec<Range<u64>>, Vec<Range<u64>>)> {
    let cuts = prop::collection::btree_set(0..PAGES, 2..8);
    let blocks = cuts.prop_map(|cuts| {
        let cuts: Vec<u64> = cuts.into_iter().collect();
        // Every other stretch, or stretches that touch.
        let step = if cuts[0] % 2 == 0 { 1 } else { 2 };
        cuts.windows(2).step_by(step).map(|two| two[0]..two[1]).collect()
    });
    let slot = (0..PAGES, 1..PAGES).prop_map(|(first, pages)| first..first + pages);
    (blocks, prop::collection::vec(slot, 0..8))
}

fn addresses(pages: &[Range<u64>]) -> Vec<Range<u64>> {
    pages.iter().map(|range| range.start * PAGE..range.end * PAGE).collect()
}

/// One page of one block, and one page of one slot, that are the same memory.
type Same = (usize, u64, usize, u64);

fn pairs<'a>(pieces: impl IntoIterator<Item = &'a Piece>) -> Vec<Same> {
    let pages = |p: Piece| (0..p.pages).map(move |i| (p.block, p.block_page + i, p.slot, p.slot_page + i));
    let mut pairs: Vec<_> = pieces.into_iter().copied().flat_map(pages).collect();
    pairs.sort_unstable();
    pairs
}

proptest! {
    #[test]
    fn every_page_is_found_in_every_slot_that_shows_it_and_nowhere_else((blocks, slots) in memory()) {
        let mut oracle: Vec<Same> = Vec::new();
        let mut uncovered = None;
        for (b, block) in blocks.iter().enumerate() {
            for page in block.clone() {
                let before = oracle.len();
                let shows = |s: usize| slots[s].contains(&page);
                oracle.extend((0..slots.len()).filter(|s| shows(*s)).map(|s| (b, page - block.start, s, page - slots[s].start)));
                if oracle.len() == before && uncovered.is_none() {
                    uncovered = Some(Uncovered { block: b, page: page - block.start });
                }
            }
        }
        oracle.sort_unstable();
        match SlotMap::new(&addresses(&blocks), &addresses(&slots), PAGE) {
            Err(got) => prop_assert_eq!(Some(got), uncovered),
            Ok(map) => {
                prop_assert_eq!(uncovered, None);
                prop_assert_eq!(&pairs((0..blocks.len()).flat_map(|b| map.of_block(b))), &oracle);
                prop_assert_eq!(&pairs((0..slots.len()).flat_map(|s| map.of_slot(s))), &oracle);
            }
        }
    }

    #[test]
    fn a_range_of_a_block_is_cut_out_of_its_pieces((blocks, mut slots) in memory(), first in 0..PAGES, pages in 0..PAGES) {
        // One that shows everything, so that the map is made.
        slots.push(0..PAGES);
        let map = SlotMap::new(&addresses(&blocks), &addresses(&slots), PAGE).unwrap();
        for b in 0..blocks.len() {
            let cut: Vec<Piece> = map.within(b, first, first + pages).collect();
            let oracle: Vec<Same> = pairs(map.of_block(b)).into_iter()
                .filter(|(_, page, _, _)| (first..first + pages).contains(page)).collect();
            prop_assert_eq!(pairs(&cut), oracle);
            prop_assert!(cut.iter().all(|piece| piece.pages > 0));
        }
    }

    #[test]
    fn bits_are_ored_in_at_any_shift(
        into in prop::collection::vec(any::<u64>(), 0..5),
        from in prop::collection::vec(any::<u64>(), 0..5),
        into_first in 0u64..400,
        from_first in 0u64..400,
        bits in prop_oneof![0u64..400, Just(u64::MAX)],
    ) {
        let bit = |words: &[u64], at: u64| words.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1);
        let mut got = into.clone();
        or_bits(&mut got, into_first, &from, from_first, bits);
        for at in 0..into.len() as u64 * 64 {
            let inside = at >= into_first && at - into_first < bits;
            let oracle = bit(&into, at) || inside && bit(&from, at - into_first + from_first);
            prop_assert_eq!(bit(&got, at), oracle, "bit {}", at);
        }
    }
}
