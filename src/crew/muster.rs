//! The muster: creates a crew's threads, has them check in, and hands out the roles, or undoes all of it.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{error, fmt, io, mem};

use super::role::{Alarm, Cx, Interrupt, Launch, Role, StartError, StartHook, Starting};
use super::{Crew, CrewHandle, CrewReport, Exit, Post, Thread, WorkerReport, message_of, quietly};
use crate::bell::{Bell, Close, Park, Ringer, Wake};
use crate::ring::{Consumer, Producer, ring};
use crate::sync::{DynArc, mutated};

/// Why there is no crew. Every thread that was created has been joined, and no role has run.
#[derive(Debug)]
pub struct MusterError<E> {
    /// The kind of role the crew was for.
    pub kind: &'static str,
    /// Threads that were wanted.
    pub wanted: usize,
    /// Threads that had been created.
    pub created: usize,
    /// What went wrong.
    pub cause: MusterCause<E>,
}

/// What went wrong in a muster.
#[derive(Debug)]
pub enum MusterCause<E> {
    /// This worker's thread could not be created.
    Spawn {
        /// The worker.
        id: usize,
        /// The system's reason.
        error: io::Error,
    },
    /// This worker's start hook failed or panicked, or its thread ended before it ran.
    Start {
        /// The worker.
        id: usize,
        /// The reason.
        error: StartError,
    },
    /// The roles could not be made.
    Make(E),
    /// Another number of roles was made than there are workers.
    Count {
        /// The number of roles.
        made: usize,
    },
}

impl<E: fmt::Display> fmt::Display for MusterError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MusterError { kind, wanted, created, cause } = self;
        write!(f, "no crew of {wanted} {kind} workers ({created} threads created, and joined again): ")?;
        match cause {
            MusterCause::Spawn { id, error } => write!(f, "cannot create the thread of worker {id}: {error}"),
            MusterCause::Start { id, error } => write!(f, "worker {id} {error}"),
            MusterCause::Make(error) => write!(f, "cannot make the roles: {error}"),
            MusterCause::Count { made } => write!(f, "{made} roles were made"),
        }
    }
}

impl<E: fmt::Display + fmt::Debug> error::Error for MusterError<E> {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match &self.cause {
            MusterCause::Spawn { error, .. } => Some(error),
            MusterCause::Start { error, .. } => Some(error),
            MusterCause::Make(_) | MusterCause::Count { .. } => None,
        }
    }
}

// How a worker checks in: with its bell and its CPU, or with the reason why it ends.
type CheckIn = Result<(Ringer<Park>, Option<usize>), StartError>;

/// The controller's side while the crew gathers. Dropped early, it aborts and joins everybody it has enlisted.
pub(super) struct Muster<R: Role> {
    bell: Bell<Park>,
    // One for each thread that was created, pushed at once: this is the list of what to undo.
    recruits: Vec<Recruit<R>>,
}

struct Recruit<R: Role> {
    id: usize,
    name: String,
    thread: Thread<R::Output>,
    check_in: Consumer<CheckIn>,
    checked_in: bool,
    // Set once it has checked in, unless it said that it ends.
    ringer: Option<Ringer<Park>>,
    cpu: Option<usize>,
    orders: Producer<R>,
}

impl<R: Role> Muster<R> {
    pub(super) fn new(wanted: usize) -> Self {
        Muster { bell: Bell::here(), recruits: Vec::with_capacity(wanted) }
    }

    pub(super) fn created(&self) -> usize {
        self.recruits.len()
    }

    /// Creates the thread of one worker.
    pub(super) fn enlist(&mut self, id: usize, launch: &Launch<'_>) -> io::Result<()> {
        let name = format!("pf-{}-{id}", R::KIND);
        let (to_muster, check_in) = ring(1);
        let (orders, to_worker) = ring(1);
        let (to_crew, last_words) = ring(1);
        let worker = Worker {
            id,
            name: name.clone(),
            start: launch.start.clone(),
            check_in: to_muster,
            muster: Some(self.bell.ringer()),
            orders: to_worker,
            exit: Exit::NeverRan,
            last_words: to_crew,
            alarm: launch.alarm.clone(),
        };
        let handle = launch.spawn.spawn(&name, Box::new(move || worker.serve()))?;
        let thread = Thread { handle, last_words };
        self.recruits.push(Recruit { id, name, thread, check_in, checked_in: false, ringer: None, cpu: None, orders });
        Ok(())
    }

    /// Waits until everybody has checked in, also if somebody failed: only who has checked in can be told to stop.
    pub(super) fn wait_for_all(&mut self) -> Result<Vec<Ringer<Park>>, (usize, StartError)> {
        let mut failure = None;
        for recruit in self.recruits.iter_mut().filter(|recruit| !recruit.checked_in) {
            let answer = loop {
                match recruit.check_in.pop() {
                    Some(answer) => break answer,
                    // Nobody closes this bell, and each answer rings it: also that of a worker that died.
                    None => {
                        self.bell.wait();
                    }
                }
            };
            recruit.checked_in = true;
            match answer {
                Ok((ringer, cpu)) => (recruit.ringer, recruit.cpu) = (Some(ringer), cpu),
                Err(error) => failure = failure.or(Some((recruit.id, error))),
            }
        }
        failure.map_or_else(|| Ok(self.recruits.iter().filter_map(|recruit| recruit.ringer.clone()).collect()), Err)
    }

    /// Hands out the roles, one for each recruit, and turns the recruits into a crew. It cannot fail.
    pub(super) fn dismiss(
        mut self,
        roles: Vec<R>,
        ringers: Vec<Ringer<Park>>,
        interrupts: Vec<DynArc<dyn Interrupt>>,
    ) -> Crew<R> {
        let wanted = roles.len();
        let (mut workers, mut threads) = (Vec::with_capacity(wanted), Vec::with_capacity(wanted));
        let (mut members, mut desks) = (Vec::with_capacity(wanted), Vec::with_capacity(wanted));
        for ((recruit, ringer), interrupt) in mem::take(&mut self.recruits).into_iter().zip(ringers).zip(interrupts) {
            let Recruit { id, name, thread, cpu, orders, .. } = recruit;
            workers.push(WorkerReport { id, name, cpu, exit: None });
            threads.push(Some(thread));
            members.push(Post { id, ringer, interrupt });
            desks.push(orders);
        }
        let crew = Crew { handle: CrewHandle::new(members), report: CrewReport { kind: R::KIND, workers }, threads };
        for ((mut orders, role), ringer) in desks.into_iter().zip(roles).zip(crew.ringers()) {
            let handed_over = orders.push(role).is_ok();
            debug_assert!(handed_over, "a recruit's ring for orders is empty");
            ringer.ring();
        }
        crew
    }
}

impl<R: Role> Drop for Muster<R> {
    fn drop(&mut self) {
        // The reason is known already, or a panic is on its way.
        drop(self.wait_for_all());
        for ringer in self.recruits.iter().filter_map(|recruit| recruit.ringer.as_ref()) {
            if !mutated("crew/failed-muster-without-abort") {
                ringer.close(Close::Abort);
            }
        }
        for recruit in self.recruits.drain(..) {
            // How it ended does not matter: it had no role.
            quietly(|| drop(recruit.thread.handle.join()));
        }
    }
}

/// The worker's side. Whatever becomes of it, also if its thread never runs, its drop tells muster and controller.
struct Worker<R: Role> {
    id: usize,
    name: String,
    start: DynArc<StartHook>,
    check_in: Producer<CheckIn>,
    // None once it has checked in.
    muster: Option<Ringer<Park>>,
    orders: Consumer<R>,
    exit: Exit<R::Output>,
    last_words: Producer<Exit<R::Output>>,
    alarm: DynArc<dyn Alarm>,
}

impl<R: Role> Worker<R> {
    fn serve(mut self) {
        let starting = Starting { kind: R::KIND, id: self.id, name: &self.name };
        let started = catch_unwind(AssertUnwindSafe(|| (self.start)(&starting)));
        let cpu = match started {
            Ok(Ok(cpu)) => cpu,
            Ok(Err(error)) => return self.check_in(Err(error)),
            Err(panic) => {
                let what = format!("start: its start hook panicked: {}", message_of(&*panic));
                return self.check_in(Err(StartError::new(what, None)));
            }
        };
        let mut cx = Cx { id: self.id, cpu, bell: Bell::here() };
        self.check_in(Ok((cx.bell.ringer(), cpu)));
        let Some(role) = self.wait_for_orders(&mut cx.bell) else { return };
        self.exit = match catch_unwind(AssertUnwindSafe(|| role.run(&mut cx))) {
            Ok(output) => Exit::Done(output),
            Err(panic) => Exit::Panicked { message: message_of(&*panic) },
        };
    }

    fn check_in(&mut self, answer: CheckIn) {
        if let Some(muster) = self.muster.take() {
            let told = self.check_in.push(answer).is_ok();
            debug_assert!(told, "a worker checks in once");
            muster.ring();
        }
    }

    /// `None` if the muster failed. A role that was handed out is never lost, even if the crew is closed at once: it may
    /// hold what others need back.
    fn wait_for_orders(&mut self, bell: &mut Bell<Park>) -> Option<R> {
        loop {
            if let Some(role) = self.orders.pop() {
                return Some(role);
            }
            match bell.wait() {
                Wake::Rung | Wake::Elsewhere => {}
                Wake::Drain | Wake::Abort => return self.orders.pop(),
            }
        }
    }
}

impl<R: Role> Drop for Worker<R> {
    fn drop(&mut self) {
        self.check_in(Err(StartError::new("start: its thread was never run", None)));
        let exit = mem::replace(&mut self.exit, Exit::NeverRan);
        let told = self.last_words.push(exit).is_ok();
        debug_assert!(told, "a worker ends once");
        // After the push: who is woken finds the exit.
        if !mutated("crew/exit-without-alarm") {
            quietly(|| self.alarm.ring());
        }
    }
}
