#![forbid(unsafe_code)]
//! Drives the source's session: does what its actions say, and tells it what happens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_queue::SegQueue;

use crate::bell::Bell;
use crate::config::{CrewOptions, HEARTBEAT, WhyCopied};
use crate::digest::{BlockShape, DigestTable};
use crate::dirty::DirtySource;
use crate::error::{Failure, Outcome};
use crate::gate::Gate;
use crate::memory::Ram;
use crate::net::{Control, Endpoint, Opening, Stream, open};
use crate::poll::PollSleeper;
use crate::precopy::Precopy;
use crate::progress::{Progress, Stage};
use crate::scanner::{CHUNK_PAGES, Scanner, Which};
use crate::session::source::{FIRST_GENERATION, SourceAction, SourceEvent, SourceSession};
use crate::source::ends::{Attempt, Over};
use crate::source::gauge::Gauge;
use crate::source::lanes::Lanes;
use crate::source::pace::Pace;
use crate::source::{DowntimeParts, Guest, Settings, Source, SourceReport, TlsReport, ZeroCopyReport};
use crate::sys::random::random_16;
use crate::units::{BlockId, ChannelId, Generation, SessionId, Verify};
use crate::wire::control::{BlockInfo, LanePong, Setup, SourceFrame, TargetFrame};
use crate::wire::crc::Crc32c;
use crate::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};

pub(super) struct Driver<'a> {
    pub ram: Ram,
    pub settings: Settings,
    pub options: CrewOptions,
    endpoint: Endpoint,
    pub bell: Bell<PollSleeper>,
    pub gate: Gate,
    pub progress: Progress,
    pub session: SourceSession,
    pub id: SessionId,
    pub control: Option<Control<SourceFrame, TargetFrame>>,
    pub greeted: bool,
    pub lanes: Option<Lanes>,
    pub digests: Option<Arc<DigestTable>>,
    pub dirty: &'a mut dyn DirtySource,
    armed: bool,
    pub armed_at: Instant,
    pub scanner: Option<Scanner>,
    outcome: Option<Outcome>,
    ended_at: Instant,
    pub remarks: Vec<String>,
    pub flags: Flags,
    /// Device state on its way from the VMM's thread.
    pub state: Arc<SegQueue<Vec<u8>>>,
    pub state_bytes: u64,
    pub state_crc: Crc32c,
    pub epoch_bytes: u64,
    pub epoch_items: u64,
    pub pushed_bytes: u64,
    pub gauge: Gauge,
    pub policy: Precopy,
    /// By how many percent the guest is slowed down.
    pub throttle: u8,
    /// Bytes a second that the guest dirtied in the last round.
    pub dirty_rate: u64,
    /// The cap on bandwidth, while the guest runs.
    pub pace: Option<Pace>,
    /// Whether a round is being shipped while the guest runs.
    pub in_round: bool,
    /// Whether what is on its way to the target is waited for.
    pub draining: bool,
    /// When the next wait ends at the latest, beside the next heartbeat.
    pub wake_at: Option<Instant>,
    /// When an attempt to hand over is broken off, if it would be tried again; and whether it was.
    pub break_off_at: Option<Instant>,
    pub broken_off: bool,
    pub expected: Option<Duration>,
    pub parts: DowntimeParts,
    pub overruns: u32,
    pub interrupted: Duration,
    pings: u64,
    ping_at: Instant,
    pub pongs: Vec<LanePong>,
    pub moved_bytes: u64,
    pub moved_at: Instant,
    /// What the target owes us, and since when.
    pub owed: (&'static str, Instant),
    mismatch: Option<(BlockId, Vec<u64>)>,
    sum: Totals,
}

/// What actions asked for and the flow of [`migrate`] waits for.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Flags {
    pub start_rounds: bool,
    pub pause: bool,
    pub ask_commit: bool,
}

#[derive(Default)]
struct Totals {
    cpus: Vec<Option<usize>>,
    why_copied: Vec<Option<WhyCopied>>,
    control_bytes: u64,
    tls: Option<TlsReport>,
}

pub(super) fn migrate(source: Source, dirty: &mut dyn DirtySource, guest: &mut dyn Guest) -> SourceReport {
    let begun = Instant::now();
    let Source { ram, settings, crew, endpoint, bell, gate, progress } = source;
    let channels = settings.channels;
    let mut driver = Driver {
        session: SourceSession::new(channels),
        id: SessionId([0; 16]),
        control: None,
        greeted: false,
        lanes: None,
        digests: None,
        dirty,
        armed: false,
        armed_at: begun,
        scanner: None,
        outcome: None,
        ended_at: begun,
        remarks: Vec::new(),
        flags: Flags::default(),
        state: Arc::new(SegQueue::new()),
        state_bytes: 0,
        state_crc: Crc32c::new(),
        epoch_bytes: 0,
        epoch_items: 0,
        pushed_bytes: 0,
        gauge: Gauge::new(settings.limits.downtime_limit),
        policy: Precopy::new(settings.limits),
        throttle: 0,
        dirty_rate: 0,
        pace: None,
        in_round: false,
        draining: false,
        wake_at: None,
        break_off_at: None,
        broken_off: false,
        expected: None,
        parts: DowntimeParts::default(),
        overruns: 0,
        interrupted: Duration::ZERO,
        pings: 0,
        ping_at: begun,
        pongs: Vec::new(),
        moved_bytes: 0,
        moved_at: begun,
        owed: ("", begun),
        mismatch: None,
        sum: Totals::default(),
        options: crew,
        ram,
        settings,
        endpoint,
        bell,
        gate,
        progress,
    };
    let mut paused_at = None;
    let _: Result<(), Over> = driver.flow(guest, &mut paused_at);
    driver.finish(guest, begun, paused_at)
}

impl Driver<'_> {
    /// The whole way, from connecting to Running; it ends early wherever the session does.
    fn flow(&mut self, guest: &mut dyn Guest, paused_at: &mut Option<Instant>) -> Result<(), Over> {
        self.prepare(guest)?;
        while !self.flags.start_rounds {
            self.service(true)?;
        }
        self.arm()?;
        self.progress.stage(Stage::Precopy);
        let mut which = Which::All;
        loop {
            self.precopy(guest, which)?;
            match self.hand_over(guest, paused_at)? {
                Attempt::Committed => break,
                Attempt::Withdrawn => {
                    which = Which::Dirty;
                    self.dirty_bytes()?;
                }
            }
        }
        loop {
            self.service(true)?;
        }
    }

    /// Connects, says Hello and Setup.
    fn prepare(&mut self, guest: &mut dyn Guest) -> Result<(), Over> {
        if self.gate.is_cancelled() {
            return self.event(SourceEvent::CancelAsked);
        }
        let opaque = match guest.setup_bytes() {
            Ok(opaque) => opaque,
            Err(e) => return self.fail(Failure::Hook { hook: "setup_bytes", reason: e.to_string() }),
        };
        self.id = match random_16() {
            Ok(id) => SessionId(id),
            Err(e) => return self.fail(Failure::Config(format!("no random number for the session: {e}"))),
        };
        if self.settings.verify != Verify::Off {
            let shapes: Vec<_> =
                self.ram.blocks().iter().map(|b| BlockShape { pages: b.pages(), page_size: b.page_size() }).collect();
            match DigestTable::new(self.id, &shapes) {
                Ok(table) => self.digests = Some(Arc::new(table)),
                Err(e) => return self.fail(Failure::Memory(format!("no memory for the page digests: {e}"))),
            }
        }
        let stream = self.open(Opening::Control)?;
        self.sum.tls = TlsReport::of(&stream);
        let mut control = match Control::new(stream) {
            Ok(control) => control,
            Err(e) => return self.fail(Failure::Control { doing: "setting it up", reason: e.into() }),
        };
        control.send_raw(&self.hello(HelloRole::Control).encode());
        self.control = Some(control);
        let blocks = self.ram.iter().map(|(id, b)| BlockInfo {
            id,
            name: b.name().to_owned(),
            guest_address: b.guest_address(),
            bytes: b.bytes(),
            page_size: b.page_size(),
            // The wire's unit is the tracking page, and this host's pages may be smaller.
            backing_page_bytes: b.backing_page_bytes().max(b.page_size().bytes()),
        });
        let setup = Setup {
            verify: self.settings.verify,
            channels: self.settings.channels,
            features: 0,
            state_bytes_max: 0,
            blocks: blocks.collect(),
            opaque,
        };
        self.event(SourceEvent::Connected(setup))
    }

    fn hello(&self, role: HelloRole) -> Hello {
        let generation = FIRST_GENERATION;
        Hello { role, side: Side::Source, generation, session: self.id, features: 0 }
    }

    fn open(&mut self, opening: Opening) -> Result<Stream, Over> {
        let deadline = Instant::now() + self.settings.timeouts.connect;
        let gate = self.gate.clone();
        let tls = self.settings.tls.as_ref();
        match open(&mut self.endpoint, opening, tls, &mut self.bell, deadline, &|| gate.is_cancelled()) {
            Ok(Some(stream)) => Ok(stream),
            Ok(None) => {
                self.event(SourceEvent::CancelAsked)?;
                Err(Over)
            }
            Err(why) => self.fail(why).map(|()| unreachable!("fail is over")),
        }
    }

    /// Connects the data channels and starts their workers.
    fn open_channels(&mut self) -> Result<(), Over> {
        let mut streams = Vec::new();
        for channel in (0..self.settings.channels).map(ChannelId) {
            // One after the other, over a long link many of them take longer than the target bears silence.
            self.heartbeat()?;
            let mut stream = self.open(Opening::Data { channel, generation: FIRST_GENERATION })?;
            self.sum.tls = self.sum.tls.map(|tls| tls.and(&stream));
            // A fresh socket's buffer takes 64 bytes at once: no need to wait for room.
            let hello = self.hello(HelloRole::Data(channel)).encode();
            let said = stream.send(&hello).and_then(|n| match n {
                HELLO_BYTES if stream.unsent_bytes() == 0 => stream.set_nonblocking(false),
                _ => Err(std::io::ErrorKind::WriteZero.into()),
            });
            if let Err(e) = said {
                let reason = format!("saying Hello: {e}");
                return self.event(SourceEvent::ChannelFailed { channel, generation: FIRST_GENERATION, reason });
            }
            streams.push(stream);
        }
        // Held beside the workers' own handles: should these fail to start, the target is told why before it finds the
        // channels closed.
        let channels: Vec<_> = streams.iter().map(|stream| stream.socket().clone()).collect();
        let ringer = self.bell.ringer();
        let lanes = Lanes::muster(
            &self.ram,
            &self.settings,
            &self.options,
            streams,
            self.digests.as_ref(),
            &ringer,
            &self.progress,
        );
        match lanes {
            Ok(lanes) => self.lanes = Some(lanes),
            Err(why) => return self.fail(why),
        }
        drop(channels);
        Ok(())
    }

    fn arm(&mut self) -> Result<(), Over> {
        // Allocated before tracking begins: from then on, rounds allocate nothing.
        self.scanner = Some(Scanner::new(&self.ram));
        self.armed = true;
        let armed = self.dirty.arm(&self.ram);
        self.armed_at = Instant::now();
        self.excuse_silence();
        // The way is measured anew, while round 0 is shipped: what was measured so far waited for what the target prepared.
        self.gauge.forget_pings();
        self.ping_at = self.armed_at;
        match armed {
            Ok(()) => Ok(()),
            Err(e) => self.fail(Failure::Dirty(e.to_string())),
        }
    }

    /// Tells the session what happened, and does what it says. `Err` when it has ended.
    pub fn event(&mut self, event: SourceEvent) -> Result<(), Over> {
        for action in self.session.on(event) {
            self.act(action)?;
        }
        if self.outcome.is_some() { Err(Over) } else { Ok(()) }
    }

    /// Keeps a remark for the report; not more than a person would read.
    pub fn remark(&mut self, what: String) {
        const REMARKS_MAX: usize = 16;
        if self.remarks.len() < REMARKS_MAX {
            self.remarks.push(what);
        }
    }

    /// Ends the migration for this reason.
    pub fn fail(&mut self, why: Failure) -> Result<(), Over> {
        self.event(SourceEvent::Failed(why))?;
        debug_assert!(false, "a failure ends the session");
        Err(Over)
    }

    fn act(&mut self, action: SourceAction) -> Result<(), Over> {
        match action {
            SourceAction::Send(frame) => {
                let Some(control) = &mut self.control else { return Ok(()) };
                // What the socket refuses is found again, by `receive`, after everything that the target said before it
                // left: that says more than a broken pipe. Frames after the end are courtesy.
                if let Some(why) = control.send(&frame).err().and_then(|e| e.own_mistake()) {
                    if !self.session.is_ended() {
                        return self.fail(why);
                    }
                }
            }
            SourceAction::OpenChannels => self.open_channels()?,
            SourceAction::StartRounds => self.flags.start_rounds = true,
            SourceAction::PushMark(mark) => {
                // The caller has made sure of room: marks have slots of their own.
                if !self.lanes.as_mut().is_some_and(|lanes| lanes.push_mark(mark)) {
                    return self.fail(Failure::Worker("internal error: no room for a mark".to_owned()));
                }
            }
            SourceAction::FreeJournal { channel, through } => {
                if !self.lanes.as_mut().is_some_and(|lanes| lanes.free_journal(channel, through)) {
                    let what = format!("epoch {through} of channel {channel} was applied before it was sent");
                    return self.fail(Failure::Protocol(what));
                }
            }
            SourceAction::PauseGuest => self.flags.pause = true,
            SourceAction::AskCommit => self.flags.ask_commit = true,
            SourceAction::End(outcome) => {
                self.outcome = Some(outcome);
                self.ended_at = Instant::now();
            }
        }
        Ok(())
    }

    /// Sends a Ping when its time has come.
    fn heartbeat(&mut self) -> Result<(), Over> {
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

    /// Looks after everything that is not pages: frames, ended workers, cancel, time. Waits for any of it if `wait`.
    pub fn service(&mut self, wait: bool) -> Result<(), Over> {
        self.send_state()?;
        self.heartbeat()?;
        if wait {
            let set = self.bell.sleeper().set();
            set.clear();
            set.until(self.wake_at.take().map_or(self.ping_at, |at| at.min(self.ping_at)));
            if let Some(control) = &self.control {
                set.watch(control.fd(), true, control.unsent_bytes() > 0);
            }
            self.bell.wait();
        }
        if self.gate.is_cancelled() && !self.session.is_committed() {
            self.event(SourceEvent::CancelAsked)?;
        }
        self.receive()?;
        while let Some((channel, reason)) = self.lanes.as_mut().and_then(Lanes::poll_end) {
            // If the target has said why it closed its channels, that is the reason to report.
            self.receive()?;
            let generation: Generation = FIRST_GENERATION;
            self.event(SourceEvent::ChannelFailed { channel, generation, reason })?;
        }
        self.check_time()?;
        self.check_precopy_time()
    }

    fn receive(&mut self) -> Result<(), Over> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let flushed = control.flush();
        if !self.greeted {
            match control.receive_hello() {
                Ok(None) => match flushed {
                    Ok(()) => return Ok(()),
                    Err(e) => return self.fail(Failure::Control { doing: "sending on it", reason: e.into() }),
                },
                Ok(Some(hello)) => {
                    if hello.session != self.id || hello.side != Side::Target || hello.role != HelloRole::Control {
                        return self.fail(Failure::Protocol("its Hello is for another connection".to_owned()));
                    }
                    self.greeted = true;
                }
                Err(e) => return self.fail(e.into_failure("waiting for the target's Hello")),
            }
        }
        let Some(control) = &mut self.control else { return Ok(()) };
        let mut frames = Vec::new();
        let result = control.receive(&mut frames);
        for frame in frames {
            match &frame {
                TargetFrame::Pong { nonce, lanes } => {
                    self.gauge.pong_came(*nonce);
                    self.pongs.clone_from(lanes);
                    continue;
                }
                TargetFrame::DigestMismatch { block, chunk_digests, .. } => {
                    // Before it is kept: chunks are looked up by it when the guest waits to be resumed.
                    if self.ram.block(*block).is_none() {
                        let what = format!("DigestMismatch names block {block}, which does not exist");
                        return self.fail(Failure::Protocol(what));
                    }
                    self.mismatch = Some((*block, chunk_digests.clone()));
                }
                _ => {}
            }
            self.event(SourceEvent::Frame(frame))?;
        }
        // Last: what the target said before it left says more than a broken pipe.
        match (result, flushed) {
            (Err(e), _) => self.fail(e.into_failure("waiting for the target")),
            (Ok(()), Err(e)) => self.fail(Failure::Control { doing: "sending on it", reason: e.into() }),
            (Ok(()), Ok(())) => Ok(()),
        }
    }

    /// Sends the device state that has been written so far, as fast as the control connection takes it.
    fn send_state(&mut self) -> Result<(), Over> {
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

    /// Everything that remains to be done however it ended.
    fn finish(mut self, guest: &mut dyn Guest, begun: Instant, paused_at: Option<Instant>) -> SourceReport {
        let mut outcome = self.outcome.take().unwrap_or_else(|| {
            Outcome::Failed(Failure::Worker("internal error: the migration ended without an outcome".to_owned()))
        });
        self.name_chunks(&mut outcome);
        let ours = matches!(outcome, Outcome::Failed(_) | Outcome::Cancelled);
        if let Some(lanes) = self.lanes.take() {
            // Never a drain: a worker that says Bye to a target that no longer reads would block in it for ever, and be
            // joined for ever. After Running nothing is left to be said: the target ended its lanes before it ran.
            // What it had not yet applied needs no list: a failed attempt starts over at round 0.
            (self.sum.cpus, self.sum.why_copied) = lanes.end();
        }
        // The guest next, before anything that could take time: it stands still, or is slowed down.
        self.set_throttle(guest, 0);
        if let (true, Some(_)) = (ours, paused_at) {
            if let Err(e) = guest.resume() {
                // The one who must act is told first, and then why it came to that.
                let reason = format!("{e}; the guest stands still at the source, whose migration ended thus: {outcome}");
                outcome = Outcome::Failed(Failure::Hook { hook: "resume", reason });
            }
            self.ended_at = Instant::now();
        }
        let downtime = paused_at.map_or(Duration::ZERO, |at| self.ended_at.saturating_duration_since(at));
        let DowntimeParts { pause, ship, load, .. } = self.parts;
        self.parts.run = match outcome {
            Outcome::Completed => downtime.saturating_sub(pause + ship + load),
            _ => Duration::ZERO,
        };
        if let Some(control) = self.control.take() {
            self.sum.control_bytes = control.farewell(self.bell.sleeper().set(), LAST_WORDS);
        }
        if self.armed {
            if ours {
                if let Some(Err(e)) = self.scanner.as_mut().map(|s| s.give_back(self.dirty)) {
                    self.remark(format!("dirty bits could not be given back: {e}"));
                }
            }
            self.dirty.disarm();
        }
        self.progress.stage(Stage::Ended);
        let counts = self.progress.channels();
        SourceReport {
            verified: outcome == Outcome::Completed && self.settings.verify != Verify::Off,
            outcome,
            verify: self.settings.verify,
            ram_bytes: self.ram.bytes(),
            payload_bytes: counts.payload_bytes,
            wire_bytes: counts.wire_bytes + self.sum.control_bytes,
            zero_bytes: counts.zero_bytes,
            untouched_bytes: self.scanner.as_ref().map_or(0, Scanner::untouched_bytes),
            state_bytes: self.state_bytes,
            rounds: self.session.round().0,
            channels: self.settings.channels,
            total: begun.elapsed(),
            downtime,
            downtime_expected: self.expected,
            downtime_parts: self.parts,
            overruns: self.overruns,
            interrupted: self.interrupted,
            deferred_bytes: self.scanner.as_ref().map_or(0, Scanner::deferred_bytes_max),
            throttling: self.policy.summary(),
            send_syscalls: counts.syscalls,
            zero_copy: ZeroCopyReport::new(&counts, self.sum.why_copied),
            tls: self.sum.tls,
            cpus: self.sum.cpus,
            remarks: self.remarks,
        }
    }

    /// Names the chunks of a mismatch: the target has sent its digests of the block, and ours are here.
    fn name_chunks(&self, outcome: &mut Outcome) {
        if let (Outcome::Failed(Failure::Digest { chunks, .. }), Some((block, peer)), Some(table)) =
            (outcome, &self.mismatch, &self.digests)
        {
            // The number comes from the target.
            if self.ram.block(*block).is_none() {
                return;
            }
            *chunks = table.differing_chunks(*block, peer).map(|c| c as u32).collect();
        }
    }
}

/// How long either side tries to get its last frames out, and to hear the other's end.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// Pages of a run at the most, so that it fits one batch.
pub(super) fn run_pages_max(batch_bytes: u64, page_bytes: u64) -> u32 {
    (batch_bytes / page_bytes).clamp(1, CHUNK_PAGES) as u32
}
