#![forbid(unsafe_code)]
//! Drives the target's session: does what its actions say, and tells it what happens.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::config::CrewOptions;
use crate::crew::Alarm;
use crate::digest::{BlockShape, DigestTable};
use crate::error::{Failure, Outcome};
use crate::gate::Gate;
use crate::memory::{Ram, full};
use crate::net::{Control, Greeting, Listener, Lobby, Stream, passes};
use crate::poll::PollSleeper;
use crate::progress::{Progress, Stage};
use crate::session::source::FIRST_GENERATION;
use crate::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use crate::sys::random::random_16;
use crate::target::lanes::{LaneGear, Lanes};
use crate::target::{Incoming, Settings, Target, TargetReport};
use crate::units::{BlockId, Generation, InstanceId, SessionId, Verify};
use crate::wire::control::{Final, STATE_CHUNK_BYTES_MAX, Setup, SourceFrame, TargetFrame};
use crate::wire::crc::Crc32c;
use crate::wire::hello::{Hello, HelloRole, Side};

/// The session has ended: whoever sees it goes back to [`receive`], and does nothing else.
struct Over;

struct Driver<'a> {
    incoming: &'a mut dyn Incoming,
    settings: Settings,
    options: CrewOptions,
    listener: Listener,
    bell: Bell<PollSleeper>,
    gate: Gate,
    progress: Progress,
    session: TargetSession,
    lobby: Lobby,
    accept_again: Option<Instant>,
    turned_away: u64,
    control: Option<Control<TargetFrame, SourceFrame>>,
    id: SessionId,
    verify: Verify,
    channels: u8,
    ram: Option<Ram>,
    streams: Vec<Option<Stream>>,
    lanes: Option<Lanes>,
    digests: Option<Arc<DigestTable>>,
    state: Vec<Vec<u8>>,
    outcome: Option<Outcome>,
    begun: Option<Instant>,
    final_at: Option<Instant>,
    loaded_at: Option<Instant>,
    rounds: u32,
    remarks: Vec<String>,
}

pub(super) fn receive(target: Target, incoming: &mut dyn Incoming) -> TargetReport {
    let Target { settings, crew, listener, bell, gate, progress } = target;
    let session = TargetSession::new(settings.state_bytes_max);
    let mut driver = Driver {
        incoming,
        settings,
        options: crew,
        listener,
        bell,
        gate,
        progress,
        session,
        lobby: Lobby::default(),
        accept_again: None,
        turned_away: 0,
        control: None,
        id: SessionId([0; 16]),
        verify: Verify::Off,
        channels: 0,
        ram: None,
        streams: Vec::new(),
        lanes: None,
        digests: None,
        state: Vec::new(),
        outcome: None,
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
    fn service(&mut self) -> Result<(), Over> {
        if self.gate.is_cancelled() {
            self.event(TargetEvent::CancelAsked)?;
        }
        self.accept()?;
        self.greet()?;
        self.receive_frames()?;
        self.look_at_lanes()?;
        self.check_time()?;
        self.sleep();
        Ok(())
    }

    fn sleep(&mut self) {
        let deadline = self.deadline();
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
        if let Some(control) = &self.control {
            set.watch(control.fd(), true, control.unsent_bytes() > 0);
        }
        if let Some((_, deadline)) = deadline {
            set.until(deadline);
        }
        self.bell.wait();
    }

    /// Since when the target waits for the source, and until when. Setup is due at once, whatever else is said.
    fn deadline(&self) -> Option<(Instant, Instant)> {
        let timeouts = &self.settings.timeouts;
        let heard = self.control.as_ref()?.heard();
        let (since, limit) = match (self.begun, self.loaded_at) {
            (Some(begun), None) if self.channels == 0 => (begun, timeouts.hello),
            // An honest source answers Loaded at once. Pings that come instead show that no Commit is under way: frames
            // arrive in order.
            (_, Some(loaded)) => (loaded, timeouts.silence),
            _ => (heard, timeouts.silence),
        };
        Some((since, since + limit))
    }

    fn check_time(&mut self) -> Result<(), Over> {
        match self.deadline() {
            Some((since, deadline)) if Instant::now() >= deadline => {
                let ms = since.elapsed().as_millis() as u64;
                self.event(TargetEvent::Failed(Failure::Silent { waiting_for: self.session.waits_for(), ms }))
            }
            _ => Ok(()),
        }
    }

    fn accept(&mut self) -> Result<(), Over> {
        if self.accept_again.is_some_and(|when| Instant::now() < when) {
            return Ok(());
        }
        self.accept_again = None;
        // Ready-made connections wait for a source that may be slow to speak; strangers do not get that time.
        let ready = matches!(self.listener, Listener::Ready(_));
        let patience = if ready { Duration::from_secs(24 * 3600) } else { self.settings.timeouts.hello };
        for _ in 0..ACCEPTS_MAX {
            let accepted = self.listener.accept().and_then(|socket| {
                let Some(socket) = socket else { return Ok(None) };
                let stream = match &self.settings.tls {
                    None => Stream::from(socket),
                    Some(tls) => tls.accept(socket, self.control.is_none())?,
                };
                self.lobby.enter(stream, patience).map(Some)
            });
            match accepted {
                Ok(Some(())) => {}
                Ok(None) => return Ok(()),
                // Out of descriptors, say: those who are here already are served all the same, and the listener, which
                // stays ready, is left alone for a while.
                Err(e) if self.control.is_some() || passes(&e) => {
                    self.lobby.make_room();
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    if self.remarks.len() < REMARKS_MAX {
                        self.remarks.push(format!("a connection could not be accepted: {e}"));
                    }
                    return Ok(());
                }
                Err(e) => {
                    let address = self.listener.address().map_or_else(String::new, |a| a.to_string());
                    return self.event(TargetEvent::Failed(Failure::Listen { address, reason: e.into() }));
                }
            }
        }
        Ok(())
    }

    fn greet(&mut self) -> Result<(), Over> {
        for greeting in self.lobby.listen() {
            match greeting {
                Greeting::Hello(stream, hello) => self.greet_one(stream, &hello)?,
                Greeting::Stranger(why) => {
                    if self.remarks.len() < REMARKS_MAX {
                        self.remarks.push(format!("a connection was turned away: {why}"));
                    }
                }
                Greeting::Silent => {}
            }
        }
        Ok(())
    }

    /// Takes a connection for what it says it is; anything that does not belong to this migration is dropped, and
    /// disturbs nobody.
    fn greet_one(&mut self, stream: Stream, hello: &Hello) -> Result<(), Over> {
        match hello.role {
            HelloRole::Control if self.control.is_none() && hello.side == Side::Source => {
                let mut control = match Control::new(stream) {
                    Ok(control) => control,
                    Err(e) => {
                        let why = Failure::Control { doing: "setting it up", reason: e.into() };
                        return self.event(TargetEvent::Failed(why));
                    }
                };
                self.begun = Some(Instant::now());
                self.id = hello.session;
                let own = Hello {
                    role: HelloRole::Control,
                    side: Side::Target,
                    generation: FIRST_GENERATION,
                    session: self.id,
                    features: 0,
                };
                control.send_raw(&own.encode());
                self.control = Some(control);
                Ok(())
            }
            HelloRole::Data(channel)
                if self.control.is_some()
                    && hello.side == Side::Source
                    && hello.session == self.id
                    && self.session.expects(channel, hello.generation) =>
            {
                self.streams[usize::from(channel.0)] = Some(stream);
                let generation: Generation = hello.generation;
                self.event(TargetEvent::ChannelConnected { channel, generation })
            }
            HelloRole::Control | HelloRole::Data(_) => {
                self.turned_away += 1;
                Ok(())
            }
        }
    }

    fn receive_frames(&mut self) -> Result<(), Over> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let flushed = control.flush();
        let mut frames = Vec::new();
        let received = control.receive(&mut frames);
        for frame in frames {
            if matches!(frame, SourceFrame::Final(_)) {
                self.final_at = Some(Instant::now());
                self.progress.stage(Stage::HandOver);
            }
            self.event(TargetEvent::Frame(frame))?;
        }
        if let Err(e) = received {
            return self.event(TargetEvent::Failed(e.into_failure("waiting for the source")));
        }
        match flushed {
            Ok(()) => Ok(()),
            Err(e) => {
                self.event(TargetEvent::Failed(Failure::Control { doing: "sending on it", reason: e.into() }))
            }
        }
    }

    fn look_at_lanes(&mut self) -> Result<(), Over> {
        let Some(lanes) = &mut self.lanes else { return Ok(()) };
        let (moved, failed) = (lanes.poll_moved(), lanes.poll_failed());
        for event in moved {
            self.event(event)?;
        }
        if let Some((channel, reason)) = failed {
            // If the source has said why it closed its channels, that is the reason to report.
            self.receive_frames()?;
            self.event(TargetEvent::LaneFailed { channel, reason })?;
        }
        Ok(())
    }

    /// Tells the session what happened, and does what it says. `Err` when it has ended.
    fn event(&mut self, event: TargetEvent) -> Result<(), Over> {
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
                self.event(event)
            }
            TargetAction::StartLanes => match self.start_lanes() {
                Ok(()) => Ok(()),
                Err(why) => self.event(TargetEvent::Failed(why)),
            },
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
                let lanes = self.lanes.as_ref().map_or_else(Vec::new, |lanes| lanes.pongs(&self.progress));
                self.act(TargetAction::Send(TargetFrame::Pong { nonce, lanes }))
            }
            TargetAction::Check(last) => {
                let check = self.check(&last)?;
                self.event(TargetEvent::Checked(check))
            }
            TargetAction::LoadState => {
                let loaded = self.incoming.load_state(&mut Pieces { pieces: &self.state, at: 0 });
                self.excuse_silence();
                self.loaded_at = Some(Instant::now());
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
            let shapes: Vec<_> =
                ram.blocks().iter().map(|b| BlockShape { pages: b.pages(), page_size: b.page_size() }).collect();
            let table = DigestTable::new(self.id, &shapes).map_err(|e| format!("no memory for page digests: {e}"))?;
            self.digests = Some(Arc::new(table));
        }
        self.streams = (0..setup.channels).map(|_| None).collect();
        random_16().map(InstanceId).map_err(|e| format!("no random number for the instance: {e}"))
    }

    fn start_lanes(&mut self) -> Result<(), Failure> {
        let Some(ram) = &self.ram else { return Ok(()) };
        let mut streams = Vec::new();
        for mut stream in std::mem::take(&mut self.streams).into_iter().flatten() {
            stream.set_nonblocking(false).map_err(|e| Failure::Worker(format!("a data socket: {e}")))?;
            streams.push(stream);
        }
        let gear = LaneGear {
            ram: ram.clone(),
            digests: self.digests.clone(),
            controller: self.bell.ringer(),
            progress: self.progress.clone(),
        };
        self.lanes = Some(Lanes::muster(streams, &gear, &self.options)?);
        Ok(())
    }

    /// Compares with what the source says it sent. Everything has landed, and no lane is writing.
    fn check(&mut self, last: &Final) -> Result<Check, Over> {
        let check = self.check_sent(last);
        if check != Check::Agrees || self.verify != Verify::Full {
            return Ok(check);
        }
        let own = self.full_digests()?;
        if own.len() != last.full_digests.len() {
            return Ok(Check::StateDiffers("Final has not one full digest a block".to_owned()));
        }
        Ok(match own.iter().zip(&last.full_digests).position(|(own, sent)| own != sent) {
            Some(block) => Check::Differs { block: BlockId(block as u16), chunk_digests: Vec::new() },
            None => Check::Agrees,
        })
    }

    /// Hashes all of RAM on other threads, and looks after the rest meanwhile.
    fn full_digests(&mut self) -> Result<Vec<u64>, Over> {
        let Some(ram) = self.ram.clone() else { return Ok(Vec::new()) };
        let (hashing, ringer) = (full::Hashing::default(), self.bell.ringer());
        std::thread::scope(|scope| {
            hashing.start(scope, &ram, self.id, self.channels.into(), move || Alarm::ring(&ringer));
            loop {
                if let Some(digests) = hashing.take() {
                    return Ok(digests);
                }
                if let Err(over) = self.service() {
                    hashing.stop();
                    return Err(over);
                }
            }
        })
    }

    /// What was sent, against what has landed; and the device state.
    fn check_sent(&mut self, last: &Final) -> Check {
        self.rounds = last.round.0 + 1;
        let mut crc = Crc32c::new();
        self.state.iter().for_each(|piece| crc.update(piece));
        if crc.finish() != last.state_crc {
            return Check::StateDiffers("the device state is not what the source sent: its CRC differs".to_owned());
        }
        let Some(ram) = &self.ram else { return Check::StateDiffers("there is no memory".to_owned()) };
        if let Some(table) = &self.digests {
            if last.block_digests.len() != ram.blocks().len() {
                return Check::StateDiffers("Final has not one digest a block".to_owned());
            }
            for ((id, _), sent) in ram.iter().zip(&last.block_digests) {
                if table.block_digest(id) != *sent {
                    let digests = (0..table.chunks(id).min(CHUNKS_NAMED_MAX)).map(|c| table.chunk_digest(id, c));
                    return Check::Differs { block: id, chunk_digests: digests.collect() };
                }
            }
        }
        Check::Agrees
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

    fn finish(mut self) -> TargetReport {
        self.end_lanes();
        let outcome = self.outcome.take().unwrap_or_else(|| {
            Outcome::Failed(Failure::Worker("internal error: the migration ended without an outcome".to_owned()))
        });
        let total = self.begun.map_or(Duration::ZERO, |at| at.elapsed());
        let downtime = match (&outcome, self.final_at) {
            (Outcome::Completed, Some(at)) => at.elapsed(),
            _ => Duration::ZERO,
        };
        let control = self.control.take();
        let control_bytes = control.map_or(0, |c| c.farewell(self.bell.sleeper().set(), LAST_WORDS));
        self.progress.stage(Stage::Ended);
        let counts = self.progress.channels();
        let ram_bytes = self.ram.as_ref().map_or(0, Ram::bytes);
        TargetReport {
            verified: outcome == Outcome::Completed && self.verify != Verify::Off,
            verify: self.verify,
            ram_bytes,
            payload_bytes: counts.payload_bytes,
            wire_bytes: counts.wire_bytes + control_bytes,
            zero_bytes: counts.zero_bytes,
            untouched_bytes: ram_bytes - self.lanes.as_ref().map_or(0, Lanes::named_bytes),
            state_bytes: self.state.iter().map(|piece| piece.len() as u64).sum(),
            rounds: self.rounds,
            channels: self.channels,
            total,
            downtime,
            prefaulted_bytes: counts.prefaulted_bytes,
            recv_syscalls: counts.syscalls,
            cpus: self.lanes.as_ref().map_or_else(Vec::new, |lanes| lanes.cpus().collect()),
            turned_away: self.turned_away + self.lobby.turned_away(),
            outcome,
            remarks: self.remarks,
        }
    }
}

/// How long the target tries to get its last frames out.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// Connections accepted before those in the lobby are heard, at the most. Far fewer than the lobby holds: a crowd of
/// strangers does not push out a channel that has said its Hello already, or keep the target from its work.
const ACCEPTS_MAX: usize = 64;
/// How long the listener is left alone when a connection cannot be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Remarks about strangers, at the most: they come from anybody.
const REMARKS_MAX: usize = 16;
/// Chunk digests in one frame: as many as its body holds.
const CHUNKS_NAMED_MAX: usize = 65_536;

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
