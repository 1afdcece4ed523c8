//! RAM images: what the two sides tell each other about one, and the file that becomes one when it is whole.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pageferry::RamBlock;
use pageferry::memory::MemoryError;
use pageferry::units::PageSize;

/// Comes first in the opaque bytes of Setup: what comes is an image, and in which version of these bytes.
const TAG: &[u8; 16] = b"pageferry image1";

/// The opaque bytes for an image of this many bytes. RAM travels in whole pages; the length does not.
pub fn encode_length(bytes: u64) -> Vec<u8> {
    [TAG.as_slice(), &bytes.to_le_bytes()].concat()
}

/// The image's exact length.
pub fn decode_length(opaque: &[u8]) -> Result<u64, String> {
    let length = opaque.strip_prefix(TAG).and_then(|rest| rest.try_into().ok());
    length.map(u64::from_le_bytes).ok_or_else(|| {
        "what comes is not a RAM image of this version; send it with the same version of `pageferry send`".to_owned()
    })
}

/// A sentence of what, where, the system's reason, and what to do.
pub fn sentence(what: &str, path: &Path, e: &io::Error) -> String {
    let advice = match e.kind() {
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::PermissionDenied => "; check its permissions and those of its directory",
        io::ErrorKind::AlreadyExists => "; an earlier run left it, remove it",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; the disk may be full, make room",
        io::ErrorKind::FileTooLarge => "; this file system holds no file of that size",
        _ => "",
    };
    format!("cannot {what} {}: {e}{advice}", path.display())
}

/// What is said of a page of this file, or of one in this folder, that is not there when it is sent: a file that is cut short
/// while it is mapped shows itself as a bus error.
pub fn cut_short(path: &Path) -> String {
    format!("{} was cut short while it was sent, or its disk failed; let it lie still", path.display())
}

/// What is said of one that there is no room for when it comes: a full disk shows itself as a bus error where a hole is read
/// that needs memory.
pub fn no_room(path: &Path) -> String {
    format!("cannot have a page of {}: bus error; its disk may be full, make room", path.display())
}

/// A file mapped as the one block of RAM, in the smallest pages this host knows.
pub fn block(file: &File, bytes: u64, page_size: Option<PageSize>, writable: bool) -> Result<RamBlock, MemoryError> {
    let map = |page_size| RamBlock::file("image", 0, file, bytes, page_size, writable);
    let first = page_size.unwrap_or(PageSize::SIZE_4K);
    match map(first) {
        Err(MemoryError::PageTooSmall { host_page_bytes, .. }) if page_size.is_none() => {
            map(u32::try_from(host_page_bytes).ok().and_then(PageSize::new).unwrap_or(first))
        }
        result => result,
    }
}

/// Why this cannot be an image, if it cannot.
pub fn check_kind(path: &Path, metadata: &fs::Metadata) -> Result<(), String> {
    if metadata.is_dir() {
        let e = io::Error::from_raw_os_error(libc::EISDIR);
        return Err(format!("{} is no RAM image: {e}; name a file", path.display()));
    }
    if !metadata.is_file() {
        let e = io::Error::from_raw_os_error(libc::EINVAL);
        return Err(format!("{} is a device, pipe or socket: {e}; name a regular file", path.display()));
    }
    Ok(())
}

/// What tells that a file was changed while it was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp(u64, i64, i64);

impl Stamp {
    pub fn of(file: &File) -> io::Result<Stamp> {
        let metadata = file.metadata()?;
        Ok(Stamp(metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
    }
}

/// A file that is not there yet: everything goes into its neighbour, which takes its name when it is whole.
#[derive(Debug)]
pub struct Arriving {
    /// The name it is to have, with links followed: a link stays one.
    destination: PathBuf,
    path: PathBuf,
    file: File,
    force: bool,
    landed: bool,
}

impl Arriving {
    /// Makes the neighbour, empty: whatever stands against writing here is known before anybody sends.
    pub fn new(destination: &Path, force: bool) -> Result<Arriving, String> {
        let destination = match fs::metadata(destination) {
            Ok(metadata) => {
                check_kind(destination, &metadata)?;
                fs::canonicalize(destination).map_err(|e| sentence("resolve", destination, &e))?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => destination.to_owned(),
            Err(e) => return Err(sentence("look at", destination, &e)),
        };
        let Some(name) = destination.file_name() else {
            return Err(format!("{} names no file; name one", destination.display()));
        };
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".pageferry-{}.partial", std::process::id()));
        let path = destination.with_file_name(partial);
        // RAM holds keys and passwords: nobody else may read it, unless the file that it replaces says otherwise.
        let opened = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = opened.map_err(|e| sentence("create", &path, &e))?;
        Ok(Arriving { destination, path, file, force, landed: false })
    }

    /// The neighbour, for whoever removes it if the process ends without a word.
    pub fn partial_path(&self) -> Option<CString> {
        CString::new(self.path.as_os_str().as_bytes()).ok()
    }

    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Gives the neighbour its length, all of it a hole, and maps it.
    pub fn map(&self, bytes: u64, page_size: PageSize) -> Result<RamBlock, String> {
        self.check_replaced(bytes)?;
        self.file.set_len(bytes).map_err(|e| sentence(&format!("reserve {bytes} bytes in"), &self.path, &e))?;
        block(&self.file, bytes, Some(page_size), true).map_err(|e| e.to_string())
    }

    /// A file of another length is something else, not an older version of this.
    fn check_replaced(&self, bytes: u64) -> Result<(), String> {
        match fs::metadata(&self.destination) {
            Ok(there) if there.len() != bytes && !self.force => Err(format!(
                "{} exists and has {} bytes, the image has {bytes}; move it away, or use --force to replace it",
                self.destination.display(),
                there.len()
            )),
            Ok(there) => {
                let mode = fs::Permissions::from_mode(there.permissions().mode());
                self.file.set_permissions(mode).map_err(|e| sentence("give permissions to", &self.path, &e))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(sentence("look at", &self.destination, &e)),
        }
    }

    /// Everything reaches the disk, or fails to while the source can still be told.
    pub fn sync(&self) -> Result<(), String> {
        self.file.sync_all().map_err(|e| sentence("write", &self.path, &e))
    }

    /// Takes its name.
    pub fn land(&mut self) -> Result<(), String> {
        let what = format!("rename {} to", self.path.display());
        fs::rename(&self.path, &self.destination).map_err(|e| sentence(&what, &self.destination, &e))?;
        self.landed = true;
        // The rename itself reaches the disk with its directory; where directories cannot be synced, in its own time.
        let folder = self.destination.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.landed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_survives_and_all_else_is_refused() {
        assert_eq!(decode_length(&encode_length(12345)), Ok(12345));
        let mut long = encode_length(1);
        long.push(0);
        for opaque in [&b""[..], b"pageferry image1", b"pageferry image2\0\0\0\0\0\0\0\0", &long] {
            assert!(decode_length(opaque).is_err(), "{opaque:?}");
        }
    }
}
