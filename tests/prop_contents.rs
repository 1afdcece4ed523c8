//! What pages hold, as it was noted, against a plain map of what moved.
#![cfg(not(loom))]

use std::collections::{HashMap, HashSet};

use pageferry::digest::{BlockShape, Contents, FullDigest};
use pageferry::units::{BlockId, PageSize, Round, SessionId};
use proptest::prelude::*;

const PAGES: u64 = 24;
const RAM: BlockId = BlockId(0);

fn contents() -> Contents {
    Contents::new(&[BlockShape { pages: PAGES, page_size: PageSize::SIZE_4K }]).unwrap()
}

/// One page that moves: rounds after the last one, the page, and its hash; zeros if there is none.
fn moves() -> impl Strategy<Value = Vec<(u32, u64, Option<u64>)>> {
    // Steps that a mark cannot tell from none, too.
    let step = prop_oneof![6 => Just(0u32), 6 => Just(1), 1 => Just(126), 1 => Just(252), 1 => 1..70_000u32];
    prop::collection::vec((step, 0..PAGES, prop::option::of(0..5u64)), 0..200)
}

proptest! {
    #[test]
    fn each_page_is_what_moved_last_or_is_read(moves in moves()) {
        let contents = contents();
        let (mut round, mut last, mut moved) = (0u32, HashMap::new(), HashSet::new());
        let (mut twice, mut alike) = (HashSet::new(), HashSet::new());
        let mut marks: HashMap<u64, u32> = HashMap::new();
        let mut written = HashSet::new();
        for (step, page, hash) in moves {
            round += step;
            if !moved.insert((page, round)) {
                twice.insert(page);
            }
            if marks.insert(page, round % 126) == Some(round % 126) {
                alike.insert(page);
            }
            let mut notes = contents.notes(RAM, Round(round));
            match hash {
                Some(hash) => {
                    written.insert(page);
                    notes.data(page, hash);
                }
                None => notes.zero(page),
            }
            last.insert(page, hash.unwrap_or(0));
        }
        let mut read = HashSet::new();
        let hashes: Result<Vec<u64>, ()> = contents.hashes(RAM, |page| {
            read.insert(page);
            Ok(last[&page])
        }).collect();
        let hashes = hashes.unwrap();
        prop_assert_eq!(&hashes, &(0..PAGES).map(|page| last.get(&page).copied().unwrap_or(0)).collect::<Vec<_>>());
        prop_assert!(read.is_superset(&twice), "moved twice in a round and not read: {:?}", twice.difference(&read));
        prop_assert_eq!(read, alike, "read in vain only where a mark says so");
        let zeros: Vec<u64> = (0..PAGES).filter(|page| written.contains(page) && last[page] == 0).collect();
        // What was read may have been noted otherwise.
        let found: Vec<u64> = contents.written_zeros(RAM).collect();
        prop_assert_eq!(found, zeros);

        let mut whole = FullDigest::new(SessionId([0; 16]), RAM);
        (0..).zip(&hashes).for_each(|(page, hash)| whole.page(page, *hash));
        let empty = FullDigest::new(SessionId([0; 16]), RAM);
        let digest: Result<_, ()> = contents.digest(RAM, empty, |page| Ok(hashes[page as usize]));
        prop_assert_eq!(digest.unwrap(), whole);
    }
}

#[test]
fn pages_that_cannot_be_read_are_an_error() {
    let contents = contents();
    (0..2).for_each(|_| contents.notes(RAM, Round(5)).data(3, 1));
    let empty = FullDigest::new(SessionId([0; 16]), RAM);
    assert_eq!(contents.digest(RAM, empty, Err::<u64, _>), Err(3));
}

#[test]
fn one_too_large_is_an_error_and_no_abort() {
    for pages in [u64::MAX, u64::MAX / 8] {
        assert!(Contents::new(&[BlockShape { pages, page_size: PageSize::SIZE_4K }]).is_err(), "{pages} pages");
    }
}
