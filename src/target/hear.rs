#![forbid(unsafe_code)]
//! What the target hears on the control connection, and how long it waits for more. Where the control connection carries
//! pages, it is a member of the barrier that the lanes meet at: then nothing of it is heard while it waits there, and its
//! last words count when the lanes have read to their ends.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::framing::Heard;
use crate::net::Control;
use crate::progress::Stage;
use crate::session::target::TargetEvent;
use crate::target::driver::{Driver, Over};
use crate::target::lanes::Lanes;
use crate::units::{BlockId, ChannelId, Round};
use crate::wire::control::{Final, SourceFrame};

/// Pages that came on the control connection, and the rounds that end there.
#[derive(Debug)]
pub(super) struct Meeting {
    /// The round at whose end it waits, and whether the lanes have been told.
    held: Option<(Round, bool)>,
    /// The round that is under way on it.
    round: Round,
    pub data_bytes: u64,
    pub zero_bytes: u64,
    /// Bytes that came on all connections or landed from this one, and when they last became more.
    moved: (u64, Instant),
    parting: Option<Parting>,
}

/// The source has said all that it says on the control connection. It counts once every lane has read to its end: a
/// channel that goes on behind the last round is out of step, whatever else has come.
#[derive(Debug)]
struct Parting {
    last: Final,
    since: Instant,
    /// The lanes end with what has come: the source leaves its channels open, or has not ended them in time.
    drained: bool,
}

impl Meeting {
    pub fn new() -> Meeting {
        let moved = (0, Instant::now());
        Meeting { held: None, round: Round(0), data_bytes: 0, zero_bytes: 0, moved, parting: None }
    }
}

impl Driver<'_> {
    pub fn receive_frames(&mut self) -> Result<(), Over> {
        if self.meeting.held.is_some() {
            // What was answered before goes out although nothing is heard here: a sleep would end at once for it.
            if let Some(Err(e)) = self.control.as_mut().map(|control| control.flush()) {
                return self.control_lost(Failure::Control { doing: "sending on it", reason: e.into() });
            }
        }
        while self.may_hear() {
            let Driver { control: Some(control), lanes, meeting, .. } = self else { return Ok(()) };
            let flushed = control.flush();
            let (mut frames, mut refused) = (Vec::new(), None);
            let received = control.hear(|heard| match heard {
                Heard::Frame(frame) => {
                    frames.push(frame);
                    ControlFlow::Continue(())
                }
                Heard::Barrier(round) => {
                    meeting.held = Some((round, false));
                    meeting.round = Round(round.0.saturating_add(1));
                    ControlFlow::Break(())
                }
                Heard::Page { block, offset, bytes } => {
                    meeting.data_bytes += bytes.len() as u64;
                    let landed = lanes.as_ref().is_some_and(|lanes| lanes.land(meeting.round, block, offset, bytes));
                    stop_unless(landed, block, &mut refused)
                }
                Heard::Zero { block, page } => {
                    let landed = lanes.as_ref().and_then(|lanes| lanes.land_zero(meeting.round, block, page));
                    meeting.zero_bytes += landed.unwrap_or(0);
                    stop_unless(landed.is_some(), block, &mut refused)
                }
            });
            let is_held = meeting.held.is_some();
            for frame in frames {
                if matches!(frame, SourceFrame::Final(_)) {
                    self.final_at = Some(Instant::now());
                    self.progress.stage(Stage::HandOver);
                }
                match frame {
                    SourceFrame::Final(last) if self.settings.framing.control_meets() => self.begin_parting(last),
                    frame => self.event(TargetEvent::Frame(frame))?,
                }
            }
            if let Some(block) = refused {
                let why = format!("a page of block {block} came, and nothing can be written there");
                return self.event(TargetEvent::Failed(Failure::Protocol(why)));
            }
            if let Err(e) = received {
                return self.control_lost(e.into_failure("waiting for the source"));
            }
            if let Err(e) = flushed {
                return self.control_lost(Failure::Control { doing: "sending on it", reason: e.into() });
            }
            if !is_held {
                break;
            }
        }
        Ok(())
    }

    /// Whether the control connection does not wait at the barrier, or everybody is there now.
    fn may_hear(&mut self) -> bool {
        let (Some((round, told)), lanes) = (&mut self.meeting.held, &self.lanes) else { return true };
        // The lanes begin when all channels are there.
        let Some(lanes) = lanes else { return false };
        if !std::mem::replace(told, true) {
            lanes.pass_control(*round);
        }
        if lanes.may_go(*round) {
            self.meeting.held = None;
        }
        self.meeting.held.is_none()
    }

    /// Whether more is to be read from the control connection; and whether something is known of it already.
    pub fn listens(&self) -> (bool, bool) {
        let open = self.meeting.held.is_none();
        match &self.control {
            Some(control) if open => (!control.is_over(), control.has_news()),
            _ => (false, false),
        }
    }

    /// The control connection is of no use any more.
    pub fn control_lost(&mut self, why: Failure) -> Result<(), Over> {
        self.lost = why.to_string();
        self.event(TargetEvent::ControlLost(why))
    }

    /// A lane that has ended although the control connection waits for it at the barrier.
    pub fn look_for_the_missing(&mut self) -> Result<(), Over> {
        let Some((round, _)) = self.meeting.held else { return Ok(()) };
        let Some(channel) = self.lanes.as_ref().and_then(|lanes| lanes.ended_before(round)) else { return Ok(()) };
        let reason = format!("the source closed it before the end of round {round}");
        self.channel_lost(channel, reason)
    }

    /// A source that has ended the control connection ends its channels, too: each is read up to there. One that waits for
    /// an answer leaves them open; but what it sent on them it sent before its last words here, so that it has come by now,
    /// as far as anybody can know.
    fn begin_parting(&mut self, last: Final) {
        let drained = !self.control.as_ref().is_some_and(Control::is_over);
        self.meeting.parting = Some(Parting { last, since: Instant::now(), drained });
        if drained {
            self.drain();
        }
    }

    fn drain(&self) {
        if let Some(lanes) = &self.lanes {
            lanes.drain();
        }
    }

    /// What the source said last counts once no lane has anything left to read.
    pub fn end_parting(&mut self) -> Result<(), Over> {
        match self.meeting.parting.take_if(|_| self.lanes.as_ref().is_none_or(Lanes::all_ended)) {
            Some(parting) => self.event(TargetEvent::Frame(SourceFrame::Final(parting.last))),
            None => Ok(()),
        }
    }

    /// A channel is lost, which nothing can mend.
    pub fn channel_lost(&mut self, channel: ChannelId, reason: String) -> Result<(), Over> {
        let generation = self.session.generation(channel);
        self.event(TargetEvent::Failed(Failure::Channel { channel, generation, reason }))
    }

    /// Looks whether any connection has brought anything.
    fn note_movement(&mut self) {
        let control = self.control.as_ref().map_or(0, |control| control.wire_bytes());
        let bytes = self.progress.channels().wire_bytes + control + self.meeting.data_bytes + self.meeting.zero_bytes;
        if bytes != self.meeting.moved.0 {
            self.meeting.moved = (bytes, Instant::now());
        }
    }

    /// Since when the target waits for the source, until when, and for what. Setup is due at once, whatever else is said.
    pub fn deadline(&mut self) -> Option<(Instant, Instant, &'static str)> {
        if let Some(since) = self.dormant_since {
            return Some((since, since + self.settings.resume_window, self.session.waits_for()));
        }
        if self.settings.framing.control_meets() {
            return self.deadline_of_meeting();
        }
        let timeouts = &self.settings.timeouts;
        let heard = self.control.as_ref()?.heard();
        let (since, limit) = match (self.begun, self.loaded_at) {
            (Some(begun), None) if self.channels == 0 => (begun, timeouts.hello),
            // An honest source answers Loaded at once. Pings that come instead show that no Commit is under way: frames
            // arrive in order.
            (_, Some(loaded)) => (loaded, timeouts.silence),
            _ => (heard, timeouts.silence),
        };
        Some((since, since + limit, self.session.waits_for()))
    }

    /// A source that does not ask may say nothing for as long as it likes. But once somebody waits at the barrier, the
    /// others are on their way.
    fn deadline_of_meeting(&mut self) -> Option<(Instant, Instant, &'static str)> {
        let (hello, silence) = (self.settings.timeouts.hello, self.settings.timeouts.silence);
        let due = |since: Instant, limit: Duration, what| Some((since, since + limit, what));
        // Those who may be the source have limits of their own.
        let prepared = self.prepared_at?;
        if self.session.awaits_channels() {
            return due(prepared, hello, "the data channels");
        }
        if let Some(parting) = &self.meeting.parting {
            return due(parting.since, silence, "the end of its channels");
        }
        self.note_movement();
        let lanes = self.lanes.as_ref();
        if self.meeting.held.is_some() || lanes.is_some_and(Lanes::someone_waits) {
            let what = "the end of the round, which some of the connections have come to, on the others";
            return due(self.meeting.moved.1, silence, what);
        }
        if lanes.is_some_and(Lanes::any_ended) && self.final_at.is_none() {
            return due(self.meeting.moved.1, silence, "the main connection, although channels have ended");
        }
        // The guest stands still by then. One that QEMU does not describe (suppress-vmdesc) has no end that can be seen.
        if !self.state.is_empty() && self.final_at.is_none() {
            // QEMU flushes its disks in the midst of it.
            let hook = self.settings.timeouts.hook;
            return due(self.meeting.moved.1, hook, "the rest of the device state, and its description");
        }
        None
    }

    pub fn check_time(&mut self) -> Result<(), Over> {
        match self.deadline() {
            Some((since, deadline, waiting_for)) if Instant::now() >= deadline => {
                let ms = since.elapsed().as_millis() as u64;
                if self.session.is_dormant() {
                    let lost = self.lost.clone();
                    return self.event(TargetEvent::Failed(Failure::NotResumed { ms, lost }));
                }
                // What has come and is not read is no silence of the source's.
                let is_slow = self.lanes.as_ref().is_some_and(Lanes::leaves_unread);
                if is_slow && self.settings.framing.control_meets() && self.meeting.parting.is_none() {
                    self.meeting.moved.1 = Instant::now();
                    return Ok(());
                }
                if let Some(parting @ Parting { drained: false, .. }) = &mut self.meeting.parting {
                    (parting.drained, parting.since) = (true, Instant::now());
                    let what = "the source ended the main connection, but not its channels: all that had come was taken";
                    self.remark(what.to_owned());
                    self.drain();
                    return Ok(());
                }
                self.control_lost(Failure::Silent { waiting_for, ms })
            }
            _ => Ok(()),
        }
    }
}

fn stop_unless(landed: bool, block: BlockId, refused: &mut Option<BlockId>) -> ControlFlow<()> {
    if landed {
        return ControlFlow::Continue(());
    }
    *refused = Some(block);
    ControlFlow::Break(())
}
