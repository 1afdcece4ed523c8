//! flock(2): a lock that goes with whoever holds it, however that ends.

// UNSAFETY: one system call without pointers.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::cvt_retry;

/// Locks a file or folder for as long as this descriptor, or a copy of it, is open anywhere. Where somebody else has locked
/// it, waits if `wait`, and says false otherwise.
///
/// # Errors
/// What flock(2) says, such as ENOLCK.
pub fn lock(fd: BorrowedFd<'_>, wait: bool) -> io::Result<bool> {
    let how = if wait { libc::LOCK_EX } else { libc::LOCK_EX | libc::LOCK_NB };
    // SAFETY: takes no pointer.
    match cvt_retry(|| unsafe { libc::flock(fd.as_raw_fd(), how) }.into()) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}
