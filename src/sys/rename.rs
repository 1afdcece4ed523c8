//! renameat2(2): two names change places in one step, which std's rename cannot.

// UNSAFETY: one system call that takes two paths.
#![expect(unsafe_code)]

use super::cvt;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Exchanges what `one` and `other` name. At no moment is either name without a file or folder.
///
/// # Errors
/// As renameat2(2): ENOENT if one of them is not there, EINVAL where the file system cannot do it.
pub fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    let (one, other) = (CString::new(one.as_os_str().as_bytes())?, CString::new(other.as_os_str().as_bytes())?);
    let flags = libc::RENAME_EXCHANGE;
    // By number: musl has no function for it.
    let call = libc::SYS_renameat2;
    // SAFETY: both paths are C strings that live until the call returns.
    let ret = unsafe { libc::syscall(call, libc::AT_FDCWD, one.as_ptr(), libc::AT_FDCWD, other.as_ptr(), flags) };
    cvt(ret).map(drop)
}
