//! Dirty bitmaps for `scan` and `scanners`: guests of which so much is dirty, in such a pattern.
// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::time::Instant;

use pageferry::memory::{Backing, RamBlock};
use pageferry::units::PageSize;

/// Pages of a stretch in a clustered bitmap.
const CLUSTER_PAGES: u64 = 512;

/// How dirty pages lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// In stretches of 512, as of 2 MiB buffers.
    Clustered,
    /// Any page.
    Scattered,
}

/// A bitmap of so many pages of which about so many in a thousand are dirty.
pub fn bitmap(pages: u64, per_mille: u64, shape: Shape) -> Vec<u64> {
    match per_mille {
        0 => return vec![0; (pages / 64) as usize],
        1000 => return vec![u64::MAX; (pages / 64) as usize],
        _ => {}
    }
    let unit = if shape == Shape::Clustered { CLUSTER_PAGES } else { 1 };
    let mut words = vec![0; (pages / 64) as usize];
    for first in (0..pages).step_by(unit as usize) {
        if mix(first + 1) % 1000 < per_mille {
            (first..first + unit).for_each(|page| words[(page / 64) as usize] |= 1 << (page % 64));
        }
    }
    words
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A block of so many pages: address space only, nobody touches a page of it.
pub fn block(name: &str, address: u64, pages: u64) -> RamBlock {
    RamBlock::memfd(name, address, pages * 4096, PageSize::SIZE_4K, Backing::Base).expect("address space")
}

/// Seconds.
pub fn timed(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64()
}
