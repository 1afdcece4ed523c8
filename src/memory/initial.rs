//! Makes a target's block read as zeros before pages arrive.

// UNSAFETY: writes zeros to guest RAM and gives its memory back, through raw pointers.
#![expect(unsafe_code)]

use super::PresenceMap;
use super::block::{Initial, Presence, RamBlock};
use super::zero;
use crate::dirty::runs::Runs;
use crate::sys::memory::{advise, punch_hole};
use crate::units::BlockId;
use std::io;
use std::os::fd::AsFd;

/// What [`RamBlock::make_zero`] had to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MadeZero {
    /// The memory was given back to the system.
    pub punched: bool,
    /// Pages that held something else and were overwritten.
    pub pages_overwritten: u64,
}

/// How many pages [`RamBlock::make_zero`] asks about at a time: 4 KiB of bitmap.
const OVERWRITE_PAGES: usize = 32768;

impl RamBlock {
    /// Makes the block read as zeros, in the way its [`Initial`] state allows, before pages arrive. Where giving the
    /// memory back fails (it is locked, or of a kind that has no holes), zeros are written instead.
    ///
    /// Nobody else may write to the block meanwhile: what they write may or may not stay.
    ///
    /// # Errors
    /// The block may only be read.
    pub fn make_zero(&self) -> io::Result<MadeZero> {
        if self.initial() == Initial::Zeroed {
            return Ok(MadeZero::default());
        }
        if !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if self.initial() == Initial::Punch && self.punch().is_ok() {
            return Ok(MadeZero { punched: true, pages_overwritten: 0 });
        }
        Ok(MadeZero { punched: false, pages_overwritten: self.overwrite() })
    }

    fn punch(&self) -> io::Result<()> {
        match self.presence() {
            Presence::Anonymous => {
                let all = self.range(0, self.pages()).ok_or(io::ErrorKind::InvalidInput)?;
                // SAFETY: the range is the block's mapping (`range`); that its content goes is what was asked for.
                unsafe { advise(all.ptr, all.len, libc::MADV_DONTNEED) }
            }
            Presence::Shared { fd, offset } => {
                punch_hole(fd.as_fd(), *offset, self.bytes())?;
                // A tail of the last page that is not in the file has kept its bytes.
                self.zero_page(self.pages() - 1);
                Ok(())
            }
            // Giving back a page of a private file mapping would bring the file's bytes back, not zeros.
            Presence::All => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Writes zeros over every page that exists and holds something else; how many there were.
    fn overwrite(&self) -> u64 {
        let mut present = PresenceMap::of_blocks(std::slice::from_ref(self));
        let mut written = 0;
        for chunk in (0..self.pages()).step_by(OVERWRITE_PAGES) {
            let mut words = [u64::MAX; OVERWRITE_PAGES / 64];
            // An error leaves more pages to look at, none to leave out.
            let _ = present.keep_present(BlockId(0), chunk, &mut words);
            for (first, pages) in Runs::new(&words, chunk, u32::MAX) {
                let end = (first + u64::from(pages)).min(self.pages());
                written += (first..end).map(|page| u64::from(self.zero_page(page))).sum::<u64>();
            }
        }
        written
    }

    /// Writes zeros over one page unless it is zero already: reading costs less, and a page of the kernel's shared
    /// zero page stays one. False if nothing was written.
    fn zero_page(&self, page: u64) -> bool {
        let Some(range) = self.range(page, 1) else { return false };
        // SAFETY: the range is one page inside the block's mapping, aligned to the page (checked in `RamBlock::new`).
        let is_zero = unsafe { zero::is_zero(range.ptr, range.len) };
        if !is_zero {
            // SAFETY: the range is in the block's mapping, which is writable (the caller has checked).
            unsafe { range.ptr.write_bytes(0, range.len) };
        }
        !is_zero
    }
}
