//! Any frame of either side, in fields: what an encoder refuses is among them.

use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{
    BlockInfo, ErrorCode, FRAME_HEADER_BYTES, Final, LanePong, PeerError, Setup, SourceFrame, TargetFrame,
};
use pageferry::wire::crc::crc32c;

use super::script::Script;

fn text(s: &mut Script<'_>) -> String {
    String::from_utf8_lossy(s.bytes()).into_owned()
}

fn lane(s: &mut Script<'_>) -> (ChannelId, Generation) {
    (ChannelId(s.byte()), Generation(s.u32()))
}

fn block(s: &mut Script<'_>, id: u16) -> BlockInfo {
    let page_size = PageSize::new(1 << (12 + s.below(5))).expect("a page size");
    let bytes = match s.byte() {
        0 => s.number(),
        pages => u64::from(pages) * page_size.bytes(),
    };
    let (guest_address, backing_page_bytes) = (s.number(), page_size.bytes() << s.below(4));
    BlockInfo { id: BlockId(id), name: text(s), guest_address, bytes, page_size, backing_page_bytes }
}

pub fn setup(s: &mut Script<'_>) -> Setup {
    let verify = [Verify::Off, Verify::Wire, Verify::Full][s.below(3)];
    let (channels, features, state_bytes_max) = (s.byte(), s.number(), s.number());
    let blocks = (0..s.below(4) as u16).map(|id| block(s, id)).collect();
    Setup { verify, channels, features, state_bytes_max, blocks, opaque: s.bytes().to_vec() }
}

fn last(s: &mut Script<'_>) -> Final {
    Final {
        round: Round(s.u32()),
        epoch: Epoch(s.number()),
        lanes: s.list(lane),
        block_digests: s.list(Script::number),
        full_digests: s.list(Script::number),
        state_bytes: s.number(),
        state_crc: s.u32(),
    }
}

fn peer_error(s: &mut Script<'_>) -> PeerError {
    PeerError { code: ErrorCode::from_number(s.number() as u16), text: text(s) }
}

pub fn source_frame(s: &mut Script<'_>) -> SourceFrame {
    match s.below(12) {
        0 => SourceFrame::Ping { nonce: s.number() },
        1 => SourceFrame::Setup(setup(s)),
        2 => {
            let (channel, generation) = lane(s);
            SourceFrame::ChannelLost { channel, generation }
        }
        3 => {
            let (channel, generation) = lane(s);
            SourceFrame::ChannelJoin { channel, generation }
        }
        4 => SourceFrame::State { offset: s.number(), bytes: s.bytes().to_vec() },
        5 => SourceFrame::Final(last(s)),
        6 => SourceFrame::Repair { round: Round(s.u32()), chunks: s.list(|s| (BlockId(s.number() as u16), s.u32())) },
        7 => SourceFrame::Commit,
        8 => SourceFrame::Cancel { reason: text(s) },
        9 => SourceFrame::Resume {
            session: SessionId(s.array()),
            instance: InstanceId(s.array()),
            round: Round(s.u32()),
            epoch: Epoch(s.number()),
        },
        10 => SourceFrame::Query { session: SessionId(s.array()) },
        _ => SourceFrame::Error(peer_error(s)),
    }
}

fn pong_lane(s: &mut Script<'_>) -> LanePong {
    let (channel, generation) = lane(s);
    LanePong { channel, generation, rounds_passed: s.u32(), at_barrier: s.flag(), bytes: s.number() }
}

pub fn target_frame(s: &mut Script<'_>) -> TargetFrame {
    match s.below(14) {
        0 => TargetFrame::Pong { nonce: s.number(), lanes: s.list(pong_lane) },
        1 => TargetFrame::Ready { instance: InstanceId(s.array()), features: s.number() },
        2 => TargetFrame::Refused { reason: text(s) },
        3 => TargetFrame::EpochApplied { epoch: Epoch(s.number()), lanes: s.list(lane) },
        4 => {
            let (channel, generation) = lane(s);
            TargetFrame::ChannelFailed { channel, generation, reason: text(s) }
        }
        5 => {
            let (channel, generation) = lane(s);
            TargetFrame::ChannelRetired { channel, generation }
        }
        6 => {
            let (channel, generation) = lane(s);
            TargetFrame::ChannelJoined { channel, generation }
        }
        7 => TargetFrame::Loaded { round: Round(s.u32()) },
        8 => TargetFrame::DigestMismatch {
            round: Round(s.u32()),
            block: BlockId(s.number() as u16),
            chunk_digests: s.list(Script::number),
        },
        9 => TargetFrame::Running,
        10 => TargetFrame::RunFailed { reason: text(s) },
        11 => TargetFrame::Discarded { reason: text(s) },
        12 => TargetFrame::QueryAnswer { running: s.flag() },
        _ => TargetFrame::Error(peer_error(s)),
    }
}

/// A frame of any type with any body, and its number and checksum as they should be.
pub fn sealed(frame_type: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + body.len());
    frame.extend(frame_type.to_le_bytes());
    frame.extend([0; 2]);
    frame.extend((body.len() as u32).to_le_bytes());
    frame.extend(sequence.to_le_bytes());
    frame.extend([0; 4]);
    frame.extend(body);
    let crc = crc32c(&frame);
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
    frame
}
