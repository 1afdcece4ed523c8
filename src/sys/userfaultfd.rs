//! userfaultfd(2), as far as asynchronous write protection needs it.

// UNSAFETY: a descriptor made by a raw system call, and ioctls on plain structs. No crate has this feature set.
#![expect(unsafe_code)]

use super::{cvt, cvt_retry};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The kernel resolves write faults by itself and remembers them in the page table: nobody reads the descriptor.
pub(crate) const WP_ASYNC: u64 = 1 << 15;
/// Entries without a page can be protected, too.
pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
/// Shared memory and hugetlb memory can be protected.
pub(crate) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const PAGEFAULT_FLAG_WP: u64 = 1 << 0;

const UFFD_API: u64 = 0xAA;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const USER_MODE_ONLY: i32 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

const fn request(direction: libc::c_ulong, number: libc::c_ulong, size: usize) -> libc::c_ulong {
    (direction << 30) | ((size as libc::c_ulong) << 16) | (0xAA << 8) | number
}
const IOWR: libc::c_ulong = 3;
const IOR: libc::c_ulong = 2;
const USERFAULTFD_IOC_NEW: libc::c_ulong = request(0, 0x00, 0);
const UFFDIO_API: libc::c_ulong = request(IOWR, 0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: libc::c_ulong = request(IOWR, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: libc::c_ulong = request(IOR, 0x01, size_of::<UffdioRange>());
const UFFDIO_WRITEPROTECT: libc::c_ulong = request(IOWR, 0x06, size_of::<UffdioWriteprotect>());

/// A new descriptor: from /dev/userfaultfd where that can be opened, else from the system call.
pub(crate) fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the argument of this request is the flags, by value.
        Ok(device) => cvt(i64::from(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) }))?,
        // USER_MODE_ONLY is what needs no privilege. It is no loss: asynchronous protection never waits for user
        // space, so faults of the kernel (KVM, readv) are resolved just the same.
        // SAFETY: the system call takes its flags by value.
        Err(_) => cvt(unsafe { libc::syscall(libc::SYS_userfaultfd, flags | USER_MODE_ONLY) })?,
    };
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// ioctl(UFFDIO_API): asks for asynchronous write protection of every kind of memory. EINVAL: not in this kernel.
pub(crate) fn enable_async(fd: BorrowedFd<'_>) -> io::Result<()> {
    let features = PAGEFAULT_FLAG_WP | WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM;
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the struct is the one that the request number encodes by size.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, &mut api) })).map(drop)
}

/// ioctl(UFFDIO_REGISTER) for write protection. Protects nothing yet.
pub(crate) fn register(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut register = UffdioRegister { range: UffdioRange { start, len }, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the struct is the one that the request number encodes by size; registering changes no content.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER as _, &mut register) })).map(drop)
}

/// ioctl(UFFDIO_UNREGISTER): takes the registration and every protection in the range away.
pub(crate) fn unregister(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut range = UffdioRange { start, len };
    // SAFETY: the struct is the one that the request number encodes by size; unregistering changes no content.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_UNREGISTER as _, &mut range) })).map(drop)
}

/// ioctl(UFFDIO_WRITEPROTECT): protects every entry in the range, also those that hold no page.
pub(crate) fn protect(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut argument = UffdioWriteprotect { range: UffdioRange { start, len }, mode: WRITEPROTECT_MODE_WP };
    loop {
        // SAFETY: the struct is the one that the request number encodes by size; protecting changes no content.
        let done =
            cvt_retry(|| i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_WRITEPROTECT as _, &mut argument) }));
        match done {
            // "EAGAIN: the process's memory map is changing" in another thread. Protecting twice is harmless.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            other => return other.map(drop),
        }
    }
}
