//! The system calls, one per function; EINTR is handled here and nowhere else. And an instruction of the CPU's.

pub mod crc;
pub mod event;
#[cfg(feature = "cli")]
pub mod fault;
#[cfg(feature = "kvm")]
pub mod kvm;
#[cfg(feature = "cli")]
pub mod lock;
pub mod memory;
pub mod pagemap;
pub mod random;
#[cfg(feature = "cli")]
pub mod rename;
pub mod socket;
pub mod thread;
pub mod userfaultfd;
pub mod zerocopy;

use std::io;

/// Turns the -1 of a system call into the `errno` it left.
pub(crate) fn cvt(ret: i64) -> io::Result<u64> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret as u64) }
}

/// As [`cvt`], calling again for as long as a signal interrupts the call.
pub(crate) fn cvt_retry(mut call: impl FnMut() -> i64) -> io::Result<u64> {
    loop {
        match cvt(call()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
