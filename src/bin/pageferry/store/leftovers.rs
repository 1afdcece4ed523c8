//! What is left beside a store's place by those who were killed, or whose machine stopped, before theirs was whole.
//!
//! Whoever builds a store holds a lock on its folder, which goes when he does. Nothing is removed here: on a file system
//! that other machines share, one of them may hold a lock that is not seen. It is named, so that somebody can.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pageferry::sys::lock::lock;

use super::BLOCKS;
use super::reader::is_store;

/// Between the name that a store is to have and the number of this one.
pub const PARTIAL: &str = ".partial-";

/// Behind that, where a store is that had to step aside.
pub const REPLACED: &str = "-replaced";

/// Digits of the number.
const DIGITS: usize = 16;

/// Locks a folder that was made just now; a file system without locks does without.
pub fn claim(folder: &Path) -> io::Result<File> {
    let folder = File::open(folder)?;
    // It is waited for who looks whether it is a leftover.
    let _ = lock(folder.as_fd(), true);
    Ok(folder)
}

/// A sentence for each folder that is left of a store with this name.
pub fn leftovers(beside: &Path, name: &OsStr) -> Vec<String> {
    let entries = fs::read_dir(beside).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| is_partial(entry.file_name().as_bytes(), name.as_bytes()));
    ours.filter_map(|entry| what_is_left(&entry.path())).collect()
}

fn is_partial(found: &[u8], name: &[u8]) -> bool {
    let number = found.strip_prefix(name).and_then(|rest| rest.strip_prefix(PARTIAL.as_bytes()));
    let number = number.map(|number| number.strip_suffix(REPLACED.as_bytes()).unwrap_or(number));
    number.is_some_and(|number| number.len() == DIGITS && number.iter().all(u8::is_ascii_hexdigit))
}

fn what_is_left(path: &Path) -> Option<String> {
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let folder = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    // Nobody holds it; and as it has its inner folder, which is made later, somebody has held it.
    if !lock(folder.as_fd(), false).ok()? || !path.join(BLOCKS).is_dir() {
        return None;
    }
    let (place, whole) = (path.display(), is_store(path));
    Some(match whole {
        true => format!("{place} is left of a run that was cut off at its very end, and holds a store; look at it"),
        false => format!("{place} is left of a run that was cut off, and is no store; remove it"),
    })
}
