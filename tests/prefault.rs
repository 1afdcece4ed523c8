//! A target makes pages before their content comes where that saves page faults, and nowhere else.

// UNSAFETY: maps memory of a kind that the crate has no constructor for.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(not(loom))]

mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use pageferry::memory::{Backing, Initial, PresenceMap, Ram};
use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyBitmap, RamBlock, Source, Target};
use vmm::{Make, TestGuest, TestIncoming, Transport};

const CHANNELS: u8 = 2;
const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
/// Of the guest's RAM, from the start: the rest was never touched.
const TOUCHED_BYTES: u64 = 16 * MIB;

fn memfd(name: &str, gpa: u64, bytes: u64, page_size: PageSize) -> RamBlock {
    RamBlock::memfd(name, gpa, bytes, page_size, Backing::Base).unwrap().with_initial(Initial::Zeroed)
}

fn private(name: &str, gpa: u64, bytes: u64, page_size: PageSize) -> RamBlock {
    RamBlock::anonymous(name, gpa, bytes, page_size, Backing::Base).unwrap().with_initial(Initial::Zeroed)
}

/// Ships a guest that has touched every `nth` page of the first [`TOUCHED_BYTES`]; all of that arrives.
fn ship(make: Box<Make>, nth: u64) -> Shipped {
    // Where the system makes huge pages of everything there are hardly any faults, and pages that nobody wrote.
    // SAFETY: takes no pointers; the zeros have to be of full width.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1_u64, 0_u64, 0_u64, 0_u64) }, 0);
    let ram = vmm::ram(PageSize::SIZE_4K, &[RAM_BYTES >> 12]);
    (0..TOUCHED_BYTES >> 12).step_by(nth as usize).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let (source, target) = Transport::Tcp4.connect(Source::builder(ram), Target::builder(), CHANNELS);
    let incoming = TestIncoming { make, ..TestIncoming::new() };
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, incoming);
    // Before anybody reads it, which would make pages, too.
    let existing_bytes = existing_bytes(trip.incoming.ram.as_ref().unwrap());
    vmm::assert_arrived(&guest, &trip);
    Shipped { prefaulted_bytes: trip.received.prefaulted_bytes, existing_bytes }
}

struct Shipped {
    prefaulted_bytes: u64,
    /// Of the target's memory.
    existing_bytes: u64,
}

/// What a lane has to see before it begins: a packet of 1 MiB.
const LEARNING_BYTES: u64 = CHANNELS as u64 * MIB;

fn existing_bytes(ram: &Ram) -> u64 {
    let mut words = vec![u64::MAX; (RAM_BYTES >> 12) as usize / 64];
    PresenceMap::new(ram).keep_present(BlockId(0), 0, &mut words).unwrap();
    pageferry::dirty::runs::count(&words) << 12
}

#[test]
fn pages_are_made_before_their_content_comes_and_no_others() {
    // The last page of a shared mapping always counts as existing.
    for (make, besides) in [(private as fn(&str, u64, u64, PageSize) -> RamBlock, 0), (memfd, 4096)] {
        let Shipped { prefaulted_bytes, existing_bytes } = ship(Box::new(make), 1);
        assert!((TOUCHED_BYTES - LEARNING_BYTES..=TOUCHED_BYTES).contains(&prefaulted_bytes), "{prefaulted_bytes}");
        assert_eq!(existing_bytes, TOUCHED_BYTES + besides, "what no packet named stays as it was");
    }
}

#[test]
fn a_file_that_is_in_memory_and_not_mapped_is_mapped() {
    let make = |name: &str, gpa, bytes, page_size| {
        let block = memfd(name, gpa, bytes, page_size);
        let file = std::fs::File::from(block.fd().unwrap().try_clone_to_owned().unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; RAM_BYTES as usize], 0).unwrap();
        block
    };
    let prefaulted_bytes = ship(Box::new(make), 1).prefaulted_bytes;
    assert!((TOUCHED_BYTES - LEARNING_BYTES..=TOUCHED_BYTES).contains(&prefaulted_bytes), "{prefaulted_bytes}");
}

#[test]
fn memory_that_is_mapped_is_left_alone() {
    for make in [private, memfd] {
        let mapped = move |name: &str, gpa, bytes, page_size| {
            let block = make(name, gpa, bytes, page_size);
            block.prefault(0, block.pages()).unwrap();
            block
        };
        assert_eq!(ship(Box::new(mapped), 1).prefaulted_bytes, 0);
    }
}

#[test]
fn scattered_pages_are_left_to_faults() {
    let Shipped { prefaulted_bytes, existing_bytes } = ship(Box::new(private), 2);
    assert_eq!((prefaulted_bytes, existing_bytes), (0, TOUCHED_BYTES / 2));
}

/// Memory that the kernel itself may not reach in any other way than the process does: it cannot be populated.
fn secret(name: &str, gpa: u64, bytes: u64, page_size: PageSize) -> Result<RamBlock, std::io::Error> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // SAFETY: takes no pointers.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), bytes as i64) }, 0);
    let mapping = memmap2::MmapOptions::new().len(bytes as usize).map_raw(&fd)?;
    // SAFETY: the mapping just made, which the block holds and nobody else knows of.
    let block = unsafe { RamBlock::new(name, gpa, mapping.as_mut_ptr(), bytes, page_size) }.unwrap();
    Ok(block.with_keep_alive(mapping).with_initial(Initial::Zeroed))
}

#[test]
fn memory_that_cannot_be_populated_takes_its_pages_by_faults() {
    match secret("probe", 0, RAM_BYTES, PageSize::SIZE_4K) {
        Err(why) => {
            let test = "memory_that_cannot_be_populated_takes_its_pages_by_faults";
            return support::skip(test, &format!("no secret memory: {why}"));
        }
        Ok(probe) => assert!(probe.prefault(0, 16).is_err(), "this memory can be populated"),
    }
    let make = |name: &str, gpa, bytes, page_size| secret(name, gpa, bytes, page_size).unwrap();
    assert_eq!(ship(Box::new(make), 1).prefaulted_bytes, 0);
}
