//! Which pages of guest RAM exist: the others read as zeros, and reading them to find out would create them.
#![forbid(unsafe_code)]

use super::Ram;
use super::block::{Presence, RamBlock};
use crate::dirty::runs::clear_range;
use crate::sys::memory::{host_page_bytes, seek_data, seek_hole};
use crate::sys::pagemap::{self, PRESENT, PageRegion, Query, SWAPPED};
use crate::units::BlockId;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Answers, during one migration, which pages of its RAM exist. Opens what it needs once.
///
/// **Order.** First arm the dirty source (or clear the range in it), then ask: a page that comes into being after the
/// answer has been written after the arming, and is reported as dirty. The other way round it can be missed.
///
/// **Fails safe.** Whatever cannot be found out counts as existing. An answer "does not exist" is always proven.
///
/// Not for verifying: a digest over all of RAM reads every byte and trusts no map.
///
/// ```
/// use pageferry::memory::{Backing, PresenceMap, Ram, RamBlock};
/// use pageferry::units::{BlockId, PageSize};
///
/// let block = RamBlock::memfd("ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?;
/// let ram = Ram::new([block])?;
/// let page = ram.blocks()[0].range(3, 1).unwrap();
/// // SAFETY: the page is in the block, and nothing else uses it.
/// unsafe { page.ptr.write(1) };
///
/// let mut words = [u64::MAX; 4];
/// PresenceMap::new(&ram).keep_present(BlockId(0), 0, &mut words)?;
/// // The last page of a shared mapping always counts as existing, see `Presence::Shared`.
/// assert_eq!(words, [1 << 3, 0, 0, 1 << 63]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PresenceMap {
    pagemap: Pagemap,
    blocks: Vec<Asked>,
}

/// What a migration needs to know of one block in order to ask about it. No pointer is followed here.
#[derive(Debug)]
struct Asked {
    address: u64,
    pages: u64,
    shift: u32,
    how: How,
}

#[derive(Debug)]
enum How {
    Anonymous,
    Shared {
        file: OwnedFd,
        offset: u64,
        /// The stretch of data met last. The kernel finds a stretch's end page by page, and a stretch may be as long as
        /// the block: asking anew in every chunk would take a time that grows with the square of it (measured: 300 ms
        /// instead of 12 for 1 GiB of data in chunks of 16 MiB). It can only err by counting a page as existing.
        data: Range<u64>,
    },
    /// Nobody can be asked: every page counts as existing.
    All,
}

/// The page map of this process, and which of the two ways to read it works.
#[derive(Debug)]
enum Pagemap {
    /// PAGEMAP_SCAN, kernel 6.7 on: skips holes by whole page tables.
    Scan {
        file: File,
        regions: Box<[PageRegion]>,
    },
    /// One 8-byte entry per page.
    Entries {
        file: File,
        buffer: Box<[u8]>,
    },
    None,
}

/// How many regions one scan may report: 24 KiB, enough for 64 pages of 64 KiB that alternate at 4 KiB.
const REGIONS: usize = 1024;
/// How many entries are read at a time: 32 KiB.
const ENTRIES: usize = 4096;

const EXISTING: Query = Query { flags: 0, inverted: 0, all: 0, any: PRESENT | SWAPPED, returned: PRESENT | SWAPPED };

impl PresenceMap {
    /// A map for the blocks of `ram`. Where the system refuses (no /proc in a jail), pages count as existing.
    pub fn new(ram: &Ram) -> PresenceMap {
        PresenceMap::of_blocks(ram.blocks())
    }

    pub(crate) fn of_blocks(blocks: &[RamBlock]) -> PresenceMap {
        let blocks: Vec<Asked> = blocks.iter().map(Asked::new).collect();
        let ask_pagemap = blocks.iter().any(|block| matches!(block.how, How::Anonymous));
        PresenceMap { pagemap: if ask_pagemap { Pagemap::open() } else { Pagemap::None }, blocks }
    }

    /// Clears, in `words`, the bits of pages that do not exist; bit 0 is `first_page`, a multiple of 64. Does not
    /// allocate.
    ///
    /// # Errors
    /// What the kernel answered. The bits that are set still are the pages that exist or may exist: an error may be
    /// reported and then forgotten.
    pub fn keep_present(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> io::Result<()> {
        let asked = self.blocks.get_mut(usize::from(block.0)).ok_or(io::ErrorKind::InvalidInput)?;
        if first_page % 64 != 0 || first_page >= asked.pages {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let pages = (asked.pages - first_page).min(words.len() as u64 * 64);
        // Pages past the end of the block exist in no sense.
        let past = words.len() as u64 * 64;
        clear_range(words, pages, past);
        let shift = asked.shift;
        let mut gaps = Gaps { words, end: 0 };
        match &mut asked.how {
            How::All => return Ok(()),
            How::Anonymous => {
                let start = asked.address + (first_page << shift);
                self.pagemap.existing(start, start + (pages << shift), |from, to| {
                    gaps.exists((from - start) >> shift, (to - start).div_ceil(1 << shift));
                })?;
            }
            How::Shared { file, offset, data } => {
                let start = *offset + (first_page << shift);
                let end = start + (pages << shift);
                let mut at = start;
                while at < end {
                    if !data.contains(&at) {
                        let Some(from) = seek_data(file.as_fd(), at)?.filter(|&from| from < end) else { break };
                        // At least one byte: somebody may punch this very data between the two calls.
                        *data = from..seek_hole(file.as_fd(), from)?.max(from + 1);
                    }
                    let (from, to) = (data.start.max(at), data.end.min(end));
                    gaps.exists((from - start) >> shift, (to - start).div_ceil(1 << shift));
                    at = to;
                }
                if first_page + pages == asked.pages {
                    gaps.exists(pages - 1, pages);
                }
            }
        }
        gaps.exists(pages, pages);
        Ok(())
    }
}

/// Clears the bits between the ranges that exist, as they come in. After an error nothing more is cleared, and what
/// was cleared before it was proven.
struct Gaps<'a> {
    words: &'a mut [u64],
    /// All before this page is settled.
    end: u64,
}

impl Gaps<'_> {
    /// The pages `from .. to` exist, and none between the last range and this one.
    fn exists(&mut self, from: u64, to: u64) {
        clear_range(self.words, self.end, from);
        self.end = self.end.max(to);
    }
}

impl Asked {
    fn new(block: &RamBlock) -> Asked {
        let how = match block.presence() {
            Presence::Anonymous => How::Anonymous,
            Presence::All => How::All,
            Presence::Shared { fd, offset } => match reopen(fd) {
                Ok(file) => How::Shared { file, offset: *offset, data: 0..0 },
                Err(_) => How::All,
            },
        };
        Asked { address: block.host_address(), pages: block.pages(), shift: block.page_size().shift(), how }
    }
}

/// A description of our own for the file of a block: seeking in the VMM's own would move the VMM's file offset.
fn reopen(fd: &OwnedFd) -> io::Result<OwnedFd> {
    // Where there is no /proc, a duplicate has to do: see `Presence::Shared`.
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(OwnedFd::from).or_else(|_| fd.try_clone())
}

impl Pagemap {
    fn open() -> Pagemap {
        let Ok(file) = pagemap::open() else { return Pagemap::None };
        let mut regions = vec![PageRegion::default(); REGIONS].into_boxed_slice();
        // An empty range is a complete question: an old kernel answers ENOTTY to any.
        match pagemap::scan(&file, 0, 0, &EXISTING, &mut regions) {
            Ok(_) => Pagemap::Scan { file, regions },
            Err(_) => Pagemap::Entries { file, buffer: vec![0; ENTRIES * 8].into_boxed_slice() },
        }
    }

    /// Calls `exists` for every stretch of addresses that exists in `start .. end`, in order.
    fn existing(&mut self, start: u64, end: u64, mut exists: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut at = start;
        match self {
            Pagemap::Scan { file, regions } => {
                while at < end {
                    let (found, walked) = pagemap::scan(file, at, end, &EXISTING, regions)?;
                    regions[..found].iter().for_each(|region| exists(region.start, region.end));
                    if walked <= at {
                        return Err(io::Error::other("the page map scan does not advance"));
                    }
                    at = walked;
                }
            }
            Pagemap::Entries { file, buffer } => {
                let host_page = host_page_bytes();
                while at < end {
                    let entries = ((end - at) / host_page).min(ENTRIES as u64);
                    let read = &mut buffer[..entries as usize * 8];
                    pagemap::entries(file, at / host_page, read)?;
                    for entry in read.chunks_exact(8) {
                        if pagemap::entry_exists(entry.try_into().unwrap_or([u8::MAX; 8])) {
                            exists(at, at + host_page);
                        }
                        at += host_page;
                    }
                }
            }
            Pagemap::None => exists(start, end),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use crate::units::PageSize;

    fn touched(pages: &[u64]) -> Ram {
        let block = RamBlock::anonymous("ram", 0, 4096 * 9000, PageSize::SIZE_4K, Backing::Base).unwrap();
        for &page in pages {
            block.fill_page(page, 1);
        }
        Ram::new([block]).unwrap()
    }

    #[test]
    fn both_ways_to_read_the_page_map_agree() {
        let ram = touched(&[0, 63, 64, 511, 512, 513, 4095, 4096, 8191, 8999]);
        let mut by_entries = PresenceMap::new(&ram);
        by_entries.pagemap = Pagemap::Entries {
            file: pagemap::open().expect("/proc/self/pagemap"),
            buffer: vec![0; ENTRIES * 8].into_boxed_slice(),
        };
        let (mut default, mut entries) = (vec![u64::MAX; 141], vec![u64::MAX; 141]);
        PresenceMap::new(&ram).keep_present(BlockId(0), 0, &mut default).unwrap();
        by_entries.keep_present(BlockId(0), 0, &mut entries).unwrap();
        assert_eq!(default, entries);
        assert_eq!(crate::dirty::runs::count(&entries), 10);
    }

    #[test]
    fn without_a_page_map_every_page_exists() {
        let mut map = PresenceMap::new(&touched(&[5]));
        map.pagemap = Pagemap::None;
        let mut words = [u64::MAX; 141];
        map.keep_present(BlockId(0), 0, &mut words).unwrap();
        assert_eq!(crate::dirty::runs::count(&words), 9000);
    }

    #[test]
    fn an_error_keeps_what_is_not_settled() {
        let mut map = PresenceMap::new(&touched(&[5, 70]));
        // A page map that cannot be read: reads from a directory fail.
        map.pagemap = Pagemap::Entries { file: File::open("/proc/self").unwrap(), buffer: vec![0; ENTRIES * 8].into() };
        let mut words = [u64::MAX, 0b1010];
        assert!(map.keep_present(BlockId(0), 0, &mut words).is_err());
        assert_eq!(words, [u64::MAX, 0b1010]);
    }
}
