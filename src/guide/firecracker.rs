//! A sketch for Firecracker: its regions, its bitmaps beside them, and its KVM dirty bitmap.
//!
//! Names as in its public sources: `vstate::memory::{GuestMemoryMmap, GuestRegionMmapExt}` (at commit 004d9353),
//! `Vmm::{pause_vm, resume_vm, save_state}`, `Vm::{get_dirty_bitmap, reset_dirty_bitmap}` and `DirtyBitmap`, a map from KVM
//! slot to words; looked up in November 2026. It was compiled against stand-ins for them, and never run. Firecracker has
//! snapshots and no live migration: what is sketched here it would have to want.
//!
//! Device threads write through `vm-memory` and are seen in the regions' bitmaps, which exist only where dirty pages are
//! tracked from boot; vCPUs are seen by KVM. Both together are the dirty source. A microVM that was restored by userfaultfd
//! must claim nothing of its mappings, and one with hotpluggable memory cannot be sent this way: slots that are not
//! plugged in are mapped without access.
//!
//! ```no_run
//! use std::io::{self, Write};
//! use std::ops::Deref;
//! use std::sync::{Arc, Mutex};
//! use pageferry::dirty::combined::Combined;
//! use pageferry::dirty::vm_memory::TrackedRegion;
//! use pageferry::memory::vm_memory::{GuestRam, Mapping};
//! use pageferry::units::BlockId;
//! use pageferry::*;
//! # use std::collections::HashMap;
//! # use vm_memory::bitmap::{AtomicBitmap, BS};
//! # use vm_memory::*;
//! # type GuestRegionMmap = vm_memory::GuestRegionMmap<Option<AtomicBitmap>>;
//! # pub struct GuestRegionMmapExt { pub inner: GuestRegionMmap }
//! # impl GuestMemoryRegion for GuestRegionMmapExt {
//! #     type B = Option<AtomicBitmap>;
//! #     fn len(&self) -> GuestUsize { self.inner.len() }
//! #     fn start_addr(&self) -> GuestAddress { self.inner.start_addr() }
//! #     fn bitmap(&self) -> BS<'_, Self::B> { self.inner.bitmap() }
//! # }
//! # impl GuestMemoryRegionBytes for GuestRegionMmapExt {}
//! # type GuestMemoryMmap = GuestRegionCollection<GuestRegionMmapExt>;
//! # pub struct Vm;
//! # impl Vm {
//! #     fn guest_memory(&self) -> &GuestMemoryMmap { panic!("a stub of Firecracker's") }
//! #     fn get_dirty_bitmap(&self) -> io::Result<HashMap<u32, Vec<u64>>> { panic!("a stub of Firecracker's") }
//! #     fn reset_dirty_bitmap(&self) {}
//! # }
//! # pub struct Vmm { pub vm: Arc<Vm> }
//! # impl Vmm {
//! #     fn pause_vm(&mut self) -> io::Result<()> { Ok(()) }
//! #     fn resume_vm(&mut self) -> io::Result<()> { Ok(()) }
//! #     fn save_state(&mut self, _: &()) -> io::Result<Vec<u8>> { Ok(Vec::new()) }
//! # }
//! # fn serialize(state: &[u8]) -> io::Result<Vec<u8>> { Ok(state.to_vec()) }
//! # let _ = |vmm: Arc<Mutex<Vmm>>| send(vmm, (), false, "");
//! # type VmInfo = ();
//!
//! impl TrackedRegion for GuestRegionMmapExt {
//!     type Bits = Option<AtomicBitmap>;
//!     fn page_bits(&self) -> &Self::Bits { self.inner.deref().bitmap() }
//! }
//!
//! /// KVM's bitmaps, which are cleared when they are fetched, kept until they are harvested.
//! struct KvmBitmaps { vm: Arc<Vm>, kept: pageferry::DirtyBitmap }
//!
//! impl DirtySource for KvmBitmaps {
//!     fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
//!         self.vm.reset_dirty_bitmap();
//!         self.kept.arm(ram)
//!     }
//!     fn begin_round(&mut self) -> Result<u64, DirtyError> {
//!         let failed = |source| DirtyError::Scan { block: BlockId(0), first_page: 0, source };
//!         for (slot, words) in self.vm.get_dirty_bitmap().map_err(failed)? {
//!             // Without hotpluggable memory, slot i is region i is block i.
//!             self.kept.give_back(BlockId(slot as u16), 0, &words)?;
//!         }
//!         self.kept.begin_round()
//!     }
//!     fn harvest(&mut self, block: BlockId, first: u64, words: &mut [u64]) -> Result<(), DirtyError> {
//!         self.kept.harvest(block, first, words)
//!     }
//!     fn give_back(&mut self, block: BlockId, first: u64, words: &[u64]) -> Result<(), DirtyError> {
//!         self.kept.give_back(block, first, words)
//!     }
//!     fn disarm(&mut self) {}
//! }
//!
//! struct Hooks(Arc<Mutex<Vmm>>, VmInfo);
//!
//! impl Guest for Hooks {
//!     fn pause(&mut self) -> Result<(), HookError> { Ok(self.0.lock().unwrap().pause_vm()?) }
//!     fn resume(&mut self) -> Result<(), HookError> { Ok(self.0.lock().unwrap().resume_vm()?) }
//!     fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
//!         let state = self.0.lock().unwrap().save_state(&self.1)?;
//!         Ok(out.write_all(&serialize(&state)?)?) // in their snapshot format
//!     }
//! }
//!
//! fn send(vmm: Arc<Mutex<Vmm>>, info: VmInfo, on_demand: bool, to: &str) -> Result<Outcome, HookError> {
//!     let vm = vmm.lock().unwrap().vm.clone();
//!     let memory = Arc::new(vm.guest_memory().clone()); // the same regions
//!     let mapping = move |region: &GuestRegionMmapExt| if on_demand { Mapping::Unknown } else { Mapping::of(&region.inner) };
//!     let ram = GuestRam::new(memory.clone()).mapped_as(mapping).ram()?;
//!     let kvm = KvmBitmaps { vm, kept: pageferry::DirtyBitmap::for_ram(&ram) };
//!     let mut dirty = Combined::new(vec![Box::new(RegionBitmaps::new(memory)), Box::new(kvm)]);
//!     Ok(Source::builder(ram).channels(2).connect(to)?.migrate(&mut dirty, &mut Hooks(vmm, info)).outcome)
//! }
//! ```
//!
//! A device's event handler runs on the thread that has the `Vmm` locked, so `pause_vm` under the lock leaves no device
//! at work; I/O that its io_uring engine has begun has to be drained there as well, as its snapshots do. A snapshot needs
//! the bitmaps, too: after a failed migration they have back what was harvested, and KVM's part is in `kept`.
