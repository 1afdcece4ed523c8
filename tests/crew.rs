//! The crew with real threads: set-up that fails at every step, abort at every moment, ends of every kind.
#![cfg(not(loom))]

use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use pageferry::bell::{Bell, Close, Park, Ringer, Wake};
use pageferry::crew::{
    Alarm, Crew, Cx, Exit, Interrupt, Launch, MusterCause, MusterError, Role, Spawn, StartError, StdSpawn,
};
use pageferry::ring::{Consumer, Producer, ring};

type Mustered<R> = Result<Crew<R>, MusterError<&'static str>>;

/// Counts the workers that have ended, the roles that have run, and the threads that were asked for.
#[derive(Default)]
struct Ledger {
    alarms: AtomicUsize,
    ran: AtomicUsize,
    threads_created: AtomicUsize,
}

impl Alarm for Ledger {
    fn ring(&self) {
        self.alarms.fetch_add(1, Relaxed);
    }
}

/// Waits in its bell and counts rings.
struct Counts(Arc<Ledger>);

impl Role for Counts {
    const KIND: &'static str = "count";
    type Output = (usize, Option<String>);

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(())
    }

    fn run(self, cx: &mut Cx) -> Self::Output {
        self.0.ran.fetch_add(1, Relaxed);
        while cx.bell().wait() == Wake::Rung {}
        (cx.id(), thread::current().name().map(str::to_owned))
    }
}

/// Fails at the k-th thread, and holds on to a token in each body, so that a test sees that all bodies are gone.
struct FailAt {
    k: usize,
    how: Failure,
    ledger: Arc<Ledger>,
    bodies: Arc<()>,
}

#[derive(Clone, Copy, PartialEq)]
enum Failure {
    Error,
    Panic,
    /// Creates a thread that never runs the body.
    BodyDropped,
}

impl FailAt {
    fn new(k: usize, how: Failure, ledger: &Arc<Ledger>) -> Self {
        FailAt { k, how, ledger: ledger.clone(), bodies: Arc::new(()) }
    }
}

impl Spawn for FailAt {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<thread::JoinHandle<()>> {
        let held = self.bodies.clone();
        if self.ledger.threads_created.fetch_add(1, Relaxed) == self.k {
            match self.how {
                Failure::Error => return Err(ErrorKind::WouldBlock.into()),
                Failure::Panic => panic!("on purpose"),
                Failure::BodyDropped => return StdSpawn.spawn(name, Box::new(move || drop((body, held)))),
            }
        }
        let body = move || {
            body();
            drop(held);
        };
        StdSpawn.spawn(name, Box::new(body))
    }
}

fn roles(count: usize, ledger: &Arc<Ledger>) -> Vec<Counts> {
    (0..count).map(|_| Counts(ledger.clone())).collect()
}

fn muster(count: usize, ledger: &Arc<Ledger>) -> Crew<Counts> {
    let launch = Launch::new(&StdSpawn, ledger.clone());
    let crew: Mustered<_> = Crew::muster(0..count, &launch, |_| Ok(roles(count, ledger)));
    crew.unwrap()
}

#[test]
fn a_spawn_that_fails_at_any_step_joins_what_it_started_and_no_role_runs() {
    for k in 0..4 {
        let ledger = Arc::new(Ledger::default());
        let spawn = FailAt::new(k, Failure::Error, &ledger);
        let launch = Launch::new(&spawn, ledger.clone());
        let crew: Mustered<Counts> = Crew::muster(0..4, &launch, |_| unreachable!("not everybody is there"));
        let error = crew.unwrap_err();
        assert_eq!((error.kind, error.wanted, error.created), ("count", 4, k));
        assert!(
            matches!(&error.cause, MusterCause::Spawn { id, error } if *id == k && error.kind() == ErrorKind::WouldBlock)
        );
        assert!(error.to_string().contains(&format!("worker {k}")), "{error}");
        assert_eq!(ledger.ran.load(Relaxed), 0);
        assert_eq!(Arc::strong_count(&spawn.bodies), 1, "every thread has been joined");
    }
}

#[test]
fn a_spawn_that_panics_at_any_step_joins_what_it_started() {
    for k in 0..3 {
        let ledger = Arc::new(Ledger::default());
        let spawn = FailAt::new(k, Failure::Panic, &ledger);
        let launch = Launch::new(&spawn, ledger.clone());
        let muster = || -> Mustered<Counts> { Crew::muster(0..3, &launch, |_| unreachable!("not everybody is there")) };
        assert!(catch_unwind(AssertUnwindSafe(muster)).is_err());
        assert_eq!(Arc::strong_count(&spawn.bodies), 1, "every thread has been joined");
    }
}

#[test]
fn a_thread_that_never_runs_its_body_fails_the_muster_and_does_not_hang_it() {
    for k in 0..3 {
        let ledger = Arc::new(Ledger::default());
        let spawn = FailAt::new(k, Failure::BodyDropped, &ledger);
        let launch = Launch::new(&spawn, ledger.clone());
        let crew: Mustered<Counts> = Crew::muster(0..3, &launch, |_| unreachable!("not everybody is there"));
        let error = crew.unwrap_err();
        assert!(matches!(error.cause, MusterCause::Start { id, .. } if id == k));
        assert_eq!(error.created, 3);
        assert_eq!(Arc::strong_count(&spawn.bodies), 1, "every thread has been joined");
    }
}

#[test]
fn a_start_hook_that_fails_or_panics_at_any_step_leaves_nobody_running() {
    for (k, panics) in [(0, false), (1, false), (2, false), (0, true), (1, true), (2, true)] {
        let ledger = Arc::new(Ledger::default());
        let spawn = FailAt::new(usize::MAX, Failure::Error, &ledger);
        let mut launch = Launch::new(&spawn, ledger.clone());
        launch.start = Arc::new(move |starting| match starting.id {
            id if id != k => Ok(None),
            _ if panics => panic!("on purpose"),
            _ => Err(StartError::new("block signals", io::Error::from(ErrorKind::PermissionDenied))),
        });
        let crew: Mustered<Counts> = Crew::muster(0..3, &launch, |_| unreachable!("not everybody is there"));
        let error = crew.unwrap_err();
        assert!(matches!(error.cause, MusterCause::Start { id, .. } if id == k));
        let text = error.to_string();
        assert!(
            text.contains(if panics { "on purpose" } else { "could not block signals: permission denied" }),
            "{text}"
        );
        assert_eq!(ledger.ran.load(Relaxed), 0);
        assert_eq!(Arc::strong_count(&spawn.bodies), 1, "every thread has been joined");
    }
}

#[test]
fn roles_that_cannot_be_made_leave_nobody_running() {
    let ledger = Arc::new(Ledger::default());
    let spawn = FailAt::new(usize::MAX, Failure::Error, &ledger);
    let launch = Launch::new(&spawn, ledger.clone());
    let crew: Mustered<Counts> = Crew::muster(0..3, &launch, |_| Err("no socket"));
    assert!(matches!(crew.unwrap_err().cause, MusterCause::Make("no socket")));
    let crew: Mustered<Counts> = Crew::muster(0..3, &launch, |_| Ok(roles(2, &ledger)));
    assert!(matches!(crew.unwrap_err().cause, MusterCause::Count { made: 2 }));
    let panics = || -> Mustered<Counts> { Crew::muster(0..3, &launch, |_| panic!("on purpose")) };
    assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
    assert_eq!(ledger.ran.load(Relaxed), 0);
    assert_eq!(Arc::strong_count(&spawn.bodies), 1, "every thread has been joined");
}

#[test]
fn threads_carry_kind_and_id_and_the_start_hook_reports_the_cpu() {
    let ledger = Arc::new(Ledger::default());
    let mut launch = Launch::new(&StdSpawn, ledger.clone());
    launch.start = Arc::new(|starting| {
        assert_eq!(thread::current().name(), Some(starting.name));
        assert_eq!(starting.kind, "count");
        Ok(Some(starting.id * 10))
    });
    let crew: Mustered<_> = Crew::muster(3..5, &launch, |ringers| Ok(roles(ringers.len(), &ledger)));
    let crew = crew.unwrap();
    let cpus: Vec<_> = crew.workers().iter().map(|worker| (worker.id, worker.cpu, worker.exit.is_none())).collect();
    assert_eq!(cpus, [(3, Some(30), true), (4, Some(40), true)]);
    crew.close(Close::Drain);
    let report = crew.into_report();
    assert_eq!(report.kind, "count");
    for worker in &report.workers {
        assert_eq!(worker.exit, Some(Exit::Done((worker.id, Some(format!("pf-count-{}", worker.id))))));
    }
}

#[test]
fn close_and_join_twice_are_harmless() {
    let ledger = Arc::new(Ledger::default());
    let mut crew = muster(3, &ledger);
    let handle = crew.handle();
    assert!(crew.close(Close::Drain));
    assert!(!handle.close(Close::Drain));
    let first = crew.join().clone();
    assert_eq!(crew.join(), &first);
    assert_eq!(crew.poll_exit(), None, "who was joined is not told of");
    assert!(handle.close(Close::Abort), "the first abort");
    drop(crew);
    assert!(!handle.clone().close(Close::Abort), "a handle outlives its crew");
    assert_eq!((ledger.alarms.load(Relaxed), ledger.ran.load(Relaxed)), (3, 3));
}

#[test]
fn exactly_one_of_many_closers_is_the_first() {
    let ledger = Arc::new(Ledger::default());
    let mut crew = muster(2, &ledger);
    let closers: Vec<_> = (0..4).map(|_| crew.handle()).map(|h| thread::spawn(move || h.close(Close::Abort))).collect();
    let first: usize = closers.into_iter().map(|closer| usize::from(closer.join().unwrap())).sum();
    assert_eq!(first, 1);
    crew.join();
}

#[test]
fn a_crew_of_nobody_is_a_crew() {
    let ledger = Arc::new(Ledger::default());
    let mut crew = muster(0, &ledger);
    assert!(crew.close(Close::Abort));
    assert_eq!((crew.poll_exit(), crew.take_exit(0), crew.join().workers.len()), (None, None, 0));
}

#[test]
fn drop_aborts_and_joins_also_while_panicking() {
    let ledger = Arc::new(Ledger::default());
    let doomed = || {
        let _crew = muster(2, &ledger);
        panic!("on purpose");
    };
    assert!(catch_unwind(AssertUnwindSafe(doomed)).is_err());
    assert_eq!(Arc::strong_count(&ledger), 1, "all roles and alarms are gone with their threads");
}

/// Reads from a socket whose peer is silent.
struct Reads(Arc<UnixStream>);

struct ShutDown(Arc<UnixStream>);

impl Interrupt for ShutDown {
    fn interrupt(&self) {
        // The second time, or after the peer has gone, it fails: that is no news.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Role for Reads {
    const KIND: &'static str = "read";
    type Output = (io::Result<usize>, bool);

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(ShutDown(self.0.clone()))
    }

    fn run(self, cx: &mut Cx) -> Self::Output {
        let read = (&*self.0).read(&mut [0; 16]);
        (read, cx.aborted())
    }
}

fn readers(count: usize, alarm: Arc<dyn Alarm>) -> (Crew<Reads>, Vec<UnixStream>) {
    let (ours, peers): (Vec<_>, Vec<_>) = (0..count).map(|_| UnixStream::pair().unwrap()).unzip();
    let launch = Launch::new(&StdSpawn, alarm);
    let make = |_: &[Ringer<Park>]| Ok(ours.into_iter().map(|socket| Reads(Arc::new(socket))).collect());
    let crew: Mustered<_> = Crew::muster(0..count, &launch, make);
    (crew.unwrap(), peers)
}

#[test]
fn abort_gets_workers_out_of_a_read_from_a_silent_peer_and_they_know_why() {
    let (mut crew, peers) = readers(3, Arc::new(Ledger::default()));
    assert!(crew.handle().close(Close::Abort));
    for worker in &crew.join().workers {
        assert!(matches!(worker.exit, Some(Exit::Done((Ok(0), true)))), "{worker:?}");
    }
    drop(peers);
}

#[test]
fn one_worker_can_be_aborted_and_joined_while_the_others_go_on() {
    let mut bell = Bell::here();
    let (mut crew, mut peers) = readers(3, Arc::new(bell.ringer()));
    assert!(crew.handle().close_worker(1, Close::Abort));
    assert!(!crew.handle().close_worker(1, Close::Abort), "the second time");
    assert!(!crew.handle().close_worker(7, Close::Abort), "nobody");
    assert!(matches!(crew.take_exit(1), Some(Exit::Done((Ok(0), true)))));
    assert_eq!(crew.take_exit(1).map(|_| ()), None, "an exit is taken once");
    assert!(crew.workers()[0].exit.is_none() && crew.workers()[2].exit.is_none());

    // A peer that closes ends its worker: the alarm tells, and the crew says who.
    drop(peers.pop());
    let ended = loop {
        match crew.poll_exit() {
            Some(id) => break id,
            None => assert_eq!(bell.wait(), Wake::Rung),
        }
    };
    assert_eq!(ended, 2);
    assert!(matches!(crew.take_exit(2), Some(Exit::Done((Ok(0), false)))));
    assert!(crew.close(Close::Abort), "to close one worker is not to close the crew");
    assert!(matches!(crew.join().workers[0].exit, Some(Exit::Done((Ok(0), true)))));
}

/// Ends as it is told to.
enum Ends {
    Panics,
    Returns,
}

impl Role for Ends {
    const KIND: &'static str = "end";
    type Output = Result<(), &'static str>;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        struct Panics;
        impl Interrupt for Panics {
            fn interrupt(&self) {
                panic!("on purpose");
            }
        }
        Arc::new(Panics)
    }

    fn run(self, cx: &mut Cx) -> Self::Output {
        match self {
            Ends::Panics => panic!("worker {} on purpose", cx.id()),
            Ends::Returns => Err("it has failed"),
        }
    }
}

#[test]
fn a_panic_is_an_exit_and_rings_the_alarm_and_an_interrupt_that_panics_harms_nobody() {
    let mut bell = Bell::here();
    let launch = Launch::new(&StdSpawn, Arc::new(bell.ringer()));
    let crew: Mustered<_> = Crew::muster(0..2, &launch, |_| Ok(vec![Ends::Panics, Ends::Returns]));
    let mut crew = crew.unwrap();
    assert!(crew.close(Close::Abort));
    let mut told = Vec::new();
    while told.len() < 2 {
        match crew.poll_exit() {
            Some(id) => told.push(id),
            None => assert_eq!(bell.wait(), Wake::Rung),
        }
    }
    told.sort_unstable();
    assert_eq!((told.as_slice(), crew.poll_exit()), (&[0, 1][..], None));
    let report = crew.join();
    assert_eq!(report.workers[0].exit, Some(Exit::Panicked { message: "worker 0 on purpose".to_owned() }));
    assert_eq!(report.workers[1].exit, Some(Exit::Done(Err("it has failed"))));
}

/// Passes a number around a circle of workers: each takes from its ring, adds one, and rings the next.
struct Passes {
    from: Consumer<u64>,
    to: Producer<u64>,
    next: Ringer<Park>,
    until: u64,
}

impl Role for Passes {
    const KIND: &'static str = "pass";
    type Output = u64;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(())
    }

    fn run(mut self, cx: &mut Cx) -> u64 {
        let mut last = 0;
        loop {
            while let Some(number) = self.from.pop() {
                last = number;
                if number < self.until {
                    assert!(self.to.push(number + 1).is_ok(), "one number, so there is room");
                    self.next.ring();
                } else {
                    return last;
                }
            }
            match cx.bell().wait() {
                Wake::Rung | Wake::Elsewhere => {}
                Wake::Drain | Wake::Abort => return last,
            }
        }
    }
}

#[test]
fn workers_ring_each_other_and_no_ring_is_lost() {
    let (workers, until) = if cfg!(miri) { (2, 20) } else { (3, 30_000) };
    let mut bell = Bell::here();
    let launch = Launch::new(&StdSpawn, Arc::new(bell.ringer()));
    let crew: Mustered<_> = Crew::muster(0..workers, &launch, |ringers| {
        let (mut to, mut from): (Vec<_>, Vec<_>) = (0..workers).map(|_| ring(1)).unzip();
        to[0].push(1).unwrap();
        to.rotate_left(1);
        let links = from.drain(..).zip(to.drain(..)).enumerate();
        Ok(links
            .map(|(id, (from, to))| Passes { from, to, next: ringers[(id + 1) % workers].clone(), until })
            .collect())
    });
    let mut crew = crew.unwrap();
    let winner = loop {
        match crew.poll_exit() {
            Some(id) => break id,
            None => assert_eq!(bell.wait(), Wake::Rung),
        }
    };
    assert_eq!(crew.take_exit(winner), Some(Exit::Done(until)));
    crew.close(Close::Drain);
    let report = crew.into_report();
    let last: Vec<_> = report.workers.iter().filter_map(|worker| worker.exit.clone()).collect();
    assert_eq!(last.len(), workers - 1);
    assert!(last.iter().all(|exit| matches!(exit, Exit::Done(last) if *last < until)));
}
