//! Builds a store beside its place, and puts it there when it is whole and on the disk.

use std::ffi::{CString, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use pageferry::digest::Contents;
use pageferry::memory::{BLOCKS_MAX, Initial};
use pageferry::sys::random::random_16;
use pageferry::sys::rename::exchange;
use pageferry::units::PageSize;
use pageferry::{Ram, RamBlock};

use super::leftovers::{PARTIAL, REPLACED, claim, leftovers};
use super::manifest::{BlockEntry, Counters, FORMAT, Manifest, TailEntry, Uuid, VERSION};
use super::names::block_path;
use super::reader::is_store;
use super::writeback::Writeback;
use super::{BLOCKS, MANIFEST, PAGE_BYTES, TAIL, digest};
use crate::image::sentence;
use crate::output::complain;

/// What is known of a migration when it has ended: see the fields of [`Manifest`] that are called the same.
#[derive(Clone, Debug)]
pub struct Facts {
    pub machine: String,
    pub configuration: Vec<u8>,
    pub dialect: &'static str,
    pub barrier: &'static str,
    pub section: u32,
    pub channels: u8,
    pub uuid: Option<Uuid>,
    pub compression: &'static str,
    pub counters: Counters,
}

/// What became of a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored {
    /// How long it took to hash the RAM blocks.
    pub digest: Duration,
    /// How long the disk took: no part of what the migration takes.
    pub fsync: Duration,
    /// Bytes of all RAM blocks together, holes included.
    pub bytes: u64,
}

/// A store that is not there yet. Dropped before [`finish`](Writer::finish) succeeds, it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    /// The name it is to have, with links followed: a link stays one.
    destination: PathBuf,
    partial: PathBuf,
    /// Synced at the beginning: where that cannot be done in the end nothing should begin.
    parent: File,
    /// The folder, locked for as long as this is here.
    _claim: File,
    force: bool,
    blocks: Vec<Block>,
    writeback: Option<Writeback>,
    landed: bool,
}

#[derive(Debug)]
struct Block {
    entry: BlockEntry,
    /// The descriptor that was there when the first page was written: it hears of every failure to write one out.
    file: Arc<File>,
}

/// What stands where the store is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Occupant {
    Nobody,
    EmptyFolder,
    Store,
}

impl Writer {
    /// Makes the folder `DIR.partial-` and a random number beside `dir`. Whatever stands against writing here is known
    /// before anybody sends.
    ///
    /// # Errors
    /// `dir` is there and not empty, unless it is a store, and nothing but a store, and `force` says to replace it; or
    /// what the system has against the folder.
    pub fn create(dir: &Path, force: bool) -> Result<Writer, String> {
        let destination = resolve(dir)?;
        look(&destination, force)?;
        let Some(name) = destination.file_name() else {
            return Err(format!("{} names no folder; name one", dir.display()));
        };
        let folder = destination.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let parent = File::open(folder).map_err(|e| sentence("open", folder, &e))?;
        parent.sync_all().map_err(|e| sentence("have on the disk", folder, &e))?;
        check_mount(&destination, &parent)?;
        for left in leftovers(folder, name) {
            complain(format_args!("warning: {left}"));
        }
        let number = random_16().map_err(|e| format!("no random number is to be had: {e}"))?;
        let mut partial = OsString::from(name);
        partial.push(format!("{PARTIAL}{:016x}", u128::from_le_bytes(number) as u64));
        let partial = folder.join(partial);
        make_folder(&partial)?;
        let claim = claim(&partial).map_err(|e| {
            let _ = fs::remove_dir(&partial);
            sentence("open", &partial, &e)
        })?;
        let (blocks, writeback) = (Vec::new(), None);
        let writer = Writer { destination, partial, parent, _claim: claim, force, blocks, writeback, landed: false };
        make_folder(&writer.partial.join(BLOCKS))?;
        Ok(writer)
    }

    /// All files and folders that it makes for the blocks that it has, each before those that it is in: for whoever
    /// removes them if the process ends without a word.
    pub fn paths(&self) -> Vec<CString> {
        let files = self.blocks.iter().map(|block| block.entry.file.as_str()).chain([TAIL, MANIFEST, BLOCKS]);
        let paths = files.map(|file| self.partial.join(file)).chain([self.partial.clone()]);
        paths.filter_map(|path| CString::new(path.into_os_string().into_vec()).ok()).collect()
    }

    /// Makes the file of one RAM block, all of it a hole, and maps it: what is written to the block is in the store.
    ///
    /// # Errors
    /// A name that is empty, too long or was there before, a length that is not whole pages, one block more than may
    /// be, or what the system has against the file or the mapping.
    pub fn add_block(&mut self, name: &str, guest_address: Option<u64>, bytes: u64) -> Result<RamBlock, String> {
        if self.blocks.len() == BLOCKS_MAX {
            return Err(format!("RAM block {name:?} is one more than the {BLOCKS_MAX} that may be"));
        }
        if self.blocks.iter().any(|block| block.entry.name == name) {
            return Err(format!("RAM block {name:?} is there twice"));
        }
        if bytes == 0 || bytes % PAGE_BYTES != 0 {
            return Err(format!("RAM block {name:?} has {bytes} bytes, expected whole pages of {PAGE_BYTES}"));
        }
        let entry = BlockEntry {
            name: name.to_owned(),
            bytes,
            file: block_path(self.blocks.len(), name),
            digest: String::new(),
            guest_address,
        };
        let path = self.partial.join(&entry.file);
        let file = make_file(&path)?;
        file.set_len(bytes).map_err(|e| sentence(&format!("reserve {bytes} bytes in"), &path, &e))?;
        let block = RamBlock::file(name, guest_address.unwrap_or(0), &file, bytes, PageSize::SIZE_4K, true);
        let block = block.map_err(|e| e.to_string())?;
        self.blocks.push(Block { entry, file: Arc::new(file) });
        // Fresh, all of it a hole: nothing has to be made zero.
        Ok(block.with_initial(Initial::Zeroed).used_once())
    }

    /// Begins to write out what comes into the blocks that were added, so that [`finish`](Writer::finish) waits for little.
    pub fn write_out_early(&mut self) {
        let files = self.blocks.iter().map(|block| (block.file.clone(), block.entry.bytes));
        self.writeback = Writeback::start(files.collect());
    }

    /// Takes the digests of the blocks, all of which are in `ram` and to which nobody may write any more, from `contents`,
    /// where all that was written to them is noted; adds the device state and the manifest, waits until all of it is on
    /// the disk, and gives the store its name. When this returns, the store is whole, and survives a power cut.
    ///
    /// A store that stood there is exchanged for this one in one step, and then removed; where the file system cannot
    /// exchange, it steps aside first, and for a moment there is none.
    ///
    /// # Errors
    /// What the system has against writing; something stands in the store's place meanwhile. There is no store then, and
    /// nothing is left behind; what stood there stands there still.
    pub fn finish(mut self, ram: &Ram, contents: &Contents, tail: &[u8], facts: &Facts) -> Result<Stored, String> {
        let mut fsync = Duration::ZERO;
        self.writeback = None;
        let tail_path = self.partial.join(TAIL);
        let tail_file = write_file(&tail_path, tail)?;
        let begin = Instant::now();
        for block in &mut self.blocks {
            let path = self.partial.join(&block.entry.file);
            let mapped = ram.iter().find(|(_, mapped)| mapped.name() == block.entry.name);
            let (id, mapped) =
                mapped.ok_or_else(|| format!("internal error: RAM has no block {:?}", block.entry.name))?;
            digest::dig(contents, id, mapped).map_err(|e| sentence("read", &path, &e))?;
            block.entry.digest = digest::of_noted(contents, id, mapped).map_err(|e| sentence("read", &path, &e))?;
        }
        let digest = begin.elapsed();
        let manifest = self.manifest(tail, facts);
        manifest.check().map_err(|what| format!("the store would not be one: {what}"))?;
        let text = serde_json::to_string_pretty(&manifest).map_err(|e| format!("no manifest can be written: {e}"))?;
        let manifest_path = self.partial.join(MANIFEST);
        let manifest_file = write_file(&manifest_path, (text + "\n").as_bytes())?;

        for block in &self.blocks {
            sync(&block.file, &self.partial.join(&block.entry.file), &mut fsync)?;
        }
        sync(&tail_file, &tail_path, &mut fsync)?;
        sync(&manifest_file, &manifest_path, &mut fsync)?;
        for folder in [&self.partial.join(BLOCKS), &self.partial] {
            sync(&File::open(folder).map_err(|e| sentence("open", folder, &e))?, folder, &mut fsync)?;
        }
        self.land(&mut fsync)?;
        Ok(Stored { digest, fsync, bytes: manifest.ram_bytes() })
    }

    fn manifest(&self, tail: &[u8], facts: &Facts) -> Manifest {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let Facts { machine, configuration, dialect, barrier, section, channels, uuid, compression, counters } =
            facts.clone();
        Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            pageferry: env!("CARGO_PKG_VERSION").to_owned(),
            written_unix_s: now.as_secs(),
            machine,
            configuration,
            dialect: dialect.to_owned(),
            barrier: barrier.to_owned(),
            section,
            channels,
            uuid,
            compression: compression.to_owned(),
            digests: digest::NAME.to_owned(),
            blocks: self.blocks.iter().map(|block| block.entry.clone()).collect(),
            tail: TailEntry { file: TAIL.to_owned(), bytes: tail.len() as u64, digest: digest::of_bytes(tail) },
            counters,
        }
    }

    /// Takes its name, for good.
    fn land(&mut self, fsync: &mut Duration) -> Result<(), String> {
        let old = self.take_place(look(&self.destination, self.force)?)?;
        let folder = self.destination.with_file_name("");
        let Err(error) = sync(&self.parent, &folder, fsync) else {
            self.landed = true;
            if let Some(old) = old {
                // Somebody may have put something else there, after the last look at it.
                if !is_store(&old) {
                    complain(format_args!("warning: what was replaced is no store; it is at {}", old.display()));
                } else if let Err(e) = fs::remove_dir_all(&old) {
                    complain(format_args!("warning: {}", sentence("remove the store that was replaced,", &old, &e)));
                }
            }
            return Ok(());
        };
        // It may not stay: the next power cut might take it.
        Err(self.undo(old, error))
    }

    /// Gives up its name, for this reason, to the store that stood there; the reason, and what else went wrong.
    fn undo(&mut self, old: Option<PathBuf>, error: String) -> String {
        let undone = match &old {
            Some(old) if *old == self.partial => exchange(&self.partial, &self.destination),
            Some(old) => fs::rename(&self.destination, &self.partial).and_then(|()| fs::rename(old, &self.destination)),
            None => fs::rename(&self.destination, &self.partial),
        };
        match undone {
            Ok(()) => error,
            Err(e) => {
                // What stood there may lie under the other name now: nothing is removed.
                self.landed = true;
                let what = sentence("take it away again,", &self.destination, &e);
                match old {
                    Some(old) => format!("{error}; and {what}; what stood there may be {}", old.display()),
                    None => format!("{error}; and {what}"),
                }
            }
        }
    }

    /// Renames; where the store is then that stood there.
    fn take_place(&self, occupant: Occupant) -> Result<Option<PathBuf>, String> {
        let failed = |e: io::Error| sentence(&format!("rename {} to", self.partial.display()), &self.destination, &e);
        if occupant != Occupant::Store {
            // Replaces nobody, or a folder that is still empty: of others rename(2) says that they are not.
            return fs::rename(&self.partial, &self.destination).map(|()| None).map_err(failed);
        }
        match exchange(&self.partial, &self.destination) {
            Ok(()) => return Ok(Some(self.partial.clone())),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {}
            Err(e) => return Err(failed(e)),
        }
        let mut aside = self.partial.clone().into_os_string();
        aside.push(REPLACED);
        let aside = PathBuf::from(aside);
        fs::rename(&self.destination, &aside).map_err(|e| sentence("move away", &self.destination, &e))?;
        if let Err(e) = fs::rename(&self.partial, &self.destination) {
            let _ = fs::rename(&aside, &self.destination);
            return Err(failed(e));
        }
        Ok(Some(aside))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.landed {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// The path with links followed, if something is there.
fn resolve(dir: &Path) -> Result<PathBuf, String> {
    match fs::symlink_metadata(dir) {
        Ok(_) => fs::canonicalize(dir).map_err(|e| sentence("resolve", dir, &e)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(dir.to_owned()),
        Err(e) => Err(sentence("look at", dir, &e)),
    }
}

/// What stands there, if it may be replaced.
fn look(destination: &Path, force: bool) -> Result<Occupant, String> {
    let place = destination.display();
    let mut entries = match fs::read_dir(destination) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Occupant::Nobody),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(format!("{place} is there and no folder; name a folder that is empty or not there"));
        }
        Err(e) => return Err(sentence("look into", destination, &e)),
    };
    if entries.next().is_none() {
        return Ok(Occupant::EmptyFolder);
    }
    match is_store(destination) {
        true if force => Ok(Occupant::Store),
        true => Err(format!("{place} holds a store; move it away, or use --force to replace it")),
        // Whatever it is, it is not ours to remove.
        false => Err(format!("{place} is not empty and no store; name a folder that is empty or not there")),
    }
}

/// A file system of its own cannot be replaced by a folder beside it. Better now than after the last page.
fn check_mount(destination: &Path, parent: &File) -> Result<(), String> {
    let Ok(there) = File::open(destination) else { return Ok(()) };
    if place_of(&there) == place_of(parent) {
        return Ok(());
    }
    Err(format!("{0} is where a file system is mounted; name a folder in it, such as {0}/store", destination.display()))
}

/// The device and the mount that a folder is on: a folder may be mounted on another of its own device.
fn place_of(folder: &File) -> (Option<u64>, Option<u64>) {
    let device = folder.metadata().ok().map(|metadata| metadata.dev());
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", folder.as_raw_fd())).unwrap_or_default();
    let mount = about.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    (device, mount.and_then(|number| number.trim().parse().ok()))
}

/// RAM holds keys and passwords: nobody else may read it.
fn make_folder(path: &Path) -> Result<(), String> {
    DirBuilder::new().mode(0o700).create(path).map_err(|e| sentence("create", path, &e))
}

fn make_file(path: &Path) -> Result<File, String> {
    let opened = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(|e| sentence("create", path, &e))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<File, String> {
    let mut file = make_file(path)?;
    file.write_all(bytes).map_err(|e| sentence("write", path, &e))?;
    Ok(file)
}

/// fsync(2), and how long it took.
fn sync(file: &File, path: &Path, total: &mut Duration) -> Result<(), String> {
    let begin = Instant::now();
    file.sync_all().map_err(|e| sentence("write", path, &e))?;
    *total += begin.elapsed();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_cannot_be_put_back_is_not_removed_either() {
        let random = u128::from_le_bytes(random_16().unwrap());
        let folder = std::env::temp_dir().join(format!("pageferry-undo-{random:032x}"));
        let store = folder.join("store");
        for is_gone in [false, true] {
            fs::create_dir(&folder).unwrap();
            let mut writer = Writer::create(&store, false).unwrap();
            let partial = writer.partial.clone();
            fs::create_dir(&store).unwrap();
            fs::write(store.join(MANIFEST), "of what stood there").unwrap();
            let old = writer.take_place(Occupant::Store).unwrap();
            if is_gone {
                fs::remove_dir_all(&store).unwrap();
            }
            let why = writer.undo(old, "the disk is full".to_owned());
            drop(writer);
            let (left, gone) = if is_gone { (&partial, &store) } else { (&store, &partial) };
            assert_eq!(fs::read_to_string(left.join(MANIFEST)).unwrap(), "of what stood there");
            assert!(!gone.exists());
            let says_where = why.ends_with(&format!("; what stood there may be {}", partial.display()));
            assert!(why.starts_with("the disk is full") && says_where == is_gone, "{why}");
            fs::remove_dir_all(&folder).unwrap();
        }
    }
}
