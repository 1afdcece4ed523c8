//! Arbitrary messages of the wire, all of them good: what property tests and fuzz targets start from.

use std::ops::RangeInclusive;

use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{BlockInfo, ErrorCode, Final, LanePong, PeerError, Setup, SourceFrame, TargetFrame};
use pageferry::wire::hello::{Hello, HelloRole, Side};
use pageferry::wire::packet::{PAYLOAD_BYTES_MAX, PacketHeader, PacketKind, RunEntry, RunKind};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// A packet that fits its block, and the block that it fits.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Its header.
    pub header: PacketHeader,
    /// Its table.
    pub runs: Vec<RunEntry>,
    /// The page size of the block.
    pub page_size: PageSize,
    /// The length of the block in pages.
    pub block_pages: u64,
}

const CHANNELS: RangeInclusive<u8> = 0..=254;
const BLOCKS: RangeInclusive<u16> = 0..=1023;

fn channel() -> impl Strategy<Value = ChannelId> {
    CHANNELS.prop_map(ChannelId)
}

fn generation() -> impl Strategy<Value = Generation> {
    any::<u32>().prop_map(Generation)
}

fn round() -> impl Strategy<Value = Round> {
    (0..=Round::MAX.0).prop_map(Round)
}

fn epoch() -> impl Strategy<Value = Epoch> {
    any::<u64>().prop_map(Epoch)
}

fn session() -> impl Strategy<Value = SessionId> {
    any::<[u8; 16]>().prop_map(SessionId)
}

fn instance() -> impl Strategy<Value = InstanceId> {
    any::<[u8; 16]>().prop_map(InstanceId)
}

fn page_size() -> impl Strategy<Value = PageSize> {
    (12u32..=16).prop_map(|shift| PageSize::new(1 << shift).unwrap())
}

/// Any characters, also those that steer a terminal.
fn text(chars_max: usize) -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..=chars_max).prop_map(String::from_iter)
}

fn lanes() -> impl Strategy<Value = Vec<(ChannelId, Generation)>> {
    btree_map(channel(), generation(), 0..12).prop_map(Vec::from_iter).prop_shuffle()
}

fn chunks() -> impl Strategy<Value = Vec<(BlockId, u32)>> {
    vec((BLOCKS.prop_map(BlockId), any::<u32>()), 0..20)
}

fn peer_error() -> impl Strategy<Value = PeerError> {
    let code = prop_oneof![0u16..12, any::<u16>()].prop_map(ErrorCode::from_number);
    (code, text(40)).prop_map(|(code, text)| PeerError { code, text })
}

/// A hello.
pub fn hello() -> impl Strategy<Value = Hello> {
    let role = prop_oneof![Just(HelloRole::Control), channel().prop_map(HelloRole::Data)];
    let side = prop_oneof![Just(Side::Source), Just(Side::Target)];
    (role, side, generation(), session(), any::<u64>()).prop_map(|(role, side, generation, session, features)| Hello {
        role,
        side,
        generation,
        session,
        features,
    })
}

/// A packet of pages, or a mark.
pub fn packet() -> impl Strategy<Value = Packet> {
    prop_oneof![3 => pages(), 1 => mark()]
}

fn mark() -> impl Strategy<Value = Packet> {
    (0..3, round(), epoch(), any::<u64>(), page_size(), any::<u64>()).prop_map(
        |(kind, round, epoch, sequence, page_size, block_pages)| {
            let header = match kind {
                0 => PacketHeader::flush(epoch, round, sequence),
                1 => PacketHeader::round_end(round, epoch, sequence),
                _ => PacketHeader::bye(round, epoch, sequence),
            };
            Packet { header, runs: Vec::new(), page_size, block_pages }
        },
    )
}

fn pages() -> impl Strategy<Value = Packet> {
    // Each run by the gap before it and its length; 60 data runs of one page of 64 KiB fit in one packet's payload.
    let run = (prop_oneof![Just(0), 0u64..1 << 40], 1..=u32::MAX, any::<bool>());
    let place = (BLOCKS.prop_map(BlockId), round(), epoch(), any::<u64>());
    (vec(run, 1..60), page_size(), prop_oneof![Just(0), 0u64..1 << 40], place).prop_map(
        |(parts, page_size, room_after, (block, round, epoch, sequence))| {
            let mut end = 0;
            let mut runs = Vec::new();
            let mut data_pages_left = PAYLOAD_BYTES_MAX / page_size.bytes() - parts.len() as u64;
            let mut data_pages = 0;
            for (gap, pages, zero) in parts {
                let pages = if zero { pages } else { 1 + pages % (data_pages_left as u32 + 1) };
                if !zero {
                    data_pages_left -= u64::from(pages - 1);
                    data_pages += u64::from(pages);
                }
                let kind = if zero { RunKind::Zero } else { RunKind::Data };
                runs.push(RunEntry { first: end + gap, pages, kind });
                end += gap + u64::from(pages);
            }
            let header = PacketHeader {
                kind: PacketKind::Pages,
                block,
                run_count: runs.len() as u32,
                round,
                epoch,
                sequence,
                payload_bytes: data_pages * page_size.bytes(),
            };
            Packet { header, runs, page_size, block_pages: end + room_after }
        },
    )
}

fn setup() -> impl Strategy<Value = Setup> {
    let verify = prop_oneof![Just(Verify::Off), Just(Verify::Wire), Just(Verify::Full)];
    let block = (text(60), any::<u64>(), 1u64..1 << 30, page_size(), 0u32..15);
    let scalars = (verify, 1u8..=255, any::<u64>(), any::<u64>());
    (scalars, vec(block, 0..6), vec(any::<u8>(), 0..100)).prop_map(
        |((verify, channels, features, state_bytes_max), blocks, opaque)| {
            let blocks = (0..).zip(blocks).map(|(id, (name, guest_address, pages, page_size, backing_shift))| {
                let bytes = pages << page_size.shift();
                BlockInfo {
                    id: BlockId(id),
                    name,
                    guest_address: guest_address.min(u64::MAX - (bytes - 1)),
                    bytes,
                    page_size,
                    backing_page_bytes: page_size.bytes() << backing_shift,
                }
            });
            Setup { verify, channels, features, state_bytes_max, blocks: blocks.collect(), opaque }
        },
    )
}

fn last() -> impl Strategy<Value = Final> {
    let digests = || vec(any::<u64>(), 0..10);
    (round(), epoch(), lanes(), digests(), digests(), any::<u64>(), any::<u32>()).prop_map(
        |(round, epoch, lanes, block_digests, full_digests, state_bytes, state_crc)| Final {
            round,
            epoch,
            lanes,
            block_digests,
            full_digests,
            state_bytes,
            state_crc,
        },
    )
}

/// Any frame of the source.
pub fn source_frame() -> impl Strategy<Value = SourceFrame> {
    prop_oneof![
        setup().prop_map(SourceFrame::Setup),
        (channel(), generation()).prop_map(|(channel, generation)| SourceFrame::ChannelLost { channel, generation }),
        (channel(), generation()).prop_map(|(channel, generation)| SourceFrame::ChannelJoin { channel, generation }),
        (any::<u64>(), vec(any::<u8>(), 0..300)).prop_map(|(offset, bytes)| {
            let offset = offset.min(u64::MAX - bytes.len() as u64);
            SourceFrame::State { offset, bytes }
        }),
        last().prop_map(SourceFrame::Final),
        (round(), chunks()).prop_map(|(round, chunks)| SourceFrame::Repair { round, chunks }),
        Just(SourceFrame::Commit),
        text(40).prop_map(|reason| SourceFrame::Cancel { reason }),
        any::<u64>().prop_map(|nonce| SourceFrame::Ping { nonce }),
        (session(), instance(), round(), epoch())
            .prop_map(|(session, instance, round, epoch)| { SourceFrame::Resume { session, instance, round, epoch } }),
        session().prop_map(|session| SourceFrame::Query { session }),
        peer_error().prop_map(SourceFrame::Error),
    ]
}

/// Any frame of the target.
pub fn target_frame() -> impl Strategy<Value = TargetFrame> {
    let pong_lanes = btree_map(channel(), (generation(), any::<u32>(), any::<bool>(), any::<u64>()), 0..8);
    let pong_lanes = pong_lanes.prop_map(|lanes| {
        let lane_pong = |(channel, (generation, rounds_passed, at_barrier, bytes))| LanePong {
            channel,
            generation,
            rounds_passed,
            at_barrier,
            bytes,
        };
        lanes.into_iter().map(lane_pong).collect()
    });
    prop_oneof![
        (instance(), any::<u64>()).prop_map(|(instance, features)| TargetFrame::Ready { instance, features }),
        text(40).prop_map(|reason| TargetFrame::Refused { reason }),
        (epoch(), lanes()).prop_map(|(epoch, lanes)| TargetFrame::EpochApplied { epoch, lanes }),
        (channel(), generation(), text(40)).prop_map(|(channel, generation, reason)| TargetFrame::ChannelFailed {
            channel,
            generation,
            reason
        }),
        (channel(), generation()).prop_map(|(channel, generation)| TargetFrame::ChannelRetired { channel, generation }),
        (channel(), generation()).prop_map(|(channel, generation)| TargetFrame::ChannelJoined { channel, generation }),
        round().prop_map(|round| TargetFrame::Loaded { round }),
        (round(), (0u16..1024).prop_map(BlockId), vec(any::<u64>(), 0..40))
            .prop_map(|(round, block, chunk_digests)| { TargetFrame::DigestMismatch { round, block, chunk_digests } }),
        Just(TargetFrame::Running),
        text(40).prop_map(|reason| TargetFrame::RunFailed { reason }),
        text(40).prop_map(|reason| TargetFrame::Discarded { reason }),
        (any::<u64>(), pong_lanes).prop_map(|(nonce, lanes)| TargetFrame::Pong { nonce, lanes }),
        any::<bool>().prop_map(|running| TargetFrame::QueryAnswer { running }),
        peer_error().prop_map(TargetFrame::Error),
    ]
}
