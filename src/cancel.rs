#![forbid(unsafe_code)]
//! Cancel, from any thread.

use crate::bell::Ringer;
use crate::gate::{CancelAnswer, Gate};
use crate::poll::PollSleeper;

/// Cancels a migration, or learns that it is too late. Any thread may use it, any number of times, also after the end.
#[derive(Clone, Debug)]
pub struct CancelHandle {
    pub(crate) gate: Gate,
    pub(crate) controller: Ringer<PollSleeper>,
}

impl CancelHandle {
    /// Asks to cancel. Returns at once; the migration ends soon after an `Accepted`, with
    /// [`Outcome::Cancelled`](crate::Outcome::Cancelled).
    pub fn cancel(&self) -> CancelAnswer {
        let answer = self.gate.cancel();
        self.controller.ring();
        answer
    }
}
