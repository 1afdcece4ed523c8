#![forbid(unsafe_code)]
//! How a step of the driver ends, where it does not just go on.

/// The session has ended: whoever sees it goes back to [`super::driver::migrate`], and does nothing else.
#[derive(Debug)]
pub(super) struct Over;

/// How an attempt to hand over ended, where the migration has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Attempt {
    /// Commit is sent: the guest belongs to the target, or nobody knows.
    Committed,
    /// It took longer than the downtime limit: the guest runs again.
    Withdrawn,
}
