//! QEMU's live migration, spoken by this library: its [`wire`], and [`Qemu`], which lets a
//! [`Source`](crate::Source) or a [`Target`](crate::Target) speak it.
//!
//! A VMM that speaks it says two things as QEMU would: its `setup_bytes` are the configuration, which begins with the
//! machine type, and its `save_state` is what stands behind RAM in QEMU's stream: the sections of its devices, the end
//! mark, and their description in JSON. Where both ends are its own, the sections hold what it likes. Digests are no part
//! of this wire, so nothing is verified.
//!
//! ```
//! use std::io::{Read, Write};
//!
//! use pageferry::memory::{Backing, Initial};
//! use pageferry::qemu::Qemu;
//! use pageferry::units::{BlockId, PageSize};
//! use pageferry::wire::control::Setup;
//! use pageferry::{DirtyBitmap, Guest, HookError, Incoming, Outcome, Ram, RamBlock, Source, StateWriter, Target, Verify};
//!
//! const JSON: &[u8] = br#"{"configuration": {}, "page_size": 4096, "devices": []}"#;
//!
//! struct Vm;
//! impl Guest for Vm {
//!     fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> { Ok(b"\x07\0\0\0\x06my-vmm".to_vec()) }
//!     fn pause(&mut self) -> Result<(), HookError> { Ok(()) } // vCPUs stand still
//!     fn resume(&mut self) -> Result<(), HookError> { Ok(()) } // it did not work out: they run on
//!     fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
//!         out.write_all(b"\x04registers")?;
//!         out.write_all(&[0, 6])?;
//!         out.write_all(&(JSON.len() as u32).to_be_bytes())?;
//!         Ok(out.write_all(JSON)?)
//!     }
//! }
//!
//! #[derive(Default)]
//! struct NewVm(Option<Ram>, Vec<u8>);
//! impl Incoming for NewVm {
//!     fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
//!         let blocks = setup.blocks.iter().map(|b| {
//!             let block = RamBlock::anonymous(&b.name, b.guest_address, b.bytes, b.page_size, Backing::Base)?;
//!             Ok(block.with_initial(Initial::Zeroed))
//!         });
//!         let ram = Ram::new(blocks.collect::<Result<Vec<_>, HookError>>()?)?;
//!         Ok(self.0.insert(ram).clone())
//!     }
//!     fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
//!         state.read_to_end(&mut self.1)?;
//!         Ok(())
//!     }
//!     fn run(&mut self) -> Result<(), HookError> { Ok(()) }
//! }
//!
//! // How many channels there are is in no stream: both sides know it. Instead of either end, QEMU may be there.
//! let target = Target::builder().framing(Qemu::new(2)).listen("127.0.0.1:0")?;
//! let address = target.address().unwrap().to_string();
//! let receiving = std::thread::spawn(move || {
//!     let mut vm = NewVm::default();
//!     (target.receive(&mut vm), vm)
//! });
//!
//! let ram = Ram::new([RamBlock::anonymous("pc.ram", 0, 8 << 20, PageSize::SIZE_4K, Backing::Base)?])?;
//! let mut dirty = DirtyBitmap::for_ram(&ram); // vCPU threads mark it after each write
//! # // SAFETY: the page is inside the block, and nothing else uses it yet.
//! # unsafe { ram.blocks()[0].range(7, 1).unwrap().ptr.write(42) };
//! dirty.mark(BlockId(0), 7);
//! let source = Source::builder(ram).framing(Qemu::new(2)).verify(Verify::Off).connect(&address)?;
//! assert_eq!(source.migrate(&mut dirty, &mut Vm).outcome, Outcome::Completed);
//!
//! let (received, vm) = receiving.join().unwrap();
//! assert_eq!(received.outcome, Outcome::Completed);
//! assert!(vm.1.starts_with(b"\x04registers"));
//! # assert_eq!(unsafe { vm.0.unwrap().blocks()[0].range(7, 1).unwrap().ptr.read() }, 42);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

pub mod compress;
mod framing;
pub mod relay;
mod seen;
mod source;
mod target;
pub mod wire;

pub use framing::Qemu;
pub use seen::{Counts, Facts, Seen};
