//! What the target says on the control connection.

#![forbid(unsafe_code)]

use super::Frame;
use super::lists::{
    check_block, check_lanes, read_chunk_digests, read_lane, read_lanes, write_chunk_digests, write_lane, write_lanes,
};
use super::message::Message;
use super::reason::{PeerError, read_reason, write_reason};
use crate::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Round};
use crate::wire::codec::{Reader, Writer, check_count, check_round};
use crate::wire::hello::Side;
use crate::wire::{CHANNELS_MAX, WireError};

/// Bytes of a lane in a Pong.
const LANE_PONG_BYTES: usize = 1 + 4 + 4 + 1 + 8;

/// A frame from the target to the source.
///
/// ```
/// use pageferry::wire::control::{Frame, TargetFrame};
///
/// let frame = TargetFrame::Refused { reason: "this machine has no AVX-512".into() };
/// assert_eq!(frame.name(), "Refused");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum TargetFrame {
    /// The answer to Setup or Resume: the target is prepared.
    Ready {
        /// This target process: a Resume must name it.
        instance: InstanceId,
        /// Those of the features asked for that both sides will use.
        features: u64,
    },
    /// The answer to Setup or Resume: no, and the guest stays where it is.
    Refused {
        /// Why.
        reason: String,
    },
    /// The epoch has landed. The source frees the journals of these lanes up to it, and no others.
    EpochApplied {
        /// The epoch.
        epoch: Epoch,
        /// The lanes that it covers. No channel stands twice.
        lanes: Vec<(ChannelId, Generation)>,
    },
    /// The channel has failed at this end. It stays in the set until the source's ChannelLost.
    ChannelFailed {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
        /// What went wrong.
        reason: String,
    },
    /// The answer to ChannelLost: its lane has ended and will write no more.
    ChannelRetired {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
    },
    /// The answer to ChannelJoin: its lane is in the set and may carry pages.
    ChannelJoined {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
    },
    /// The answer to Final: all has landed, the digests agree, and the state is loaded.
    Loaded {
        /// The last round, as Final named it.
        round: Round,
    },
    /// The answer to Final: a block is not what the source sent. The source, which has digests of its own, learns from
    /// these which chunks differ.
    DigestMismatch {
        /// The last round, as Final named it.
        round: Round,
        /// The first block that differs.
        block: BlockId,
        /// The target's digests of its first chunks; at most [`super::CHUNKS_PER_FRAME_MAX`]. Empty if it is not what was sent
        /// that differs, but the memory as a whole.
        chunk_digests: Vec<u64>,
    },
    /// The guest runs here.
    Running,
    /// No vCPU has run here, and none will.
    RunFailed {
        /// Why.
        reason: String,
    },
    /// The target has given the guest up before it ran, for good.
    Discarded {
        /// Why.
        reason: String,
    },
    /// The answer to Ping.
    Pong {
        /// That of the Ping.
        nonce: u64,
        /// How far each lane is. No channel stands twice.
        lanes: Vec<LanePong>,
    },
    /// The answer to Query.
    QueryAnswer {
        /// Whether the guest runs here. If not, it never will.
        running: bool,
    },
    /// The target gives up.
    Error(PeerError),
}

/// How far one lane is.
///
/// ```
/// use pageferry::units::{ChannelId, Generation};
/// use pageferry::wire::control::LanePong;
///
/// let lane = LanePong {
///     channel: ChannelId(0),
///     generation: Generation(1),
///     rounds_passed: 3,
///     at_barrier: true,
///     bytes: 1 << 30,
/// };
/// assert!(lane.at_barrier, "it makes no progress, but it is not stalled: it waits for another");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LanePong {
    /// The channel.
    pub channel: ChannelId,
    /// Which of its connections.
    pub generation: Generation,
    /// How many rounds it has passed.
    pub rounds_passed: u32,
    /// Whether it waits for the other lanes to pass the round too.
    pub at_barrier: bool,
    /// Bytes that it has read.
    pub bytes: u64,
}

// Far from the numbers of the source's frames: one that went astray is named as what it is.
const READY: u16 = 0x81;
const REFUSED: u16 = 0x82;
const EPOCH_APPLIED: u16 = 0x83;
const CHANNEL_FAILED: u16 = 0x84;
const CHANNEL_RETIRED: u16 = 0x85;
const CHANNEL_JOINED: u16 = 0x86;
const LOADED: u16 = 0x87;
const DIGEST_MISMATCH: u16 = 0x88;
const RUNNING: u16 = 0x89;
const RUN_FAILED: u16 = 0x8A;
const DISCARDED: u16 = 0x8B;
const PONG: u16 = 0x8C;
const QUERY_ANSWER: u16 = 0x8D;
const ERROR: u16 = 0x8E;

impl Frame for TargetFrame {}

impl Message for TargetFrame {
    const SENDER: Side = Side::Target;

    fn frame_type(&self) -> u16 {
        match self {
            TargetFrame::Ready { .. } => READY,
            TargetFrame::Refused { .. } => REFUSED,
            TargetFrame::EpochApplied { .. } => EPOCH_APPLIED,
            TargetFrame::ChannelFailed { .. } => CHANNEL_FAILED,
            TargetFrame::ChannelRetired { .. } => CHANNEL_RETIRED,
            TargetFrame::ChannelJoined { .. } => CHANNEL_JOINED,
            TargetFrame::Loaded { .. } => LOADED,
            TargetFrame::DigestMismatch { .. } => DIGEST_MISMATCH,
            TargetFrame::Running => RUNNING,
            TargetFrame::RunFailed { .. } => RUN_FAILED,
            TargetFrame::Discarded { .. } => DISCARDED,
            TargetFrame::Pong { .. } => PONG,
            TargetFrame::QueryAnswer { .. } => QUERY_ANSWER,
            TargetFrame::Error(_) => ERROR,
        }
    }

    fn name_of(frame_type: u16) -> Option<&'static str> {
        Some(match frame_type {
            READY => "Ready",
            REFUSED => "Refused",
            EPOCH_APPLIED => "EpochApplied",
            CHANNEL_FAILED => "ChannelFailed",
            CHANNEL_RETIRED => "ChannelRetired",
            CHANNEL_JOINED => "ChannelJoined",
            LOADED => "Loaded",
            DIGEST_MISMATCH => "DigestMismatch",
            RUNNING => "Running",
            RUN_FAILED => "RunFailed",
            DISCARDED => "Discarded",
            PONG => "Pong",
            QUERY_ANSWER => "QueryAnswer",
            ERROR => "Error",
            _ => return None,
        })
    }

    fn write(&self, out: &mut Writer<'_>) -> Result<(), WireError> {
        match self {
            TargetFrame::Ready { instance, features } => {
                out.bytes(&instance.0);
                out.u64(*features);
            }
            TargetFrame::Refused { reason } | TargetFrame::RunFailed { reason } | TargetFrame::Discarded { reason } => {
                write_reason(out, reason)
            }
            TargetFrame::EpochApplied { epoch, lanes } => {
                out.u64(epoch.0);
                write_lanes(out, lanes)?;
            }
            TargetFrame::ChannelFailed { channel, generation, reason } => {
                write_lane(out, *channel, *generation)?;
                write_reason(out, reason);
            }
            TargetFrame::ChannelRetired { channel, generation }
            | TargetFrame::ChannelJoined { channel, generation } => {
                write_lane(out, *channel, *generation)?;
            }
            TargetFrame::Loaded { round } => out.u32(check_round(*round)?.0),
            TargetFrame::DigestMismatch { round, block, chunk_digests } => {
                out.u32(check_round(*round)?.0);
                out.u16(check_block(*block)?.0);
                write_chunk_digests(out, chunk_digests)?;
            }
            TargetFrame::Running => {}
            TargetFrame::Pong { nonce, lanes } => {
                out.u64(*nonce);
                write_pong_lanes(out, lanes)?;
            }
            TargetFrame::QueryAnswer { running } => out.bool(*running),
            TargetFrame::Error(error) => error.write(out),
        }
        Ok(())
    }

    fn read(frame_type: u16, body: &mut Reader<'_>) -> Result<TargetFrame, WireError> {
        Ok(match frame_type {
            READY => TargetFrame::Ready { instance: InstanceId(body.array()?), features: body.u64()? },
            REFUSED => TargetFrame::Refused { reason: read_reason(body)? },
            EPOCH_APPLIED => TargetFrame::EpochApplied { epoch: Epoch(body.u64()?), lanes: read_lanes(body)? },
            CHANNEL_FAILED => {
                let (channel, generation) = read_lane(body)?;
                TargetFrame::ChannelFailed { channel, generation, reason: read_reason(body)? }
            }
            CHANNEL_RETIRED => {
                let (channel, generation) = read_lane(body)?;
                TargetFrame::ChannelRetired { channel, generation }
            }
            CHANNEL_JOINED => {
                let (channel, generation) = read_lane(body)?;
                TargetFrame::ChannelJoined { channel, generation }
            }
            LOADED => TargetFrame::Loaded { round: check_round(Round(body.u32()?))? },
            DIGEST_MISMATCH => TargetFrame::DigestMismatch {
                round: check_round(Round(body.u32()?))?,
                block: check_block(BlockId(body.u16()?))?,
                chunk_digests: read_chunk_digests(body)?,
            },
            RUNNING => TargetFrame::Running,
            RUN_FAILED => TargetFrame::RunFailed { reason: read_reason(body)? },
            DISCARDED => TargetFrame::Discarded { reason: read_reason(body)? },
            PONG => TargetFrame::Pong { nonce: body.u64()?, lanes: read_pong_lanes(body)? },
            QUERY_ANSWER => TargetFrame::QueryAnswer { running: body.bool("answer to a query")? },
            ERROR => TargetFrame::Error(PeerError::read(body)?),
            _ => return Err(WireError::UnknownFrame { sender: Self::SENDER, frame_type }),
        })
    }
}

fn write_pong_lanes(out: &mut Writer<'_>, lanes: &[LanePong]) -> Result<(), WireError> {
    check_count("number of lanes", lanes.len(), CHANNELS_MAX)?;
    check_lanes(lanes.iter().map(|lane| lane.channel))?;
    out.u8(lanes.len() as u8);
    for lane in lanes {
        write_lane(out, lane.channel, lane.generation)?;
        out.u32(lane.rounds_passed);
        out.bool(lane.at_barrier);
        out.u64(lane.bytes);
    }
    Ok(())
}

fn read_pong_lanes(body: &mut Reader<'_>) -> Result<Vec<LanePong>, WireError> {
    let count = usize::from(body.u8()?);
    let mut lanes = body.room_for("number of lanes", count, CHANNELS_MAX, LANE_PONG_BYTES)?;
    for _ in 0..count {
        let (channel, generation) = read_lane(body)?;
        lanes.push(LanePong {
            channel,
            generation,
            rounds_passed: body.u32()?,
            at_barrier: body.bool("mark of a lane at the barrier")?,
            bytes: body.u64()?,
        });
    }
    check_lanes(lanes.iter().map(|lane| lane.channel))?;
    Ok(lanes)
}
