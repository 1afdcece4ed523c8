//! KVM's dirty log: fetched at the start of a round, cleared chunk by chunk as the pages are shipped.
#![forbid(unsafe_code)]

use super::costs::{CostMeter, KvmCall, KvmCallKind, KvmCosts, Recorder};
use super::slots::{SlotMap, or_bits};
use super::toggle::{Toggle, check_slots, map, pages_of, used};
use crate::dirty::runs::{count, set_range};
use crate::dirty::{DirtyError, DirtySource};
use crate::memory::Ram;
use crate::sys::kvm::{self, KvmSlot};
use crate::units::BlockId;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

/// The most pages of one KVM_CLEAR_DIRTY_LOG: the kernel holds the lock of the guest's page tables for so long, and
/// vCPUs that fault wait for it.
const CLEAR_PAGES_MAX: u64 = 16384;
const CLEAR_WORDS_MAX: usize = CLEAR_PAGES_MAX as usize / 64;

/// How much the log of a kernel can do, from the least on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum LogMode {
    /// Arming protects all pages; getting the log clears it and protects what was dirty, a whole slot in one call.
    Legacy,
    /// Arming protects all pages; clearing is by range, when the range is shipped. Linux 5.3.
    Manual,
    /// As `Manual`, and arming protects nothing: every page counts as dirty until its range is cleared. Linux 5.7.
    InitiallySet,
}

/// Tracks writes of vCPUs by KVM's dirty log.
///
/// Does not see what this process writes through its own mapping, nor vhost, nor DMA: see [the module](super). Do not
/// fetch or clear the log of its slots while it is armed; a slot that the VMM logs for itself, for a frame buffer say,
/// loses its bits to this source.
///
/// Arming sets the VM's KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 to what its mode needs, and disarming leaves it so: a VMM that
/// uses the log for itself between migrations sets it again.
///
/// It works on VMs without a dirty ring. The descriptor of the VM is duplicated, so the VM lives as long as the source.
///
/// What it costs, in milliseconds (2 virtual CPUs, Linux 6.18, one slot; of the 4 GiB, 3 were written), and the longest
/// time for which one call held KVM's locks:
///
/// | | arm | round 0 | fetch | harvest, clean | 10 % dirty | all dirty | longest call | disarm |
/// |---|---|---|---|---|---|---|---|---|
/// | `InitiallySet`, 1 GiB | 0.07 | 1.7 | 0.003 to 0.01 | 0.01 | 0.3 | 1.8 | 0.14 | 0.2 |
/// | `InitiallySet`, 4 GiB | 0.2 | 7.0 | 0.01 to 0.02 | 0.05 | 0.9 | 5.2 | 0.19 | 0.5 |
/// | `Manual`, 1 GiB | 0.2 | 0.01 | 0.004 to 0.01 | 0.01 | 0.2 | 2 to 6 | 0.14, once 4 | 0.3 |
/// | `Legacy`, 1 GiB | 1.0 | 0.002 | 0.004 clean, 0.2 at 10 %, 1.7 full | 0.002 | 0.003 | 0.002 | 1.7 | 3 |
/// | `Legacy`, 4 GiB | 0.7 | 0.006 | 0.01 clean, 0.6 at 10 %, 5.1 full | 0.005 | 0.006 | 0.006 | 5.1 | 0.6 |
///
/// One KVM_CLEAR_DIRTY_LOG of a chunk of 16384 pages: none if it is clean, 0.017 if 10 % of it are dirty, 0.10 to 0.14 if
/// all are. KVM ran this guest in software there, with nothing in its page tables to protect: with hardware support expect
/// clearing, and the guest's first write to each page after it, to cost more. [`costs`](KvmDirtyLog::costs) tells.
///
/// ```
/// use pageferry::dirty::{DirtyError, DirtySource, kvm::{KvmDirtyLog, KvmSlot}};
/// use pageferry::memory::Ram;
/// use std::os::fd::BorrowedFd;
///
/// /// `slots` as the VMM gave them to KVM_SET_USER_MEMORY_REGION: slot, flags, guest address, bytes, host address.
/// ///
/// /// # Safety
/// /// The VM has these slots.
/// unsafe fn track(vm: BorrowedFd<'_>, slots: &[(u32, u32, u64, u64, u64)], ram: &Ram) -> Result<u64, DirtyError> {
///     // This function's contract is that of `KvmSlot::new`.
///     let slots = slots.iter().map(|s| unsafe { KvmSlot::new(s.0, s.1, s.2, s.3, s.4) });
///     let Ok(mut log) = KvmDirtyLog::new(vm, slots) else { return Ok(0) }; // not a VM
///     log.arm(ram)?;
///     log.begin_round()
/// }
/// ```
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: OwnedFd,
    slots: Box<[KvmSlot]>,
    mode: LogMode,
    /// Whether the kernel knows the capability at all: then it is told what not to do, too.
    has_manual: bool,
    toggle: Toggle,
    recorder: Recorder,
    armed: Option<Armed>,
}

#[derive(Debug)]
struct Armed {
    map: SlotMap,
    /// What is dirty, block by block: what was fetched from all slots, and what was given back. A bit leaves it when it
    /// is harvested.
    known: Vec<Box<[u64]>>,
    /// Where the log of one slot is fetched to, with room for the largest.
    fetched: Box<[u64]>,
    ram: Ram,
}

impl KvmDirtyLog {
    /// The log of these slots of this VM. Slots that show none of the RAM that is armed later stay as they are.
    ///
    /// # Errors
    /// The descriptor is no VM's, a slot is not made of whole pages (`InvalidInput`), or no descriptor was free.
    pub fn new(vm: impl AsFd, slots: impl IntoIterator<Item = KvmSlot>) -> io::Result<KvmDirtyLog> {
        let vm = vm.as_fd().try_clone_to_owned()?;
        let slots = check_slots(slots)?;
        let offered = kvm::check_extension(vm.as_fd(), kvm::CAP_MANUAL_DIRTY_LOG_PROTECT2)?;
        let mode = match (offered & kvm::MANUAL_PROTECT_ENABLE != 0, offered & kvm::INITIALLY_SET != 0) {
            (true, true) => LogMode::InitiallySet,
            (true, false) => LogMode::Manual,
            (false, _) => LogMode::Legacy,
        };
        let (toggle, recorder) = (Toggle::default(), Recorder::default());
        Ok(KvmDirtyLog { vm, slots, mode, has_manual: offered != 0, toggle, recorder, armed: None })
    }

    /// Uses no more of the log than this, for comparison. Disarms.
    #[must_use]
    pub fn with_mode_at_most(mut self, mode: LogMode) -> Self {
        self.disarm();
        self.mode = self.mode.min(mode);
        self
    }

    /// Has the VMM turn the logging of its slots on (true) and off, instead of KVM_SET_USER_MEMORY_REGION. Off means
    /// what the slot's flags said. Disarms.
    #[must_use]
    pub fn with_toggle(mut self, toggle: impl FnMut(&KvmSlot, bool) -> io::Result<()> + Send + 'static) -> Self {
        self.disarm();
        self.toggle = Toggle::by(toggle);
        self
    }

    /// Tells of every call into KVM, after it, on the thread that made it. The first one that is set stays.
    #[must_use]
    pub fn on_call(self, on_call: impl Fn(&KvmCall) + Send + Sync + 'static) -> Self {
        self.recorder.tell(on_call);
        self
    }

    /// How much of the log is used: what the kernel has, unless less was asked for.
    pub fn mode(&self) -> LogMode {
        self.mode
    }

    /// What it has cost so far.
    pub fn costs(&self) -> KvmCosts {
        self.recorder.meter.read()
    }

    /// Reads the costs while a migration has the source.
    pub fn meter(&self) -> CostMeter {
        self.recorder.meter.clone()
    }

    /// What arming ends with, once logging is on.
    fn begin(&self, map: SlotMap, ram: &Ram) -> Result<Armed, (DirtyError, SlotMap)> {
        let words_of = |pages: u64| vec![0u64; pages.div_ceil(64) as usize].into_boxed_slice();
        let mut known: Vec<_> = ram.blocks().iter().map(|block| words_of(block.pages())).collect();
        if self.mode == LogMode::InitiallySet {
            // KVM's own bits are all ones, and nothing is protected until they are cleared.
            known.iter_mut().zip(ram.blocks()).for_each(|(words, block)| set_range(words, 0, block.pages()));
        }
        let largest = used(&self.slots, &map).map(pages_of).max().unwrap_or(0);
        let mut armed = Armed { map, known, fetched: words_of(largest), ram: ram.clone() };
        for (index, slot) in self.slots.iter().enumerate() {
            if armed.map.of_slot(index).is_empty() {
                continue;
            }
            // Proves that the slot is logged, and that this VM has no dirty ring instead.
            let proved = match self.mode {
                LogMode::Legacy => armed.fetch(self.vm.as_fd(), &self.recorder, index, slot),
                // Clears nothing: no page is named.
                LogMode::Manual | LogMode::InitiallySet => {
                    kvm::clear_dirty_log(self.vm.as_fd(), slot.slot(), 0, 0, &[])
                }
            };
            if let Err(source) = proved {
                return Err((DirtyError::Slot { slot: slot.slot(), what: "use the dirty log", source }, armed.map));
            }
        }
        Ok(armed)
    }
}

impl Armed {
    /// KVM_GET_DIRTY_LOG of one slot, OR-ed into what is known.
    fn fetch(
        &mut self,
        vm: BorrowedFd<'_>,
        recorder: &Recorder,
        index: usize,
        slot: &KvmSlot,
    ) -> io::Result<()> {
        let pages = pages_of(slot);
        let fetched = &mut self.fetched[..pages.div_ceil(64) as usize];
        recorder.call(KvmCallKind::Get, Some(slot.slot()), || kvm::get_dirty_log(vm, slot, fetched), |_| pages)?;
        for piece in self.map.of_slot(index) {
            or_bits(&mut self.known[piece.block], piece.block_page, fetched, piece.slot_page, piece.pages);
        }
        Ok(())
    }

    /// KVM_CLEAR_DIRTY_LOG of what is known to be dirty in some pages of a block, in every slot that shows them.
    fn clear(
        &self,
        vm: BorrowedFd<'_>,
        recorder: &Recorder,
        slots: &[KvmSlot],
        block: usize,
        pages: Range<u64>,
    ) -> io::Result<()> {
        let mut bits = [0u64; CLEAR_WORDS_MAX];
        for piece in self.map.within(block, pages.start, pages.end) {
            let slot = &slots[piece.slot];
            let end = piece.slot_page + piece.pages;
            // Whole words of the slot, or up to its end: what KVM demands. Bits beside the piece stay zero.
            let mut from = piece.slot_page & !63;
            while from < end {
                let to = end.next_multiple_of(64).min(pages_of(slot)).min(from + CLEAR_PAGES_MAX);
                let bits = &mut bits[..(to - from).div_ceil(64) as usize];
                bits.fill(0);
                let (first, past) = (piece.slot_page.max(from), end.min(to));
                let known_first = piece.block_page + (first - piece.slot_page);
                or_bits(bits, first - from, &self.known[block], known_first, past - first);
                // What was fetched from another slot that shows the same page is cleared here, too: the page is read
                // after that. What is dirty and was not fetched from any is not cleared, and is there next time.
                if bits.iter().any(|word| *word != 0) {
                    // No truncation: at most CLEAR_PAGES_MAX.
                    let clear = || kvm::clear_dirty_log(vm, slot.slot(), from, (to - from) as u32, bits);
                    recorder.call(KvmCallKind::Clear, Some(slot.slot()), clear, |_| to - from)?;
                }
                from = to;
            }
        }
        Ok(())
    }

    /// The pages that `words` words from `first_page` on stand for, up to the end of the block.
    fn pages(&self, block: BlockId, first_page: u64, words: usize) -> Result<Range<u64>, DirtyError> {
        let out_of_range = DirtyError::OutOfRange { block, first_page, words };
        let Some(pages) = self.ram.block(block).map(|block| block.pages()) else { return Err(out_of_range) };
        let end = (words as u64).checked_mul(64).and_then(|pages| pages.checked_add(first_page));
        match end {
            Some(end) if first_page % 64 == 0 && end <= pages.next_multiple_of(64) => Ok(first_page..end.min(pages)),
            _ => Err(out_of_range),
        }
    }
}

impl DirtySource for KvmDirtyLog {
    /// What was dirty before may be reported, and in mode `InitiallySet` every page is reported by its first harvest.
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.disarm();
        let begun = Instant::now();
        let map = map(&self.slots, ram)?;
        if self.has_manual {
            let wanted = match self.mode {
                LogMode::Legacy => 0,
                LogMode::Manual => kvm::MANUAL_PROTECT_ENABLE,
                LogMode::InitiallySet => kvm::MANUAL_PROTECT_ENABLE | kvm::INITIALLY_SET,
            };
            kvm::enable_cap(self.vm.as_fd(), kvm::CAP_MANUAL_DIRTY_LOG_PROTECT2, wanted).map_err(|source| {
                DirtyError::Unsupported {
                    what: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
                    advice: "KVM offers it and refuses it: use the legacy log, by with_mode_at_most",
                    source,
                }
            })?;
        }
        self.toggle.on(self.vm.as_fd(), used(&self.slots, &map))?;
        match self.begin(map, ram) {
            Ok(armed) => self.armed = Some(armed),
            Err((e, map)) => {
                self.toggle.off(self.vm.as_fd(), used(&self.slots, &map));
                return Err(e);
            }
        }
        self.recorder.meter.armed(begun);
        Ok(())
    }

    /// Fetches the log of every slot. Exact, unless writes go on meanwhile: a page that two slots show, or that was
    /// given back, counts once.
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        for (index, slot) in self.slots.iter().enumerate() {
            if !armed.map.of_slot(index).is_empty() {
                armed
                    .fetch(self.vm.as_fd(), &self.recorder, index, slot)
                    .map_err(|source| DirtyError::Slot { slot: slot.slot(), what: "fetch the dirty log", source })?;
            }
        }
        Ok(armed.known.iter().map(|words| count(words)).sum())
    }

    /// If clearing fails, `words` is all ones up to the end of the block, and the error is returned as well.
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        let pages = armed.pages(block, first_page, words.len())?;
        let index = usize::from(block.0);
        let cleared = match self.mode {
            // Cleared when it was fetched.
            LogMode::Legacy => Ok(()),
            LogMode::Manual | LogMode::InitiallySet => {
                armed.clear(self.vm.as_fd(), &self.recorder, &self.slots, index, pages.clone())
            }
        };
        let known = &mut armed.known[index][(first_page / 64) as usize..][..words.len()];
        words.iter_mut().zip(&*known).for_each(|(word, known)| *word |= known);
        known.fill(0);
        cleared.map_err(|source| {
            set_range(words, 0, pages.end - pages.start);
            DirtyError::Scan { block, first_page, source }
        })
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let armed = self.armed.as_mut().ok_or(DirtyError::NotArmed)?;
        let pages = armed.pages(block, first_page, words.len())?;
        or_bits(&mut armed.known[usize::from(block.0)], pages.start, words, 0, pages.end - pages.start);
        Ok(())
    }

    fn disarm(&mut self) {
        let Some(armed) = self.armed.take() else { return };
        let begun = Instant::now();
        self.toggle.off(self.vm.as_fd(), used(&self.slots, &armed.map));
        self.recorder.meter.disarmed(begun);
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        self.disarm();
    }
}
