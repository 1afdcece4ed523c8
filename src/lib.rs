//! Ships the RAM of a running virtual machine to another process or machine while the guest keeps writing to it.

pub mod sync;
pub mod units;

pub mod barrier;
pub mod bell;
pub mod crew;
pub mod digest;
pub mod dirty;
pub mod gate;
pub mod ring;

/// Builds modules, and what is re-exported from them, only where loom is not looking: they make system calls.
macro_rules! with_a_kernel {
    ($($item:item)*) => { $(#[cfg(not(loom))] $item)* };
}

with_a_kernel! {
    pub mod cancel;
    pub mod channel;
    pub mod config;
    pub mod error;
    pub mod journal;
    pub mod memory;
    pub mod net;
    pub mod poll;
    pub mod precopy;
    pub mod progress;
    pub mod scanner;
    pub mod session;
    pub mod source;
    pub mod sys;
    pub mod target;
    pub mod wire;

    pub use cancel::CancelHandle;
    pub use config::{Pin, Timeouts};
    pub use dirty::bitmap::DirtyBitmap;
    pub use dirty::write_protect::WriteProtect;
    pub use dirty::{DirtyError, DirtySource};
    pub use error::{Failure, HookError, Outcome};
    pub use gate::CancelAnswer;
    pub use memory::{Ram, RamBlock};
    pub use progress::Progress;
    pub use source::{Guest, Source, SourceReport, StateWriter};
    pub use target::{Incoming, Target, TargetReport};
    pub use units::Verify;
}
