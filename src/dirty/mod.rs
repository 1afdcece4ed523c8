//! Where dirty pages are learned of: the trait that every source implements, and the sources of this crate.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod combined;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod runs;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;
pub mod write_protect;

use crate::units::BlockId;
use std::{fmt, io};

use crate::{dirty::bitmap::DirtyBitmap, memory::Ram};

/// Tells which pages of guest RAM were written.
///
/// The order that makes a migration right: [`arm`](DirtySource::arm), then round 0 ships every page; from then on each
/// round begins, harvests a range **and only then** reads its pages. A write is reported in the first round that begins
/// after it, or sooner. It may be reported more than once, and pages may be reported that nobody wrote, but none is ever
/// left out.
///
/// Content that vanishes without a write (a balloon that discards pages) is not reported: tell the migration of it.
///
/// ```
/// use pageferry::dirty::{DirtySource, bitmap::DirtyBitmap};
/// use pageferry::memory::{Backing, Ram, RamBlock};
/// use pageferry::units::{BlockId, PageSize};
///
/// let block = RamBlock::anonymous("ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?;
/// let ram = Ram::new([block])?;
/// let vmm = DirtyBitmap::for_ram(&ram);
/// let mut source = vmm.clone();
/// source.arm(&ram)?;
/// vmm.mark(BlockId(0), 70);
/// assert_eq!(source.begin_round()?, 1);
/// let mut words = [0u64; 4];
/// source.harvest(BlockId(0), 0, &mut words)?;
/// assert_eq!(words, [0, 1 << 6, 0, 0]);
/// source.disarm();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait DirtySource: Send {
    /// Begins to track every block of `ram`. From its return on, every write is reported; what was dirty before may be
    /// reported, too. Arming an armed source begins anew.
    ///
    /// # Errors
    /// Nothing is tracked then, and nothing needs to be undone.
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError>;

    /// Begins a round: how many pages are dirty now. Clears nothing. Sources that learn of writes in bulk (a kernel
    /// log) fetch here, and may leave a write that comes later to the next round. The number feeds the decision when to switch over; it may be too high.
    ///
    /// # Errors
    /// The number is not known; nothing is lost.
    fn begin_round(&mut self) -> Result<u64, DirtyError>;

    /// ORs the dirty bits of the pages from `first_page` (a multiple of 64) on into `words`, and clears them at the
    /// source before it returns. Bits past the block's last page are never set. Does not allocate.
    ///
    /// # Errors
    /// The source may have forgotten what was dirty in this range: the caller counts **all of it** as dirty. What
    /// `words` holds then must not be relied on.
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError>;

    /// Takes bits back that were harvested and not shipped: the next harvest reports them again.
    ///
    /// # Errors
    /// The bits are still the caller's.
    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError>;

    /// Stops tracking. Harmless when not armed, when called twice, and from `Drop`.
    fn disarm(&mut self);
}

/// Why dirty tracking failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum DirtyError {
    /// The system lacks what this source needs.
    Unsupported {
        /// What was tried.
        what: &'static str,
        /// What to do about it.
        advice: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A call that needs an armed source came before `arm` or after `disarm`.
    NotArmed,
    /// The range is not in a block that was armed, or does not begin at a multiple of 64.
    OutOfRange {
        /// The block asked for.
        block: BlockId,
        /// The first page asked for.
        first_page: u64,
        /// The number of words asked for.
        words: usize,
    },
    /// The memory of this block has no dirty bitmap.
    NoBitmap {
        /// The block.
        block: BlockId,
    },
    /// The bitmap was made for other blocks than those it is to track.
    OtherShape {
        /// The first block that differs.
        block: BlockId,
    },
    /// A block could not be put under tracking.
    Arm {
        /// The block.
        block: BlockId,
        /// What the kernel answered.
        source: io::Error,
    },
    /// No memory slot of the VM shows these pages, so nobody would report writes to them.
    Uncovered {
        /// The block.
        block: BlockId,
        /// Its first such page.
        first_page: u64,
    },
    /// The block's tracking page is not the page that the source tracks by.
    PageSize {
        /// The block.
        block: BlockId,
        /// Bytes of its tracking page.
        page_bytes: u64,
        /// Bytes of the host's page.
        host_page_bytes: u64,
    },
    /// KVM, or the VMM on its behalf, could not do something with a memory slot.
    Slot {
        /// The slot, with its address space in the upper half.
        slot: u32,
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// KVM could not reset the dirty rings, or has missed writes.
    Rings {
        /// What the kernel answered, or what was seen.
        source: io::Error,
    },
    /// The kernel could not say what is dirty.
    Scan {
        /// The block.
        block: BlockId,
        /// The first page of the range that was asked for.
        first_page: u64,
        /// What the kernel answered.
        source: io::Error,
    },
}

impl fmt::Display for DirtyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirtyError::Unsupported { what, advice, source } => write!(f, "{what}: {source}; {advice}"),
            DirtyError::NotArmed => f.write_str("dirty tracking is not armed"),
            DirtyError::OutOfRange { block, first_page, words } => {
                write!(f, "block {block} has no {words} words of pages from page {first_page} on")
            }
            DirtyError::OtherShape { block } => {
                write!(f, "the dirty bitmap was made for other memory: block {block} differs")
            }
            DirtyError::NoBitmap { block } => {
                write!(f, "the memory of block {block} has no dirty bitmap; the VMM has to create it with one")
            }
            DirtyError::Arm { block, source } => write!(f, "cannot track writes to block {block}: {source}"),
            DirtyError::Uncovered { block, first_page } => {
                write!(f, "no memory slot shows block {block} from page {first_page} on: writes there would be lost")
            }
            DirtyError::PageSize { block, page_bytes, host_page_bytes } => {
                write!(f, "block {block} is tracked by pages of {page_bytes} bytes, the host by {host_page_bytes}")
            }
            DirtyError::Slot { slot, what, source } => write!(f, "cannot {what} of memory slot {slot:#x}: {source}"),
            DirtyError::Rings { source } => write!(f, "cannot tell from the dirty rings what was written: {source}"),
            DirtyError::Scan { block, first_page, source } => {
                write!(f, "cannot scan block {block} from page {first_page} on for writes: {source}")
            }
        }
    }
}

impl std::error::Error for DirtyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DirtyError::Unsupported { source, .. }
            | DirtyError::Arm { source, .. }
            | DirtyError::Slot { source, .. }
            | DirtyError::Rings { source }
            | DirtyError::Scan { source, .. } => Some(source),
            DirtyError::NotArmed
            | DirtyError::OutOfRange { .. }
            | DirtyError::NoBitmap { .. }
            | DirtyError::OtherShape { .. }
            | DirtyError::Uncovered { .. }
            | DirtyError::PageSize { .. } => None,
        }
    }
}

impl DirtyBitmap {
    /// A clean bitmap for the blocks of `ram`.
    pub fn for_ram(ram: &Ram) -> Self {
        DirtyBitmap::with_page_sizes(ram.blocks().iter().map(|block| (block.pages(), block.page_size())))
    }

    /// Marks every page that `bytes` bytes at a guest address touch, after they were written, in whichever blocks of
    /// `ram` they are. For those who know no block: a look at each block, which costs where there are many.
    pub fn mark_guest_bytes(&self, ram: &Ram, guest_address: u64, bytes: u64) {
        let end = guest_address.saturating_add(bytes);
        for (id, block) in ram.iter() {
            let first = guest_address.max(block.guest_address());
            let last = end.min(block.guest_address() + block.bytes());
            if first < last {
                self.mark_bytes(id, first - block.guest_address(), last - first);
            }
        }
    }
}

/// Whoever made the bitmap keeps marking it; arming only checks that it fits. Bits that are set already stay set.
impl DirtySource for DirtyBitmap {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        let blocks = self.blocks().max(ram.blocks().len());
        let shape_of = |id| ram.block(id).map(|block| (block.pages(), block.page_size()));
        match (0..blocks as u16).map(BlockId).find(|&id| self.shape(id) != shape_of(id)) {
            Some(block) => Err(DirtyError::OtherShape { block }),
            None => Ok(()),
        }
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        Ok(self.count())
    }

    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        let taken = self.take(block, first_page, words);
        if taken { Ok(()) } else { Err(DirtyError::OutOfRange { block, first_page, words: words.len() }) }
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let taken = self.put_back(block, first_page, words);
        if taken { Ok(()) } else { Err(DirtyError::OutOfRange { block, first_page, words: words.len() }) }
    }

    fn disarm(&mut self) {}
}

macro_rules! forward_dirty_source {
    ($($pointer:ty),*) => {$(
        impl<T: DirtySource + ?Sized> DirtySource for $pointer {
            fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
                (**self).arm(ram)
            }
            fn begin_round(&mut self) -> Result<u64, DirtyError> {
                (**self).begin_round()
            }
            fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
                (**self).harvest(block, first_page, words)
            }
            fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
                (**self).give_back(block, first_page, words)
            }
            fn disarm(&mut self) {
                (**self).disarm();
            }
        }
    )*};
}
forward_dirty_source!(&mut T, Box<T>);
