//! A virtual machine: RAM, vCPUs, one device. Knows how to stop and go on, and what it is besides its RAM; nothing here
//! knows of migration.

// UNSAFETY: KVM is told where guest RAM lies in this process.
#![expect(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::device::{BadPage, Device};
use crate::dma::Dma;
use crate::guest::{Config, LOW_MAX, Memory};
use crate::state::{self, VmState};
use crate::vcpu::Vcpus;

/// A VM, paused until it is resumed for the first time. Dropping it ends its threads and gives its memory back.
pub struct Vm {
    // The threads of these two end first: they use what is below.
    vcpus: Vcpus,
    dma: Dma,
    device: Arc<Device>,
    config: Config,
    fd: VmFd,
    slots: Vec<kvm_userspace_memory_region>,
    memory: Arc<Memory>,
    /// The model-specific registers that are part of its state.
    msrs: Vec<u32>,
    on_pause: Option<Box<dyn FnOnce() + Send>>,
}

/// What a check of all RAM found.
pub struct Checked {
    /// Pages that vCPUs have found good.
    pub guest_pages: u64,
    /// The first page that is not, or why nobody knows.
    pub guest: Result<(), String>,
    /// The pages that the device writes, the program, the sequence of ticks.
    pub device: Result<(), String>,
}

impl Vm {
    /// A VM with fresh memory. `prepare` runs before there are memory slots and vCPUs, for what KVM must know before.
    pub fn new<P>(config: &Config, prepare: impl FnOnce(BorrowedFd<'_>) -> io::Result<P>) -> Result<(Vm, P), String> {
        config.check()?;
        let kvm = Kvm::new().map_err(|e| format!("no /dev/kvm: {e}"))?;
        let fd = kvm.create_vm().map_err(|e| format!("KVM_CREATE_VM: {e}"))?;
        // Processors that cannot run code without paging by themselves need room for help: in the gap below 4 GiB.
        fd.set_identity_map_address(LOW_MAX).map_err(|e| format!("KVM_SET_IDENTITY_MAP_ADDR: {e}"))?;
        fd.set_tss_address(LOW_MAX as usize + 0x1000).map_err(|e| format!("KVM_SET_TSS_ADDR: {e}"))?;
        let prepared = prepare(borrow(&fd)).map_err(|e| format!("the VM cannot be prepared: {e}"))?;

        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&config.ranges());
        let memory = Arc::new(memory.map_err(|e| format!("no memory for the guest: {e}"))?);
        let slots: Vec<_> = memory.iter().zip(0..).map(|(region, slot)| slot_of(region, slot)).collect();
        for slot in &slots {
            // SAFETY: the region is mapped for as long as `memory`, which the VM holds, and goes after `fd`.
            let set = unsafe { fd.set_user_memory_region(*slot) };
            set.map_err(|e| format!("KVM_SET_USER_MEMORY_REGION of slot {}: {e}", slot.slot))?;
        }

        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| format!("KVM_GET_SUPPORTED_CPUID: {e}"))?;
        let mut vcpus = Vec::new();
        for id in 0..config.vcpus {
            let vcpu = fd.create_vcpu(id).map_err(|e| format!("KVM_CREATE_VCPU: {e}"))?;
            vcpu.set_cpuid2(&cpuid).map_err(|e| format!("KVM_SET_CPUID2: {e}"))?;
            state::enter(&vcpu, &config.entry(id))?;
            vcpus.push(vcpu);
        }
        let msrs = state::msrs_of(&kvm, &vcpus[0])?;
        let device = Arc::new(Device::new(config.vcpus));
        let no_thread = |e| format!("no threads for the VM: {e}");
        let dma = Dma::new(config, Arc::clone(&memory)).map_err(no_thread)?;
        let vcpus = Vcpus::start(vcpus, Arc::clone(&device), config.tick_time()).map_err(no_thread)?;
        let vm = Vm { vcpus, dma, device, config: config.clone(), fd, slots, memory, msrs, on_pause: None };
        Ok((vm, prepared))
    }

    /// Gives RAM its first contents. Only the machine that a guest begins on does this.
    pub fn fill(&self) -> Result<(), String> {
        self.config.fill(&self.memory).and_then(|()| self.dma.fill()).map_err(|e| format!("cannot fill RAM: {e}"))
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The VM's file descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        borrow(&self.fd)
    }

    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    pub fn slots(&self) -> &[kvm_userspace_memory_region] {
        &self.slots
    }

    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Lets it run, unless it has broken down.
    pub fn resume(&self) -> Result<(), String> {
        self.alive()?;
        self.dma.set_running(true);
        self.vcpus.resume();
        Ok(())
    }

    fn alive(&self) -> Result<(), String> {
        self.vcpus.broken().map_or(Ok(()), |why| Err(format!("the guest is gone: {why}")))
    }

    /// When this returns nobody writes guest RAM. A guest that has broken down is not paused: it is nothing to send.
    pub fn pause(&mut self) -> Result<(), String> {
        self.alive()?;
        self.vcpus.pause();
        self.dma.set_running(false);
        if let Some(hook) = self.on_pause.take() {
            hook();
        }
        Ok(())
    }

    /// Has something done the next time that it has been paused: for tests, to which no other moment is like this one.
    pub fn once_paused(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.on_pause = Some(Box::new(hook));
    }

    /// Slows its vCPUs down: they run `100 - percent` of the time.
    pub fn throttle(&self, percent: u8) {
        self.vcpus.throttle(percent);
    }

    /// Writes what it is besides its RAM; paused. Writes guest RAM once more, as devices do.
    pub fn save(&self, out: impl Write) -> Result<(), String> {
        self.dma.flush().map_err(|e| format!("the device cannot flush: {e}"))?;
        let vcpus = self.vcpus.fds().map(|fd| state::save(&fd, &self.msrs)).collect::<Result<_, _>>()?;
        let state = VmState { vcpus, device: self.device.state(), dma_next: self.dma.next() };
        serde_json::to_writer(out, &state).map_err(|e| format!("cannot write the state: {e}"))
    }

    /// Becomes what was saved. The first thing that it does when it runs is to check all RAM, before it writes over what
    /// may not have arrived.
    pub fn load(&self, input: impl Read) -> Result<(), String> {
        let state: VmState = serde_json::from_reader(input).map_err(|e| format!("that is no state: {e}"))?;
        if state.vcpus.len() as u64 != self.config.vcpus {
            return Err("the state is of a machine with other vCPUs".to_owned());
        }
        self.vcpus.fds().zip(&state.vcpus).try_for_each(|(fd, state)| state::load(&fd, state))?;
        self.device.load(state.device)?;
        self.device.ask_for_check();
        self.dma.load(state.dma_next)
    }

    /// Has all RAM looked at, while the guest runs, by those who know what it must hold.
    pub fn check(&self, patience: Duration) -> Checked {
        self.device.ask_for_check();
        self.checked(patience)
    }

    /// Waits for the check that the guest was asked for, and looks at the rest.
    pub fn checked(&self, patience: Duration) -> Checked {
        let checks = self.device.await_check(patience);
        let guest_pages = checks.iter().map(|check| check.good_pages).sum();
        let swept = self.config.swept_pages();
        let bad = checks.iter().find_map(|check| check.bad);
        let guest = match (self.vcpus.broken(), bad) {
            (Some(why), _) => Err(format!("the guest is gone: {why}")),
            (None, Some(bad)) => Err(BadPage::to_string(&bad)),
            (None, None) if guest_pages != swept => Err(format!("{guest_pages} of {swept} pages were checked")),
            (None, None) => Ok(()),
        };
        Checked { guest_pages, guest, device: self.check_device() }
    }

    fn check_device(&self) -> Result<(), String> {
        self.dma.check()?;
        let mut found = self.config.image();
        let read = self.memory.read_slice(&mut found, GuestAddress(0));
        read.map_err(|e| format!("cannot read the program: {e}"))?;
        if found != self.config.image() {
            return Err("the program, or what the vCPUs are told, has changed".to_owned());
        }
        let state = self.device.state();
        match (state.ticks_lost, state.ticks_doubled) {
            (0, 0) => Ok(()),
            (lost, doubled) => Err(format!("{lost} ticks were lost, and {doubled} came twice")),
        }
    }
}

fn borrow(fd: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `fd` is there.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn slot_of(region: &impl GuestMemoryRegion, slot: u32) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.get_host_address(vm_memory::MemoryRegionAddress(0)).map_or(0, |host| host as u64),
    }
}
