//! The digest table under every interleaving: the fold of a chunk is that of its final entries, whoever raced.
#![cfg(loom)]

use loom::sync::Arc;
use loom::thread;
use pageferry::digest::{BlockShape, DigestTable};
use pageferry::units::{BlockId, PageSize, Round, SessionId};

const RAM: BlockId = BlockId(0);

fn table(pages: u64) -> DigestTable {
    DigestTable::new(SessionId([7; 16]), &[BlockShape { pages, page_size: PageSize::SIZE_64K }]).unwrap()
}

/// Each lane records its pages, all in one round; then the digests must be those of the newest of each page.
fn race(pages: u64, lanes: &'static [(u32, &'static [(u64, u64)])]) {
    loom::model(move || {
        let raced = Arc::new(table(pages));
        let record = |table: &DigestTable, &(round, sent): &(u32, &[(u64, u64)])| {
            let mut recorder = table.recorder(RAM, Round(round));
            sent.iter().for_each(|&(page, hash)| recorder.page(page, hash));
        };
        let spawn = |lane: &'static (u32, &'static [(u64, u64)])| {
            let raced = Arc::clone(&raced);
            thread::spawn(move || record(&raced, lane))
        };
        let others: Vec<_> = lanes[1..].iter().map(spawn).collect();
        record(&raced, &lanes[0]);
        others.into_iter().for_each(|lane| lane.join().unwrap());

        // Alone, and each page once: its newest entry.
        let alone = table(pages);
        for page in 0..pages {
            let sent = lanes.iter().flat_map(|(round, sent)| sent.iter().map(move |&(p, hash)| (p, *round, hash)));
            if let Some((_, round, hash)) = sent.filter(|(p, ..)| *p == page).max_by_key(|(_, round, _)| *round) {
                alone.recorder(RAM, Round(round)).page(page, hash);
            }
        }
        for chunk in 0..raced.chunks(RAM) {
            assert_eq!(raced.chunk_digest(RAM, chunk), alone.chunk_digest(RAM, chunk), "chunk {chunk}");
        }
    });
}

#[test]
fn two_rounds_of_one_page() {
    race(1, &[(0, &[(0, 0xaaaa)]), (1, &[(0, 0xbbbb)])]);
}

#[test]
fn three_rounds_of_one_page() {
    race(1, &[(0, &[(0, 0xaaaa)]), (2, &[(0, 0xbbbb)]), (1, &[(0, 0xcccc)])]);
}

#[test]
fn two_rounds_of_two_pages_in_opposite_order() {
    race(2, &[(0, &[(0, 0xaaaa), (1, 0xbbbb)]), (1, &[(1, 0xcccc), (0, 0xdddd)])]);
}

#[test]
fn two_rounds_of_runs_that_cross_chunks() {
    // Chunks of 64 KiB pages are 32 pages long.
    race(33, &[(3, &[(31, 0xaaaa), (32, 0xbbbb)]), (2, &[(32, 0xcccc), (31, 0xdddd)])]);
}
