//! Properties of QEMU's wire: whatever is written is read, however it is cut; whatever comes is survived.

#![cfg(not(loom))]
#![cfg(feature = "qemu")]
#![forbid(unsafe_code)]

#[path = "support/qemu_checks.rs"]
mod checks;
#[path = "support/qemu_plans.rs"]
mod plans;
#[path = "support/script.rs"]
#[allow(dead_code)] // The fuzz targets use all of it.
mod script;
#[path = "support/qemu_streams.rs"]
mod streams;

use checks::*;
use pageferry::qemu::wire::{Dialect, RamPacket};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use script::Script;
use streams::{receive, receive_channel, receive_return};

fn dialect() -> impl Strategy<Value = Dialect> {
    prop_oneof![Just(Dialect::V10_0), Just(Dialect::V7_2)]
}

/// What plans are made from: small numbers, so that they get somewhere, and some of any size.
fn seed() -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![3 => 0u8..8, 2 => any::<u8>()], 0..200)
}

fn changed(mut stream: Vec<u8>, changes: &[(Index, u8)]) -> Vec<u8> {
    for (at, new) in changes {
        let at = at.index(stream.len());
        stream[at] = *new;
    }
    stream
}

proptest! {
    #[test]
    fn a_main_stream_comes_back_however_it_is_cut(seed in seed(), dialect in dialect(), pieces in vec(1usize..200, 0..6)) {
        let steps = plans::plan(&mut Script::new(&seed), dialect);
        let records: Vec<_> = steps.iter().map(plans::Step::record).collect();
        let stream = plans::encode(records.iter().cloned(), dialect).unwrap();
        let received = receive(&stream, dialect, &pieces);
        prop_assert_eq!(received.end, Ok(()));
        prop_assert_eq!(received.records, records);
    }

    #[test]
    fn no_beginning_of_a_main_stream_ends_well(seed in seed(), dialect in dialect(), length in any::<Index>()) {
        let steps = plans::plan(&mut Script::new(&seed), dialect);
        let stream = plans::encode(steps.iter().map(plans::Step::record), dialect).unwrap();
        let cut = &stream[..length.index(stream.len())];
        prop_assert!(receive(cut, dialect, &[]).end.is_err());
    }

    #[test]
    fn a_main_stream_with_any_bytes_changed_is_survived(
        seed in seed(),
        dialect in dialect(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        pieces in vec(1usize..200, 1..6),
    ) {
        let steps = plans::plan(&mut Script::new(&seed), dialect);
        let stream = plans::encode(steps.iter().map(plans::Step::record), dialect).unwrap();
        any_main_stream_is_judged_well(&changed(stream, &changes), dialect, &pieces);
    }

    #[test]
    fn any_bytes_are_survived_on_every_stream(
        bytes in vec(any::<u8>(), 0..300),
        skipped in 0usize..64,
        dialect in dialect(),
        pieces in vec(1usize..50, 1..6),
    ) {
        any_main_stream_is_judged_well(&bytes, dialect, &pieces);
        any_return_path_is_judged_well(&bytes, &pieces);
        any_channel_is_judged_well(&bytes, dialect, &pieces);
        // Past the beginning, where most garbage stops.
        let begun = [&b"QEVM\0\0\0\x03\x07\0\0\0\x01m"[..], &bytes].concat();
        any_main_stream_is_judged_well(&begun, dialect, &pieces);
        let sound = [&b"\x11\x22\x33\x44\0\0\0\x01"[..], &[0; 56]].concat();
        any_channel_is_judged_well(&[&sound, &sound[..skipped], &bytes].concat(), dialect, &pieces);
    }

    #[test]
    fn a_ram_packet_comes_back(seed in seed(), dialect in dialect(), at in any::<u32>()) {
        let planned = plans::Packet::any(&mut Script::new(&seed), dialect);
        let bytes = planned.new_packet().encode(dialect).unwrap();
        let packet = RamPacket::decode(&bytes, dialect, at.into()).unwrap();
        let end = planned.normal.iter().chain(&planned.zero).max().map_or(0, |last| last + 4096);
        prop_assert_eq!(packet.at, u64::from(at));
        prop_assert_eq!((packet.sync, packet.compression), (planned.sync, planned.compression));
        prop_assert_eq!((packet.number, packet.data_bytes), (planned.number, planned.data_bytes()));
        prop_assert_eq!(packet.block, (end > 0).then_some(planned.block.as_str()));
        prop_assert!(packet.normal.iter().eq(planned.normal.iter().copied()));
        prop_assert!(packet.zero.iter().eq(planned.zero.iter().copied()));
        prop_assert_eq!(packet.check_inside(end), Ok(()));
        prop_assert!(end == 0 || packet.check_inside(end - 1).is_err());
    }

    #[test]
    fn a_page_twice_in_a_packet_is_refused(seed in seed(), which in any::<[Index; 2]>()) {
        let mut planned = plans::Packet::any(&mut Script::new(&seed), Dialect::V10_0);
        let pages = planned.normal.len();
        prop_assume!(pages > 1);
        let (one, other) = (which[0].index(pages), which[1].index(pages));
        prop_assume!(one != other);
        planned.normal[one] = planned.normal[other];
        let error = planned.new_packet().encode(Dialect::V10_0).unwrap_err();
        prop_assert!(error.to_string().ends_with("comes twice, expected once"), "{}", error);
        prop_assert_eq!(error.at, 320 + 8 * one.min(other) as u64);
    }

    #[test]
    fn a_channel_comes_back_however_it_is_cut(seed in seed(), dialect in dialect(), pieces in vec(1usize..3000, 0..6)) {
        let (stream, data_bytes) = plans::channel(&mut Script::new(&seed), dialect);
        let received = receive_channel(&stream, dialect, &pieces);
        prop_assert_eq!(received.end, Ok(()));
        prop_assert_eq!(received.data_bytes, data_bytes);
    }

    #[test]
    fn a_channel_with_any_bytes_changed_is_survived(
        seed in seed(),
        dialect in dialect(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
        pieces in vec(1usize..3000, 1..6),
    ) {
        let (stream, _) = plans::channel(&mut Script::new(&seed), dialect);
        any_channel_is_judged_well(&changed(stream, &changes), dialect, &pieces);
    }

    #[test]
    fn a_return_path_comes_back_however_it_is_cut(seed in seed(), count in 0usize..6, pieces in vec(1usize..40, 0..6)) {
        let mut script = Script::new(&seed);
        let messages: Vec<_> = (0..count).map(|_| plans::message(&mut script)).collect();
        let mut stream = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut stream));
        prop_assert_eq!(receive_return(&stream, &pieces), (messages, Ok(())));
    }
}
