#![forbid(unsafe_code)]
//! Drives the target's session: does what its actions say, and tells it what happens.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::channel::records::Records;
use crate::config::CrewOptions;
use crate::digest::DigestTable;
use crate::error::{Failure, Outcome};
use crate::gate::Gate;
use crate::memory::Ram;
use crate::net::{Control, Listener, Lobby, Stream};
use crate::poll::PollSleeper;
use crate::progress::{Progress, Stage};
use crate::session::source::FIRST_GENERATION;
use crate::session::target::{TargetAction, TargetEvent, TargetSession};
use crate::sys::random::random_16;
use crate::target::early::Early;
use crate::target::hear::Meeting;
use crate::target::lanes::{LaneGear, Lanes};
use crate::target::witness::{Testimony, Witness, may_be_in_doubt};
use crate::target::{Incoming, Settings, Target, TargetReport};
use crate::target::door::Visitor;
use crate::units::{ChannelId, Generation, InstanceId, SessionId, Verify};
use crate::wire::control::{BlockInfo, Final, STATE_CHUNK_BYTES_MAX, Setup, SourceFrame, TargetFrame};

/// The session has ended: whoever sees it goes back to [`receive`], and does nothing else.
pub(super) struct Over;

pub(super) struct Driver<'a> {
    incoming: &'a mut dyn Incoming,
    pub settings: Settings,
    options: CrewOptions,
    pub listener: Listener,
    pub bell: Bell<PollSleeper>,
    gate: Gate,
    pub progress: Progress,
    pub session: TargetSession,
    pub lobby: Lobby,
    pub accept_again: Option<Instant>,
    pub turned_away: u64,
    pub control: Option<Control<TargetFrame, SourceFrame>>,
    /// The generation of that connection.
    pub control_generation: Generation,
    /// A second control connection, of which the first frame says what it wants.
    pub visitor: Option<Visitor>,
    pub dormant_since: Option<Instant>,
    /// How the control connection was lost last.
    pub lost: String,
    channels_lost: u32,
    resumes: u32,
    pub id: SessionId,
    pub verify: Verify,
    pub channels: u8,
    /// Who came before it was known whose migration this is.
    pub early: Early,
    pub ram: Option<Ram>,
    pub blocks: Arc<[BlockInfo]>,
    pub prepared_at: Option<Instant>,
    /// Data connections whose lanes have not begun, and their generations.
    pub streams: Vec<Option<(Stream, Generation)>>,
    pub lanes: Option<Lanes>,
    pub meeting: Meeting,
    /// Where the hashes of what lands go.
    pub records: Records,
    pub state: Vec<Vec<u8>>,
    pub outcome: Option<Outcome>,
    /// Whether what landed is being compared with a Final, and a Final that came meanwhile.
    pub checking: bool,
    pub next_check: Option<Final>,
    pub begun: Option<Instant>,
    pub final_at: Option<Instant>,
    pub loaded_at: Option<Instant>,
    pub rounds: u32,
    pub remarks: Vec<String>,
}

pub(super) fn receive(target: Target, incoming: &mut dyn Incoming) -> (TargetReport, Witness) {
    let Target { settings, crew, listener, bell, gate, progress } = target;
    let resumes = settings.framing.mends() && !settings.resume_window.is_zero();
    let session = TargetSession::new(settings.state_bytes_max, resumes);
    let lobby = Lobby::new(settings.framing.clone());
    let mut driver = Driver {
        incoming,
        settings,
        options: crew,
        listener,
        bell,
        gate,
        progress,
        session,
        lobby,
        accept_again: None,
        turned_away: 0,
        control: None,
        control_generation: FIRST_GENERATION,
        visitor: None,
        dormant_since: None,
        lost: String::new(),
        channels_lost: 0,
        resumes: 0,
        id: SessionId([0; 16]),
        verify: Verify::Off,
        channels: 0,
        early: Early::default(),
        ram: None,
        blocks: Arc::new([]),
        prepared_at: None,
        streams: Vec::new(),
        lanes: None,
        meeting: Meeting::new(),
        records: Records::default(),
        state: Vec::new(),
        outcome: None,
        checking: false,
        next_check: None,
        begun: None,
        final_at: None,
        loaded_at: None,
        rounds: 0,
        remarks: Vec::new(),
    };
    while driver.service().is_ok() {}
    driver.finish()
}

impl Driver<'_> {
    /// Deals with what has happened, and waits for more. Ready-made connections are there before the first wait, which
    /// nothing would end.
    pub fn service(&mut self) -> Result<(), Over> {
        if self.gate.is_cancelled() {
            self.event(TargetEvent::CancelAsked)?;
        }
        self.accept()?;
        self.greet()?;
        self.hear_applicants()?;
        self.miss_source()?;
        self.seat_channels()?;
        self.receive_frames()?;
        self.hear_visitor()?;
        self.look_at_lanes()?;
        self.end_parting()?;
        self.check_time()?;
        self.sleep();
        Ok(())
    }

    fn sleep(&mut self) {
        let deadline = self.deadline();
        let (listens, has_news) = self.listens();
        let set = self.bell.sleeper().set();
        set.clear();
        match (self.accept_again, self.listener.fd()) {
            (Some(when), _) => set.until(when),
            (None, Some(fd)) => {
                set.watch(fd, true, false);
            }
            (None, None) => {}
        }
        self.lobby.watch(set);
        self.early.watch(set, self.session.awaits_channels(), self.settings.timeouts.hello);
        if let Some(control) = self.control.as_ref().filter(|control| listens || control.unsent_bytes() > 0) {
            set.watch(control.fd(), listens, control.unsent_bytes() > 0);
        }
        if has_news {
            set.until(Instant::now());
        }
        if let Some(visitor) = &self.visitor {
            set.watch(visitor.control.fd(), true, visitor.control.unsent_bytes() > 0);
            set.until(visitor.until);
        }
        if let Some((_, deadline, _)) = deadline {
            set.until(deadline);
        }
        self.bell.wait();
    }

    fn look_at_lanes(&mut self) -> Result<(), Over> {
        while let Some(event) = self.lanes.as_mut().and_then(Lanes::poll_moved) {
            self.event(event)?;
        }
        while let Some((channel, reason, is_ours)) = self.lanes.as_mut().and_then(Lanes::poll_failed) {
            // If the source has said why it closed its channels, that is the reason to report.
            self.receive_frames()?;
            self.remark(format!("data channel {channel} failed: {reason}"));
            if is_ours || !self.settings.framing.mends() {
                return self.channel_lost(channel, reason);
            }
            self.event(TargetEvent::LaneFailed { channel, reason })?;
        }
        self.look_for_the_missing()
    }

    /// Tells the session what happened, and does what it says. `Err` when it has ended.
    pub fn event(&mut self, event: TargetEvent) -> Result<(), Over> {
        for action in self.session.on(event) {
            self.act(action)?;
        }
        if self.outcome.is_some() { Err(Over) } else { Ok(()) }
    }

    fn act(&mut self, action: TargetAction) -> Result<(), Over> {
        match action {
            TargetAction::Send(frame) => {
                let Some(control) = &mut self.control else { return Ok(()) };
                // What the socket refuses is found again, by `receive_frames`, after everything that the source said
                // before it left. Frames after the end are courtesy.
                match control.send(&frame).err().and_then(|e| e.own_mistake()) {
                    Some(why) if !self.session.is_ended() => self.event(TargetEvent::Failed(why)),
                    _ => Ok(()),
                }
            }
            TargetAction::Prepare(setup) => {
                let event = match self.prepare(&setup) {
                    Ok(instance) => TargetEvent::Prepared(instance),
                    Err(reason) => TargetEvent::Refused(reason),
                };
                self.excuse_silence();
                self.prepared_at = Some(Instant::now());
                self.early.ready();
                self.event(event)
            }
            TargetAction::StartLanes => match self.start_lanes() {
                Ok(()) => Ok(()),
                Err(why) => self.event(TargetEvent::Failed(why)),
            },
            TargetAction::StartLane { channel } => match self.start_lane(channel) {
                Ok(()) => Ok(()),
                // It is in the set all the same, until the source says that it is lost.
                Err(why) => self.event(TargetEvent::LaneFailed { channel, reason: why.to_string() }),
            },
            TargetAction::RetireLane { channel } => {
                // A load that came to nothing: no Commit is waited for.
                (self.final_at, self.loaded_at) = (None, None);
                self.channels_lost += 1;
                self.streams[usize::from(channel.0)] = None;
                if let Some(lanes) = &mut self.lanes {
                    lanes.retire(channel);
                }
                Ok(())
            }
            TargetAction::DropControl => {
                self.control = None;
                self.dormant_since = self.session.is_dormant().then(Instant::now);
                Ok(())
            }
            TargetAction::TakeVisitor => {
                if let Some(visitor) = self.visitor.take() {
                    self.control = Some(visitor.control);
                    self.control_generation = visitor.generation;
                }
                self.dormant_since = None;
                self.resumes += 1;
                self.streams.iter_mut().for_each(|stream| *stream = None);
                self.excuse_silence();
                Ok(())
            }
            TargetAction::AnswerVisitor(frame) => {
                if let Some(mut visitor) = self.visitor.take() {
                    // Courtesy where it is a refusal; where it is an answer, whoever asked can ask again.
                    let _ = visitor.control.send(&frame);
                    visitor.control.farewell(self.bell.sleeper().set(), LAST_WORDS);
                }
                Ok(())
            }
            TargetAction::KeepState(bytes) => {
                // Pieces are as small as the source likes: kept one by one they could cost many times their bytes.
                match self.state.last_mut() {
                    Some(last) if last.len() + bytes.len() <= STATE_CHUNK_BYTES_MAX => last.extend_from_slice(&bytes),
                    _ => self.state.push(bytes),
                }
                Ok(())
            }
            TargetAction::ForgetState => {
                self.state.clear();
                // Whatever was loaded of it is loaded anew: the guest runs at the source, and rounds go on.
                (self.final_at, self.loaded_at) = (None, None);
                self.progress.stage(Stage::Precopy);
                Ok(())
            }
            TargetAction::Pong { nonce } => {
                let lanes = self.lanes.as_ref().map_or_else(Vec::new, Lanes::pongs);
                self.act(TargetAction::Send(TargetFrame::Pong { nonce, lanes }))
            }
            TargetAction::Check(last) => {
                // Frames are heard while a check goes on: one of them can void it, and another Final can follow.
                if self.next_check.replace(last).is_some() || self.checking {
                    return Ok(());
                }
                self.checking = true;
                let mut check = None;
                while let Some(last) = self.next_check.take() {
                    check = self.check(&last)?;
                }
                self.checking = false;
                check.map_or(Ok(()), |check| self.event(TargetEvent::Checked(check)))
            }
            TargetAction::LoadState => {
                let loaded = self.incoming.load_state(&mut Pieces { pieces: &self.state, at: 0 });
                self.excuse_silence();
                self.loaded_at = loaded.is_ok().then(Instant::now);
                self.event(TargetEvent::StateLoaded(loaded.map_err(|e| e.to_string())))
            }
            TargetAction::Run => {
                // No lane outlives the hand-over: from here on only the guest writes its RAM.
                self.end_lanes();
                let ran = if self.gate.commit() {
                    self.incoming.run().map_err(|e| e.to_string())
                } else {
                    Err("cancelled at the target".to_owned())
                };
                self.event(TargetEvent::RunReturned(ran))
            }
            TargetAction::Discard => {
                self.end_lanes();
                self.incoming.discard();
                Ok(())
            }
            TargetAction::End(outcome) => {
                self.outcome = Some(outcome);
                Ok(())
            }
        }
    }

    /// Gets the VMM's memory and makes it read as zeros.
    fn prepare(&mut self, setup: &Setup) -> Result<InstanceId, String> {
        self.verify = setup.verify;
        self.channels = setup.channels;
        let ram = self.incoming.prepare(setup).map_err(|e| e.to_string())?;
        match self.take_in(setup, &ram) {
            Ok(instance) => {
                self.progress.set(|c| &c.ram_bytes, ram.bytes());
                self.progress.stage(Stage::Precopy);
                self.ram = Some(ram);
                Ok(instance)
            }
            Err(reason) => {
                // The hook has succeeded: it is undone.
                self.incoming.discard();
                Err(reason)
            }
        }
    }

    fn take_in(&mut self, setup: &Setup, ram: &Ram) -> Result<InstanceId, String> {
        if ram.blocks().len() != setup.blocks.len() {
            return Err(format!("{} RAM blocks were sent, {} prepared", setup.blocks.len(), ram.blocks().len()));
        }
        for (sent, own) in setup.blocks.iter().zip(ram.blocks()) {
            if (sent.bytes, sent.page_size) != (own.bytes(), own.page_size()) {
                return Err(format!(
                    "block {} has {} bytes in pages of {}, {} bytes in pages of {} were prepared",
                    sent.id,
                    sent.bytes,
                    sent.page_size,
                    own.bytes(),
                    own.page_size()
                ));
            }
            own.make_zero().map_err(|e| format!("block {} cannot be made zero: {e}", sent.id))?;
        }
        if setup.verify != Verify::Off {
            let table = DigestTable::new(self.id, &ram.shapes()).map_err(|e| format!("no memory for page digests: {e}"))?;
            self.records.digests = Some(Arc::new(table));
        }
        self.records.contents = self.incoming.contents();
        if self.records.contents.as_ref().is_some_and(|contents| !contents.fits(&ram.shapes())) {
            return Err("the hashes that are to be kept are not of the prepared blocks".to_owned());
        }
        self.streams.resize_with(setup.channels.into(), || None);
        self.blocks = setup.blocks.clone().into();
        random_16().map(InstanceId).map_err(|e| format!("no random number for the instance: {e}"))
    }

    fn start_lanes(&mut self) -> Result<(), Failure> {
        let Some(ram) = &self.ram else { return Ok(()) };
        let mut streams = Vec::new();
        for stream in &mut self.streams {
            streams.push(stream.take().map(|(stream, _)| ready(stream)).transpose()?);
        }
        let gear = LaneGear {
            ram: ram.clone(),
            framing: self.settings.framing.clone(),
            blocks: self.blocks.clone(),
            records: self.records.clone(),
            controller: self.bell.ringer(),
            progress: self.progress.clone(),
        };
        self.lanes = Some(Lanes::muster(streams, gear, &self.options)?);
        Ok(())
    }

    /// Starts the lane of a channel that is connected again.
    fn start_lane(&mut self, channel: ChannelId) -> Result<(), Failure> {
        let waiting = self.streams.get_mut(usize::from(channel.0)).and_then(Option::take);
        match (&mut self.lanes, waiting) {
            (Some(lanes), Some((stream, generation))) => lanes.start(channel, generation, ready(stream)?),
            _ => Err(Failure::Worker("internal error: a channel without a socket has joined".to_owned())),
        }
    }

    /// Counts time that this thread spent in a hook of the VMM as if the source had been heard.
    fn excuse_silence(&mut self) {
        if let Some(control) = &mut self.control {
            control.excuse_silence();
        }
    }

    fn end_lanes(&mut self) {
        if let Some(lanes) = &mut self.lanes {
            lanes.end();
        }
    }

    fn finish(mut self) -> (TargetReport, Witness) {
        self.end_lanes();
        let outcome = self.outcome.take().unwrap_or_else(|| {
            Outcome::Failed(Failure::Worker("internal error: the migration ended without an outcome".to_owned()))
        });
        let total = self.begun.map_or(Duration::ZERO, |at| at.elapsed());
        let downtime = match (&outcome, self.final_at) {
            (Outcome::Completed, Some(at)) => at.elapsed(),
            _ => Duration::ZERO,
        };
        let mut control = self.control.take();
        let set = self.bell.sleeper().set();
        let (last_word, whole) = control.as_mut().map_or((None, false), |c| c.part(set, LAST_WORDS));
        // Where nobody can ask later, it is worth a wait to know.
        let waits = outcome == Outcome::Completed && !self.settings.framing.mends();
        let patience = if waits { ACKNOWLEDGED } else { Duration::ZERO };
        let source_told = whole && control.as_mut().is_some_and(|c| c.is_taken_in(set, patience));
        let control_bytes = control.as_ref().map_or(0, Control::wire_bytes);
        self.progress.stage(Stage::Ended);
        let counts = self.progress.channels();
        let ram_bytes = self.ram.as_ref().map_or(0, Ram::bytes);
        let turned_away = self.turned_away + self.lobby.turned_away();
        let witness = Witness::new(Testimony {
            listener: self.listener,
            bell: self.bell,
            lobby: self.lobby,
            session: self.begun.map(|_| self.id),
            visitor: self.visitor.map(|visitor| visitor.control),
            runs: outcome == Outcome::Completed,
            in_doubt: self.loaded_at.is_some() && may_be_in_doubt(&outcome, last_word.as_ref()),
            source: control,
            hello: self.settings.timeouts.hello,
            tls: self.settings.tls,
        });
        let report = TargetReport {
            verified: outcome == Outcome::Completed && self.verify != Verify::Off,
            verify: self.verify,
            ram_bytes,
            payload_bytes: counts.payload_bytes + self.meeting.data_bytes,
            wire_bytes: counts.wire_bytes + control_bytes,
            zero_bytes: counts.zero_bytes + self.meeting.zero_bytes,
            untouched_bytes: ram_bytes - self.lanes.as_ref().map_or(0, Lanes::named_bytes),
            state_bytes: self.state.iter().map(|piece| piece.len() as u64).sum(),
            rounds: self.rounds,
            channels: self.channels,
            total,
            downtime,
            prefaulted_bytes: counts.prefaulted_bytes,
            recv_syscalls: counts.syscalls,
            cpus: self.lanes.as_ref().map_or_else(Vec::new, |lanes| lanes.cpus().collect()),
            turned_away,
            session: self.id,
            source_told,
            channels_lost: self.channels_lost,
            resumes: self.resumes,
            repairs: self.session.mismatches(),
            outcome,
            remarks: self.remarks,
        };
        (report, witness)
    }
}

/// A data connection as a lane uses it.
fn ready(mut stream: Stream) -> Result<Stream, Failure> {
    let ready = stream.set_nonblocking(false).map(|()| stream);
    ready.map_err(|e| Failure::Worker(format!("a data socket: {e}")))
}

/// How long the target tries to get its last frames out.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// How long it waits, then, for a source that cannot ask how it ended to acknowledge them: a few round trips, and one that
/// was lost.
const ACKNOWLEDGED: Duration = Duration::from_secs(3);

/// The pieces of device state, read as one.
struct Pieces<'a> {
    pieces: &'a [Vec<u8>],
    at: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while let Some((first, rest)) = self.pieces.split_first() {
            let left = &first[self.at..];
            if left.is_empty() {
                self.pieces = rest;
                self.at = 0;
                continue;
            }
            let n = left.len().min(into.len());
            into[..n].copy_from_slice(&left[..n]);
            self.at += n;
            return Ok(n);
        }
        Ok(0)
    }
}
