#![forbid(unsafe_code)]
//! The source's side of a session: from Setup to the hand-over, as (state, event) -> (state, actions).

use crate::error::{Failure, Outcome};
use crate::session::{EpochLedger, code_of};
use crate::units::{ChannelId, Epoch, Generation, Item, Round};
use crate::wire::control::{Final, Frame, PeerError, Setup, SourceFrame, TargetFrame};

/// What happens to the source.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum SourceEvent {
    /// The control connection is up and its Hellos agree.
    Connected(Setup),
    /// The target sent a frame.
    Frame(TargetFrame),
    /// Everything harvested in this round is in the rings.
    RoundPushed,
    /// Enough has been pushed since the last Flush mark.
    EpochDue,
    /// The policy wants to hand over.
    SwitchOver,
    /// vCPUs and DMA are quiet.
    GuestPaused,
    /// The guest is paused, its state saved and sent, and every ring and every worker's hand is empty.
    Drained(Facts),
    /// The guest stands still for too long, and runs again: this attempt to hand it over is withdrawn.
    Overran,
    /// The gate says that no cancel came first: the point of no return is passed.
    CommitGranted,
    /// Someone asked to cancel, and the gate took it.
    CancelAsked,
    /// A channel's worker ended with an error.
    ChannelFailed {
        /// The channel.
        channel: ChannelId,
        /// Its generation.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// The control connection is gone, a deadline passed, a hook or the tracking failed.
    Failed(Failure),
}

/// What the source knows of RAM and state when everything has been sent.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Facts {
    /// A digest a block of what was sent; empty where verification is off.
    pub block_digests: Vec<u64>,
    /// A digest a block of all its bytes; empty unless verification is full.
    pub full_digests: Vec<u64>,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// CRC-32C of the device state.
    pub state_crc: u32,
}

/// What the driver is to do.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum SourceAction {
    /// Send this on the control connection.
    Send(SourceFrame),
    /// Connect every data channel, and say Hello on each.
    OpenChannels,
    /// Every lane has joined: arm the tracking and start round 0.
    StartRounds,
    /// Push this mark into every ring.
    PushMark(Item),
    /// Free this channel's journal up to and with this epoch.
    FreeJournal {
        /// The channel.
        channel: ChannelId,
        /// The last epoch to free.
        through: Epoch,
    },
    /// Pause the guest.
    PauseGuest,
    /// Ask the gate whether a cancel came first.
    AskCommit,
    /// It is over.
    End(Outcome),
}

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
    /// Final was sent, and is withdrawn: the target still answers it, and until it has, no page may land under its
    /// load_state.
    Withdrawing,
    /// Loaded came; the gate decides.
    AwaitGate,
    /// Commit counts as sent: from here on the source never resumes by itself.
    AwaitRunning,
    Ended,
}

/// The source's state machine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SourceSession {
    phase: Phase,
    joined: Vec<bool>,
    epochs: EpochLedger,
    /// Rounds whose end has been pushed.
    rounds: u32,
}

/// The generation of a channel's first connection.
pub const FIRST_GENERATION: Generation = Generation(1);

impl SourceSession {
    /// A session over this many channels.
    pub fn new(channels: u8) -> SourceSession {
        SourceSession {
            phase: Phase::Fresh,
            joined: vec![false; channels.into()],
            epochs: EpochLedger::default(),
            rounds: 0,
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
        self.phase == Phase::AwaitRunning
    }

    /// Whether it is over.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// What the source waits for, in words, where it waits for the target's VMM rather than for the wire.
    pub fn waits_for_hook(&self) -> Option<&'static str> {
        match self.phase {
            Phase::AwaitReady => Some("Ready (the target's prepare)"),
            Phase::AwaitLoaded | Phase::Withdrawing => Some("Loaded (the target's load_state)"),
            Phase::AwaitRunning => Some("Running (the target's run)"),
            _ => None,
        }
    }

    /// Whether Final was sent, and the target's Loaded is to come.
    pub fn awaits_loaded(&self) -> bool {
        self.phase == Phase::AwaitLoaded
    }

    /// Whether the answer to a Final that was withdrawn is still to come: until then no round may be pushed.
    pub fn is_withdrawing(&self) -> bool {
        self.phase == Phase::Withdrawing
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
            (Phase::Pausing, SourceEvent::GuestPaused) => self.phase = Phase::Paused,
            (Phase::Paused, SourceEvent::Drained(facts)) => {
                debug_assert!(self.rounds > 0, "a paused round was pushed");
                self.phase = Phase::AwaitLoaded;
                out.push(SourceAction::Send(SourceFrame::Final(Final {
                    round: Round(self.rounds - 1),
                    epoch: self.epochs.open(),
                    lanes: self.lanes().collect(),
                    block_digests: facts.block_digests,
                    full_digests: facts.full_digests,
                    state_bytes: facts.state_bytes,
                    state_crc: facts.state_crc,
                })));
            }
            (Phase::Paused | Phase::AwaitGate, SourceEvent::Overran) => self.withdraw(out),
            (Phase::AwaitLoaded, SourceEvent::Overran) => self.phase = Phase::Withdrawing,
            (Phase::AwaitGate, SourceEvent::CommitGranted) => {
                // Before its first byte goes to the kernel: from here on we cannot know what the target has read.
                self.phase = Phase::AwaitRunning;
                out.push(SourceAction::Send(SourceFrame::Commit));
            }
            // Past the point of no return a cancel is too late, and a data channel has nothing left to carry.
            (Phase::AwaitRunning, SourceEvent::CancelAsked | SourceEvent::ChannelFailed { .. }) => {}
            (Phase::AwaitRunning, SourceEvent::Failed(why)) => self.end(Outcome::Uncertain(why), out),
            (_, SourceEvent::CancelAsked) => {
                if self.phase != Phase::Fresh {
                    let reason = "cancelled at the source".to_owned();
                    out.push(SourceAction::Send(SourceFrame::Cancel { reason }));
                }
                self.end(Outcome::Cancelled, out);
            }
            (_, SourceEvent::ChannelFailed { channel, generation, reason }) => {
                self.tell_and_fail(Failure::Channel { channel, generation, reason }, out);
            }
            (_, SourceEvent::Failed(why)) => self.tell_and_fail(why, out),
            // An event of the driver that comes in no other phase: the driver's fault, not the peer's.
            (phase, event) => debug_assert!(false, "{event:?} in {phase:?}"),
        }
    }

    fn frame(&mut self, frame: TargetFrame, out: &mut Vec<SourceAction>) {
        match (self.phase, frame) {
            (Phase::AwaitReady, TargetFrame::Ready { .. }) => {
                self.phase = Phase::AwaitLanes;
                out.push(SourceAction::OpenChannels);
            }
            (Phase::AwaitReady, TargetFrame::Refused { reason }) => {
                self.end(Outcome::Failed(Failure::Refused(reason)), out);
            }
            (Phase::AwaitLanes, TargetFrame::ChannelJoined { channel, generation }) => {
                match self.joined.get_mut(usize::from(channel.0)) {
                    Some(joined) if !*joined && generation == FIRST_GENERATION => *joined = true,
                    _ => return self.breach(format!("ChannelJoined for channel {channel}, generation {generation}"), out),
                }
                if self.joined.iter().all(|joined| *joined) {
                    self.phase = Phase::Live;
                    out.push(SourceAction::StartRounds);
                }
            }
            (_, TargetFrame::EpochApplied { epoch, lanes }) => {
                if !self.epochs.applied(epoch) {
                    return self.breach(format!("epoch {epoch} cannot be applied now"), out);
                }
                for (channel, generation) in lanes {
                    if usize::from(channel.0) >= self.joined.len() || generation != FIRST_GENERATION {
                        return self.breach(format!("EpochApplied names channel {channel}, generation {generation}"), out);
                    }
                    out.push(SourceAction::FreeJournal { channel, through: epoch });
                }
            }
            (_, TargetFrame::ChannelFailed { channel, generation, reason }) => {
                if self.phase == Phase::AwaitRunning {
                    return;
                }
                self.end(Outcome::Failed(Failure::Channel { channel, generation, reason }), out);
            }
            (Phase::AwaitLoaded | Phase::Withdrawing, TargetFrame::Loaded { round }) => {
                if round != Round(self.rounds - 1) {
                    return self.breach(format!("Loaded for round {round}, Final was for {}", self.rounds - 1), out);
                }
                if self.phase == Phase::Withdrawing {
                    return self.withdraw(out);
                }
                self.phase = Phase::AwaitGate;
                out.push(SourceAction::AskCommit);
            }
            (Phase::AwaitLoaded | Phase::Withdrawing, TargetFrame::DigestMismatch { block, .. }) => {
                // The chunks are named by the driver, which has the digests of both sides.
                self.end(Outcome::Failed(Failure::Digest { block, chunks: Vec::new() }), out);
            }
            (Phase::AwaitRunning, TargetFrame::Running) => self.end(Outcome::Completed, out),
            // The one failure after Commit that proves that no vCPU ran and none will.
            (Phase::AwaitRunning, TargetFrame::RunFailed { reason }) => {
                self.end(Outcome::Failed(Failure::RunFailed(reason)), out);
            }
            (Phase::AwaitRunning, TargetFrame::Discarded { reason }) => {
                self.end(Outcome::Uncertain(Failure::Discarded(reason)), out);
            }
            (_, TargetFrame::Discarded { reason }) => self.end(Outcome::Failed(Failure::Discarded(reason)), out),
            (Phase::AwaitRunning, TargetFrame::Error(PeerError { text, .. })) => {
                self.end(Outcome::Uncertain(Failure::Peer(text)), out);
            }
            (_, TargetFrame::Error(PeerError { text, .. })) => self.end(Outcome::Failed(Failure::Peer(text)), out),
            (_, TargetFrame::Pong { .. }) => {}
            (phase, frame) => self.breach(format!("{} came in phase {phase:?}", frame.name()), out),
        }
    }

    /// Back to rounds while the guest runs. The target forgets the device state, and a load of it, when it comes anew:
    /// an empty piece at offset 0 says so at once.
    fn withdraw(&mut self, out: &mut Vec<SourceAction>) {
        self.phase = Phase::Live;
        out.push(SourceAction::Send(SourceFrame::State { offset: 0, bytes: Vec::new() }));
    }

    fn lanes(&self) -> impl Iterator<Item = (ChannelId, Generation)> + '_ {
        (0..self.joined.len()).map(|c| (ChannelId(c as u8), FIRST_GENERATION))
    }

    fn breach(&mut self, what: String, out: &mut Vec<SourceAction>) {
        if self.phase == Phase::AwaitRunning {
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
