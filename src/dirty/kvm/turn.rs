//! Whose turn it is: lets one thread in at a time where nobody may wait in the kernel and nothing may be allocated.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, Ordering, acquire, release, thread};

/// One thread has the turn, or none. Held for one collection of the dirty rings: whoever waits yields.
///
/// What is done in one turn is seen in the next, Relaxed writes too.
///
/// ```
/// use pageferry::dirty::kvm::turn::Turn;
///
/// let turn = Turn::default();
/// let mine = turn.try_take().unwrap();
/// assert!(turn.try_take().is_none());
/// drop(mine);
/// assert!(turn.try_take().is_some());
/// ```
#[derive(Debug, Default)]
pub struct Turn {
    /// 1 while somebody has it. The taker's acquire meets the giver's release: what was done in a turn comes before
    /// what is done in the next.
    taken: AtomicU32,
}

/// The turn, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the turn away"]
pub struct MyTurn<'a> {
    turn: &'a Turn,
}

impl Turn {
    /// Takes the turn if nobody has it.
    #[inline]
    pub fn try_take(&self) -> Option<MyTurn<'_>> {
        // Acquire: shows what was done in the turn before; pairs with the release in `MyTurn::drop`.
        let taken = self.taken.compare_exchange(0, 1, acquire("turn/take"), Ordering::Relaxed);
        // Made only if it was taken: one that is made and dropped gives the turn away, whoever has it.
        taken.is_ok().then(|| MyTurn { turn: self })
    }

    /// Takes the turn, and yields until it can.
    pub fn take(&self) -> MyTurn<'_> {
        loop {
            if let Some(mine) = self.try_take() {
                return mine;
            }
            thread::yield_now();
        }
    }
}

impl Drop for MyTurn<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: what was done in this turn; pairs with the acquire in `try_take`.
        self.turn.taken.store(0, release("turn/give"));
    }
}
