#![forbid(unsafe_code)]
//! The control connection at the source: heartbeats, frames in, device state out.

use std::time::Instant;

use crate::config::HEARTBEAT;
use crate::error::Failure;
use crate::session::source::{SourceAction, SourceEvent};
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::source::lanes::Lanes;
use crate::units::Round;
use crate::wire::control::{SourceFrame, TargetFrame};
use crate::wire::hello::{HelloRole, Side};

impl Driver<'_> {
    /// Sends a Ping when its time has come.
    pub fn heartbeat(&mut self) -> Result<(), Over> {
        let now = Instant::now();
        if now >= self.ping_at {
            self.ping_at = now + HEARTBEAT;
            self.pings += 1;
            let nonce = self.pings;
            // While the target is in a hook it answers nobody.
            if self.session.waits_for_hook().is_none() {
                self.gauge.ping_sent(nonce);
            }
            self.act(SourceAction::Send(SourceFrame::Ping { nonce }))?;
            self.measure();
        }
        Ok(())
    }

    /// Asks the target how far it is, unless it has been asked.
    pub fn ask_now(&mut self) -> Result<(), Over> {
        if !self.gauge.awaits_pong() {
            self.ping_at = Instant::now();
            self.heartbeat()?;
        }
        Ok(())
    }

    /// Asks the target soon how far it is, rather than with the next heartbeat.
    pub fn ask_soon(&mut self) {
        if let Some(at) = self.gauge.ask_at() {
            self.ping_at = self.ping_at.min(at);
        }
    }

    pub fn receive(&mut self) -> Result<(), Over> {
        if !self.greeted {
            self.hear_hello()?;
        }
        if !self.greeted {
            return Ok(());
        }
        let Some(control) = &mut self.control else { return Ok(()) };
        let flushed = control.flush();
        // Kept from one call to the next: answers come by the millisecond while something hangs on them.
        let mut frames = std::mem::take(&mut self.frames);
        let result = control.receive(&mut frames);
        for frame in frames.drain(..) {
            if let TargetFrame::Pong { nonce, lanes } = frame {
                self.gauge.pong_came(nonce);
                self.pongs = lanes;
                continue;
            }
            self.event(SourceEvent::Frame(frame))?;
        }
        self.frames = frames;
        // Last: what the target said before it left says more than a broken pipe.
        match (result, flushed) {
            (Err(e), _) => self.control_lost(e.into_failure("waiting for the target")),
            (Ok(()), Err(e)) => self.control_lost(Failure::Control { doing: "sending on it", reason: e.into() }),
            (Ok(()), Ok(())) => Ok(()),
        }
    }

    /// Another round begins. Where the wire has a word for it, it is said when all channels have sent the end of the round
    /// before, or what they begin with: a target that hears it waits for that, and may wait for ever where a channel was cut
    /// off before it. Not later, as it holds back what comes behind that end.
    pub fn round_begins(&mut self) -> Result<(), Over> {
        let round = self.session.round();
        if self.begun == Some(round) {
            return Ok(());
        }
        while self.begins.is_some() {
            self.service(true)?;
        }
        (self.begun, self.begins) = (Some(round), Some(round));
        self.say_that_a_round_begins()
    }

    /// Whether the target has been told of all rounds that have been pushed. Where it says itself what has landed, nobody
    /// asks.
    pub fn all_is_told(&self) -> bool {
        self.settings.framing.mends() || (self.begins.is_none() && self.owed_on_control() == 0)
    }

    pub fn say_that_a_round_begins(&mut self) -> Result<(), Over> {
        let Some(round) = self.begins else { return Ok(()) };
        let are_ready = |lanes: &Lanes| match round.0.checked_sub(1) {
            Some(before) => lanes.all_sent(Round(before)),
            None => lanes.all_have_begun(),
        };
        if !self.settings.framing.mends() && !self.lanes.as_ref().is_some_and(are_ready) {
            return Ok(());
        }
        self.begins = None;
        // What the socket refuses is found again, by `receive`.
        match self.control.as_mut().map(|control| control.round_begins(round)) {
            Some(Err(e)) => e.own_mistake().map_or(Ok(()), |why| self.fail(why)),
            _ => Ok(()),
        }
    }

    /// Listens for the target's Hello, which comes before its first frame.
    pub fn hear_hello(&mut self) -> Result<(), Over> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let flushed = control.flush();
        match control.receive_hello() {
            Ok(Some(hello)) => {
                if hello.session != self.id || hello.side != Side::Target || hello.role != HelloRole::Control {
                    return self.fail(Failure::Protocol("its Hello is for another connection".to_owned()));
                }
                self.greeted = true;
                Ok(())
            }
            Ok(None) => match flushed {
                Ok(()) => Ok(()),
                Err(e) => self.control_lost(Failure::Control { doing: "sending on it", reason: e.into() }),
            },
            Err(e) => self.control_lost(e.into_failure("waiting for the target's Hello")),
        }
    }

    /// The control connection is of no use any more.
    pub fn control_lost(&mut self, why: Failure) -> Result<(), Over> {
        self.event(SourceEvent::ControlLost(why))?;
        // On its way back, and lost once more.
        Err(Over)
    }

    /// Sends the device state that has been written so far, as fast as the control connection takes it.
    pub fn send_state(&mut self) -> Result<(), Over> {
        /// State that may wait in memory here beside what waits in the writer.
        const UNSENT_BYTES_MAX: usize = 4 << 20;
        while self.control.as_ref().is_some_and(|c| c.unsent_bytes() < UNSENT_BYTES_MAX) {
            let Some(bytes) = self.state.pop() else { break };
            self.state_crc.update(&bytes);
            let offset = self.state_bytes;
            self.state_bytes += bytes.len() as u64;
            self.act(SourceAction::Send(SourceFrame::State { offset, bytes }))?;
        }
        Ok(())
    }

    /// Counts time that this thread spent in a hook of the VMM as if the target had been heard.
    pub fn excuse_silence(&mut self) {
        if let Some(control) = &mut self.control {
            control.excuse_silence();
        }
        self.gauge.forget_ping();
    }
}
