//! The memory that is shipped: what stands in it, and how it is mapped.
// UNSAFETY: guest RAM is a file in /dev/shm that several processes map: mmap(2), and madvise(2) as QEMU does it.
#![expect(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use pageferry::memory::{Backing, Initial, Ram, RamBlock};
use pageferry::units::PageSize;

use super::PAGE;
use super::support::Options;

/// What QEMU aligns its memory to, and how large the pages are that it advises.
const HUGE: usize = 2 << 20;

/// The 8-byte word that stands at this place: no page of it is zero, and no two are equal.
fn noise(index: u64) -> u64 {
    let x = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 31)
}

/// Makes a file of `--bytes` bytes that exist, by write(2): no page table of any process knows of them.
pub fn fill(path: &str, options: &Options) -> io::Result<()> {
    let bytes = options.number("--bytes").expect("--bytes is given") as u64;
    let zeros = options.value("--with").expect("--with is given") == "zeros";
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for index in 0..bytes / 8 {
        file.write_all(&(if zeros { 0 } else { noise(index) }).to_le_bytes())?;
    }
    file.flush()
}

/// Spoils every page of a file, so that a comparison with the source's proves that a run brought each.
pub fn spoil(path: &str) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    for at in (0..file.metadata()?.len()).step_by(PAGE as usize) {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at)?;
        file.write_all_at(&word.map(|byte| !byte), at)?;
    }
    Ok(())
}

/// The guest's RAM: private memory that nobody has touched; or a file, mapped as QEMU maps it. That is shared, aligned to
/// a huge page, and advised for huge pages, which a tmpfs gives to new memory only, and only where the system lets it.
///
/// Its initial state is [`Initial::Zeroed`]. Where the file is new, that is so. Where it is not, no page of the source is
/// zero, so every page is overwritten by data and none is left alone on the strength of reading as zero; each run is
/// checked to have brought all of them. No rival makes its memory zero either.
pub fn ram(options: &Options) -> Ram {
    if let Some(mib) = options.number("--anonymous-mib") {
        let (bytes, huge) = ((mib as u64) << 20, Backing::TransparentHuge);
        let block = RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, huge).expect("memory for the benchmark");
        return Ram::new([block.with_initial(Initial::Zeroed)]).expect("one block is RAM");
    }
    let path = options.value("--file").expect("--file is given");
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the memory's file can be opened");
    let bytes = file.metadata().expect("the file has a length").len();
    // SAFETY: a new reservation at no fixed address; its result is checked.
    let reserved = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), bytes as usize + HUGE, libc::PROT_NONE, flags, -1, 0)
    };
    assert_ne!(reserved, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    let aligned = reserved.wrapping_byte_add(reserved.align_offset(HUGE));
    // SAFETY: inside the reservation, which nobody else knows of and which is never unmapped.
    let host = unsafe {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        libc::mmap(aligned, bytes as usize, access, flags, file.as_raw_fd(), 0)
    };
    assert_ne!(host, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    // SAFETY: the mapping just made. A wish, so a refusal is no error.
    unsafe { libc::madvise(host, bytes as usize, libc::MADV_HUGEPAGE) };
    // SAFETY: the mapping stays until the process ends, and nothing in this process refers to what is in it.
    let block =
        unsafe { RamBlock::new("ram", 0, host.cast(), bytes, PageSize::SIZE_4K) }.expect("a mapping is a block");
    let block = block.with_shared_file(file.as_fd(), 0).expect("a descriptor").with_initial(Initial::Zeroed);
    if options.has("--populate") {
        block.prefault(0, block.pages()).expect("the pages can be made");
    }
    Ram::new([block]).expect("one block is RAM")
}
