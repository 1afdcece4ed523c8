//! Has RAM written out to the disk while it still comes, so that the guest, which stands still at the end, waits for little.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Duration;

use pageferry::sys::memory::begin_writing_out;

/// Between two passes over the files. What was written to in one of them may be written out again.
const PAUSE: Duration = Duration::from_millis(250);

/// What is handed to the disk at once: whoever gives up waits for no more than this.
const PIECE_BYTES: u64 = 32 << 20;

/// A thread that writes out. It ends by itself when this is dropped, after the piece that it is at.
#[derive(Debug)]
pub struct Writeback {
    _until: mpsc::Sender<()>,
}

impl Writeback {
    /// Starts it, for files of these lengths, if there can be a thread: without one, the end takes longer. What fails here
    /// fails again at the end, and is said then.
    pub fn start(files: Vec<(Arc<File>, u64)>) -> Option<Writeback> {
        let (until, over) = mpsc::channel();
        let write_out = move || {
            let is_over = || over.try_recv() == Err(TryRecvError::Disconnected);
            while over.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                for (file, bytes) in &files {
                    for at in (0..*bytes).step_by(PIECE_BYTES as usize) {
                        if is_over() {
                            return;
                        }
                        let _ = begin_writing_out(file, at, PIECE_BYTES.min(bytes - at));
                    }
                }
            }
        };
        let started = thread::Builder::new().name("writeback".to_owned()).spawn(write_out);
        started.is_ok().then_some(Writeback { _until: until })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::RamBlock;
    use pageferry::units::PageSize;
    use std::time::Instant;

    const BYTES: u64 = 1 << 20;

    /// KiB of the block that differ from the disk.
    fn dirty_kib(block: &RamBlock) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.split_once(&format!("{:x}-", block.host_address())).unwrap().1;
        let lines = mapping.lines().take_while(|line| !line.starts_with("VmFlags:"));
        let dirty = lines.filter_map(|line| line.split_once("_Dirty:"));
        dirty.map(|(_, kib)| kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
    }

    #[test]
    fn what_comes_is_written_out_before_anybody_waits_for_it() {
        let file = tempfile(BYTES);
        let block = RamBlock::file("ram", 0, &file, BYTES, PageSize::SIZE_4K, true).unwrap();
        block.prefault(0, BYTES >> 12).unwrap();
        file.sync_all().unwrap();
        if dirty_kib(&block) > 0 {
            eprintln!("SKIPPED store::writeback (disk): temporary files are in memory here, and never written out");
            return;
        }
        block.prefault(0, BYTES >> 12).unwrap();
        assert!(dirty_kib(&block) > 0);
        let _writeback = Writeback::start(vec![(Arc::new(file), BYTES)]).unwrap();
        // The system itself leaves it for half a minute.
        let deadline = Instant::now() + Duration::from_secs(20);
        while dirty_kib(&block) > 0 {
            assert!(Instant::now() < deadline, "nobody wrote it out");
        }
    }

    fn tempfile(bytes: u64) -> File {
        let name = format!("pageferry-writeback-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(bytes).unwrap();
        file
    }
}
