//! QEMU's bytes with one thing wrong: what is refused, at which byte, and in which words. Much of it QEMU itself takes.

use pageferry::qemu::wire::{
    ChannelDecoder, ChannelEvent, DEVICE_DATA_BYTES_MAX, DevicePacket, Dialect, InitPacket, Name, NewRamPacket,
    RamPacket, ReturnDecoder,
};

use crate::channels::{INITS, PACKETS};
use crate::main_stream::STREAM;
use crate::streams::receive;

/// `bytes` with `new` at `at`.
fn with<const N: usize>(bytes: &[u8; N], at: usize, new: &[u8]) -> [u8; N] {
    let mut bytes = *bytes;
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn an_init_packet_with_anything_wrong_is_refused_where_it_is() {
    for (at, new, message) in [
        (0, &b"QEVM"[..], "byte 0: the magic is 1363498573 (0x5145564d), expected 0x11223344"),
        (7, &[2], "byte 4: the version is 2 (0x2), expected 1"),
        (24, &[255], "byte 24: the channel id is 255, expected at most 254"),
        (63, &[9], "byte 63: the reserved byte of the init packet is 9 (0x9), expected zero"),
    ] {
        let error = InitPacket::decode(&with(INITS[0], at, new)).unwrap_err();
        assert_eq!(error.to_string(), format!("multifd channel, {message}"));
    }
}

#[test]
fn a_ram_packet_with_anything_wrong_is_refused_where_it_is() {
    let (sync, data) = (PACKETS[0][0], PACKETS[0][1]);
    for (packet, at, new, message) in [
        (data, 11, &[0x80][..], "byte 72: the flag word is 128 (0x80), expected SYNC (0x1) and one way of compression"),
        (data, 11, &[0x08], "byte 72: the flag word is 8 (0x8), expected no compression, zlib (0x2) or zstd (0x4)"),
        (data, 11, &[0x01], "byte 80: the number of pages is 128 (0x80), expected none in a SYNC packet"),
        (sync, 11, &[0x00], "byte 80: the number of pages is 0 (0x0), expected pages, or the flag SYNC"),
        (sync, 15, &[0x80], "byte 76: the pages_alloc is 128 (0x80), expected 0 in a SYNC packet"),
        (data, 15, &[129], "byte 76: the pages_alloc is 129, expected at most 128"),
        (data, 16, &[255, 255, 255, 255], "byte 80: the normal_pages is 4294967295, expected at most 128"),
        (data, 32, &[255, 255, 255, 255], "byte 96: the zero_pages is 4294967295, expected at most 124"),
        (data, 20, &[0, 0, 0x50, 0], "byte 84: the next_packet_size is 20480, expected 16384"),
        (data, 63, &[1], "byte 127: the reserved byte of a RAM packet is 1 (0x1), expected zero"),
        (data, 64, &[0], "byte 128: the ramblock is not a name and zero bytes to the end of the field"),
        (data, 64, &[0xFF], "byte 128: the ramblock is not 1 to 255 bytes of UTF-8 without control characters"),
        (data, 64, &[b'a'; 256], "byte 128: the ramblock is not a name and zero bytes to the end of the field"),
        (sync, 64, b"ram0", "byte 128: the ramblock is not empty in a packet without pages"),
        (data, 334, &[0x98], "byte 392: the offset of a page is 38912 (0x9800), expected a multiple of 4096"),
        (data, 342, &[0x90], "byte 392: the page at offset 0x9000 comes twice, expected once"),
        (sync, 1343, &[1], "byte 1407: the unused offset is 1 (0x1), expected zero"),
    ] {
        let error = RamPacket::decode(&with(packet, at, new), Dialect::V10_0, 64).unwrap_err();
        assert_eq!(error.to_string(), format!("multifd channel, {message}"));
    }
}

#[test]
fn a_page_outside_its_block_is_refused() {
    let packet = RamPacket::decode(PACKETS[0][1], Dialect::V10_0, 64).unwrap();
    assert_eq!(packet.check_inside(0x8_0000), Ok(()));
    let error = packet.check_inside(0x7_F000).unwrap_err().to_string();
    let expected = "the offset of a page is 0x7f000, expected a multiple of 4096 below the block's 0x7f000";
    assert!(error.ends_with(expected), "{error}");
    let far = with(PACKETS[0][1], 328, &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xF0, 0x00]);
    let packet = RamPacket::decode(&far, Dialect::V10_0, 64).unwrap();
    assert_eq!(packet.check_inside(u64::MAX).unwrap_err().at, 64 + 328, "the end of it has more than 64 bits");
}

#[test]
fn qemu_7_2_may_leave_old_values_where_nothing_is_read() {
    // A SYNC with room for 128 pages, the size of an earlier packet, and its name and offsets.
    let stale = with(PACKETS[0][1], 11, &[1]);
    let stale = with(&stale, 16, &[0, 0, 0, 0, 0, 8, 0, 0]);
    let stale = with(&stale, 32, &[0; 4]);
    let packet = RamPacket::decode(&stale, Dialect::V7_2, 64).unwrap();
    assert!(packet.sync && packet.block.is_none() && packet.normal.is_empty());
    assert_eq!(packet.data_bytes, 0, "nothing follows, whatever next_packet_size says");
    assert!(RamPacket::decode(&stale, Dialect::V10_0, 64).is_err());
    assert_eq!(Dialect::of_first_packet(&stale), Dialect::V7_2);

    // A SYNC with pages: they come before the barrier.
    let pages = with(PACKETS[0][1], 11, &[1]);
    let pages = with(&pages, 32, &[0; 4]);
    let packet = RamPacket::decode(&pages, Dialect::V7_2, 64).unwrap();
    assert!(packet.sync && packet.block == Some("ram0"));
    assert_eq!((packet.normal.len(), packet.data_bytes), (4, 4 * 4096));

    // QEMU 9.0 and 9.1 begin as 7.2 does, and have zero pages in their packets.
    let packet = RamPacket::decode(PACKETS[0][1], Dialect::V7_2, 64).unwrap();
    assert_eq!((packet.normal.len(), packet.zero.len(), packet.data_bytes), (4, 124, 4 * 4096));
    let error = RamPacket::decode(&with(PACKETS[0][1], 32, &[0, 0, 0, 125]), Dialect::V7_2, 64).unwrap_err();
    assert_eq!(error.to_string(), "multifd channel, byte 96: the zero_pages is 125, expected at most 124");
}

#[test]
fn a_compressed_packet_has_the_length_it_states() {
    let zlib = with(PACKETS[0][1], 11, &[2]);
    for (size, length) in [(1_u32, Some(1)), (1 << 20, Some(1 << 20)), ((1 << 20) + 1, None), (0, None)] {
        let bytes = with(&zlib, 20, &size.to_be_bytes());
        let without_zeros = with(&bytes, 32, &[0; 4]);
        for (bytes, dialect) in [(&bytes, Dialect::V10_0), (&without_zeros, Dialect::V7_2)] {
            let packet = RamPacket::decode(bytes, dialect, 0);
            assert_eq!(packet.ok().map(|packet| packet.data_bytes), length);
        }
    }
}

#[test]
fn a_main_stream_with_anything_wrong_is_refused_where_it_is() {
    for (at, new, message) in [
        (0, &b"X"[..], "byte 0: the magic is 1480939085 (0x5845564d), expected 0x5145564d, \"QEVM\""),
        (7, &[4], "byte 4: the version of the stream is 4 (0x4), expected 3"),
        (8, &[1], "byte 8: the type of a record is 1 (0x1), expected 0x07, the configuration"),
        (9, &[255], "byte 9: the length of the machine's name is 4278190091, expected at most 255"),
        (13, &[0], "byte 13: the machine's name is not 1 to 255 bytes of UTF-8 without control characters"),
        (201, &[9], "byte 201: the number of a section is 150994945, expected 1"),
        (200, &[7], "byte 200: the type of a record is 7 (0x7), expected a command or the next section of RAM"),
        (
            200,
            &[4],
            "byte 200: the state of a device before the end of RAM, as virtio-mem and background-snapshot send it, cannot \
             be followed, expected a command or the next section of RAM",
        ),
        (195, &[8], "byte 195: the type of a record is 8 (0x8), expected 0x7e, a footer"),
        (1771, &[1], "byte 1771: the type of a record is 1 (0x1), expected a command or the sections of the devices"),
        (
            24,
            &[4],
            "byte 24: the type of a record is 4 (0x4), expected a subsection of the configuration, a command or the \
             START section of RAM",
        ),
        (31, b"n", "byte 29: a section is called \"rnm\", expected ram, the only one whose pages are understood"),
        (40, &[3], "byte 37: the version of the section of RAM is 3 (0x3), expected 4"),
        (
            48,
            &[8],
            "byte 41: the first word of START is 134750216 (0x8082008), expected the length of all RAM blocks and, in its \
             low bits, 0x04",
        ),
        (49, &[0], "byte 49: the name of a RAM block is not 1 to 255 bytes of UTF-8 without control characters"),
        (54, &[1], "byte 54: the length of a RAM block is 72057594172145664, expected at most 134750208"),
        (
            61,
            &[1],
            "byte 49: the length of a RAM block is 134217729 (0x8000001), expected one or more pages of 4096 bytes",
        ),
        (
            185,
            &[0],
            "byte 179: the word is 0 (0x0), expected 0x02 (zero page), 0x08 (page), 0x10 (end) or 0x200 (flush) in its \
             low bits",
        ),
    ] {
        let mut bytes = STREAM.to_vec();
        bytes[at..at + new.len()].copy_from_slice(new);
        let error = receive(&bytes, Dialect::V10_0, &[]).end.unwrap_err();
        assert_eq!(error.to_string(), format!("main stream, {message}"), "{new:?} at {at}");
    }
}

#[test]
fn a_message_with_anything_wrong_is_refused_where_it_is() {
    for (bytes, message) in [
        (&[0, 8, 0, 0][..], "byte 0: the type of a message is 8 (0x8), expected 1 (SHUT) to 7 (SWITCHOVER_ACK)"),
        (&[0, 1, 0, 5], "byte 2: the length of a message is 5, expected 4"),
        (&[0, 7, 255, 255], "byte 2: the length of a message is 65535, expected 0"),
        (
            &[0, 5, 0, 5],
            "byte 0: RECV_BITMAP, which begins a recovery of post-copy cannot be followed, expected another message",
        ),
        (&[0, 6, 0, 4, 0, 0, 0, 2], "byte 4: the value of RESUME_ACK is 2 (0x2), expected 1"),
    ] {
        let error = ReturnDecoder::new().pull(&mut &bytes[..]).unwrap_err();
        assert_eq!(error.to_string(), format!("return path, {message}"));
    }
}

#[test]
fn a_packet_that_names_one_page_more_than_it_has_room_for_is_refused() {
    let packet = with(PACKETS[0][1], 15, &[5]);
    for (normal, message) in
        [(6_u32, "normal_pages is 6, expected at most 5"), (129, "normal_pages is 129, expected at most 5")]
    {
        for dialect in [Dialect::V10_0, Dialect::V7_2] {
            let error = RamPacket::decode(&with(&packet, 16, &normal.to_be_bytes()), dialect, 64).unwrap_err();
            assert!(error.to_string().ends_with(message), "{error}");
        }
    }
    let full = with(&with(PACKETS[0][1], 16, &129_u32.to_be_bytes()), 32, &[0; 4]);
    assert!(RamPacket::decode(&full, Dialect::V10_0, 0).is_err());
}

#[test]
fn compressed_packets_of_one_page_and_of_none_have_the_length_that_they_may_have() {
    // One normal page, and no zero pages.
    let one = with(&with(&with(PACKETS[0][1], 11, &[4]), 16, &1_u32.to_be_bytes()), 32, &[0; 4]);
    let one = with(&one, 328, &[0; 1016]);
    for (size, length) in [(0_u32, None), (9, Some(9))] {
        let bytes = with(&one, 20, &size.to_be_bytes());
        let packet = RamPacket::decode(&bytes, Dialect::V10_0, 0);
        assert_eq!(packet.ok().map(|packet| packet.data_bytes), length);
    }
    // A SYNC of QEMU 7.2 that has the length of an earlier packet, and says how that was compressed.
    let stale = with(&with(&with(PACKETS[0][1], 11, &[3]), 16, &[0, 0, 0, 0, 0, 8, 0, 0]), 32, &[0; 4]);
    let packet = RamPacket::decode(&stale, Dialect::V7_2, 64).unwrap();
    assert!(packet.sync && packet.data_bytes == 0);
}

#[test]
fn a_sync_has_room_for_pages_in_qemu_7_2_only() {
    for (dialect, room) in [(Dialect::V10_0, 0_u32), (Dialect::V7_2, 128)] {
        let bytes = NewRamPacket::sync(7).encode(dialect).unwrap();
        assert_eq!(bytes[12..16], room.to_be_bytes());
        assert_eq!(Dialect::of_first_packet(&bytes), dialect);
    }
}

#[test]
fn a_packet_of_a_device_with_anything_wrong_is_refused_where_it_is() {
    let device = Name::new("vfio").unwrap();
    let largest = DevicePacket { device, instance: 3, data_bytes: DEVICE_DATA_BYTES_MAX };
    let sound = largest.encode().unwrap();
    assert_eq!(DevicePacket::decode(&sound, 64), Ok(largest));
    for (at, new, message) in [
        (11, &[0x41][..], "byte 72: the flag word is 65 (0x41), expected 0x40: device state and no other"),
        (12, &[0], "byte 76: the device name is not a name and zero bytes to the end of the field"),
        (12, &[b'a'; 256], "byte 76: the device name is not a name and zero bytes to the end of the field"),
        (272, &[0; 4], "byte 336: the next_packet_size is 0 (0x0), expected some state"),
        (275, &[1], "byte 336: the next_packet_size is 67108865, expected at most 67108864"),
    ] {
        let error = DevicePacket::decode(&with(&sound, at, new), 64).unwrap_err();
        assert_eq!(error.to_string(), format!("multifd channel, {message}"));
    }
    // QEMU 7.2 has no such packets.
    let mut stream = INITS[0].to_vec();
    stream.extend(sound);
    let mut decoder = ChannelDecoder::new(Dialect::V7_2);
    let mut input = &stream[..];
    assert!(matches!(decoder.pull(&mut input), Ok(Some(ChannelEvent::Init(_)))));
    let error = decoder.pull(&mut input).unwrap_err().to_string();
    let expected = "byte 72: a packet with device state cannot be followed, expected RAM packets from QEMU 7.2";
    assert_eq!(error, format!("multifd channel, {expected}"));
}
