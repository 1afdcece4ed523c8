#![forbid(unsafe_code)]
//! The source's time limits: what the target owes and does not send, and data that does not move.

use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::session::source::SourceEvent;
use crate::units::ChannelId;
use crate::wire::packet::HEADER_AND_TABLE_BYTES_MAX;

impl Driver<'_> {
    /// Ends the migration if the target has kept us waiting for too long.
    pub fn check_time(&mut self) -> Result<(), Over> {
        let now = Instant::now();
        let timeouts = self.settings.timeouts;
        if let Some(control) = &self.control {
            let owed = match self.session.waits_for_hook() {
                _ if !self.greeted => Some(("the target's Hello", timeouts.hello)),
                // Each channel has its own time for that.
                _ if self.session.awaits_lanes() => Some(("ChannelJoined for every data channel", timeouts.hello * 2)),
                _ if self.session.awaits_resumed() => Some(("Ready (to go on with the session)", timeouts.hook)),
                Some(hook) => Some((hook, timeouts.hook)),
                None => None,
            };
            // Whoever answers no Ping may be silent for as long as he likes: his data moves, or stalls.
            let may_be_silent = owed.is_none() && !self.settings.framing.mends();
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
            if waited > limit && !may_be_silent {
                let why = Failure::Silent { waiting_for, ms: waited.as_millis() as u64 };
                // Silence may be the network's. So may be a word that does not come, if one before it was damaged such that
                // it seems to go on: where the session can be taken up again, that shows.
                return if owed.is_none() || self.session.resumes() { self.control_lost(why) } else { self.fail(why) };
            }
        }
        self.check_retired(now)?;
        self.check_stall(now, timeouts.stall)
    }

    /// A target that does not take a lost channel out of its set holds everything up.
    fn check_retired(&mut self, now: Instant) -> Result<(), Over> {
        // While it is in a hook of its VMM it answers nobody; that has a limit of its own.
        if !self.session.awaits_retired() || self.session.waits_for_hook().is_some() || self.session.is_committed() {
            self.losses.retired_since = None;
            return Ok(());
        }
        let waited = now.saturating_duration_since(*self.losses.retired_since.get_or_insert(now));
        if waited <= self.settings.timeouts.hello {
            return Ok(());
        }
        let waiting_for = "ChannelRetired for a lost data channel";
        self.fail(Failure::Silent { waiting_for, ms: waited.as_millis() as u64 })
    }

    /// Only while data waits to move can it stall, and only the lane that others wait for is to blame: one that is at
    /// the barrier makes no progress by design.
    fn check_stall(&mut self, now: Instant, limit: Duration) -> Result<(), Over> {
        let Some(lanes) = &self.lanes else { return Ok(()) };
        let round = self.session.round();
        let in_hand = self.settings.batch_bytes as u64 + HEADER_AND_TABLE_BYTES_MAX as u64;
        // No byte may be queued, and rounds be blocked all the same: by epochs that the target does not acknowledge.
        let epochs_wait = !self.session.may_close_epoch() && self.session.waits_for_hook().is_none();
        let (mut all_quiet, mut sum, mut live) = (!epochs_wait, 0u64, 0);
        let mut stalled = Vec::new();
        // What waits for the control connection holds everything up, too, when the workers have nothing left to do. Behind
        // Commit it is the hook of the target that is waited for.
        let owed_on_control = if self.session.is_committed() { 0 } else { self.owed_on_control() };
        all_quiet &= owed_on_control == 0;
        sum = sum.wrapping_add(owed_on_control);
        // Where nobody says who is at the barrier, it is whoever has sent more rounds than another.
        let slowest = (0..self.motion.channels.len()).map(|index| lanes.rounds_sent(index)).min().unwrap_or(0);
        let mends = self.settings.framing.mends();
        for (index, motion) in self.motion.channels.iter_mut().enumerate() {
            let channel = ChannelId(index as u8);
            if !self.session.is_live(channel) {
                *motion = (0, now);
                continue;
            }
            live += 1;
            let sent = lanes.sent_bytes(index, &self.progress);
            let generation = self.session.generation(channel);
            let pong = self.pongs.iter().find(|pong| (pong.channel, pong.generation) == (channel, generation));
            // The batch in the worker's hand counts as sent when all of it is: over a slow link it lands long before. What
            // the target makes up beyond that is no progress.
            let landed = pong.map_or(0, |pong| pong.bytes).min(sent + in_hand);
            // Bytes may be queued here, or the end mark of a round, for which the socket has no room; and what has left the
            // worker's hand may lie in socket buffers: a lane that has not passed a round owes it, and the policy, or an
            // epoch, may wait for every byte that was sent.
            let owes = lanes.queued_bytes_of(index) > 0
                || !lanes.has_sent_before(index, round)
                || pong.is_some_and(|pong| pong.rounds_passed < round.0)
                || ((self.draining || epochs_wait) && sent > landed);
            all_quiet &= !owes;
            sum = sum.wrapping_add(sent).wrapping_add(landed);
            let at_barrier = match mends {
                true => pong.is_some_and(|pong| pong.at_barrier),
                false => lanes.rounds_sent(index) > slowest,
            };
            let moved = (sent + landed).abs_diff(motion.0);
            if moved >= PROGRESS_BYTES_MIN || !owes || at_barrier {
                *motion = (sent + landed, now);
            }
            if now.saturating_duration_since(motion.1) > limit {
                stalled.push(channel);
            }
        }
        if sum != self.motion.all.0 || all_quiet || live == 0 {
            self.motion.all = (sum, now);
        }
        // Others wait for these at the barrier, or have nothing to do. Where all are slow, that is the link they share; and
        // where nothing moves at all, another connection may be better, if one is under way.
        let still = now.saturating_duration_since(self.motion.all.1);
        if !stalled.is_empty() && (stalled.len() < live || (still > limit && self.losses.has_hope())) {
            self.motion.all.1 = now;
            return self.lose_stalled(stalled, limit);
        }
        if still <= limit {
            return Ok(());
        }
        let behind = self.pongs.iter().filter(|p| !p.at_barrier).min_by_key(|p| (p.rounds_passed, p.bytes));
        // Pages may travel on the control connection alone; else it is to blame where no channel is.
        let by_control = self.pipe.is_some() || (owed_on_control > 0 && stalled.is_empty());
        let channel = (!by_control).then(|| behind.map_or(ChannelId(0), |p| p.channel));
        let why = Failure::Stalled { channel, ms: still.as_millis() as u64 };
        // A network that takes everything and gives nothing back stalls data and control alike.
        if self.session.resumes() { self.control_lost(why) } else { self.fail(why) }
    }

    fn lose_stalled(&mut self, stalled: Vec<ChannelId>, limit: Duration) -> Result<(), Over> {
        for channel in stalled {
            let generation = self.session.generation(channel);
            let reason = format!("next to nothing moved on it for {} ms, and the others wait for it", limit.as_millis());
            self.event(SourceEvent::ChannelFailed { channel, generation, reason })?;
        }
        Ok(())
    }
}

/// What a lane has to move within the stall limit. Less is as good as nothing to those that wait for it.
const PROGRESS_BYTES_MIN: u64 = 64 << 10;
