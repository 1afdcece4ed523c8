//! Hundreds of runs of every outcome in one process, which holds no more after them than before: no thread, no
//! descriptor, no mapping, no memory.
//!
//! PAGEFERRY_LEAK_ROUNDS is how often every outcome comes about; `tests/soak leaks` sets it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use pageferry::precopy::Overrun;
use pageferry::source::SourceBuilder;
use pageferry::units::PageSize;
use pageferry::{CancelAnswer, CancelHandle, DirtyBitmap, DirtyError, Outcome, Source, Target, Verify, WriteProtect};

use crate::expect::{self, Must};
use crate::leaks::{self, Census};
use crate::plan::{Class, Plan};
use crate::proxy::Proxy;
use crate::vmm::{self, TestGuest, TestIncoming, Transport, Trip};
use crate::{run, setting};

/// Rounds before the first census: what the C library keeps for later is there by then.
const WARM_UP: u64 = 2;
/// Outcomes that come about at the same time.
const AT_ONCE: usize = 6;
/// How long nothing may move: many of these runs wait for it.
const STALL_MS: u64 = 400;

/// Brings one outcome about, with this seed, and gives its word.
type Kind = fn(u64) -> &'static str;

/// Every way to end that needs no damaged connection.
const KINDS: [(&str, Kind); 17] = [
    ("over TCP", |_| plain(Transport::Tcp4)),
    ("over a Unix socket", |_| plain(Transport::Unix)),
    ("over ready-made sockets", |_| plain(Transport::Fds)),
    ("fully verified", |_| trip(|source| source.verify(Verify::Full), |_, _, _| {})),
    ("write-protected", |_| write_protected()),
    ("withdrawn twice", |_| {
        let retry = |source: SourceBuilder| source.downtime_limit(Duration::ZERO).overrun(Overrun::Retry { tries: 2 });
        trip(retry, |_, _, _| {})
    }),
    ("cancelled before it began", |_| {
        trip(|source| source, |_, _, [cancel, _]| assert_eq!(cancel.cancel(), CancelAnswer::Accepted))
    }),
    ("cancelled while paused", |_| {
        trip(
            |source| source,
            |guest, _, [cancel, _]| {
                guest.on_pause = Some(Box::new(move || assert_eq!(cancel.cancel(), CancelAnswer::Accepted)))
            },
        )
    }),
    ("cancelled at the target", |_| {
        let set = |incoming: &mut TestIncoming, cancel: CancelHandle| {
            incoming.on_prepare = Some(Box::new(move || assert_eq!(cancel.cancel(), CancelAnswer::Accepted)));
        };
        trip(|source| source, |_, incoming, [_, cancel]| set(incoming, cancel))
    }),
    ("refused", |_| trip(|source| source, |_, incoming, _| incoming.refuse = Some("not here".to_owned()))),
    ("not to be paused", |_| trip(|source| source, |guest, _, _| guest.fail_pause = Some("busy".to_owned()))),
    ("not to be saved", |_| trip(|source| source, |guest, _, _| guest.fail_save = Some("gone".to_owned()))),
    ("not to be loaded", |_| trip(|source| source, |_, incoming, _| incoming.fail_load = Some("strange".to_owned()))),
    ("not to be run", |_| trip(|source| source, |_, incoming, _| incoming.fail_run = Some("no vCPU".to_owned()))),
    ("with nobody there", |_| nobody_listens()),
    ("with nobody coming", |_| nobody_comes()),
    ("cut off after Commit", cut_after_commit),
];

/// Classes of faults beside them; those that only slow things down leave nothing that the others do not.
const CLASSES: [Class; 14] = {
    use Class::*;
    [
        ResetData,
        CloseData,
        HalfClose,
        StallData,
        StallControl,
        CutControl,
        DropAtAccept,
        FlipHello,
        FlipHeader,
        FlipTable,
        FlipPayload,
        FlipFrame,
        KillSome,
        KillAll,
    ]
};

fn guest() -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    vmm::fill(&ram, 1);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    guest.start(10);
    guest
}

fn word(outcome: &Outcome) -> &'static str {
    outcome.word()
}

/// A migration with these settings, in which the guest, or the VMM at the target, does what `set` says; it gets what
/// cancels source and target.
fn trip(
    settings: impl FnOnce(SourceBuilder) -> SourceBuilder,
    set: impl FnOnce(&mut TestGuest, &mut TestIncoming, [CancelHandle; 2]),
) -> &'static str {
    let (mut guest, mut incoming) = (guest(), TestIncoming::new());
    let builder = settings(Source::builder(guest.ram.clone()));
    let (source, target) = Transport::Tcp4.connect(builder, Target::builder(), 2);
    let target_cancel = target.cancel_handle();
    set(&mut guest, &mut incoming, [source.cancel_handle(), target_cancel.clone()]);
    let mut dirty = guest.dirty.clone();
    let receiving = thread::spawn(move || (target.receive(&mut incoming), incoming));
    let sent = source.migrate(&mut dirty, &mut guest);
    // A source that was cancelled before it connected leaves it waiting.
    target_cancel.cancel();
    let (received, incoming) = receiving.join().unwrap();
    let trip = Trip { sent, received, incoming };
    let said = word(&trip.sent.outcome);
    match said {
        "completed" => vmm::assert_arrived(&guest, &trip),
        _ => assert_eq!(guest.resumed, guest.paused, "{}", trip.sent.outcome),
    }
    said
}

fn plain(transport: Transport) -> &'static str {
    let mut guest = guest();
    let (source, target) = transport.connect(Source::builder(guest.ram.clone()), Target::builder(), 3);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    vmm::assert_arrived(&guest, &trip);
    word(&trip.sent.outcome)
}

fn write_protected() -> &'static str {
    let mut dirty = match WriteProtect::new() {
        Ok(dirty) => dirty,
        // Said once, by the test that calls.
        Err(DirtyError::Unsupported { .. }) => return "not here",
        Err(why) => panic!("{why}"),
    };
    let mut guest = guest();
    guest.stop();
    guest.start_unmarked(10);
    let (source, target) = Transport::Tcp4.connect(Source::builder(guest.ram.clone()), Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    vmm::assert_arrived(&guest, &trip);
    word(&trip.sent.outcome)
}

fn nobody_listens() -> &'static str {
    let mut guest = guest();
    // Bound, and not listened on: nobody else gets it.
    let address = vmm::unix_address();
    let _bound = std::os::unix::net::UnixDatagram::bind(address.strip_prefix("unix:").unwrap()).unwrap();
    let source = Source::builder(guest.ram.clone()).connect(&address).unwrap();
    let mut dirty = guest.dirty.clone();
    let report = source.migrate(&mut dirty, &mut guest);
    std::fs::remove_file(address.strip_prefix("unix:").unwrap()).unwrap();
    word(&report.outcome)
}

fn nobody_comes() -> &'static str {
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let cancel = target.cancel_handle();
    let waiting = thread::spawn(move || target.receive(&mut TestIncoming::new()));
    cancel.cancel();
    word(&waiting.join().unwrap().outcome)
}

/// The target runs the guest, and its word does not come through: the source does not know.
fn cut_after_commit(seed: u64) -> &'static str {
    let mut guest = guest();
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let mut plan = Plan::of(seed * 20);
    plan.faults.clear();
    let proxy = Proxy::before(&target.address().unwrap().to_string(), &plan);
    let source = Source::builder(guest.ram.clone()).connect(proxy.address()).unwrap();
    let (shared, ended) = (proxy.shared.clone(), std::sync::mpsc::channel::<()>());
    let mut incoming = TestIncoming::new();
    let (alive, source_ended) = ended;
    incoming.on_run = Some(Box::new(move || {
        shared.reset_all(0);
        // Runs for as long as the source waits.
        assert!(source_ended.recv().is_err());
    }));
    let receiving = thread::spawn(move || (target.receive(&mut incoming), incoming));
    let mut dirty = guest.dirty.clone();
    let sent = source.migrate(&mut dirty, &mut guest);
    drop(alive);
    proxy.end();
    let (received, incoming) = receiving.join().unwrap();
    assert_eq!((received.outcome, incoming.runs), (Outcome::Completed, 1));
    assert_eq!((guest.paused, guest.resumed), (1, 0), "{}", sent.outcome);
    word(&sent.outcome)
}

/// A small run of this class, and a second attempt where it fails.
fn faulty(class: Class, seed: u64) -> &'static str {
    let mut plan = Plan::small(class, seed, STALL_MS);
    if expect::must(&plan) == Must::Complete {
        // It waits for nothing, and a machine that is busy is not to make it fail.
        plan.stall_ms = 10 * STALL_MS;
    }
    let record = run::watched(&plan).unwrap_or_else(|why| panic!("{plan}: {why}"));
    word(&record.sent.outcome)
}

/// Brings about every outcome once, several at a time; counts their words.
fn round(number: u64, words: &Mutex<BTreeMap<&'static str, u64>>) {
    let jobs = KINDS.len() + CLASSES.len();
    let next = Mutex::new(0..jobs);
    let work = || {
        loop {
            let Some(job) = next.lock().unwrap().next() else { return };
            let word = match KINDS.get(job) {
                Some((_, kind)) => kind(number),
                None => faulty(CLASSES[job - KINDS.len()], number),
            };
            *words.lock().unwrap().entry(word).or_insert(0) += 1;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        // The end of the scope waits for the work, not for the threads.
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

/// Runs rounds, and takes a census before and after.
fn hold_to_no_growth(rounds: u64) {
    let words = Mutex::default();
    (0..WARM_UP).for_each(|number| round(number, &words));
    let before = Census::take();
    for number in WARM_UP..WARM_UP + rounds {
        round(number, &words);
        println!("round {number}: {}", Census::take());
    }
    let after = Census::take();
    let words = words.into_inner().unwrap();
    println!("{} runs: {words:?}\nbefore: {before}\nafter:  {after}", words.values().sum::<u64>());
    for outcome in ["completed", "cancelled", "failed", "uncertain"] {
        assert!(words.get(outcome).is_some_and(|count| *count >= rounds), "{outcome} came too rarely: {words:?}");
    }
    after.assert_no_growth(&before);
}

#[test]
fn runs_of_every_outcome_leave_nothing_behind() {
    leaks::in_a_child("growth::runs_of_every_outcome_leave_nothing_behind", || {
        if let Err(why @ DirtyError::Unsupported { .. }) = WriteProtect::new() {
            let test = "runs_of_every_outcome_leave_nothing_behind (the share of write protection)";
            crate::support::skip(test, &why.to_string());
        }
        hold_to_no_growth(setting("PAGEFERRY_LEAK_ROUNDS", 5));
    });
}

#[test]
fn whatever_a_run_leaves_behind_is_found() {
    const TEST: &str = "growth::whatever_a_run_leaves_behind_is_found";
    // What is left behind, and what finds it.
    let leaks: [(&str, &str, fn()); 4] = [
        ("a thread", "threads: ", || drop(thread::spawn(thread::park))),
        ("a descriptor", "descriptors before and after", || {
            std::mem::forget(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        }),
        ("a mapping", "mapped memory grew from ", || std::mem::forget(vmm::ram(PageSize::SIZE_64K, &[1000]))),
        ("memory", "resident memory grew from ", || std::mem::forget(std::hint::black_box(vec![1u8; 20 << 20]))),
    ];
    if leaks::is_child(TEST) {
        let name = std::env::var("PAGEFERRY_LEAK").unwrap();
        let (_, _, leak) = leaks.iter().find(|(what, ..)| *what == name).unwrap();
        let before = Census::take();
        leak();
        return Census::take().assert_no_growth(&before);
    }
    for (what, complaint, _) in leaks {
        let output = leaks::child(TEST, &[("PAGEFERRY_LEAK", what)]);
        let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && said.contains(complaint), "{what} was not found: {said}");
    }
}
