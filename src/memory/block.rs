//! One RAM block: a piece of guest RAM mapped into this process, and every bounds check on it.

// UNSAFETY: guest RAM is raw pointers and lengths. The guest writes under us, so no reference to it may ever exist.
#![expect(unsafe_code)]

use super::{MemoryError, NAME_BYTES_MAX};
use crate::sys::memory::{advise, host_page_bytes};
use crate::units::PageSize;
use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

/// How to find out which pages of a block exist. A wrong claim loses pages; [`Presence::All`] is never wrong.
#[derive(Debug, Default)]
pub enum Presence {
    /// Private anonymous memory (hugetlb, too) without a missing-page handler: a page without a table entry reads as
    /// zeros.
    Anonymous,
    /// A MAP_SHARED mapping of a memfd or file: a hole of the file reads as zeros. The last page always counts as
    /// existing, because the bytes after a file's end are not in the file.
    Shared {
        /// The file, a descriptor of the block's own. Where /proc cannot be read, its file offset moves.
        fd: OwnedFd,
        /// Where in the file the block begins.
        offset: u64,
    },
    /// Anything else (private file mappings, memory with a missing-page handler): every page counts as existing.
    #[default]
    All,
}

/// How a target makes a block read as zeros before pages arrive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Initial {
    /// It is fresh and reads as zeros: the VMM vouches for it.
    Zeroed,
    /// Its memory may be given back to the system. Not for memory pinned for DMA: devices would keep the old pages.
    Punch,
    /// Zeros are written, only where something else stands.
    #[default]
    Overwrite,
}

/// Where some pages of a block are in this process. Made by [`RamBlock::range`], which proved the bounds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RawRange {
    /// The first byte. Valid for as long as the block lives; the guest writes here at any time.
    pub ptr: *mut u8,
    /// The number of bytes; never 0.
    pub len: usize,
}

/// One piece of guest RAM, mapped into this process.
///
/// ```
/// use pageferry::memory::{Backing, RamBlock};
/// use pageferry::units::PageSize;
///
/// let block = RamBlock::anonymous("pc.ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?;
/// assert_eq!(block.pages(), 256);
/// assert_eq!(block.range(255, 1).unwrap().len, 4096);
/// assert_eq!(block.range(255, 2), None);
/// # Ok::<(), pageferry::memory::MemoryError>(())
/// ```
pub struct RamBlock {
    name: String,
    guest_address: u64,
    host: *mut u8,
    bytes: u64,
    page_size: PageSize,
    backing_page_bytes: u64,
    writable: bool,
    presence: Presence,
    initial: Initial,
    /// Last: whatever unmaps the memory goes after everything that speaks of it. Several, because a block that owns its
    /// mapping may be given something more to hold, and must not let go of the mapping then.
    keep_alive: Vec<Box<dyn Any + Send + Sync>>,
}

// SAFETY: `host` is only ever handed out as a raw pointer; whoever follows it says in its own SAFETY why it may. All
// else in the block is Send, and nothing changes once it is built.
unsafe impl Send for RamBlock {}
// SAFETY: as above: `&RamBlock` gives numbers and raw pointers, and no interior mutability.
unsafe impl Sync for RamBlock {}

impl RamBlock {
    /// A block the VMM has mapped itself. Its presence is [`Presence::All`] and its initial state
    /// [`Initial::Overwrite`] until told otherwise.
    ///
    /// # Errors
    /// A bad name, a pointer or length that is not a multiple of the page, or a page smaller than the host's.
    ///
    /// # Safety
    /// `host .. host + bytes` is mapped for reading and writing for as long as the block, and every
    /// [`Ram`](super::Ram) it becomes part of, lives (see [`with_keep_alive`](Self::with_keep_alive)), and no Rust
    /// reference into it exists meanwhile.
    pub unsafe fn new(
        name: &str,
        guest_address: u64,
        host: *mut u8,
        bytes: u64,
        page_size: PageSize,
    ) -> Result<RamBlock, MemoryError> {
        check(name, guest_address, bytes, page_size)?;
        let address = host as u64;
        if host.is_null() || address % page_size.bytes() != 0 {
            return Err(MemoryError::BadPointer { name: name.to_owned(), address, page_size });
        }
        if address.checked_add(bytes).is_none() {
            return Err(MemoryError::BadLength { name: name.to_owned(), bytes, page_bytes: page_size.bytes() });
        }
        Ok(RamBlock {
            name: name.to_owned(),
            guest_address,
            host,
            bytes,
            page_size,
            backing_page_bytes: host_page_bytes(),
            writable: true,
            presence: Presence::All,
            initial: Initial::Overwrite,
            keep_alive: Vec::new(),
        })
    }

    /// Holds what owns the mapping, too, for as long as the block lives.
    #[must_use]
    pub fn with_keep_alive(mut self, keep_alive: impl Any + Send + Sync) -> Self {
        self.keep_alive.push(Box::new(keep_alive));
        self
    }

    /// Says that the mapping may only be read.
    #[must_use]
    pub(super) fn with_writable(self, writable: bool) -> Self {
        RamBlock { writable, ..self }
    }

    /// Says how to find out which pages exist. A wrong claim loses pages.
    #[must_use]
    pub fn with_presence(self, presence: Presence) -> Self {
        RamBlock { presence, ..self }
    }

    /// Says that the block is a MAP_SHARED mapping of this file from `offset` on, which gets duplicated.
    ///
    /// # Errors
    /// No descriptor was free.
    pub fn with_shared_file(self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<Self> {
        let fd = fd.try_clone_to_owned()?;
        Ok(self.with_presence(Presence::Shared { fd, offset }))
    }

    /// Says how a target may make the block read as zeros.
    #[must_use]
    pub fn with_initial(self, initial: Initial) -> Self {
        RamBlock { initial, ..self }
    }

    /// Says what size the pages are that back the block: an attribute for prefaulting and punching, up to 1 GiB.
    #[must_use]
    pub fn with_backing_page_bytes(self, backing_page_bytes: u64) -> Self {
        RamBlock { backing_page_bytes, ..self }
    }

    /// Its name, the same on both sides of a migration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the guest sees it.
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// Where this process sees it, as a number.
    pub fn host_address(&self) -> u64 {
        self.host as u64
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its tracking page.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Its length in tracking pages.
    #[inline]
    pub fn pages(&self) -> u64 {
        self.bytes >> self.page_size.shift()
    }

    /// The size of the pages that back it.
    pub fn backing_page_bytes(&self) -> u64 {
        self.backing_page_bytes
    }

    /// Whether it may be written to: only a file mapped for reading may not.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// How to find out which of its pages exist.
    pub fn presence(&self) -> &Presence {
        &self.presence
    }

    /// How a target may make it read as zeros.
    pub fn initial(&self) -> Initial {
        self.initial
    }

    /// The file it maps, if it shares one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.presence {
            Presence::Shared { fd, .. } => Some(fd.as_fd()),
            Presence::Anonymous | Presence::All => None,
        }
    }

    /// Where `pages` pages from page `first` on are. `None` if they are not all in the block, or if there are none:
    /// the one place where numbers, a peer's among them, become a pointer.
    #[inline]
    pub fn range(&self, first: u64, pages: u64) -> Option<RawRange> {
        let end = first.checked_add(pages)?;
        if pages == 0 || end > self.pages() {
            return None;
        }
        let shift = self.page_size.shift();
        // SAFETY: first < end <= self.pages(), so the offset is below `bytes`, which is one mapping (contract of `new`).
        let ptr = unsafe { self.host.add((first << shift) as usize) };
        Some(RawRange { ptr, len: (pages << shift) as usize })
    }

    /// Says to the kernel that each page is used once here, or little more: MADV_SEQUENTIAL. It reads further ahead where
    /// the block is of a file that is not in memory, and does not note of every page that it was used when the mapping
    /// goes: that takes 50 ms a GiB, which nobody needs of RAM that is only passing through. The advice may be refused.
    #[must_use]
    pub fn used_once(self) -> Self {
        if let Some(range) = self.range(0, self.pages()) {
            // SAFETY: the whole block, which is one mapping; the advice changes no content.
            let _ = unsafe { advise(range.ptr, range.len, libc::MADV_SEQUENTIAL) };
        }
        self
    }

    /// Creates the pages now, so that the first touch does not have to: reads and keeps what is there.
    ///
    /// # Errors
    /// The range is not in the block, memory ran out, or the kernel is older than 5.14.
    pub fn prefault(&self, first: u64, pages: u64) -> io::Result<()> {
        let range = self.range(first, pages).ok_or(io::ErrorKind::InvalidInput)?;
        let advice = if self.writable { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        // SAFETY: the range is in the block's mapping (`range`); populating changes no content.
        unsafe { advise(range.ptr, range.len, advice) }
    }

    /// Writes one byte all over a page, for tests in files that have no unsafe code.
    #[cfg(test)]
    pub(crate) fn fill_page(&self, page: u64, value: u8) {
        let range = self.range(page, 1).unwrap();
        // SAFETY: the range is in the block's mapping; tests only do this to writable blocks.
        unsafe { range.ptr.write_bytes(value, range.len) };
    }
}

/// What every block has to fulfil, wherever its memory comes from.
pub(super) fn check(name: &str, guest_address: u64, bytes: u64, page_size: PageSize) -> Result<(), MemoryError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(MemoryError::BadName { name: name.to_owned() });
    }
    let host_page_bytes = host_page_bytes();
    if page_size.bytes() < host_page_bytes {
        return Err(MemoryError::PageTooSmall { page_size, host_page_bytes });
    }
    let fits = isize::try_from(bytes).is_ok() && guest_address.checked_add(bytes).is_some();
    if bytes == 0 || bytes % page_size.bytes() != 0 || !fits {
        return Err(MemoryError::BadLength { name: name.to_owned(), bytes, page_bytes: page_size.bytes() });
    }
    Ok(())
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("name", &self.name)
            .field("guest_address", &format_args!("{:#x}", self.guest_address))
            .field("host", &self.host)
            .field("bytes", &self.bytes)
            .field("page_size", &self.page_size)
            .field("presence", &self.presence)
            .field("initial", &self.initial)
            .finish_non_exhaustive()
    }
}
