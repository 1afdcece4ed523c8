//! Properties of wire version 1: whatever is sent comes back, whatever is damaged is found, whatever comes is survived.

#![cfg(not(loom))]
#![forbid(unsafe_code)]

#[path = "support/wire_checks.rs"]
mod wire_checks;
#[path = "support/wire_strategies.rs"]
mod wire_strategies;

use std::fmt::Debug;

use pageferry::units::PageSize;
use pageferry::wire::control::{
    FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, Frame, FrameDecoder, SourceFrame, TargetFrame,
};
use pageferry::wire::crc::crc32c;
use pageferry::wire::hello::{HELLO_MAGIC, Hello};
use pageferry::wire::packet::PACKET_HEADER_BYTES;
use pageferry::wire::{VERSION, WireError, printable};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use wire_checks::*;
use wire_strategies::{Packet, hello, packet, source_frame, target_frame};

/// Types that exist and types that do not.
fn frame_type() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 0u16..16, 4 => 0x80u16..0x90, 1 => any::<u16>()]
}

fn bytes_of(packet: &Packet) -> Vec<u8> {
    let mut bytes = vec![0xEE; PACKET_HEADER_BYTES + packet.header.table_bytes()];
    assert_eq!(packet.header.encode_into(&packet.runs, &mut bytes), Ok(bytes.len()));
    bytes
}

fn any_split_gives_the_frames<F: Frame + Clone + PartialEq + Debug>(frames: Vec<F>, pieces: &[usize]) {
    let stream = stream_of(&frames);
    assert_eq!(receive(&stream, pieces), Received { frames, end: Ok(()) });
}

/// Each byte of the first of two frames in turn: neither frame may come out.
fn no_damage_goes_unseen<F: Frame + PartialEq + Debug>(frames: &[F; 2], mask: u8) {
    let first_bytes = stream_of(&frames[..1]).len();
    let stream = stream_of(frames);
    for at in 0..first_bytes {
        let mut damaged = stream.clone();
        damaged[at] ^= mask;
        let received = receive::<F>(&damaged, &[]);
        assert!(received.frames.is_empty() && received.end.is_err(), "byte {at}: {received:?}");
    }
}

fn no_prefix_is_a_whole_stream<F: Frame + PartialEq + Debug>(frame: F) {
    let stream = stream_of(&[frame]);
    assert_eq!(receive::<F>(&[], &[]).end, Ok(()));
    for len in 1..stream.len() {
        let received = receive::<F>(&stream[..len], &[]);
        assert!(received.frames.is_empty());
        let left = len;
        assert!(
            matches!(received.end, Err(WireError::CutShort { wanted, left: l, .. }) if l == left && wanted > left),
            "{len}: {received:?}"
        );
    }
}

proptest! {
    #[test]
    fn a_hello_comes_back(hello in hello()) {
        prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn a_packet_comes_back(packet in packet()) {
        let judged = judge_packet(&bytes_of(&packet), packet.page_size, packet.block_pages);
        prop_assert_eq!(judged, Ok((packet.header, packet.runs)));
    }

    #[test]
    fn frames_of_the_source_come_back_however_the_stream_is_cut(
        frames in vec(source_frame(), 0..6),
        pieces in vec(1usize..100, 0..8),
    ) {
        any_split_gives_the_frames(frames, &pieces);
    }

    #[test]
    fn frames_of_the_target_come_back_however_the_stream_is_cut(
        frames in vec(target_frame(), 0..6),
        pieces in vec(1usize..100, 0..8),
    ) {
        any_split_gives_the_frames(frames, &pieces);
    }

    #[test]
    fn a_byte_changed_anywhere_in_a_hello_is_found(hello in hello(), mask in 1u8..) {
        for at in 0..64 {
            let mut damaged = hello.encode();
            damaged[at] ^= mask;
            prop_assert!(Hello::decode(&damaged).is_err(), "byte {}", at);
        }
    }

    #[test]
    fn a_byte_changed_anywhere_in_a_packets_header_or_table_is_found(
        packet in packet(),
        mask in 1u8..,
        payload in vec(any::<u8>(), 4096),
    ) {
        let mut bytes = bytes_of(&packet);
        let covered = bytes.len();
        // What follows on the stream: a header that states a longer table takes its rows from there.
        bytes.extend(payload);
        for at in 0..covered {
            bytes[at] ^= mask;
            let judged = judge_packet(&bytes, packet.page_size, packet.block_pages);
            prop_assert!(judged.is_err(), "byte {}: {:?}", at, judged);
            bytes[at] ^= mask;
        }
    }

    #[test]
    fn any_bytes_as_a_hello_are_survived(bytes in any::<[u8; 64]>(), sealed in any::<bool>(), sparse in any::<bool>()) {
        let mut bytes = bytes;
        if sealed {
            bytes[0..8].copy_from_slice(&HELLO_MAGIC);
            bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
            if sparse {
                bytes[10..12].iter_mut().for_each(|code| *code %= 4);
                [13..16, 20..24, 48..60].into_iter().for_each(|reserved| bytes[reserved].fill(0));
            }
            let crc = crc32c(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        }
        an_accepted_hello_is_canonical(&bytes);
    }

    #[test]
    fn any_bytes_as_a_packet_are_survived(
        mut bytes in vec(any::<u8>(), 0..400),
        sealed in any::<bool>(),
        block_pages in any::<u64>(),
    ) {
        if sealed {
            seal_packet(&mut bytes);
        }
        an_accepted_packet_is_canonical_and_fits(&bytes, PageSize::SIZE_4K, block_pages);
    }

    #[test]
    fn a_packet_with_any_field_changed_and_a_right_crc_is_refused_or_fits(
        packet in packet(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        block_pages in any::<u64>(),
    ) {
        let mut bytes = bytes_of(&packet);
        for (at, new) in changes {
            let at = at.index(bytes.len());
            bytes[at] = new;
        }
        seal_packet(&mut bytes);
        an_accepted_packet_is_canonical_and_fits(&bytes, packet.page_size, packet.block_pages);
        an_accepted_packet_is_canonical_and_fits(&bytes, packet.page_size, block_pages);
    }

    #[test]
    fn any_bytes_as_a_control_connection_are_survived(stream in vec(any::<u8>(), 0..200)) {
        accepted_frames_are_canonical::<SourceFrame>(&stream);
        accepted_frames_are_canonical::<TargetFrame>(&stream);
    }

    #[test]
    fn any_bytes_as_a_body_are_survived(frame_type in frame_type(), body in vec(prop_oneof![0u8..3, any::<u8>()], 0..200)) {
        let frame = sealed_frame(frame_type, &body);
        accepted_frames_are_canonical::<SourceFrame>(&frame);
        accepted_frames_are_canonical::<TargetFrame>(&frame);
    }

    #[test]
    fn a_body_with_any_byte_changed_and_a_right_crc_is_survived(
        source in source_frame(),
        target in target_frame(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<Index>()),
    ) {
        for stream in [stream_of(&[source]), stream_of(&[target])] {
            let (header, body) = stream.split_at(FRAME_HEADER_BYTES);
            let mut body = body.to_vec();
            for (at, new) in &changes {
                if !body.is_empty() {
                    let at = at.index(body.len());
                    body[at] = *new;
                }
            }
            if let Some(cut) = cut {
                body.truncate(cut.index(body.len() + 1));
            }
            let frame = sealed_frame(u16::from_le_bytes([header[0], header[1]]), &body);
            accepted_frames_are_canonical::<SourceFrame>(&frame);
            accepted_frames_are_canonical::<TargetFrame>(&frame);
        }
    }

    #[test]
    fn a_stated_length_over_the_limit_is_refused_before_room_is_made_for_it(
        frame_type in 1u16..13,
        length in FRAME_BODY_BYTES_MAX as u32 + 1..,
    ) {
        let mut header = sealed_frame(frame_type, &[]);
        header[4..8].copy_from_slice(&length.to_le_bytes());
        let mut decoder = FrameDecoder::<SourceFrame>::new();
        prop_assert_eq!(decoder.pull(&mut &header[..15]), Ok(None));
        prop_assert!(decoder.capacity_bytes() <= FRAME_HEADER_BYTES);
        let limit = FRAME_BODY_BYTES_MAX as u64;
        let error = WireError::TooLarge { field: "length of a control frame", value: length.into(), limit };
        prop_assert_eq!(decoder.pull(&mut &header[15..]), Err(error));
        prop_assert_eq!(decoder.capacity_bytes(), 0);
    }

    #[test]
    fn nothing_from_the_peer_steers_the_terminal(text in vec(any::<char>(), 0..50).prop_map(String::from_iter)) {
        let shown = printable(&text).to_string();
        prop_assert!(!shown.chars().any(char::is_control));
        prop_assert_eq!(shown.chars().count(), text.chars().count());
    }
}

proptest! {
    // Each case tries every byte of a stream: fewer cases do.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_byte_changed_anywhere_in_a_control_frame_is_found(
        source in [source_frame(), source_frame()],
        target in [target_frame(), target_frame()],
        mask in 1u8..,
    ) {
        no_damage_goes_unseen(&source, mask);
        no_damage_goes_unseen(&target, mask);
    }

    #[test]
    fn a_connection_that_ends_within_a_frame_says_so(source in source_frame(), target in target_frame()) {
        no_prefix_is_a_whole_stream(source);
        no_prefix_is_a_whole_stream(target);
    }
}
