//! What a VM is besides its RAM: the registers of its vCPUs and the state of its device, as bytes that travel.

// UNSAFETY: kvm-ioctls cannot know how many bytes KVM reads of an XSAVE area.
#![expect(unsafe_code)]

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::device::DeviceState;
use crate::guest::Entry;

#[derive(Serialize, Deserialize)]
pub struct VmState {
    pub vcpus: Vec<VcpuState>,
    pub device: DeviceState,
    /// The number of the device's next write to guest RAM.
    pub dma_next: u64,
}

#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug_regs: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

/// The model-specific registers that this vCPU lets us read and write. Asked for one by one, because KVM stops at the
/// first that it refuses: when a VM is made, which is when there is time.
pub fn msrs_of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, String> {
    let all = kvm.get_msr_index_list().map_err(|e| format!("KVM_GET_MSR_INDEX_LIST: {e}"))?;
    let works = |index: &u32| {
        let Ok(mut one) = request(&[*index]) else { return false };
        vcpu.get_msrs(&mut one) == Ok(1) && vcpu.set_msrs(&one) == Ok(1)
    };
    Ok(all.as_slice().iter().copied().filter(works).collect())
}

/// Reads a vCPU that is paused.
pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, String> {
    let mut values = request(msrs)?;
    let read = vcpu.get_msrs(&mut values).map_err(|e| format!("KVM_GET_MSRS: {e}"))?;
    if let Some(index) = msrs.get(read) {
        return Err(format!("KVM_GET_MSRS: the register {index:#x} cannot be read"));
    }
    Ok(VcpuState {
        regs: vcpu.get_regs().map_err(|e| format!("KVM_GET_REGS: {e}"))?,
        sregs: vcpu.get_sregs().map_err(|e| format!("KVM_GET_SREGS: {e}"))?,
        xcrs: vcpu.get_xcrs().map_err(|e| format!("KVM_GET_XCRS: {e}"))?,
        xsave: vcpu.get_xsave().map_err(|e| format!("KVM_GET_XSAVE: {e}"))?,
        debug_regs: vcpu.get_debug_regs().map_err(|e| format!("KVM_GET_DEBUGREGS: {e}"))?,
        msrs: values.as_slice().to_vec(),
        events: vcpu.get_vcpu_events().map_err(|e| format!("KVM_GET_VCPU_EVENTS: {e}"))?,
        mp_state: vcpu.get_mp_state().map_err(|e| format!("KVM_GET_MP_STATE: {e}"))?,
    })
}

/// Makes a vCPU what another one was.
pub fn load(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), String> {
    let values = Msrs::from_entries(&state.msrs).map_err(|e| format!("{} registers: {e:?}", state.msrs.len()))?;
    vcpu.set_xcrs(&state.xcrs).map_err(|e| format!("KVM_SET_XCRS: {e}"))?;
    // SAFETY: KVM reads 4096 bytes, unless the process asked for permission to use larger features: nobody here does.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(|e| format!("KVM_SET_XSAVE: {e}"))?;
    vcpu.set_sregs(&state.sregs).map_err(|e| format!("KVM_SET_SREGS: {e}"))?;
    vcpu.set_regs(&state.regs).map_err(|e| format!("KVM_SET_REGS: {e}"))?;
    vcpu.set_debug_regs(&state.debug_regs).map_err(|e| format!("KVM_SET_DEBUGREGS: {e}"))?;
    let set = vcpu.set_msrs(&values).map_err(|e| format!("KVM_SET_MSRS: {e}"))?;
    if let Some(refused) = state.msrs.get(set) {
        return Err(format!("KVM_SET_MSRS: the register {:#x} cannot be set here", refused.index));
    }
    vcpu.set_vcpu_events(&state.events).map_err(|e| format!("KVM_SET_VCPU_EVENTS: {e}"))?;
    vcpu.set_mp_state(state.mp_state).map_err(|e| format!("KVM_SET_MP_STATE: {e}"))
}

/// Puts a new vCPU where the guest's program begins: protected mode without paging, flat segments, no interrupts.
pub fn enter(vcpu: &VcpuFd, entry: &Entry) -> Result<(), String> {
    const PROTECTED_MODE: u64 = 1;
    const CODE: u8 = 0b1011;
    const DATA: u8 = 0b0011;
    let mut sregs = vcpu.get_sregs().map_err(|e| format!("KVM_GET_SREGS: {e}"))?;
    for (segment, kind) in [
        (&mut sregs.cs, CODE),
        (&mut sregs.ds, DATA),
        (&mut sregs.es, DATA),
        (&mut sregs.fs, DATA),
        (&mut sregs.gs, DATA),
        (&mut sregs.ss, DATA),
    ] {
        *segment = kvm_bindings::kvm_segment {
            limit: u32::MAX,
            selector: if kind == CODE { 8 } else { 16 },
            type_: kind,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
    }
    sregs.fs.base = entry.parameters;
    sregs.cr0 |= PROTECTED_MODE;
    vcpu.set_sregs(&sregs).map_err(|e| format!("KVM_SET_SREGS: {e}"))?;
    let regs = kvm_regs {
        rip: entry.ip,
        rsp: entry.stack,
        rflags: 2, // the bit that is always set
        rdi: entry.hot,
        rbx: entry.mix,
        rsi: entry.cold,
        rbp: entry.mix,
        rdx: 1, // the first tick
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(|e| format!("KVM_SET_REGS: {e}"))
}

fn request(msrs: &[u32]) -> Result<Msrs, String> {
    let entries: Vec<_> = msrs.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|e| format!("{} registers: {e:?}", msrs.len()))
}
