#![forbid(unsafe_code)]
//! How far the channels have come, and since when each has not moved.

use std::time::Instant;

/// What has moved, on each channel and on all of them, and when that was seen to change last.
pub(super) struct Motion {
    pub channels: Vec<(u64, Instant)>,
    pub all: (u64, Instant),
}

impl Motion {
    pub fn new(channels: u8, now: Instant) -> Motion {
        Motion { channels: vec![(0, now); channels.into()], all: (0, now) }
    }
}
