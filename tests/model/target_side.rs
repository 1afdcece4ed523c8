//! The target's side of the world: its driver, its lanes, its memory.

use pageferry::barrier::{LaneWord, min_over_set};
use pageferry::session::source::FIRST_GENERATION;
use pageferry::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use pageferry::units::{BlockId, InstanceId};
use pageferry::wire::control::{Final, SourceFrame, TargetFrame};

use crate::link::Packet;
use crate::world::{
    Bounds, CHANNELS, Entry, Gate, Mutant, PAGES, Process, Verdict, World, after, channel, digest, rounds,
};

/// The hook of the VMM that the driver's thread is in: it hears nothing until that returns.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hook {
    Prepare,
    Load,
    Run,
}

/// A lane, and what the session was last told of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Lane {
    pub passed: LaneWord,
    pub flushed: LaneWord,
    pub told: (LaneWord, LaneWord),
    pub failed: bool,
}

/// The target's process.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TargetSide {
    pub process: Process,
    pub session: TargetSession,
    pub verdict: Option<Verdict>,
    pub gate: Gate,
    pub hook: Option<Hook>,
    /// Channels that are connected and have not yet said Hello.
    pub lobby: [bool; CHANNELS],
    pub lanes_up: bool,
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
    pub fn new() -> TargetSide {
        TargetSide {
            process: Process::Alive,
            session: TargetSession::new(STATE_BYTES_MAX),
            verdict: None,
            gate: Gate::Open,
            hook: None,
            lobby: [false; CHANNELS],
            lanes_up: false,
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

    /// Whether this lane reads: not while it waits at the barrier, which is decided by the rule that ships.
    pub fn reads(&self, bounds: &Bounds, c: usize) -> bool {
        let waits_for = bounds.channels().skip(usize::from(bounds.is(Mutant::BarrierIgnoresLane0)));
        let all_passed = min_over_set(waits_for.map(|c| self.lanes[c].passed)).unwrap_or(0);
        self.lanes_up && !self.lanes[c].failed && all_passed >= self.lanes[c].passed.count()
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
        self.lanes_up && self.progress(bounds, c) != self.lanes[c].told
    }
}

impl World {
    /// Tells the target's session what happened, and does what it says.
    pub fn target_event(&mut self, bounds: &Bounds, event: TargetEvent) {
        for action in self.target.session.on(event) {
            self.target_does(bounds, action);
            if self.target.process != Process::Alive {
                return;
            }
        }
    }

    fn target_does(&mut self, bounds: &Bounds, action: TargetAction) {
        let target = &mut self.target;
        match action {
            TargetAction::Send(frame) => self.control.to_source.send(frame),
            TargetAction::Prepare(_) => target.hook = Some(Hook::Prepare),
            TargetAction::StartLanes => target.lanes_up = true,
            TargetAction::KeepState(_) | TargetAction::ForgetState | TargetAction::Pong { .. } => {}
            TargetAction::Check(last) => {
                let check = self.checks(&last);
                self.seen.digests_differed |= check != Check::Agrees;
                self.target_event(bounds, TargetEvent::Checked(check));
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
            TargetAction::Discard => target.discards += 1,
            TargetAction::End(outcome) => {
                target.verdict = Some(Verdict::from(&outcome));
                self.target_leaves(Process::Ended);
            }
        }
    }

    fn checks(&self, last: &Final) -> Check {
        if last.block_digests == [digest(&self.target.digest)] {
            Check::Agrees
        } else {
            Check::Differs { block: BlockId(0), chunk_digests: Vec::new() }
        }
    }

    fn lanes_end(&mut self) {
        self.target.lanes_up = false;
        self.wires.iter_mut().for_each(|wire| wire.deafen());
    }

    pub fn target_crashes(&mut self) {
        self.target_leaves(Process::Crashed);
    }

    /// What a target leaves behind is its last words; the rest is forgotten, so that states merge.
    fn target_leaves(&mut self, how: Process) {
        self.lanes_end();
        let target = &mut self.target;
        target.process = how;
        target.session = TargetSession::new(0);
        target.hook = None;
        target.lobby = [false; CHANNELS];
        target.lanes = Default::default();
        target.digest = Default::default();
        self.control.to_source.close();
        self.control.to_target.deafen();
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
        self.target.lobby[c] = false;
        let (channel, generation) = (channel(c), FIRST_GENERATION);
        if self.target.session.expects(channel, generation) {
            self.target_event(bounds, TargetEvent::ChannelConnected { channel, generation });
        }
    }

    /// A lane takes the next packet from its channel.
    pub fn lane_reads(&mut self, c: usize) {
        let Some(packet) = self.wires[c].receive() else { return };
        let target = &mut self.target;
        let lane = &mut target.lanes[c];
        match packet {
            Packet::Page { page, version } => {
                self.seen.went_back |= version < target.memory[page];
                self.seen.landed_under_load |= target.hook == Some(Hook::Load);
                target.memory[page] = version;
                target.digest[page].record(lane.passed, version);
            }
            Packet::RoundEnd(round) => lane.passed = after(round),
            Packet::Flush(epoch) => lane.flushed = rounds(epoch.0 + 1),
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
            if !self.target.lanes_up {
                return;
            }
        }
    }

    pub fn target_hears(&mut self, bounds: &Bounds, frame: SourceFrame) {
        self.target_event(bounds, TargetEvent::Frame(frame));
    }
}
