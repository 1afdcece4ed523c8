//! /proc/self/pagemap: which pages exist and which were written, and the scan that protects them on the way.

// UNSAFETY: an ioctl whose argument holds addresses of a local buffer. No crate has it.
#![expect(unsafe_code)]

use super::cvt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// The page has no write-protection marker: written since it was last protected, or never protected.
pub(crate) const WRITTEN: u64 = 1 << 1;
/// The page is in memory.
pub(crate) const PRESENT: u64 = 1 << 3;
/// The page is in swap, or its table entry holds a marker instead of a page.
pub(crate) const SWAPPED: u64 = 1 << 4;

/// Write-protects the pages that match and are [`WRITTEN`], in the same walk that reports them.
pub(crate) const PROTECT_MATCHING: u64 = 1 << 0;
/// Fails with EPERM at memory that is not registered for asynchronous write protection.
pub(crate) const CHECK_ASYNC: u64 = 1 << 1;

/// `struct page_region` of linux/fs.h: adjacent pages of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// Which pages a scan reports, and what it does to them. A category in `inverted` counts as its opposite in `all`
/// and `any`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    /// [`PROTECT_MATCHING`], [`CHECK_ASYNC`].
    pub(crate) flags: u64,
    pub(crate) inverted: u64,
    pub(crate) all: u64,
    pub(crate) any: u64,
    pub(crate) returned: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: libc::c_ulong = (3 << 30) | ((size_of::<PmScanArg>() as libc::c_ulong) << 16) | (0x66 << 8) | 16;

/// Opens the page map of this process. It stays the map of this process whoever holds the descriptor later.
pub(crate) fn open() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// ioctl(PAGEMAP_SCAN), kernel 6.7 on, over the addresses `start .. end`: how many entries of `regions` it filled,
/// and where it stopped because they were full (`end` if they sufficed).
///
/// Not called again after EINTR: a scan that protects has forgotten, by then, what it found. The caller has to
/// count the whole range as written after any error.
pub(crate) fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    query: &Query,
    regions: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: query.flags,
        start,
        end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: query.inverted,
        category_mask: query.all,
        category_anyof_mask: query.any,
        return_mask: query.returned,
    };
    // SAFETY: `argument` is the struct that the request number encodes by size; `vec` and `vec_len` are the borrowed
    // slice, and the kernel writes at most `vec_len` regions. The pages scanned are neither read nor written.
    let filled = cvt(i64::from(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &mut argument) }))?;
    Ok((regions.len().min(filled as usize), argument.walk_end))
}

/// Reads one 8-byte entry per host page from page number `first` on: the way before kernel 6.7.
pub(crate) fn entries(pagemap: &File, first: u64, buffer: &mut [u8]) -> io::Result<()> {
    pagemap.read_exact_at(buffer, first * 8)
}

/// Whether an entry that [`entries`] read stands for a page that is present (bit 63) or swapped (bit 62).
pub(crate) fn entry_exists(entry: [u8; 8]) -> bool {
    u64::from_ne_bytes(entry) >> 62 != 0
}
