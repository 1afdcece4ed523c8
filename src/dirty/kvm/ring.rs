//! KVM's dirty rings: one a vCPU, collected at the start of a round and whenever one is full.
#![forbid(unsafe_code)]

use super::collector::{Collector, RingFull};
use super::costs::{CostMeter, KvmCall, KvmCallKind, KvmCosts};
use super::slots::{SlotMap, or_bits};
use super::toggle::{Toggle, check_slots, map, pages_of, used};
use crate::dirty::bitmap::DirtyBitmap;
use crate::dirty::runs::set_range;
use crate::dirty::{DirtyError, DirtySource};
use crate::memory::Ram;
use crate::sync::DynArc;
use crate::sys::kvm::{self, KvmSlot, RING_ENTRY_BYTES, VcpuRing};
use crate::sys::memory::host_page_bytes;
use crate::units::BlockId;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

/// Proof that a VM has dirty rings, and of what size. Not to be copied: a ring's entries are taken by one source.
#[derive(Debug)]
pub struct RingEnabled {
    entries: u32,
    with_bitmap: bool,
}

impl RingEnabled {
    /// How many entries the ring of each vCPU has.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Whether KVM logs beside the rings what it writes without a vCPU (Arm's interrupt tables).
    pub fn with_bitmap(&self) -> bool {
        self.with_bitmap
    }
}

/// Tracks writes of vCPUs by KVM's dirty rings.
///
/// Make one for the life of the VM, and lend it to each migration. While it is armed a vCPU whose ring is full leaves
/// KVM_RUN with KVM_EXIT_DIRTY_RING_FULL: its thread then calls [`RingFull::relieve`]. Nobody else may call
/// KVM_RESET_DIRTY_RINGS or map the rings. Where the CPU buffers dirty pages (Intel's PML) a vCPU's last writes reach
/// its ring when it leaves KVM_RUN, so the last harvest has to come after the pause; a migration does that.
///
/// KVM stops a vCPU some 64 entries before its ring is full, at its next entry into the guest. Where KVM emulates a guest
/// (real mode on old CPUs, KVM without hardware support) that can be too late: entries are lost. It is noticed, and every
/// round and harvest fails from then on. Such a guest needs the log, or a ring larger than what it writes between exits.
///
/// Does not see what this process writes through its own mapping, nor vhost, nor DMA: see [the module](super).
///
/// What it costs, in milliseconds (2 virtual CPUs, Linux 6.18, one vCPU, one slot, KVM running the guest in software):
///
/// | | arm | round of 100 pages | of 1000 | of 16000 | of these, the reset | harvest of all | disarm |
/// |---|---|---|---|---|---|---|---|
/// | 1 GiB | 0.25 | 0.03 | 0.04 | 0.3 | 0.006, 0.02, 0.2 | 0.02 | 0.2 |
/// | 4 GiB | 0.45 | 0.08 | 0.09 | 0.4 | 0.005, 0.02, 0.2 | 0.09 | 0.5 |
///
/// ```
/// use pageferry::dirty::kvm::{KvmDirtyRing, KvmSlot, RingFull};
/// use std::io;
/// use std::os::fd::BorrowedFd;
///
/// /// Called with a fresh VM: first the rings, then slots and vCPUs, then the source.
/// fn track(vm: BorrowedFd<'_>, make: impl FnOnce() -> (Vec<KvmSlot>, Vec<BorrowedFd<'static>>)) -> io::Result<RingFull> {
///     let enabled = KvmDirtyRing::enable(vm, 4096)?;
///     let (slots, vcpus) = make();
///     let ring = KvmDirtyRing::new(vm, enabled, vcpus, slots)?;
///     Ok(ring.vcpu_handle()) // for every vCPU's thread
/// }
///
/// let no_vm = std::fs::File::open("/dev/null")?;
/// # use std::os::fd::AsFd;
/// assert!(track(no_vm.as_fd(), || (vec![], vec![])).is_err());
/// # Ok::<(), io::Error>(())
/// ```
#[derive(Debug)]
pub struct KvmDirtyRing {
    collector: DynArc<Collector>,
    slots: Box<[KvmSlot]>,
    with_bitmap: bool,
    /// Whether the kernel can leave the protection of pages to the clearing of a log: it must be told not to.
    has_manual: bool,
    toggle: Toggle,
    armed: Option<Armed>,
}

#[derive(Debug)]
struct Armed {
    map: SlotMap,
    given_back: DirtyBitmap,
    /// Where the log beside the rings is fetched to; empty where there is none.
    fetched: Box<[u64]>,
}

impl KvmDirtyRing {
    /// Gives each vCPU that will be created a ring of so many entries: a power of two, 256 or more on most kernels and
    /// 65536 at most. A ring is full some 64 entries (with PML 576) before its end. To be called before the first vCPU,
    /// and before the first slot, once for a VM; KVM's dirty log is not to be had then.
    ///
    /// # Errors
    /// `Unsupported`: the kernel has no dirty ring. `InvalidInput`: no such number of entries. Else what KVM answered.
    pub fn enable(vm: impl AsFd, entries: u32) -> io::Result<RingEnabled> {
        let vm = vm.as_fd();
        let mut cap = kvm::CAP_DIRTY_LOG_RING_ACQ_REL;
        let mut bytes_max = kvm::check_extension(vm, cap)?;
        if bytes_max == 0 {
            cap = kvm::CAP_DIRTY_LOG_RING;
            bytes_max = kvm::check_extension(vm, cap)?;
        }
        if bytes_max == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's KVM has no dirty ring"));
        }
        let bytes = u64::from(entries) * RING_ENTRY_BYTES;
        if !entries.is_power_of_two() || bytes < host_page_bytes() || bytes > bytes_max {
            let (least, most) = (host_page_bytes() / RING_ENTRY_BYTES, bytes_max / RING_ENTRY_BYTES);
            let what = format!("a dirty ring has a power of two of entries from {least} to {most}, not {entries}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let explain = |e: io::Error, why: &str| io::Error::new(e.kind(), format!("{e}: {why}"));
        kvm::enable_cap(vm, cap, bytes).map_err(|e| {
            explain(e, "dirty rings are enabled once, before the first vCPU, and larger than KVM's own reserve")
        })?;
        let with_bitmap = kvm::check_extension(vm, kvm::CAP_DIRTY_LOG_RING_WITH_BITMAP)? != 0;
        if with_bitmap {
            kvm::enable_cap(vm, kvm::CAP_DIRTY_LOG_RING_WITH_BITMAP, 0)
                .map_err(|e| explain(e, "the log beside the rings is enabled before the first memory slot"))?;
        }
        Ok(RingEnabled { entries, with_bitmap })
    }

    /// The rings of these vCPUs, which are all that the VM has, and these slots. The descriptor of the VM is duplicated.
    ///
    /// # Errors
    /// A vCPU has no ring (it was made before [`enable`](Self::enable)), a slot is not made of whole pages or named twice
    /// (`InvalidInput`), or no descriptor was free.
    pub fn new<V: AsFd>(
        vm: impl AsFd,
        enabled: RingEnabled,
        vcpus: impl IntoIterator<Item = V>,
        slots: impl IntoIterator<Item = KvmSlot>,
    ) -> io::Result<KvmDirtyRing> {
        let vm = vm.as_fd().try_clone_to_owned()?;
        let slots = check_slots(slots)?;
        let has_manual = kvm::check_extension(vm.as_fd(), kvm::CAP_MANUAL_DIRTY_LOG_PROTECT2)? != 0;
        let rings = vcpus.into_iter().map(|vcpu| VcpuRing::map(vcpu.as_fd(), enabled.entries));
        let collector = Collector::new(vm, rings.collect::<io::Result<_>>()?, &slots)?;
        let (collector, with_bitmap) = (DynArc::new(collector), enabled.with_bitmap);
        Ok(KvmDirtyRing { collector, slots, with_bitmap, has_manual, toggle: Toggle::default(), armed: None })
    }

    /// Has the VMM turn the logging of its slots on (true) and off, instead of KVM_SET_USER_MEMORY_REGION. Off means
    /// what the slot's flags said. Disarms.
    #[must_use]
    pub fn with_toggle(mut self, toggle: impl FnMut(&KvmSlot, bool) -> io::Result<()> + Send + 'static) -> Self {
        self.disarm();
        self.toggle = Toggle::by(toggle);
        self
    }

    /// Tells of every call into KVM, after it, on the thread that made it, which may be a vCPU's; pages that were reset
    /// are published after that. It must not call [`RingFull::relieve`]. The first one that is set stays.
    #[must_use]
    pub fn on_call(self, on_call: impl Fn(&KvmCall) + Send + Sync + 'static) -> Self {
        self.collector.recorder.tell(on_call);
        self
    }

    /// For the threads of vCPUs.
    pub fn vcpu_handle(&self) -> RingFull {
        RingFull { collector: self.collector.clone() }
    }

    /// What it has cost so far, vCPUs' calls included.
    pub fn costs(&self) -> KvmCosts {
        self.collector.recorder.meter.read()
    }

    /// Reads the costs while a migration has the source.
    pub fn meter(&self) -> CostMeter {
        self.collector.recorder.meter.clone()
    }

    fn vm(&self) -> BorrowedFd<'_> {
        self.collector.vm.as_fd()
    }
}

impl DirtySource for KvmDirtyRing {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.disarm();
        let begun = Instant::now();
        let map = map(&self.slots, ram)?;
        if self.has_manual {
            // With INITIALLY_SET a slot would not be protected when its logging begins: nobody clears a log here.
            kvm::enable_cap(self.vm(), kvm::CAP_MANUAL_DIRTY_LOG_PROTECT2, 0).map_err(|source| {
                DirtyError::Unsupported {
                    what: "turning KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 off",
                    advice: "the dirty ring does not work beside it",
                    source,
                }
            })?;
        }
        // What somebody left in the rings: nothing is logged, or only what the VMM logs for itself.
        self.collector.drain().map_err(|source| DirtyError::Rings { source })?;
        let largest = used(&self.slots, &map).map(pages_of).max().unwrap_or(0);
        let fetched = if self.with_bitmap { vec![0; largest.div_ceil(64) as usize] } else { Vec::new() };
        self.toggle.on(self.collector.vm.as_fd(), used(&self.slots, &map))?;
        self.armed = Some(Armed { map, given_back: DirtyBitmap::for_ram(ram), fetched: fetched.into() });
        self.collector.recorder.meter.armed(begun);
        Ok(())
    }

    /// Collects all rings. Pages that two slots show, or that were given back, may count twice.
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        self.collector.collect().map_err(|source| DirtyError::Rings { source })?;
        let mut dirty = armed.given_back.count();
        for (index, slot) in self.slots.iter().enumerate() {
            let pieces = armed.map.of_slot(index);
            if self.with_bitmap && !pieces.is_empty() {
                let pages = pages_of(slot);
                let words = &mut armed.fetched[..pages.div_ceil(64) as usize];
                let get = || kvm::get_dirty_log(self.collector.vm.as_fd(), slot, words);
                let got = self.collector.recorder.call(KvmCallKind::Get, Some(slot.slot()), get, |_| pages);
                got.map_err(|source| DirtyError::Slot { slot: slot.slot(), what: "fetch the dirty log", source })?;
                self.collector.publish(index, &armed.fetched[..pages.div_ceil(64) as usize]);
            }
            dirty += pieces.iter().map(|piece| self.collector.count(index, piece.slot_page, piece.pages)).sum::<u64>();
        }
        Ok(dirty)
    }

    /// If KVM has missed writes, `words` is all ones up to the end of the block, and the error is returned as well.
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        if !armed.given_back.take(block, first_page, words) {
            return Err(DirtyError::OutOfRange { block, first_page, words: words.len() });
        }
        let end_page = first_page + words.len() as u64 * 64;
        for piece in armed.map.within(usize::from(block.0), first_page, end_page) {
            self.collector.take(piece.slot, piece.slot_page, piece.pages, |taken, at, from, to| {
                let page = piece.block_page + (from - piece.slot_page);
                or_bits(words, page - first_page, taken, from - at, to - from);
            });
        }
        self.collector.check().map_err(|source| {
            let pages = armed.given_back.shape(block).map_or(0, |(pages, _)| pages);
            set_range(words, 0, pages.saturating_sub(first_page));
            DirtyError::Rings { source }
        })
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        let taken = armed.given_back.put_back(block, first_page, words);
        if taken { Ok(()) } else { Err(DirtyError::OutOfRange { block, first_page, words: words.len() }) }
    }

    fn disarm(&mut self) {
        let Some(armed) = self.armed.take() else { return };
        let begun = Instant::now();
        self.toggle.off(self.collector.vm.as_fd(), used(&self.slots, &armed.map));
        // Entries that are left would fill the rings early next time; arming tries again where this fails.
        let _ = self.collector.drain();
        self.collector.recorder.meter.disarmed(begun);
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        self.disarm();
    }
}
