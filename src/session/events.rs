#![forbid(unsafe_code)]
//! What happens to the two sides of a session, and what their drivers are then to do.

use crate::barrier::LaneWord;
use crate::error::{Failure, Outcome};
use crate::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Item, Round, SessionId};
use crate::wire::control::{Final, Setup, SourceFrame, TargetFrame};

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
    /// A channel's worker ended with an error, or its data does not move, or it could not be connected.
    ChannelFailed {
        /// The channel.
        channel: ChannelId,
        /// Its generation.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// A channel that had been lost is connected again, and its Hello is said.
    ChannelOpened {
        /// The channel.
        channel: ChannelId,
        /// The generation that its Hello named.
        generation: Generation,
    },
    /// The chunks in which source and target differ, as asked for by [`SourceAction::FindDamage`].
    Damaged {
        /// The block.
        block: BlockId,
        /// Its chunks that differ.
        chunks: Vec<u32>,
    },
    /// The control connection is gone, damaged, or silent for too long. What is a failure without a resume window.
    ControlLost(Failure),
    /// After that: there is a new one, and its Hellos agree.
    Reconnected(SessionId),
    /// A deadline passed, a hook or the tracking failed.
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
    /// The channel is lost: shut it down and join its worker. What it had not yet been told to be applied is kept.
    CloseChannel {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// The target has retired the channel: what is in its journal, its hand and its ring is dirty again, for the next round.
    GiveBack {
        /// The channel.
        channel: ChannelId,
    },
    /// The target has taken the channel into its set: start its worker. The first things it says are how far it counts as
    /// having come.
    StartChannel {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
        /// The end of the last round that was ended.
        round: Option<Round>,
        /// The mark of the last epoch that was closed.
        epoch: Option<Epoch>,
    },
    /// This connection is of no use now: close it.
    HangUp {
        /// The channel.
        channel: ChannelId,
    },
    /// Compare the target's digests with ours, and say which chunks differ.
    FindDamage {
        /// The block.
        block: BlockId,
        /// The target's digests of its chunks.
        chunk_digests: Vec<u64>,
    },
    /// These chunks are to travel again, in the next round.
    ShipAgain {
        /// The block.
        block: BlockId,
        /// Its chunks.
        chunks: Vec<u32>,
    },
    /// The control connection is lost, and all channels with it: close everything, keep what was not yet applied, and
    /// connect anew.
    Reconnect,
    /// Pause the guest.
    PauseGuest,
    /// Ask the gate whether a cancel came first.
    AskCommit,
    /// It is over.
    End(Outcome),
}

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
    /// On a second control connection the source asks to go on with the session.
    ResumeAsked {
        /// The target process that it knows.
        instance: InstanceId,
        /// The epoch that it is in: all before it is applied, or will come again.
        epoch: Epoch,
    },
    /// On a second control connection somebody asks whether the guest runs here.
    QueryAsked,
    /// The digests were compared with those of Final.
    Checked(Check),
    /// `load_state` returned.
    StateLoaded(Result<(), String>),
    /// `run` returned.
    RunReturned(Result<(), String>),
    /// Someone asked to cancel here.
    CancelAsked,
    /// The control connection is gone, damaged, or silent for too long. What is a failure without a resume window.
    ControlLost(Failure),
    /// A deadline passed, or something of ours failed.
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
    /// All channels that will be are connected: start their lanes.
    StartLanes,
    /// Put this channel's lane into the set, then start it.
    StartLane {
        /// The channel.
        channel: ChannelId,
    },
    /// End this channel's lane and join it, and then take it out of the set. Harmless if it never began.
    RetireLane {
        /// The channel.
        channel: ChannelId,
    },
    /// Close the control connection, whatever may still be read from it.
    DropControl,
    /// The second control connection takes its place.
    TakeVisitor,
    /// Say this on the second control connection, and close it.
    AnswerVisitor(TargetFrame),
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
