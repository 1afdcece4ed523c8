#![forbid(unsafe_code)]
//! The source's side of a session: from Setup to the hand-over, as (state, event) -> (state, actions).

use crate::error::{Failure, Outcome};
use crate::session::channels::{Channels, Fate};
pub use crate::session::events::{Facts, SourceAction, SourceEvent};
pub use crate::units::FIRST_GENERATION;
use crate::session::{EpochLedger, FEATURE_RESUME, REPAIRS_MAX, code_of};
use crate::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Item, Round};
use crate::wire::control::{CHUNKS_PER_FRAME_MAX, Final, Frame, PeerError, SourceFrame, TargetFrame};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Fresh,
    AwaitReady,
    AwaitLanes,
    /// The guest runs and rounds are shipped.
    Live,
    /// Pause was asked for.
    Pausing,
    /// The guest stands still; the rest is shipped, the state saved.
    Paused,
    /// Final was sent.
    AwaitLoaded,
    /// Final was sent, and then a channel was lost: whatever the target says of that Final says nothing. When it has
    /// retired the channel, no answer is on its way any more.
    Voided,
    /// Final was sent, and is withdrawn: the target still answers it, and until it has, no page may land under its
    /// load_state.
    Withdrawing,
    /// Loaded came; the gate decides.
    AwaitGate,
    /// Commit counts as sent: from here on the source never resumes by itself.
    AwaitRunning,
    /// The control connection is lost before Commit: a new one is to come.
    Reconnecting,
    /// Resume was sent on it.
    AwaitResumed,
    /// The control connection is lost after Commit: a new one is to come.
    Reasking,
    /// Query was sent on it.
    AwaitAnswer,
    Ended,
}

/// The source's state machine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SourceSession {
    phase: Phase,
    channels: Channels,
    epochs: EpochLedger,
    /// Rounds whose end has been pushed.
    rounds: u32,
    /// Whether both sides keep the session when all connections are lost.
    resumes: bool,
    /// The target process.
    instance: InstanceId,
    /// Why the control connection was lost last.
    lost: Option<Failure>,
    /// Channels that were lost after Loaded, when nothing was left to carry: that counts only if rounds go on after all.
    lost_late: Vec<(ChannelId, Generation, String)>,
    repairs: u32,
}

impl SourceSession {
    /// A session over this many channels.
    pub fn new(channels: u8) -> SourceSession {
        SourceSession {
            phase: Phase::Fresh,
            channels: Channels::joining(channels),
            epochs: EpochLedger::default(),
            rounds: 0,
            resumes: false,
            instance: InstanceId([0; 16]),
            lost: None,
            lost_late: Vec::new(),
            repairs: 0,
        }
    }

    /// The round that is being filled.
    pub fn round(&self) -> Round {
        Round(self.rounds)
    }

    /// The epoch that is being filled.
    pub fn epoch(&self) -> Epoch {
        self.epochs.open()
    }

    /// Whether an epoch may be closed now, or too many are outstanding.
    pub fn may_close_epoch(&self) -> bool {
        self.epochs.may_close()
    }

    /// Whether Commit counts as sent: from then on the guest may belong to the target.
    pub fn is_committed(&self) -> bool {
        matches!(self.phase, Phase::AwaitRunning | Phase::Reasking | Phase::AwaitAnswer)
    }

    /// Whether it is over.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// What the source waits for, in words, where it waits for the target's VMM rather than for the wire.
    pub fn waits_for_hook(&self) -> Option<&'static str> {
        match self.phase {
            Phase::AwaitReady => Some("Ready (the target's prepare)"),
            Phase::AwaitLoaded | Phase::Voided | Phase::Withdrawing => Some("Loaded (the target's load_state)"),
            Phase::AwaitRunning => Some("Running (the target's run)"),
            Phase::AwaitAnswer => Some("the answer to Query (the target's discard)"),
            _ => None,
        }
    }

    /// Whether Final was sent, and the target's Loaded is to come.
    pub fn awaits_loaded(&self) -> bool {
        self.phase == Phase::AwaitLoaded
    }

    /// Whether the guest stands still and rounds of the rest are to be shipped: also when a Final has come to nothing.
    pub fn is_paused(&self) -> bool {
        self.phase == Phase::Paused
    }

    /// Whether the answer to a Final that was withdrawn is still to come: until then no round may be pushed.
    pub fn is_withdrawing(&self) -> bool {
        self.phase == Phase::Withdrawing
    }

    /// Whether the control connection is lost, and a new one wanted: to go on with the session, or to learn who owns the
    /// guest.
    pub fn wants_control(&self) -> bool {
        matches!(self.phase, Phase::Reconnecting | Phase::Reasking)
    }

    /// Why the control connection was lost, where it was.
    pub fn lost(&self) -> Option<&Failure> {
        self.lost.as_ref()
    }

    /// Whether a channel has no connection, and none is being given up.
    pub fn is_down(&self, channel: ChannelId) -> bool {
        self.channels.is_down(channel)
    }

    /// Whether it waits for the answer to Resume.
    pub fn awaits_resumed(&self) -> bool {
        self.phase == Phase::AwaitResumed
    }

    /// Whether both sides have agreed to keep the session when all connections are lost.
    pub fn resumes(&self) -> bool {
        self.resumes
    }

    /// Whether a lost channel may be connected again now. Not while the guest stands still, where the others carry what
    /// is left sooner, unless there are no others.
    pub fn wants_channels(&self) -> bool {
        match self.phase {
            Phase::Live => true,
            Phase::Pausing | Phase::Paused => self.channels.live() == 0,
            _ => false,
        }
    }

    /// Channels in the set.
    pub fn live_channels(&self) -> usize {
        self.channels.live()
    }

    /// Whether a channel is in the set.
    pub fn is_live(&self, channel: ChannelId) -> bool {
        self.channels.is_live(channel)
    }

    /// The generation of a channel's latest connection.
    pub fn generation(&self, channel: ChannelId) -> Generation {
        self.channels.generation(channel)
    }

    /// Channels that were connected, and that the target has not yet said to have joined.
    pub fn joining(&self) -> impl Iterator<Item = (ChannelId, Generation)> + '_ {
        self.channels.joining_now()
    }

    /// Whether every channel is in the set or out of it: none is about to join, or to be retired.
    pub fn channels_are_settled(&self) -> bool {
        self.channels.are_settled()
    }

    /// Whether the target has still to say that a lost channel is out of its set. The driver must set a time for that, too.
    pub fn awaits_retired(&self) -> bool {
        self.channels.any_is_lost()
    }

    /// How often chunks had to travel again.
    pub fn repairs(&self) -> u32 {
        self.repairs
    }

    /// Whether it waits for the lanes to join. The driver must set a time for that: a data connection can be lost before
    /// its Hello is heard, and then neither side has a lane whose end would tell it.
    pub fn awaits_lanes(&self) -> bool {
        self.phase == Phase::AwaitLanes
    }

    /// Takes an event; gives what is to be done, in order.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        let mut out = Vec::new();
        if self.phase != Phase::Ended {
            self.step(event, &mut out);
        }
        out
    }

    fn step(&mut self, event: SourceEvent, out: &mut Vec<SourceAction>) {
        match (self.phase, event) {
            (Phase::Fresh, SourceEvent::Connected(setup)) => {
                self.phase = Phase::AwaitReady;
                self.resumes = setup.features & FEATURE_RESUME != 0;
                out.push(SourceAction::Send(SourceFrame::Setup(setup)));
            }
            (_, SourceEvent::Frame(frame)) => self.frame(frame, out),
            (Phase::Live | Phase::Paused, SourceEvent::RoundPushed) => {
                out.push(SourceAction::PushMark(Item::RoundEnd(self.round())));
                self.rounds += 1;
            }
            (Phase::Live | Phase::Paused, SourceEvent::EpochDue) => {
                if let Some(epoch) = self.epochs.close() {
                    out.push(SourceAction::PushMark(Item::Flush(epoch)));
                }
            }
            (Phase::Live, SourceEvent::SwitchOver) => {
                self.phase = Phase::Pausing;
                out.push(SourceAction::PauseGuest);
            }
            (Phase::Pausing, SourceEvent::GuestPaused) => {
                self.phase = Phase::Paused;
                // Whoever has not joined by now only keeps the guest waiting, unless there is nobody else.
                let others = self.channels.live() > 0;
                let late: Vec<_> = self.channels.joining_now().filter(|_| others).collect();
                for (channel, generation) in late {
                    self.lose(channel, generation, "the guest was paused before it had joined".to_owned(), out);
                }
            }
            (Phase::Paused, SourceEvent::Drained(facts)) => {
                debug_assert!(self.rounds > 0, "a paused round was pushed");
                debug_assert!(self.channels.are_settled(), "a channel that may hold runs");
                self.phase = Phase::AwaitLoaded;
                out.push(SourceAction::Send(SourceFrame::Final(Final {
                    round: Round(self.rounds - 1),
                    epoch: self.epochs.open(),
                    lanes: self.channels.set().collect(),
                    block_digests: facts.block_digests,
                    full_digests: facts.full_digests,
                    state_bytes: facts.state_bytes,
                    state_crc: facts.state_crc,
                })));
            }
            (Phase::Paused | Phase::AwaitGate, SourceEvent::Overran) => self.withdraw(out),
            (Phase::AwaitLoaded | Phase::Voided, SourceEvent::Overran) => self.phase = Phase::Withdrawing,
            (Phase::AwaitGate, SourceEvent::CommitGranted) => {
                // Before its first byte goes to the kernel: from here on we cannot know what the target has read.
                self.phase = Phase::AwaitRunning;
                out.push(SourceAction::Send(SourceFrame::Commit));
            }
            // Past the point of no return a cancel is too late, and a data channel has nothing left to carry.
            (
                Phase::AwaitRunning | Phase::Reasking | Phase::AwaitAnswer,
                SourceEvent::CancelAsked | SourceEvent::ChannelFailed { .. } | SourceEvent::ChannelOpened { .. },
            ) => {}
            // An attempt at a new one came to nothing: the next is the driver's to make.
            (Phase::Reconnecting | Phase::Reasking, SourceEvent::ControlLost(_)) => {}
            (Phase::AwaitRunning | Phase::AwaitAnswer, SourceEvent::ControlLost(why)) if self.resumes => {
                self.lost.get_or_insert(why);
                self.phase = Phase::Reasking;
                out.push(SourceAction::Reconnect);
            }
            (Phase::AwaitRunning, SourceEvent::Failed(why) | SourceEvent::ControlLost(why)) => {
                self.end(Outcome::Uncertain(why), out);
            }
            // What took the connection says more than that no new one came.
            (Phase::Reasking | Phase::AwaitAnswer, SourceEvent::Failed(why)) => {
                let why = self.lost.take().unwrap_or(why);
                self.end(Outcome::Uncertain(why), out);
            }
            (Phase::Reasking, SourceEvent::Reconnected(session)) => {
                self.phase = Phase::AwaitAnswer;
                out.push(SourceAction::Send(SourceFrame::Query { session }));
            }
            (_, SourceEvent::CancelAsked) => {
                if self.phase != Phase::Fresh {
                    let reason = "cancelled at the source".to_owned();
                    out.push(SourceAction::Send(SourceFrame::Cancel { reason }));
                }
                self.end(Outcome::Cancelled, out);
            }
            (_, SourceEvent::ChannelFailed { channel, generation, reason }) => {
                self.lose(channel, generation, reason, out);
            }
            (_, SourceEvent::ChannelOpened { channel, generation }) => {
                let wanted = self.wants_channels();
                if self.channels.opened(channel, generation) && wanted {
                    out.push(SourceAction::Send(SourceFrame::ChannelJoin { channel, generation }));
                } else {
                    self.channels.gone(channel);
                    out.push(SourceAction::HangUp { channel });
                }
            }
            (Phase::AwaitLoaded, SourceEvent::Damaged { block, chunks }) => self.repair(block, chunks, out),
            (Phase::Voided | Phase::Withdrawing, SourceEvent::Damaged { .. }) => {}
            (_, SourceEvent::ControlLost(why)) if self.resumes && self.is_shipping() => {
                self.lost = Some(why);
                self.phase = Phase::Reconnecting;
                self.channels.all_gone();
                self.epochs.forget_outstanding();
                self.lost_late.clear();
                out.push(SourceAction::Reconnect);
            }
            (Phase::AwaitResumed, SourceEvent::ControlLost(why)) => {
                self.lost = Some(why);
                self.phase = Phase::Reconnecting;
                out.push(SourceAction::Reconnect);
            }
            (Phase::Reconnecting, SourceEvent::Reconnected(session)) => {
                self.phase = Phase::AwaitResumed;
                out.push(SourceAction::Send(SourceFrame::Resume {
                    session,
                    instance: self.instance,
                    round: self.round(),
                    epoch: self.epochs.open(),
                }));
            }
            (_, SourceEvent::Failed(why) | SourceEvent::ControlLost(why)) => self.tell_and_fail(why, out),
            // An event of the driver that comes in no other phase: the driver's fault, not the peer's.
            (phase, event) => debug_assert!(false, "{event:?} in {phase:?}"),
        }
    }

    fn frame(&mut self, frame: TargetFrame, out: &mut Vec<SourceAction>) {
        match (self.phase, frame) {
            (Phase::AwaitReady, TargetFrame::Ready { instance, features }) => {
                self.phase = Phase::AwaitLanes;
                self.instance = instance;
                self.resumes = self.resumes && features & FEATURE_RESUME != 0;
                out.push(SourceAction::OpenChannels);
            }
            (Phase::AwaitResumed, TargetFrame::Ready { instance, .. }) => {
                if instance != self.instance {
                    return self.breach("it answers a Resume as another process".to_owned(), out);
                }
                self.phase = Phase::Live;
            }
            (Phase::AwaitReady | Phase::AwaitResumed, TargetFrame::Refused { reason }) => {
                self.end(Outcome::Failed(Failure::Refused(reason)), out);
            }
            // Whoever is there now knows nothing of the session: that settles nothing.
            (Phase::AwaitAnswer, TargetFrame::Refused { reason }) => {
                self.end(Outcome::Uncertain(Failure::Refused(reason)), out);
            }
            // No channel was opened yet.
            (Phase::AwaitReady, frame @ (TargetFrame::ChannelJoined { .. } | TargetFrame::ChannelFailed { .. })) => {
                self.breach(format!("{} came before Ready", frame.name()), out);
            }
            (_, TargetFrame::ChannelJoined { channel, generation }) => {
                match self.channels.joined(channel, generation) {
                    Fate::Expected if self.phase == Phase::AwaitLanes => self.start_if_all_have_joined(out),
                    Fate::Expected => out.push(SourceAction::StartChannel {
                        channel,
                        generation,
                        round: self.rounds.checked_sub(1).map(Round),
                        epoch: self.epochs.open().0.checked_sub(1).map(Epoch),
                    }),
                    Fate::TooLate => {}
                    Fate::Impossible => {
                        self.breach(format!("ChannelJoined for channel {channel}, generation {generation}"), out);
                    }
                }
            }
            (_, TargetFrame::ChannelRetired { channel, generation }) => {
                if !self.channels.retired(channel, generation) {
                    return self.breach(format!("ChannelRetired for channel {channel}, generation {generation}"), out);
                }
                out.push(SourceAction::GiveBack { channel });
                match self.phase {
                    Phase::AwaitLanes => self.start_if_all_have_joined(out),
                    // It has dropped the Final that the channel stood in, or its answer has come before.
                    Phase::Voided if self.channels.are_settled() => self.phase = Phase::Paused,
                    Phase::Withdrawing if self.channels.are_settled() => self.withdraw(out),
                    _ => {}
                }
            }
            (_, TargetFrame::EpochApplied { epoch, lanes }) => {
                if !self.epochs.applied(epoch) {
                    return self.breach(format!("epoch {epoch} cannot be applied now"), out);
                }
                for (channel, generation) in lanes {
                    match self.channels.named(channel, generation) {
                        Fate::Expected => out.push(SourceAction::FreeJournal { channel, through: epoch }),
                        // Known to be lost: everything in its journal travels again.
                        Fate::TooLate => {}
                        Fate::Impossible => {
                            let what = format!("EpochApplied names channel {channel}, generation {generation}");
                            return self.breach(what, out);
                        }
                    }
                }
            }
            (_, TargetFrame::ChannelFailed { channel, generation, reason }) => {
                if !self.is_committed() {
                    self.lose(channel, generation, reason, out);
                }
            }
            (Phase::AwaitLoaded | Phase::Voided | Phase::Withdrawing, TargetFrame::Loaded { round }) => {
                if round != Round(self.rounds - 1) {
                    return self.breach(format!("Loaded for round {round}, Final was for {}", self.rounds - 1), out);
                }
                match self.phase {
                    Phase::Withdrawing => self.withdraw(out),
                    Phase::Voided => {}
                    _ => {
                        self.phase = Phase::AwaitGate;
                        out.push(SourceAction::AskCommit);
                    }
                }
            }
            (Phase::AwaitLoaded, TargetFrame::DigestMismatch { block, chunk_digests, .. }) => {
                out.push(SourceAction::FindDamage { block, chunk_digests });
            }
            (Phase::Voided, TargetFrame::DigestMismatch { .. }) => {}
            (Phase::Withdrawing, TargetFrame::DigestMismatch { .. }) => self.withdraw(out),
            (Phase::AwaitRunning, TargetFrame::Running) => self.end(Outcome::Completed, out),
            (Phase::AwaitAnswer, TargetFrame::QueryAnswer { running: true }) => self.end(Outcome::Completed, out),
            // It gave the guest up for good before it said so.
            (Phase::AwaitAnswer, TargetFrame::QueryAnswer { running: false }) => {
                let why = "the connection was lost at the hand-over, and it did not run the guest".to_owned();
                self.end(Outcome::Failed(Failure::Discarded(why)), out);
            }
            // The one failure after Commit that proves that no vCPU ran and none will.
            (Phase::AwaitRunning, TargetFrame::RunFailed { reason }) => {
                self.end(Outcome::Failed(Failure::RunFailed(reason)), out);
            }
            (_, TargetFrame::Discarded { reason }) if self.is_committed() => {
                self.end(Outcome::Uncertain(Failure::Discarded(reason)), out);
            }
            (_, TargetFrame::Discarded { reason }) => self.end(Outcome::Failed(Failure::Discarded(reason)), out),
            (_, TargetFrame::Error(PeerError { text, .. })) if self.is_committed() => {
                self.end(Outcome::Uncertain(Failure::Peer(text)), out);
            }
            (_, TargetFrame::Error(PeerError { text, .. })) => self.end(Outcome::Failed(Failure::Peer(text)), out),
            (_, TargetFrame::Pong { .. }) => {}
            (phase, frame) => self.breach(format!("{} came in phase {phase:?}", frame.name()), out),
        }
    }

    /// Whether rounds are being shipped, or the guest is being handed over and Commit is not out.
    fn is_shipping(&self) -> bool {
        match self.phase {
            Phase::Live | Phase::Pausing | Phase::Paused => true,
            Phase::AwaitLoaded | Phase::Voided | Phase::Withdrawing | Phase::AwaitGate => true,
            Phase::Fresh | Phase::AwaitReady | Phase::AwaitLanes => false,
            Phase::AwaitRunning | Phase::Reasking | Phase::AwaitAnswer => false,
            Phase::Reconnecting | Phase::AwaitResumed | Phase::Ended => false,
        }
    }

    fn start_if_all_have_joined(&mut self, out: &mut Vec<SourceAction>) {
        if self.channels.are_settled() && self.channels.live() > 0 {
            self.phase = Phase::Live;
            out.push(SourceAction::StartRounds);
        }
    }

    /// A channel is lost, whoever noticed it first. One that is known to be lost, or gone, is not lost again.
    fn lose(&mut self, channel: ChannelId, generation: Generation, reason: String, out: &mut Vec<SourceAction>) {
        if self.phase == Phase::AwaitGate {
            self.lost_late.push((channel, generation, reason));
            return;
        }
        if !self.channels.lose(channel, generation) {
            return;
        }
        out.push(SourceAction::CloseChannel { channel, generation, reason: reason.clone() });
        if self.phase == Phase::AwaitLanes && self.channels.all_lost() {
            // There is nothing to begin with.
            return self.tell_and_fail(Failure::Channel { channel, generation, reason }, out);
        }
        out.push(SourceAction::Send(SourceFrame::ChannelLost { channel, generation }));
        if self.phase == Phase::AwaitLoaded {
            self.phase = Phase::Voided;
        }
    }

    /// What is damaged travels again, while the guest waits.
    fn repair(&mut self, block: BlockId, chunks: Vec<u32>, out: &mut Vec<SourceAction>) {
        if chunks.is_empty() || self.repairs >= REPAIRS_MAX {
            return self.tell_and_fail(Failure::Digest { block, chunks }, out);
        }
        self.repairs += 1;
        self.phase = Phase::Paused;
        for some in chunks.chunks(CHUNKS_PER_FRAME_MAX) {
            let chunks = some.iter().map(|chunk| (block, *chunk)).collect();
            out.push(SourceAction::Send(SourceFrame::Repair { round: self.round(), chunks }));
        }
        out.push(SourceAction::ShipAgain { block, chunks });
    }

    /// Back to rounds while the guest runs. The target forgets the device state, and a load of it, when it comes anew:
    /// an empty piece at offset 0 says so at once.
    fn withdraw(&mut self, out: &mut Vec<SourceAction>) {
        self.phase = Phase::Live;
        out.push(SourceAction::Send(SourceFrame::State { offset: 0, bytes: Vec::new() }));
        for (channel, generation, reason) in std::mem::take(&mut self.lost_late) {
            self.lose(channel, generation, reason, out);
        }
    }

    fn breach(&mut self, what: String, out: &mut Vec<SourceAction>) {
        if self.is_committed() {
            return self.end(Outcome::Uncertain(Failure::Protocol(what)), out);
        }
        self.tell_and_fail(Failure::Protocol(what), out);
    }

    fn tell_and_fail(&mut self, why: Failure, out: &mut Vec<SourceAction>) {
        let code = code_of(&why);
        if self.phase != Phase::Fresh {
            out.push(SourceAction::Send(SourceFrame::Error(PeerError { code, text: why.to_string() })));
        }
        self.end(Outcome::Failed(why), out);
    }

    fn end(&mut self, outcome: Outcome, out: &mut Vec<SourceAction>) {
        self.phase = Phase::Ended;
        out.push(SourceAction::End(outcome));
    }
}
