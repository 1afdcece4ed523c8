//! Everything that this VMM has to do with pageferry: what RAM is, who knows what is dirty, and the hooks of both sides.

// UNSAFETY: pageferry is told which memory slots the VM has.
#![expect(unsafe_code)]

use std::{io::Read, sync::Arc, time::Duration};

use pageferry::memory::{Initial, vm_memory::Mapping};
use pageferry::{DirtySource, Guest, GuestRam, HookError, Incoming, Ram, RegionBitmaps, StateWriter};
use pageferry::{KvmDirtyLog, KvmDirtyRing, KvmSlot, dirty::combined::Combined, wire::control::Setup};
// For the rest of the VMM, which has no other way to the library.
pub use pageferry::dirty::kvm::{CostMeter, KvmCosts};
pub use pageferry::{CancelHandle, Outcome, Progress, Source, SourceReport, Target, TargetReport, Verify, precopy};

use crate::{guest::Config, options::Shipping, vm::Vm};

/// A VM, its RAM as blocks, and what knows which pages were written: made together, kept for every migration.
pub struct Home {
    pub dirty: Box<dyn DirtySource>,
    pub costs: CostMeter,
    pub ram: Ram,
    pub vm: Vm,
}

/// A VM with fresh memory. Its dirty sources are KVM for what vCPUs write, and vm-memory's bitmaps for the device.
pub fn new_home(config: &Config) -> Result<Home, HookError> {
    // Before there are slots and vCPUs: rings of 64 KiB, which a guest that runs freely fills in 10 ms.
    let (vm, rings) = Vm::new(config, |vm| config.dirty_ring.then(|| KvmDirtyRing::enable(vm, 4096)).transpose())?;
    // SAFETY: `Vm` gave KVM exactly these slots, and changes none of them for as long as it lives.
    let slots = vm
        .slots()
        .iter()
        .map(|s| unsafe { KvmSlot::new(s.slot, s.flags, s.guest_phys_addr, s.memory_size, s.userspace_addr) });
    let (costs, vcpus): (_, Box<dyn DirtySource>) = match rings {
        None => KvmDirtyLog::new(vm.fd(), slots).map(|log| (log.meter(), Box::new(log) as _))?,
        Some(enabled) => {
            let ring = Box::new(KvmDirtyRing::new(vm.fd(), enabled, vm.vcpus().raw_fds(), slots)?);
            let full = ring.vcpu_handle();
            vm.vcpus().set_relief(Arc::new(move || full.relieve()));
            (ring.meter(), ring)
        }
    };
    let device = Box::new(RegionBitmaps::new(Arc::clone(vm.memory())));
    let ram = GuestRam::new(Arc::clone(vm.memory())).mapped_as(Mapping::of).initial(Initial::Zeroed).ram()?;
    Ok(Home { dirty: Box::new(Combined::new(vec![vcpus, device])), costs, ram, vm })
}

impl Guest for Vm {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(serde_json::to_vec(self.config())?)
    }
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(Vm::pause(self)?)
    }
    fn resume(&mut self) -> Result<(), HookError> {
        Ok(Vm::resume(self)?)
    }
    fn throttle(&mut self, percent: u8) -> Result<(), HookError> {
        Vm::throttle(self, percent);
        Ok(())
    }
    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        Ok(self.save(out)?)
    }
}

/// Where a VM comes in. Empty before and after, unless it stayed.
pub struct Berth(pub Option<Home>);

impl Incoming for Berth {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        let home = new_home(&serde_json::from_slice(&setup.opaque)?)?;
        Ok(self.0.insert(home).ram.clone())
    }
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        Ok(self.0.as_ref().ok_or("no VM was prepared")?.vm.load(state)?)
    }
    fn run(&mut self) -> Result<(), HookError> {
        Ok(self.0.as_ref().ok_or("no VM was prepared")?.vm.resume()?)
    }
    fn discard(&mut self) {
        self.0 = None;
    }
}

/// A migration of this VM to that address, ready to go: `source.migrate(&mut home.dirty, &mut home.vm)`.
pub fn source(home: &Home, to: &str, how: &Shipping) -> Result<Source, HookError> {
    Ok(Source::builder(home.ram.clone())
        .channels(how.channels)
        .verify(how.verify.into())
        .downtime_limit(Duration::from_millis(how.downtime_limit))
        .rounds_max(how.max_rounds)
        .precopy_time_max(how.timeout.unwrap_or(Duration::MAX))
        .at_limit(how.at_limit.into())
        .overrun(how.on_overrun.into())
        .throttle_max(how.throttle_max)
        .bandwidth_max(how.bandwidth_max.unwrap_or(0))
        .connect(to)?)
}
