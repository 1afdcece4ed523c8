//! `pf-page-hash-v1`: the digest of a file's content, against damage. It is no cryptographic hash, and whoever can write
//! to the store can write a digest that fits.
//!
//! It is what `verify = full` computes of a RAM block, with session and block 0: a sum over all pages of 4096 bytes of a
//! mix of the page's hash and its number, so that pages may be taken in any order, by several threads, and holes need
//! not be read. A last page that is not whole is filled up with zeros; the length is no part of it. Its 16 hexadecimal
//! digits are the same on every machine, for ever: a test keeps them.
//!
//! RAM is hashed page by page as it moves, while it is in the cache: what is done here, while the guest stands still, is
//! to add up. Reading it all again took 38 ms a GiB, of a mapping on tmpfs, on two cores.

use std::io;
use std::ops::Range;

use pageferry::digest::{Contents, FullDigest};
use pageferry::memory::hash::PageHash;
use pageferry::memory::look::{Look, Seen};
use pageferry::sys::memory::punch_hole;
use pageferry::units::{BlockId, SessionId};
use pageferry::{Ram, RamBlock};

use super::PAGE_BYTES;

/// What the manifest calls it.
pub const NAME: &str = "pf-page-hash-v1";

/// Room for the hashes of the pages of a store's RAM.
pub fn contents(ram: &Ram) -> Result<Contents, String> {
    Contents::new(&ram.shapes()).map_err(|e| format!("no memory for the hashes of the pages: {e}"))
}

/// The digest of a block of which all pages that moved were noted, and nobody writes any more.
pub fn of_noted(contents: &Contents, id: BlockId, block: &RamBlock) -> io::Result<String> {
    let look = Look::new(true, false);
    let read = |page| look.hash_at(block, page).ok_or_else(|| outside(page));
    contents.digest(id, empty(), read).map(text)
}

/// Makes holes of the pages of zeros that were written to, where the file system can.
pub fn dig(contents: &Contents, id: BlockId, block: &RamBlock) -> io::Result<()> {
    let Some(file) = block.fd() else { return Ok(()) };
    let look = Look::new(false, true);
    let dig_up = |pages: &Range<u64>| {
        if !pages.is_empty() {
            let _ = punch_hole(file, pages.start * PAGE_BYTES, (pages.end - pages.start) * PAGE_BYTES);
        }
    };
    let mut zeros = 0..0;
    for page in contents.written_zeros(id) {
        // Its hash says zeros; something else may say so, too.
        if look.at(block, page).ok_or_else(|| outside(page))? != Seen::Zero {
            continue;
        }
        if zeros.end != page {
            dig_up(&zeros);
            zeros.start = page;
        }
        zeros.end = page + 1;
    }
    dig_up(&zeros);
    Ok(())
}

/// The digest of bytes in memory: that of a file that holds them.
pub fn of_bytes(bytes: &[u8]) -> String {
    let (hash, mut digest) = (PageHash::detect(), empty());
    for (number, page) in (0..).zip(bytes.chunks(PAGE_BYTES as usize)) {
        let mut whole = [0; PAGE_BYTES as usize];
        whole[..page.len()].copy_from_slice(page);
        digest.page(number, hash.hash_bytes(&whole));
    }
    text(digest)
}

fn empty() -> FullDigest {
    FullDigest::new(SessionId([0; 16]), BlockId(0))
}

fn text(digest: FullDigest) -> String {
    format!("{:016x}", digest.value())
}

fn outside(page: u64) -> io::Error {
    io::Error::other(format!("internal error: page {page} is outside its block"))
}
