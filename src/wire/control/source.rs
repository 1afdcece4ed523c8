//! What the source says on the control connection.

#![forbid(unsafe_code)]

use super::Frame;
use super::lists::{
    check_block, read_chunks, read_digests, read_lane, read_lanes, write_chunks, write_digests, write_lane, write_lanes,
};
use super::message::Message;
use super::reason::{PeerError, read_reason, read_text, write_reason};
use crate::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId, Verify};
use crate::wire::codec::{Reader, Writer, check_count, check_round};
use crate::wire::hello::Side;
use crate::wire::{BLOCKS_MAX, CHANNELS_MAX, WireError};

/// Most bytes of a RAM block's name: its length is one byte on the wire.
pub const BLOCK_NAME_BYTES_MAX: usize = 255;

/// Most bytes that a VMM can put into Setup for itself. The largest list of blocks fits beside them.
pub const SETUP_OPAQUE_BYTES_MAX: usize = 512 << 10;

/// Most bytes of device state in one State frame: the rest of the control traffic waits behind no more than that.
pub const STATE_CHUNK_BYTES_MAX: usize = 256 << 10;

/// Bytes of a block in Setup, beside its name.
const BLOCK_BYTES_MIN: usize = 2 + 1 + 8 + 8 + 4 + 8;

const _: () = {
    let blocks = BLOCKS_MAX * (BLOCK_BYTES_MIN + BLOCK_NAME_BYTES_MAX);
    assert!(1 + 1 + 8 + 8 + 2 + blocks + 4 + SETUP_OPAQUE_BYTES_MAX <= super::FRAME_BODY_BYTES_MAX);
};

/// A frame from the source to the target.
///
/// ```
/// use pageferry::wire::control::{Frame, SourceFrame};
///
/// let frame = SourceFrame::Cancel { reason: "the operator said so".into() };
/// assert_eq!(frame.name(), "Cancel");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum SourceFrame {
    /// What is to be moved. The first frame of a migration.
    Setup(Setup),
    /// The channel is lost: the target is to take its lane out of the set, and to answer ChannelRetired.
    ChannelLost {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
    },
    /// The channel has been connected again: the target is to take it into the set, and to answer ChannelJoined.
    ChannelJoin {
        /// The channel.
        channel: ChannelId,
        /// Which of its connections.
        generation: Generation,
    },
    /// A piece of the device state.
    State {
        /// Where in the state it begins.
        offset: u64,
        /// Its bytes; at most [`STATE_CHUNK_BYTES_MAX`].
        bytes: Vec<u8>,
    },
    /// All has been sent: the target is to check it, load the state, and answer Loaded or DigestMismatch.
    Final(Final),
    /// These chunks travel once more, in this round.
    Repair {
        /// The round of its own that they travel in.
        round: Round,
        /// The chunks, each by its block and its index in it.
        chunks: Vec<(BlockId, u32)>,
    },
    /// The target owns the guest from now on, and is to run it.
    Commit,
    /// The migration is off.
    Cancel {
        /// Why.
        reason: String,
    },
    /// Are you there? Answered by Pong.
    Ping {
        /// Comes back in the Pong.
        nonce: u64,
    },
    /// After all connections were lost: the session is to go on where it was.
    Resume {
        /// The session.
        session: SessionId,
        /// The target process that has it: another one knows nothing of it.
        instance: InstanceId,
        /// The round that the source is in.
        round: Round,
        /// The first epoch that the target has not yet said to be applied.
        epoch: Epoch,
    },
    /// After a Commit without an answer: does the guest run with you? Answered by QueryAnswer.
    Query {
        /// The session.
        session: SessionId,
    },
    /// The source gives up.
    Error(PeerError),
}

/// What is to be moved: all that the target needs to prepare for it, or to refuse it.
///
/// ```
/// use pageferry::units::{BlockId, PageSize, Verify};
/// use pageferry::wire::control::{BlockInfo, FrameEncoder, Setup, SourceFrame};
///
/// let ram = BlockInfo {
///     id: BlockId(0),
///     name: "pc.ram".into(),
///     guest_address: 0,
///     bytes: 4 << 30,
///     page_size: PageSize::SIZE_4K,
///     backing_page_bytes: 2 << 20,
/// };
/// let blocks = vec![ram];
/// let setup = Setup { verify: Verify::Wire, channels: 4, features: 0, state_bytes_max: 0, blocks, opaque: vec![] };
/// FrameEncoder::new().encode(&SourceFrame::Setup(setup), &mut Vec::new())?;
/// # Ok::<(), pageferry::wire::WireError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Setup {
    /// Which digests guard the migration.
    pub verify: Verify,
    /// How many data channels the source opens at first: channels 0 to one less.
    pub channels: u8,
    /// What the source asks for beyond version 1, a bit each.
    pub features: u64,
    /// The most device state that the source expects to send; 0 if it does not know. A hint: the target has a limit
    /// of its own.
    pub state_bytes_max: u64,
    /// The RAM blocks, block 0 first; at most [`BLOCKS_MAX`].
    pub blocks: Vec<BlockInfo>,
    /// What the VMM at the source tells the VMM at the target; at most [`SETUP_OPAQUE_BYTES_MAX`].
    pub opaque: Vec<u8>,
}

/// One RAM block, as Setup describes it.
///
/// ```
/// use pageferry::units::{BlockId, PageSize};
/// use pageferry::wire::control::BlockInfo;
///
/// let info = BlockInfo {
///     id: BlockId(0),
///     name: "pc.ram".into(),
///     guest_address: 0,
///     bytes: 1 << 20,
///     page_size: PageSize::SIZE_4K,
///     backing_page_bytes: 4096,
/// };
/// assert_eq!(info.pages(), 256);
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct BlockInfo {
    /// Its id, which is its place in the list.
    pub id: BlockId,
    /// Its name; at most [`BLOCK_NAME_BYTES_MAX`]. Show it by [`crate::wire::printable`]: it is the peer's.
    pub name: String,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Its length: one or more whole pages.
    pub bytes: u64,
    /// Its tracking page.
    pub page_size: PageSize,
    /// The size of the pages that back it at the source: a power of two, and no less than the tracking page.
    pub backing_page_bytes: u64,
}

impl BlockInfo {
    /// Its length in tracking pages.
    pub const fn pages(&self) -> u64 {
        self.bytes >> self.page_size.shift()
    }
}

/// The end of what the source sends: what the target must have when it agrees to take over.
///
/// ```
/// use pageferry::units::{ChannelId, Epoch, Generation, Round};
/// use pageferry::wire::control::{Final, Frame, SourceFrame};
///
/// let last = Final {
///     round: Round(9),
///     epoch: Epoch(30),
///     lanes: vec![(ChannelId(0), Generation(1)), (ChannelId(1), Generation(2))],
///     block_digests: vec![],
///     full_digests: vec![],
///     state_bytes: 0,
///     state_crc: 0,
/// };
/// assert_eq!(SourceFrame::Final(last).name(), "Final");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Final {
    /// The last round: every lane must have passed it.
    pub round: Round,
    /// The last epoch.
    pub epoch: Epoch,
    /// The lanes that carried it. No channel stands twice.
    pub lanes: Vec<(ChannelId, Generation)>,
    /// Of every block, the digest of what was sent; empty when nothing is verified.
    pub block_digests: Vec<u64>,
    /// Of every block, the digest of all that is in it; empty unless everything is verified.
    pub full_digests: Vec<u64>,
    /// The length of the device state.
    pub state_bytes: u64,
    /// The CRC-32C of the device state.
    pub state_crc: u32,
}

/// The nonce of a source's last Ping: it has heard Running or RunFailed, and knows who owns the guest. Nobody answers it.
/// A closed connection does not say as much: that is also what a source's end, or somebody on the way, looks like.
pub const HEARD_THE_END: u64 = u64::MAX;

const SETUP: u16 = 1;
const CHANNEL_LOST: u16 = 2;
const CHANNEL_JOIN: u16 = 3;
const STATE: u16 = 4;
const FINAL: u16 = 5;
const REPAIR: u16 = 6;
const COMMIT: u16 = 7;
const CANCEL: u16 = 8;
const PING: u16 = 9;
const RESUME: u16 = 10;
const QUERY: u16 = 11;
const ERROR: u16 = 12;

impl Frame for SourceFrame {}

impl Message for SourceFrame {
    const SENDER: Side = Side::Source;

    fn frame_type(&self) -> u16 {
        match self {
            SourceFrame::Setup(_) => SETUP,
            SourceFrame::ChannelLost { .. } => CHANNEL_LOST,
            SourceFrame::ChannelJoin { .. } => CHANNEL_JOIN,
            SourceFrame::State { .. } => STATE,
            SourceFrame::Final(_) => FINAL,
            SourceFrame::Repair { .. } => REPAIR,
            SourceFrame::Commit => COMMIT,
            SourceFrame::Cancel { .. } => CANCEL,
            SourceFrame::Ping { .. } => PING,
            SourceFrame::Resume { .. } => RESUME,
            SourceFrame::Query { .. } => QUERY,
            SourceFrame::Error(_) => ERROR,
        }
    }

    fn name_of(frame_type: u16) -> Option<&'static str> {
        Some(match frame_type {
            SETUP => "Setup",
            CHANNEL_LOST => "ChannelLost",
            CHANNEL_JOIN => "ChannelJoin",
            STATE => "State",
            FINAL => "Final",
            REPAIR => "Repair",
            COMMIT => "Commit",
            CANCEL => "Cancel",
            PING => "Ping",
            RESUME => "Resume",
            QUERY => "Query",
            ERROR => "Error",
            _ => return None,
        })
    }

    fn write(&self, out: &mut Writer<'_>) -> Result<(), WireError> {
        match self {
            SourceFrame::Setup(setup) => setup.write(out)?,
            SourceFrame::ChannelLost { channel, generation } | SourceFrame::ChannelJoin { channel, generation } => {
                write_lane(out, *channel, *generation)?;
            }
            SourceFrame::State { offset, bytes } => {
                check_state(*offset, bytes.len())?;
                out.u64(*offset);
                out.u32(bytes.len() as u32);
                out.bytes(bytes);
            }
            SourceFrame::Final(last) => last.write(out)?,
            SourceFrame::Repair { round, chunks } => {
                out.u32(check_round(*round)?.0);
                write_chunks(out, chunks)?;
            }
            SourceFrame::Commit => {}
            SourceFrame::Cancel { reason } => write_reason(out, reason),
            SourceFrame::Ping { nonce } => out.u64(*nonce),
            SourceFrame::Resume { session, instance, round, epoch } => {
                out.bytes(&session.0);
                out.bytes(&instance.0);
                out.u32(check_round(*round)?.0);
                out.u64(epoch.0);
            }
            SourceFrame::Query { session } => out.bytes(&session.0),
            SourceFrame::Error(error) => error.write(out),
        }
        Ok(())
    }

    fn read(frame_type: u16, body: &mut Reader<'_>) -> Result<SourceFrame, WireError> {
        Ok(match frame_type {
            SETUP => SourceFrame::Setup(Setup::read(body)?),
            CHANNEL_LOST => {
                let (channel, generation) = read_lane(body)?;
                SourceFrame::ChannelLost { channel, generation }
            }
            CHANNEL_JOIN => {
                let (channel, generation) = read_lane(body)?;
                SourceFrame::ChannelJoin { channel, generation }
            }
            STATE => {
                let (offset, len) = (body.u64()?, body.u32()? as usize);
                check_state(offset, len)?;
                SourceFrame::State { offset, bytes: body.bytes(len)?.to_vec() }
            }
            FINAL => SourceFrame::Final(Final::read(body)?),
            REPAIR => SourceFrame::Repair { round: check_round(Round(body.u32()?))?, chunks: read_chunks(body)? },
            COMMIT => SourceFrame::Commit,
            CANCEL => SourceFrame::Cancel { reason: read_reason(body)? },
            PING => SourceFrame::Ping { nonce: body.u64()? },
            RESUME => SourceFrame::Resume {
                session: SessionId(body.array()?),
                instance: InstanceId(body.array()?),
                round: check_round(Round(body.u32()?))?,
                epoch: Epoch(body.u64()?),
            },
            QUERY => SourceFrame::Query { session: SessionId(body.array()?) },
            ERROR => SourceFrame::Error(PeerError::read(body)?),
            _ => return Err(WireError::UnknownFrame { sender: Self::SENDER, frame_type }),
        })
    }
}

/// A piece of state that is not too long and does not wrap around.
fn check_state(offset: u64, bytes: usize) -> Result<(), WireError> {
    check_count("length of a piece of state", bytes, STATE_CHUNK_BYTES_MAX)?;
    match offset.checked_add(bytes as u64) {
        Some(_) => Ok(()),
        None => Err(WireError::StateOutOfRange { offset, bytes }),
    }
}

fn check_channels(channels: u8) -> Result<u8, WireError> {
    const { assert!(CHANNELS_MAX == u8::MAX as usize, "every count but 0 is allowed") };
    if channels > 0 { Ok(channels) } else { Err(WireError::BadValue { field: "number of channels", value: 0 }) }
}

impl Setup {
    fn write(&self, out: &mut Writer<'_>) -> Result<(), WireError> {
        check_count("number of blocks", self.blocks.len(), BLOCKS_MAX)?;
        check_count("length of the VMM's part of Setup", self.opaque.len(), SETUP_OPAQUE_BYTES_MAX)?;
        out.u8(match self.verify {
            Verify::Off => 0,
            Verify::Wire => 1,
            Verify::Full => 2,
        });
        out.u8(check_channels(self.channels)?);
        out.u64(self.features);
        out.u64(self.state_bytes_max);
        out.u16(self.blocks.len() as u16);
        for (index, block) in self.blocks.iter().enumerate() {
            block.check(index)?;
            block.write(out);
        }
        out.u32(self.opaque.len() as u32);
        out.bytes(&self.opaque);
        Ok(())
    }

    fn read(body: &mut Reader<'_>) -> Result<Setup, WireError> {
        let verify = match body.u8()? {
            0 => Verify::Off,
            1 => Verify::Wire,
            2 => Verify::Full,
            other => return Err(WireError::BadValue { field: "kind of verification", value: other.into() }),
        };
        let channels = check_channels(body.u8()?)?;
        let (features, state_bytes_max) = (body.u64()?, body.u64()?);
        let count = usize::from(body.u16()?);
        let mut blocks = body.room_for("number of blocks", count, BLOCKS_MAX, BLOCK_BYTES_MIN)?;
        for index in 0..count {
            let block = BlockInfo::read(body)?;
            block.check(index)?;
            blocks.push(block);
        }
        let len = body.u32()? as usize;
        check_count("length of the VMM's part of Setup", len, SETUP_OPAQUE_BYTES_MAX)?;
        let opaque = body.bytes(len)?.to_vec();
        Ok(Setup { verify, channels, features, state_bytes_max, blocks, opaque })
    }
}

impl BlockInfo {
    /// What can be wrong with a block at this place of the list, whoever made it. Nobody else need divide by its page
    /// size, or add to its address, with a doubt.
    fn check(&self, index: usize) -> Result<(), WireError> {
        let BlockInfo { id, guest_address, bytes, page_size, backing_page_bytes, .. } = *self;
        if usize::from(id.0) != index {
            return Err(WireError::BlockOutOfOrder { index, id });
        }
        let block = check_block(id)?;
        check_count("length of a block's name", self.name.len(), BLOCK_NAME_BYTES_MAX)?;
        if bytes == 0 || bytes % page_size.bytes() != 0 {
            return Err(WireError::BlockLength { block, bytes, page_size });
        }
        // Its last byte, not the one after it: a block may end where the address space does.
        if guest_address.checked_add(bytes - 1).is_none() {
            return Err(WireError::BlockAddress { block, guest_address, bytes });
        }
        if !backing_page_bytes.is_power_of_two() || backing_page_bytes < page_size.bytes() {
            return Err(WireError::BackingPage { block, backing_page_bytes, page_size });
        }
        Ok(())
    }

    /// Writes a block that was found good.
    fn write(&self, out: &mut Writer<'_>) {
        out.u16(self.id.0);
        out.u8(self.name.len() as u8);
        out.bytes(self.name.as_bytes());
        out.u64(self.guest_address);
        out.u64(self.bytes);
        out.u32(self.page_size.bytes() as u32);
        out.u64(self.backing_page_bytes);
    }

    fn read(body: &mut Reader<'_>) -> Result<BlockInfo, WireError> {
        let id = BlockId(body.u16()?);
        let len = usize::from(body.u8()?);
        let name = read_text(body, "name of a block", len, BLOCK_NAME_BYTES_MAX)?;
        let (guest_address, bytes) = (body.u64()?, body.u64()?);
        let page_bytes = body.u32()?;
        let unknown_size = WireError::BadValue { field: "page size of a block", value: page_bytes.into() };
        let page_size = PageSize::new(page_bytes).ok_or(unknown_size)?;
        Ok(BlockInfo { id, name, guest_address, bytes, page_size, backing_page_bytes: body.u64()? })
    }
}

impl Final {
    fn write(&self, out: &mut Writer<'_>) -> Result<(), WireError> {
        out.u32(check_round(self.round)?.0);
        out.u64(self.epoch.0);
        write_lanes(out, &self.lanes)?;
        write_digests(out, &self.block_digests)?;
        write_digests(out, &self.full_digests)?;
        out.u64(self.state_bytes);
        out.u32(self.state_crc);
        Ok(())
    }

    fn read(body: &mut Reader<'_>) -> Result<Final, WireError> {
        Ok(Final {
            round: check_round(Round(body.u32()?))?,
            epoch: Epoch(body.u64()?),
            lanes: read_lanes(body)?,
            block_digests: read_digests(body)?,
            full_digests: read_digests(body)?,
            state_bytes: body.u64()?,
            state_crc: body.u32()?,
        })
    }
}
