//! What strangers and sources can make a target set aside before it has agreed to anything: ARCHITECTURE.md has the sum.
// UNSAFETY: an allocator is unsafe by nature.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::{BlockInfo, FrameEncoder, SETUP_OPAQUE_BYTES_MAX, SourceFrame};
use pageferry::wire::hello::{HelloRole, Side};
use pageferry::{Target, Timeouts};

use super::at_target::against_target;
use super::leaks::alone;
use super::peer::*;
use super::timeouts;
use super::vmm::{self, TestIncoming};

/// The sum in ARCHITECTURE.md, "Memory of a target before Ready".
const BYTES_MAX: u64 = 8 << 20;

/// More than the lobby holds, and not so many that the kernel has some of them try again in a second.
const CROWD: usize = 1200;

/// Counts what each thread has allocated and not freed: nothing else is exact to the byte. What one thread allocates and
/// another frees counts for neither; before Ready a target has one thread.
struct Counting;

thread_local! {
    /// Bytes now, and the most there have been.
    static HEAP: Cell<(i64, i64)> = const { Cell::new((0, 0)) };
}

fn count(bytes: i64) {
    // A thread that is ending has no cell any more.
    let _ = HEAP.try_with(|heap| {
        let (now, most) = heap.get();
        heap.set((now + bytes, most.max(now + bytes)));
    });
}

// SAFETY: all is left to the system's allocator, whose results are given back as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises are those of this call.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes as i64 - layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The most that this thread has allocated at once while it did this, beyond what it had before.
pub fn growth(work: impl FnOnce()) -> u64 {
    let before = HEAP.get().0;
    HEAP.set((before, before));
    work();
    (HEAP.get().1 - before) as u64
}

/// So many strangers who have each said all of a Hello but its last byte.
fn crowd(to: &str, count: usize) -> Vec<TcpStream> {
    let almost = &hello(HelloRole::Control, Side::Source, SESSION).encode()[..63];
    let visit = |_| {
        let mut stream = vmm::connect_from(Ipv4Addr::new(127, 0, 0, 66), to).unwrap();
        // One that was sent away meanwhile does not hear it.
        let _ = stream.write_all(almost);
        stream
    };
    (0..count).map(visit).collect()
}

/// Attacks a target before it is Ready, with a crowd around; gives what that made the process grow by.
fn before_ready(what: &str, refuse: Option<&str>, script: impl FnOnce(&mut FakeSource) + Send) -> u64 {
    let mut incoming = TestIncoming::new();
    incoming.refuse = refuse.map(str::to_owned);
    let mut ended = String::new();
    let grown = growth(|| {
        // Time enough to set aside all that there is room for.
        let target = Target::builder().timeouts(Timeouts { hello: Duration::from_millis(1500), ..timeouts() });
        let (report, _) = against_target(target, incoming, |to| {
            let crowd = crowd(to, CROWD);
            script(&mut FakeSource::greet(to));
            drop(crowd);
        });
        assert!(report.outcome.failure().is_some() && report.payload_bytes == 0, "{what}: {}", report.outcome);
        ended = report.outcome.to_string();
        assert!(report.turned_away > 500, "{what}: {} were turned away", report.turned_away);
    });
    eprintln!("{what}: {} KiB, {ended}", grown >> 10);
    grown
}

#[test]
fn a_target_that_is_not_ready_keeps_no_more_than_architecture_md_says() {
    alone("memory::a_target_that_is_not_ready_keeps_no_more_than_architecture_md_says", || {
        vmm::allow_many_descriptors();
        let whole_frame = raw_frame(1, 0, &vec![0; 1 << 20]);
        let block = |id| BlockInfo {
            id: BlockId(id),
            name: "n".repeat(255),
            guest_address: u64::from(id) << 40,
            bytes: 1 << 40,
            page_size: PageSize::SIZE_4K,
            backing_page_bytes: 4096,
        };
        let mut largest = setup(255, &[]);
        (largest.blocks, largest.opaque) = ((0..1024).map(block).collect(), vec![1; SETUP_OPAQUE_BYTES_MAX]);
        let mut line = FrameEncoder::<SourceFrame>::new();
        let mut largest_setup = Vec::new();
        line.encode(&SourceFrame::Setup(largest), &mut largest_setup).unwrap();
        let (mut line, mut pings) = (FrameEncoder::<SourceFrame>::new(), Vec::new());
        (0..600_000).for_each(|nonce| line.encode(&SourceFrame::Ping { nonce }, &mut pings).unwrap());
        let cases = [
            before_ready("a frame that never ends", None, |source| {
                source.control.raw(&whole_frame[..whole_frame.len() - 1]);
                source.until_closed();
            }),
            before_ready("the largest Setup", Some("no room for a petabyte"), |source| {
                source.control.raw(&largest_setup);
                source.until_closed();
            }),
            before_ready("questions whose answers nobody reads", None, |source| {
                vmm::set_smallest_receive_buffer(&source.control.stream);
                source.control.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
                source.control.raw(&pings);
            }),
        ];
        assert!(cases.iter().all(|grown| *grown < BYTES_MAX), "{cases:?}, the limit is {BYTES_MAX}");
        // How much of the third the kernel takes is the system's choice.
        assert!(cases[..2].iter().all(|grown| *grown > 1 << 20), "{cases:?}: nothing was set aside, or measured");
    });
}
