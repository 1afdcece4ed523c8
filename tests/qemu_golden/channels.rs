//! The channels.

use pageferry::qemu::wire::{Compression, Dialect, InitPacket, Name, NewRamPacket, PacketKind, RamPacket, packet_kind};

pub const INITS: [&[u8; 64]; 3] =
    [include_bytes!("ch0_init.bin"), include_bytes!("ch1_init.bin"), include_bytes!("ch2_init.bin")];

pub const PACKETS: [[&[u8; 1344]; 4]; 3] = [
    [
        include_bytes!("ch0_packet0.bin"),
        include_bytes!("ch0_packet1.bin"),
        include_bytes!("ch0_packet2.bin"),
        include_bytes!("ch0_packet3.bin"),
    ],
    [
        include_bytes!("ch1_packet0.bin"),
        include_bytes!("ch1_packet1.bin"),
        include_bytes!("ch1_packet2.bin"),
        include_bytes!("ch1_packet3.bin"),
    ],
    [
        include_bytes!("ch2_packet0.bin"),
        include_bytes!("ch2_packet1.bin"),
        include_bytes!("ch2_packet2.bin"),
        include_bytes!("ch2_packet3.bin"),
    ],
];

#[test]
fn the_first_packet_of_each_channel_says_which_it_is() {
    for (channel, bytes) in (0..).zip(INITS) {
        let init = InitPacket::decode(bytes).unwrap();
        assert_eq!(init, InitPacket { uuid: [0; 16], channel });
        assert_eq!(init.encode(), *bytes);
    }
}

#[test]
fn packets_of_qemu_are_read_and_written_again_to_the_byte() {
    for bytes in PACKETS.into_iter().flatten() {
        assert_eq!(packet_kind(bytes.first_chunk().unwrap(), 64), Ok(PacketKind::Ram));
        let packet = RamPacket::decode(bytes, Dialect::V10_0, 64).unwrap();
        assert_eq!(packet.check_inside(128 << 20), Ok(()));
        let (normal, zero): (Vec<_>, Vec<_>) = (packet.normal.iter().collect(), packet.zero.iter().collect());
        let block = packet.block.map(|name| Name::new(name).unwrap());
        let again = NewRamPacket {
            sync: packet.sync,
            compression: packet.compression,
            number: packet.number,
            block: block.as_ref(),
            normal: &normal,
            zero: &zero,
            compressed_bytes: 0,
        };
        assert_eq!(again.encode(Dialect::V10_0).unwrap()[..], bytes[..]);
    }
}

#[test]
fn each_channel_begins_with_a_sync_that_shows_the_dialect() {
    for (number, packets) in (0..).zip(PACKETS) {
        let sync = RamPacket::decode(packets[0], Dialect::V10_0, 64).unwrap();
        assert!(sync.sync && sync.block.is_none() && sync.data_bytes == 0);
        assert!(sync.number < 3, "one of the first three packets: {number} {}", sync.number);
        assert_eq!(Dialect::of_first_packet(packets[0]), Dialect::V10_0);
    }
}

#[test]
fn a_packet_says_which_pages_have_bytes_and_which_are_zero() {
    let packet = RamPacket::decode(PACKETS[0][1], Dialect::V10_0, 64).unwrap();
    assert_eq!((packet.sync, packet.compression, packet.number), (false, Compression::None, 3));
    assert_eq!((packet.block, packet.data_bytes), (Some("ram0"), 4 * 4096));
    // QEMU swaps zero pages to the back, so nothing is in order.
    assert_eq!(packet.normal.iter().collect::<Vec<_>>(), [0, 0x9000, 0x7000, 0x6000]);
    assert_eq!(packet.zero.len(), 124);
    assert_eq!(packet.zero.iter().last(), Some(0x1000));
}
