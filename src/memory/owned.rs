//! RAM blocks that own their mapping: anonymous memory, memfds and files.

// UNSAFETY: puts files in the place of memory reserved for them, and vouches for the mapping to `RamBlock::new`.
#![expect(unsafe_code)]

use super::MemoryError;
use super::block::{Presence, RamBlock, check};
use crate::sys::memory::{advise, host_page_bytes, map_shared_at, memfd};
use crate::units::PageSize;
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

/// The pages that back memory this crate maps itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// The host's base pages.
    Base,
    /// Base pages that the kernel may merge into huge ones: aligned and advised for it. A target's first copy into memory
    /// of a memfd or file hardly ever gets one, as the system seldom allows it there; into private memory it does, but
    /// where the host's memory is fragmented the kernel moves pages about for each, and that costs more than it saves.
    TransparentHuge,
    /// Reserved huge pages of that many bytes.
    HugeTlb(u64),
}

/// The size of a transparent huge page, where the kernel builds them: on x86-64 and on Arm with pages of 4 KiB.
const TRANSPARENT_HUGE_BYTES: u64 = 2 << 20;

impl RamBlock {
    /// A new block of private anonymous memory that reads as zeros.
    ///
    /// # Errors
    /// As [`new`](Self::new), and what the kernel has against the mapping (no huge pages left, for one).
    pub fn anonymous(
        name: &str,
        guest_address: u64,
        bytes: u64,
        page_size: PageSize,
        backing: Backing,
    ) -> Result<RamBlock, MemoryError> {
        check(name, guest_address, bytes, page_size)?;
        check_backing(name, bytes, page_size, backing)?;
        let (mapping, host) = reserve(bytes, alignment(page_size, backing), backing)
            .map_err(|source| MemoryError::Map { name: name.to_owned(), what: "mmap of anonymous memory", source })?;
        Self::over(name, guest_address, mapping, host, bytes, page_size, backing, Presence::Anonymous)
    }

    /// A new block of shared memory that reads as zeros, in a memfd of its own (see [`fd`](Self::fd)).
    ///
    /// # Errors
    /// As [`anonymous`](Self::anonymous).
    pub fn memfd(
        name: &str,
        guest_address: u64,
        bytes: u64,
        page_size: PageSize,
        backing: Backing,
    ) -> Result<RamBlock, MemoryError> {
        check(name, guest_address, bytes, page_size)?;
        check_backing(name, bytes, page_size, backing)?;
        let huge = if let Backing::HugeTlb(huge) = backing { Some(huge) } else { None };
        let made = memfd(name, huge).map(File::from).and_then(|file| file.set_len(bytes).map(|()| file));
        let made = made.and_then(|file| {
            let (mapping, host) = reserve(bytes, alignment(page_size, backing), Backing::Base)?;
            // SAFETY: `reserve` has just mapped these bytes and nobody knows of them.
            unsafe { map_shared_at(host, bytes as usize, file.as_fd(), 0, true) }?;
            Ok((file, mapping, host))
        });
        let (file, mapping, host) =
            made.map_err(|source| MemoryError::Map { name: name.to_owned(), what: "mapping a new memfd", source })?;
        let presence = Presence::Shared { fd: file.into(), offset: 0 };
        Self::over(name, guest_address, mapping, host, bytes, page_size, backing, presence)
    }

    /// A block that shares the first `bytes` bytes of a file. They need not be a multiple of the page: the block is
    /// rounded up, and its tail reads as zeros and is not kept in the file.
    ///
    /// # Errors
    /// As [`new`](Self::new); a file shorter than that; a file not opened for writing if `writable`.
    pub fn file(
        name: &str,
        guest_address: u64,
        file: &File,
        bytes: u64,
        page_size: PageSize,
        writable: bool,
    ) -> Result<RamBlock, MemoryError> {
        let map_error = |source| MemoryError::Map { name: name.to_owned(), what: "mapping a file", source };
        let file_bytes = file.metadata().map_err(map_error)?.len();
        if file_bytes < bytes {
            return Err(MemoryError::FileTooShort { name: name.to_owned(), file_bytes, bytes });
        }
        let rounded = bytes.checked_next_multiple_of(page_size.bytes()).unwrap_or(u64::MAX);
        check(name, guest_address, rounded, page_size)?;
        // Only whole host pages that begin before the file's end may be mapped: touching one past it is SIGBUS. The
        // rest of the last tracking page stays the anonymous memory of the reservation.
        let mapped = bytes.next_multiple_of(host_page_bytes());
        let made = reserve(rounded, page_size.bytes(), Backing::Base).and_then(|(mapping, host)| {
            // SAFETY: `reserve` has just mapped these bytes and nobody knows of them.
            unsafe { map_shared_at(host, mapped as usize, file.as_fd(), 0, writable) }?;
            Ok((mapping, host, file.try_clone()?))
        });
        let (mapping, host, file) = made.map_err(map_error)?;
        let presence = Presence::Shared { fd: file.into(), offset: 0 };
        let block = Self::over(name, guest_address, mapping, host, rounded, page_size, Backing::Base, presence)?;
        Ok(block.with_writable(writable))
    }

    /// A block over a mapping it owns.
    #[expect(clippy::too_many_arguments, reason = "private, and every one is a different type or name")]
    fn over(
        name: &str,
        guest_address: u64,
        mapping: MmapRaw,
        host: *mut u8,
        bytes: u64,
        page_size: PageSize,
        backing: Backing,
        presence: Presence,
    ) -> Result<RamBlock, MemoryError> {
        let mut backing_page_bytes = host_page_bytes();
        if let Backing::HugeTlb(huge) = backing {
            backing_page_bytes = huge;
        }
        if backing == Backing::TransparentHuge {
            // A wish: without huge pages the block works, so an old or small kernel's refusal is no error.
            // SAFETY: the range is inside `mapping`; MADV_HUGEPAGE changes no content.
            let _ = unsafe { advise(host, bytes as usize, libc::MADV_HUGEPAGE) };
            backing_page_bytes = TRANSPARENT_HUGE_BYTES;
        }
        // SAFETY: `host .. host + bytes` lies in `mapping` (its maker aligned it within), which the block keeps, and
        // no reference was ever made from it. A file mapped without PROT_WRITE is marked so by the caller.
        let block = unsafe { RamBlock::new(name, guest_address, host, bytes, page_size) }?;
        Ok(block.with_keep_alive(mapping).with_presence(presence).with_backing_page_bytes(backing_page_bytes))
    }
}

fn check_backing(name: &str, bytes: u64, page_size: PageSize, backing: Backing) -> Result<(), MemoryError> {
    match backing {
        Backing::HugeTlb(huge) if !huge.is_power_of_two() || huge < page_size.bytes() || bytes % huge != 0 => {
            Err(MemoryError::BadLength { name: name.to_owned(), bytes, page_bytes: huge })
        }
        Backing::Base | Backing::TransparentHuge | Backing::HugeTlb(_) => Ok(()),
    }
}

fn alignment(page_size: PageSize, backing: Backing) -> u64 {
    match backing {
        Backing::Base => page_size.bytes(),
        Backing::TransparentHuge => page_size.bytes().max(TRANSPARENT_HUGE_BYTES),
        Backing::HugeTlb(huge) => page_size.bytes().max(huge),
    }
}

/// Maps `bytes` bytes of anonymous memory at a multiple of `align`, and says where in the mapping they begin.
fn reserve(bytes: u64, align: u64, backing: Backing) -> io::Result<(MmapRaw, *mut u8)> {
    let too_long = || io::Error::from_raw_os_error(libc::ENOMEM);
    let mut options = MmapOptions::new();
    // mmap(2) aligns to the page it maps, which may be smaller than the tracking page: reserve more, use the middle.
    let mut spare = align - host_page_bytes();
    if let Backing::HugeTlb(huge) = backing {
        options.huge(Some(huge.trailing_zeros() as u8));
        spare = 0;
    } else {
        // Guests are often larger than what they use: nobody should have to set aside swap for the rest.
        options.no_reserve_swap();
    }
    let length = bytes.checked_add(spare).and_then(|length| usize::try_from(length).ok()).ok_or_else(too_long)?;
    let mapping = MmapRaw::from(options.len(length).map_anon()?);
    let start = mapping.as_mut_ptr();
    // SAFETY: the next multiple of `align` is at most `spare` bytes on, and `length` is `bytes + spare`. A hugetlb
    // mapping begins at a multiple of its page, which check_backing and PageSize keep at least as large as `align`.
    let host = unsafe { start.add((start as u64).next_multiple_of(align) as usize - start as usize) };
    Ok((mapping, host))
}
