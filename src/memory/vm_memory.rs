//! RAM blocks over guest memory that rust-vmm's `vm-memory` has mapped.

// UNSAFETY: vouches to `RamBlock::new` for mappings that the regions of another crate own.
#![expect(unsafe_code)]

use super::block::{Initial, RamBlock};
use super::{MemoryError, Presence, Ram};
use crate::sys::memory::host_page_bytes;
use crate::units::PageSize;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::{fmt, io};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

/// How a region is mapped, as far as it decides which of its pages exist. A wrong claim loses pages.
///
/// Claim nothing for memory whose missing pages a handler fills in (userfaultfd's missing mode, as in a restore that
/// loads pages on demand): what it has not filled in yet looks like memory that nobody ever touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mapping {
    /// Nothing is claimed: every page counts as existing.
    #[default]
    Unknown,
    /// Private anonymous memory without a missing-page handler. Not believed of a region that names a file.
    PrivateAnonymous,
    /// A MAP_SHARED mapping of the file that the region names. Not believed of a region that names none.
    SharedFile,
}

impl Mapping {
    /// What the flags say that a region of `vm-memory`'s own kind was mapped with. They do not show whether somebody
    /// handles its missing pages: to pass this function on is to say that nobody does.
    pub fn of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Mapping {
        let anonymous = region.flags() & libc::MAP_ANONYMOUS != 0;
        match region.flags() & libc::MAP_TYPE {
            libc::MAP_PRIVATE if anonymous => Mapping::PrivateAnonymous,
            libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE if !anonymous => Mapping::SharedFile,
            _ => Mapping::Unknown,
        }
    }
}

/// Makes [`Ram`] of a VMM's guest memory: one RAM block a region, in the order of the regions.
///
/// The memory is held, and stays mapped, for as long as any clone of the `Ram` lives. Whoever has a
/// `GuestMemoryMmap` by value passes `Arc::new(memory.clone())`: a clone shares the regions. A VMM that swaps its memory
/// map at run time (hotplug) keeps the regions as they are while a migration runs: the blocks do not follow.
///
/// Not for regions that are mapped only while they are accessed (Xen's grants): they are refused.
///
/// ```
/// use std::sync::Arc;
/// use pageferry::memory::Presence;
/// use pageferry::memory::vm_memory::{GuestRam, Mapping};
/// use pageferry::units::BlockId;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 3 << 20)];
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges)?);
/// let ram = GuestRam::new(memory).mapped_as(Mapping::of).ram()?;
///
/// assert_eq!(ram.blocks()[1].name(), "ram1");
/// assert_eq!(ram.bytes(), 4 << 20);
/// assert_eq!(ram.locate((4 << 30) + 4097), Some((BlockId(1), 4097)));
/// assert!(matches!(ram.blocks()[0].presence(), Presence::Anonymous));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "nothing is made before `ram` is called"]
pub struct GuestRam<M: GuestMemoryBackend> {
    memory: Arc<M>,
    page_size: PageSize,
    initial: Initial,
    name: Box<Name<M::R>>,
    mapping: Box<Claim<M::R>>,
}

/// Names a region, given its index.
type Name<R> = dyn Fn(usize, &R) -> String;
/// Says how a region is mapped.
type Claim<R> = dyn Fn(&R) -> Mapping;

impl<M: GuestMemoryBackend> fmt::Debug for GuestRam<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam")
            .field("regions", &self.memory.num_regions())
            .field("page_size", &self.page_size)
            .field("initial", &self.initial)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> GuestRam<M> {
    /// Begins to describe the blocks: named `ram0`, `ram1` and so on, tracked by the host's base page, with nothing
    /// claimed of how they are mapped, and [`Initial::Overwrite`].
    pub fn new(memory: Arc<M>) -> GuestRam<M> {
        // A host page that is no tracking page is refused by `RamBlock::new`, which knows the sizes.
        let page_size = u32::try_from(host_page_bytes()).ok().and_then(PageSize::new).unwrap_or(PageSize::SIZE_64K);
        GuestRam {
            memory,
            page_size,
            initial: Initial::default(),
            name: Box::new(|index, _| format!("ram{index}")),
            mapping: Box::new(|_| Mapping::Unknown),
        }
    }

    /// Names each block, given the index of its region. Names are what both sides of a migration agree on.
    pub fn named(self, name: impl Fn(usize, &M::R) -> String + 'static) -> Self {
        GuestRam { name: Box::new(name), ..self }
    }

    /// Sets the tracking page of all blocks; both sides of a migration use the same. The mappings have to be aligned to
    /// it: mmap(2) promises no more than the host's page.
    pub fn page_size(self, page_size: PageSize) -> Self {
        GuestRam { page_size, ..self }
    }

    /// Says how each region is mapped, so that what nobody ever touched need not be read: [`Mapping::of`], or what the
    /// VMM knows better.
    pub fn mapped_as(self, mapping: impl Fn(&M::R) -> Mapping + 'static) -> Self {
        GuestRam { mapping: Box::new(mapping), ..self }
    }

    /// Says how a target may make all blocks read as zeros: [`Initial::Zeroed`] for memory just mapped.
    pub fn initial(self, initial: Initial) -> Self {
        GuestRam { initial, ..self }
    }

    /// The RAM.
    ///
    /// # Errors
    /// As [`Ram::new`] and [`RamBlock::new`]; a region without host memory of its own; no descriptor for a
    /// duplicate of a shared file's.
    pub fn ram(self) -> Result<Ram, MemoryError> {
        let blocks: Result<Vec<_>, _> =
            self.memory.iter().enumerate().map(|(index, region)| self.block(index, region)).collect();
        Ram::with_keep_alive(self.memory, blocks?)
    }

    fn block(&self, index: usize, region: &M::R) -> Result<RamBlock, MemoryError> {
        let name = (self.name)(index, region);
        let refused = |what, source| MemoryError::Map { name: name.clone(), what, source };
        let slice = region.as_volatile_slice().map_err(|e| refused("finding its host memory", io::Error::other(e)))?;
        let host = slice.ptr_guard_mut().as_ptr();
        // The two agree unless the guard has mapped the region for itself, and has unmapped it by now.
        match region.get_host_address(MemoryRegionAddress(0)) {
            Ok(address) if address == host => {}
            _ => return Err(refused("it is mapped only while it is accessed", io::ErrorKind::Unsupported.into())),
        }
        let (start, bytes) = (region.start_addr().raw_value(), slice.len() as u64);
        // SAFETY: whoever made the slice vouched that its bytes are mapped, and touched by volatile accesses only, for
        // as long as the region is borrowed. The region is borrowed from `self.memory`, and the same borrow could last
        // until the `Ram` that holds `self.memory` drops it: while there is that `Arc`, nobody can get at what is in it
        // by `&mut`, or free it. The guard keeps nothing mapped that is not mapped without it, as was just compared.
        let block = unsafe { RamBlock::new(&name, start, host, bytes, self.page_size) }?.with_initial(self.initial);
        match ((self.mapping)(region), region.file_offset()) {
            (Mapping::PrivateAnonymous, None) => Ok(block.with_presence(Presence::Anonymous)),
            (Mapping::SharedFile, Some(file)) => block
                .with_shared_file(file.file().as_fd(), file.start())
                .map_err(|e| refused("duplicating the descriptor of its file", e)),
            _ => Ok(block),
        }
    }
}
