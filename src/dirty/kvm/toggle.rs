//! Turns logging on and off, slot by slot, all of them or none; and what both sources demand of slots and blocks.
#![forbid(unsafe_code)]

use super::slots::{SlotMap, Uncovered};
use crate::dirty::DirtyError;
use crate::memory::Ram;
use crate::sys::kvm::{KvmSlot, set_logging};
use crate::sys::memory::host_page_bytes;
use crate::units::BlockId;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

type Callback = Box<dyn FnMut(&KvmSlot, bool) -> io::Result<()> + Send>;

/// Who sets the flags of slots: KVM_SET_USER_MEMORY_REGION, or the VMM.
#[derive(Default)]
pub(super) struct Toggle {
    callback: Option<Callback>,
}

impl Toggle {
    pub(super) fn by(callback: impl FnMut(&KvmSlot, bool) -> io::Result<()> + Send + 'static) -> Toggle {
        Toggle { callback: Some(Box::new(callback)) }
    }

    fn set(&mut self, vm: BorrowedFd<'_>, slot: &KvmSlot, log: bool) -> io::Result<()> {
        match &mut self.callback {
            Some(callback) => callback(slot, log),
            None => set_logging(vm, slot, log),
        }
    }

    /// Turns logging on for all of `slots`. If one fails it is turned off again for those before.
    pub(super) fn on<'a>(
        &mut self,
        vm: BorrowedFd<'_>,
        slots: impl Iterator<Item = &'a KvmSlot> + Clone,
    ) -> Result<(), DirtyError> {
        for (index, slot) in slots.clone().enumerate() {
            if let Err(source) = self.set(vm, slot, true) {
                self.off(vm, slots.take(index));
                return Err(DirtyError::Slot { slot: slot.slot(), what: "turn logging on", source });
            }
        }
        Ok(())
    }

    /// Turns logging off. A slot where that fails is gone, or its VM is: nothing is logged there either.
    pub(super) fn off<'a>(&mut self, vm: BorrowedFd<'_>, slots: impl Iterator<Item = &'a KvmSlot>) {
        for slot in slots {
            let _ = self.set(vm, slot, false);
        }
    }
}

impl fmt::Debug for Toggle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.callback.is_some() { "the VMM's callback" } else { "KVM_SET_USER_MEMORY_REGION" })
    }
}

/// Refuses slots that KVM would not have: empty, or not made of whole pages.
pub(super) fn check_slots(slots: impl IntoIterator<Item = KvmSlot>) -> io::Result<Box<[KvmSlot]>> {
    let slots: Box<[KvmSlot]> = slots.into_iter().collect();
    let page = host_page_bytes();
    for slot in &slots {
        let whole = slot.bytes() != 0 && slot.bytes() % page == 0 && slot.host_address() % page == 0;
        if !whole || slot.host_address().checked_add(slot.bytes()).is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("not a slot of whole pages: {slot:?}")));
        }
    }
    Ok(slots)
}

/// How many pages a slot has.
pub(super) fn pages_of(slot: &KvmSlot) -> u64 {
    slot.bytes() / host_page_bytes()
}

/// Relates the blocks of `ram` to the slots.
pub(super) fn map(slots: &[KvmSlot], ram: &Ram) -> Result<SlotMap, DirtyError> {
    let host_page_bytes = host_page_bytes();
    for (block, of) in ram.iter() {
        if of.page_size().bytes() != host_page_bytes {
            return Err(DirtyError::PageSize { block, page_bytes: of.page_size().bytes(), host_page_bytes });
        }
    }
    let range = |start: u64, bytes: u64| start..start + bytes;
    let blocks: Vec<Range<u64>> = ram.blocks().iter().map(|block| range(block.host_address(), block.bytes())).collect();
    let slots: Vec<Range<u64>> = slots.iter().map(|slot| range(slot.host_address(), slot.bytes())).collect();
    SlotMap::new(&blocks, &slots, host_page_bytes).map_err(|Uncovered { block, page }| {
        // No truncation: a RAM has at most BLOCKS_MAX blocks.
        DirtyError::Uncovered { block: BlockId(block as u16), first_page: page }
    })
}

/// The slots that show a part of the RAM that `map` was made for.
pub(super) fn used<'a>(slots: &'a [KvmSlot], map: &'a SlotMap) -> impl Iterator<Item = &'a KvmSlot> + Clone {
    slots.iter().enumerate().filter(|(index, _)| !map.of_slot(*index).is_empty()).map(|(_, slot)| slot)
}
