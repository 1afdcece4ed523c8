//! Decides once whether a migration is committed or cancelled, whoever asks first.
#![forbid(unsafe_code)]

use std::fmt;

use crate::sync::Ordering::Relaxed;
use crate::sync::{Arc, AtomicU32, mutated};

const OPEN: u32 = 0;
const COMMITTED: u32 = 1;
const CANCELLED: u32 = 2;

/// What became of a request to cancel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CancelAnswer {
    /// This request cancelled the migration: it will never be committed.
    Accepted,
    /// An earlier request had cancelled it.
    AlreadyCancelled,
    /// It is committed: the target may be running, and the source must not resume by itself.
    TooLate,
}

/// Commit or cancel: exactly one of them happens. Clones are handles to the same gate.
///
/// ```
/// use pageferry::gate::{CancelAnswer, Gate};
///
/// let gate = Gate::new();
/// let anybody = gate.clone();
/// assert_eq!(anybody.cancel(), CancelAnswer::Accepted);
/// assert!(!gate.commit());
/// assert_eq!(anybody.cancel(), CancelAnswer::AlreadyCancelled);
/// ```
#[derive(Clone)]
pub struct Gate {
    // Leaves OPEN once, by one compare_exchange, and never changes again. That alone makes the decision: all changes of
    // one word stand in one order, and a failed compare_exchange returns the word that won. Relaxed is enough, as
    // nothing is published through it: who cancels rings bells afterwards, and who commits sends a message; those order
    // what they carry.
    word: Arc<AtomicU32>,
}

impl Gate {
    /// An open gate.
    pub fn new() -> Self {
        Gate { word: Arc::new(AtomicU32::new(OPEN)) }
    }

    /// Asks to cancel. Any thread may, at any time, any number of times.
    pub fn cancel(&self) -> CancelAnswer {
        match self.decide(CANCELLED) {
            OPEN => CancelAnswer::Accepted,
            CANCELLED => CancelAnswer::AlreadyCancelled,
            _ => CancelAnswer::TooLate,
        }
    }

    /// Commits, unless it is cancelled: true if it is committed, by this call or an earlier one.
    ///
    /// Call it before the first byte of the commit message goes to the kernel.
    #[must_use = "a cancelled migration must not be committed"]
    pub fn commit(&self) -> bool {
        self.decide(COMMITTED) != CANCELLED
    }

    /// Whether it is cancelled. `true` is final; `false` may be out of date: only [`Gate::commit`] decides.
    pub fn is_cancelled(&self) -> bool {
        self.word.load(Relaxed) == CANCELLED
    }

    /// Returns what the word was before: `OPEN` if this call has decided.
    fn decide(&self, to: u32) -> u32 {
        if mutated("gate/check-then-store") {
            let before = self.word.load(Relaxed);
            if before == OPEN {
                self.word.store(to, Relaxed);
            }
            return before;
        }
        self.word.compare_exchange(OPEN, to, Relaxed, Relaxed).unwrap_or_else(|decided| decided)
    }
}

impl Default for Gate {
    fn default() -> Self {
        Gate::new()
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.word.load(Relaxed) {
            OPEN => "Gate(open)",
            COMMITTED => "Gate(committed)",
            _ => "Gate(cancelled)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_commit_cancel_is_too_late_for_ever() {
        let gate = Gate::default();
        assert!(gate.commit());
        assert!(gate.commit(), "a second commit changes nothing");
        assert_eq!((gate.cancel(), gate.cancel()), (CancelAnswer::TooLate, CancelAnswer::TooLate));
        assert!(!gate.is_cancelled() && format!("{gate:?}").contains("committed"));
    }

    #[test]
    fn cancel_twice_is_harmless_and_commit_fails_for_ever() {
        let gate = Gate::new();
        assert_eq!((gate.cancel(), gate.cancel()), (CancelAnswer::Accepted, CancelAnswer::AlreadyCancelled));
        assert!(!gate.commit() && !gate.commit() && gate.is_cancelled());
    }
}
