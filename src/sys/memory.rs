//! The memory calls that memmap2 lacks: advice on raw ranges, holes in files, and mappings at a given place.

// UNSAFETY: system calls that take addresses; each function is one call.
#![expect(unsafe_code)]

use super::{cvt, cvt_retry};
use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of the host's base page.
pub(crate) fn host_page_bytes() -> u64 {
    // SAFETY: sysconf takes no pointer.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // "-1 if the name is invalid": this one is in POSIX, so the fallback is never taken on Linux.
    u64::try_from(bytes).unwrap_or(4096)
}

/// madvise(2).
///
/// # Safety
/// The range belongs to a mapping of the caller's, and what the advice does to its content is what the caller wants.
pub(crate) unsafe fn advise(start: *mut u8, bytes: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the caller owns the range (this function's contract); madvise touches nothing outside it.
    cvt_retry(|| i64::from(unsafe { libc::madvise(start.cast(), bytes, advice) })).map(drop)
}

/// fallocate(2) with FALLOC_FL_PUNCH_HOLE: the range reads as zeros afterwards and holds no memory.
///
/// # Errors
/// What the system says: `EOPNOTSUPP` where the file system knows no holes.
pub fn punch_hole(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    let (offset, bytes) = (as_off(offset)?, as_off(bytes)?);
    // "PUNCH_HOLE must be ORed with FALLOC_FL_KEEP_SIZE".
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointers.
    cvt_retry(|| i64::from(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, bytes) })).map(drop)
}

/// sync_file_range(2) with SYNC_FILE_RANGE_WRITE: what differs from the disk in the range is on its way there afterwards, and
/// waited for only where the disk takes no more at once. It says nothing of what is on the disk: that is fsync(2)'s.
///
/// # Errors
/// What the system says; whoever calls fsync(2) hears of failures to write all the same.
pub fn begin_writing_out(fd: impl AsFd, offset: u64, bytes: u64) -> io::Result<()> {
    let (offset, bytes) = (as_off(offset)?, as_off(bytes)?);
    // SAFETY: no pointers.
    let begin = || unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    cvt_retry(|| i64::from(begin())).map(drop)
}

/// fallocate(2): the range has memory behind it afterwards, what it holds stays, and so does the file's length.
pub(crate) fn allocate(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<()> {
    let (offset, bytes) = (as_off(offset)?, as_off(bytes)?);
    // SAFETY: no pointers.
    cvt_retry(|| i64::from(unsafe { libc::fallocate(fd.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, bytes) }))
        .map(drop)
}

/// fstatfs(2): whether the file lies in a tmpfs, as that of a memfd does unless it is of hugetlb.
pub(crate) fn is_in_tmpfs(fd: BorrowedFd<'_>) -> bool {
    let mut about = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills in the whole structure it is given.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), about.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the call above succeeded. The type of f_type differs between systems; the constant has the same one.
    unsafe { about.assume_init() }.f_type == libc::TMPFS_MAGIC
}

/// mincore(2) for one page: whether its content is in memory, mapped or not. True where the system does not say.
///
/// # Safety
/// `page` is the start of a host page in a mapping of the caller's.
pub(crate) unsafe fn is_in_core(page: *mut u8) -> bool {
    let mut answer = 1;
    // SAFETY: a length of 1 is rounded up to the page, for which the kernel writes one byte.
    let asked = unsafe { libc::mincore(page.cast(), 1, &mut answer) };
    asked != 0 || answer & 1 != 0
}

/// lseek(2) with SEEK_DATA: where the next data at or after `offset` begins, `None` if there is none.
pub fn seek_data(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Option<u64>> {
    let offset = as_off(offset)?;
    // SAFETY: no pointers.
    match cvt_retry(|| unsafe { libc::lseek(fd.as_raw_fd(), offset, libc::SEEK_DATA) }) {
        Ok(at) => Ok(Some(at)),
        // "ENXIO: whence is SEEK_DATA and offset is within a hole at the end of the file", or past its end.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// lseek(2) with SEEK_HOLE: where the next hole at or after `offset` begins. The end of the file counts as one.
pub fn seek_hole(fd: BorrowedFd<'_>, offset: u64) -> io::Result<u64> {
    let offset = as_off(offset)?;
    // SAFETY: no pointers.
    cvt_retry(|| unsafe { libc::lseek(fd.as_raw_fd(), offset, libc::SEEK_HOLE) })
}

/// memfd_create(2), close-on-exec. `huge_page_bytes` asks for hugetlb pages of that size.
pub(crate) fn memfd(name: &str, huge_page_bytes: Option<u64>) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let mut flags = libc::MFD_CLOEXEC;
    if let Some(bytes) = huge_page_bytes {
        // "the size is encoded as its base-2 logarithm in the bits above MFD_HUGE_SHIFT".
        flags |= libc::MFD_HUGETLB | (bytes.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    // SAFETY: `name` is a C string that outlives the call.
    let fd = cvt(i64::from(unsafe { libc::memfd_create(name.as_ptr(), flags) }))?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// mmap(2) with MAP_SHARED | MAP_FIXED: puts `bytes` of the file in place of what is mapped at `at`.
///
/// # Safety
/// `at .. at + bytes` lies in a mapping that the caller owns and that nobody uses yet.
pub(crate) unsafe fn map_shared_at(
    at: *mut u8,
    bytes: usize,
    fd: BorrowedFd<'_>,
    offset: u64,
    writable: bool,
) -> io::Result<()> {
    let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let offset = as_off(offset)?;
    // SAFETY: MAP_FIXED replaces only this range, which is the caller's to replace (this function's contract).
    let got = unsafe { libc::mmap(at.cast(), bytes, protection, flags, fd.as_raw_fd(), offset) };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn as_off(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}
