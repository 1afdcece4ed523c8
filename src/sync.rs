//! The facade over everything concurrent: the only file that knows whether loom is looking.
//!
//! Outside it, nobody names `std::sync::atomic`, and nobody writes `Ordering::Release`: an ordering stronger than
//! Relaxed is written `release("ring/publish-tail")`, which is `Ordering::Release`, with a name. Under loom the
//! environment variable `PAGEFERRY_WEAKEN` turns the site of that name into Relaxed, so that one loom build serves
//! every mutant. Mistakes of another kind (a skipped re-check, a bell not rung) are mutants too: the code asks
//! `mutated("bell/sleep-without-recheck")`, which is `false` unless `PAGEFERRY_MUTANT` names it under loom.
//! `tests/orderings` finds every name in the source, runs each mutant, and demands that a test fails.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
mod inner {
    pub use std::sync::Arc;
    pub use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub use std::thread;

    /// Whether a slice of cells lies in memory as a slice of what they hold. Under loom each cell keeps a record of who
    /// touched it beside that, and is touched by itself.
    pub const CELLS_ARE_PLAIN: bool = true;

    /// `std::cell::UnsafeCell` in the shape loom gives it, so that slots go through one type in both worlds.
    #[derive(Debug)]
    #[repr(transparent)]
    pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        /// A new cell.
        pub const fn new(value: T) -> Self {
            UnsafeCell(std::cell::UnsafeCell::new(value))
        }

        /// Hands out a pointer for reading; the caller keeps writers away while it is used.
        #[inline(always)]
        pub fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            f(self.0.get())
        }

        /// Hands out a pointer for writing; the caller keeps everybody else away while it is used.
        #[inline(always)]
        pub fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }

    /// Parks the thread that made it.
    #[derive(Debug)]
    pub struct ParkSpot {
        owner: thread::Thread,
        // `park` blocks the thread that calls it, `unpark` wakes the one that made the spot: they must be the same, so
        // a spot cannot move to another thread.
        _stays_here: std::marker::PhantomData<*const ()>,
    }

    /// Wakes the thread that parks at a [`ParkSpot`].
    #[derive(Clone, Debug)]
    pub struct Unpark(thread::Thread);

    impl ParkSpot {
        /// A spot for the calling thread.
        pub fn here() -> Self {
            ParkSpot { owner: thread::current(), _stays_here: std::marker::PhantomData }
        }

        /// Blocks until an [`Unpark`] wakes it. May return without cause; a wake that came first is not lost.
        #[inline]
        pub fn park(&mut self) {
            thread::park();
        }

        /// The handle that wakes this spot.
        pub fn unpark(&self) -> Unpark {
            Unpark(self.owner.clone())
        }
    }

    impl Unpark {
        /// Wakes the thread, or makes its next park return at once.
        #[inline]
        pub fn wake(&self) {
            self.0.unpark();
        }
    }

    /// Whether the ordering of this name is to be Relaxed: never, outside loom.
    #[inline(always)]
    pub const fn weakened(_site: &'static str) -> bool {
        false
    }

    /// Whether the mistake of this name is to be made: never, outside loom.
    #[inline(always)]
    pub const fn mutated(_mistake: &'static str) -> bool {
        false
    }
}

#[cfg(loom)]
mod inner {
    pub use loom::cell::UnsafeCell;
    pub use loom::sync::Arc;
    pub use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub use loom::thread;

    /// Whether a slice of cells lies in memory as a slice of what they hold: not here.
    pub const CELLS_ARE_PLAIN: bool = false;

    /// Parks the thread that made it. Built on `Notify`, as loom's own `unpark` is not a point where it switches
    /// threads: a model with it misses interleavings.
    #[derive(Debug)]
    pub struct ParkSpot {
        token: Arc<loom::sync::Notify>,
        _stays_here: std::marker::PhantomData<*const ()>,
    }

    /// Wakes the thread that parks at a [`ParkSpot`].
    #[derive(Clone, Debug)]
    pub struct Unpark(Arc<loom::sync::Notify>);

    impl ParkSpot {
        /// A spot for the calling thread.
        pub fn here() -> Self {
            ParkSpot { token: Arc::new(loom::sync::Notify::new()), _stays_here: std::marker::PhantomData }
        }

        /// Blocks until an [`Unpark`] wakes it. Loom tries one return without cause.
        pub fn park(&mut self) {
            self.token.wait();
        }

        /// The handle that wakes this spot.
        pub fn unpark(&self) -> Unpark {
            Unpark(self.token.clone())
        }
    }

    impl Unpark {
        /// Wakes the thread, or makes its next park return at once.
        pub fn wake(&self) {
            self.0.notify();
        }
    }

    /// Whether `PAGEFERRY_WEAKEN` names this ordering.
    pub fn weakened(site: &'static str) -> bool {
        static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        CHOSEN.get_or_init(|| std::env::var("PAGEFERRY_WEAKEN").ok()).as_deref() == Some(site)
    }

    /// Whether `PAGEFERRY_MUTANT` names this mistake.
    pub fn mutated(mistake: &'static str) -> bool {
        static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        CHOSEN.get_or_init(|| std::env::var("PAGEFERRY_MUTANT").ok()).as_deref() == Some(mistake)
    }
}

pub use inner::*;

/// Always std's `Arc`: for trait objects, which loom's `Arc` cannot hold without help. It orders nothing that a model
/// should see: what it points to is made before any thread starts.
pub use std::sync::Arc as DynArc;

/// `Ordering::Acquire`, named. Under loom, Relaxed if `PAGEFERRY_WEAKEN` names this site.
#[inline(always)]
pub fn acquire(site: &'static str) -> Ordering {
    if weakened(site) { Ordering::Relaxed } else { Ordering::Acquire }
}

/// `Ordering::Release`, named. Under loom, Relaxed if `PAGEFERRY_WEAKEN` names this site.
#[inline(always)]
pub fn release(site: &'static str) -> Ordering {
    if weakened(site) { Ordering::Relaxed } else { Ordering::Release }
}

/// `Ordering::Acquire` of a word that the kernel writes. It has a name like the others, and no mutant: loom runs no
/// kernel, so there is nothing that could fail.
#[inline(always)]
pub const fn acquire_from_kernel(_site: &'static str) -> Ordering {
    Ordering::Acquire
}

/// `Ordering::Release` of a word that the kernel reads. It has a name like the others, and no mutant: loom runs no
/// kernel, so there is nothing that could fail.
#[inline(always)]
pub const fn release_to_kernel(_site: &'static str) -> Ordering {
    Ordering::Release
}
