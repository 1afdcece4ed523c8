use super::*;
use crate::qemu::wire::{Name, NewRamPacket};
use crate::units::PageSize;

const BLOCKS: [(&str, u64); 2] = [("pc.ram", 64), ("pc.rom", 2)];

fn blocks() -> Vec<BlockInfo> {
    let info = |(index, (name, pages)): (usize, (&str, u64))| BlockInfo {
        id: BlockId(index as u16),
        name: name.to_owned(),
        guest_address: 0,
        bytes: pages * PAGE_BYTES,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: PAGE_BYTES,
    };
    BLOCKS.into_iter().enumerate().map(info).collect()
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A channel of this dialect behind its first SYNC.
fn begun(dialect: Dialect, seen: &Seen) -> QemuReader {
    let mut reader = QemuReader::new(&blocks(), seen.clone());
    assert!(!reader.may_end(), "a channel has one SYNC at least");
    let packet = take(&mut reader, &NewRamPacket::sync(0).encode(dialect).unwrap()).unwrap().0;
    let mark = Some(Mark::RoundEnd(Round(0)));
    assert_eq!(packet, Packet { block: BlockId(0), round: Round(0), payload: Payload::None, mark });
    assert!(reader.may_end());
    reader
}

fn take(reader: &mut QemuReader, header: &[u8]) -> Result<(Packet, Vec<RunEntry>), String> {
    let mut runs = Vec::new();
    assert_eq!((reader.header_bytes(), reader.table_bytes(header)), (header.len(), Ok(0)));
    let packet = reader.packet(header, &[], &mut runs).map_err(|why| why.to_string())?;
    Ok((packet, runs))
}

fn run(first: u64, pages: u32, kind: RunKind) -> RunEntry {
    RunEntry { first, pages, kind }
}

#[test]
fn pages_become_runs_in_their_order() {
    let mut reader = begun(Dialect::V10_0, &Seen::default());
    let ram = name("pc.ram");
    let normal = [0x9000, 0x7000, 0x8000, 0x3f000];
    let packet = NewRamPacket { normal: &normal, zero: &[0, 0x1000, 0x3000], ..NewRamPacket::pages(3, &ram) };
    let (packet, runs) = take(&mut reader, &packet.encode(Dialect::V10_0).unwrap()).unwrap();
    let payload = Payload::Plain(4 * PAGE_BYTES);
    assert_eq!(packet, Packet { block: BlockId(0), round: Round(1), payload, mark: None });
    let (data, zero) = (RunKind::Data, RunKind::Zero);
    let expected = [run(9, 1, data), run(7, 2, data), run(63, 1, data), run(0, 2, zero), run(3, 1, zero)];
    assert_eq!(runs, expected);
    assert!(!reader.may_end(), "it has pages behind its last SYNC");
    let (packet, runs) = take(&mut reader, &NewRamPacket::sync(4).encode(Dialect::V10_0).unwrap()).unwrap();
    assert_eq!((packet.mark, runs.len(), reader.may_end()), (Some(Mark::RoundEnd(Round(1))), 0, true));
}

#[test]
fn a_packet_of_zeros_alone_has_no_payload_but_is_none_of_nothing() {
    let mut reader = begun(Dialect::V10_0, &Seen::default());
    let rom = name("pc.rom");
    let packet = NewRamPacket { zero: &[0x1000], ..NewRamPacket::pages(1, &rom) }.encode(Dialect::V10_0).unwrap();
    let (packet, runs) = take(&mut reader, &packet).unwrap();
    assert_eq!((packet.block, packet.payload), (BlockId(1), Payload::Plain(0)));
    assert_eq!(runs, [run(1, 1, RunKind::Zero)]);
}

#[test]
fn a_sync_of_qemu_7_2_may_have_pages_and_an_empty_packet_behind_it() {
    let seen = Seen::default();
    let mut reader = begun(Dialect::V7_2, &seen);
    let ram = name("pc.ram");
    let with_pages = NewRamPacket { sync: true, normal: &[0x4000, 0x5000], ..NewRamPacket::pages(1, &ram) };
    let (packet, runs) = take(&mut reader, &with_pages.encode(Dialect::V7_2).unwrap()).unwrap();
    let mark = Some(Mark::RoundEnd(Round(1)));
    assert_eq!(packet, Packet { block: BlockId(0), round: Round(1), payload: Payload::Plain(8192), mark });
    assert_eq!(runs, [run(4, 2, RunKind::Data)]);
    assert!(seen.close(2));
    // With the size of what came before it, and its offsets.
    let mut empty = with_pages.encode(Dialect::V7_2).unwrap();
    empty[11] = 0;
    empty[16..20].fill(0);
    assert_eq!(empty[20..24], 8192_u32.to_be_bytes());
    for _ in 0..2 {
        let (packet, runs) = take(&mut reader, &empty).unwrap();
        assert_eq!((packet.payload, packet.mark, runs.len()), (Payload::None, None, 0));
        assert!(reader.may_end(), "it says nothing");
    }
    assert_eq!(seen.counts().channel_bytes, (64 + 4 * RAM_PACKET_BYTES + 8192) as u64);
    assert_eq!((seen.counts().normal_pages, seen.counts().sync_packets), (2, 2));
}

#[test]
fn whatever_says_something_behind_the_last_barrier_is_refused() {
    for dialect in [Dialect::V10_0, Dialect::V7_2] {
        let ram = name("pc.ram");
        let pages = NewRamPacket { normal: &[0], ..NewRamPacket::pages(1, &ram) };
        for more in [NewRamPacket::sync(1), pages] {
            let seen = Seen::default();
            let mut reader = begun(dialect, &seen);
            assert!(seen.close(1));
            let why = take(&mut reader, &more.encode(dialect).unwrap()).unwrap_err();
            assert!(why.contains("byte 1408: a packet came behind the last SYNC"), "{why}");
        }
    }
    let seen = Seen::default();
    begun(Dialect::V10_0, &seen);
    begun(Dialect::V10_0, &seen);
    assert!(!seen.close(1), "one of two has begun a round too many");
}

#[test]
fn pages_that_have_no_place_are_refused() {
    let refusal = |reader: &mut QemuReader, block: &str, offset: u64| {
        let block = name(block);
        let packet = NewRamPacket { normal: &[offset], ..NewRamPacket::pages(1, &block) };
        take(reader, &packet.encode(Dialect::V10_0).unwrap()).unwrap_err()
    };
    for (block, offset, words) in [("pc.bios", 0, "no RAM block pc.bios"), ("pc.rom", 0x2000, "0x2000")] {
        let why = refusal(&mut begun(Dialect::V10_0, &Seen::default()), block, offset);
        assert!(why.contains(words), "{why}");
    }
}

#[test]
fn pages_before_the_first_sync_are_refused() {
    let mut reader = QemuReader::new(&blocks(), Seen::default());
    let ram = name("pc.ram");
    let packet = NewRamPacket { normal: &[0], ..NewRamPacket::pages(1, &ram) }.encode(Dialect::V7_2).unwrap();
    assert!(take(&mut reader, &packet).unwrap_err().contains("before the first SYNC"));
}

#[test]
fn the_state_of_a_device_is_refused_before_more_of_it_is_waited_for() {
    let reader = QemuReader::new(&blocks(), Seen::default());
    let sync = NewRamPacket::sync(0).encode(Dialect::V10_0).unwrap();
    let mut device = sync;
    device[8..12].copy_from_slice(&0x40_u32.to_be_bytes());
    assert_eq!(reader.glance(&device[..11]), Ok(()), "it cannot be told");
    assert!(reader.glance(&device[..12]).unwrap_err().to_string().contains("state of a device"));
    assert!(reader.table_bytes(&device).is_err());
    assert_eq!(reader.glance(&sync[..12]), Ok(()));
    assert!(reader.glance(&[0; 12]).unwrap_err().to_string().contains("magic"));
}

#[test]
fn all_channels_come_from_one_qemu() {
    let seen = Seen::default();
    begun(Dialect::V10_0, &seen);
    let mut reader = QemuReader::new(&blocks(), seen.clone());
    let why = take(&mut reader, &NewRamPacket::sync(1).encode(Dialect::V7_2).unwrap()).unwrap_err();
    assert!(why.contains("another QEMU"), "{why}");
    assert_eq!(seen.facts().dialect, Some(Dialect::V10_0));
}

#[cfg(feature = "qemu-compression")]
#[test]
fn compressed_pages_are_unpacked_and_the_method_stays() {
    use crate::qemu::compress::Deflate;

    let ram = name("pc.ram");
    for method in [Compression::Zlib, Compression::Zstd] {
        for dialect in [Dialect::V10_0, Dialect::V7_2] {
            let seen = Seen::default();
            let (mut reader, mut deflate) = (begun(dialect, &seen), Deflate::new(method).unwrap());
            for round in 0..3_u8 {
                let pages: Vec<u8> = (0..2 * PAGE_BYTES).map(|at| (at / 64) as u8 ^ round).collect();
                let data = deflate.packet(&pages).unwrap().to_vec();
                let compressed_bytes = data.len() as u32;
                let packet = NewRamPacket { normal: &[0, 0x1000], ..NewRamPacket::pages(1, &ram) };
                let packet = NewRamPacket { compression: method, compressed_bytes, ..packet };
                let (packet, _) = take(&mut reader, &packet.encode(dialect).unwrap()).unwrap();
                assert_eq!(packet.payload, Payload::Packed(data.len()));
                let mut unpacked = vec![0; pages.len()];
                reader.unpack(&data, &mut unpacked).unwrap();
                assert!(unpacked == pages);
            }
            assert_eq!(seen.facts().compression, Some(method));
            let plain = NewRamPacket { normal: &[0], ..NewRamPacket::pages(1, &ram) }.encode(dialect).unwrap();
            assert!(take(&mut reader, &plain).unwrap_err().contains("compression has changed"));
            // Nor does it begin later.
            let mut reader = begun(dialect, &Seen::default());
            take(&mut reader, &plain).unwrap();
            let packet = NewRamPacket { normal: &[0], ..NewRamPacket::pages(1, &ram) };
            let packet = NewRamPacket { compression: method, compressed_bytes: 9, ..packet }.encode(dialect).unwrap();
            assert!(take(&mut reader, &packet).unwrap_err().contains("compression has changed"));
        }
    }
}
