//! The digest table against a plain map of what was sent last: whatever is recorded, in whatever order.
#![cfg(not(loom))]

#[path = "support/mod.rs"]
mod support;

use pageferry::digest::{BlockShape, CHUNK_BYTES, DigestTable, FullDigest, ROUND_MAX};
use pageferry::memory::hash::{PageHash, ZERO_HASH};
use pageferry::units::{BlockId, PageSize, Round, SessionId};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Barrier;

const SESSION: SessionId = SessionId(*b"sixteen bytes...");

/// Chunks of 512, 128 and 32 pages, and last chunks that are not whole.
const SHAPES: [BlockShape; 3] = [
    BlockShape { pages: 1300, page_size: PageSize::SIZE_4K },
    BlockShape { pages: 256, page_size: PageSize::SIZE_16K },
    BlockShape { pages: 70, page_size: PageSize::SIZE_64K },
];

fn table() -> DigestTable {
    DigestTable::new(SESSION, &SHAPES).unwrap()
}

fn digests(table: &DigestTable) -> Vec<Vec<u64>> {
    let block = |b| BlockId(b as u16);
    let chunks = |b| (0..table.chunks(block(b))).map(move |chunk| table.chunk_digest(block(b), chunk));
    (0..SHAPES.len()).map(|b| chunks(b).chain([table.block_digest(block(b))]).collect()).collect()
}

/// A run as it was sent: its pages hold what `content` gives.
#[derive(Clone, Debug)]
struct Record {
    block: u16,
    first: u64,
    pages: u32,
    round: u32,
    zero: bool,
}

/// What a page holds when it travels in a round. A page travels once in a round, so this is all there is to say.
fn content(page: u64, round: u32) -> u64 {
    (page + 1).wrapping_mul(u64::from(round) + 77).wrapping_mul(0x2545_f491_4f6c_dd1d)
}

fn record(table: &DigestTable, record: &Record) {
    let mut recorder = table.recorder(BlockId(record.block), Round(record.round));
    if record.zero {
        recorder.zero(record.first, record.pages);
    } else {
        (record.first..record.first + u64::from(record.pages)).for_each(|p| recorder.page(p, content(p, record.round)));
    }
}

/// The oracle: of each page the newest round and what it held then.
#[derive(Default)]
struct Oracle(HashMap<(u16, u64), (u32, u64)>);

impl Oracle {
    fn record(&mut self, record: &Record) {
        for page in record.first..record.first + u64::from(record.pages) {
            let held = if record.zero { ZERO_HASH } else { content(page, record.round) };
            let newest = self.0.entry((record.block, page)).or_insert((record.round, held));
            if newest.0 < record.round {
                *newest = (record.round, held);
            }
        }
    }

    /// The digests of a table in which each page was recorded once, as it was last sent.
    fn digests(&self) -> Vec<Vec<u64>> {
        let table = table();
        for (&(block, page), &(round, held)) in &self.0 {
            table.recorder(BlockId(block), Round(round)).page(page, held);
        }
        digests(&table)
    }
}

/// Runs in any order of rounds; whether a page is zero depends on its block and round alone, as `content` does.
fn records() -> impl Strategy<Value = Vec<Record>> {
    let rounds = prop_oneof![0..6u32, Just(ROUND_MAX.0), Just(ROUND_MAX.0 - 1)];
    let record =
        (0..SHAPES.len(), any::<prop::sample::Index>(), 1..600u32, rounds).prop_map(|(b, first, pages, round)| {
            let first = first.index(SHAPES[b].pages as usize) as u64;
            let pages = pages.min((SHAPES[b].pages - first) as u32);
            Record { block: b as u16, first, pages, round, zero: (round + b as u32) % 3 == 0 }
        });
    prop::collection::vec(record, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn only_what_was_sent_last_counts(records in records()) {
        let (table, mut oracle) = (table(), Oracle::default());
        for r in &records {
            record(&table, r);
            oracle.record(r);
        }
        prop_assert_eq!(digests(&table), oracle.digests());
    }

    #[test]
    fn order_does_not_matter((records, shuffled) in records().prop_flat_map(|r| (Just(r.clone()), Just(r).prop_shuffle()))) {
        let (source, target) = (table(), table());
        records.iter().for_each(|r| record(&source, r));
        shuffled.iter().for_each(|r| record(&target, r));
        prop_assert_eq!(digests(&source), digests(&target));
    }

    #[test]
    fn one_recorder_for_all_runs_does_as_many(records in records()) {
        // Going back and forth between chunks must not mix up their sums.
        let (one, many) = (table(), table());
        for b in 0..SHAPES.len() as u16 {
            let of_block: Vec<_> = records.iter().filter(|r| r.block == b).collect();
            let mut recorder = one.recorder(BlockId(b), Round(4));
            for r in of_block {
                for page in (r.first..r.first + u64::from(r.pages)).rev().step_by(3) {
                    recorder.page(page, content(page, 4));
                    many.recorder(BlockId(b), Round(4)).page(page, content(page, 4));
                }
            }
        }
        prop_assert_eq!(digests(&one), digests(&many));
    }

    #[test]
    fn a_single_page_that_differs_is_named_by_its_chunk(
        records in records(), block in 0..SHAPES.len(), page: prop::sample::Index, other_bits in 1..u64::MAX,
    ) {
        let (source, target) = (table(), table());
        // The page comes last, in a round of its own: what it held before must not tell.
        for r in records.iter().filter(|r| r.round < ROUND_MAX.0) {
            record(&source, r);
            record(&target, r);
        }
        let id = BlockId(block as u16);
        let page = page.index(SHAPES[block].pages as usize) as u64;
        source.recorder(id, ROUND_MAX).page(page, content(page, ROUND_MAX.0));
        target.recorder(id, ROUND_MAX).page(page, content(page, ROUND_MAX.0) ^ other_bits);

        for b in 0..SHAPES.len() as u16 {
            let landed: Vec<_> = (0..target.chunks(BlockId(b))).map(|c| target.chunk_digest(BlockId(b), c)).collect();
            let named: Vec<_> = source.differing_chunks(BlockId(b), &landed).collect();
            if BlockId(b) == id {
                prop_assert_ne!(source.block_digest(id), target.block_digest(id));
                prop_assert_eq!(named.len(), 1);
                prop_assert!(source.chunk_pages(id, named[0]).contains(&page));
            } else {
                prop_assert!(named.is_empty());
            }
        }
    }

    #[test]
    fn a_full_digest_is_the_same_however_the_work_is_shared(cuts in prop::collection::vec(0..200u64, 0..5), seed: u64) {
        let hash_of = |page: u64| content(page, 0) ^ seed;
        let new = || FullDigest::new(SESSION, BlockId(1));
        let mut whole = new();
        (0..200).for_each(|page| whole.page(page, hash_of(page)));

        let mut cuts = [cuts, vec![0, 200]].concat();
        cuts.sort_unstable();
        let mut merged = new();
        for part in cuts.windows(2).rev() {
            let mut digest = new();
            (part[0]..part[1]).rev().for_each(|page| digest.page(page, hash_of(page)));
            merged.merge(digest);
        }
        prop_assert_eq!(merged, whole);
        prop_assert_ne!(merged.value(), 0);
    }
}

#[test]
fn a_late_record_of_an_older_round_changes_nothing() {
    let (on_time, late) = (table(), table());
    on_time.recorder(BlockId(0), Round(5)).page(7, 0xaaaa);
    late.recorder(BlockId(0), Round(5)).page(7, 0xaaaa);
    for round in 0..5 {
        late.recorder(BlockId(0), Round(round)).page(7, u64::MAX - u64::from(round));
    }
    assert_eq!(digests(&on_time), digests(&late));
}

#[test]
fn a_page_sent_again_takes_its_old_hash_out() {
    let (once, twice) = (table(), table());
    once.recorder(BlockId(0), Round(1)).page(7, 0xbbbb);
    twice.recorder(BlockId(0), Round(0)).page(7, 0xaaaa);
    twice.recorder(BlockId(0), Round(1)).page(7, 0xbbbb);
    assert_eq!(digests(&once), digests(&twice));
}

#[test]
fn a_page_of_zeros_is_the_same_sent_as_zeros_or_as_data() {
    let (as_zeros, as_data) = (table(), table());
    as_zeros.recorder(BlockId(0), Round(0)).zero(500, 30);
    let mut recorder = as_data.recorder(BlockId(0), Round(0));
    (500..530).for_each(|page| recorder.page(page, PageHash::detect().hash_bytes(&[0; 4096])));
    recorder.finish();
    assert_eq!(digests(&as_zeros), digests(&as_data));
    assert_ne!(digests(&as_zeros), digests(&table()), "zeros that were sent are not pages that were not");
}

#[test]
fn pages_that_change_places_are_noticed() {
    let (source, target) = (table(), table());
    for (table, pages) in [(&source, [3, 4]), (&target, [4, 3])] {
        table.recorder(BlockId(0), Round(0)).page(pages[0], 0xaaaa);
        table.recorder(BlockId(0), Round(0)).page(pages[1], 0xbbbb);
    }
    assert_ne!(source.block_digest(BlockId(0)), target.block_digest(BlockId(0)));

    let (mut there, mut here) = (FullDigest::new(SESSION, BlockId(0)), FullDigest::new(SESSION, BlockId(0)));
    [(3, 0xaaaa), (4, 0xbbbb)].iter().for_each(|&(page, hash)| there.page(page, hash));
    [(4, 0xaaaa), (3, 0xbbbb)].iter().for_each(|&(page, hash)| here.page(page, hash));
    assert_ne!(there, here);
}

#[test]
fn the_same_content_has_other_digests_in_another_session_block_page_or_round() {
    let mut seen = std::collections::HashSet::new();
    for session in [SESSION, SessionId([0; 16]), SessionId(*b"Sixteen bytes..."), SessionId(*b"sixteen bytes..!")] {
        let shape = BlockShape { pages: 4, page_size: PageSize::SIZE_4K };
        for (block, page, round) in (0..8).map(|i| (i & 1, i >> 1 & 1, i >> 2)) {
            let table = DigestTable::new(session, &[shape; 2]).unwrap();
            table.recorder(BlockId(block), Round(round.into())).zero(page.into(), 1);
            assert!(seen.insert(table.block_digest(BlockId(block))), "{session} {block} {page} {round}");
        }
    }
    assert!(!seen.contains(&0));
}

#[test]
fn the_value_is_part_of_the_protocol() {
    // From a second implementation, in another language.
    let table = table();
    table.recorder(BlockId(1), Round(2)).page(129, 0x0123_4567_89ab_cdef);
    table.recorder(BlockId(1), Round(ROUND_MAX.0)).zero(130, 1);
    assert_eq!(table.chunk_digest(BlockId(1), 1), GOLDEN_CHUNK);
    let mut full = FullDigest::new(SESSION, BlockId(1));
    full.page(129, 0x0123_4567_89ab_cdef);
    assert_eq!(full.value(), GOLDEN_FULL);
}
const GOLDEN_CHUNK: u64 = 0xe1aa_5992_3140_d91c;
const GOLDEN_FULL: u64 = 0xfa95_d6f7_be94_94f2;

#[test]
fn rounds_after_the_last_count_as_the_last() {
    let (last, beyond) = (table(), table());
    last.recorder(BlockId(0), ROUND_MAX).page(1, 5);
    beyond.recorder(BlockId(0), Round(u32::MAX)).page(1, 5);
    assert_eq!(digests(&last), digests(&beyond));
}

#[test]
fn chunks_cover_all_pages_once() {
    let table = table();
    for (b, shape) in SHAPES.iter().enumerate() {
        let block = BlockId(b as u16);
        let pages: Vec<u64> = (0..table.chunks(block)).flat_map(|chunk| table.chunk_pages(block, chunk)).collect();
        assert!(pages.iter().copied().eq(0..shape.pages));
        assert_eq!(table.chunk_pages(block, 0).end * shape.page_size.bytes(), CHUNK_BYTES);
        assert!(table.chunk_pages(block, usize::MAX).is_empty());
    }
}

#[test]
fn digests_of_another_shape_differ_everywhere() {
    let table = table();
    assert_eq!(table.chunks(BlockId(0)), 3);
    for peer in [&[][..], &[0; 2], &[0; 4]] {
        assert!(table.differing_chunks(BlockId(0), peer).eq(0..3));
    }
    assert!(table.differing_chunks(BlockId(0), &[0; 3]).eq(0..0));
}

#[test]
fn threads_that_race_for_the_same_pages_leave_a_true_digest() {
    let threads = 4;
    let (raced, alone) = (table(), table());
    let start = Barrier::new(threads as usize);
    std::thread::scope(|scope| {
        for lane in 0..threads {
            let (raced, start) = (&raced, &start);
            scope.spawn(move || {
                start.wait();
                for round in 0..if cfg!(miri) { 2 } else { 50 } {
                    let round = round * threads + lane;
                    record(raced, &Record { block: 0, first: 480, pages: 64, round, zero: false });
                }
            });
        }
    });
    let round = if cfg!(miri) { 2 } else { 50 } * threads - 1;
    record(&alone, &Record { block: 0, first: 480, pages: 64, round, zero: false });
    assert_eq!(digests(&raced), digests(&alone));
}

#[test]
fn a_table_too_large_is_an_error_and_no_abort() {
    // Miri ends where real memory would run out; the first two are refused before anybody asks for memory.
    let sizes = [u64::MAX, u64::MAX / 8, 1 << 55];
    for pages in sizes.into_iter().take(if cfg!(miri) { 2 } else { 3 }) {
        let shape = BlockShape { pages, page_size: PageSize::SIZE_4K };
        assert!(DigestTable::new(SESSION, &[shape]).is_err(), "{pages} pages");
    }
}

#[test]
fn pages_of_the_table_that_were_never_touched_take_no_memory() {
    if cfg!(debug_assertions) {
        support::skip("pages_of_the_table_that_were_never_touched_take_no_memory", "not optimized, it touches all");
        return;
    }
    let resident_bytes = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    let before = resident_bytes();
    let shape = BlockShape { pages: 512 << 30 >> 12, page_size: PageSize::SIZE_4K };
    let table = DigestTable::new(SESSION, &[shape]).unwrap();
    table.recorder(BlockId(0), Round(0)).zero(shape.pages / 2, 512);
    let grown = resident_bytes().saturating_sub(before);
    // 1 GiB if it were touched; the other tests of this process, running meanwhile, take a few MiB.
    assert!(grown < 128 << 20, "a guest of 512 GiB costs {} MiB before anything is sent", grown >> 20);
    assert_ne!(table.block_digest(BlockId(0)), 0);
}
