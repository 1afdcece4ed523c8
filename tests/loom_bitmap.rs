//! The dirty bitmap under loom: a bit that was harvested shows the write behind it, and no bit is ever lost.
#![cfg(loom)]
#![forbid(unsafe_code)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use pageferry::dirty::bitmap::DirtyBitmap;
use pageferry::units::BlockId;

const BLOCK: BlockId = BlockId(0);

fn take(bitmap: &DirtyBitmap) -> u64 {
    let mut words = [0];
    assert!(bitmap.take(BLOCK, 0, &mut words));
    words[0]
}

#[test]
fn a_harvested_bit_shows_the_write_behind_it() {
    loom::model(|| {
        let bitmap = DirtyBitmap::new(&[64]);
        // Stands for the page: written with no ordering at all, as guests do.
        let page = Arc::new(AtomicU64::new(0));
        let guest = {
            let (bitmap, page) = (bitmap.clone(), page.clone());
            loom::thread::spawn(move || {
                for value in 1..=2 {
                    page.store(value, Relaxed);
                    bitmap.mark(BLOCK, 7);
                }
            })
        };
        let mut shipped = 0;
        if take(&bitmap) != 0 {
            shipped = page.load(Relaxed);
            assert!(shipped >= 1, "the bit was harvested, and the page read was the old one");
        }
        guest.join().unwrap();
        // The guest is paused: what the last harvest does not report has been shipped as it is.
        if take(&bitmap) != 0 {
            shipped = page.load(Relaxed);
        }
        assert_eq!(shipped, 2);
    });
}

#[test]
fn two_markers_of_one_word_lose_no_bit() {
    loom::model(|| {
        let bitmap = DirtyBitmap::new(&[64]);
        let markers: Vec<_> = [3, 4]
            .into_iter()
            .map(|page| {
                let bitmap = bitmap.clone();
                loom::thread::spawn(move || bitmap.mark(BLOCK, page))
            })
            .collect();
        let early = take(&bitmap);
        markers.into_iter().for_each(|marker| marker.join().unwrap());
        let late = take(&bitmap);
        assert_eq!(early | late, 0b11000);
        assert_eq!(early & late, 0, "a bit was reported twice for one mark");
    });
}

#[test]
fn a_bit_that_was_put_back_still_shows_the_write_behind_it() {
    loom::model(|| {
        let bitmap = DirtyBitmap::new(&[64]);
        let page = Arc::new(AtomicU64::new(0));
        let guest = {
            let (bitmap, page) = (bitmap.clone(), page.clone());
            loom::thread::spawn(move || {
                page.store(1, Relaxed);
                bitmap.mark(BLOCK, 7);
            })
        };
        // One thread harvests and puts back; another harvests what it put back. Nothing else orders the two.
        let first = {
            let bitmap = bitmap.clone();
            loom::thread::spawn(move || {
                let words = [take(&bitmap)];
                assert!(bitmap.put_back(BLOCK, 0, &words));
            })
        };
        if take(&bitmap) != 0 {
            assert_eq!(page.load(Relaxed), 1);
        }
        guest.join().unwrap();
        first.join().unwrap();
    });
}
