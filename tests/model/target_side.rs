//! The target's side of the world: its driver, its lanes, its memory.

use pageferry::barrier::{LaneWord, min_over_set};
use pageferry::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use pageferry::units::{BlockId, InstanceId};
use pageferry::wire::control::{Final, SourceFrame, TargetFrame};

use crate::link::{DAMAGED, Packet, TORN};
use crate::mutants::Mutant;
use crate::world::{
    Bounds, CHANNELS, Entry, Gate, PAGES, Process, Verdict, World, after, channel, digest, generation, index, rounds,
};

/// The hook of the VMM that the driver's thread is in: it hears nothing until that returns.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hook {
    Prepare,
    Load,
    Run,
}

/// A lane, its words in the barrier, and what the session was last told of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Lane {
    /// Whether it has a thread.
    pub up: bool,
    pub generation: u32,
    pub passed: LaneWord,
    pub flushed: LaneWord,
    pub told: (LaneWord, LaneWord),
    pub failed: bool,
    /// Only with [`Mutant::NoWakeAfterRetire`]: it waits at the barrier until it is rung.
    pub asleep: bool,
}

/// The target's process.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TargetSide {
    pub process: Process,
    pub session: TargetSession,
    pub verdict: Option<Verdict>,
    pub gate: Gate,
    pub hook: Option<Hook>,
    /// Connections whose Hello has not been heard, by their generations.
    pub lobby: [Vec<u32>; CHANNELS],
    /// Those whose lanes have not begun.
    pub sockets: [Option<u32>; CHANNELS],
    /// Whether there is a control connection.
    pub online: bool,
    /// Whether it is another process than the one that the source knows.
    pub replaced: bool,
    /// What will be found by the check that goes on, where frames are heard meanwhile.
    pub check: Option<Check>,
    /// Only with [`Mutant::AnswerBeforeDiscard`]: a Query that was answered, and not yet acted on.
    pub query: bool,
    pub lanes: [Lane; CHANNELS],
    pub memory: [u8; PAGES],
    /// What has landed, as the digest table remembers it.
    pub digest: [Entry; PAGES],
    /// Whether the VMM has taken the machine, and how often it was told to give it up again.
    pub prepared: bool,
    pub discards: u8,
    /// Whether the guest has run here. It stays true when the process is gone: what it did cannot be undone.
    pub ran: bool,
}

/// The most device state that the target takes: more than the world sends.
const STATE_BYTES_MAX: u64 = 16;

impl TargetSide {
    pub fn new(resumes: bool) -> TargetSide {
        TargetSide {
            process: Process::Alive,
            session: TargetSession::new(STATE_BYTES_MAX, resumes),
            verdict: None,
            gate: Gate::Open,
            hook: None,
            lobby: Default::default(),
            sockets: [None; CHANNELS],
            online: true,
            replaced: false,
            check: None,
            query: false,
            lanes: Default::default(),
            memory: [0; PAGES],
            digest: Default::default(),
            prepared: false,
            discards: 0,
            ran: false,
        }
    }

    pub fn listens(&self) -> bool {
        self.process == Process::Alive && self.hook.is_none()
    }

    /// The number of rounds that every lane of the set has passed: the rule that ships.
    fn all_passed(&self, bounds: &Bounds) -> u64 {
        let waits_for = bounds.channels().skip(usize::from(bounds.is(Mutant::BarrierIgnoresLane0)));
        min_over_set(waits_for.map(|c| self.lanes[c].passed)).unwrap_or(0)
    }

    /// The number of epochs that every lane of the set has flushed.
    pub fn all_flushed(&self, bounds: &Bounds) -> u64 {
        let in_set = bounds.channels().map(|c| &self.lanes[c]);
        min_over_set(in_set.map(|lane| lane.flushed)).unwrap_or(0)
    }

    /// Whether this lane reads: not while it waits at the barrier.
    pub fn reads(&self, bounds: &Bounds, c: usize) -> bool {
        let lane = &self.lanes[c];
        lane.up && !lane.failed && !lane.asleep && self.all_passed(bounds) >= lane.passed.count()
    }

    /// How far a lane is, as the session is to be told.
    pub fn progress(&self, bounds: &Bounds, c: usize) -> (LaneWord, LaneWord) {
        if bounds.is(Mutant::AllLanesAsTheFurthest) {
            let furthest = |of: fn(&Lane) -> LaneWord| bounds.channels().map(|c| of(&self.lanes[c]).count()).max();
            return (rounds(furthest(|l| l.passed).unwrap_or(0)), rounds(furthest(|l| l.flushed).unwrap_or(0)));
        }
        (self.lanes[c].passed, self.lanes[c].flushed)
    }

    /// Whether the session has something to be told of this lane.
    pub fn has_moved(&self, bounds: &Bounds, c: usize) -> bool {
        self.lanes[c].up && self.progress(bounds, c) != self.lanes[c].told
    }

    fn ring_all(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.asleep = false);
    }
}

impl World {
    /// Tells the target's session what happened, and does what it says.
    pub fn target_event(&mut self, bounds: &Bounds, event: TargetEvent) {
        let lost = matches!(event, TargetEvent::Frame(SourceFrame::ChannelLost { .. }));
        for action in self.target.session.on(event) {
            let late = matches!(action, TargetAction::Check(_) | TargetAction::Send(TargetFrame::EpochApplied { .. }));
            if lost && late && bounds.is(Mutant::NoLookAfterRetire) {
                continue;
            }
            self.target_does(bounds, action);
            if self.target.process != Process::Alive {
                return;
            }
        }
    }

    fn target_does(&mut self, bounds: &Bounds, action: TargetAction) {
        let target = &mut self.target;
        match action {
            TargetAction::Send(frame) => {
                if let TargetFrame::EpochApplied { epoch, .. } = &frame {
                    self.seen.epochs_told = epoch.0 + 1;
                }
                if target.online {
                    self.control.to_source.send(frame);
                }
            }
            TargetAction::Prepare(_) => target.hook = Some(Hook::Prepare),
            TargetAction::StartLanes => {
                for c in bounds.channels() {
                    match target.sockets[c].take() {
                        Some(generation) => {
                            target.lanes[c] = Lane { up: true, generation, ..Lane::default() };
                        }
                        None => {
                            target.lanes[c].passed = rounds(0).retired();
                            target.lanes[c].flushed = rounds(0).retired();
                        }
                    }
                }
            }
            TargetAction::StartLane { channel } => self.starts_lane(index(channel)),
            TargetAction::RetireLane { channel } => self.retires_lane(bounds, index(channel)),
            TargetAction::DropControl => {
                if std::mem::take(&mut target.online) {
                    self.control.target_leaves();
                }
            }
            TargetAction::TakeVisitor => {
                if let Some(at) = self.visitor() {
                    self.control = self.visitors[at].clone();
                    self.visitors.drain(..=at);
                    self.target.online = true;
                }
                self.target.sockets = [None; CHANNELS];
                self.seen.resumed = true;
            }
            TargetAction::AnswerVisitor(frame) => {
                if let Some(at) = self.visitor() {
                    self.visitors[at].to_source.send(frame);
                    self.visitors[at].target_leaves();
                }
            }
            TargetAction::KeepState(_) | TargetAction::ForgetState | TargetAction::Pong { .. } => {}
            TargetAction::Check(last) => {
                let check = self.checks(bounds, &last);
                self.seen.digests_differed |= check != Check::Agrees && !self.seen.damaged.contains(&true);
                // One at a time: a Final of before came to nothing.
                self.target.check = Some(check);
                if !bounds.slow_checks {
                    self.check_returns(bounds);
                }
            }
            TargetAction::LoadState => target.hook = Some(Hook::Load),
            TargetAction::Run => {
                // No lane outlives the hand-over.
                self.lanes_end();
                if bounds.is(Mutant::RunningBeforeRun) {
                    self.control.to_source.send(TargetFrame::Running);
                }
                if self.target.gate.commit() {
                    self.target.hook = Some(Hook::Run);
                } else {
                    self.target_event(bounds, TargetEvent::RunReturned(Err(String::new())));
                }
            }
            TargetAction::Discard => {
                target.discards += 1;
                self.lanes_end();
            }
            TargetAction::End(outcome) => {
                target.verdict = Some(Verdict::from(&outcome));
                self.target_leaves(Process::Ended);
            }
        }
    }

    /// The lane is in the set before it begins, and before the source is told so.
    fn starts_lane(&mut self, c: usize) {
        let target = &mut self.target;
        let Some(generation) = target.sockets[c].take() else { return };
        target.lanes[c] = Lane { up: true, generation, ..Lane::default() };
    }

    /// The lane is joined, and then out of the set.
    fn retires_lane(&mut self, bounds: &Bounds, c: usize) {
        let target = &mut self.target;
        target.sockets[c] = None;
        let lane = &mut target.lanes[c];
        let (passed, flushed) = (lane.passed.retired(), lane.flushed.retired());
        let was = std::mem::replace(lane, Lane { passed, flushed, ..Lane::default() });
        if !bounds.is(Mutant::NoWakeAfterRetire) {
            target.ring_all();
        }
        if was.generation == self.wires[c].generation {
            let zombie = bounds.is(Mutant::RetireWithoutJoin)
                || (bounds.is(Mutant::ResumeWithoutJoin) && !self.visitors.is_empty());
            if zombie && was.up {
                self.zombies[c] = self.wires[c].pipe.clone();
            }
            self.wires[c].pipe.deafen();
        }
    }

    fn checks(&self, bounds: &Bounds, last: &Final) -> Check {
        if last.block_digests == [digest(&self.target.digest)] || bounds.is(Mutant::DigestIgnored) {
            return Check::Agrees;
        }
        let chunk_digests = self.target.digest.iter().take(bounds.pages).map(|entry| entry.digest()).collect();
        Check::Differs { block: BlockId(0), chunk_digests }
    }

    /// The check ends. Where its Final has come to nothing, nobody is told.
    pub fn check_returns(&mut self, bounds: &Bounds) {
        let check = self.target.check.take().filter(|_| self.target.session.is_checking());
        if let Some(check) = check {
            self.target_event(bounds, TargetEvent::Checked(check));
        }
    }

    fn lanes_end(&mut self) {
        for (lane, wire) in self.target.lanes.iter_mut().zip(&mut self.wires) {
            lane.up = false;
            wire.pipe.deafen();
        }
    }

    pub fn target_crashes(&mut self) {
        self.target_leaves(Process::Crashed);
    }

    /// The process is gone; another one has its address, the image of its session, and none of its memory.
    pub fn target_is_put_back(&mut self, bounds: &Bounds) {
        let image = self.target.clone();
        let (prepared, lost) = (image.prepared, crate::source_side::connection_lost());
        self.target_leaves(Process::Crashed);
        self.target = TargetSide { replaced: true, prepared, session: image.session, ..TargetSide::new(true) };
        self.target.online = false;
        self.target_event(bounds, TargetEvent::ControlLost(lost));
    }

    /// What a target leaves behind is its last words; the rest is forgotten, so that states merge.
    fn target_leaves(&mut self, how: Process) {
        self.lanes_end();
        let target = &mut self.target;
        target.process = how;
        target.session = TargetSession::new(0, false);
        (target.hook, target.query) = (None, false);
        (target.lobby, target.sockets) = (Default::default(), Default::default());
        target.lanes = Default::default();
        target.digest = Default::default();
        target.check = None;
        if std::mem::take(&mut target.online) {
            self.control.target_leaves();
        }
        self.visitors.iter_mut().for_each(|visitor| visitor.target_leaves());
    }

    pub fn hook_returns(&mut self, bounds: &Bounds, good: bool) {
        let Some(hook) = self.target.hook.take() else { return };
        let result = if good { Ok(()) } else { Err(String::new()) };
        let event = match hook {
            Hook::Prepare if good => {
                self.target.prepared = true;
                TargetEvent::Prepared(InstanceId([0; 16]))
            }
            Hook::Prepare => TargetEvent::Refused(String::new()),
            Hook::Load => {
                self.target.ran |= good && bounds.is(Mutant::RunOnLoaded);
                TargetEvent::StateLoaded(result)
            }
            Hook::Run => {
                self.target.ran |= good;
                TargetEvent::RunReturned(result)
            }
        };
        self.target_event(bounds, event);
    }

    pub fn channel_arrives(&mut self, bounds: &Bounds, c: usize) {
        let came = self.target.lobby[c].remove(0);
        let channel = channel(c);
        // A mutant takes it for whatever would be good.
        let any = (1..=came + 2).find(|g| self.target.session.expects(channel, generation(*g)));
        let taken = any.filter(|_| bounds.is(Mutant::AnyGeneration)).unwrap_or(came);
        if self.target.session.expects(channel, generation(taken)) {
            self.target.sockets[c] = Some(came);
            self.target_event(bounds, TargetEvent::ChannelConnected { channel, generation: generation(taken) });
        } else if self.wires[c].generation == came {
            self.wires[c].pipe.deafen();
        }
    }

    /// A lane takes the next packet from its channel.
    pub fn lane_reads(&mut self, bounds: &Bounds, c: usize) {
        let Some(packet) = self.wires[c].pipe.receive() else { return };
        match packet {
            Packet::Page { page, version } => self.lands(page, version, self.target.lanes[c].passed),
            Packet::RoundEnd(round) => {
                self.target.lanes[c].passed = after(round);
                if bounds.is(Mutant::NoWakeAfterRetire) {
                    self.target.ring_all();
                    self.target.lanes[c].asleep = !self.target.reads(bounds, c);
                }
            }
            Packet::Flush(epoch) => self.target.lanes[c].flushed = rounds(epoch.0 + 1),
        }
    }

    /// Only with mutants: a lane that was taken out of the set lands what it finds.
    pub fn zombie_reads(&mut self, c: usize) {
        if let Some(Packet::Page { page, version }) = self.zombies[c].receive() {
            self.lands(page, version, rounds(0));
        }
    }

    fn lands(&mut self, page: usize, version: u8, passed: LaneWord) {
        let target = &mut self.target;
        self.seen.went_back |= version < target.memory[page];
        self.seen.landed_under_load |= target.hook == Some(Hook::Load);
        target.memory[page] = version;
        target.digest[page].record(passed, version);
    }

    /// The channel dies in the middle of a page, of which a part has landed.
    pub fn tears(&mut self, c: usize) {
        if let Some(Packet::Page { page, .. }) = self.wires[c].pipe.receive() {
            self.target.memory[page] = TORN;
        }
        self.wires[c].pipe.lose();
    }

    /// The next page of this channel is damaged on its way.
    pub fn damages(&mut self, c: usize) {
        if let Some(Packet::Page { page, .. }) = self.wires[c].pipe.next().copied() {
            self.wires[c].pipe.replace_next(Packet::Page { page, version: DAMAGED });
            self.seen.damaged[page] = true;
        }
    }

    pub fn lane_fails(&mut self, bounds: &Bounds, c: usize) {
        self.target.lanes[c].failed = true;
        self.target_event(bounds, TargetEvent::LaneFailed { channel: channel(c), reason: String::new() });
    }

    /// Tells the session of every lane that has moved, as the driver does at each of its turns.
    pub fn tells_of_lanes(&mut self, bounds: &Bounds) {
        for c in bounds.channels().filter(|c| self.target.has_moved(bounds, *c)).collect::<Vec<_>>() {
            let (rounds, epochs) = self.target.progress(bounds, c);
            self.target.lanes[c].told = (rounds, epochs);
            self.target_event(bounds, TargetEvent::LaneMoved { channel: channel(c), rounds, epochs });
            if self.target.process != Process::Alive || !self.target.lanes[c].up {
                return;
            }
        }
    }

    pub fn target_hears(&mut self, bounds: &Bounds, frame: SourceFrame) {
        self.target_event(bounds, TargetEvent::Frame(frame));
    }

    /// The oldest connection of which the target has not yet heard what it wants.
    pub fn visitor(&self) -> Option<usize> {
        self.visitors.iter().position(|visitor| !visitor.to_target.is_deaf())
    }

    pub fn hears_visitor(&mut self, bounds: &Bounds) {
        let Some(at) = self.visitor() else { return };
        match self.visitors[at].to_target.next() {
            Some(SourceFrame::Resume { instance, epoch, .. }) => {
                let (mut instance, epoch) = (*instance, *epoch);
                if self.target.replaced && !bounds.is(Mutant::ResumeByAnother) {
                    // It has a number of its own, which is not the one that the source names.
                    instance = InstanceId([1; 16]);
                }
                self.visitors[at].to_target.receive();
                self.seen.epochs_told = epoch.0;
                self.target_event(bounds, TargetEvent::ResumeAsked { instance, epoch });
            }
            Some(SourceFrame::Query { .. }) if bounds.is(Mutant::AnswerBeforeDiscard) => {
                self.visitors[at].to_source.send(TargetFrame::QueryAnswer { running: false });
                self.visitors[at].to_target.receive();
                self.target.query = true;
            }
            Some(SourceFrame::Query { .. }) => {
                self.visitors[at].to_target.receive();
                self.target_event(bounds, TargetEvent::QueryAsked);
            }
            _ => {}
        }
    }

    /// A connection that says nothing, that is gone, or that a newer one replaces.
    pub fn drops_visitor(&mut self) {
        if let Some(at) = self.visitor() {
            self.visitors[at].target_leaves();
        }
    }
}
