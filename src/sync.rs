//! The facade over everything concurrent: the only file that knows whether loom is looking.
//!
//! Outside it, nobody names `std::sync::atomic`, and nobody writes `Ordering::Release`: an ordering stronger than
//! Relaxed is written `release("ring/publish-tail")`, which is `Ordering::Release`, with a name. Under loom the
//! environment variable `PAGEFERRY_WEAKEN` turns the site of that name into Relaxed, so that one loom build serves
//! every mutant (see `tests/orderings`).

#[cfg(not(loom))]
mod inner {
    pub use std::sync::Arc;
    pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub use std::thread;

    /// `std::cell::UnsafeCell` in the shape loom gives it, so that slots go through one type in both worlds.
    #[derive(Debug)]
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

    #[inline(always)]
    pub const fn weakened(_site: &'static str) -> bool {
        false
    }
}

#[cfg(loom)]
mod inner {
    pub use loom::cell::UnsafeCell;
    pub use loom::sync::Arc;
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub use loom::thread;

    pub fn weakened(site: &'static str) -> bool {
        static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        CHOSEN.get_or_init(|| std::env::var("PAGEFERRY_WEAKEN").ok()).as_deref() == Some(site)
    }
}

pub use inner::*;

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
