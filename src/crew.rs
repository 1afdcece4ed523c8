//! The one life cycle of every worker thread: muster, run, drain or abort, join.
//!
//! **Muster** has two phases. First every thread starts, runs the start hook, makes its bell and checks in. Only when all
//! have checked in are the roles made and handed out. So a set-up that fails, at whatever step, has nothing half-begun to
//! undo: it aborts and joins the threads it created, and no role has run.
//!
//! **The end** of a worker is told by a guard, also if it panics: it leaves its exit in a ring, then rings the
//! controller's alarm. So nobody waits for a dead worker. But only a join proves that a thread is gone: every thread that
//! was created is joined, by whoever holds the crew, at the latest when the crew is dropped.
#![forbid(unsafe_code)]

mod muster;
mod role;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{fmt, mem};

use crate::bell::{Close, Park, Ringer};
use crate::ring::Consumer;
use crate::sync::Ordering::Relaxed;
use crate::sync::{Arc, AtomicU32, DynArc, mutated, thread};

use muster::Muster;
pub use muster::{MusterCause, MusterError};
pub use role::{Alarm, Cx, Interrupt, Launch, Role, Spawn, StartError, StartHook, Starting, StdSpawn};

/// How a worker ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Exit<O> {
    /// Its role returned.
    Done(O),
    /// Its role panicked.
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// Its thread ended before it had a role.
    NeverRan,
}

/// One worker of a crew.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkerReport<O> {
    /// Its number.
    pub id: usize,
    /// The name of its thread.
    pub name: String,
    /// The CPU it was pinned to.
    pub cpu: Option<usize>,
    /// How it ended. `None` while it runs, and after [`Crew::take_exit`].
    pub exit: Option<Exit<O>>,
}

/// All workers of a crew.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CrewReport<O> {
    /// The kind of their role.
    pub kind: &'static str,
    /// In the order of their ids.
    pub workers: Vec<WorkerReport<O>>,
}

/// Threads that run one kind of role, from their creation to their end.
///
/// ```
/// use std::convert::Infallible;
/// use std::sync::Arc;
/// use pageferry::bell::{Bell, Close, Wake};
/// use pageferry::crew::{Crew, Cx, Exit, Interrupt, Launch, Role, StdSpawn};
///
/// struct CountRings;
/// impl Role for CountRings {
///     const KIND: &'static str = "count";
///     type Output = u32;
///     fn interrupt(&self) -> Arc<dyn Interrupt> {
///         Arc::new(())
///     }
///     fn run(self, cx: &mut Cx) -> u32 {
///         let mut rings = 0;
///         while cx.bell().wait() == Wake::Rung {
///             rings += 1;
///         }
///         rings
///     }
/// }
///
/// let bell = Bell::here();
/// let launch = Launch::new(&StdSpawn, Arc::new(bell.ringer()));
/// let mut crew = Crew::muster(0..2, &launch, |_| Ok::<_, Infallible>(vec![CountRings, CountRings]))?;
/// assert!(crew.close(Close::Drain));
/// let report = crew.join();
/// assert_eq!(report.workers[1].name, "pf-count-1");
/// assert!(matches!(report.workers[1].exit, Some(Exit::Done(_))));
/// # Ok::<(), pageferry::crew::MusterError<Infallible>>(())
/// ```
pub struct Crew<R: Role> {
    handle: CrewHandle,
    report: CrewReport<R::Output>,
    // One for each worker of the report; None once its thread has been joined.
    threads: Vec<Option<Thread<R::Output>>>,
}

struct Thread<O> {
    handle: thread::JoinHandle<()>,
    last_words: Consumer<Exit<O>>,
}

impl<R: Role> Crew<R> {
    /// Starts a thread for each id, has them all check in, makes their roles, and hands these out.
    ///
    /// `make` gets the ringers of all workers, in the order of the ids, as workers may ring each other; it returns one
    /// role for each, in the same order.
    ///
    /// # Errors
    /// [`MusterError`]: a thread could not be created, a start hook or `make` failed. Nothing is left running.
    ///
    /// # Panics
    /// If `make` panics, after all threads have been joined.
    pub fn muster<E>(
        ids: impl IntoIterator<Item = usize, IntoIter: ExactSizeIterator>,
        launch: &Launch<'_>,
        make: impl FnOnce(&[Ringer<Park>]) -> Result<Vec<R>, E>,
    ) -> Result<Self, MusterError<E>> {
        let ids = ids.into_iter();
        let wanted = ids.len();
        let mut muster = Muster::new(wanted);
        let failed = |created, cause| MusterError { kind: R::KIND, wanted, created, cause };
        for id in ids {
            if let Err(error) = muster.enlist(id, launch) {
                return Err(failed(muster.created(), MusterCause::Spawn { id, error }));
            }
        }
        let ringers = muster.wait_for_all().map_err(|(id, error)| failed(wanted, MusterCause::Start { id, error }))?;
        let roles = make(&ringers).map_err(|error| failed(wanted, MusterCause::Make(error)))?;
        if roles.len() != wanted {
            return Err(failed(wanted, MusterCause::Count { made: roles.len() }));
        }
        let interrupts: Vec<_> = roles.iter().map(Role::interrupt).collect();
        // From here on nothing can fail.
        Ok(muster.dismiss(roles, ringers, interrupts))
    }

    /// Tells every worker to stop; an abort also interrupts them. True for the first close of this kind.
    pub fn close(&self, how: Close) -> bool {
        self.handle.close(how)
    }

    /// A handle that closes the crew from any thread.
    pub fn handle(&self) -> CrewHandle {
        self.handle.clone()
    }

    /// The workers' bells, in the order of their ids.
    pub fn ringers(&self) -> impl Iterator<Item = &Ringer<Park>> {
        self.handle.posts.members.iter().map(|post| &post.ringer)
    }

    /// The workers so far: who they are, where they run, and how those ended that have ended.
    pub fn workers(&self) -> &[WorkerReport<R::Output>] {
        &self.report.workers
    }

    /// The id of a worker that has ended since this was last asked, if there is one. Never blocks.
    ///
    /// Ask after each alarm until it says `None`. A worker that was joined before is not told of.
    pub fn poll_exit(&mut self) -> Option<usize> {
        for (worker, thread) in self.report.workers.iter_mut().zip(&mut self.threads) {
            if let Some(exit) = thread.as_mut().and_then(|thread| thread.last_words.pop()) {
                worker.exit = Some(exit);
                return Some(worker.id);
            }
        }
        None
    }

    /// Waits for the end of one worker, joins its thread, and hands out how it ended; `None` if there is no such worker
    /// or its exit was taken before. Close the worker first, or learn of its end from [`Crew::poll_exit`].
    pub fn take_exit(&mut self, id: usize) -> Option<Exit<R::Output>> {
        let index = self.report.workers.iter().position(|worker| worker.id == id)?;
        self.join_one(index);
        self.report.workers[index].exit.take()
    }

    /// Waits for the end of every worker and joins their threads. Close the crew first. A second call does nothing and
    /// returns the same report.
    pub fn join(&mut self) -> &CrewReport<R::Output> {
        (0..self.threads.len()).for_each(|index| self.join_one(index));
        &self.report
    }

    /// As [`Crew::join`], and gives the report away.
    pub fn into_report(mut self) -> CrewReport<R::Output> {
        self.join();
        mem::replace(&mut self.report, CrewReport { kind: R::KIND, workers: Vec::new() })
    }

    fn join_one(&mut self, index: usize) {
        let Some(mut thread) = self.threads[index].take() else { return };
        let joined = thread.handle.join();
        let worker = &mut self.report.workers[index];
        if worker.exit.is_none() {
            let silent =
                || joined.map_or_else(|panic| Exit::Panicked { message: message_of(&*panic) }, |()| Exit::NeverRan);
            worker.exit = Some(thread.last_words.pop().unwrap_or_else(silent));
        }
    }
}

impl<R: Role> Drop for Crew<R> {
    fn drop(&mut self) {
        if self.threads.iter().any(Option::is_some) {
            quietly(|| {
                self.close(Close::Abort);
            });
            quietly(|| {
                self.join();
            });
        }
    }
}

impl<R: Role> fmt::Debug for Crew<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.report.workers.iter().map(|worker| &worker.name);
        f.debug_list().entries(names).finish()
    }
}

/// Closes a crew from any thread, while it runs and after.
#[derive(Clone)]
pub struct CrewHandle {
    posts: Arc<Posts>,
}

struct Posts {
    // The kinds of close that have been asked for. It publishes nothing: it only says who was first.
    closed: AtomicU32,
    members: Vec<Post>,
}

struct Post {
    id: usize,
    ringer: Ringer<Park>,
    interrupt: DynArc<dyn Interrupt>,
}

impl CrewHandle {
    fn new(members: Vec<Post>) -> Self {
        CrewHandle { posts: Arc::new(Posts { closed: AtomicU32::new(0), members }) }
    }

    /// Tells every worker to stop; an abort also interrupts them. True for the first close of this kind.
    ///
    /// Any number of times. Every abort interrupts anew: sockets may have been opened since.
    pub fn close(&self, how: Close) -> bool {
        let bit = match how {
            Close::Drain => 1,
            Close::Abort => 2,
        };
        let first = self.posts.closed.fetch_or(bit, Relaxed) & bit == 0;
        // All bells first: a worker that an interrupt, or another worker's end, gets out of a call finds the abort.
        for post in &self.posts.members {
            post.ringer.close(how);
        }
        self.posts.members.iter().for_each(|post| post.interrupt_if(how));
        first
    }

    /// The same for one worker; false if there is no such worker.
    pub fn close_worker(&self, id: usize, how: Close) -> bool {
        let Some(post) = self.posts.members.iter().find(|post| post.id == id) else { return false };
        let first = post.ringer.close(how);
        post.interrupt_if(how);
        first
    }
}

impl Post {
    fn interrupt_if(&self, how: Close) {
        if how == Close::Abort && !mutated("crew/abort-without-interrupt") {
            // One that panics must not keep the others from being interrupted.
            quietly(|| self.interrupt.interrupt());
        }
    }
}

impl fmt::Debug for CrewHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrewHandle").field("workers", &self.posts.members.len()).finish_non_exhaustive()
    }
}

/// Runs code of the user's where a panic would do harm: in a drop, or before others have been told.
fn quietly(f: impl FnOnce()) {
    drop(catch_unwind(AssertUnwindSafe(f)));
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}
