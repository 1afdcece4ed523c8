//! What pages hold, under every interleaving: a page that two lanes move in one round is read, whoever was first.
#![cfg(loom)]

use loom::sync::Arc;
use loom::thread;
use pageferry::digest::{BlockShape, Contents};
use pageferry::units::{BlockId, PageSize, Round};

const RAM: BlockId = BlockId(0);

/// Each lane notes page 0 once; gives its hash in the end, or `None` if it is to be read.
fn race(rounds: &'static [u32]) -> Option<u64> {
    let contents = Arc::new(Contents::new(&[BlockShape { pages: 1, page_size: PageSize::SIZE_64K }]).unwrap());
    let lane = |round: u32| {
        let contents = Arc::clone(&contents);
        thread::spawn(move || contents.notes(RAM, Round(round)).data(0, u64::from(round) + 1))
    };
    let lanes: Vec<_> = rounds.iter().map(|round| lane(*round)).collect();
    lanes.into_iter().for_each(|lane| lane.join().unwrap());
    contents.hashes(RAM, |_| Err(())).next().unwrap().ok()
}

#[test]
fn two_lanes_in_one_round_have_the_page_read() {
    loom::model(|| assert_eq!(race(&[3, 3]), None));
}

#[test]
fn three_lanes_in_one_round_have_the_page_read() {
    loom::model(|| assert_eq!(race(&[3, 3, 3]), None));
}

#[test]
fn a_page_that_was_read_once_is_read_for_good() {
    loom::model(|| {
        let contents = Arc::new(Contents::new(&[BlockShape { pages: 1, page_size: PageSize::SIZE_64K }]).unwrap());
        for round in [0, 0, 1] {
            contents.notes(RAM, Round(round)).data(0, 7);
        }
        let racing = Arc::clone(&contents);
        let lane = thread::spawn(move || racing.notes(RAM, Round(2)).data(0, 8));
        contents.notes(RAM, Round(2)).data(0, 9);
        lane.join().unwrap();
        assert_eq!(contents.hashes(RAM, |_| Err(())).next(), Some(Err(())));
    });
}
