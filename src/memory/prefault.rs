//! Makes the pages of a packet before its bytes come, where they would else be made one by one as page faults.
//!
//! A fault costs more than the copy that takes it: into memory that is mapped, a GiB is copied in 0.1 s; into a file in a
//! tmpfs, of which nothing is there, in 0.85. But prefaulting what is there costs half of a copy, so each lane finds out
//! what its memory is like: the kernel counts the faults of every thread, those in system calls included. `Habit` is what
//! it makes of them.
//!
//! **Only pages that a packet names are made.** Where the kernel backs memory by huge pages, it makes the whole one that
//! the first of them lies in, as it would for the copy.

// UNSAFETY: madvise(2) and mincore(2) take addresses.
#![expect(unsafe_code)]

use super::Ram;
use super::block::{Presence, RamBlock, RawRange};
use super::scatter::Scatter;
use crate::sys::memory::{advise, allocate, host_page_bytes, is_in_core, is_in_tmpfs};
use crate::sys::thread::page_faults;
use crate::units::BlockId;
use std::io;
use std::os::fd::AsFd;

/// Runs shorter than this are left to faults: a system call for each would cost as much.
const RUN_HOST_PAGES_MIN: u64 = 16;

/// What one fault in a file that is in memory maps at a time, at multiples of it: the kernel's default.
const FAULT_AROUND_BYTES: usize = 64 << 10;

/// What a lane has learned about one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Habit {
    on: bool,
    /// The kernel would not have it: for good.
    refused: bool,
}

impl Habit {
    /// Learns from a packet of `pages` host pages, which took `faults` from the first thought of it to its last byte.
    ///
    /// Without prefaulting, a packet takes no faults if its pages are mapped, one a page if they are not, and one in 512
    /// where they become huge pages, for which nothing need be done. With it there are as many faults as pages or one in
    /// 16, and next to none once there was nothing to make.
    fn learn(&mut self, faults: u64, pages: u64) {
        self.on = if self.on { faults * 32 > pages } else { faults * 8 > pages };
    }
}

/// How the pages of a block come into being.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// One by one, with MADV_POPULATE_WRITE.
    Any,
    /// Shared, in a tmpfs: what is in memory is mapped 16 at a time by a fault that reads, and may be written to then;
    /// what is not is allocated by the file sooner than by faults.
    Tmpfs,
}

/// What a lane did for one packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Prefaulted {
    /// Bytes of pages that were made or mapped.
    pub bytes: u64,
    /// System calls.
    pub calls: u64,
}

/// Prefaults for one lane. Refusals are no errors: whatever stands against the page will be said when bytes are to land.
#[derive(Debug)]
pub struct Prefault {
    host_page_bytes: u64,
    blocks: Vec<(Kind, Habit)>,
    /// Of the packet that is being received: the faults of this thread before it, and its host pages.
    packet: Option<(u64, u64)>,
}

impl Prefault {
    /// Prefaulting that knows nothing yet.
    pub fn new(ram: &Ram) -> Prefault {
        let kind = |block: &RamBlock| match block.presence() {
            Presence::Shared { fd, .. } if is_in_tmpfs(fd.as_fd()) => Kind::Tmpfs,
            Presence::Shared { .. } | Presence::Anonymous | Presence::All => Kind::Any,
        };
        let blocks = ram.blocks().iter().map(|block| (kind(block), Habit::default())).collect();
        Prefault { host_page_bytes: host_page_bytes(), blocks, packet: None }
    }

    /// Before the first byte of a packet comes, whose runs are all in `scatter` and of this block.
    pub fn before(&mut self, id: BlockId, block: &RamBlock, scatter: &Scatter) -> Prefaulted {
        self.packet = None;
        let mut done = Prefaulted::default();
        let Some((kind, habit)) = self.blocks.get_mut(usize::from(id.0)) else { return done };
        let least_bytes = (RUN_HOST_PAGES_MIN * self.host_page_bytes) as usize;
        let long = || scatter.ranges().filter(|range| range.len >= least_bytes);
        if habit.refused || long().next().is_none() {
            return done;
        }
        let bytes = scatter.ranges().map(|range| range.len as u64).sum::<u64>();
        self.packet = Some((page_faults(), bytes / self.host_page_bytes));
        done.calls = 2;
        if !habit.on {
            return done;
        }
        for range in long() {
            if make(*kind, block, range, &mut done.calls).is_err() {
                *habit = Habit { on: false, refused: true };
                break;
            }
            done.bytes += range.len as u64;
        }
        done
    }

    /// After the last byte of the packet.
    pub fn after(&mut self, id: BlockId) {
        let habit = self.blocks.get_mut(usize::from(id.0)).map(|(_, habit)| habit);
        if let (Some((faults, pages)), Some(habit)) = (self.packet.take(), habit) {
            habit.learn(page_faults().saturating_sub(faults), pages);
        }
    }
}

/// Makes the pages of a range, which is in the block, or maps those that are there.
fn make(kind: Kind, block: &RamBlock, range: RawRange, calls: &mut u64) -> io::Result<()> {
    *calls += 1;
    // SAFETY: the range was proved by RamBlock::range and begins at a page; nothing is changed.
    if kind == Kind::Tmpfs && unsafe { is_in_core(range.ptr) } {
        return map_around(range, calls);
    }
    if let (Kind::Tmpfs, Presence::Shared { fd, offset }) = (kind, block.presence()) {
        let (first, bytes) = (range.ptr as u64 - block.host_address(), range.len as u64);
        // The file may end inside the block's last page, and nothing is allocated behind its end.
        if first + bytes < block.bytes() {
            *calls += 1;
            // This may fail where populating does not, with a descriptor for reading: then it is slower by a fifth.
            let _ = allocate(fd.as_fd(), offset + first, bytes);
        }
    }
    *calls += 1;
    // SAFETY: as above; populating changes no content.
    unsafe { advise(range.ptr, range.len, libc::MADV_POPULATE_WRITE) }
}

/// Has one page read in each piece that the kernel maps at a time.
fn map_around(range: RawRange, calls: &mut u64) -> io::Result<()> {
    let mut done = 0;
    while done < range.len {
        let at = range.ptr.wrapping_add(done);
        *calls += 1;
        // SAFETY: `at` is inside the range, which RamBlock::range proved, and at a multiple of the host's page; the
        // kernel rounds the length of 1 up to the page. Populating changes no content.
        unsafe { advise(at, 1, libc::MADV_POPULATE_READ) }?;
        done += FAULT_AROUND_BYTES - at as usize % FAULT_AROUND_BYTES;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 256;

    /// Whether it is on after packets that took these faults each.
    fn on_after(faults: &[u64]) -> bool {
        let mut habit = Habit::default();
        faults.iter().for_each(|&faults| habit.learn(faults, PAGES));
        habit.on
    }

    #[test]
    fn faults_switch_it_on_and_their_absence_off() {
        assert!(!on_after(&[]), "nothing is known of the first packet");
        assert!(!on_after(&[0, 1, 3]), "mapped, but for the lane's own tables");
        assert!(!on_after(&[1, 0, 1, 0]), "huge pages");
        assert!(on_after(&[PAGES, PAGES, PAGES]), "nothing is there");
        assert!(on_after(&[PAGES, PAGES / 16, PAGES / 16]), "a file that is in memory, mapped 16 pages at a time");
        assert!(!on_after(&[PAGES, PAGES, 1]), "everything was there");
        assert!(on_after(&[PAGES, 0, PAGES / 2]), "half of it was there");
    }
}
