//! `pf-page-hash-v1`: the digest of a file's content, against damage. It is no cryptographic hash, and whoever can write
//! to the store can write a digest that fits.
//!
//! It is what `verify = full` computes of a RAM block, with session and block 0: a sum over all pages of 4096 bytes of a
//! mix of the page's hash and its number, so that pages may be taken in any order, by several threads, and holes need
//! not be read. A last page that is not whole is filled up with zeros; the length is no part of it. Its 16 hexadecimal
//! digits are the same on every machine, for ever: a test keeps them.
//!
//! RAM is hashed where it is mapped, which is three times as fast as reading it: what has just landed is there already. Its
//! holes are passed over: on tmpfs a look at one would fill it.
//!
//! Measured, 1 GiB on tmpfs, 2 cores of an EPYC Zen 4, virtual: 38 ms where it has just landed, 67 ms where it was not
//! mapped before.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::thread;

use pageferry::RamBlock;
use pageferry::digest::FullDigest;
use pageferry::memory::hash::{PageHash, ZERO_HASH};
use pageferry::memory::look::{Look, Seen};
use pageferry::sync::{AtomicU64, Ordering};
use pageferry::sys::memory::{punch_hole, seek_data, seek_hole};
use pageferry::sys::thread::with_signals_blocked;
use pageferry::units::{BlockId, SessionId};

use super::PAGE_BYTES;

/// What the manifest calls it.
pub const NAME: &str = "pf-page-hash-v1";

/// What a thread takes before it looks for more.
const PART_BYTES: u64 = 4 << 20;

/// More would wait for memory.
const THREADS_MAX: usize = 8;

/// The digest of a block, the mapping of a file that nobody may write meanwhile; `None` if `stop` said that nobody wants
/// it any more.
pub fn of_block(block: &RamBlock, stop: &(impl Fn() -> bool + Sync)) -> io::Result<Option<String>> {
    of_parts(block, false, stop)
}

/// The same, and makes holes of the pages of zeros that it meets, where the file system can.
pub fn of_block_and_dig(block: &RamBlock) -> io::Result<String> {
    let digest = of_parts(block, true, &|| false)?;
    digest.ok_or_else(|| io::Error::other("internal error: nobody has asked to stop"))
}

fn of_parts(block: &RamBlock, dig: bool, stop: &(impl Fn() -> bool + Sync)) -> io::Result<Option<String>> {
    let Some(file) = block.fd() else {
        return Err(io::Error::other("internal error: a block of a store is no file"));
    };
    let parts = block.bytes().div_ceil(PART_BYTES);
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get()).min(THREADS_MAX) as u64;
    let next = AtomicU64::new(0);
    let work = || -> io::Result<FullDigest> {
        let mut pages = Pages { block, file, look: Look::new(true, dig), digest: empty(), data: 0..0 };
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts || stop() {
                return Ok(pages.digest);
            }
            let from = part * PART_BYTES;
            pages.take_in(from..block.bytes().min(from + PART_BYTES), dig)?;
        }
    };
    let sum = thread::scope(|scope| {
        let others: Vec<_> = (1..cpus.min(parts))
            .filter_map(|worker| {
                let named = thread::Builder::new().name(format!("pf-digest-{worker}"));
                // Without a thread the others take its parts.
                with_signals_blocked(|| named.spawn_scoped(scope, work)).ok()
            })
            .collect();
        let mut sum = work()?;
        for other in others {
            let digest = other.join().map_err(|_| io::Error::other("internal error: a thread that hashes has died"))?;
            sum.merge(digest?);
        }
        io::Result::Ok(sum)
    })?;
    Ok((!stop()).then(|| text(sum)))
}

/// The digest of bytes in memory: that of a file that holds them.
pub fn of_bytes(bytes: &[u8]) -> String {
    let mut digest = empty();
    hash_pages(&mut digest, bytes);
    text(digest)
}

fn empty() -> FullDigest {
    FullDigest::new(SessionId([0; 16]), BlockId(0))
}

fn text(digest: FullDigest) -> String {
    format!("{:016x}", digest.value())
}

/// What one thread has hashed of a block.
struct Pages<'a> {
    block: &'a RamBlock,
    file: BorrowedFd<'a>,
    look: Look,
    digest: FullDigest,
    /// The stretch of data met last: the kernel finds the end of one page by page, and it may be as long as the file.
    data: Range<u64>,
}

impl Pages<'_> {
    /// Takes in the pages of a range that begins at a multiple of the page.
    fn take_in(&mut self, range: Range<u64>, dig: bool) -> io::Result<()> {
        let (mut at, to) = (range.start, range.end);
        while at < to {
            if !self.data.contains(&at) {
                let Some(start) = seek_data(self.file, at)? else {
                    self.zeros(at, to);
                    return Ok(());
                };
                // From whole page to whole page, whatever the file system's blocks are.
                let end = seek_hole(self.file, start)?.max(start + 1).next_multiple_of(PAGE_BYTES);
                self.data = start - start % PAGE_BYTES..end;
            }
            let next = self.data.start.clamp(at, to);
            self.zeros(at, next);
            let end = self.data.end.min(to).max(next);
            self.bytes(next, end, dig)?;
            at = end;
        }
        Ok(())
    }

    fn zeros(&mut self, from: u64, to: u64) {
        (from / PAGE_BYTES..to / PAGE_BYTES).for_each(|page| self.digest.page(page, ZERO_HASH));
    }

    /// Hashes pages; and makes holes of those of zeros if it is to dig.
    fn bytes(&mut self, from: u64, to: u64, dig: bool) -> io::Result<()> {
        let mut zeros = from..from;
        for at in (from..to).step_by(PAGE_BYTES as usize) {
            let page = at / PAGE_BYTES;
            match self.look.at(self.block, page) {
                Some(Seen::Data(hash)) => self.digest.page(page, hash),
                Some(Seen::Zero) => {
                    self.digest.page(page, ZERO_HASH);
                    if zeros.end != at {
                        self.dig_up(&zeros, dig);
                        zeros.start = at;
                    }
                    zeros.end = at + PAGE_BYTES;
                }
                None => return Err(io::Error::other("internal error: a page is outside its block")),
            }
        }
        self.dig_up(&zeros, dig);
        Ok(())
    }

    /// Makes a hole of these pages of zeros. A file system that cannot keeps them as they are.
    fn dig_up(&self, zeros: &Range<u64>, dig: bool) {
        if dig && !zeros.is_empty() {
            let _ = punch_hole(self.file, zeros.start, zeros.end - zeros.start);
        }
    }
}

/// Takes in bytes in memory.
fn hash_pages(digest: &mut FullDigest, bytes: &[u8]) {
    let hash = PageHash::detect();
    let pages = bytes.chunks_exact(PAGE_BYTES as usize);
    let rest = pages.remainder();
    let mut number = 0;
    for page in pages {
        digest.page(number, hash.hash_bytes(page));
        number += 1;
    }
    if !rest.is_empty() {
        let mut page = [0; PAGE_BYTES as usize];
        page[..rest.len()].copy_from_slice(rest);
        digest.page(number, hash.hash_bytes(&page));
    }
}
