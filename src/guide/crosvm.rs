//! A sketch for crosvm: memory of its own kind, and tracking that needs no KVM slots.
//!
//! Names as in its public sources: `vm_memory::GuestMemory::with_regions` and `MemoryRegionInformation` of crosvm's own
//! crate of that name, `vm_control::{VmRequest, VmResponse}` and a `Tube` to the main loop; looked up in November 2026. It
//! was compiled against stand-ins for them, and never run.
//!
//! Guest RAM is one shared memfd, mapped piece by piece: `WriteProtect` tracks it, and holes of the memfd are pages that
//! nobody ever touched. **But crosvm jails each device in a process of its own, which maps the memfd for itself**: neither
//! write protection nor KVM sees what these processes write. So the devices must run in the main process
//! (`--disable-sandbox`), or share bitmaps with it and mark them; that would be part of the work.
//!
//! ```no_run
//! use std::io::Write;
//! use std::os::fd::BorrowedFd;
//! use pageferry::units::PageSize;
//! use pageferry::*;
//! # mod base {
//! #     pub struct Tube;
//! #     impl Tube {
//! #         pub fn send<T>(&self, _: &T) -> std::io::Result<()> { Ok(()) }
//! #         pub fn recv<T>(&self) -> std::io::Result<T> { panic!("a stub of crosvm's") }
//! #     }
//! # }
//! # mod vm_control {
//! #     #[derive(Debug)] pub enum VmRequest { SuspendVm, ResumeVm }
//! #     #[derive(Debug)] pub enum VmResponse { Ok, ErrString(String) }
//! # }
//! # mod vm_memory {
//! #     #[derive(Clone, Copy)] pub struct GuestAddress(pub u64);
//! #     impl GuestAddress { pub fn offset(&self) -> u64 { self.0 } }
//! #     pub struct BackingObject;
//! #     impl BackingObject { pub fn as_raw_descriptor(&self) -> i32 { panic!("a stub of crosvm's") } }
//! #     pub struct MemoryRegionInformation<'a> {
//! #         pub index: usize, pub guest_addr: GuestAddress, pub size: usize, pub host_addr: usize,
//! #         pub shm: &'a BackingObject, pub shm_offset: u64,
//! #     }
//! #     #[derive(Clone)] pub struct GuestMemory;
//! #     impl GuestMemory {
//! #         pub fn with_regions<E>(&self, _: impl FnMut(MemoryRegionInformation) -> Result<(), E>) -> Result<(), E> { Ok(()) }
//! #     }
//! # }
//! use base::Tube;
//! use vm_control::{VmRequest, VmResponse};
//! use vm_memory::{GuestMemory, MemoryRegionInformation};
//!
//! fn ram_of(memory: &GuestMemory) -> Result<Ram, HookError> {
//!     let mut blocks = Vec::new();
//!     memory.with_regions(|region: MemoryRegionInformation| -> Result<(), HookError> {
//!         let (name, host) = (format!("ram{}", region.index), region.host_addr as *mut u8);
//!         // SAFETY: the region is mapped for as long as a clone of `memory` lives, which the `Ram` below holds; crosvm
//!         // makes no reference into guest RAM either.
//!         let block = unsafe {
//!             RamBlock::new(&name, region.guest_addr.offset(), host, region.size as u64, PageSize::SIZE_4K)
//!         }?;
//!         // SAFETY: the descriptor is the region's, and open.
//!         let shm = unsafe { BorrowedFd::borrow_raw(region.shm.as_raw_descriptor()) };
//!         blocks.push(block.with_shared_file(shm, region.shm_offset)?);
//!         Ok(())
//!     })?;
//!     Ok(Ram::with_keep_alive(memory.clone(), blocks)?)
//! }
//!
//! /// Asks the main loop, from another thread: the loop must not be the one that is blocked in `migrate`.
//! struct Hooks { control: Tube, save: Box<dyn FnMut() -> Result<Vec<u8>, HookError>> }
//!
//! impl Hooks {
//!     fn ask(&self, request: VmRequest) -> Result<(), HookError> {
//!         self.control.send(&request)?;
//!         match self.control.recv::<VmResponse>()? {
//!             VmResponse::Ok => Ok(()),
//!             other => Err(format!("{request:?} was answered by {other:?}").into()),
//!         }
//!     }
//! }
//!
//! impl Guest for Hooks {
//!     // vCPUs and devices: `SuspendVcpus` would leave devices at work.
//!     fn pause(&mut self) -> Result<(), HookError> { self.ask(VmRequest::SuspendVm) }
//!     fn resume(&mut self) -> Result<(), HookError> { self.ask(VmRequest::ResumeVm) }
//!     fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
//!         Ok(out.write_all(&(self.save)()?)?) // the vCPUs, irq chip and devices of a snapshot, without its memory
//!     }
//! }
//!
//! fn send(memory: &GuestMemory, hooks: &mut Hooks, to: &str) -> Result<Outcome, HookError> {
//!     let ram = ram_of(memory)?;
//!     let mut tracking = WriteProtect::new()?; // opens what it needs: before the jail closes
//!     Ok(Source::builder(ram).channels(2).connect(to)?.migrate(&mut tracking, hooks).outcome)
//! }
//! ```
