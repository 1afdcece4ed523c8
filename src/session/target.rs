#![forbid(unsafe_code)]
//! The target's side of a session: from Setup to Running, as (state, event) -> (state, actions).

use crate::error::{Failure, Outcome};
pub use crate::session::events::{Check, TargetAction, TargetEvent};
use crate::session::lanes::{Arrival, Lanes};
use crate::session::{FEATURE_RESUME, REPAIRS_MAX, code_of};
use crate::units::{ChannelId, Epoch, Generation, InstanceId, Round};
use crate::wire::control::{Final, Frame, PeerError, SourceFrame, TargetFrame};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Phase {
    AwaitSetup,
    Preparing,
    AwaitChannels,
    /// Pages land.
    Live,
    /// Final has come; the lanes have not all passed its round.
    AwaitLanes(Final),
    Checking,
    Loading,
    /// Loaded was sent: Commit, a new attempt (State from offset 0 on, or another Final), or the end may follow.
    AwaitCommit,
    /// The control connection is lost: the source may come back.
    Dormant,
    /// Commit has come: the guest is ours, even if the control connection is gone.
    Starting,
    Ended,
}

/// The target's state machine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TargetSession {
    phase: Phase,
    lanes: Lanes,
    /// Epochs acknowledged.
    applied: u64,
    state_bytes: u64,
    state_bytes_max: u64,
    /// Whether this side keeps the session when all connections are lost; then whether both do.
    resumes: bool,
    instance: InstanceId,
    /// Finals that did not agree with what had landed.
    mismatches: u32,
}

impl TargetSession {
    /// A session that takes at most this much device state, and may be resumed or not.
    pub fn new(state_bytes_max: u64, resumes: bool) -> TargetSession {
        TargetSession {
            phase: Phase::AwaitSetup,
            lanes: Lanes::default(),
            applied: 0,
            state_bytes: 0,
            state_bytes_max,
            resumes,
            instance: InstanceId([0; 16]),
            mismatches: 0,
        }
    }

    /// Whether it is over.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether what has landed is being compared with a Final that is still good.
    pub fn is_checking(&self) -> bool {
        self.phase == Phase::Checking
    }

    /// Whether the control connection is lost, and the source may come back.
    pub fn is_dormant(&self) -> bool {
        self.phase == Phase::Dormant
    }

    /// Whether both sides have agreed to keep the session when all connections are lost.
    pub fn resumes(&self) -> bool {
        self.resumes && self.has_prepared()
    }

    /// Whether a connection for this channel is expected now.
    pub fn expects(&self, channel: ChannelId, generation: Generation) -> bool {
        self.takes_channels() && self.lanes.expects(channel, generation)
    }

    /// The generation of a channel's lane.
    pub fn generation(&self, channel: ChannelId) -> Generation {
        self.lanes.generation(channel)
    }

    /// Finals that did not agree with what had landed.
    pub fn mismatches(&self) -> u32 {
        self.mismatches
    }

    /// What the target waits for from the source, in words.
    pub fn waits_for(&self) -> &'static str {
        words(&self.phase)
    }

    /// Takes an event; gives what is to be done, in order.
    pub fn on(&mut self, event: TargetEvent) -> Vec<TargetAction> {
        let mut out = Vec::new();
        if self.phase != Phase::Ended {
            self.step(event, &mut out);
        }
        out
    }

    fn step(&mut self, event: TargetEvent, out: &mut Vec<TargetAction>) {
        match (&self.phase, event) {
            // Commit has come: whatever happens now, the guest runs here or the VMM says that it does not.
            (Phase::Starting, TargetEvent::RunReturned(Ok(()))) => {
                out.push(TargetAction::Send(TargetFrame::Running));
                self.end(Outcome::Completed, out);
            }
            (Phase::Starting, TargetEvent::RunReturned(Err(reason))) => {
                out.push(TargetAction::Send(TargetFrame::RunFailed { reason: reason.clone() }));
                self.fail(Failure::Hook { hook: "run", reason }, out);
            }
            (Phase::Starting, _) => {}
            (_, TargetEvent::Frame(frame)) => self.frame(frame, out),
            (Phase::Preparing, TargetEvent::Prepared(instance)) => {
                self.phase = Phase::AwaitChannels;
                self.instance = instance;
                out.push(TargetAction::Send(self.ready()));
                // Where pages come on the control connection alone, nobody else is waited for.
                if self.lanes.is_empty() {
                    self.start(out);
                }
            }
            (Phase::Preparing, TargetEvent::Refused(reason)) => {
                out.push(TargetAction::Send(TargetFrame::Refused { reason: reason.clone() }));
                self.fail(Failure::Refused(reason), out);
            }
            (_, TargetEvent::ChannelConnected { channel, generation }) => {
                if !self.expects(channel, generation) {
                    return; // a stranger, or a double: the driver drops it, and the migration goes on
                }
                match self.lanes.arrived(channel, generation) {
                    Arrival::First => {
                        self.start_if_all_are_there(out);
                        out.push(TargetAction::Send(TargetFrame::ChannelJoined { channel, generation }));
                    }
                    Arrival::Announced => self.join(channel, generation, out),
                    Arrival::Early => {}
                }
            }
            (_, TargetEvent::LaneMoved { channel, rounds, epochs }) => {
                self.lanes.moved(channel, rounds, epochs);
                self.evaluate(out);
            }
            (_, TargetEvent::LaneFailed { channel, reason }) => {
                // It stays in the set, and the others wait for it, until the source says that it is lost.
                let generation = self.lanes.generation(channel);
                out.push(TargetAction::Send(TargetFrame::ChannelFailed { channel, generation, reason }));
            }
            // A Final that came to nothing while it was checked; another one may have come, and been answered, meanwhile.
            (
                Phase::Live | Phase::AwaitLanes(_) | Phase::AwaitCommit | Phase::Dormant,
                TargetEvent::Checked(_),
            ) => {}
            (Phase::Checking, TargetEvent::Checked(Check::Agrees)) => {
                self.phase = Phase::Loading;
                out.push(TargetAction::LoadState);
            }
            (Phase::Checking, TargetEvent::Checked(Check::Differs { block, chunk_digests })) => {
                let (round, whole) = (self.last_round(), chunk_digests.is_empty());
                out.push(TargetAction::Send(TargetFrame::DigestMismatch { round, block, chunk_digests }));
                self.mismatches += 1;
                // What was sent is what landed, and RAM differs all the same: sending it again would not help.
                if whole || self.mismatches > REPAIRS_MAX {
                    return self.discard(Failure::Digest { block, chunks: Vec::new() }, out);
                }
                self.phase = Phase::Live;
            }
            (Phase::Checking, TargetEvent::Checked(Check::StateDiffers(what))) => self.breach(what, out),
            (Phase::Loading, TargetEvent::StateLoaded(Ok(()))) => {
                self.phase = Phase::AwaitCommit;
                out.push(TargetAction::Send(TargetFrame::Loaded { round: self.last_round() }));
            }
            (Phase::Loading, TargetEvent::StateLoaded(Err(reason))) => {
                self.tell_and_discard(Failure::Hook { hook: "load_state", reason }, out);
            }
            (_, TargetEvent::CancelAsked) => {
                let reason = "cancelled at the target".to_owned();
                out.push(TargetAction::Send(TargetFrame::Discarded { reason }));
                if self.has_prepared() {
                    out.push(TargetAction::Discard);
                }
                self.end(Outcome::Cancelled, out);
            }
            (_, TargetEvent::ResumeAsked { instance, epoch }) => self.resume(instance, epoch, out),
            (_, TargetEvent::QueryAsked) => {
                // A fence: whatever the old connection may still hold, this guest will not run.
                out.push(TargetAction::DropControl);
                if self.has_prepared() {
                    out.push(TargetAction::Discard);
                }
                self.phase = Phase::Ended;
                out.push(TargetAction::AnswerVisitor(TargetFrame::QueryAnswer { running: false }));
                out.push(TargetAction::End(Outcome::Failed(Failure::Fenced)));
            }
            (_, TargetEvent::ControlLost(_)) if self.resumes && self.may_be_resumed() => {
                self.phase = Phase::Dormant;
                out.push(TargetAction::DropControl);
            }
            (_, TargetEvent::Failed(why) | TargetEvent::ControlLost(why)) => self.tell_and_discard(why, out),
            // An event of the driver that comes in no other phase: the driver's fault, not the peer's.
            (phase, event) => debug_assert!(false, "{event:?} in {phase:?}"),
        }
    }

    fn frame(&mut self, frame: SourceFrame, out: &mut Vec<TargetAction>) {
        match (&self.phase, frame) {
            (Phase::AwaitSetup, SourceFrame::Setup(setup)) => {
                self.lanes = Lanes::expected(setup.channels);
                self.resumes &= setup.features & FEATURE_RESUME != 0;
                self.phase = Phase::Preparing;
                out.push(TargetAction::Prepare(setup));
            }
            // After Loaded: the source has withdrawn that attempt, and more rounds come.
            (Phase::Live | Phase::AwaitCommit, SourceFrame::State { offset, bytes }) => {
                // A new attempt at the hand-over starts over at 0; otherwise pieces come in order, without a gap.
                let goes_on = self.phase == Phase::Live && offset == self.state_bytes;
                if offset != 0 && !goes_on {
                    return self.breach(format!("State at offset {offset}, {} bytes are here", self.state_bytes), out);
                }
                if offset == 0 {
                    self.phase = Phase::Live;
                    out.push(TargetAction::ForgetState);
                }
                self.state_bytes = offset + bytes.len() as u64;
                if self.state_bytes > self.state_bytes_max {
                    let max = self.state_bytes_max;
                    return self.breach(format!("the device state exceeds the limit of {max} bytes"), out);
                }
                if !bytes.is_empty() {
                    out.push(TargetAction::KeepState(bytes));
                }
            }
            (Phase::AwaitChannels, SourceFrame::ChannelLost { channel, generation }) => {
                if self.retire(channel, generation, out) {
                    self.start_if_all_are_there(out);
                }
            }
            // A Final that the lane stood in is no longer good: another one comes, after another round.
            (
                Phase::Live | Phase::AwaitLanes(_) | Phase::Checking | Phase::AwaitCommit,
                SourceFrame::ChannelLost { channel, generation },
            ) => {
                self.phase = Phase::Live;
                if self.retire(channel, generation, out) {
                    self.evaluate(out);
                }
            }
            (Phase::Live, SourceFrame::ChannelJoin { channel, generation }) => {
                if !self.lanes.announced(channel, generation) {
                    return self.breach(format!("ChannelJoin for channel {channel}, generation {generation}"), out);
                }
                if self.lanes.is_here(channel) {
                    self.join(channel, generation, out);
                }
            }
            // The chunks come as pages of the next round, like any others.
            (Phase::Live, SourceFrame::Repair { .. }) => {}
            (Phase::Live, SourceFrame::Final(last)) => {
                if !last.lanes.iter().copied().eq(self.lanes.set()) {
                    return self.breach("Final names other channels than have joined".to_owned(), out);
                }
                if last.state_bytes != self.state_bytes {
                    let here = self.state_bytes;
                    return self.breach(format!("Final says {} bytes of state, {here} came", last.state_bytes), out);
                }
                self.phase = Phase::AwaitLanes(last);
                self.evaluate(out);
            }
            (Phase::AwaitCommit, SourceFrame::Commit) => {
                self.phase = Phase::Starting;
                out.push(TargetAction::Run);
            }
            // Read before the connection was lost, and handled after it: the source begins anew where it is.
            (Phase::Dormant, SourceFrame::Ping { .. } | SourceFrame::ChannelLost { .. } | SourceFrame::ChannelJoin { .. }) => {}
            (Phase::Dormant, SourceFrame::State { .. } | SourceFrame::Final(_) | SourceFrame::Repair { .. }) => {}
            (_, SourceFrame::Ping { nonce }) => out.push(TargetAction::Pong { nonce }),
            (_, SourceFrame::Cancel { reason }) => self.discard(Failure::CancelledBySource(reason), out),
            (_, SourceFrame::Error(PeerError { text, .. })) => self.discard(Failure::Peer(text), out),
            (phase, frame) => {
                let what = format!("{} came while the target waited for {}", frame.name(), words(phase));
                self.breach(what, out);
            }
        }
    }

    /// What the lanes' progress allows: an epoch to acknowledge, a Final to check.
    fn evaluate(&mut self, out: &mut Vec<TargetAction>) {
        let flushed = self.lanes.flushed_by_all();
        if flushed > self.applied {
            self.applied = flushed;
            let lanes = self.lanes.set().collect();
            out.push(TargetAction::Send(TargetFrame::EpochApplied { epoch: Epoch(flushed - 1), lanes }));
        }
        if let Phase::AwaitLanes(last) = &self.phase {
            if self.lanes.is_empty() || self.lanes.passed_by_all() > u64::from(last.round.0) {
                let last = last.clone();
                self.phase = Phase::Checking;
                // The source learns that the lanes are through before hooks keep this side from answering its Pings.
                out.push(TargetAction::Pong { nonce: 0 });
                out.push(TargetAction::Check(last));
            }
        }
    }

    fn start_if_all_are_there(&mut self, out: &mut Vec<TargetAction>) {
        if self.phase == Phase::AwaitChannels && self.lanes.all_are_there() {
            self.start(out);
        }
    }

    fn start(&mut self, out: &mut Vec<TargetAction>) {
        self.phase = Phase::Live;
        out.push(TargetAction::StartLanes);
    }

    /// A channel is back: its lane is in the set before the source is told so.
    fn join(&mut self, channel: ChannelId, generation: Generation, out: &mut Vec<TargetAction>) {
        self.lanes.joined(channel);
        out.push(TargetAction::StartLane { channel });
        out.push(TargetAction::Send(TargetFrame::ChannelJoined { channel, generation }));
    }

    /// The source has given a channel up. False after a breach.
    fn retire(&mut self, channel: ChannelId, generation: Generation, out: &mut Vec<TargetAction>) -> bool {
        if !self.lanes.lost(channel, generation) {
            self.breach(format!("ChannelLost for channel {channel}, generation {generation}"), out);
            return false;
        }
        out.push(TargetAction::RetireLane { channel });
        out.push(TargetAction::Send(TargetFrame::ChannelRetired { channel, generation }));
        true
    }

    fn resume(&mut self, instance: InstanceId, epoch: Epoch, out: &mut Vec<TargetAction>) {
        if !self.resumes || !(self.may_be_resumed() || self.phase == Phase::Dormant) || instance != self.instance {
            let reason = "this session cannot be resumed here".to_owned();
            out.push(TargetAction::AnswerVisitor(TargetFrame::Refused { reason }));
            return;
        }
        // No lane of before may land anything after the source was told that it may send again.
        out.push(TargetAction::DropControl);
        out.extend(self.lanes.set().map(|(channel, _)| TargetAction::RetireLane { channel }));
        self.lanes.all_lost();
        out.push(TargetAction::TakeVisitor);
        out.push(TargetAction::ForgetState);
        self.state_bytes = 0;
        self.applied = epoch.0;
        self.phase = Phase::Live;
        out.push(TargetAction::Send(self.ready()));
    }

    fn ready(&self) -> TargetFrame {
        TargetFrame::Ready { instance: self.instance, features: if self.resumes { FEATURE_RESUME } else { 0 } }
    }

    /// Whether there is something to go on with: no hook of the VMM is in progress, and the guest is not ours.
    fn may_be_resumed(&self) -> bool {
        matches!(self.phase, Phase::Live | Phase::AwaitLanes(_) | Phase::Checking | Phase::AwaitCommit)
    }

    /// Whether data channels are still to come for the first time.
    pub fn awaits_channels(&self) -> bool {
        self.phase == Phase::AwaitChannels
    }

    fn takes_channels(&self) -> bool {
        matches!(self.phase, Phase::AwaitChannels | Phase::Live)
    }

    fn last_round(&self) -> Round {
        Round(self.lanes.passed_by_all().max(1).saturating_sub(1) as u32)
    }

    fn has_prepared(&self) -> bool {
        !matches!(self.phase, Phase::AwaitSetup | Phase::Preparing)
    }

    fn breach(&mut self, what: String, out: &mut Vec<TargetAction>) {
        self.tell_and_discard(Failure::Protocol(what), out);
    }

    fn tell_and_discard(&mut self, why: Failure, out: &mut Vec<TargetAction>) {
        let code = code_of(&why);
        out.push(TargetAction::Send(TargetFrame::Error(PeerError { code, text: why.to_string() })));
        self.discard(why, out);
    }

    /// Before Commit the target never runs: it gives the guest up, and says so.
    fn discard(&mut self, why: Failure, out: &mut Vec<TargetAction>) {
        out.push(TargetAction::Send(TargetFrame::Discarded { reason: why.to_string() }));
        self.fail(why, out);
    }

    fn fail(&mut self, why: Failure, out: &mut Vec<TargetAction>) {
        if self.has_prepared() {
            out.push(TargetAction::Discard);
        }
        self.end(Outcome::Failed(why), out);
    }

    fn end(&mut self, outcome: Outcome, out: &mut Vec<TargetAction>) {
        self.phase = Phase::Ended;
        out.push(TargetAction::End(outcome));
    }
}

fn words(phase: &Phase) -> &'static str {
    match phase {
        Phase::AwaitSetup => "Setup",
        Phase::Preparing => "its own prepare hook",
        Phase::AwaitChannels => "the data channels",
        Phase::Live => "pages or Final",
        Phase::AwaitLanes(_) | Phase::Checking => "the last round on every channel",
        Phase::Loading => "its own load_state hook",
        Phase::AwaitCommit => "Commit",
        Phase::Dormant => "the source to come back",
        Phase::Starting | Phase::Ended => "nothing",
    }
}
