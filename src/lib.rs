//! Ships the RAM of a running virtual machine to another process or machine while the guest keeps writing to it.

pub mod sync;
pub mod units;

pub mod barrier;
pub mod bell;
pub mod crew;
pub mod dirty;
pub mod gate;
pub mod ring;

#[cfg(not(loom))]
pub mod digest;
#[cfg(not(loom))]
pub mod memory;
#[cfg(not(loom))]
pub mod sys;
#[cfg(not(loom))]
pub mod wire;
