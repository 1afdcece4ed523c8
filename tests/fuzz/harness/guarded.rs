//! Guest RAM with sentries: pages of a known pattern on both sides of each block, and pages that nobody can touch beyond.
// UNSAFETY: maps memory by hand, and looks at it beside the library's back.
#![expect(unsafe_code)]

use std::ptr;
use std::sync::Arc;

use pageferry::units::PageSize;
use pageferry::{Ram, RamBlock};

const PAGE: usize = 4096;
/// What the sentries hold.
const SENTRY: u8 = 0xA5;

/// One block: a page that faults, a sentry, the block, a sentry, a page that faults.
struct Mapping {
    start: *mut u8,
    pages: usize,
}

// SAFETY: a mapping of the process; whoever follows the pointer says why it may.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(pages: usize) -> Mapping {
        let length = (pages + 4) * PAGE;
        let (none, private) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping, wherever the kernel has room.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, none, private, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let mapping = Mapping { start: start.cast(), pages };
        // SAFETY: inside the mapping, without its first and its last page.
        let opened =
            unsafe { libc::mprotect(mapping.at(1).cast(), length - 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(opened, 0);
        for sentry in mapping.sentries() {
            // SAFETY: a page that can be written, and that only we know of.
            unsafe { ptr::write_bytes(sentry, SENTRY, PAGE) };
        }
        mapping
    }

    fn at(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages + 4);
        // SAFETY: the mapping has four pages more than the block.
        unsafe { self.start.add(page * PAGE) }
    }

    fn sentries(&self) -> [*mut u8; 2] {
        [self.at(1), self.at(self.pages + 2)]
    }

    fn read(&self, page: *const u8) -> [u8; PAGE] {
        // SAFETY: `page` is one that `at` gave, and can be read; whoever wrote guest RAM has been joined.
        unsafe { page.cast::<[u8; PAGE]>().read() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: as mapped; the blocks over it, which hold it, are gone.
        unsafe { libc::munmap(self.start.cast(), (self.pages + 4) * PAGE) };
    }
}

/// Blocks of so many pages of 4 KiB, each between sentries.
pub struct Guarded {
    mappings: Vec<Arc<Mapping>>,
    ram: Ram,
}

impl Guarded {
    pub fn new(blocks: &[usize]) -> Guarded {
        let mappings: Vec<_> = blocks.iter().map(|pages| Arc::new(Mapping::new(*pages))).collect();
        let block = |(index, mapping): (usize, &Arc<Mapping>)| {
            let (name, address) = (format!("ram{index}"), (index as u64) << 30);
            let bytes = (mapping.pages * PAGE) as u64;
            // SAFETY: the block lies in the mapping, which it holds, and nobody has a reference into it.
            let block = unsafe { RamBlock::new(&name, address, mapping.at(2), bytes, PageSize::SIZE_4K) };
            block.expect("a good block").with_keep_alive(mapping.clone())
        };
        let ram = Ram::new(mappings.iter().enumerate().map(block)).expect("good blocks");
        Guarded { mappings, ram }
    }

    pub fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// Fills a page. Nobody else touches the memory meanwhile.
    pub fn fill(&self, block: usize, page: usize, byte: u8) {
        assert!(page < self.mappings[block].pages);
        // SAFETY: a page of the block, which can be written.
        unsafe { ptr::write_bytes(self.mappings[block].at(page + 2), byte, PAGE) };
    }

    /// The bytes of a page, when nobody writes any more.
    pub fn page(&self, block: usize, page: usize) -> [u8; PAGE] {
        let mapping = &self.mappings[block];
        assert!(page < mapping.pages);
        mapping.read(mapping.at(page + 2))
    }

    /// Whether nobody has written outside the blocks.
    pub fn is_intact(&self) -> bool {
        let intact =
            |mapping: &Arc<Mapping>| mapping.sentries().iter().all(|page| mapping.read(*page) == [SENTRY; PAGE]);
        self.mappings.iter().all(intact)
    }
}
