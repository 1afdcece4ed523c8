//! What passes, and what does not.

use std::io::Write;
use std::thread;

use pageferry::Outcome;
use pageferry::progress::Stage;
use pageferry::qemu::relay::Relay;
use pageferry::qemu::wire::{Compression, DevicePacket, Dialect, Name, NewRamPacket, Record};

use crate::world::{
    BLOCK_BYTES, Main, SEVEN, SHUT_ERROR, SHUT_OK, TAIL, TEN, World, hang_up, init, packet, ram, read, rest, shut,
    sync, timeouts,
};

#[test]
fn a_guest_arrives_as_it_was_sent_and_the_answer_comes_back() {
    let world = World::new(2);
    let progress = world.progress.clone();
    let mut through = world.through(TEN, 2);
    through.say_ram(TEN);
    world.settle();
    let now = progress.now();
    assert_eq!((now.stage, now.rounds, now.ram_bytes), (Stage::Paused, 3, BLOCK_BYTES));
    through.say_main(TAIL);
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    assert_eq!(rest(&mut through.main_there), [0; 0]);
    let report = world.end();
    assert_eq!(report.outcome, Outcome::Completed);
    let c = report.counters;
    assert_eq!((c.normal_pages, c.zero_pages, c.sync_packets, c.barriers), (4, 0, 6, 3));
    assert_eq!(c.main_bytes, Main::usual(TEN).whole().len() as u64);
    assert_eq!(c.channel_bytes, 2 * (64 + 3 * 1344 + 2 * (1344 + 4096)));
    assert_eq!((report.channels, report.turned_away), (2, 2), "{report:?}");
    assert_eq!(progress.now().stage, Stage::Ended);
    assert_eq!(progress.now().channels.wire_bytes, c.main_bytes + c.channel_bytes);
}

#[test]
fn qemu_7_2_passes_with_pages_in_sync_packets_stale_sizes_and_zeros_on_the_main_connection() {
    let world = World::new(2);
    let mut through = world.through(SEVEN, 2);
    let name = ram();
    // A SYNC that has pages, and behind it one without, whose size is left over.
    let with_page = NewRamPacket { sync: true, normal: &[0x5000], ..NewRamPacket::pages(7, &name) };
    let header = with_page.encode(Dialect::V7_2).unwrap();
    let mut stale = NewRamPacket::sync(7).encode(Dialect::V7_2).unwrap();
    stale[20..24].copy_from_slice(&524_288_u32.to_be_bytes());
    stale[320..328].copy_from_slice(&0x5000_u64.to_be_bytes());
    let zero = Record::ZeroPage { block: 0, offset: 0x9000 };
    let main = Main::new(SEVEN, 2, &[zero]);
    through.say(&[&header[..], &[9; 4096]].concat());
    through.say_main(&main.parts[0]);
    through.say(&stale);
    through.say_main(&main.parts[1]);
    // The last SYNC has pages, too, and an empty packet behind it.
    let empty = NewRamPacket { sync: false, ..NewRamPacket::sync(8) }.encode(Dialect::V7_2).unwrap();
    through.say(&[&header[..], &[9; 4096], &empty].concat());
    through.say_main(&main.end);
    through.say_main(TAIL);
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    let report = world.end();
    assert_eq!(report.outcome, Outcome::Completed);
    let c = report.counters;
    assert_eq!((c.normal_pages, c.zero_pages, c.sync_packets, c.barriers), (4, 2, 8, 4));
}

#[test]
fn compressed_packets_and_the_state_of_devices_pass_as_they_are() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    let (name, data) = (ram(), [0xA5; 777]);
    for compression in [Compression::Zlib, Compression::Zstd] {
        let compressed_bytes = data.len() as u32;
        let packet = NewRamPacket {
            compression,
            normal: &[0x1000, 0],
            zero: &[0x7000],
            compressed_bytes,
            ..NewRamPacket::pages(1, &name)
        };
        through.say(&[&packet.encode(Dialect::V10_0).unwrap()[..], &data].concat());
    }
    through.say(&sync(Dialect::V10_0));
    let main = Main::usual(TEN);
    through.say_main(&main.parts[0]);
    through.say(&sync(Dialect::V10_0));
    through.say_main(&main.end);
    // QEMU sends this beside the end of RAM, and behind it.
    let device = Name::new("0000:00:02.0/vfio").unwrap();
    let state = DevicePacket { device, instance: 0, data_bytes: 5 }.encode().unwrap();
    through.say(&[&state[..], b"state"].concat());
    through.say_main(TAIL);
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    let report = world.end();
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!((report.counters.normal_pages, report.counters.zero_pages), (4, 2));
}

#[test]
fn a_packet_outside_its_block_does_not_reach_the_destination_and_the_source_is_told() {
    let world = World::new(1);
    let mut through = world.through(TEN, 1);
    through.channels[0].write_all(&packet(Dialect::V10_0, BLOCK_BYTES)).unwrap();
    assert_eq!(rest(&mut through.channels_there[0]), [0; 0]);
    assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
    drop((through.main, through.channels));
    let outcome = world.end().outcome;
    assert!(matches!(&outcome, Outcome::Failed(why) if why.to_string().contains("0x100000")), "{outcome}");
}

#[test]
fn pages_travel_on_the_main_connection_where_there_are_no_channels() {
    for told in [Some(0), None] {
        let world = World::new(told);
        let tongue = crate::world::Tongue { flushes: false, ..TEN };
        let main = Main::new(tongue, 2, &[Record::ZeroPage { block: 0, offset: 0 }]);
        let source = world.connect(&main.start);
        let mut through = world.arrive(source, Vec::new(), &main.start, tongue);
        main.parts.iter().chain([&main.end]).for_each(|section| through.say_main(section));
        through.say_main(TAIL);
        through.main_there.write_all(&shut(0)).unwrap();
        assert_eq!(read(&mut through.main, 8), SHUT_OK);
        drop(through.main);
        let report = world.end();
        assert_eq!((report.outcome, report.channels), (Outcome::Completed, 0), "{told:?}");
        assert_eq!(report.counters.zero_pages, 2);
    }
}

#[test]
fn a_guest_passes_over_unix_sockets() {
    use std::os::unix::net::{UnixListener, UnixStream};
    let folder = std::env::temp_dir().join(format!("pageferry-relay-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = |name: &str| format!("unix:{}", folder.join(name).display());
    let destination = UnixListener::bind(folder.join("there")).unwrap();
    let relay =
        Relay::builder().channels(1).timeouts(timeouts()).listen(&path("here")).unwrap().to(&path("there")).unwrap();
    let relay = thread::spawn(move || relay.run());
    let main = Main::usual(crate::world::Tongue { return_path: false, ..TEN });
    let mut source = UnixStream::connect(folder.join("here")).unwrap();
    source.write_all(&main.whole()).unwrap();
    let mut channel = UnixStream::connect(folder.join("here")).unwrap();
    let sent = [&init(0)[..], &sync(Dialect::V10_0).repeat(3)].concat();
    channel.write_all(&sent).unwrap();
    drop((source, channel));
    for expected in [main.whole(), sent] {
        let (mut there, mut got) = (destination.accept().unwrap().0, vec![0; expected.len()]);
        // Both at once: the main connection waits for the channel, which waits to be read.
        thread::spawn(move || {
            std::io::Read::read_exact(&mut there, &mut got).unwrap();
            assert_eq!(got, expected);
            assert_eq!(std::io::Read::read(&mut there, &mut [0]).unwrap(), 0, "the end passes, too");
        });
    }
    assert_eq!(relay.join().unwrap().outcome, Outcome::Completed);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_source_without_a_return_path_completes_when_the_destination_closes_before_it_or_after() {
    for source_first in [true, false] {
        let world = World::new(1);
        let tongue = crate::world::Tongue { return_path: false, ..TEN };
        let mut through = world.through(tongue, 1);
        through.say_ram(tongue);
        through.say_main(TAIL);
        if source_first {
            hang_up(&through.main);
            assert_eq!(rest(&mut through.main_there), [0; 0]);
        }
        hang_up(&through.main_there);
        drop(through.main);
        let report = world.end();
        assert_eq!(report.outcome, Outcome::Completed, "{source_first}");
        assert!(report.remarks[0].contains("no return path"), "{:?}", report.remarks);
    }
}
