//! What a decoder refuses, an encoder refuses too; and the largest of everything fits.

use super::*;
use crate::units::{BlockId, ChannelId, Epoch, Generation, PageSize, Round, Verify};
use crate::wire::hello::Side;
use crate::wire::{BLOCKS_MAX, CHANNELS_MAX};

fn block(id: u16) -> BlockInfo {
    BlockInfo {
        id: BlockId(id),
        name: format!("block{id}"),
        guest_address: u64::from(id) << 20,
        bytes: 1 << 20,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: 4096,
    }
}

fn setup(blocks: Vec<BlockInfo>) -> Setup {
    Setup { verify: Verify::Off, channels: 1, features: 0, state_bytes_max: 0, blocks, opaque: Vec::new() }
}

fn encoded<F: Frame>(frame: &F) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    FrameEncoder::new().encode(frame, &mut bytes).map(|()| bytes)
}

fn decoded<F: Frame>(bytes: &[u8]) -> Result<Option<F>, WireError> {
    FrameDecoder::new().pull(&mut &bytes[..])
}

/// The bytes of a frame with some of its body changed and the checksum made right again.
fn with<F: Frame>(frame: &F, at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = encoded(frame).unwrap();
    bytes[FRAME_HEADER_BYTES + at..][..new.len()].copy_from_slice(new);
    let crc = crc_around(&bytes[..CRC_AT], &bytes[FRAME_HEADER_BYTES..]);
    bytes[CRC_AT..FRAME_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A header alone.
fn header(frame_type: u16, flags: u16, length: u32, sequence: u32) -> [u8; FRAME_HEADER_BYTES] {
    let mut bytes = [0; FRAME_HEADER_BYTES];
    bytes[0..2].copy_from_slice(&frame_type.to_le_bytes());
    bytes[2..4].copy_from_slice(&flags.to_le_bytes());
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_le_bytes());
    let crc = crc_around(&bytes[..CRC_AT], &[]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn a_header_is_judged_before_its_body_comes() {
    const COMMIT: u16 = 7;
    let unknown = WireError::UnknownFrame { sender: Side::Source, frame_type: 0x99 };
    assert_eq!(unknown.to_string(), "control frame type 0x0099 is none that a source sends in version 1");
    let too_long = |value| WireError::TooLarge { field: "length of a control frame", value, limit: 1_048_576 };
    for (bytes, error) in [
        (header(0x99, 0, 50, 0), unknown),
        (header(0, 0, 0, 0), WireError::UnknownFrame { sender: Side::Source, frame_type: 0 }),
        (header(COMMIT, 1, 50, 0), WireError::ReservedNotZero { message: "control frame" }),
        (header(COMMIT, 0x8000, 50, 0), WireError::ReservedNotZero { message: "control frame" }),
        (header(COMMIT, 0, 1_048_577, 0), too_long(1_048_577)),
        (header(COMMIT, 0, u32::MAX, 0), too_long(u32::MAX.into())),
        (header(COMMIT, 0, 50, 1), WireError::OutOfSequence { expected: 0, found: 1 }),
    ] {
        assert_eq!(decoded::<SourceFrame>(&bytes), Err(error));
    }
    assert_eq!(decoded::<SourceFrame>(&header(COMMIT, 0, 0, 0)), Ok(Some(SourceFrame::Commit)));
}

#[test]
fn a_frame_of_the_other_side_is_refused() {
    let commit = encoded(&SourceFrame::Commit).unwrap();
    let error = WireError::UnknownFrame { sender: Side::Target, frame_type: 7 };
    assert_eq!(decoded::<TargetFrame>(&commit), Err(error));
    let running = encoded(&TargetFrame::Running).unwrap();
    let error = WireError::UnknownFrame { sender: Side::Source, frame_type: 0x89 };
    assert_eq!(decoded::<SourceFrame>(&running), Err(error));
}

#[test]
fn a_missing_or_repeated_frame_is_found() {
    let mut encoder = FrameEncoder::new();
    let frames: Vec<Vec<u8>> = (0..3)
        .map(|nonce| {
            let mut bytes = Vec::new();
            encoder.encode(&SourceFrame::Ping { nonce }, &mut bytes).unwrap();
            bytes
        })
        .collect();
    for (order, expected, found) in [([0, 2], 1, 2), ([0, 0], 1, 0)] {
        let stream = [&frames[order[0]][..], &frames[order[1]]].concat();
        let mut decoder = FrameDecoder::<SourceFrame>::new();
        let mut input = &stream[..];
        assert_eq!(decoder.pull(&mut input), Ok(Some(SourceFrame::Ping { nonce: 0 })));
        assert_eq!(decoder.pull(&mut input), Err(WireError::OutOfSequence { expected, found }));
    }
}

#[test]
fn bytes_after_a_body_are_refused_by_name() {
    let mut bytes = encoded(&SourceFrame::Ping { nonce: 1 }).unwrap();
    bytes.push(0);
    bytes[4] += 1;
    let crc = crc_around(&bytes[..CRC_AT], &bytes[FRAME_HEADER_BYTES..]);
    bytes[CRC_AT..FRAME_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(decoded::<SourceFrame>(&bytes), Err(WireError::TrailingBytes { message: "Ping", bytes: 1 }));
}

#[test]
fn a_refused_frame_leaves_no_trace_in_the_stream() {
    let mut encoder = FrameEncoder::new();
    let mut stream = b"before".to_vec();
    let refused = SourceFrame::Repair { round: Round(0), chunks: vec![(BlockId(0), 0), (BlockId(1024), 0)] };
    assert!(encoder.encode(&refused, &mut stream).is_err());
    assert_eq!(stream, b"before");
    encoder.encode(&SourceFrame::Commit, &mut stream).unwrap();
    assert_eq!(decoded(&stream[6..]), Ok(Some(SourceFrame::Commit)), "the number was not used up");
}

#[test]
fn a_setup_that_makes_no_sense_is_refused_by_the_encoder() {
    let (id, bytes, page_size) = (BlockId(1), 1 << 20, PageSize::SIZE_4K);
    let backing = |backing_page_bytes| WireError::BackingPage { block: id, backing_page_bytes, page_size };
    let length = |bytes| WireError::BlockLength { block: id, bytes, page_size };
    let address = |guest_address| WireError::BlockAddress { block: id, guest_address, bytes };
    let name = WireError::TooLarge { field: "length of a block's name", value: 256, limit: 255 };
    for (bad, error) in [
        (BlockInfo { id: BlockId(0), ..block(1) }, WireError::BlockOutOfOrder { index: 1, id: BlockId(0) }),
        (BlockInfo { id: BlockId(2), ..block(1) }, WireError::BlockOutOfOrder { index: 1, id: BlockId(2) }),
        (BlockInfo { name: "n".repeat(256), ..block(1) }, name),
        (BlockInfo { bytes: 0, ..block(1) }, length(0)),
        (BlockInfo { bytes: 4095, ..block(1) }, length(4095)),
        (BlockInfo { bytes: 4097, ..block(1) }, length(4097)),
        (BlockInfo { guest_address: u64::MAX, ..block(1) }, address(u64::MAX)),
        (BlockInfo { guest_address: u64::MAX - (1 << 20) + 2, ..block(1) }, address(u64::MAX - (1 << 20) + 2)),
        (BlockInfo { backing_page_bytes: 0, ..block(1) }, backing(0)),
        (BlockInfo { backing_page_bytes: 2048, ..block(1) }, backing(2048)),
        (BlockInfo { backing_page_bytes: 12288, ..block(1) }, backing(12288)),
    ] {
        assert_eq!(encoded(&SourceFrame::Setup(setup(vec![block(0), bad]))), Err(error));
    }
    let too_much = Setup { opaque: vec![0; SETUP_OPAQUE_BYTES_MAX + 1], ..setup(Vec::new()) };
    let error = WireError::TooLarge { field: "length of the VMM's part of Setup", value: 524_289, limit: 524_288 };
    assert_eq!(encoded(&SourceFrame::Setup(too_much)), Err(error));
    let at_the_end = BlockInfo { guest_address: u64::MAX - (1 << 20) + 1, ..block(0) };
    assert!(encoded(&SourceFrame::Setup(setup(vec![at_the_end]))).is_ok());
}

#[test]
fn a_setup_that_makes_no_sense_is_refused_by_the_decoder() {
    // verify 0, channels 1, features 2, state 10, block count 18; then block 0: id 20, name length 22, name 23 to 28,
    // address 29, bytes 37, page size 45, backing page 49; then the length of the opaque bytes 57.
    let good = SourceFrame::Setup(setup(vec![block(0)]));
    let (block, page_size) = (BlockId(0), PageSize::SIZE_4K);
    let bad = |field, value| WireError::BadValue { field, value };
    let too_large = |field, value, limit| WireError::TooLarge { field, value, limit };
    for (at, new, error) in [
        (0, &[3u8][..], bad("kind of verification", 3)),
        (1, &[0], bad("number of channels", 0)),
        (18, &[1, 4], too_large("number of blocks", 1025, 1024)),
        (18, &[2, 0], WireError::CutShort { message: "Setup", wanted: 62, left: 41 }),
        (20, &[1, 0], WireError::BlockOutOfOrder { index: 0, id: BlockId(1) }),
        (22, &[255], WireError::CutShort { message: "Setup", wanted: 255, left: 38 }),
        (25, &[0xFF], WireError::NotUtf8 { field: "name of a block", valid_bytes: 2 }),
        (29, &[0xFF; 8], WireError::BlockAddress { block, guest_address: u64::MAX, bytes: 1 << 20 }),
        (37, &[1], WireError::BlockLength { block, bytes: (1 << 20) + 1, page_size }),
        (37, &[0, 0, 0], WireError::BlockLength { block, bytes: 0, page_size }),
        (45, &[0, 0], bad("page size of a block", 0)),
        (45, &[1, 0], bad("page size of a block", 1)),
        (45, &[0, 0, 2], bad("page size of a block", 131_072)),
        (49, &[0, 8], WireError::BackingPage { block, backing_page_bytes: 2048, page_size }),
        (49, &[0, 0], WireError::BackingPage { block, backing_page_bytes: 0, page_size }),
        (57, &[1, 0, 8, 0], too_large("length of the VMM's part of Setup", 524_289, 524_288)),
        (57, &[1], WireError::CutShort { message: "Setup", wanted: 1, left: 0 }),
    ] {
        assert_eq!(decoded::<SourceFrame>(&with(&good, at, new)), Err(error), "at {at}");
    }
}

#[test]
fn numbers_that_no_migration_has_are_refused_both_ways() {
    let channel = WireError::TooLarge { field: "channel", value: 255, limit: 254 };
    let round = WireError::TooLarge { field: "round", value: 65_536, limit: 65_534 };
    let state = WireError::StateOutOfRange { offset: u64::MAX, bytes: 1 };
    let long = WireError::TooLarge { field: "length of a piece of state", value: 262_145, limit: 262_144 };
    let (generation, bytes) = (Generation(1), vec![0]);

    let lost = |channel| SourceFrame::ChannelLost { channel: ChannelId(channel), generation };
    assert_eq!(encoded(&lost(255)), Err(channel));
    assert_eq!(decoded::<SourceFrame>(&with(&lost(254), 0, &[255])), Err(channel));

    let repair = |round| SourceFrame::Repair { round: Round(round), chunks: Vec::new() };
    assert_eq!(encoded(&repair(65_536)), Err(round));
    assert_eq!(decoded::<SourceFrame>(&with(&repair(0), 2, &[1])), Err(round));

    let piece = |offset| SourceFrame::State { offset, bytes: bytes.clone() };
    assert_eq!(encoded(&piece(u64::MAX)), Err(state));
    assert!(encoded(&piece(u64::MAX - 1)).is_ok());
    assert_eq!(decoded::<SourceFrame>(&with(&piece(0), 0, &[0xFF; 8])), Err(state));
    assert_eq!(encoded(&SourceFrame::State { offset: 0, bytes: vec![0; 262_145] }), Err(long));
    assert_eq!(decoded::<SourceFrame>(&with(&piece(0), 8, &[1, 0, 4, 0])), Err(long));
}

#[test]
fn the_largest_of_everything_fits_in_a_frame_and_comes_back() {
    fn comes_back<F: Frame + PartialEq + std::fmt::Debug>(frame: F) {
        let bytes = encoded(&frame).unwrap();
        let mut decoder = FrameDecoder::<F>::new();
        assert_eq!(decoder.pull(&mut &bytes[..]).unwrap().unwrap(), frame);
        assert!(decoder.capacity_bytes() <= FRAME_HEADER_BYTES + FRAME_BODY_BYTES_MAX);
    }
    let blocks = (0..BLOCKS_MAX as u16).map(|id| BlockInfo { name: "n".repeat(BLOCK_NAME_BYTES_MAX), ..block(id) });
    let opaque = vec![0x5A; SETUP_OPAQUE_BYTES_MAX];
    comes_back(SourceFrame::Setup(Setup { channels: 255, opaque, ..setup(blocks.collect()) }));
    comes_back(SourceFrame::State { offset: 0, bytes: vec![7; STATE_CHUNK_BYTES_MAX] });
    let lanes: Vec<_> = (0..CHANNELS_MAX as u8).map(|channel| (ChannelId(channel), Generation(u32::MAX))).collect();
    let digests = vec![u64::MAX; BLOCKS_MAX];
    comes_back(SourceFrame::Final(Final {
        round: Round::MAX,
        epoch: Epoch(u64::MAX),
        lanes: lanes.clone(),
        block_digests: digests.clone(),
        full_digests: digests,
        state_bytes: u64::MAX,
        state_crc: u32::MAX,
    }));
    let chunks = vec![(BlockId(1023), u32::MAX); CHUNKS_PER_FRAME_MAX];
    comes_back(SourceFrame::Repair { round: Round::MAX, chunks });
    let chunk_digests = vec![u64::MAX; CHUNKS_PER_FRAME_MAX];
    comes_back(TargetFrame::DigestMismatch { round: Round::MAX, block: BlockId(1023), chunk_digests });
    comes_back(TargetFrame::EpochApplied { epoch: Epoch(u64::MAX), lanes: lanes.clone() });
    let pong = |(channel, generation)| LanePong {
        channel,
        generation,
        rounds_passed: u32::MAX,
        at_barrier: true,
        bytes: u64::MAX,
    };
    comes_back(TargetFrame::Pong { nonce: u64::MAX, lanes: lanes.into_iter().map(pong).collect() });
    comes_back(TargetFrame::Refused { reason: "r".repeat(REASON_BYTES_MAX) });
}

#[test]
fn a_pong_that_names_a_lane_twice_is_refused_both_ways() {
    let lane =
        LanePong { channel: ChannelId(9), generation: Generation(1), rounds_passed: 0, at_barrier: false, bytes: 0 };
    let later = LanePong { generation: Generation(2), ..lane };
    let error = WireError::LaneTwice { channel: ChannelId(9) };
    assert_eq!(encoded(&TargetFrame::Pong { nonce: 0, lanes: vec![lane, later] }), Err(error));
    let other = LanePong { channel: ChannelId(8), ..lane };
    let good = TargetFrame::Pong { nonce: 0, lanes: vec![lane, other] };
    let second_channel_at = 8 + 1 + 18;
    assert_eq!(decoded::<TargetFrame>(&with(&good, second_channel_at, &[9])), Err(error));
}

#[test]
fn every_frame_has_a_name() {
    use message::Message;
    let named = |name_of: fn(u16) -> Option<&'static str>| (0..=u16::MAX).filter_map(name_of).count();
    assert_eq!(named(SourceFrame::name_of), 12);
    assert_eq!(named(TargetFrame::name_of), 14);
}
