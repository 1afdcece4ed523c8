//! Opens a store, and believes nothing that its manifest says until it has looked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pageferry::digest::Contents;
use pageferry::units::PageSize;
use pageferry::{Ram, RamBlock};

use super::manifest::{FORMAT, Manifest};
use super::{BLOCKS, MANIFEST, TAIL, digest};
use crate::image::{Stamp, sentence};

/// No manifest of 1024 blocks with the longest names and a configuration is longer.
const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// More than the state of any machine's devices that goes over the main connection.
const TAIL_BYTES_MAX: u64 = 4 << 30;

/// A store that is whole, as far as can be seen without reading its RAM: every file is there and has its length, and the
/// device state its digest.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    manifest: Manifest,
    /// In the order of the manifest's blocks.
    blocks: Vec<File>,
    /// Likewise, from when they were opened.
    stamps: Vec<Stamp>,
    tail: File,
}

impl Reader {
    /// Opens a store and all of its files: whoever replaces it now does not change what is sent.
    ///
    /// # Errors
    /// There is none, or its manifest and its files do not agree.
    pub fn open(dir: &Path) -> Result<Reader, String> {
        let (file, bytes) = open_inside(dir, MANIFEST)?;
        if bytes > MANIFEST_BYTES_MAX {
            let path = dir.join(MANIFEST);
            return Err(format!("{} has {bytes} bytes, which is too long for a manifest", path.display()));
        }
        let in_store = |what: String| format!("{}: {what}", dir.display());
        let text = read_text(&file).map_err(|e| sentence("read", &dir.join(MANIFEST), &e))?;
        let manifest = Manifest::parse(&text).map_err(in_store)?;
        let blocks = manifest.blocks.iter().map(|block| open_whole(dir, &block.file, block.bytes));
        let blocks = blocks.collect::<Result<Vec<File>, String>>()?;
        let stamp = |file| Stamp::of(file).map_err(|e| sentence("look into", dir, &e));
        let stamps = blocks.iter().map(stamp).collect::<Result<Vec<Stamp>, String>>()?;
        let tail = open_whole(dir, &manifest.tail.file, manifest.tail.bytes)?;
        let reader = Reader { dir: dir.to_owned(), manifest, blocks, stamps, tail };
        reader.tail()?;
        Ok(reader)
    }

    /// What the store says of itself, checked.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The RAM blocks, in the manifest's order, mapped for reading.
    ///
    /// # Errors
    /// What the system has against mapping them.
    pub fn ram(&self) -> Result<Ram, String> {
        let blocks = self.manifest.blocks.iter().zip(&self.blocks).map(|(block, file)| {
            let address = block.guest_address.unwrap_or(0);
            RamBlock::file(&block.name, address, file, block.bytes, PageSize::SIZE_4K, false).map(RamBlock::used_once)
        });
        let blocks = blocks.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
        Ram::new(blocks).map_err(|e| e.to_string())
    }

    /// The device state.
    ///
    /// # Errors
    /// It cannot be read, or is not what was written.
    pub fn tail(&self) -> Result<Vec<u8>, String> {
        let entry = &self.manifest.tail;
        let path = self.dir.join(&entry.file);
        if entry.bytes > TAIL_BYTES_MAX {
            return Err(format!("{} has {} bytes, which is too long for device state", path.display(), entry.bytes));
        }
        let mut tail = vec![0; entry.bytes as usize];
        self.tail.read_exact_at(&mut tail, 0).map_err(|e| sentence("read", &path, &e))?;
        same_digest(&path, &entry.digest, &digest::of_bytes(&tail))?;
        Ok(tail)
    }

    /// Compares what was noted of this RAM, which is the store's, when all of it was looked at, with its digests.
    ///
    /// # Errors
    /// The first block that is not what was written; or that was written since the store was opened, or that cannot be
    /// looked at.
    pub fn check(&self, ram: &Ram, contents: &Contents) -> Result<(), String> {
        for (block, (id, mapped)) in self.manifest.blocks.iter().zip(ram.iter()) {
            let path = self.dir.join(&block.file);
            let found = digest::of_noted(contents, id, mapped).map_err(|e| sentence("read", &path, &e))?;
            same_digest(&path, &block.digest, &found)?;
        }
        self.check_still()
    }

    /// Whether no file of the RAM was written since the store was opened.
    ///
    /// # Errors
    /// The first that was, or that cannot be looked at.
    pub fn check_still(&self) -> Result<(), String> {
        for ((block, file), stamp) in self.manifest.blocks.iter().zip(&self.blocks).zip(&self.stamps) {
            let path = self.dir.join(&block.file);
            if Stamp::of(file).map_err(|e| sentence("look at", &path, &e))? != *stamp {
                return Err(format!("{} was written while it was sent; let it lie still", path.display()));
            }
        }
        Ok(())
    }
}

/// Whether this folder is a store and nothing else: whoever removes it removes nothing but a store.
pub fn is_store(dir: &Path) -> bool {
    let ours = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| [MANIFEST, TAIL, BLOCKS].iter().any(|name| entry.file_name() == *name))
    };
    // Its version does not matter, nor whether it is whole.
    let says_so = || {
        let (file, _) = open_inside(dir, MANIFEST).ok().filter(|(_, bytes)| *bytes <= MANIFEST_BYTES_MAX)?;
        let value: serde_json::Value = serde_json::from_str(&read_text(&file).ok()?).ok()?;
        Some(value["format"] == FORMAT)
    };
    let is_ram = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| {
            entry.file_type().is_ok_and(|kind| kind.is_file()) && entry.path().extension() == Some("ram".as_ref())
        })
    };
    fs::read_dir(dir).is_ok_and(|mut entries| entries.all(ours))
        && fs::read_dir(dir.join(BLOCKS)).map_or(true, |mut entries| entries.all(is_ram))
        && says_so() == Some(true)
}

fn read_text(file: &File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MANIFEST_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// A file of the length that the manifest says.
fn open_whole(dir: &Path, file: &str, expected: u64) -> Result<File, String> {
    let (opened, bytes) = open_inside(dir, file)?;
    if bytes == expected {
        return Ok(opened);
    }
    let path = dir.join(file);
    Err(format!("{} has {bytes} bytes, its manifest says {expected}: the store is damaged", path.display()))
}

/// A regular file in the store, to which no link leads, and its length.
fn open_inside(dir: &Path, file: &str) -> Result<(File, u64), String> {
    let mut path = dir.to_owned();
    let mut parts = file.split('/').peekable();
    while let Some(part) = parts.next() {
        path.push(part);
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let there = fs::symlink_metadata(&path).map_err(|e| sentence("open", &path, &e))?;
        let (fits, kind) = match parts.peek() {
            Some(_) => (there.is_dir(), "folder"),
            None => (there.is_file(), "regular file"),
        };
        if !fits {
            return Err(format!("{} is no {kind}: a store has no links and nothing special", path.display()));
        }
    }
    // Nor does it wait for one that took its place since.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
    let opened = opened.map_err(|e| sentence("open", &path, &e))?;
    let bytes = opened.metadata().map_err(|e| sentence("look at", &path, &e))?.len();
    Ok((opened, bytes))
}

fn same_digest(path: &Path, expected: &str, found: &str) -> Result<(), String> {
    if expected == found {
        return Ok(());
    }
    let path = path.display();
    Err(format!("{path} is not what was written: its digest is {found}, its manifest says {expected}; it is damaged"))
}
