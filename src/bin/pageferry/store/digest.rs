//! `pf-page-hash-v1`: the digest of a file's content, against damage. It is no cryptographic hash, and whoever can write
//! to the store can write a digest that fits.
//!
//! It is what `verify = full` computes of a RAM block, with session and block 0: a sum over all pages of 4096 bytes of a
//! mix of the page's hash and its number, so that pages may be taken in any order, by several threads, and holes need
//! not be read. A last page that is not whole is filled up with zeros; the length is no part of it. Its 16 hexadecimal
//! digits are the same on every machine, for ever: a test keeps them.
//!
//! Files are read, not mapped: a disk that fails is an error then and no signal, and holes on tmpfs stay holes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;

use pageferry::digest::FullDigest;
use pageferry::memory::hash::{PageHash, ZERO_HASH};
use pageferry::sys::memory::{punch_hole, seek_data, seek_hole};
use pageferry::sys::thread::with_signals_blocked;
use pageferry::units::{BlockId, SessionId};

use super::PAGE_BYTES;

/// What the manifest calls it.
pub const NAME: &str = "pf-page-hash-v1";

/// Read at once: it stays in the second-level cache until it is hashed.
const BUFFER_BYTES: usize = 256 << 10;

/// What a thread takes before it looks for more.
const PART_BYTES: u64 = 16 << 20;

/// More would wait for memory.
const THREADS_MAX: usize = 8;

/// The digest of the first `bytes` bytes of a file, which nobody may write meanwhile.
pub fn of_file(file: &File, bytes: u64) -> io::Result<String> {
    of_parts(file, bytes, false)
}

/// The same, and makes holes of the pages of zeros that it meets, where the file system can.
pub fn of_file_and_dig(file: &File, bytes: u64) -> io::Result<String> {
    of_parts(file, bytes, true)
}

fn of_parts(file: &File, bytes: u64, dig: bool) -> io::Result<String> {
    let parts = bytes.div_ceil(PART_BYTES);
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get()).min(THREADS_MAX) as u64;
    let of = cpus.min(parts).max(1);
    let work = |worker: u64| -> io::Result<FullDigest> {
        let mut digest = empty();
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut data = 0..0;
        for part in (worker..parts).step_by(of as usize) {
            let from = part * PART_BYTES;
            take_in(&mut digest, file, from..bytes.min(from + PART_BYTES), dig, &mut data, &mut buffer)?;
        }
        Ok(digest)
    };
    let sum = thread::scope(|scope| {
        let others: Vec<_> = (1..of)
            .map(|worker| {
                let named = thread::Builder::new().name(format!("pf-digest-{worker}"));
                (worker, with_signals_blocked(|| named.spawn_scoped(scope, move || work(worker))))
            })
            .collect();
        let mut sum = work(0)?;
        for (worker, other) in others {
            // What a thread that could not be had was to do, this one does.
            sum.merge(match other.map(|thread| thread.join()) {
                Ok(Ok(digest)) => digest?,
                Ok(Err(_)) | Err(_) => work(worker)?,
            });
        }
        io::Result::Ok(sum)
    })?;
    Ok(text(sum))
}

/// The digest of bytes in memory: that of a file that holds them.
pub fn of_bytes(bytes: &[u8]) -> String {
    let mut digest = empty();
    hash_pages(&mut digest, 0, bytes, |_| {});
    text(digest)
}

fn empty() -> FullDigest {
    FullDigest::new(SessionId([0; 16]), BlockId(0))
}

fn text(digest: FullDigest) -> String {
    format!("{:016x}", digest.value())
}

/// Takes in the pages of a range that begins at a multiple of the page. `data` is the stretch of data
/// met last: the kernel finds the end of one page by page, and it may be as long as the file.
fn take_in(
    digest: &mut FullDigest,
    file: &File,
    range: std::ops::Range<u64>,
    dig: bool,
    data: &mut std::ops::Range<u64>,
    buffer: &mut [u8],
) -> io::Result<()> {
    let (mut at, to) = (range.start, range.end);
    while at < to {
        if !data.contains(&at) {
            let Some(start) = seek_data(file.as_fd(), at)? else {
                hash_zeros(digest, at, to);
                return Ok(());
            };
            // From whole page to whole page, whatever the file system's blocks are.
            let end = seek_hole(file.as_fd(), start)?.max(start + 1).next_multiple_of(PAGE_BYTES);
            *data = start - start % PAGE_BYTES..end;
        }
        if data.start > at {
            let next = data.start.min(to);
            hash_zeros(digest, at, next);
            at = next;
            continue;
        }
        let length = (data.end.min(to) - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..length], at)?;
        let mut zeros = 0..0;
        hash_pages(digest, at, &buffer[..length], |page| {
            if zeros.end != page {
                dig_up(file, dig, &zeros);
                zeros.start = page;
            }
            zeros.end = page + 1;
        });
        dig_up(file, dig, &zeros);
        at += length as u64;
    }
    Ok(())
}

/// Makes a hole of these pages of zeros. A file system that cannot keeps them as they are.
fn dig_up(file: &File, dig: bool, pages: &std::ops::Range<u64>) {
    if dig && !pages.is_empty() {
        let _ = punch_hole(file.as_fd(), pages.start * PAGE_BYTES, (pages.end - pages.start) * PAGE_BYTES);
    }
}

/// Takes in the bytes of a file from byte `at`, a multiple of the page, on; and says which pages are zeros.
fn hash_pages(digest: &mut FullDigest, at: u64, bytes: &[u8], mut zero: impl FnMut(u64)) {
    let hash = PageHash::detect();
    let pages = bytes.chunks_exact(PAGE_BYTES as usize);
    let rest = pages.remainder();
    let mut number = at / PAGE_BYTES;
    for page in pages {
        let hash = hash.hash_bytes(page);
        digest.page(number, hash);
        if hash == ZERO_HASH && page.iter().all(|byte| *byte == 0) {
            zero(number);
        }
        number += 1;
    }
    if !rest.is_empty() {
        let mut page = [0; PAGE_BYTES as usize];
        page[..rest.len()].copy_from_slice(rest);
        digest.page(number, hash.hash_bytes(&page));
    }
}

fn hash_zeros(digest: &mut FullDigest, from: u64, to: u64) {
    (from / PAGE_BYTES..to.div_ceil(PAGE_BYTES)).for_each(|page| digest.page(page, ZERO_HASH));
}
