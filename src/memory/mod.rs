//! Guest RAM: the blocks of one VM, checked against each other once and numbered.

pub mod block;
mod copy;
pub mod full;
pub mod gather;
pub mod hash;
pub mod look;
pub mod initial;
pub mod owned;
pub mod prefault;
pub mod presence;
pub mod scatter;
mod unmap;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;
pub mod words;
pub mod zero;

pub use block::{Initial, Presence, RamBlock, RawRange};
pub use initial::MadeZero;
pub use owned::Backing;
pub use presence::PresenceMap;

use crate::digest::BlockShape;
use crate::units::{BlockId, PageSize};
use std::any::Any;
use std::sync::Arc;
use std::{fmt, io};

/// The most RAM blocks a VM may have. QEMU machines have some ten; the bound keeps what a peer announces finite.
pub const BLOCKS_MAX: usize = 1024;

/// The longest name of a RAM block in bytes: its length travels as one byte.
pub const NAME_BYTES_MAX: usize = 255;

/// All RAM blocks of one VM. A clone is another handle to the same blocks; the last one releases the keep-alives.
///
/// ```
/// use pageferry::memory::{Backing, Ram, RamBlock};
/// use pageferry::units::{BlockId, PageSize};
///
/// let low = RamBlock::anonymous("low", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?;
/// let high = RamBlock::anonymous("high", 4 << 30, 3 << 20, PageSize::SIZE_4K, Backing::Base)?;
/// let ram = Ram::new([low, high])?;
/// assert_eq!(ram.bytes(), 4 << 20);
/// assert_eq!(ram.block(BlockId(1)).unwrap().name(), "high");
/// assert_eq!(ram.locate((4 << 30) + 5), Some((BlockId(1), 5)));
/// # Ok::<(), pageferry::memory::MemoryError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ram {
    inner: Arc<Inner>,
}

struct Inner {
    /// Before `_keep_alive`, so that they go first: a block may point into what it keeps alive.
    blocks: Vec<RamBlock>,
    _keep_alive: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.blocks).finish()
    }
}

impl Ram {
    /// The RAM made of these blocks; their ids are their places, from 0 on.
    ///
    /// # Errors
    /// No block or too many, two of one name, or two that share host memory.
    pub fn new(blocks: impl IntoIterator<Item = RamBlock>) -> Result<Ram, MemoryError> {
        Ram::with_keep_alive((), blocks)
    }

    /// As [`new`](Self::new), and holds `keep_alive` for as long as any clone lives: what owns the mappings.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_keep_alive(
        keep_alive: impl Any + Send + Sync,
        blocks: impl IntoIterator<Item = RamBlock>,
    ) -> Result<Ram, MemoryError> {
        // One more than allowed is enough to refuse: an endless iterator must not fill memory first.
        let blocks: Vec<RamBlock> = blocks.into_iter().take(BLOCKS_MAX + 1).collect();
        if blocks.is_empty() {
            return Err(MemoryError::NoBlocks);
        }
        if blocks.len() > BLOCKS_MAX {
            return Err(MemoryError::TooManyBlocks);
        }
        let mut by_name: Vec<&RamBlock> = blocks.iter().collect();
        by_name.sort_by_key(|block| block.name());
        if let Some(pair) = by_name.windows(2).find(|pair| pair[0].name() == pair[1].name()) {
            return Err(MemoryError::SameName { name: pair[0].name().to_owned() });
        }
        let mut by_host = by_name;
        by_host.sort_by_key(|block| block.host_address());
        // Two names for the same bytes would be two owners of the same dirty bit.
        if let Some(pair) = by_host.windows(2).find(|p| p[0].host_address() + p[0].bytes() > p[1].host_address()) {
            return Err(MemoryError::Overlap { one: pair[0].name().to_owned(), other: pair[1].name().to_owned() });
        }
        Ok(Ram { inner: Arc::new(Inner { blocks, _keep_alive: Box::new(keep_alive) }) })
    }

    /// The blocks; the index of each is its id.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.inner.blocks
    }

    /// The blocks as tables of pages are made for them: see [`digest`](crate::digest).
    pub fn shapes(&self) -> Vec<BlockShape> {
        let shape = |block: &RamBlock| BlockShape { pages: block.pages(), page_size: block.page_size() };
        self.blocks().iter().map(shape).collect()
    }

    /// The blocks with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (BlockId, &RamBlock)> {
        // No truncation: there are at most BLOCKS_MAX.
        self.blocks().iter().enumerate().map(|(index, block)| (BlockId(index as u16), block))
    }

    /// One block.
    #[inline]
    pub fn block(&self, id: BlockId) -> Option<&RamBlock> {
        self.inner.blocks.get(usize::from(id.0))
    }

    /// The block that a guest address lies in, and how many bytes into it. Of blocks that overlap in the guest's address
    /// space, which nothing here forbids, the first.
    pub fn locate(&self, guest_address: u64) -> Option<(BlockId, u64)> {
        let offset = |block: &RamBlock| guest_address.checked_sub(block.guest_address()).filter(|o| *o < block.bytes());
        self.iter().find_map(|(id, block)| Some((id, offset(block)?)))
    }

    /// Bytes of all blocks together.
    pub fn bytes(&self) -> u64 {
        self.blocks().iter().map(RamBlock::bytes).sum()
    }

    /// Tracking pages of all blocks together.
    pub fn pages(&self) -> u64 {
        self.blocks().iter().map(RamBlock::pages).sum()
    }
}

/// Why a RAM block, or the RAM made of several, was refused.
#[derive(Debug)]
#[non_exhaustive]
pub enum MemoryError {
    /// RAM without a block.
    NoBlocks,
    /// More than [`BLOCKS_MAX`] blocks.
    TooManyBlocks,
    /// A name that is empty or longer than [`NAME_BYTES_MAX`].
    BadName {
        /// The name.
        name: String,
    },
    /// Two blocks of one name.
    SameName {
        /// The name.
        name: String,
    },
    /// Two blocks that share host memory.
    Overlap {
        /// The name of the block at the lower address.
        one: String,
        /// The name of the other.
        other: String,
    },
    /// A length of 0, or one that is no multiple of the page, or that does not fit the address space.
    BadLength {
        /// The name of the block.
        name: String,
        /// Its length.
        bytes: u64,
        /// What it has to be a multiple of.
        page_bytes: u64,
    },
    /// A host pointer that is null or not aligned to the tracking page.
    BadPointer {
        /// The name of the block.
        name: String,
        /// The address.
        address: u64,
        /// The tracking page.
        page_size: PageSize,
    },
    /// A tracking page smaller than the host's base page: the kernel cannot tell such pages apart.
    PageTooSmall {
        /// The tracking page.
        page_size: PageSize,
        /// The host's base page in bytes.
        host_page_bytes: u64,
    },
    /// A file shorter than the block that is to map it.
    FileTooShort {
        /// The name of the block.
        name: String,
        /// The length of the file.
        file_bytes: u64,
        /// The length of the block.
        bytes: u64,
    },
    /// The kernel refused the mapping.
    Map {
        /// The name of the block.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryError::NoBlocks => f.write_str("a VM needs at least one RAM block"),
            MemoryError::TooManyBlocks => write!(f, "more than {BLOCKS_MAX} RAM blocks"),
            MemoryError::BadName { name } => {
                write!(f, "the RAM block name {name:?} is not 1 to {NAME_BYTES_MAX} bytes long")
            }
            MemoryError::SameName { name } => write!(f, "two RAM blocks are named {name:?}"),
            MemoryError::Overlap { one, other } => write!(f, "RAM blocks {one:?} and {other:?} share host memory"),
            MemoryError::BadLength { name, bytes, page_bytes } => write!(
                f,
                "RAM block {name:?} is {bytes} bytes long: it has to be a multiple of {page_bytes}, more than 0, \
                 and to fit the address space"
            ),
            MemoryError::BadPointer { name, address, page_size } => {
                write!(f, "RAM block {name:?} at host address {address:#x} is not aligned to its page of {page_size}")
            }
            MemoryError::PageTooSmall { page_size, host_page_bytes } => {
                write!(f, "a tracking page of {page_size} bytes is smaller than this host's page of {host_page_bytes}")
            }
            MemoryError::FileTooShort { name, file_bytes, bytes } => {
                write!(f, "RAM block {name:?} wants {bytes} bytes of a file that has {file_bytes}")
            }
            MemoryError::Map { name, what, source } => write!(f, "RAM block {name:?}: {what}: {source}"),
        }
    }
}

impl std::error::Error for MemoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            MemoryError::Map { source, .. } => Some(source),
            _ => None,
        }
    }
}
