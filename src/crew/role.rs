//! What a crew is given: the role, how to interrupt it, how to make its threads, and whom to tell of their end.
#![forbid(unsafe_code)]

use std::{error, fmt, io};

use crate::bell::{Bell, Park, Ringer, Sleeper};
use crate::sync::{DynArc, thread};

/// What one kind of worker does. Send and receive lanes differ in nothing else.
pub trait Role: Send + 'static {
    /// Short: the worker's thread is called `pf-KIND-ID`.
    const KIND: &'static str;

    /// What a worker leaves behind. It may be a `Result`, and should give back what others still need.
    type Output: Send + 'static;

    /// What gets this worker out of a blocking call on abort. Asked for once, before the role runs.
    fn interrupt(&self) -> DynArc<dyn Interrupt>;

    /// Does the work until the bell says drain or abort, or until it fails. It runs even if the crew has been closed
    /// before it came to that: then its first wait says so.
    fn run(self, cx: &mut Cx) -> Self::Output;
}

/// Gets a worker out of a blocking system call: a socket's `shutdown`. `()` is for roles that block in their bell only.
///
/// It is called on abort only, by any thread, any number of times, also after the worker has ended. So it must hold
/// what it shuts down alive (a recycled file descriptor is somebody else's), and a role that opens a new socket looks
/// for an abort once more after it has shown the socket to its interrupt.
pub trait Interrupt: Send + Sync {
    /// Makes the current blocking call, and all later ones, return.
    fn interrupt(&self);
}

impl Interrupt for () {
    fn interrupt(&self) {}
}

/// Tells the controller that a worker has ended. Every [`Ringer`] is one.
pub trait Alarm: Send + Sync {
    /// Must not block.
    fn ring(&self);
}

impl<S: Sleeper> Alarm for Ringer<S> {
    fn ring(&self) {
        Ringer::ring(self);
    }
}

/// Creates threads. A VMM may bring its own.
pub trait Spawn: Send + Sync {
    /// Runs `body` on a new thread, or drops it.
    ///
    /// # Errors
    /// Whatever kept the thread from being created.
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<thread::JoinHandle<()>>;
}

/// Creates threads by `std::thread::Builder`.
#[derive(Clone, Copy, Debug, Default)]
pub struct StdSpawn;

impl Spawn for StdSpawn {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<thread::JoinHandle<()>> {
        thread::Builder::new().name(name.to_owned()).spawn(body)
    }
}

/// The thread that a start hook runs on.
#[derive(Clone, Copy, Debug)]
pub struct Starting<'a> {
    /// The kind of its role.
    pub kind: &'static str,
    /// Its number among its kind.
    pub id: usize,
    /// Its name.
    pub name: &'a str,
}

/// Runs first on every new thread: signal masks, seccomp filters, pinning. It returns the CPU the thread was pinned to.
pub type StartHook = dyn Fn(&Starting<'_>) -> Result<Option<usize>, StartError> + Send + Sync;

/// Why a start hook has refused to go on.
#[derive(Debug)]
pub struct StartError {
    /// What it could not do, as in "pin to CPU 5".
    pub what: String,
    /// The system's reason, if it gave one.
    pub source: Option<io::Error>,
}

impl StartError {
    /// A refusal, with the system's reason.
    pub fn new(what: impl Into<String>, source: impl Into<Option<io::Error>>) -> Self {
        StartError { what: what.into(), source: source.into() }
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not {}", self.what)?;
        self.source.as_ref().map_or(Ok(()), |source| write!(f, ": {source}"))
    }
}

impl error::Error for StartError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

/// How a crew's threads are made, and whom they tell of their end.
pub struct Launch<'a> {
    /// Creates the threads.
    pub spawn: &'a dyn Spawn,
    /// Runs first on each.
    pub start: DynArc<StartHook>,
    /// Rung after each worker's end.
    pub alarm: DynArc<dyn Alarm>,
}

impl<'a> Launch<'a> {
    /// With a start hook that does nothing.
    pub fn new(spawn: &'a dyn Spawn, alarm: DynArc<dyn Alarm>) -> Self {
        Launch { spawn, start: DynArc::new(|_: &Starting<'_>| Ok(None)), alarm }
    }
}

/// What a worker has of its own while its role runs.
#[derive(Debug)]
pub struct Cx {
    pub(super) id: usize,
    pub(super) cpu: Option<usize>,
    pub(super) bell: Bell<Park>,
}

impl Cx {
    /// The worker's number.
    pub fn id(&self) -> usize {
        self.id
    }

    /// The CPU it was pinned to.
    pub fn cpu(&self) -> Option<usize> {
        self.cpu
    }

    /// The worker's bell.
    pub fn bell(&mut self) -> &mut Bell<Park> {
        &mut self.bell
    }

    /// Whether the crew is being aborted: a hint, for every batch.
    #[inline]
    pub fn aborted(&self) -> bool {
        self.bell.aborted()
    }
}

impl fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Launch { .. }")
    }
}
