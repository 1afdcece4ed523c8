#![forbid(unsafe_code)]
//! Which epochs are open, closed and applied: the source's ledger.

use crate::units::Epoch;

/// Epochs that may be closed and not yet applied. Two keep the link busy while one is on its way back, and bound each
/// journal to three epochs: these two and the open one.
pub const EPOCHS_OUTSTANDING_MAX: u64 = 2;

/// The source's view of its epochs.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct EpochLedger {
    open: u64,
    applied: u64,
}

impl EpochLedger {
    /// The epoch that is being filled.
    pub fn open(&self) -> Epoch {
        Epoch(self.open)
    }

    /// Whether the open epoch may be closed now.
    pub fn may_close(&self) -> bool {
        self.open - self.applied < EPOCHS_OUTSTANDING_MAX
    }

    /// Closes the open epoch and opens the next; the closed one, whose mark is now due on every channel.
    pub fn close(&mut self) -> Option<Epoch> {
        if !self.may_close() {
            return None;
        }
        self.open += 1;
        Some(Epoch(self.open - 1))
    }

    /// Nothing is outstanding any more: all of it travels again, in epochs to come.
    pub fn forget_outstanding(&mut self) {
        self.applied = self.open;
    }

    /// Takes the target's word that `epoch` and all before it are applied. False if that cannot be: the epoch is
    /// still open, or was applied before.
    pub fn applied(&mut self, epoch: Epoch) -> bool {
        if epoch.0 >= self.open || epoch.0 < self.applied {
            return false;
        }
        self.applied = epoch.0 + 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_two_epochs_are_outstanding() {
        let mut ledger = EpochLedger::default();
        assert_eq!(ledger.close(), Some(Epoch(0)));
        assert_eq!(ledger.close(), Some(Epoch(1)));
        assert_eq!(ledger.close(), None);
        assert!(ledger.applied(Epoch(0)));
        assert_eq!(ledger.close(), Some(Epoch(2)));
    }

    #[test]
    fn an_epoch_is_applied_once_and_only_after_it_was_closed() {
        let mut ledger = EpochLedger::default();
        assert!(!ledger.applied(Epoch(0)), "still open");
        ledger.close();
        ledger.close();
        assert!(ledger.applied(Epoch(1)), "covers epoch 0 too");
        assert!(!ledger.applied(Epoch(0)));
        assert!(!ledger.applied(Epoch(1)));
    }
}
