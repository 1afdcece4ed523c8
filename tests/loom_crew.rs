//! Models of the crew: muster, abort, death of a worker, and joins. Two workers at most, and the controller.
//!
//! All are bounded: they are meant for LOOM_MAX_PREEMPTIONS of three or less.
#![cfg(loom)]

use std::io;

use loom::sync::Notify;
use loom::thread;
use pageferry::bell::{Bell, Close, Wake};
use pageferry::crew::{Crew, Cx, Exit, Interrupt, Launch, MusterCause, MusterError, Role, Spawn, StartError, StdSpawn};
use pageferry::ring::{Consumer, ring};
use pageferry::sync::Ordering::Relaxed;
use pageferry::sync::{Arc, AtomicU32, DynArc};

/// Drains a ring, as a send lane does, and gives its consumer half back.
struct Lane(Consumer<u32>);

impl Role for Lane {
    const KIND: &'static str = "lane";
    type Output = (Vec<u32>, Consumer<u32>);

    fn interrupt(&self) -> DynArc<dyn Interrupt> {
        DynArc::new(())
    }

    fn run(mut self, cx: &mut Cx) -> Self::Output {
        let mut popped = Vec::with_capacity(2);
        loop {
            while let Some(item) = self.0.pop() {
                popped.push(item);
            }
            match cx.bell().wait() {
                Wake::Rung | Wake::Elsewhere => {}
                Wake::Drain => {
                    self.0.pop_batch(2, |item| popped.push(item));
                    return (popped, self.0);
                }
                Wake::Abort => return (popped, self.0),
            }
        }
    }
}

/// Blocks as if in `readv`, until its socket is shut down.
struct Blocked(Arc<Socket>);

struct Socket(Notify);

struct Shutdown(Arc<Socket>);

impl Interrupt for Shutdown {
    fn interrupt(&self) {
        self.0.0.notify();
    }
}

impl Role for Blocked {
    const KIND: &'static str = "blocked";
    type Output = bool;

    fn interrupt(&self) -> DynArc<dyn Interrupt> {
        DynArc::new(Shutdown(self.0.clone()))
    }

    fn run(self, cx: &mut Cx) -> bool {
        // Loom tries one return without cause; a socket has none.
        while !cx.aborted() {
            self.0.0.wait();
        }
        cx.bell().wait() == Wake::Abort
    }
}

/// Counts that it ran, then panics.
struct Dies(Arc<AtomicU32>);

impl Role for Dies {
    const KIND: &'static str = "dies";
    type Output = ();

    fn interrupt(&self) -> DynArc<dyn Interrupt> {
        DynArc::new(())
    }

    fn run(self, _: &mut Cx) {
        self.0.fetch_add(1, Relaxed);
        // As a panic, without the message on the terminal for every execution of the model.
        std::panic::resume_unwind(Box::new("on purpose"));
    }
}

type Mustered<R> = Result<Crew<R>, MusterError<&'static str>>;

fn blocked(alarm: &Bell<pageferry::bell::Park>) -> Crew<Blocked> {
    let launch = Launch::new(&StdSpawn, DynArc::new(alarm.ringer()));
    let crew: Mustered<_> = Crew::muster(0..1, &launch, |_| Ok(vec![Blocked(Arc::new(Socket(Notify::new())))]));
    crew.unwrap()
}

#[test]
fn a_drained_worker_has_shipped_what_was_pushed_and_gives_its_ring_back() {
    loom::model(|| {
        let alarm = Bell::here();
        let (mut producer, consumer) = ring(2);
        let launch = Launch::new(&StdSpawn, DynArc::new(alarm.ringer()));
        let crew: Mustered<_> = Crew::muster(0..1, &launch, |_| Ok(vec![Lane(consumer)]));
        let mut crew = crew.unwrap();
        producer.push(1).unwrap();
        for ringer in crew.ringers() {
            ringer.ring();
        }
        producer.push(2).unwrap();
        assert!(crew.close(Close::Drain));
        assert!(!crew.close(Close::Drain), "close twice is harmless");
        let Some(Exit::Done((popped, mut left))) = crew.take_exit(0) else { panic!("the lane was drained") };
        assert_eq!((popped, left.pop()), (vec![1, 2], None));
    });
}

#[test]
fn an_aborted_worker_gives_its_ring_back_with_what_is_left_even_if_it_had_not_begun() {
    loom::model(|| {
        let alarm = Bell::here();
        let (mut producer, consumer) = ring(2);
        producer.push(1).unwrap();
        let launch = Launch::new(&StdSpawn, DynArc::new(alarm.ringer()));
        let crew: Mustered<_> = Crew::muster(0..1, &launch, |_| Ok(vec![Lane(consumer)]));
        let mut crew = crew.unwrap();
        producer.push(2).unwrap();
        crew.close(Close::Abort);
        let Some(Exit::Done((mut items, mut left))) = crew.take_exit(0) else { panic!("a role is never lost") };
        items.extend(left.pop());
        items.extend(left.pop());
        assert_eq!(items, [1, 2]);
    });
}

#[test]
fn an_abort_from_any_thread_gets_a_worker_out_of_its_blocking_call() {
    loom::model(|| {
        let alarm = Bell::here();
        let mut crew = blocked(&alarm);
        let handle = crew.handle();
        let aborter = thread::spawn(move || handle.close(Close::Abort));
        let first = crew.close(Close::Abort);
        assert_ne!(first, aborter.join().unwrap(), "exactly one of two closes is the first");
        assert_eq!(crew.join().workers[0].exit, Some(Exit::Done(true)));
    });
}

#[test]
fn a_crew_that_is_dropped_is_aborted_and_joined() {
    loom::model(|| {
        let alarm = Bell::here();
        drop(blocked(&alarm));
    });
}

#[test]
fn who_waits_for_a_worker_is_woken_by_its_death() {
    loom::model(|| {
        let mut alarm = Bell::here();
        let ran = Arc::new(AtomicU32::new(0));
        let launch = Launch::new(&StdSpawn, DynArc::new(alarm.ringer()));
        let crew: Mustered<_> = Crew::muster(0..1, &launch, |_| Ok(vec![Dies(ran.clone())]));
        let mut crew = crew.unwrap();
        let dead = loop {
            match crew.poll_exit() {
                Some(id) => break id,
                None => assert_eq!(alarm.wait(), Wake::Rung),
            }
        };
        assert_eq!((dead, crew.poll_exit()), (0, None));
        assert_eq!(crew.join().workers[0].exit, Some(Exit::Panicked { message: "on purpose".to_owned() }));
        assert_eq!(ran.load(Relaxed), 1);
    });
}

/// Creates one thread, and no more.
struct OnlyOne;

impl Spawn for OnlyOne {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<thread::JoinHandle<()>> {
        if name.ends_with('0') { StdSpawn.spawn(name, body) } else { Err(io::ErrorKind::OutOfMemory.into()) }
    }
}

#[test]
fn a_spawn_that_fails_leaves_nobody_running() {
    loom::model(|| {
        let alarm = Bell::here();
        let launch = Launch::new(&OnlyOne, DynArc::new(alarm.ringer()));
        let crew: Mustered<Dies> = Crew::muster(0..2, &launch, |_| panic!("not everybody is there"));
        let error = crew.unwrap_err();
        assert_eq!((error.wanted, error.created), (2, 1));
        assert!(matches!(error.cause, MusterCause::Spawn { id: 1, .. }));
    });
}

#[test]
fn a_start_hook_that_fails_leaves_nobody_running() {
    loom::model(|| {
        let alarm = Bell::here();
        let mut launch = Launch::new(&StdSpawn, DynArc::new(alarm.ringer()));
        launch.start = DynArc::new(|starting| match starting.id {
            1 => Err(StartError::new("pin to CPU 9", None)),
            _ => Ok(None),
        });
        let crew: Mustered<Dies> = Crew::muster(0..2, &launch, |_| panic!("not everybody is there"));
        let error = crew.unwrap_err();
        assert_eq!((error.wanted, error.created), (2, 2));
        assert!(matches!(error.cause, MusterCause::Start { id: 1, .. }));
    });
}

#[test]
fn roles_that_cannot_be_made_leave_nobody_running_and_no_role_runs() {
    loom::model(|| {
        let alarm = Bell::here();
        let ran = Arc::new(AtomicU32::new(0));
        let launch = Launch::new(&StdSpawn, DynArc::new(alarm.ringer()));
        let crew: Mustered<Dies> = Crew::muster(0..1, &launch, |_| Err("no socket"));
        assert!(matches!(crew.unwrap_err().cause, MusterCause::Make("no socket")));
        let crew: Mustered<_> = Crew::muster(0..1, &launch, |_| Ok(vec![Dies(ran.clone()), Dies(ran.clone())]));
        assert!(matches!(crew.unwrap_err().cause, MusterCause::Count { made: 2 }));
        assert_eq!(ran.load(Relaxed), 0);
    });
}
