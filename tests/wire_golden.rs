//! The bytes of every message of wire version 1. They never change: a peer that was built years ago must still be
//! understood, so a failure here is a break of the protocol, not a test to be brought up to date.
//!
//! The bytes were laid out by another program than the one under test, with a CRC computed a bit at a time. A blank
//! separates two fields; a line break comes after a header.

#![cfg(not(loom))]
#![forbid(unsafe_code)]

use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{
    BlockInfo, ErrorCode, Final, Frame, FrameDecoder, FrameEncoder, LanePong, PeerError, Setup, SourceFrame,
    TargetFrame,
};
use pageferry::wire::hello::{Hello, HelloRole, Side};
use pageferry::wire::packet::{
    HEADER_AND_TABLE_BYTES_MAX, PacketHeader, PacketKind, RunEntry, RunKind, TableSum, check_crc, entries,
    validate_table,
};

const SESSION: SessionId = SessionId([16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]);
const INSTANCE: InstanceId = InstanceId([32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47]);

fn bytes_of(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap()).collect();
    assert_eq!(digits.len() % 2, 0, "half a byte in {hex}");
    digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

#[test]
fn hellos_have_these_bytes() {
    let control = Hello {
        role: HelloRole::Control,
        side: Side::Target,
        generation: Generation(3),
        session: SESSION,
        features: 0,
    };
    let control_hex = "504746455252590a 0100 01 02 00 000000 03000000 00000000 0000000000000000 \
                       101112131415161718191a1b1c1d1e1f 000000000000000000000000 96f82961";
    let data = Hello {
        role: HelloRole::Data(ChannelId(254)),
        side: Side::Source,
        generation: Generation(0x0102_0304),
        session: SESSION,
        features: 0x8000_0000_0000_0001,
    };
    let data_hex = "504746455252590a 0100 02 01 fe 000000 04030201 00000000 0100000000000080 \
                    101112131415161718191a1b1c1d1e1f 000000000000000000000000 21790374";
    for (hello, hex) in [(control, control_hex), (data, data_hex)] {
        let golden = bytes_of(hex);
        assert_eq!(hello.encode()[..], golden);
        assert_eq!(Hello::decode(golden.first_chunk().unwrap()), Ok(hello));
    }
}

#[test]
fn packets_have_these_bytes() {
    let runs = [
        RunEntry { first: 0x10, pages: 2, kind: RunKind::Data },
        RunEntry { first: 0x12, pages: 0x100, kind: RunKind::Zero },
        RunEntry { first: 0x11_2233_4455, pages: 1, kind: RunKind::Data },
    ];
    let pages = PacketHeader {
        kind: PacketKind::Pages,
        block: BlockId(0x0102),
        run_count: 3,
        round: Round(0x0304),
        epoch: Epoch(0x05_0607_0809),
        sequence: 0x0A_0B0C_0D0E,
        payload_bytes: 3 * 4096,
    };
    let pages_hex = "5046706b 01 00 0201 03000000 04030000 0908070605000000 0e0d0c0b0a000000 \
                     0030000000000000 0000000000000000000000000000000000000000 2d72a6a2 \
                     1000000000000000 02000000 01000000 1200000000000000 00010000 02000000 \
                     5544332211000000 01000000 01000000";
    let flush = PacketHeader::flush(Epoch(0xA1A2_A3A4_A5A6_A7A8), Round(7), 9);
    let flush_hex = "5046706b 02 00 0000 00000000 07000000 a8a7a6a5a4a3a2a1 0900000000000000 \
                     0000000000000000 0000000000000000000000000000000000000000 ec0fd039";
    let round_end = PacketHeader::round_end(Round::MAX, Epoch(6), 10);
    let round_end_hex = "5046706b 03 00 0000 00000000 feff0000 0600000000000000 0a00000000000000 \
                         0000000000000000 0000000000000000000000000000000000000000 1cbbff7c";
    let bye = PacketHeader::bye(Round(8), Epoch(6), 11);
    let bye_hex = "5046706b 04 00 0000 00000000 08000000 0600000000000000 0b00000000000000 \
                   0000000000000000 0000000000000000000000000000000000000000 29583b45";
    let sum = TableSum { data_pages: 3, zero_pages: 0x100 };
    let nothing = TableSum::default();
    for (header, runs, sum, hex) in [
        (pages, &runs[..], sum, pages_hex),
        (flush, &[], nothing, flush_hex),
        (round_end, &[], nothing, round_end_hex),
        (bye, &[], nothing, bye_hex),
    ] {
        let golden = bytes_of(hex);
        let mut out = [0xEE; HEADER_AND_TABLE_BYTES_MAX];
        assert_eq!(header.encode_into(runs, &mut out), Ok(golden.len()));
        assert_eq!(out[..golden.len()], golden);

        let (head, table) = golden.split_first_chunk().unwrap();
        assert_eq!(PacketHeader::decode(head), Ok(header));
        assert_eq!(check_crc(head, table), Ok(()));
        assert_eq!(validate_table(&header, table, PageSize::SIZE_4K, 0x11_2233_4456), Ok(sum));
        assert!(entries(table).map(Result::unwrap).eq(runs.iter().copied()));
    }
}

fn source_goldens() -> Vec<(SourceFrame, &'static str)> {
    let ram = BlockInfo {
        id: BlockId(0),
        name: "pc.ram".into(),
        guest_address: 0,
        bytes: 0x8000_0000,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: 0x20_0000,
    };
    let top = BlockInfo {
        id: BlockId(1),
        name: "größe".into(),
        guest_address: 0xFFFF_FFFF_FFF0_0000,
        bytes: 0x10_0000,
        page_size: PageSize::SIZE_64K,
        backing_page_bytes: 0x1_0000,
    };
    let setup = Setup {
        verify: Verify::Full,
        channels: 4,
        features: 5,
        state_bytes_max: 0x10_0000,
        blocks: vec![ram, top],
        opaque: vec![0xDE, 0xAD, 0x00],
    };
    let last = Final {
        round: Round(9),
        epoch: Epoch(30),
        lanes: vec![(ChannelId(0), Generation(1)), (ChannelId(1), Generation(2))],
        block_digests: vec![0x1111_1111_2222_2222, 3],
        full_digests: vec![0xFEDC_BA98_7654_3210],
        state_bytes: 0x4_0005,
        state_crc: 0xE306_9283,
    };
    vec![
        (
            SourceFrame::Setup(setup),
            "0100 0000 66000000 00000000 1ec41212 \
             02 04 0500000000000000 0000100000000000 0200 0000 06 70632e72616d 0000000000000000 \
             0000008000000000 00100000 0000200000000000 0100 07 6772c3b6c39f65 0000f0ffffffffff \
             0000100000000000 00000100 0000010000000000 03000000 dead00",
        ),
        (
            SourceFrame::ChannelLost { channel: ChannelId(3), generation: Generation(2) },
            "0200 0000 05000000 01000000 89eb5336 \
             03 02000000",
        ),
        (
            SourceFrame::ChannelJoin { channel: ChannelId(254), generation: Generation(0x0102_0304) },
            "0300 0000 05000000 02000000 dc0e2041 \
             fe 04030201",
        ),
        (
            SourceFrame::State { offset: 0x4_0000, bytes: b"state".to_vec() },
            "0400 0000 11000000 03000000 5ddf05aa \
             0000040000000000 05000000 7374617465",
        ),
        (
            SourceFrame::Final(last),
            "0500 0000 3f000000 04000000 51d6d25e \
             09000000 1e00000000000000 02 00 01000000 01 02000000 0200 2222222211111111 \
             0300000000000000 0100 1032547698badcfe 0500040000000000 839206e3",
        ),
        (
            SourceFrame::Repair { round: Round(10), chunks: vec![(BlockId(0), 7), (BlockId(1023), u32::MAX)] },
            "0600 0000 14000000 05000000 d4cd3f54 \
             0a000000 02000000 0000 07000000 ff03 ffffffff",
        ),
        (SourceFrame::Commit, "0700 0000 00000000 06000000 d12ee924"),
        (
            SourceFrame::Cancel { reason: "schluß".into() },
            "0800 0000 09000000 07000000 8a8e8104 \
             0700 7363686c75c39f",
        ),
        (
            SourceFrame::Ping { nonce: 0x0102_0304_0506_0708 },
            "0900 0000 08000000 08000000 8dc35062 \
             0807060504030201",
        ),
        (
            SourceFrame::Resume { session: SESSION, instance: INSTANCE, round: Round(11), epoch: Epoch(12) },
            "0a00 0000 2c000000 09000000 5dc2ae8f \
             101112131415161718191a1b1c1d1e1f 202122232425262728292a2b2c2d2e2f 0b000000 \
             0c00000000000000",
        ),
        (
            SourceFrame::Query { session: SESSION },
            "0b00 0000 10000000 0a000000 5dd46c75 \
             101112131415161718191a1b1c1d1e1f",
        ),
        (
            SourceFrame::Error(PeerError { code: ErrorCode::Memory, text: "block 2: errno 12".into() }),
            "0c00 0000 15000000 0b000000 c9379e39 \
             0400 1100 626c6f636b20323a206572726e6f203132",
        ),
    ]
}

fn target_goldens() -> Vec<(TargetFrame, &'static str)> {
    let waiting = LanePong {
        channel: ChannelId(0),
        generation: Generation(1),
        rounds_passed: 9,
        at_barrier: true,
        bytes: 1 << 32,
    };
    let reading =
        LanePong { channel: ChannelId(1), generation: Generation(2), rounds_passed: 8, at_barrier: false, bytes: 5 };
    vec![
        (
            TargetFrame::Ready { instance: INSTANCE, features: 1 },
            "8100 0000 18000000 00000000 d524d025 \
             202122232425262728292a2b2c2d2e2f 0100000000000000",
        ),
        (
            TargetFrame::Refused { reason: "no AVX-512".into() },
            "8200 0000 0c000000 01000000 8c37349b \
             0a00 6e6f204156582d353132",
        ),
        (
            TargetFrame::EpochApplied {
                epoch: Epoch(0x1122_3344_5566_7788),
                lanes: vec![(ChannelId(2), Generation(1)), (ChannelId(0), Generation(4))],
            },
            "8300 0000 13000000 02000000 40234157 \
             8877665544332211 02 02 01000000 00 04000000",
        ),
        (
            TargetFrame::ChannelFailed { channel: ChannelId(3), generation: Generation(2), reason: "errno 104".into() },
            "8400 0000 10000000 03000000 428a9367 \
             03 02000000 0900 6572726e6f20313034",
        ),
        (
            TargetFrame::ChannelRetired { channel: ChannelId(3), generation: Generation(2) },
            "8500 0000 05000000 04000000 5d83a97f \
             03 02000000",
        ),
        (
            TargetFrame::ChannelJoined { channel: ChannelId(3), generation: Generation(3) },
            "8600 0000 05000000 05000000 b7972085 \
             03 03000000",
        ),
        (
            TargetFrame::Loaded { round: Round::MAX },
            "8700 0000 04000000 06000000 1f3006e3 \
             feff0000",
        ),
        (
            TargetFrame::DigestMismatch { round: Round(9), block: BlockId(1), chunk_digests: vec![2] },
            "8800 0000 12000000 07000000 d6c208b9 \
             09000000 0100 01000000 0200000000000000",
        ),
        (TargetFrame::Running, "8900 0000 00000000 08000000 11f993ca"),
        (
            TargetFrame::RunFailed { reason: "KVM_RUN: errno 22".into() },
            "8a00 0000 13000000 09000000 390aab43 \
             1100 4b564d5f52554e3a206572726e6f203232",
        ),
        (
            TargetFrame::Discarded { reason: String::new() },
            "8b00 0000 02000000 0a000000 6f4f4673 \
             0000",
        ),
        (
            TargetFrame::Pong { nonce: 0x0102_0304_0506_0708, lanes: vec![waiting, reading] },
            "8c00 0000 2d000000 0b000000 1006d8ab \
             0807060504030201 02 00 01000000 09000000 01 0000000001000000 01 02000000 08000000 00 \
             0500000000000000",
        ),
        (
            TargetFrame::QueryAnswer { running: true },
            "8d00 0000 01000000 0c000000 1cfa8bd6 \
             01",
        ),
        (
            TargetFrame::Error(PeerError { code: ErrorCode::Other(4000), text: "später".into() }),
            "8e00 0000 0b000000 0d000000 0b8d4a1e \
             a00f 0700 7370c3a4746572",
        ),
    ]
}

/// One connection that carries them all: frame k has number k.
fn check<F: Frame + Clone + PartialEq + std::fmt::Debug>(goldens: &[(F, &str)]) {
    let mut encoder = FrameEncoder::new();
    let mut decoder = FrameDecoder::new();
    for (frame, hex) in goldens {
        let golden = bytes_of(hex);
        let mut out = Vec::new();
        encoder.encode(frame, &mut out).unwrap();
        assert_eq!(out, golden, "{}", frame.name());
        let mut input = &golden[..];
        assert_eq!(decoder.pull(&mut input), Ok(Some(frame.clone())), "{}", frame.name());
        assert!(input.is_empty());
    }
    assert_eq!(decoder.finish(), Ok(()));
}

#[test]
fn frames_of_the_source_have_these_bytes() {
    check(&source_goldens());
}

#[test]
fn frames_of_the_target_have_these_bytes() {
    check(&target_goldens());
}

#[test]
fn no_frame_is_without_its_bytes_here() {
    // A match without a wildcard: a frame that is added does not compile until it is numbered here, and the count
    // then misses its bytes above.
    let source = |frame: &SourceFrame| match frame {
        SourceFrame::Setup(_) => 0,
        SourceFrame::ChannelLost { .. } => 1,
        SourceFrame::ChannelJoin { .. } => 2,
        SourceFrame::State { .. } => 3,
        SourceFrame::Final(_) => 4,
        SourceFrame::Repair { .. } => 5,
        SourceFrame::Commit => 6,
        SourceFrame::Cancel { .. } => 7,
        SourceFrame::Ping { .. } => 8,
        SourceFrame::Resume { .. } => 9,
        SourceFrame::Query { .. } => 10,
        SourceFrame::Error(_) => 11,
    };
    let target = |frame: &TargetFrame| match frame {
        TargetFrame::Ready { .. } => 0,
        TargetFrame::Refused { .. } => 1,
        TargetFrame::EpochApplied { .. } => 2,
        TargetFrame::ChannelFailed { .. } => 3,
        TargetFrame::ChannelRetired { .. } => 4,
        TargetFrame::ChannelJoined { .. } => 5,
        TargetFrame::Loaded { .. } => 6,
        TargetFrame::DigestMismatch { .. } => 7,
        TargetFrame::Running => 8,
        TargetFrame::RunFailed { .. } => 9,
        TargetFrame::Discarded { .. } => 10,
        TargetFrame::Pong { .. } => 11,
        TargetFrame::QueryAnswer { .. } => 12,
        TargetFrame::Error(_) => 13,
    };
    let source_seen: Vec<usize> = source_goldens().iter().map(|(frame, _)| source(frame)).collect();
    let target_seen: Vec<usize> = target_goldens().iter().map(|(frame, _)| target(frame)).collect();
    assert_eq!(source_seen, (0..12).collect::<Vec<_>>());
    assert_eq!(target_seen, (0..14).collect::<Vec<_>>());
}
