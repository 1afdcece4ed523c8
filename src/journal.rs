#![forbid(unsafe_code)]
//! The journal of a channel: everything a worker has popped and the target has not yet applied, in order.
//!
//! It is a second ring beside the first: the worker is its producer and appends each item *as it pops it*, the
//! controller is its consumer. What is in it when a channel dies is dirty again; what stands before a [`Item::Flush`]
//! mark goes when the target has said that the mark's epoch is applied **for that lane**, and not before (INV-6).
//! The two rules are functions over any queue, so that the model checker runs the code that ships.

use crate::ring::Consumer;
use crate::units::{Epoch, Item, Run};

/// A queue that gives its oldest item first.
pub trait Oldest {
    /// Looks at the oldest item.
    fn peek_oldest(&mut self) -> Option<Item>;
    /// Takes the oldest item.
    fn take_oldest(&mut self) -> Option<Item>;
}

impl Oldest for Consumer<Item> {
    fn peek_oldest(&mut self) -> Option<Item> {
        self.peek()
    }

    fn take_oldest(&mut self) -> Option<Item> {
        self.pop()
    }
}

impl Oldest for std::collections::VecDeque<Item> {
    fn peek_oldest(&mut self) -> Option<Item> {
        self.front().copied()
    }

    fn take_oldest(&mut self) -> Option<Item> {
        self.pop_front()
    }
}

/// Frees everything up to and with the mark of `epoch`. Returns false if the journal ended before the mark was seen:
/// the peer acknowledged an epoch that this channel never flushed.
///
/// Where a later mark comes first, the channel was not there yet when that epoch was flushed, and nothing is to be freed.
pub fn free_through(journal: &mut impl Oldest, epoch: Epoch) -> bool {
    while let Some(item) = journal.peek_oldest() {
        match item {
            Item::Flush(later) if later > epoch => return true,
            _ => journal.take_oldest(),
        };
        if item == Item::Flush(epoch) {
            return true;
        }
    }
    false
}

/// Takes every run that is left, oldest first: what is dirty again when the channel is gone.
pub fn drain_runs(journal: &mut impl Oldest, mut dirty_again: impl FnMut(Run)) {
    while let Some(item) = journal.take_oldest() {
        if let Some(run) = item.run() {
            dirty_again(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::units::{BlockId, Round};

    fn run(first: u64) -> Item {
        Item::Run(Run { block: BlockId(0), first, pages: 1 })
    }

    #[test]
    fn an_applied_epoch_frees_its_runs_and_no_later_ones() {
        let mut journal = VecDeque::from([
            run(1),
            Item::Flush(Epoch(0)),
            run(2),
            Item::RoundEnd(Round(0)),
            Item::Flush(Epoch(1)),
            run(3),
        ]);
        assert!(free_through(&mut journal, Epoch(1)));
        let mut left = Vec::new();
        drain_runs(&mut journal, |r| left.push(r.first));
        assert_eq!(left, [3]);
    }

    #[test]
    fn a_channel_that_came_after_an_epoch_keeps_what_it_has_taken_since() {
        let mut journal = VecDeque::from([Item::RoundEnd(Round(4)), Item::Flush(Epoch(2)), run(1), Item::Flush(Epoch(3))]);
        assert!(free_through(&mut journal, Epoch(1)), "it counts as having flushed it");
        assert_eq!(journal.len(), 3, "only what stands before its first mark is gone");
        assert!(free_through(&mut journal, Epoch(2)));
        assert_eq!(journal.front(), Some(&run(1)));
    }

    #[test]
    fn an_epoch_that_was_never_flushed_is_noticed() {
        let mut journal = VecDeque::from([run(1), Item::Flush(Epoch(0))]);
        assert!(!free_through(&mut journal, Epoch(7)));
    }
}
