#![forbid(unsafe_code)]
//! What is asked of a migration.

use std::time::Duration;

/// What happens when a limit is reached, or the guest does not converge.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AtLimit {
    /// The migration fails; the guest runs on at the source and has not been paused.
    #[default]
    GiveUp,
    /// The guest is paused all the same, for as long as the rest takes.
    SwitchOver,
}

/// What happens when a pause took longer than the limit before the hand-over was committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Overrun {
    /// The hand-over goes on.
    #[default]
    Accept,
    /// The guest is resumed here and the hand-over tried again, so many times; the last try is accepted.
    Retry {
        /// Tries after the first.
        tries: u32,
    },
}

/// What is asked of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The longest the guest may stand still.
    pub downtime_limit: Duration,
    /// The most rounds before the guest is paused.
    pub rounds_max: u32,
    /// The longest the rounds before the pause may take together; `None` is no limit.
    pub precopy_time_max: Option<Duration>,
    /// What happens at `rounds_max`, at `precopy_time_max`, and when rounds no longer shrink.
    pub at_limit: AtLimit,
    /// How far the guest may be slowed down, in percent of its time; 0 is not at all, more than 99 counts as 99.
    pub throttle_max: u8,
    /// What happens when a pause took longer than `downtime_limit`.
    pub overrun: Overrun,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            downtime_limit: Duration::from_millis(300),
            rounds_max: 1000,
            precopy_time_max: None,
            at_limit: AtLimit::default(),
            throttle_max: 0,
            overrun: Overrun::default(),
        }
    }
}
