#![forbid(unsafe_code)]
//! The source's time limits: what the target owes and does not send, and data that does not move.

use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::units::{ChannelId, Round};
use crate::wire::packet::{HEADER_AND_TABLE_BYTES_MAX, PAYLOAD_BYTES_MAX};

impl Driver<'_> {
    /// Ends the migration if the target has kept us waiting for too long.
    pub fn check_time(&mut self) -> Result<(), Over> {
        let now = Instant::now();
        let timeouts = self.settings.timeouts;
        if let Some(control) = &self.control {
            let owed = match self.session.waits_for_hook() {
                _ if !self.greeted => Some(("the target's Hello", timeouts.hello)),
                _ if self.session.awaits_lanes() => Some(("ChannelJoined for every data channel", timeouts.hello)),
                Some(hook) => Some((hook, timeouts.hook)),
                None => None,
            };
            let (waiting_for, limit, since) = match owed {
                // A target that answers Pings and nothing else is alive, and still owes us what we wait for.
                Some((what, limit)) => {
                    if self.owed.0 != what {
                        self.owed = (what, now);
                    }
                    (what, limit, self.owed.1)
                }
                None => {
                    // What is owed later under the same name is owed anew: a second attempt waits for Loaded again.
                    self.owed = ("", now);
                    ("a sign of life of the target", timeouts.silence, control.heard())
                }
            };
            let waited = now.saturating_duration_since(since);
            if waited > limit {
                return self.fail(Failure::Silent { waiting_for, ms: waited.as_millis() as u64 });
            }
        }
        self.check_stall(now, timeouts.stall)
    }

    /// Only while data waits to move can it stall, and only the lane that others wait for is to blame: one that is at
    /// the barrier makes no progress by design.
    fn check_stall(&mut self, now: Instant, limit: Duration) -> Result<(), Over> {
        let Some(lanes) = &self.lanes else { return Ok(()) };
        // What the target says counts no further than what was sent: numbers that it makes up are no progress. But a
        // batch counts as sent when the kernel has taken the last byte of it, and a slow link carries it until then.
        let in_hand = PAYLOAD_BYTES_MAX + HEADER_AND_TABLE_BYTES_MAX as u64;
        let sent = |channel: ChannelId| self.progress.channel(channel.0.into()).map_or(0, |c| c.wire_bytes + in_hand);
        let landed: u64 = self.pongs.iter().map(|p| p.bytes.min(sent(p.channel))).sum();
        let moved = self.progress.channels().wire_bytes + landed;
        // No byte may be queued, and rounds be blocked all the same: by epochs that the target does not acknowledge, or
        // by the end mark of a round, for which the socket has no room.
        let epochs_wait = !self.session.may_close_epoch() && self.session.waits_for_hook().is_none();
        let marks_wait = self.session.round().0.checked_sub(1).is_some_and(|last| !lanes.all_sent(Round(last)));
        // And what has left the worker's hand may lie in socket buffers: lanes that have not passed a round owe it.
        let rounds_wait = self.pongs.iter().any(|p| p.rounds_passed < self.session.round().0);
        // The policy waits for every byte that was sent.
        let drain_waits = self.draining && self.in_flight_bytes() > 0;
        let all_quiet = lanes.queued_bytes() == 0 && !epochs_wait && !marks_wait && !rounds_wait && !drain_waits;
        if moved > self.moved_bytes || all_quiet {
            self.moved_bytes = moved;
            self.moved_at = now;
        }
        let still = now.saturating_duration_since(self.moved_at);
        if still > limit {
            let behind = self.pongs.iter().filter(|p| !p.at_barrier).min_by_key(|p| (p.rounds_passed, p.bytes));
            let channel = behind.map_or(ChannelId(0), |p| p.channel);
            return self.fail(Failure::Stalled { channel, ms: still.as_millis() as u64 });
        }
        Ok(())
    }
}
