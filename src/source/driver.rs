#![forbid(unsafe_code)]
//! Drives the source's session: does what its actions say, and tells it what happens.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_queue::SegQueue;

use crate::bell::Bell;
use crate::config::{CrewOptions, WhyCopied};
use crate::channel::records::Records;
use crate::dirty::DirtySource;
use crate::error::{Failure, Outcome};
use crate::gate::Gate;
use crate::memory::Ram;
use crate::net::{Control, Endpoint};
use crate::poll::PollSleeper;
use crate::precopy::Precopy;
use crate::progress::{Progress, Stage};
use crate::scanner::{CHUNK_PAGES, Scanner, Which};
use crate::session::source::{FIRST_GENERATION, SourceAction, SourceEvent, SourceSession};
use crate::source::ends::{Attempt, Over};
use crate::source::gauge::Gauge;
use crate::source::lanes::Lanes;
use crate::source::motion::Motion;
use crate::source::pace::Pace;
use crate::source::pipe::Pipe;
use crate::source::ways::Losses;
use crate::source::{DowntimeParts, Guest, Settings, Source, SourceReport, TlsReport, ZeroCopyReport};
use crate::units::{BlockId, ChannelId, Round, SessionId, Verify};
use crate::wire::control::{HEARD_THE_END, LanePong, SourceFrame, TargetFrame};
use crate::wire::crc::Crc32c;

pub(super) struct Driver<'a> {
    pub ram: Ram,
    pub settings: Settings,
    pub options: CrewOptions,
    pub endpoint: Endpoint,
    pub bell: Bell<PollSleeper>,
    pub gate: Gate,
    pub progress: Progress,
    pub session: SourceSession,
    pub id: SessionId,
    pub control: Option<Control<SourceFrame, TargetFrame>>,
    pub greeted: bool,
    pub lanes: Option<Lanes>,
    /// Where pages travel on the control connection: how they get there.
    pub pipe: Option<Pipe>,
    pub records: Records,
    pub dirty: &'a mut dyn DirtySource,
    pub armed: bool,
    pub armed_at: Instant,
    /// Which pages the next round ships, and how many chunks of it were harvested before it was interrupted.
    pub which: Which,
    pub chunks_done: usize,
    /// Whether a round is being pushed.
    pub filling: bool,
    pub losses: Losses,
    pub tls: Option<TlsReport>,
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
    /// The round of which the control connection is to say that it begins, as soon as all of those before it are out.
    pub begins: Option<Round>,
    /// The last round of which that has been asked for.
    pub begun: Option<Round>,
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
    pub pings: u64,
    pub ping_at: Instant,
    pub pongs: Vec<LanePong>,
    /// What was received last, while it is dealt with.
    pub frames: Vec<TargetFrame>,
    pub motion: Motion,
    /// What the target owes us, and since when.
    pub owed: (&'static str, Instant),
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
}

pub(super) fn migrate(source: Source, dirty: &mut dyn DirtySource, guest: &mut dyn Guest) -> SourceReport {
    let begun = Instant::now();
    let Source { ram, settings, crew, endpoint, bell, gate, progress } = source;
    let channels = settings.channels;
    let mut driver = Driver {
        session: SourceSession::new(channels),
        id: SessionId([0; 16]),
        control: None,
        greeted: !settings.framing.answers_hello(),
        lanes: None,
        pipe: None,
        records: Records { digests: None, contents: settings.contents.clone() },
        dirty,
        armed: false,
        armed_at: begun,
        which: Which::All,
        chunks_done: 0,
        filling: false,
        losses: Losses::new(channels, FIRST_GENERATION),
        tls: None,
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
        begins: None,
        begun: None,
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
        frames: Vec::new(),
        motion: Motion::new(channels, begun),
        owed: ("", begun),
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
        let mut end = self.set_out(guest);
        loop {
            if end.is_ok() {
                end = self.go_on(guest, paused_at);
            }
            match end {
                // All connections are lost, and the session is not.
                Err(Over) if self.outcome.is_none() && self.session.wants_control() => {
                    end = self.come_back(guest, paused_at);
                }
                _ => return end,
            }
        }
    }

    fn set_out(&mut self, guest: &mut dyn Guest) -> Result<(), Over> {
        self.prepare(guest)?;
        while !self.flags.start_rounds {
            self.service(true)?;
        }
        self.arm()?;
        self.progress.stage(Stage::Precopy);
        Ok(())
    }

    /// Rounds and the hand-over, from wherever they stand.
    fn go_on(&mut self, guest: &mut dyn Guest, paused_at: &mut Option<Instant>) -> Result<(), Over> {
        while !self.session.is_committed() {
            self.precopy(guest)?;
            match self.hand_over(guest, paused_at)? {
                Attempt::Committed => break,
                Attempt::Withdrawn => {
                    self.dirty_bytes()?;
                }
            }
        }
        loop {
            self.service(true)?;
        }
    }

    /// Tells the session what happened, and does what it says. `Err` when it has ended.
    pub fn event(&mut self, event: SourceEvent) -> Result<(), Over> {
        let event = match event {
            // Nobody knows what of it has landed.
            SourceEvent::ChannelFailed { channel, generation, reason } if !self.settings.framing.mends() => {
                if self.session.is_committed() {
                    return Ok(());
                }
                SourceEvent::Failed(Failure::Channel { channel, generation, reason })
            }
            event => event,
        };
        for action in self.session.on(event) {
            self.act(action)?;
        }
        if self.outcome.is_some() || self.session.wants_control() { Err(Over) } else { Ok(()) }
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

    pub fn act(&mut self, action: SourceAction) -> Result<(), Over> {
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
            SourceAction::StartRounds => {
                self.flags.start_rounds = true;
                for channel in (0..self.settings.channels).map(ChannelId) {
                    self.losses.take_joining(channel);
                }
            }
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
                self.losses.got_through(channel);
            }
            SourceAction::CloseChannel { channel, generation, reason } => {
                self.close_channel(channel, generation, &reason)?;
            }
            SourceAction::GiveBack { channel } => self.give_back(channel),
            SourceAction::StartChannel { channel, round, epoch, .. } => self.start_channel(channel, round, epoch)?,
            SourceAction::HangUp { channel } => self.losses.hang_up(channel),
            SourceAction::FindDamage { block, chunk_digests } => {
                if self.ram.block(block).is_none() {
                    let what = format!("DigestMismatch names block {block}, which does not exist");
                    return self.fail(Failure::Protocol(what));
                }
                let chunks = self.find_damage(block, &chunk_digests);
                self.event(SourceEvent::Damaged { block, chunks })?;
            }
            SourceAction::ShipAgain { block, chunks } => self.ship_again(block, &chunks),
            SourceAction::Reconnect => self.close_everything()?,
            SourceAction::PauseGuest => self.flags.pause = true,
            SourceAction::AskCommit => self.flags.ask_commit = true,
            SourceAction::End(outcome) => {
                self.outcome = Some(outcome);
                self.ended_at = Instant::now();
            }
        }
        Ok(())
    }

    /// Looks after everything that is not pages: frames, ended workers, cancel, time. Waits for any of it if `wait`.
    pub fn service(&mut self, wait: bool) -> Result<(), Over> {
        self.send_state()?;
        self.say_that_a_round_begins()?;
        self.carry()?;
        self.heartbeat()?;
        let mut readable = Vec::new();
        if wait && !self.control.as_ref().is_some_and(Control::has_news) {
            let channels_wake_at = self.channels_wake_at();
            let mut watched = Vec::new();
            let pipe = self.pipe.as_ref().filter(|_| self.has_room());
            let set = self.bell.sleeper().set();
            set.clear();
            set.until(self.wake_at.take().map_or(self.ping_at, |at| at.min(self.ping_at)));
            if let Some(at) = channels_wake_at {
                set.until(at);
            }
            if let Some(control) = &self.control {
                set.watch(control.fd(), true, control.unsent_bytes() > 0);
            }
            if let Some(pipe) = pipe {
                set.watch(pipe.fd(), true, false);
            }
            for (channel, socket) in self.losses.joining_sockets() {
                watched.push((channel, set.watch(socket.as_fd(), true, false)));
            }
            self.bell.wait();
            let set = self.bell.sleeper().set();
            readable.extend(watched.iter().filter(|(_, place)| set.ready(*place).readable).map(|(channel, _)| *channel));
        }
        if self.gate.is_cancelled() && !self.session.is_committed() {
            self.event(SourceEvent::CancelAsked)?;
        }
        self.receive()?;
        while let Some((channel, reason, is_ours)) = self.lanes.as_mut().and_then(Lanes::poll_end) {
            // If the target has said why it closed its channels, that is the reason to report.
            self.receive()?;
            let generation = self.session.generation(channel);
            if is_ours && !self.session.is_committed() {
                return self.fail(Failure::Channel { channel, generation, reason });
            }
            self.event(SourceEvent::ChannelFailed { channel, generation, reason })?;
        }
        self.look_after_channels(&readable)?;
        self.check_time()?;
        self.check_precopy_time()
    }

    /// Everything that remains to be done however it ended.
    fn finish(mut self, guest: &mut dyn Guest, begun: Instant, paused_at: Option<Instant>) -> SourceReport {
        let mut outcome = self.outcome.take().unwrap_or_else(|| {
            Outcome::Failed(Failure::Worker("internal error: the migration ended without an outcome".to_owned()))
        });
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
        if let Some(mut control) = self.control.take() {
            if matches!(outcome, Outcome::Completed | Outcome::Failed(Failure::RunFailed(_))) {
                // A courtesy: the target need not wait for a Query. What cannot be sent, it does without.
                let _ = control.send(&SourceFrame::Ping { nonce: HEARD_THE_END });
            }
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
            channels: self.settings.framing.channels().unwrap_or(self.settings.channels),
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
            tls: self.tls,
            cpus: self.sum.cpus,
            session: self.id,
            channels_lost: self.losses.channels_lost,
            reconnects: self.losses.reconnects,
            resumes: self.losses.resumes,
            repairs: self.session.repairs(),
            reshipped_bytes: self.losses.reshipped_bytes,
            repaired_bytes: self.losses.repaired_bytes,
            remarks: self.remarks,
        }
    }

    /// The chunks of a block in which source and target differ; none where that is not known.
    fn find_damage(&self, block: BlockId, peer: &[u64]) -> Vec<u32> {
        match &self.records.digests {
            Some(table) if !peer.is_empty() => {
                table.differing_chunks(block, peer).map(|chunk| chunk as u32).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// How long either side tries to get its last frames out, and to hear the other's end.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// Pages of a run at the most, so that it fits one batch.
pub(super) fn run_pages_max(batch_bytes: u64, page_bytes: u64) -> u32 {
    (batch_bytes / page_bytes).clamp(1, CHUNK_PAGES) as u32
}
