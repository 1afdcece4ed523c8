#![forbid(unsafe_code)]
//! Digests of every byte of guest RAM, for `verify = full`: several threads share the work, and the driver goes on.

use std::thread::{self, Scope};

use crossbeam_queue::ArrayQueue;

use crate::digest::FullDigest;
use crate::memory::Ram;
use crate::memory::look::Look;
use crate::sync::AtomicBool;
use crate::sync::Ordering::Relaxed;
use crate::sys::thread::with_signals_blocked;
use crate::units::{BlockId, SessionId};

/// Pages that a thread hashes before it looks for more: 16 MiB of 4 KiB pages.
const PAGES_AT_ONCE: u64 = 4096;

/// Work that is going on, or done, or not wanted any more.
#[derive(Debug)]
pub struct Hashing {
    stop: AtomicBool,
    done: ArrayQueue<Vec<u64>>,
}

impl Default for Hashing {
    fn default() -> Hashing {
        Hashing { stop: AtomicBool::new(false), done: ArrayQueue::new(1) }
    }
}

impl Hashing {
    /// Starts on other threads; `ring` is called when [`Hashing::take`] has something to give. If no thread is to be
    /// had, it is done when this returns.
    pub fn start<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        ram: &'s Ram,
        session: SessionId,
        threads: usize,
        ring: impl Fn() + Send + 's,
    ) {
        let work = move || {
            // Two answers cannot come: the queue's one place is free.
            let _ = self.done.push(digests(ram, session, threads, &self.stop));
            ring();
        };
        let named = thread::Builder::new().name("pf-hash".to_owned());
        if with_signals_blocked(|| named.spawn_scoped(scope, work)).is_err() {
            let _ = self.done.push(digests(ram, session, threads, &self.stop));
        }
    }

    /// The digests, if they are there.
    pub fn take(&self) -> Option<Vec<u64>> {
        self.done.pop()
    }

    /// Makes it end soon, with digests of no worth.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

/// A digest a block of all its bytes, holes included. Nobody may write guest RAM meanwhile.
///
/// A thread that cannot be had costs time and nothing else: the caller's own does all that is left.
fn digests(ram: &Ram, session: SessionId, threads: usize, stop: &AtomicBool) -> Vec<u64> {
    ram.iter().map(|(id, _)| digest(ram, id, session, threads, stop)).collect()
}

fn digest(ram: &Ram, id: BlockId, session: SessionId, threads: usize, stop: &AtomicBool) -> u64 {
    let pages = ram.block(id).map_or(0, |block| block.pages());
    let part = |worker: u64, of: u64| {
        let mut digest = FullDigest::new(session, id);
        let look = Look::new(true, false);
        let Some(block) = ram.block(id) else { return digest };
        let mut first = worker * PAGES_AT_ONCE;
        while first < pages {
            for page in first..pages.min(first + PAGES_AT_ONCE) {
                // For each page: one that nobody touched takes the kernel long, sixteen times so if it has 64 KiB.
                if stop.load(Relaxed) {
                    return digest;
                }
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
        let others: Vec<_> = (1..of)
            .map(|worker| {
                let name = format!("pf-hash-{worker}");
                let spawn = || thread::Builder::new().name(name).spawn_scoped(scope, move || part(worker, of));
                (worker, with_signals_blocked(spawn))
            })
            .collect();
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
        let (session, stop) = (SessionId([3; 16]), AtomicBool::new(false));
        assert_eq!(digests(&ram, session, 1, &stop), digests(&ram, session, 3, &stop));
        assert_ne!(digests(&ram, session, 1, &stop), digests(&ram, SessionId([4; 16]), 1, &stop));
    }
}
