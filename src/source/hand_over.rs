#![forbid(unsafe_code)]
//! The hand-over: pause, the rest of RAM, the state, Final, Loaded, Commit; or, where it takes too long, back to rounds.

use std::time::{Duration, Instant};

use crate::crew::Alarm;
use crate::error::Failure;
use crate::memory::full;
use crate::progress::Stage;
use crate::scanner::Which;
use crate::session::source::{Facts, SourceEvent};
use crate::source::driver::Driver;
use crate::source::ends::{Attempt, Over};
use crate::source::{DowntimeParts, Guest, ROUNDS_MAX, StateWriter};
use crate::units::{Round, Verify};

impl Driver<'_> {
    /// Pauses the guest and hands it over. `paused_at` is set for as long as it stands still.
    pub fn hand_over(&mut self, guest: &mut dyn Guest, paused_at: &mut Option<Instant>) -> Result<Attempt, Over> {
        self.event(SourceEvent::SwitchOver)?;
        debug_assert!(self.flags.pause);
        let begun = Instant::now();
        *paused_at = Some(begun);
        self.progress.stage(Stage::Paused);
        let (alive, paused) = self.beside("pause", |_| Ok(()), || guest.pause());
        if let Err(e) = paused {
            // The guest runs: the hook's contract. There is nothing to resume.
            *paused_at = None;
            alive?;
            return self.fail(Failure::Hook { hook: "pause", reason: e.to_string() }).map(|()| Attempt::Withdrawn);
        }
        alive?;
        self.event(SourceEvent::GuestPaused)?;
        self.broken_off = false;
        self.break_off_at = self.may_withdraw().then_some(begun + self.settings.limits.downtime_limit);
        self.parts = DowntimeParts { pause: begun.elapsed(), ..DowntimeParts::default() };
        self.ship_the_rest(guest)?;
        let final_at = loop {
            self.parts.ship = begun.elapsed() - self.parts.pause;
            // What is still to come crosses the link twice.
            let overran = self.overran(begun.elapsed() + self.gauge.commit_cost() + self.gauge.run_cost());
            if overran || self.broken_off {
                return self.withdraw(guest, begun, paused_at);
            }
            let final_at = Instant::now();
            let facts = self.facts()?;
            if self.records.contents.is_some() {
                let (alive, objection) = self.beside("sent", |_| Ok(()), || guest.sent());
                alive?;
                if let Err(e) = objection {
                    return self.fail(Failure::Hook { hook: "sent", reason: e.to_string() }).map(|()| Attempt::Withdrawn);
                }
            }
            // Asked behind all that takes time: a channel that was lost meanwhile has given pages back.
            if !self.session.channels_are_settled() || self.session.live_channels() == 0 || self.losses.returned_bytes > 0 {
                self.break_off_at = self.may_withdraw().then_some(begun + self.settings.limits.downtime_limit);
                self.ship_what_came_back()?;
                continue;
            }
            self.gauge.forget_ping();
            self.progress.stage(Stage::HandOver);
            self.event(SourceEvent::Drained(facts))?;
            while !self.flags.ask_commit && !self.session.is_paused() {
                let late = begun + self.settings.limits.downtime_limit;
                if Instant::now() >= late && self.overran(begun.elapsed()) {
                    return self.withdraw(guest, begun, paused_at);
                }
                self.wake_at = Some(late).filter(|late| *late > Instant::now());
                self.service(true)?;
            }
            if self.flags.ask_commit {
                break final_at;
            }
            // A channel was lost behind Final, or something was damaged: what was given back travels in a round of its own.
            self.progress.stage(Stage::Paused);
            self.break_off_at = self.may_withdraw().then_some(begun + self.settings.limits.downtime_limit);
            self.ship_what_came_back()?;
        };
        self.flags.ask_commit = false;
        self.parts.load = final_at.elapsed();
        self.gauge.attempt_took(self.parts.pause, self.parts.load);
        if self.overran(begun.elapsed() + self.gauge.run_cost()) {
            return self.withdraw(guest, begun, paused_at);
        }
        // The one decision between a cancel and the hand-over.
        let granted = self.gate.commit();
        self.event(if granted { SourceEvent::CommitGranted } else { SourceEvent::CancelAsked })?;
        Ok(Attempt::Committed)
    }

    /// Whether an attempt that takes too long would be tried again.
    fn may_withdraw(&self) -> bool {
        // Tries have a limit of their own. This one is the wire's: it leaves room for a round, and for those of the pause.
        self.session.round().0 < ROUNDS_MAX && self.policy.may_retry()
    }

    /// Whether so long a pause is to be broken off. Asked of the policy only where the limit is exceeded: it counts.
    fn overran(&mut self, took: Duration) -> bool {
        took > self.settings.limits.downtime_limit && self.may_withdraw() && self.policy.overran(took)
    }

    /// Lets the guest run on, and waits until the target has answered what it was sent.
    fn withdraw(
        &mut self,
        guest: &mut dyn Guest,
        begun: Instant,
        paused_at: &mut Option<Instant>,
    ) -> Result<Attempt, Over> {
        if let Err(e) = guest.resume() {
            *paused_at = None;
            let reason = format!("{e}; the guest stands still at the source, after an attempt that took too long");
            return self.fail(Failure::Hook { hook: "resume", reason }).map(|()| Attempt::Withdrawn);
        }
        *paused_at = None;
        (self.break_off_at, self.broken_off) = (None, false);
        self.excuse_silence();
        self.interrupted += begun.elapsed();
        self.overruns += 1;
        self.remark(format!(
            "the guest ran on after {:.1} ms, as the hand-over exceeded its limit of {:.1} ms",
            begun.elapsed().as_secs_f64() * 1e3,
            self.settings.limits.downtime_limit.as_secs_f64() * 1e3
        ));
        self.progress.stage(Stage::Precopy);
        self.event(SourceEvent::Overran)?;
        while self.session.is_withdrawing() {
            self.service(true)?;
        }
        // What was saved is forgotten on both sides.
        self.forget_attempt();
        Ok(Attempt::Withdrawn)
    }

    /// With the guest paused: ships what is dirty over all channels while the VMM saves its state, and once more when it
    /// has; then waits until every ring and every hand is empty.
    fn ship_the_rest(&mut self, guest: &mut dyn Guest) -> Result<(), Over> {
        // The cap holds while the guest runs; here it would cost downtime.
        self.pace = None;
        let mut writer = StateWriter::new(self.state.clone(), self.bell.ringer());
        let (shipped, saved) = self.beside("scan", Driver::ship_paused_round, move || guest.save_state(&mut writer));
        shipped?;
        if let Err(e) = saved {
            return self.fail(Failure::Hook { hook: "save_state", reason: e.to_string() });
        }
        // save_state may have written guest RAM.
        if !self.breaks_off() {
            self.ship_paused_round()?;
        }
        self.ship_what_came_back()
    }

    /// Waits until every ring and every hand is empty, and all state is out; ships what lost channels gave back meanwhile.
    fn ship_what_came_back(&mut self) -> Result<(), Over> {
        while !self.breaks_off() {
            if self.losses.returned_bytes > 0 && self.session.channels_are_settled() {
                self.ship_paused_round()?;
            }
            let last = Round(self.session.round().0 - 1);
            let all_sent = self.lanes.as_ref().is_some_and(|lanes| lanes.all_sent(last));
            // Asked for after that: nothing more can come.
            self.carry()?;
            let empty = all_sent
                && self.has_carried_all()
                && self.state.is_empty()
                && self.begins.is_none();
            if empty && self.session.channels_are_settled() && self.losses.returned_bytes == 0 {
                break;
            }
            self.wake_at = self.break_off_at;
            self.service(true)?;
        }
        self.break_off_at = None;
        Ok(())
    }

    /// Little as it may be, it goes over all channels: in batches so small that each gets its share. Half of that, as a
    /// count of what is dirty may be too high by as much as there are sources.
    fn ship_paused_round(&mut self) -> Result<(), Over> {
        let deferred = self.scanner.as_ref().map_or(0, |scanner| scanner.deferred_bytes());
        let bytes = self.dirty_bytes()? + deferred;
        let share = bytes / (2 * u64::from(self.settings.channels.max(1)));
        self.ship_round(Which::Dirty, 0, share.clamp(1, self.settings.batch_bytes as u64))
    }

    /// What Final says: taken when every ring and every hand is empty.
    fn facts(&mut self) -> Result<Facts, Over> {
        let mut facts =
            Facts { state_bytes: self.state_bytes, state_crc: self.state_crc.finish(), ..Facts::default() };
        if let Some(table) = &self.records.digests {
            facts.block_digests = self.ram.iter().map(|(id, _)| table.block_digest(id)).collect();
        }
        if self.settings.verify == Verify::Full {
            facts.full_digests = self.full_digests()?;
        }
        Ok(facts)
    }

    /// Hashes all of RAM on other threads, and looks after the rest meanwhile.
    fn full_digests(&mut self) -> Result<Vec<u64>, Over> {
        let (hashing, ram, ringer) = (full::Hashing::default(), self.ram.clone(), self.bell.ringer());
        std::thread::scope(|scope| {
            hashing.start(scope, &ram, self.id, self.settings.channels.into(), move || Alarm::ring(&ringer));
            loop {
                if let Some(digests) = hashing.take() {
                    return Ok(digests);
                }
                if let Err(over) = self.service(true) {
                    hashing.stop();
                    return Err(over);
                }
            }
        })
    }
}
