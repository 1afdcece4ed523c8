//! A guest under real KVM that writes the pages it is told to, for tests of KVM's dirty tracking. 32-bit protected mode
//! without paging, so that guest addresses are physical ones.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pageferry::dirty::kvm::KvmSlot;
use pageferry::memory::{Backing, RamBlock};
use pageferry::units::PageSize;

// EBX points to what the vCPU is to do: a count, a value, and so many addresses to write the value to. Whenever the
// count of what is left has none of the bits of EDX it tells us through a port, which makes it leave KVM_RUN.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".code32",
    "pageferry_test_guest:",
    "    lea esi, [ebx + 8]",
    "    mov ecx, [ebx]",
    "    mov eax, [ebx + 4]",
    "2:  test ecx, ecx",
    "    jz 3f",
    "    mov edi, [esi]",
    "    mov [edi], eax",
    "    add esi, 4",
    "    dec ecx",
    "    test ecx, edx",
    "    jnz 2b",
    "    out 0x10, al",
    "    jmp 2b",
    "3:  hlt",
    "pageferry_test_guest_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static pageferry_test_guest: u8;
    static pageferry_test_guest_end: u8;
}

pub const PAGE: u64 = 4096;
/// The exit of a vCPU whose dirty ring is full.
pub const EXIT_DIRTY_RING_FULL: u32 = 31;

/// The program, and a list for each of up to three vCPUs, are here; no test tracks this slot.
const CONTROL_BYTES: u64 = 1 << 18;
const CONTROL_SLOT: u32 = 30;
const LIST_BYTES: u64 = 1 << 16;
/// The most pages that a vCPU can be told to write at once.
pub const WRITES_MAX: usize = (LIST_BYTES as usize - 8) / 4;

/// A VM without an interrupt controller: a vCPU that halts comes back to us.
pub struct Machine {
    pub vm: VmFd,
    control: RamBlock,
    vcpus: u64,
    _kvm: Kvm,
}

/// A vCPU, ready to be told what to write.
pub struct Vcpu {
    fd: VcpuFd,
    /// Where its list is, for the guest and for us.
    list_address: u64,
    list: *mut u32,
}

// SAFETY: the list belongs to this vCPU alone, and lives as long as the machine, which tests keep until the end.
unsafe impl Send for Vcpu {}

impl Machine {
    /// A VM, or why there is none here.
    pub fn new() -> Result<Machine, String> {
        let kvm = Kvm::new().map_err(|e| format!("/dev/kvm: {e}"))?;
        let vm = kvm.create_vm().map_err(|e| format!("KVM_CREATE_VM: {e}"))?;
        let page = PageSize::SIZE_4K;
        let control = RamBlock::anonymous("control", 0, CONTROL_BYTES, page, Backing::Base).unwrap();
        Ok(Machine { vm, control, vcpus: 0, _kvm: kvm })
    }

    /// The VM, as the library takes it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the machine, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }

    /// Adds a slot of memory.
    pub fn add_slot(&self, slot: u32, guest_address: u64, bytes: u64, host_address: u64) -> KvmSlot {
        self.set_slot(slot, 0, guest_address, bytes, host_address);
        // SAFETY: the slot was just made with these values, and tests that change it mean to see that fail.
        unsafe { KvmSlot::new(slot, 0, guest_address, bytes, host_address) }
    }

    /// KVM_SET_USER_MEMORY_REGION: 0 bytes remove the slot.
    pub fn set_slot(&self, slot: u32, flags: u32, guest_phys_addr: u64, memory_size: u64, userspace_addr: u64) {
        let region = kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
        // SAFETY: the memory is a RAM block's, which tests keep for as long as the machine.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    /// Adds a vCPU. The first puts the program into memory.
    pub fn add_vcpu(&mut self) -> Vcpu {
        let control = self.control.range(0, CONTROL_BYTES / PAGE).unwrap();
        if self.vcpus == 0 {
            self.set_slot(CONTROL_SLOT, 0, 0, CONTROL_BYTES, control.ptr as u64);
            // SAFETY: both labels are of one section, the end behind the start; the program is shorter than a page.
            unsafe {
                let (start, end) = (&raw const pageferry_test_guest, &raw const pageferry_test_guest_end);
                control.ptr.copy_from_nonoverlapping(start, end.offset_from(start) as usize);
            }
        }
        let fd = self.vm.create_vcpu(self.vcpus).unwrap();
        self.vcpus += 1;
        let mut sregs = fd.get_sregs().unwrap();
        let flat = |kind: u8, selector: u16| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_: kind,
            present: 1,
            dpl: 0,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        // Types 11 and 3: code that may be read, data that may be written, both accessed.
        (sregs.cs, sregs.ds) = (flat(11, 8), flat(3, 16));
        (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
        // PE: protected mode. Paging stays off.
        sregs.cr0 |= 1;
        fd.set_sregs(&sregs).unwrap();
        let list_address = self.vcpus * LIST_BYTES;
        // SAFETY: the control block has room for the program and three lists.
        let list = unsafe { control.ptr.add(usize::try_from(list_address).unwrap()) }.cast();
        assert!(list_address + LIST_BYTES <= CONTROL_BYTES, "too many vCPUs for the control block");
        Vcpu { fd, list_address, list }
    }
}

impl Vcpu {
    /// The vCPU, as the library takes it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the vCPU, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }

    /// Has the guest write `value` to each of these guest addresses, in order. `full` is called each time the vCPU
    /// comes back because its dirty ring is full. The vCPU leaves KVM_RUN after every 16 writes: where KVM emulates the
    /// guest it looks only then whether the ring is full.
    pub fn write(&mut self, addresses: impl IntoIterator<Item = u64>, value: u32, mut full: impl FnMut()) {
        self.write_in_bursts(16, addresses, value, || {
            full();
            true
        });
    }

    /// As [`write`](Self::write), leaving KVM_RUN after each `burst` writes, a power of two. Ends early, without the
    /// rest being written, when `full` says false.
    pub fn write_in_bursts(
        &mut self,
        burst: u32,
        addresses: impl IntoIterator<Item = u64>,
        value: u32,
        mut full: impl FnMut() -> bool,
    ) {
        let mut count = 0;
        for address in addresses {
            assert!(count < WRITES_MAX, "more than a list takes");
            // SAFETY: in the list, by the assertion; the guest is not running.
            unsafe { self.list.add(2 + count).write_volatile(u32::try_from(address).unwrap()) };
            count += 1;
        }
        // SAFETY: as above.
        unsafe {
            self.list.write_volatile(count as u32);
            self.list.add(1).write_volatile(value);
        }
        let mut regs = self.fd.get_regs().unwrap();
        (regs.rip, regs.rbx, regs.rdx, regs.rflags) = (0, self.list_address, u64::from(burst - 1), 2);
        self.fd.set_regs(&regs).unwrap();
        loop {
            match self.fd.run() {
                Ok(VcpuExit::Hlt) => return,
                Ok(VcpuExit::IoOut(..)) => {}
                Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) if full() => {}
                Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) => return,
                Ok(other) => panic!("the guest ended with {other:?}"),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => panic!("KVM_RUN: {e}"),
            }
        }
    }
}
