//! A sketch for Cloud Hypervisor: its own dirty log, whatever it is made of, as a dirty source.
//!
//! Names as in its public sources: `vm_migration::{Pausable, Snapshottable, Migratable, MemoryRangeTable}` (vm-migration at
//! commit 0150de55) and `vmm::memory_manager::MemoryManager::guest_memory`; looked up in November 2026. It was compiled
//! against stand-ins for them, and never run.
//!
//! `Vm` gathers what KVM, its own device threads and vhost-user back ends wrote, and each `dirty_log` clears what it tells.
//! So it is asked as a round begins, and what it tells is kept in a bitmap until it is harvested; `RegionBitmaps` over the
//! same bitmaps would compete with it. Hooks run on the thread that calls `migrate`, which has the `Vm` locked only as
//! long as each call takes.
//!
//! ```no_run
//! use std::io::{self, Write};
//! use std::sync::{Arc, Mutex};
//! use pageferry::memory::vm_memory::{GuestRam, Mapping};
//! use pageferry::units::BlockId;
//! use pageferry::*;
//! # mod vm_migration {
//! #     pub type MigratableError = std::io::Error;
//! #     pub struct MemoryRange { pub gpa: u64, pub length: u64 }
//! #     #[derive(Default)] pub struct MemoryRangeTable(Vec<MemoryRange>);
//! #     impl MemoryRangeTable { pub fn regions(&self) -> &[MemoryRange] { &self.0 } }
//! #     pub struct Snapshot;
//! #     pub trait Pausable {
//! #         fn pause(&mut self) -> Result<(), MigratableError> { Ok(()) }
//! #         fn resume(&mut self) -> Result<(), MigratableError> { Ok(()) }
//! #     }
//! #     pub trait Snapshottable: Pausable {
//! #         fn snapshot(&mut self) -> Result<Snapshot, MigratableError> { Ok(Snapshot) }
//! #     }
//! #     pub trait Migratable: Send + Pausable + Snapshottable {
//! #         fn start_dirty_log(&mut self) -> Result<(), MigratableError> { Ok(()) }
//! #         fn stop_dirty_log(&mut self) -> Result<(), MigratableError> { Ok(()) }
//! #         fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> { Ok(Default::default()) }
//! #         fn complete_migration(&mut self) -> Result<(), MigratableError> { Ok(()) }
//! #     }
//! # }
//! # use vm_memory::bitmap::AtomicBitmap;
//! # type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;
//! # fn to_json(_: &vm_migration::Snapshot) -> io::Result<Vec<u8>> { Ok(Vec::new()) }
//! use vm_migration::{Migratable, Pausable, Snapshottable};
//!
//! /// What the VM says was dirtied, kept until it is harvested.
//! struct DirtyLog<V> { vm: Arc<Mutex<V>>, ram: Ram, kept: DirtyBitmap }
//!
//! fn refused(source: io::Error) -> DirtyError {
//!     DirtyError::Scan { block: BlockId(0), first_page: 0, source }
//! }
//!
//! impl<V: Migratable> DirtySource for DirtyLog<V> {
//!     fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
//!         self.kept.arm(ram)?;
//!         self.vm.lock().unwrap().start_dirty_log().map_err(refused)
//!     }
//!     fn begin_round(&mut self) -> Result<u64, DirtyError> {
//!         let table = self.vm.lock().unwrap().dirty_log().map_err(refused)?;
//!         for range in table.regions() {
//!             self.kept.mark_guest_bytes(&self.ram, range.gpa, range.length);
//!         }
//!         self.kept.begin_round()
//!     }
//!     fn harvest(&mut self, block: BlockId, first: u64, words: &mut [u64]) -> Result<(), DirtyError> {
//!         self.kept.harvest(block, first, words)
//!     }
//!     fn give_back(&mut self, block: BlockId, first: u64, words: &[u64]) -> Result<(), DirtyError> {
//!         self.kept.give_back(block, first, words)
//!     }
//!     fn disarm(&mut self) {
//!         let _ = self.vm.lock().unwrap().stop_dirty_log();
//!     }
//! }
//!
//! struct Hooks<V>(Arc<Mutex<V>>);
//!
//! impl<V: Migratable> Guest for Hooks<V> {
//!     fn pause(&mut self) -> Result<(), HookError> { Ok(self.0.lock().unwrap().pause()?) }
//!     fn resume(&mut self) -> Result<(), HookError> { Ok(self.0.lock().unwrap().resume()?) }
//!     fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
//!         let snapshot = self.0.lock().unwrap().snapshot()?;
//!         Ok(out.write_all(&to_json(&snapshot)?)?)
//!     }
//! }
//!
//! fn send<V: Migratable>(vm: Arc<Mutex<V>>, memory: Arc<GuestMemoryMmap>, to: &str) -> Result<Outcome, HookError> {
//!     // memory: `memory_manager.guest_memory().memory().into_inner()`. Not `Mapping::of` after a restore on demand.
//!     let ram = GuestRam::new(memory).mapped_as(Mapping::of).ram()?;
//!     let mut log = DirtyLog { vm: vm.clone(), kept: DirtyBitmap::for_ram(&ram), ram: ram.clone() };
//!     let report = Source::builder(ram).channels(4).connect(to)?.migrate(&mut log, &mut Hooks(vm.clone()));
//!     if report.outcome == Outcome::Completed {
//!         vm.lock().unwrap().complete_migration()?; // and then the VM is deleted, as after its own migration
//!     }
//!     Ok(report.outcome)
//! }
//! ```
//!
//! `setup_bytes` would carry the `VmConfig`; at the target, `prepare` builds a `MemoryManager` of it and makes a `Ram` of
//! its memory in the same way, with [`Initial::Zeroed`](crate::memory::Initial); `load_state` restores devices and vCPUs
//! from the snapshot, and `run` is `resume`.
