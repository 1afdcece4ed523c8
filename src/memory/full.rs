#![forbid(unsafe_code)]
//! Digests of every byte of guest RAM, for `verify = full`: several threads share the work.

use std::thread;

use crate::digest::FullDigest;
use crate::memory::Ram;
use crate::memory::look::Look;
use crate::sys::thread::with_signals_blocked;
use crate::units::{BlockId, SessionId};

/// Pages that a thread hashes before it looks for more: 16 MiB of 4 KiB pages.
const PAGES_AT_ONCE: u64 = 4096;

/// A digest a block of all its bytes, holes included. Nobody may write guest RAM meanwhile.
///
/// A thread that cannot be had costs time and nothing else: the caller's own does all that is left.
pub fn digests(ram: &Ram, session: SessionId, threads: usize) -> Vec<u64> {
    ram.iter().map(|(id, _)| digest(ram, id, session, threads)).collect()
}

fn digest(ram: &Ram, id: BlockId, session: SessionId, threads: usize) -> u64 {
    let pages = ram.block(id).map_or(0, |block| block.pages());
    let part = |worker: u64, of: u64| {
        let mut digest = FullDigest::new(session, id);
        let look = Look::new(true, false);
        let Some(block) = ram.block(id) else { return digest };
        let mut first = worker * PAGES_AT_ONCE;
        while first < pages {
            for page in first..pages.min(first + PAGES_AT_ONCE) {
                if let Some(hash) = look.hash_at(block, page) {
                    digest.page(page, hash);
                }
            }
            first += of * PAGES_AT_ONCE;
        }
        digest
    };
    let of = (threads as u64).clamp(1, pages.div_ceil(PAGES_AT_ONCE).max(1));
    let mut sum = FullDigest::new(session, id);
    thread::scope(|scope| {
        // Signals are the VMM's: none is to be handled on a thread of ours.
        let others: Vec<_> = with_signals_blocked(|| {
            let begin = |worker| {
                let name = format!("pf-hash-{worker}");
                (worker, thread::Builder::new().name(name).spawn_scoped(scope, move || part(worker, of)))
            };
            (1..of).map(begin).collect()
        });
        sum.merge(part(0, of));
        for (worker, other) in others {
            match other.map(|thread| thread.join()) {
                Ok(Ok(digest)) => sum.merge(digest),
                Ok(Err(_)) | Err(_) => sum.merge(part(worker, of)),
            }
        }
    });
    sum.value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, RamBlock};
    use crate::units::PageSize;

    #[test]
    fn the_number_of_threads_does_not_change_the_digest() {
        let bytes = 3 * PAGES_AT_ONCE * 4096 + 4096;
        let block = RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap();
        let ram = Ram::new([block]).unwrap();
        let session = SessionId([3; 16]);
        assert_eq!(digests(&ram, session, 1), digests(&ram, session, 3));
        assert_ne!(digests(&ram, session, 1), digests(&ram, SessionId([4; 16]), 1));
    }
}
