//! KVM's dirty log and dirty ring: the ioctls on a VM, and the ring of one vCPU.

// UNSAFETY: ioctls that take addresses, and a mapping that the kernel writes. kvm-ioctls has neither the clearing of a
// log nor a ring that several threads may drain, and its types would be in our interface.
#![expect(unsafe_code)]

use super::memory::{advise, host_page_bytes};
use super::{cvt, cvt_retry};
use crate::sync::{AtomicU32, AtomicU64, Ordering, acquire_from_kernel, release_to_kernel};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Writes to the slot are logged.
pub(crate) const MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;

/// Clearing is a call of its own; its argument is made of the two flags below.
pub(crate) const CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
/// Getting the log clears nothing and protects nothing.
pub(crate) const MANUAL_PROTECT_ENABLE: u64 = 1 << 0;
/// A slot whose logging begins has every bit set, and is protected as these are cleared.
pub(crate) const INITIALLY_SET: u64 = 1 << 1;

/// The dirty ring, where plain loads and stores have the order that is needed: x86.
pub(crate) const CAP_DIRTY_LOG_RING: u32 = 192;
/// The dirty ring, for user space that loads with acquire and stores with release.
pub(crate) const CAP_DIRTY_LOG_RING_ACQ_REL: u32 = 223;
/// Beside the ring a log for writes that no vCPU made.
pub(crate) const CAP_DIRTY_LOG_RING_WITH_BITMAP: u32 = 225;

/// Bytes of an entry of the ring: flags, slot, offset.
pub(crate) const RING_ENTRY_BYTES: u64 = 16;
/// Where in the file of a vCPU the ring is, in pages.
const DIRTY_LOG_PAGE_OFFSET: u64 = 64;
const GFN_DIRTY: u32 = 1 << 0;
const GFN_RESET: u32 = 1 << 1;

#[repr(C)]
struct UserspaceMemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

#[repr(C)]
struct DirtyLog {
    slot: u32,
    padding: u32,
    bitmap: u64,
}

#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    bitmap: u64,
}

const fn request(direction: libc::c_ulong, number: libc::c_ulong, size: usize) -> libc::c_ulong {
    (direction << 30) | ((size as libc::c_ulong) << 16) | (0xAE << 8) | number
}
const IO: libc::c_ulong = 0;
const IOW: libc::c_ulong = 1;
const IOWR: libc::c_ulong = 3;
const KVM_CHECK_EXTENSION: libc::c_ulong = request(IO, 0x03, 0);
const KVM_GET_DIRTY_LOG: libc::c_ulong = request(IOW, 0x42, size_of::<DirtyLog>());
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = request(IOW, 0x46, size_of::<UserspaceMemoryRegion>());
const KVM_ENABLE_CAP: libc::c_ulong = request(IOW, 0xA3, size_of::<EnableCap>());
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = request(IOWR, 0xC0, size_of::<ClearDirtyLog>());
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = request(IO, 0xC7, 0);

/// A memory slot of a VM, as the VMM described it to KVM_SET_USER_MEMORY_REGION.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KvmSlot {
    slot: u32,
    flags: u32,
    guest_address: u64,
    bytes: u64,
    host_address: u64,
}

impl KvmSlot {
    /// The slot with these values, in the order of the kernel's `struct kvm_userspace_memory_region`: the id in the
    /// lower half of `slot` and the address space in the upper, the flags, where the guest sees it, its length, where
    /// this process sees it. Logging goes back to what `flags` say when a source is disarmed.
    ///
    /// # Safety
    /// The VM that the slot is used with has it, with exactly these values apart from logging, for as long as a dirty
    /// source that was given it lives. The kernel writes one bit for each page that the slot really has; and to turn on
    /// the logging of a slot that is not there would create it, and show the guest whatever is at `host_address`.
    pub const unsafe fn new(slot: u32, flags: u32, guest_address: u64, bytes: u64, host_address: u64) -> KvmSlot {
        KvmSlot { slot, flags, guest_address, bytes, host_address }
    }

    /// Its id, and its address space in the upper half.
    pub const fn slot(&self) -> u32 {
        self.slot
    }

    /// Its flags, as the VMM gave them.
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// Where the guest sees it.
    pub const fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// Its length.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where this process sees it.
    pub const fn host_address(&self) -> u64 {
        self.host_address
    }
}

impl std::fmt::Debug for KvmSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmSlot")
            .field("slot", &format_args!("{:#x}", self.slot))
            .field("flags", &format_args!("{:#x}", self.flags))
            .field("guest_address", &format_args!("{:#x}", self.guest_address))
            .field("bytes", &format_args!("{:#x}", self.bytes))
            .field("host_address", &format_args!("{:#x}", self.host_address))
            .finish()
    }
}

/// ioctl(KVM_CHECK_EXTENSION): what this VM has of a capability, 0 for nothing.
pub(crate) fn check_extension(vm: BorrowedFd<'_>, cap: u32) -> io::Result<u64> {
    // SAFETY: the argument of this request is a number.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CHECK_EXTENSION as _, libc::c_ulong::from(cap)) }))
}

/// ioctl(KVM_ENABLE_CAP) with one argument.
pub(crate) fn enable_cap(vm: BorrowedFd<'_>, cap: u32, argument: u64) -> io::Result<()> {
    let enable = EnableCap { cap, flags: 0, args: [argument, 0, 0, 0], pad: [0; 64] };
    // SAFETY: the struct is the one that the request number encodes by size; the kernel reads it.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_ENABLE_CAP as _, &enable) })).map(drop)
}

/// ioctl(KVM_SET_USER_MEMORY_REGION) that changes nothing but whether writes to the slot are logged: the VMM's flags,
/// and logging on top of them if `log`.
pub(crate) fn set_logging(vm: BorrowedFd<'_>, slot: &KvmSlot, log: bool) -> io::Result<()> {
    let region = UserspaceMemoryRegion {
        slot: slot.slot,
        flags: slot.flags | if log { MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: slot.guest_address,
        memory_size: slot.bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the struct is the one that the request number encodes by size; the kernel reads it. The VM has this slot
    // with these values (contract of `KvmSlot::new`), so no memory is mapped or unmapped.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION as _, &region) })).map(drop)
}

/// ioctl(KVM_GET_DIRTY_LOG): the slot's dirty bits. ENOENT: it is not logged. ENXIO: this VM has a dirty ring instead.
pub(crate) fn get_dirty_log(vm: BorrowedFd<'_>, slot: &KvmSlot, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 >= (slot.bytes / host_page_bytes()).div_ceil(64), "a bit for each page of the slot");
    let log = DirtyLog { slot: slot.slot, padding: 0, bitmap: bitmap.as_mut_ptr() as u64 };
    // SAFETY: the struct is the one that the request number encodes by size. The kernel writes a bit for each page of
    // the slot, rounded up to 64; the slot has `bytes` (contract of `KvmSlot::new`), and the assertion holds.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG as _, &log) })).map(drop)
}

/// ioctl(KVM_CLEAR_DIRTY_LOG): clears those bits of `pages` pages that are set in `bitmap`, and protects their pages.
/// `first_page` is a multiple of 64, and `pages` is one or ends where the slot ends.
pub(crate) fn clear_dirty_log(
    vm: BorrowedFd<'_>,
    slot: u32,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(bitmap.len() as u64 >= u64::from(pages).div_ceil(64), "a bit for each page to clear");
    let clear = ClearDirtyLog { slot, num_pages: pages, first_page, bitmap: bitmap.as_ptr() as u64 };
    // SAFETY: the struct is the one that the request number encodes by size. The kernel reads a bit for each page,
    // rounded up to 64: the assertion holds.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG as _, &clear) })).map(drop)
}

/// ioctl(KVM_RESET_DIRTY_RINGS): protects the pages of all entries that were taken, on the rings of all vCPUs, and
/// says how many they were. A pending signal makes it return early without a word, from Linux 6.16 on, and maybe without
/// protecting pages that it has counted: call it with signals blocked.
pub(crate) fn reset_dirty_rings(vm: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: this request has no argument.
    cvt_retry(|| i64::from(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS as _, 0) }))
}

/// The dirty ring of one vCPU, mapped.
#[derive(Debug)]
pub(crate) struct VcpuRing {
    entries: NonNull<u8>,
    /// A power of two.
    count: u32,
    /// Where the next entry to take is. Whoever takes writes it, one at a time; Relaxed, as whoever is next has been
    /// given the turn by whoever was before.
    next: AtomicU32,
}

// SAFETY: the mapping belongs to no thread, and all that is done with it goes through atomics.
unsafe impl Send for VcpuRing {}
// SAFETY: as above.
unsafe impl Sync for VcpuRing {}

impl VcpuRing {
    /// mmap(2) of a vCPU's ring. `count` is what the ring was enabled with on its VM, a power of two. EFAULT: it has no
    /// ring, or a smaller one.
    pub(crate) fn map(vcpu: BorrowedFd<'_>, count: u32) -> io::Result<VcpuRing> {
        assert!(count.is_power_of_two());
        let bytes = count as usize * RING_ENTRY_BYTES as usize;
        let offset = (DIRTY_LOG_PAGE_OFFSET * host_page_bytes()) as libc::off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let at = std::ptr::null_mut();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let got = unsafe { libc::mmap(at, bytes, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(got.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let ring = VcpuRing { entries, count, next: AtomicU32::new(0) };
        // KVM maps whatever it is asked to, and sends a SIGBUS at the first touch of what is not there. Populating says
        // so instead, from Linux 5.14 on.
        // SAFETY: the range is the mapping just made; populating changes no content.
        match unsafe { advise(ring.entries.as_ptr(), bytes, libc::MADV_POPULATE_READ) } {
            Err(e) if e.raw_os_error() != Some(libc::EINVAL) => Err(e),
            _ => Ok(ring),
        }
    }

    /// How many entries the ring has.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Takes the oldest entry that was not taken: its slot, and the page within it. For one thread at a time. The page
    /// stays writable, without another entry, until [`reset_dirty_rings`] has returned.
    pub(crate) fn pop(&self) -> Option<(u32, u64)> {
        let next = self.next.load(Ordering::Relaxed);
        let index = (next & (self.count - 1)) as usize;
        // SAFETY: the index is below `count`, so the entry lies in the mapping.
        let entry = unsafe { self.entries.add(index * RING_ENTRY_BYTES as usize) };
        // SAFETY: the mapping is of whole pages and entries are of 16 bytes, so the three fields are aligned; it lives
        // as long as `self`; the kernel's accesses are atomic, too.
        let (flags, slot, offset) = unsafe {
            let entry = entry.as_ptr();
            let flags = AtomicU32::from_ptr(entry.cast());
            (flags, AtomicU32::from_ptr(entry.add(4).cast()), AtomicU64::from_ptr(entry.add(8).cast()))
        };
        // Acquire: shows slot and offset; pairs with the kernel's release of the flag in kvm_dirty_ring_push.
        if flags.load(acquire_from_kernel("kvm-ring/entry")) & GFN_DIRTY == 0 {
            return None;
        }
        let taken = (slot.load(Ordering::Relaxed), offset.load(Ordering::Relaxed));
        // Release: slot and offset were read before the kernel may write them anew; pairs with the kernel's acquire of
        // the flag in kvm_dirty_ring_reset.
        flags.store(GFN_RESET, release_to_kernel("kvm-ring/taken"));
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
        Some(taken)
    }
}

impl Drop for VcpuRing {
    fn drop(&mut self) {
        let bytes = self.count as usize * RING_ENTRY_BYTES as usize;
        // SAFETY: the mapping that `map` made, and nothing points into it any more.
        let _ = cvt(i64::from(unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes) }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_numbers_are_those_of_the_kernel() {
        // From the macros of linux/kvm.h, on every architecture whose ioctl numbers have the common form.
        assert_eq!(KVM_CHECK_EXTENSION, 0xAE03);
        assert_eq!(KVM_GET_DIRTY_LOG, 0x4010_AE42);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_AE46);
        assert_eq!(KVM_ENABLE_CAP, 0x4068_AEA3);
        assert_eq!(KVM_CLEAR_DIRTY_LOG, 0xC018_AEC0);
        assert_eq!(KVM_RESET_DIRTY_RINGS, 0xAEC7);
    }

    #[test]
    fn what_is_no_vm_is_refused() {
        use std::os::fd::AsFd;
        let file = std::fs::File::open("/dev/null").unwrap();
        let refused = |done: io::Result<u64>| done.unwrap_err().raw_os_error() == Some(libc::ENOTTY);
        assert!(refused(check_extension(file.as_fd(), CAP_DIRTY_LOG_RING)));
        assert!(refused(reset_dirty_rings(file.as_fd())));
        assert!(refused(enable_cap(file.as_fd(), CAP_DIRTY_LOG_RING, 4096).map(|()| 0)));
        assert!(VcpuRing::map(file.as_fd(), 256).is_err());
    }
}
