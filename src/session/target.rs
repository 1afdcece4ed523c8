#![forbid(unsafe_code)]
//! The target's side of a session: from Setup to Running, as (state, event) -> (state, actions).

use crate::barrier::{LaneWord, min_over_set};
use crate::error::{Failure, Outcome};
use crate::session::code_of;
use crate::session::source::FIRST_GENERATION;
use crate::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Round};
use crate::wire::control::{Final, Frame, PeerError, Setup, SourceFrame, TargetFrame};

/// What happens to the target.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum TargetEvent {
    /// The source sent a frame.
    Frame(SourceFrame),
    /// The VMM took the machine, and every block reads as zeros.
    Prepared(InstanceId),
    /// The VMM does not take the machine.
    Refused(String),
    /// A data connection with a good Hello is there.
    ChannelConnected {
        /// The channel.
        channel: ChannelId,
        /// Its generation.
        generation: Generation,
    },
    /// A lane's progress, as it stands in the barrier.
    LaneMoved {
        /// The channel.
        channel: ChannelId,
        /// Rounds passed.
        rounds: LaneWord,
        /// Epochs flushed.
        epochs: LaneWord,
    },
    /// A lane ended with an error.
    LaneFailed {
        /// The channel.
        channel: ChannelId,
        /// Why.
        reason: String,
    },
    /// The digests were compared with those of Final.
    Checked(Check),
    /// `load_state` returned.
    StateLoaded(Result<(), String>),
    /// `run` returned.
    RunReturned(Result<(), String>),
    /// Someone asked to cancel here.
    CancelAsked,
    /// The control connection is gone, a deadline passed, or something of ours failed.
    Failed(Failure),
}

/// The result of comparing with Final.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Check {
    /// Everything agrees.
    Agrees,
    /// A block differs.
    Differs {
        /// The block.
        block: BlockId,
        /// The target's digests of its chunks, from which the source learns which they are.
        chunk_digests: Vec<u64>,
    },
    /// The device state is not what Final says.
    StateDiffers(String),
}

/// What the driver is to do.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum TargetAction {
    /// Send this on the control connection.
    Send(TargetFrame),
    /// Ask the VMM for its memory, and make it read as zeros.
    Prepare(Setup),
    /// All channels are connected: start the lanes.
    StartLanes,
    /// Keep this piece of device state; pieces come in order, without a gap.
    KeepState(Vec<u8>),
    /// Forget the device state that is here: a new attempt at the hand-over sends it again.
    ForgetState,
    /// Answer a Ping with the lanes' progress.
    Pong {
        /// Its nonce.
        nonce: u64,
    },
    /// Compare with Final: everything has landed.
    Check(Final),
    /// Give the VMM its device state.
    LoadState,
    /// Let the VMM run the guest.
    Run,
    /// Tell the VMM that the guest will not run here; undoes a load.
    Discard,
    /// It is over.
    End(Outcome),
}

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
    /// Loaded was sent: Commit, a new attempt (State from offset 0 on), or the end may follow.
    AwaitCommit,
    /// Commit has come: the guest is ours, even if the control connection is gone.
    Starting,
    Ended,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Lane {
    connected: bool,
    rounds: LaneWord,
    epochs: LaneWord,
}

/// The target's state machine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TargetSession {
    phase: Phase,
    lanes: Vec<Lane>,
    /// Epochs acknowledged.
    applied: u64,
    state_bytes: u64,
    state_bytes_max: u64,
    /// A lane that ended after Loaded, when nothing was left to carry: that counts only if rounds go on after all.
    ended_early: Option<(ChannelId, String)>,
}

impl TargetSession {
    /// A session that takes at most this much device state.
    pub fn new(state_bytes_max: u64) -> TargetSession {
        TargetSession {
            phase: Phase::AwaitSetup,
            lanes: Vec::new(),
            applied: 0,
            state_bytes: 0,
            state_bytes_max,
            ended_early: None,
        }
    }

    /// Whether it is over.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether a connection for this channel is expected now.
    pub fn expects(&self, channel: ChannelId, generation: Generation) -> bool {
        self.phase == Phase::AwaitChannels
            && generation == FIRST_GENERATION
            && self.lanes.get(usize::from(channel.0)).is_some_and(|lane| !lane.connected)
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
                out.push(TargetAction::Send(TargetFrame::Ready { instance, features: 0 }));
            }
            (Phase::Preparing, TargetEvent::Refused(reason)) => {
                out.push(TargetAction::Send(TargetFrame::Refused { reason: reason.clone() }));
                self.fail(Failure::Refused(reason), out);
            }
            (_, TargetEvent::ChannelConnected { channel, generation }) => {
                if !self.expects(channel, generation) {
                    return; // a stranger, or a double: the driver drops it, and the migration goes on
                }
                self.lanes[usize::from(channel.0)].connected = true;
                let all = self.lanes.iter().all(|lane| lane.connected);
                if all {
                    self.phase = Phase::Live;
                    out.push(TargetAction::StartLanes);
                }
                out.push(TargetAction::Send(TargetFrame::ChannelJoined { channel, generation }));
            }
            (_, TargetEvent::LaneMoved { channel, rounds, epochs }) => {
                if let Some(lane) = self.lanes.get_mut(usize::from(channel.0)) {
                    lane.rounds = rounds;
                    lane.epochs = epochs;
                }
                self.evaluate(out);
            }
            (Phase::AwaitCommit, TargetEvent::LaneFailed { channel, reason }) => {
                self.ended_early = Some((channel, reason)); // all has landed: nothing is left to carry
            }
            (_, TargetEvent::LaneFailed { channel, reason }) => self.lane_failed(channel, reason, out),
            (Phase::Checking, TargetEvent::Checked(Check::Agrees)) => {
                self.phase = Phase::Loading;
                out.push(TargetAction::LoadState);
            }
            (Phase::Checking, TargetEvent::Checked(Check::Differs { block, chunk_digests })) => {
                let round = self.last_round();
                out.push(TargetAction::Send(TargetFrame::DigestMismatch { round, block, chunk_digests }));
                self.discard(Failure::Digest { block, chunks: Vec::new() }, out);
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
            (_, TargetEvent::Failed(why)) => self.tell_and_discard(why, out),
            // An event of the driver that comes in no other phase: the driver's fault, not the peer's.
            (phase, event) => debug_assert!(false, "{event:?} in {phase:?}"),
        }
    }

    fn frame(&mut self, frame: SourceFrame, out: &mut Vec<TargetAction>) {
        match (&self.phase, frame) {
            (Phase::AwaitSetup, SourceFrame::Setup(setup)) => {
                let lane = Lane { connected: false, rounds: LaneWord::default(), epochs: LaneWord::default() };
                self.lanes = vec![lane; setup.channels.into()];
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
                if let Some((channel, reason)) = self.ended_early.take() {
                    return self.lane_failed(channel, reason, out);
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
            (Phase::Live, SourceFrame::Final(last)) => {
                let set = (0..self.lanes.len()).map(|c| (ChannelId(c as u8), FIRST_GENERATION));
                if !last.lanes.iter().copied().eq(set) {
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
        let flushed = min_over_set(self.lanes.iter().map(|lane| lane.epochs)).unwrap_or(0);
        if flushed > self.applied {
            self.applied = flushed;
            let lanes = (0..self.lanes.len()).map(|c| (ChannelId(c as u8), FIRST_GENERATION)).collect();
            out.push(TargetAction::Send(TargetFrame::EpochApplied { epoch: Epoch(flushed - 1), lanes }));
        }
        if let Phase::AwaitLanes(last) = &self.phase {
            let passed = min_over_set(self.lanes.iter().map(|lane| lane.rounds)).unwrap_or(0);
            if passed > u64::from(last.round.0) {
                let last = last.clone();
                self.phase = Phase::Checking;
                // The source learns that the lanes are through before hooks keep this side from answering its Pings.
                out.push(TargetAction::Pong { nonce: 0 });
                out.push(TargetAction::Check(last));
            }
        }
    }

    fn lane_failed(&mut self, channel: ChannelId, reason: String, out: &mut Vec<TargetAction>) {
        let generation = FIRST_GENERATION;
        out.push(TargetAction::Send(TargetFrame::ChannelFailed { channel, generation, reason: reason.clone() }));
        self.discard(Failure::Channel { channel, generation, reason }, out);
    }

    fn last_round(&self) -> Round {
        let passed = min_over_set(self.lanes.iter().map(|lane| lane.rounds)).unwrap_or(1);
        Round(passed.saturating_sub(1) as u32)
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
        Phase::Starting | Phase::Ended => "nothing",
    }
}
