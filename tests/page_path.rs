//! The way of a page costs neither allocations nor a system call of its own.
#![cfg(not(loom))]
// UNSAFETY: counts allocations by standing in for the global allocator.
#![expect(unsafe_code, clippy::unnecessary_safety_comment)]

#[path = "support/peer.rs"]
mod peer;
#[path = "support/vmm.rs"]
mod vmm;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use pageferry::crew::{StartHook, Starting};
use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::{SourceFrame, TargetFrame};
use pageferry::{DirtyBitmap, Source, Target, Verify};
use vmm::{TestGuest, TestIncoming, Transport, Trip};

/// Counts by thread: the process has others, which may do as they like.
struct Counting;

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
    /// Whether this thread is a worker that is to be watched.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

/// Allocations of all watched threads.
static BY_WORKERS: AtomicU64 = AtomicU64::new(0);
/// Bytes that are allocated now, by whomever.
static BYTES: AtomicI64 = AtomicI64::new(0);

fn count(bytes: i64) {
    BYTES.fetch_add(bytes, Ordering::Relaxed);
    // A thread that is being torn down has no such variables any more.
    let _ = OWN.try_with(|own| own.set(own.get() + 1));
    if WATCHED.try_with(Cell::get).unwrap_or(false) {
        BY_WORKERS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every method passes on what it was given to the system's allocator, and gives back what that returns; the
// counters are plain numbers, and reading them allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes as i64 - layout.size() as i64);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(ptr, layout, bytes) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The counters are the process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Every second page of so much memory.
fn scattered(bytes: u64) -> TestGuest {
    let pages = bytes >> 12;
    let ram = vmm::ram(PageSize::SIZE_4K, &[pages]);
    (0..pages).step_by(2).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}

/// Marks the threads of workers and lanes. Thread names and start-up are behind them when it runs.
fn watching() -> Arc<StartHook> {
    Arc::new(|starting: &Starting<'_>| {
        if starting.kind != "scan" {
            WATCHED.set(true);
        }
        Ok(None)
    })
}

struct Costs {
    /// Allocations of workers and lanes, from their start hook to their end.
    workers: u64,
    /// Allocations of the thread that called `migrate`.
    controller: u64,
}

fn ship(bytes: u64, verify: Verify) -> (TestGuest, Trip, Costs) {
    let mut guest = scattered(bytes);
    let source = Source::builder(guest.ram.clone()).verify(verify).start_hook(watching());
    let (source, target) = Transport::Tcp4.connect(source, Target::builder().start_hook(watching()), 2);
    let mut incoming = TestIncoming::new();
    let receiving = std::thread::spawn(move || (target.receive(&mut incoming), incoming));
    let mut dirty = guest.dirty.clone();
    let before = (BY_WORKERS.load(Ordering::Relaxed), OWN.get());
    let sent = source.migrate(&mut dirty, &mut guest);
    let controller = OWN.get() - before.1;
    let (received, incoming) = receiving.join().unwrap();
    let workers = BY_WORKERS.load(Ordering::Relaxed) - before.0;
    (guest, Trip { sent, received, incoming }, Costs { workers, controller })
}

#[test]
fn workers_and_lanes_allocate_nothing_between_their_start_and_their_end() {
    let _alone = alone();
    // The counter counts: this test could fail.
    WATCHED.set(true);
    let before = BY_WORKERS.load(Ordering::Relaxed);
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(BY_WORKERS.load(Ordering::Relaxed) - before, 1);
    WATCHED.set(false);

    for verify in [Verify::Off, Verify::Wire] {
        let (small, large) = (ship(4 << 20, verify), ship(64 << 20, verify));
        vmm::assert_arrived(&large.0, &large.1);
        // What a thread costs, its bell and its check-in, it costs before its role begins.
        let thread = per_thread();
        println!("{verify:?}: {} and {} allocations, {thread} a thread", small.2.workers, large.2.workers);
        assert_eq!(small.2.workers, 4 * thread, "two workers and two lanes");
        assert_eq!(large.2.workers, 4 * thread, "two workers and two lanes");
    }
}

/// Allocations of a worker that has nothing to do, after its start hook.
fn per_thread() -> u64 {
    use pageferry::bell::{Bell, Close};
    use pageferry::crew::{Crew, Cx, Interrupt, Launch, Role, StdSpawn};
    struct Idle;
    impl Role for Idle {
        const KIND: &'static str = "idle";
        type Output = ();
        fn interrupt(&self) -> Arc<dyn Interrupt> {
            Arc::new(())
        }
        fn run(self, cx: &mut Cx) {
            cx.bell().wait();
        }
    }
    let bell = Bell::here();
    let launch = Launch { start: watching(), ..Launch::new(&StdSpawn, Arc::new(bell.ringer())) };
    let before = BY_WORKERS.load(Ordering::Relaxed);
    let mut crew = Crew::muster(0..1, &launch, |_| Ok::<_, std::convert::Infallible>(vec![Idle])).unwrap();
    crew.close(Close::Abort);
    crew.join();
    BY_WORKERS.load(Ordering::Relaxed) - before
}

#[test]
fn what_the_controller_allocates_does_not_grow_with_the_number_of_pages() {
    let _alone = alone();
    let (small, large) = (ship(16 << 20, Verify::Off), ship(256 << 20, Verify::Off));
    vmm::assert_arrived(&small.0, &small.1);
    vmm::assert_arrived(&large.0, &large.1);
    let more = large.2.controller.saturating_sub(small.2.controller);
    println!("{} and {} allocations, {:?}", small.2.controller, large.2.controller, large.1.sent.total);
    // 30720 pages more. What grows is counted in epochs (16384 runs each) and in heartbeats (5 a second).
    let heartbeats = large.1.sent.total.as_millis() as u64 / 200 + 1;
    assert!(more < 40 + 6 * heartbeats, "{more} allocations more in {heartbeats} heartbeats");
}

#[test]
#[cfg(feature = "vm-memory")]
fn a_harvest_of_the_vmms_own_bitmaps_allocates_nothing() {
    use pageferry::{DirtySource, GuestRam, RegionBitmaps};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, bitmap::AtomicBitmap};
    let _alone = alone();
    let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let ram = GuestRam::new(memory.clone()).ram().unwrap();
    let mut dirty = RegionBitmaps::new(memory.clone());
    dirty.arm(&ram).unwrap();
    (0..256).step_by(2).for_each(|page| memory.write_obj(1u8, GuestAddress(page << 12)).unwrap());
    let before = OWN.get();
    dirty.begin_round().unwrap();
    let looked = OWN.get();
    assert!(looked > before, "the counter counts: a look at all words allocates");
    let mut words = [0; 4];
    dirty.harvest(BlockId(0), 0, &mut words).unwrap();
    dirty.give_back(BlockId(0), 0, &words).unwrap();
    assert_eq!(OWN.get(), looked);
    assert_eq!(words, [0x5555_5555_5555_5555; 4]);
}

#[test]
fn a_device_state_in_tiny_pieces_takes_no_more_memory_than_it_has_bytes() {
    const PIECES: u64 = 100_000;
    let _alone = alone();
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()));
    let mut source = peer::FakeSource::live(&to, 1);
    let before = BYTES.load(Ordering::Relaxed);
    for offset in 0..PIECES {
        source.control.send(&SourceFrame::State { offset, bytes: vec![1] });
    }
    source.control.send(&SourceFrame::Ping { nonce: PIECES });
    // The answer comes when all that was sent before has been taken in.
    assert!(matches!(source.control.next(), Some(TargetFrame::Pong { nonce: PIECES, .. })));
    let kept = BYTES.load(Ordering::Relaxed) - before;
    drop(source);
    assert_eq!(receiving.join().unwrap().state_bytes, PIECES);
    assert!(kept < 10 * PIECES as i64, "{kept} bytes for {PIECES} bytes of state");
}

#[test]
fn a_hundred_scattered_pages_share_a_system_call() {
    let _alone = alone();
    for verify in [Verify::Off, Verify::Wire] {
        let mut guest = scattered(96 << 20);
        // Default settings, but for what is verified.
        let source = Source::builder(guest.ram.clone()).verify(verify);
        let target = Target::builder().listen("127.0.0.1:0").unwrap();
        let source = source.connect(&target.address().unwrap().to_string()).unwrap();
        let mut dirty = guest.dirty.clone();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        vmm::assert_arrived(&guest, &trip);
        let pages = trip.sent.payload_bytes >> 12;
        assert_eq!(pages, 96 << 20 >> 13);
        println!("{verify:?}: {} calls for {pages} pages", trip.sent.send_syscalls);
        assert!(trip.sent.send_syscalls <= pages / 100, "{} calls for {pages} pages", trip.sent.send_syscalls);
    }
}
