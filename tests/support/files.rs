//! Files of RAM, compared and weighed.
#![allow(dead_code)]
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// The byte where the two files differ first. Reads both in step, so that a difference has a place.
pub fn first_difference(left: &Path, right: &Path) -> Option<u64> {
    let open = |path: &Path| File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (left, right) = (open(left), open(right));
    let lengths = [&left, &right].map(|file| file.metadata().expect("an open file has metadata").len());
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let common = lengths[0].min(lengths[1]);
    let mut at = 0;
    while at < common {
        let chunk = (common - at).min(1 << 20) as usize;
        left.read_exact_at(&mut ours[..chunk], at).expect("as long as it says");
        right.read_exact_at(&mut theirs[..chunk], at).expect("as long as it says");
        if ours[..chunk] != theirs[..chunk] {
            let offset = (0..chunk).find(|&i| ours[i] != theirs[i]).expect("they differ");
            return Some(at + offset as u64);
        }
        at += chunk as u64;
    }
    (lengths[0] != lengths[1]).then_some(common)
}

/// Panics where two files of RAM differ, with what each holds there, and how many pages differ.
pub fn demand_same(what: &str, left: &Path, right: &Path) {
    let Some(at) = first_difference(left, right) else { return };
    let show = |path: &Path| {
        let mut bytes = [0; 32];
        let file = File::open(path).expect("the file is there");
        let read = file.read_at(&mut bytes, at & !15).expect("a readable file");
        format!("{:02x?}", &bytes[..read])
    };
    let differing = differing_pages(left, right);
    let some: Vec<_> = differing.iter().take(8).map(|page| format!("{:#x}", page * 4096)).collect();
    let pages = differing.len();
    panic!("{what} differs at byte {at:#x}: {} and {}; {pages} pages differ: {some:?}", show(left), show(right));
}

/// Which pages differ, of two files that may differ in length.
pub fn differing_pages(left: &Path, right: &Path) -> Vec<u64> {
    let open = |path: &Path| File::open(path).expect("the file is there");
    let (left, right) = (open(left), open(right));
    let bytes = [&left, &right].map(|file| file.metadata().expect("an open file has metadata").len());
    let page = |file: &File, page: &u64| {
        let mut bytes = [0; 4096];
        let read = file.read_at(&mut bytes, page * 4096).expect("a readable file");
        (read, bytes)
    };
    (0..bytes[0].max(bytes[1]).div_ceil(4096)).filter(|at| page(&left, at) != page(&right, at)).collect()
}

/// How many bytes of the file exist on the disk.
pub fn bytes_on_disk(path: &Path) -> u64 {
    let file = File::open(path).expect("the file is there");
    // Some file systems count blocks only once they are written out.
    file.sync_all().expect("the file can be written out");
    file.metadata().expect("an open file has metadata").blocks() * 512
}

/// How many pages of the file hold something but zeros.
pub fn pages_in_use(path: &Path) -> u64 {
    let file = File::open(path).expect("the file is there");
    let bytes = file.metadata().expect("an open file has metadata").len();
    let (mut page, mut used) = ([0; 4096], 0);
    for at in (0..bytes).step_by(page.len()) {
        let length = (bytes - at).min(page.len() as u64) as usize;
        file.read_exact_at(&mut page[..length], at).expect("as long as it says");
        used += u64::from(page[..length] != [0; 4096][..length]);
    }
    used
}
