//! Ships the RAM of a running virtual machine to another process or machine while the guest keeps writing to it.
//!
//! `pageferry` is the page shipping core of a live migration, for VMMs to link: a scanner over the dirty bitmap pushes
//! runs of pages into one lock-free ring per channel; workers send them with one `sendmsg` a batch straight
//! from guest RAM; at the other end lanes let the kernel write them in place. Around it: rounds until little enough is left,
//! a hand-over that can never leave two guests running, and digests that prove that what was sent is what landed.
//!
//! # When not to use it
//! For post-copy, for disks, or to move the state of devices by itself: that state is opaque bytes here, which the VMM
//! saves and loads. And not on anything but Linux.
//!
//! # The whole of it
//! A source gives its RAM, something that knows what is dirty, and three hooks; a target gives RAM and three hooks.
//!
//! ```
//! use std::io::{Read, Write};
//! use pageferry::memory::{Backing, Initial};
//! use pageferry::units::{BlockId, PageSize};
//! use pageferry::wire::control::Setup;
//! use pageferry::*;
//!
//! struct Vm; // the VMM at the source
//! impl Guest for Vm {
//!     fn pause(&mut self) -> Result<(), HookError> { Ok(()) } // stop vCPUs and DMA
//!     fn resume(&mut self) -> Result<(), HookError> { Ok(()) } // it stays here after all
//!     fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
//!         Ok(out.write_all(b"registers")?)
//!     }
//! }
//!
//! #[derive(Default)]
//! struct NewVm(Option<Ram>, String); // the VMM at the target
//! impl Incoming for NewVm {
//!     fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
//!         let blocks = setup.blocks.iter().map(|b| {
//!             let block = RamBlock::anonymous(&b.name, b.guest_address, b.bytes, b.page_size, Backing::Base)?;
//!             Ok(block.with_initial(Initial::Zeroed)) // fresh memory
//!         });
//!         let ram = Ram::new(blocks.collect::<Result<Vec<_>, HookError>>()?)?;
//!         Ok(self.0.insert(ram).clone())
//!     }
//!     fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
//!         state.read_to_string(&mut self.1)?;
//!         Ok(())
//!     }
//!     fn run(&mut self) -> Result<(), HookError> { Ok(()) } // the guest is ours
//! }
//!
//! let target = Target::builder().listen("127.0.0.1:0")?;
//! let address = target.address().unwrap().to_string();
//! let receiving = std::thread::spawn(move || {
//!     let mut vm = NewVm::default();
//!     (target.receive(&mut vm), vm)
//! });
//!
//! let ram = Ram::new([RamBlock::anonymous("pc.ram", 0, 8 << 20, PageSize::SIZE_4K, Backing::Base)?])?;
//! let mut dirty = DirtyBitmap::for_ram(&ram); // vCPU threads mark it after each write
//! # // The page is inside the block, and nothing else uses it yet.
//! # unsafe { ram.blocks()[0].range(7, 1).unwrap().ptr.write(42) };
//! dirty.mark(BlockId(0), 7);
//! let sent = Source::builder(ram).channels(2).connect(&address)?.migrate(&mut dirty, &mut Vm);
//!
//! assert_eq!(sent.outcome, Outcome::Completed);
//! assert!(sent.verified);
//! let (received, vm) = receiving.join().unwrap();
//! assert_eq!(received.outcome, Outcome::Completed);
//! assert_eq!(vm.1, "registers");
//! # assert_eq!(unsafe { vm.0.unwrap().blocks()[0].range(7, 1).unwrap().ptr.read() }, 42);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where to look
//! [`guide`] for the way from a memory map to a hand-over, and what that does to the VMM's process; [`Source`] and
//! [`Target`] for the life of a migration, [`DirtySource`] for tracking, [`memory`] for RAM blocks, [`config`] for CPUs
//! and time-outs, [`wire`] for the bytes. The lower layers stay usable alone: [`ring`], [`bell`], [`crew`] and
//! [`channel`] do not know of sessions. `ARCHITECTURE.md` says how it all holds together.

pub mod sync;
pub mod units;

pub mod barrier;
pub mod bell;
pub mod crew;
pub mod digest;
pub mod gate;
pub mod ring;

/// What loom can see of dirty tracking: the rest needs guest memory.
#[cfg(loom)]
pub mod dirty {
    pub mod bitmap;
    pub mod runs;
    /// Of KVM's sources, what is not KVM.
    pub mod kvm {
        pub mod turn;
    }
}

/// Builds modules, and what is re-exported from them, only where loom is not looking: they make system calls.
macro_rules! with_a_kernel {
    ($($item:item)*) => { $(#[cfg(not(loom))] $item)* };
}

with_a_kernel! {
    pub mod cancel;
    pub mod channel;
    pub mod config;
    pub mod dirty;
    pub mod error;
    pub mod framing;
    pub mod guide;
    pub mod journal;
    pub mod memory;
    pub mod net;
    pub mod poll;
    pub mod precopy;
    pub mod progress;
    #[cfg(feature = "qemu")]
    pub mod qemu;
    pub mod scanner;
    pub mod session;
    pub mod settle;
    pub mod source;
    pub mod sys;
    pub mod target;
    pub mod wire;

    pub use cancel::CancelHandle;
    pub use config::{Pin, Timeouts, ZeroCopy};
    pub use dirty::bitmap::DirtyBitmap;
    #[cfg(feature = "kvm")]
    pub use dirty::kvm::{KvmDirtyLog, KvmDirtyRing, KvmSlot};
    #[cfg(feature = "vm-memory")]
    pub use dirty::vm_memory::RegionBitmaps;
    pub use dirty::write_protect::WriteProtect;
    pub use dirty::{DirtyError, DirtySource};
    pub use error::{Failure, HookError, Outcome};
    pub use framing::Framing;
    pub use gate::CancelAnswer;
    #[cfg(feature = "vm-memory")]
    pub use memory::vm_memory::GuestRam;
    pub use memory::{Ram, RamBlock};
    pub use progress::Progress;
    pub use source::{Guest, Source, SourceReport, StateWriter};
    pub use target::{Incoming, Target, TargetReport};
    pub use units::Verify;
}
