//! The threads of a migration: how they are made, named, pinned and masked, and what happens if one cannot be had.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pageferry::crew::{Spawn, StartError, Starting, StdSpawn};
use pageferry::{Outcome, Pin, Source, Target, Verify};

use super::leaks::{alone, threads};
use super::vmm::{self, TestIncoming, Transport, Trip};

/// Creates threads, but for the one whose turn it is to fail.
struct FailAt {
    turn: usize,
    made: AtomicUsize,
}

impl FailAt {
    fn new(turn: usize) -> Arc<FailAt> {
        Arc::new(FailAt { turn, made: AtomicUsize::new(0) })
    }
}

impl Spawn for FailAt {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        match self.made.fetch_add(1, Ordering::Relaxed) {
            turn if turn == self.turn => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            _ => StdSpawn.spawn(name, body),
        }
    }
}

fn travel(source: pageferry::source::SourceBuilder, target: pageferry::target::TargetBuilder, channels: u8) -> Trip {
    let mut guest = super::guest(20);
    let (source, target) = Transport::Tcp4.connect(source, target, channels);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    if trip.sent.outcome == Outcome::Completed {
        assert_eq!((trip.incoming.runs, trip.incoming.discards), (1, 0));
    } else {
        vmm::assert_stayed(&guest, &trip);
    }
    trip
}

fn source() -> pageferry::source::SourceBuilder {
    Source::builder(super::guest(20).ram.clone())
}

#[test]
fn a_thread_that_cannot_be_made_at_the_source_ends_the_migration_and_leaves_nothing() {
    alone("threads::a_thread_that_cannot_be_made_at_the_source_ends_the_migration_and_leaves_nothing", || {
        for turn in 0..4 {
            let trip = travel(source().spawn(FailAt::new(turn)), Target::builder(), 4);
            let why = trip.sent.outcome.to_string();
            assert!(why.contains(&format!("cannot create the thread of worker {turn}")), "{why}");
            let told = trip.received.outcome.to_string();
            assert!(told.contains("cannot create the thread"), "the target was told {told}");
        }
        assert_eq!(travel(source().spawn(FailAt::new(4)), Target::builder(), 4).sent.outcome, Outcome::Completed);
    });
}

#[test]
fn a_thread_that_cannot_be_made_at_the_target_ends_the_migration_and_leaves_nothing() {
    alone("threads::a_thread_that_cannot_be_made_at_the_target_ends_the_migration_and_leaves_nothing", || {
        for turn in 0..4 {
            let trip = travel(source(), Target::builder().spawn(FailAt::new(turn)), 4);
            let why = trip.received.outcome.to_string();
            assert!(why.contains(&format!("cannot create the thread of worker {turn}")), "{why}");
            let told = trip.sent.outcome.to_string();
            assert!(told.contains("cannot create the thread"), "the source was told {told}");
        }
    });
}

fn refusing(turn: usize) -> Arc<pageferry::crew::StartHook> {
    Arc::new(move |starting: &Starting<'_>| match starting.id == turn && starting.kind != "scan" {
        true => Err(StartError::new("load its filter", io::Error::from_raw_os_error(libc::EPERM))),
        false => Ok(None),
    })
}

#[test]
fn a_start_hook_that_refuses_is_quoted_and_leaves_nothing() {
    alone("threads::a_start_hook_that_refuses_is_quoted_and_leaves_nothing", || {
        for turn in 0..3 {
            let says = format!("worker {turn} could not load its filter: Operation not permitted");
            let trip = travel(source().start_hook(refusing(turn)), Target::builder(), 3);
            assert!(trip.sent.outcome.to_string().contains(&says), "{}", trip.sent.outcome);
            let trip = travel(source(), Target::builder().start_hook(refusing(turn)), 3);
            assert!(trip.received.outcome.to_string().contains(&says), "{}", trip.received.outcome);
            assert!(trip.sent.outcome.to_string().contains(&says), "{}", trip.sent.outcome);
        }
    });
}

#[test]
fn a_start_hook_that_refuses_the_scanner_resumes_the_guest() {
    alone("threads::a_start_hook_that_refuses_the_scanner_resumes_the_guest", || {
        let hook = |starting: &Starting<'_>| match starting.kind {
            "scan" => Err(StartError::new("load its filter", None)),
            _ => Ok(None),
        };
        let trip = travel(source().start_hook(Arc::new(hook)), Target::builder(), 2);
        assert!(trip.sent.outcome.to_string().contains("pf-scan could not load its filter"), "{}", trip.sent.outcome);
    });
}

#[test]
fn a_start_hook_that_panics_is_an_error() {
    alone("threads::a_start_hook_that_panics_is_an_error", || {
        let trip = travel(source().start_hook(Arc::new(|_| panic!("no filter"))), Target::builder(), 2);
        assert!(trip.sent.outcome.to_string().contains("its start hook panicked: no filter"), "{}", trip.sent.outcome);
    });
}

#[test]
fn a_cpu_that_is_required_and_not_there_is_named() {
    alone("threads::a_cpu_that_is_required_and_not_there_is_named", || {
        let trip = travel(source().pin(Pin::Required(vec![1023])), Target::builder(), 2);
        assert!(trip.sent.outcome.to_string().contains("CPU 1023 is not available"), "{}", trip.sent.outcome);
        let trip = travel(source(), Target::builder().pin(Pin::Required(vec![1023])), 2);
        assert!(trip.received.outcome.to_string().contains("CPU 1023 is not available"), "{}", trip.received.outcome);
        assert!(trip.sent.outcome.to_string().contains("CPU 1023 is not available"), "{}", trip.sent.outcome);
    });
}

#[test]
fn the_cpus_that_were_obtained_are_in_the_reports() {
    let cpu = core_affinity::get_core_ids().unwrap()[0].id;
    let pin = Pin::BestEffort(vec![cpu, 1023]);
    let trip = travel(source().pin(pin.clone()), Target::builder().pin(pin), 3);
    assert_eq!(trip.sent.outcome, Outcome::Completed);
    assert_eq!(trip.sent.cpus, [Some(cpu), None, Some(cpu)]);
    assert_eq!(trip.received.cpus, [Some(cpu), None, Some(cpu)]);
    let trip = travel(source().pin(Pin::Off), Target::builder().pin(Pin::Required(vec![cpu])), 2);
    assert_eq!((trip.sent.cpus, trip.received.cpus), (vec![None; 2], vec![Some(cpu); 2]));
}

#[test]
fn both_ends_of_a_channel_share_a_cpu_where_one_host_has_too_few() {
    let cpus: Vec<_> = core_affinity::get_core_ids().unwrap().iter().map(|core| core.id).collect();
    let channels = (2 * cpus.len()).min(16) as u8;
    if 2 * usize::from(channels) <= cpus.len() {
        return super::support::skip(
            "both_ends_of_a_channel_share_a_cpu_where_one_host_has_too_few",
            "there are too many CPUs",
        );
    }
    let trip = travel(source(), Target::builder(), channels);
    let expected: Vec<_> = (0..channels).map(|channel| Some(cpus[usize::from(channel) % cpus.len()])).collect();
    assert_eq!((trip.sent.outcome, trip.sent.cpus), (Outcome::Completed, expected.clone()));
    assert_eq!(trip.received.cpus, expected);
}

#[test]
fn each_end_of_a_channel_is_left_to_the_scheduler_where_there_are_cpus_enough() {
    if core_affinity::get_core_ids().unwrap().len() < 2 {
        return super::support::skip(
            "each_end_of_a_channel_is_left_to_the_scheduler_where_there_are_cpus_enough",
            "one CPU",
        );
    }
    let trip = travel(source(), Target::builder(), 1);
    assert_eq!((trip.sent.cpus, trip.received.cpus), (vec![None], vec![None]));
}

/// The name and the blocked signals of every thread of ours.
fn masks() -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_owned();
        let name = field("Name:");
        if name.starts_with("pf-") {
            found.push((name, u64::from_str_radix(&field("SigBlk:"), 16).unwrap()));
        }
    }
    found.sort();
    found
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// What a thread raises by what it does: the VMM's handler is asked about a bus error in guest RAM.
fn of_its_own() -> u64 {
    bit(libc::SIGBUS) | bit(libc::SIGSEGV) | bit(libc::SIGILL) | bit(libc::SIGFPE)
}

/// No signal that is meant for the VMM lands here. Two cannot be blocked, and two the C library keeps for itself.
fn takes_none_of_the_vmms(mask: u64) -> bool {
    mask | of_its_own() | bit(libc::SIGKILL) | bit(libc::SIGSTOP) | bit(32) | bit(33) == u64::MAX
}

#[test]
fn threads_are_named_with_their_role_and_number_and_take_no_signals() {
    alone("threads::threads_are_named_with_their_role_and_number_and_take_no_signals", || {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut guest = super::guest(20);
        // While state is saved, workers, lanes and the scanner exist at once: the scanner cannot end before this has
        // released it, as its start hook waits.
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Mutex::new(held);
        let (began, scanning) = std::sync::mpsc::channel();
        let hook = move |starting: &Starting<'_>| {
            if starting.kind == "scan" {
                began.send(()).unwrap();
                held.lock().unwrap().recv().unwrap();
            }
            Ok(None)
        };
        let look = seen.clone();
        guest.on_save = Some(Box::new(move |_, _| {
            scanning.recv().unwrap();
            *look.lock().unwrap() = masks();
            release.send(()).unwrap();
        }));
        let builder = Source::builder(guest.ram.clone()).start_hook(Arc::new(hook));
        let (source, target) = Transport::Tcp4.connect(builder, Target::builder(), 2);
        let mut dirty = guest.dirty.clone();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        vmm::assert_arrived(&guest, &trip);
        let seen = seen.lock().unwrap();
        let names: Vec<_> = seen.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["pf-recv-0", "pf-recv-1", "pf-scan", "pf-send-0", "pf-send-1"]);
        for (name, mask) in seen.iter() {
            assert!(takes_none_of_the_vmms(*mask) && mask & of_its_own() == 0, "{name} blocks {mask:#x}");
        }
    });
}

#[test]
fn threads_that_hash_take_no_signals_either() {
    alone("threads::threads_that_hash_take_no_signals_either", || {
        let guest_pages = 3 * 4096;
        let mut guest = super::guest(guest_pages);
        let builder = Source::builder(guest.ram.clone()).verify(Verify::Full);
        let (source, target) = Transport::Fds.connect(builder, Target::builder(), 3);
        let mut dirty = guest.dirty.clone();
        // Looks for as long as the migration takes: hashing 48 MiB takes many looks.
        let done = Arc::new(AtomicUsize::new(0));
        let watcher = std::thread::spawn({
            let done = done.clone();
            move || {
                let mut seen = Vec::new();
                while done.load(Ordering::Relaxed) == 0 {
                    seen.extend(masks().into_iter().filter(|(name, _)| name.starts_with("pf-hash")));
                    std::thread::yield_now();
                }
                seen
            }
        });
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        done.store(1, Ordering::Relaxed);
        let seen = watcher.join().unwrap();
        vmm::assert_arrived(&guest, &trip);
        assert!(!seen.is_empty(), "no hashing thread was seen");
        for (name, mask) in seen {
            // As a thread begins and ends, the C library blocks all the rest, too.
            assert!(takes_none_of_the_vmms(mask), "{name} blocks {mask:#x}");
        }
    });
}

#[test]
fn a_completed_migration_and_ends_that_were_never_used_leave_nothing() {
    alone("threads::a_completed_migration_and_ends_that_were_never_used_leave_nothing", || {
        for transport in Transport::all() {
            let (unused_source, unused_target) = transport.connect(source(), Target::builder(), 2);
            let socket = unused_target.address().map(|address| address.to_string());
            drop((unused_source, unused_target));
            if let Some(path) = socket.as_deref().and_then(|address| address.strip_prefix("unix:")) {
                assert!(!std::path::Path::new(path).exists(), "{path} is left");
            }
            let mut guest = super::guest(100);
            guest.start(10);
            let (source, target) = transport.connect(Source::builder(guest.ram.clone()), Target::builder(), 3);
            let handles = (source.cancel_handle(), target.cancel_handle(), source.progress(), target.progress());
            let mut dirty = guest.dirty.clone();
            let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
            vmm::assert_arrived(&guest, &trip);
            // After the end a cancel is too late, and harmless.
            assert_eq!(handles.0.cancel(), pageferry::gate::CancelAnswer::TooLate);
            assert_eq!(handles.1.cancel(), pageferry::gate::CancelAnswer::TooLate);
            assert!(!threads().iter().any(|name| name.starts_with("pf-")), "{:?}", threads());
        }
    });
}
