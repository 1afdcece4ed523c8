//! Tracks writes by write protection: userfaultfd's asynchronous mode and PAGEMAP_SCAN, without KVM.
#![forbid(unsafe_code)]

use super::bitmap::DirtyBitmap;
use super::runs::set_range;
use super::{DirtyError, DirtySource};
use crate::memory::{Presence, Ram};
use crate::sys::memory::host_page_bytes;
use crate::sys::pagemap::{self, CHECK_ASYNC, PRESENT, PROTECT_MATCHING, PageRegion, Query, SWAPPED, WRITTEN};
use crate::sys::userfaultfd as uffd;
use crate::units::BlockId;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Tracks every write to this process's mappings of guest RAM: of vCPUs, of threads, of the kernel on their behalf.
///
/// Does not see writes of other processes (vhost-user back ends) and of devices that do DMA: combine it with a
/// [`DirtyBitmap`] that these mark. Needs Linux 6.7.
///
/// What it costs, in milliseconds, for base pages (2 virtual CPUs, Linux 6.18, chunks of 4096 pages; the guest pays
/// about 1 us more for its first write to a page after each harvest):
///
/// | | arm | harvest, clean | harvest, 10 % dirty | harvest, all dirty | disarm |
/// |---|---|---|---|---|---|
/// | anonymous, 1 GiB | 10 to 14 | 0.9 | 2.0 | 14 | 50 |
/// | anonymous, 32 GiB, 1 GiB of it touched | 14 | 4 to 13 | 8 | 16 to 20 | 37 to 50 |
/// | memfd, 1 GiB | 33 | 0.8 | 1.9 | 18 | 30 |
/// | memfd, 8 GiB, 1 GiB of it touched | 38 | 22 | 24 | 31 | 37 |
///
/// ```
/// use pageferry::dirty::{DirtySource, write_protect::WriteProtect};
/// use pageferry::memory::{Backing, Ram, RamBlock};
/// use pageferry::units::{BlockId, PageSize};
///
/// let ram = Ram::new([RamBlock::anonymous("ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?])?;
/// match WriteProtect::new() {
///     Ok(mut tracking) => {
///         tracking.arm(&ram)?;
///         assert_eq!(tracking.begin_round()?, 0);
///     }
///     Err(e) => eprintln!("write protection is not to be had here: {e}"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct WriteProtect {
    pagemap: File,
    /// Opened by `new` for the first arming, so that a VMM can enter its jail in between.
    spare: Option<OwnedFd>,
    /// As many regions as one scan may report before it has to be called again. Made once: a harvest allocates nothing.
    regions: Box<[PageRegion]>,
    armed: Option<Armed>,
}

#[derive(Debug)]
struct Armed {
    /// Declared before `ram`: closing it takes every protection away, and then the memory may go.
    uffd: OwnedFd,
    blocks: Vec<Tracked>,
    /// Bits that were given back, and bits that a scan found outside the range it was asked for.
    kept: DirtyBitmap,
    _ram: Ram,
}

#[derive(Clone, Copy, Debug)]
struct Tracked {
    id: BlockId,
    start: u64,
    end: u64,
    shift: u32,
    kind: Kind,
    /// The kernel protects a hugetlb page as a whole or not at all, so scans of this block are rounded out to this.
    /// Learned by meeting one: what a VMM says of its backing pages may be wrong.
    unit: u64,
}

/// How an entry of the page table that holds nothing is to be understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Private anonymous memory: nobody has written there. It is not touched, so it stays free of page tables, and a
    /// page that comes into being is not protected, so it counts as written.
    HolesAreClean,
    /// All else: reclaim drops entries of a shared page that was written, so it may have been written. At arming every
    /// entry gets a marker, and an entry without one counts as written.
    HolesAreWritten,
}

/// 96 KiB: a chunk of 2^12 pages where every other one is dirty needs two calls.
const REGIONS: usize = 4096;
/// How much is protected in one call: the kernel holds the lock of the memory map for so long.
const PROTECT_BYTES: u64 = 1 << 30;
/// The largest hugetlb page there is: 16 GiB, on Arm and POWER.
const UNIT_BYTES_MAX: u64 = 16 << 30;

impl WriteProtect {
    /// Opens what tracking needs, and finds out whether this system has it.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`], which says what to do: a newer kernel, or a permission.
    pub fn new() -> Result<WriteProtect, DirtyError> {
        let pagemap = pagemap::open().map_err(|source| DirtyError::Unsupported {
            what: "opening /proc/self/pagemap",
            advice: "make /proc readable in this process's namespace",
            source,
        })?;
        let spare = Some(open_uffd()?);
        let regions = vec![PageRegion::default(); REGIONS].into_boxed_slice();
        Ok(WriteProtect { pagemap, spare, regions, armed: None })
    }
}

fn open_uffd() -> Result<OwnedFd, DirtyError> {
    let fd = uffd::open().map_err(|source| DirtyError::Unsupported {
        what: "userfaultfd",
        advice: "allow access to /dev/userfaultfd, or the userfaultfd system call in the seccomp filter",
        source,
    })?;
    uffd::enable_async(fd.as_fd()).map_err(|source| DirtyError::Unsupported {
        what: "asynchronous write protection by userfaultfd",
        advice: "it needs Linux 6.7 or later on x86-64 or Arm, built with CONFIG_PTE_MARKER_UFFD_WP",
        source,
    })?;
    Ok(fd)
}

impl Kind {
    /// What was written, and protects it on the way if `protect`.
    fn query(self, protect: bool) -> Query {
        let flags = if protect { PROTECT_MATCHING | CHECK_ASYNC } else { CHECK_ASYNC };
        match self {
            Kind::HolesAreClean => Query {
                flags,
                inverted: 0,
                all: WRITTEN,
                any: PRESENT | SWAPPED,
                returned: WRITTEN | PRESENT | SWAPPED,
            },
            // Written, or without a page. WRITTEN alone would be less to ask, and enough on Linux 6.18.44, where an empty
            // entry and an absent page table both count as WRITTEN. But up to the middle of 2026 an absent page table
            // (a huge page that was dropped) was reported as nothing at all, and so is an empty entry of hugetlb
            // memory still: both would be lost. The price: entries that hold a marker are reported as well (they count
            // as SWAPPED), 5 ms per GiB of them, and `is_dirty` sorts them out.
            Kind::HolesAreWritten => Query {
                flags,
                inverted: PRESENT,
                all: 0,
                any: WRITTEN | PRESENT,
                returned: WRITTEN | PRESENT | SWAPPED,
            },
        }
    }
}

fn is_dirty(categories: u64) -> bool {
    categories & WRITTEN != 0 || is_hole(categories)
}

fn is_hole(categories: u64) -> bool {
    categories & (WRITTEN | PRESENT | SWAPPED) == 0
}

/// Calls `found` for every dirty stretch of addresses in `start .. end`, and maybe for some around it.
///
/// After an error, part of the range may have been protected without a report.
fn scan(
    pagemap: &File,
    regions: &mut [PageRegion],
    uffd: &OwnedFd,
    block: &mut Tracked,
    range: std::ops::Range<u64>,
    protect: bool,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let query = block.kind.query(protect);
    let (mut at, mut end) = block.round_out(range.start, range.end);
    while at < end {
        let (filled, walked) = pagemap::scan(pagemap, at, end, &query, regions)?;
        for region in regions[..filled].iter().filter(|region| is_dirty(region.categories)) {
            if protect && is_hole(region.categories) {
                // The scan puts a marker only where it sees WRITTEN. A write before this call is in the report that is
                // being made; one after it shows.
                uffd::protect(uffd.as_fd(), region.start, region.end - region.start)?;
            }
            found(region.start, region.end);
        }
        if walked > at {
            at = walked;
            continue;
        }
        // No way on: a dirty hugetlb page here that is only partly in the range. What comes after it may have been
        // reported, but not it: start over from it, with larger pages, until one fits.
        block.unit = block.unit.max(host_page_bytes()) * 2;
        if block.unit > UNIT_BYTES_MAX {
            return Err(io::Error::other("the page map scan does not advance"));
        }
        (at, end) = block.round_out(at, end);
    }
    Ok(())
}

impl Tracked {
    fn round_out(&self, start: u64, end: u64) -> (u64, u64) {
        let down = start & !(self.unit - 1);
        let up = end.checked_next_multiple_of(self.unit).unwrap_or(self.end);
        (down.max(self.start), up.min(self.end))
    }

    fn pages(&self) -> u64 {
        (self.end - self.start) >> self.shift
    }

    /// The tracking pages that a stretch of addresses touches: one dirty host page makes its tracking page dirty.
    fn pages_of(&self, from: u64, to: u64) -> (u64, u64) {
        ((from - self.start) >> self.shift, (to - self.start).div_ceil(1 << self.shift))
    }
}

impl WriteProtect {
    /// Registers every block and protects what it holds, through `uffd`, which is closed on an error.
    fn protect_all(&mut self, uffd: OwnedFd, ram: &Ram) -> Result<Armed, DirtyError> {
        let mut blocks = Vec::with_capacity(ram.blocks().len());
        for (id, block) in ram.iter() {
            let arm_error = |source| DirtyError::Arm { block: id, source };
            let kind = match block.presence() {
                Presence::Anonymous => Kind::HolesAreClean,
                Presence::Shared { .. } | Presence::All => Kind::HolesAreWritten,
            };
            let (start, end) = (block.host_address(), block.host_address() + block.bytes());
            let shift = block.page_size().shift();
            let mut tracked = Tracked { id, start, end, shift, kind, unit: host_page_bytes() };
            uffd::register(uffd.as_fd(), start, end - start).map_err(arm_error)?;
            match kind {
                Kind::HolesAreClean => {
                    scan(&self.pagemap, &mut self.regions, &uffd, &mut tracked, start..end, true, |_, _| {})
                        .map_err(arm_error)?;
                }
                Kind::HolesAreWritten => {
                    for at in (start..end).step_by(PROTECT_BYTES as usize) {
                        uffd::protect(uffd.as_fd(), at, PROTECT_BYTES.min(end - at)).map_err(arm_error)?;
                    }
                }
            }
            blocks.push(tracked);
        }
        Ok(Armed { uffd, blocks, kept: DirtyBitmap::for_ram(ram), _ram: ram.clone() })
    }
}

impl DirtySource for WriteProtect {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.disarm();
        let uffd = self.spare.take().map_or_else(open_uffd, Ok)?;
        self.armed = Some(self.protect_all(uffd, ram)?);
        Ok(())
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        let Armed { uffd, blocks, kept, .. } = armed;
        let mut dirty = kept.count();
        for block in blocks {
            let shape = *block;
            let mut counted = 0;
            scan(&self.pagemap, &mut self.regions, uffd, block, shape.start..shape.end, false, |from, to| {
                let (first, end) = shape.pages_of(from, to);
                // Two stretches may meet in one tracking page, which counts once, as does a page that is kept as well.
                let first = first.max(counted);
                if first < end {
                    dirty += end - first - kept.count_range(shape.id, first, end - first);
                    counted = end;
                }
            })
            .map_err(|source| DirtyError::Scan { block: shape.id, first_page: 0, source })?;
        }
        Ok(dirty)
    }

    /// A scan that fails midway has protected a part without a report: `words` is all ones then (up to the end of the
    /// block), and the error is returned as well.
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        // Before the scan: bits it finds outside the range are kept, and those inside go straight into `words`.
        if !armed.kept.take(block, first_page, words) {
            return Err(DirtyError::OutOfRange { block, first_page, words: words.len() });
        }
        let Armed { uffd, blocks, kept, .. } = armed;
        let tracked = &mut blocks[usize::from(block.0)];
        let shape = *tracked;
        let past = shape.pages().min(first_page + words.len() as u64 * 64);
        let range = shape.start + (first_page << shape.shift)..shape.start + (past << shape.shift);
        let scanned = scan(&self.pagemap, &mut self.regions, uffd, tracked, range.clone(), true, |from, to| {
            let (first, end) = shape.pages_of(from, to);
            let (inside_first, inside_end) = (first.max(first_page), end.min(past));
            if inside_first < inside_end {
                set_range(words, inside_first - first_page, inside_end - first_page);
            }
            if first < first_page {
                kept.mark_range(block, first, end.min(first_page) - first);
            }
            if end > past {
                kept.mark_range(block, first.max(past), end - first.max(past));
            }
        });
        scanned.map_err(|source| {
            set_range(words, 0, past - first_page);
            // What was scanned around the range may have been protected, too.
            let (from, to) = tracked.round_out(range.start, range.end);
            let (first, end) = shape.pages_of(from, to);
            kept.mark_range(block, first, end - first);
            DirtyError::Scan { block, first_page, source }
        })
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        let kept = armed.kept.put_back(block, first_page, words);
        if kept { Ok(()) } else { Err(DirtyError::OutOfRange { block, first_page, words: words.len() }) }
    }

    fn disarm(&mut self) {
        let Some(armed) = self.armed.take() else { return };
        for block in &armed.blocks {
            // Fails where the VMM has unmapped the block meanwhile; closing the descriptor settles the rest.
            let _ = uffd::unregister(armed.uffd.as_fd(), block.start, block.end - block.start);
        }
    }
}

impl Drop for WriteProtect {
    fn drop(&mut self) {
        self.disarm();
    }
}
