//! Dirty pages as KVM knows them: its dirty log, and its dirty rings.
//!
//! Both see the writes of vCPUs, through whichever slot, and the kernel's own on behalf of the guest. Neither sees what
//! this process writes through its own mapping, what vhost back ends write, or DMA of assigned devices: let these mark
//! a [`DirtyBitmap`](super::bitmap::DirtyBitmap), and combine the two in a [`Combined`](super::combined::Combined).
//! (vhost in the kernel has a log of its own; see Documentation/virt/kvm/api.rst and vhost's VHOST_SET_LOG_BASE.)
//!
//! Which one? [`KvmDirtyLog`] by default. [`KvmDirtyRing`] where guests are very large and write little in a round: its
//! cost goes with the pages written and not with those there are, but every vCPU stops when its ring is full, and it
//! has to be chosen before the first vCPU exists.
#![forbid(unsafe_code)]

mod collector;
pub mod costs;
pub mod log;
pub mod ring;
pub mod slots;
mod toggle;
pub mod turn;

pub use crate::sys::kvm::KvmSlot;
pub use collector::RingFull;
pub use costs::{CallCosts, CostMeter, KvmCall, KvmCallKind, KvmCosts};
pub use log::{KvmDirtyLog, LogMode};
pub use ring::{KvmDirtyRing, RingEnabled};
