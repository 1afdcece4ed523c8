//! Everything that this VMM has to do with pageferry: what RAM is, who knows what is dirty, and the hooks of both sides.

// UNSAFETY: pageferry is told which memory slots the VM has.
#![expect(unsafe_code)]

use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region as Slot;
use pageferry::dirty::combined::Combined;
use pageferry::memory::{Initial, vm_memory::Mapping};
use pageferry::precopy::{AtLimit, Overrun};
use pageferry::wire::control::Setup;
pub use pageferry::{CancelHandle, Outcome, Progress, Source, SourceReport, Target, TargetReport, Verify};
use pageferry::{
    DirtySource, Guest, GuestRam, HookError, Incoming, KvmDirtyLog, KvmDirtyRing, KvmSlot, Ram, RegionBitmaps,
    StateWriter,
};

use crate::guest::Config;
use crate::options::{AtLimitArg, OverrunArg, Shipping, VerifyArg};
use crate::vm::Vm;

/// Entries of each vCPU's dirty ring: 64 KiB of memory, full after 10 ms of a guest that runs freely.
const RING_ENTRIES: u32 = 4096;

/// A VM, and what knows which of its pages were written: made together, and kept for every migration of the VM.
pub struct Home {
    pub vm: Vm,
    pub dirty: Box<dyn DirtySource>,
}

/// A VM with fresh memory, and its dirty sources: KVM for what vCPUs write, vm-memory's bitmaps for the device.
pub fn new_home(config: &Config) -> Result<Home, HookError> {
    let enable = |vm: BorrowedFd| config.dirty_ring.then(|| KvmDirtyRing::enable(vm, RING_ENTRIES)).transpose();
    let (vm, rings) = Vm::new(config, enable)?;
    // SAFETY: `Vm` gave KVM exactly these slots, and changes none of them for as long as it lives.
    let slot = |s: &Slot| unsafe { KvmSlot::new(s.slot, s.flags, s.guest_phys_addr, s.memory_size, s.userspace_addr) };
    let slots = vm.slots().iter().map(slot);
    let vcpus: Box<dyn DirtySource> = match rings {
        None => Box::new(KvmDirtyLog::new(vm.fd(), slots)?),
        Some(enabled) => {
            let ring = KvmDirtyRing::new(vm.fd(), enabled, vm.vcpus().raw_fds(), slots)?;
            let full = ring.vcpu_handle();
            vm.vcpus().set_relief(Arc::new(move || full.relieve()));
            Box::new(ring)
        }
    };
    let devices = Box::new(RegionBitmaps::new(Arc::clone(vm.memory())));
    Ok(Home { dirty: Box::new(Combined::new(vec![vcpus, devices])), vm })
}

/// One RAM block for each region of the VM's memory.
fn ram(vm: &Vm) -> Result<Ram, HookError> {
    Ok(GuestRam::new(Arc::clone(vm.memory())).mapped_as(Mapping::of).initial(Initial::Zeroed).ram()?)
}

impl Guest for Vm {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(serde_json::to_vec(self.config())?)
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Vm::pause(self);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Vm::resume(self);
        Ok(())
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
#[derive(Default)]
pub struct Berth(pub Option<Home>);

impl Incoming for Berth {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        let home = new_home(&serde_json::from_slice(&setup.opaque)?)?;
        ram(&self.0.insert(home).vm)
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        Ok(self.0.as_ref().ok_or("no VM was prepared")?.vm.load(state)?)
    }

    fn run(&mut self) -> Result<(), HookError> {
        self.0.as_ref().ok_or("no VM was prepared")?.vm.resume();
        Ok(())
    }

    fn discard(&mut self) {
        self.0 = None;
    }
}

/// A migration of this VM to that address, ready to go: `source.migrate(&mut home.dirty, &mut home.vm)`.
pub fn source(home: &Home, to: &str, how: &Shipping) -> Result<Source, HookError> {
    let mut source = Source::builder(ram(&home.vm)?)
        .channels(how.channels)
        .verify(match how.verify {
            VerifyArg::Off => Verify::Off,
            VerifyArg::Wire => Verify::Wire,
            VerifyArg::Full => Verify::Full,
        })
        .downtime_limit(Duration::from_millis(how.downtime_limit))
        .rounds_max(how.max_rounds)
        .at_limit(if how.at_limit == AtLimitArg::SwitchOver { AtLimit::SwitchOver } else { AtLimit::GiveUp })
        .overrun(if how.on_overrun == OverrunArg::Retry { Overrun::Retry { tries: 3 } } else { Overrun::Accept })
        .throttle_max(how.throttle_max)
        .bandwidth_max(how.bandwidth_max << 20);
    if let Some(seconds) = how.timeout {
        source = source.precopy_time_max(Duration::from_secs(seconds));
    }
    Ok(source.connect(to)?)
}
