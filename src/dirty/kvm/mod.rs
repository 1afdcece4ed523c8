//! Dirty pages as KVM knows them: its dirty log.
//!
//! It sees the writes of vCPUs, through whichever slot, and the kernel's own on behalf of the guest. It does not see what
//! this process writes through its own mapping, what vhost back ends write, or DMA of assigned devices: let these mark
//! a [`DirtyBitmap`](super::bitmap::DirtyBitmap), and combine the two in a [`Combined`](super::combined::Combined).
//! (vhost in the kernel has a log of its own; see Documentation/virt/kvm/api.rst and vhost's VHOST_SET_LOG_BASE.)
#![forbid(unsafe_code)]

pub mod costs;
pub mod log;
pub mod slots;
mod toggle;

pub use crate::sys::kvm::KvmSlot;
pub use costs::{CallCosts, CostMeter, KvmCall, KvmCallKind, KvmCosts};
pub use log::{KvmDirtyLog, LogMode};
