//! Wakes one sleeping thread, and tells it to stop: the whole handshake is one atomic word.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use crossbeam_utils::CachePadded;

use crate::sync::Ordering::Relaxed;
use crate::sync::{Arc, AtomicU32, ParkSpot, Unpark, acquire, mutated, release};

// The bits of the word. DRAIN and ABORT are sticky: once set, nobody clears them.
const RUNG: u32 = 1;
const ASLEEP: u32 = 2;
const DRAIN: u32 = 4;
const ABORT: u32 = 8;

// Why no wake-up is lost
//
// The outside world needs two relations. What a thread wrote before `ring` must be seen by the owner after the `wait`
// that the ring ends; and a `wait` must end if anything was rung since the last one. So `signal` writes with Release,
// and `wait` takes the token with Acquire.
//
// Every change of the word is a read-modify-write. So all of them stand in one total order, each reads the one before
// it, and a release sequence is never broken. Call the `fetch_or` of `signal` R, the `compare_exchange` of `wait` S, and
// its `fetch_and` T. Take any R:
//
// 1. The first T after R in that order reads from R's release sequence. It synchronises with R: the owner sees what was
//    written before R.
// 2. That T is reached. If R comes before S, the word is not 0 at S: S fails and nobody sleeps. If R comes after S,
//    then the first such R finds ASLEEP without RUNG and calls `wake`. A wake is sticky (a token), and it happens after
//    R, so the owner's next load of the word does not see a bare ASLEEP, and the loop ends.
// 3. After DRAIN or ABORT the word is never 0 again: S always fails, and `wait` never blocks again.
//
// `signal` must write even if RUNG is set already. A ring that is skipped because a load shows RUNG heads no release
// sequence, and the load may be old: T may have taken that token long ago. (Mutant: bell/skip-rmw-if-rung.)
//
// A wake that comes late, when the owner has left the loop already, only leaves a token behind. The next sleep then
// returns at once, finds the word still ASLEEP, and sleeps again: one extra loop.

/// How to tell a thread to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Close {
    /// Finish what is queued, then end.
    Drain,
    /// End now, whatever is queued.
    Abort,
}

impl Close {
    fn bit(self) -> u32 {
        match self {
            Close::Drain => DRAIN,
            Close::Abort => ABORT,
        }
    }
}

/// Why [`Bell::wait`] returned. Abort outranks drain, drain outranks the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wake {
    /// Somebody rang: look again at everything you wait for.
    Rung,
    /// Finish what is queued, then end. Every later wait says so too, or `Abort`, and never blocks.
    Drain,
    /// End now. Every later wait says so too, and never blocks.
    Abort,
    /// Nobody rang: the [`Sleeper`] has seen something else that wants the owner (a readable socket, a time-out).
    Elsewhere,
}

/// What a [`Sleeper`] says when it returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slept {
    /// Look at the word again: there was a wake, or nothing at all.
    Again,
    /// Something else than the bell wants the owner: stop waiting.
    Elsewhere,
}

/// How the owner of a [`Bell`] blocks.
///
/// `sleep` returns at the latest after a [`Waker::wake`] that happened since the last `sleep` returned, or that happens
/// during it; and what the waker's thread did before the wake is seen after it. It may return without cause.
pub trait Sleeper {
    /// What ends a sleep, from any thread.
    type Waker: Waker + Clone;

    /// Blocks the calling thread.
    fn sleep(&mut self) -> Slept;

    /// The handle that ends a sleep.
    fn waker(&self) -> Self::Waker;
}

/// Ends the sleep of a [`Sleeper`]. It is sticky: a wake that comes before the sleep ends it at once.
pub trait Waker: Send + Sync {
    /// Ends the current sleep, or the next one.
    fn wake(&self);
}

struct Shared<W> {
    // Written by everybody who rings and by the owner. Publishes whatever the ringer wrote before it rang.
    word: CachePadded<AtomicU32>,
    // Lives as long as the last ringer: a late wake never reaches a recycled thread or file descriptor.
    waker: W,
}

impl<W> Shared<W> {
    fn has(&self, bit: u32) -> bool {
        self.word.load(Relaxed) & bit != 0
    }
}

/// The owner's half: the one thread that waits.
///
/// ```
/// use pageferry::bell::{Bell, Close, Wake};
///
/// let mut bell = Bell::here();
/// let ringer = bell.ringer();
/// std::thread::spawn(move || {
///     ringer.ring();
///     ringer.close(Close::Drain);
/// });
/// while bell.wait() != Wake::Drain { /* look for work */ }
/// ```
pub struct Bell<S: Sleeper> {
    shared: Arc<Shared<S::Waker>>,
    sleeper: S,
    // One owner: the bell is not Sync.
    _one_owner: PhantomData<Cell<()>>,
}

impl<S: Sleeper> Bell<S> {
    /// A bell whose owner blocks in `sleeper`.
    pub fn new(sleeper: S) -> Self {
        let word = CachePadded::new(AtomicU32::new(0));
        let shared = Arc::new(Shared { word, waker: sleeper.waker() });
        Bell { shared, sleeper, _one_owner: PhantomData }
    }

    /// Waits until somebody rings or closes, or until the sleeper reports something else.
    ///
    /// It takes the token: two rings may end one wait. So look at everything you wait for after each return, and also
    /// once before the first wait.
    pub fn wait(&mut self) -> Wake {
        let word = &self.shared.word;
        let mut elsewhere = false;
        let announced = if mutated("bell/sleep-without-recheck") {
            word.fetch_or(ASLEEP, Relaxed);
            elsewhere = self.sleeper.sleep() == Slept::Elsewhere;
            true
        } else {
            word.compare_exchange(0, ASLEEP, Relaxed, Relaxed).is_ok()
        };
        while announced && !elsewhere && word.load(Relaxed) == ASLEEP {
            elsewhere = self.sleeper.sleep() == Slept::Elsewhere;
        }
        // Acquire: takes the token, and sees what was written before every ring so far. Pairs with the Release in
        // `Ringer::signal`. It also clears ASLEEP if the sleeper was called elsewhere, so that nobody wakes in vain.
        let before = word.fetch_and(DRAIN | ABORT, acquire("bell/take"));
        debug_assert!(before & (RUNG | DRAIN | ABORT) != 0 || elsewhere, "a wait ended without cause");
        if before & ABORT != 0 {
            Wake::Abort
        } else if before & DRAIN != 0 {
            Wake::Drain
        } else if before & RUNG != 0 {
            Wake::Rung
        } else {
            Wake::Elsewhere
        }
    }

    /// Whether an abort has been asked for. A hint, cheap enough for every batch; only [`Bell::wait`] orders memory.
    #[inline]
    pub fn aborted(&self) -> bool {
        self.shared.has(ABORT)
    }

    /// Whether a ring waits to be taken. A hint, for owners that look before they start something long.
    #[inline]
    pub fn is_rung(&self) -> bool {
        self.shared.has(RUNG)
    }

    /// A handle that rings this bell.
    pub fn ringer(&self) -> Ringer<S> {
        Ringer { shared: self.shared.clone() }
    }

    /// The sleeper, for owners that tell it what else to watch.
    pub fn sleeper(&mut self) -> &mut S {
        &mut self.sleeper
    }
}

impl<S: Sleeper> fmt::Debug for Bell<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bell").field("rung", &self.is_rung()).field("aborted", &self.aborted()).finish_non_exhaustive()
    }
}

/// Rings a [`Bell`], from any thread, any number of times.
pub struct Ringer<S: Sleeper> {
    shared: Arc<Shared<S::Waker>>,
}

impl<S: Sleeper> Ringer<S> {
    /// Ends the owner's wait, or its next one. What this thread wrote before is seen by the owner after that wait.
    ///
    /// To hand over several things, publish them all and ring once. True if this ring had to wake the owner, which is
    /// what costs.
    #[inline]
    pub fn ring(&self) -> bool {
        self.signal(0) & (ASLEEP | RUNG) == ASLEEP
    }

    /// Tells the owner to stop, for good. True for the first close of this kind.
    ///
    /// An abort does not wake a thread that blocks in the kernel elsewhere than in its sleeper: interrupt that too.
    pub fn close(&self, how: Close) -> bool {
        self.signal(how.bit()) & how.bit() == 0
    }

    /// Whether an abort has been asked for. A hint: it orders no memory.
    #[inline]
    pub fn is_aborted(&self) -> bool {
        self.shared.has(ABORT)
    }

    #[inline]
    fn signal(&self, bits: u32) -> u32 {
        let word = &self.shared.word;
        if mutated("bell/skip-rmw-if-rung") && bits == 0 && word.load(Relaxed) & RUNG != 0 {
            return RUNG;
        }
        // Release: publishes everything this thread wrote before. Pairs with the Acquire in `Bell::wait`.
        let before = word.fetch_or(RUNG | bits, release("bell/ring"));
        // Exactly one wake for each sleep: later rings find RUNG.
        if before & (ASLEEP | RUNG) == ASLEEP {
            self.shared.waker.wake();
        }
        before
    }
}

impl<S: Sleeper> Clone for Ringer<S> {
    fn clone(&self) -> Self {
        Ringer { shared: self.shared.clone() }
    }
}

impl<S: Sleeper> fmt::Debug for Ringer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ringer").field("aborted", &self.is_aborted()).finish_non_exhaustive()
    }
}

/// The default [`Sleeper`]: parks the thread. It costs no file descriptor, and cannot watch anything else.
///
/// It stays on the thread that made it:
///
/// ```compile_fail
/// let bell = pageferry::bell::Bell::here();
/// std::thread::spawn(move || drop(bell));
/// ```
#[derive(Debug)]
pub struct Park(ParkSpot);

/// Wakes a [`Park`].
#[derive(Clone, Debug)]
pub struct ParkWaker(Unpark);

impl Bell<Park> {
    /// A bell for the calling thread. Several on one thread are fine: a wake meant for one costs another an extra loop.
    pub fn here() -> Self {
        Bell::new(Park(ParkSpot::here()))
    }
}

impl Sleeper for Park {
    type Waker = ParkWaker;

    fn sleep(&mut self) -> Slept {
        self.0.park();
        Slept::Again
    }

    fn waker(&self) -> ParkWaker {
        ParkWaker(self.0.unpark())
    }
}

impl Waker for ParkWaker {
    fn wake(&self) {
        self.0.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never blocks. At its second sleep it closes its own bell, as another thread would; it is called elsewhere at the
    /// third, or at once if it has no ringer.
    #[derive(Default)]
    struct Scripted {
        closes: Option<Ringer<Scripted>>,
        sleeps: u32,
    }

    #[derive(Clone)]
    struct Nobody;

    impl Waker for Nobody {
        fn wake(&self) {}
    }

    impl Sleeper for Scripted {
        type Waker = Nobody;

        fn sleep(&mut self) -> Slept {
            self.sleeps += 1;
            match &self.closes {
                Some(ringer) if self.sleeps == 2 => drop(ringer.close(Close::Drain)),
                Some(_) if self.sleeps < 2 => {}
                _ => return Slept::Elsewhere,
            }
            Slept::Again
        }

        fn waker(&self) -> Nobody {
            Nobody
        }
    }

    #[test]
    fn close_is_sticky_and_first_only_once() {
        let mut bell = Bell::here();
        let ringer = bell.ringer();
        assert!(ringer.close(Close::Drain));
        assert!(!ringer.clone().close(Close::Drain));
        assert_eq!(bell.wait(), Wake::Drain);
        assert_eq!(bell.wait(), Wake::Drain, "a drained bell never blocks");
        assert!(ringer.close(Close::Abort), "abort after drain is the first abort");
        assert!(bell.aborted() && ringer.is_aborted());
        assert!(!ringer.close(Close::Drain));
        assert_eq!(bell.wait(), Wake::Abort, "abort outranks drain");
    }

    #[test]
    fn two_rings_end_one_wait() {
        let mut bell = Bell::new(Scripted::default());
        let ringer = bell.ringer();
        ringer.ring();
        ringer.ring();
        assert!(bell.is_rung());
        assert_eq!(bell.wait(), Wake::Rung);
        assert!(!bell.is_rung());
        assert_eq!(bell.wait(), Wake::Elsewhere, "the token was taken");
    }

    #[test]
    fn a_sleeper_called_elsewhere_leaves_the_bell_awake_and_whole() {
        let mut bell = Bell::new(Scripted::default());
        assert_eq!(bell.wait(), Wake::Elsewhere);
        assert_eq!(bell.shared.word.load(Relaxed), 0, "ASLEEP is cleared");
        assert_eq!(bell.wait(), Wake::Elsewhere);
    }

    #[test]
    fn a_stale_wake_up_costs_one_loop_and_a_close_during_it_is_reported() {
        let mut bell = Bell::new(Scripted::default());
        let ringer = bell.ringer();
        bell.sleeper().closes = Some(ringer);
        assert_eq!(bell.wait(), Wake::Drain);
        assert_eq!(bell.sleeper().sleeps, 2);
    }
}
