//! A target of QEMU's wire whose memory stands still for a while, as that of a file does when its disk is busy.

// UNSAFETY: userfaultfd(2), which holds up whoever touches the memory, has no safe call.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![cfg(all(not(loom), feature = "qemu"))]

#[path = "qemu_mutants/capture.rs"]
#[expect(dead_code, reason = "other tests use all of it")]
mod capture;
#[path = "support/mod.rs"]
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use pageferry::config::Timeouts;
use pageferry::memory::{Backing, Initial};
use pageferry::qemu::Qemu;
use pageferry::qemu::wire::Dialect;
use pageferry::{Outcome, RamBlock, Target};

use capture::{CHANNELS, capture};
use vmm::TestIncoming;

/// How long a target waits for a source that says nothing.
const SILENCE: Duration = Duration::from_millis(300);
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const REGISTER_MODE_MISSING: u64 = 1;

/// Whoever touches memory that this covers for the first time waits until it is dropped: the kernel, too.
struct Standstill(OwnedFd);

impl Standstill {
    fn new() -> io::Result<Standstill> {
        // SAFETY: the system call takes its flags by value.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let standstill = Standstill(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        standstill.ask(UFFDIO_API, [0xaa, 0, 0, 0]).map(|()| standstill)
    }

    fn cover(&self, block: &RamBlock) -> io::Result<()> {
        let range = block.range(0, block.pages()).unwrap();
        self.ask(UFFDIO_REGISTER, [range.ptr as u64, range.len as u64, REGISTER_MODE_MISSING, 0])
    }

    fn ask(&self, request: u64, mut words: [u64; 4]) -> io::Result<()> {
        // SAFETY: both requests read and write no more than four words; registering changes no content.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, words.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[test]
fn memory_that_stands_still_is_not_taken_for_a_source_that_does() {
    let standstill = match Standstill::new() {
        Ok(standstill) => Arc::new(standstill),
        Err(e) => {
            return support::skip(
                "memory_that_stands_still",
                &format!("no userfaultfd for the kernel's own faults: {e}"),
            );
        }
    };
    let mut vmm = TestIncoming::new();
    let covers = Arc::downgrade(&standstill);
    vmm.make = Box::new(move |name, guest_address, bytes, page_size| {
        let block = RamBlock::anonymous(name, guest_address, bytes, page_size, Backing::Base).unwrap();
        covers.upgrade().unwrap().cover(&block).unwrap();
        block.with_initial(Initial::Zeroed)
    });
    let (near, mut wires): (Vec<_>, Vec<_>) = (0..=CHANNELS).map(|_| UnixStream::pair().unwrap()).unzip();
    let timeouts = Timeouts { silence: SILENCE, ..Timeouts::default() };
    let target = Target::builder().framing(Qemu::new(CHANNELS)).timeouts(timeouts);
    let target = target.connections(near.into_iter().map(OwnedFd::from)).unwrap();
    let (sender, ended) = channel();
    let thread = std::thread::spawn(move || sender.send((target.receive(&mut vmm), vmm)).unwrap());
    for (wire, records) in wires.iter_mut().zip(&capture(Dialect::V10_0, true).streams) {
        wire.write_all(&records.concat()).unwrap();
    }
    let early = ended.recv_timeout(SILENCE * 4).map(|(report, _)| report);
    // In any case, or the lanes never end.
    drop(standstill);
    assert!(early.is_err(), "{early:#?}");
    wires[0].read_to_end(&mut Vec::new()).unwrap();
    let (report, vmm) = ended.recv_timeout(PATIENCE).expect("it hangs");
    thread.join().unwrap();
    assert_eq!((report.outcome, vmm.runs), (Outcome::Completed, 1));
}
