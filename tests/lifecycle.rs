//! Life and death of a migration: every step can fail or be cancelled, and nothing is left behind.
#![cfg(not(loom))]

#[path = "lifecycle/cancel.rs"]
mod cancel;
#[path = "lifecycle/failing.rs"]
mod failing;
#[path = "lifecycle/leaks.rs"]
mod leaks;
#[path = "support/peer.rs"]
mod peer;
#[path = "lifecycle/stages.rs"]
mod stages;
mod support;
#[path = "lifecycle/threads.rs"]
mod threads;
#[path = "support/vmm.rs"]
mod vmm;

use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Ram};
use vmm::TestGuest;

/// A guest of a few pages, all of them full.
fn guest(pages: u64) -> TestGuest {
    let ram: Ram = vmm::ram(PageSize::SIZE_4K, &[pages]);
    vmm::fill(&ram, 1);
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}
