//! Whole migrations inside one process, over real sockets: every byte of guest RAM arrives, or the guest stays.
#![cfg(not(loom))]

mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pageferry::dirty::combined::{Combined, Still};
use pageferry::memory::{Backing, Initial};
use pageferry::precopy::AtLimit;
use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyBitmap, DirtyError, Failure, Outcome, Ram, RamBlock, Source, Target, Verify, WriteProtect};
use vmm::{Script, TestGuest, TestIncoming, Transport, Trip, assert_arrived, assert_stayed};

const CHANNELS: [u8; 4] = [1, 2, 3, 8];
const VERIFY: [Verify; 3] = [Verify::Off, Verify::Wire, Verify::Full];

/// Blocks of these many pages.
const SHAPES: [&[u64]; 7] = [&[1], &[63], &[64], &[65], &[1000], &[7, 300, 1, 64], &[3; 64]];

/// A guest whose pages are full but for every fifth, which is zero, and every seventh, which was never touched.
fn guest_of(ram: &Ram) -> TestGuest {
    for (id, block) in ram.iter() {
        for page in 0..block.pages() {
            match page {
                _ if page % 7 == 6 => {}
                _ if page % 5 == 4 => vmm::zero_page(ram, id, page),
                _ => vmm::write_page(ram, id, page, 1),
            }
        }
    }
    TestGuest::new(ram, &DirtyBitmap::for_ram(ram))
}

fn migrate(transport: Transport, channels: u8, verify: Verify, guest: &mut TestGuest) -> Trip {
    migrate_into(transport, channels, verify, guest, TestIncoming::new())
}

fn migrate_into(
    transport: Transport,
    channels: u8,
    verify: Verify,
    guest: &mut TestGuest,
    incoming: TestIncoming,
) -> Trip {
    let source = Source::builder(guest.ram.clone()).verify(verify);
    let (source, target) = transport.connect(source, Target::builder(), channels);
    let mut dirty = guest.dirty.clone();
    vmm::travel(source, &mut dirty, guest, target, incoming)
}

#[test]
fn ram_that_lies_still_travels_once_and_what_nobody_touched_not_at_all() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[1000]);
    (0..700).for_each(|page| vmm::write_page(&ram, BlockId(0), page, 1));
    (700..750).for_each(|page| vmm::zero_page(&ram, BlockId(0), page));
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let trip = migrate(Transport::Tcp4, 2, Verify::Full, &mut guest);
    assert_arrived(&guest, &trip);
    let Trip { sent, received, .. } = &trip;
    assert_eq!((sent.payload_bytes, sent.zero_bytes, sent.untouched_bytes), (700 << 12, 50 << 12, 250 << 12));
    assert_eq!((received.payload_bytes, received.zero_bytes), (700 << 12, 50 << 12));
    assert_eq!(received.untouched_bytes, 250 << 12);
    assert_eq!((sent.ram_bytes, received.ram_bytes), (1000 << 12, 1000 << 12));
    assert!(sent.verified && received.verified);
}

#[test]
fn every_transport_carries_every_shape_while_the_guest_writes() {
    let mut shapes = SHAPES.iter().cycle();
    for transport in Transport::all() {
        for channels in CHANNELS {
            for verify in VERIFY {
                for page_size in [PageSize::SIZE_4K, PageSize::SIZE_64K] {
                    // More than an unoptimised build hashes in a time that fits a test is left to other tests.
                    let pages_max = if page_size == PageSize::SIZE_64K { 33 } else { 300 };
                    let shape: Vec<u64> = shapes.next().unwrap().iter().map(|pages| *pages.min(&pages_max)).collect();
                    let ram = vmm::ram(page_size, &shape);
                    let mut guest = guest_of(&ram);
                    guest.start(shape[0].min(20));
                    let trip = migrate(transport, channels, verify, &mut guest);
                    println!("{transport:?}, {channels} channels, {verify:?}, {page_size}, {shape:?}");
                    assert_arrived(&guest, &trip);
                    assert_eq!(trip.sent.verified, verify != Verify::Off);
                }
            }
        }
    }
}

#[test]
fn every_shape_survives_every_number_of_channels() {
    for shape in SHAPES {
        for channels in CHANNELS {
            let ram = vmm::ram(PageSize::SIZE_4K, shape);
            let mut guest = guest_of(&ram);
            guest.start(shape[0]);
            let trip = migrate(Transport::Fds, channels, Verify::Full, &mut guest);
            println!("{channels} channels, {shape:?}");
            assert_arrived(&guest, &trip);
        }
    }
}

#[test]
fn a_guest_that_never_stops_writing_arrives() {
    for channels in [1, 3] {
        let ram = vmm::ram(PageSize::SIZE_4K, &[5000, 77]);
        let mut guest = guest_of(&ram);
        guest.start(500);
        let trip = migrate(Transport::Tcp4, channels, Verify::Full, &mut guest);
        assert_arrived(&guest, &trip);
        assert!(trip.sent.rounds >= 3, "round 0 and two while paused at least");
    }
}

fn block_in(file: &File, name: &str, pages: u64) -> RamBlock {
    file.set_len(pages << 12).unwrap();
    RamBlock::file(name, 0, file, pages << 12, PageSize::SIZE_4K, true).unwrap()
}

/// A file that is gone when it is closed.
fn scratch_file() -> File {
    let path = vmm::unix_address();
    let path = path.strip_prefix("unix:").unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

#[test]
fn shared_memory_of_memfds_and_files_arrives() {
    for verify in VERIFY {
        let memfd = RamBlock::memfd("memfd", 0, 300 << 12, PageSize::SIZE_4K, Backing::Base).unwrap();
        let ram = Ram::new([memfd, block_in(&scratch_file(), "file", 100)]).unwrap();
        let mut guest = guest_of(&ram);
        guest.start(300);
        let mut incoming = TestIncoming::new();
        incoming.make = Box::new(|name, _, bytes, page_size| match name {
            "memfd" => RamBlock::memfd(name, 0, bytes, page_size, Backing::Base).unwrap(),
            _ => block_in(&scratch_file(), name, bytes >> 12),
        });
        let trip = migrate_into(Transport::Unix, 2, verify, &mut guest, incoming);
        assert_arrived(&guest, &trip);
    }
}

/// Write protection, or the reason for a skip.
fn write_protect(test: &str) -> Option<WriteProtect> {
    match WriteProtect::new() {
        Ok(tracking) => Some(tracking),
        Err(why @ DirtyError::Unsupported { .. }) => {
            support::skip(test, &why.to_string());
            None
        }
        Err(why) => panic!("{why}"),
    }
}

#[test]
fn write_protection_alone_sees_every_write_that_nobody_marked() {
    for channels in [1, 3] {
        let test = "write_protection_alone_sees_every_write_that_nobody_marked";
        let Some(mut tracking) = write_protect(test) else { return };
        let memfd = RamBlock::memfd("memfd", 1 << 40, 200 << 12, PageSize::SIZE_4K, Backing::Base).unwrap();
        let private = RamBlock::anonymous("ram", 0, 2000 << 12, PageSize::SIZE_4K, Backing::Base).unwrap();
        let ram = Ram::new([private, memfd]).unwrap();
        let mut guest = guest_of(&ram);
        guest.on_save = Some(Box::new(|ram, _| vmm::write_page(ram, BlockId(1), 6, 99)));
        guest.start_unmarked(400);
        let source = Source::builder(ram.clone()).verify(Verify::Full);
        let (source, target) = Transport::Tcp4.connect(source, Target::builder(), channels);
        let trip = vmm::travel(source, &mut tracking, &mut guest, target, TestIncoming::new());
        assert_arrived(&guest, &trip);
    }
}

#[test]
fn write_protection_and_a_devices_bitmap_are_one_source() {
    let test = "write_protection_and_a_devices_bitmap_are_one_source";
    let Some(tracking) = write_protect(test) else { return };
    let shared = RamBlock::memfd("shared", 1 << 40, 100 << 12, PageSize::SIZE_4K, Backing::Base).unwrap();
    let file = File::from(shared.fd().unwrap().try_clone_to_owned().unwrap());
    let private = RamBlock::anonymous("ram", 0, 1000 << 12, PageSize::SIZE_4K, Backing::Base).unwrap();
    let ram = Ram::new([private, shared]).unwrap();
    let mut guest = guest_of(&ram);
    // A device of another process: it writes through a mapping that this one does not track. The mark alone tells.
    let devices = RamBlock::file("same", 0, &file, 100 << 12, PageSize::SIZE_4K, true).unwrap();
    let devices = Ram::new([devices]).unwrap();
    guest.on_save = Some(Box::new(move |_, device| {
        vmm::fill(&devices, 5);
        device.mark_range(BlockId(1), 0, 100);
    }));
    guest.start_unmarked(300);
    let mut dirty = Combined::new(vec![Box::new(tracking), Box::new(guest.dirty.clone())]);
    let source = Source::builder(ram.clone()).verify(Verify::Full);
    let (source, target) = Transport::Unix.connect(source, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    assert_eq!(guest.dirty.count(), 0, "what the device marked was shipped");
}

#[test]
fn pages_that_turn_from_data_to_zero_and_back_end_as_they_are() {
    // Page p of a block is data in round r if bit r of p is set: all transitions of three rounds, on every lane.
    for channels in CHANNELS {
        let ram = vmm::ram(PageSize::SIZE_4K, &[64, 64]);
        let set = |round: u64| {
            for (block, page) in ram.iter().flat_map(|(id, b)| (0..b.pages()).map(move |p| (id, p))) {
                match page >> round & 1 {
                    1 => vmm::write_page(&ram, block, page, round),
                    _ => vmm::zero_page(&ram, block, page),
                }
            }
        };
        set(0);
        let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
        let between = |round: u64, bitmap: &DirtyBitmap| {
            if (1..=5).contains(&(round + 1)) {
                set(round + 1);
                (0..2).for_each(|block| bitmap.mark_range(BlockId(block), 0, 64));
            }
        };
        let mut dirty = Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) };
        // A limit that nothing keeps, for six rounds: every step is a round of its own.
        let source = Source::builder(ram.clone())
            .verify(Verify::Full)
            .downtime_limit(Duration::ZERO)
            .rounds_max(6)
            .at_limit(AtLimit::SwitchOver);
        let (source, target) = Transport::Fds.connect(source, Target::builder(), channels);
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_arrived(&guest, &trip);
        assert!(trip.sent.rounds >= 5, "{} rounds", trip.sent.rounds);
    }
}

#[test]
fn a_target_whose_memory_was_full_of_other_data_ends_byte_identical() {
    for (initial, shared) in [(Initial::Overwrite, false), (Initial::Punch, false), (Initial::Punch, true)] {
        let ram = vmm::ram(PageSize::SIZE_4K, &[700, 65]);
        let mut guest = guest_of(&ram);
        guest.start(100);
        let mut incoming = TestIncoming::new();
        incoming.make = Box::new(move |name, gpa, bytes, page_size| {
            let make = if shared { RamBlock::memfd } else { RamBlock::anonymous };
            let block = make(name, gpa, bytes, page_size, Backing::Base).unwrap().with_initial(initial);
            let full = Ram::new([block]).unwrap();
            vmm::fill(&full, 77);
            let range = full.block(BlockId(0)).unwrap().range(0, bytes >> 12).unwrap();
            vmm::same_memory(name, gpa, range, page_size, initial, full)
        });
        let trip = migrate_into(Transport::Tcp4, 3, Verify::Wire, &mut guest, incoming);
        assert_arrived(&guest, &trip);
    }
}

#[test]
fn guest_ram_that_save_state_writes_and_a_big_state_arrive() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[2000]);
    let mut guest = guest_of(&ram);
    guest.start(50);
    guest.state = (0..5u64 << 20).flat_map(|i| vmm::mix(i).to_le_bytes()).collect();
    assert_eq!(guest.state.len(), 40 << 20);
    guest.on_save = Some(Box::new(|ram, dirty| {
        for page in (0..2000).step_by(3) {
            vmm::write_page(ram, BlockId(0), page, 5);
            dirty.mark(BlockId(0), page);
        }
    }));
    let trip = migrate(Transport::Tcp4, 2, Verify::Full, &mut guest);
    assert_arrived(&guest, &trip);
    assert_eq!(trip.received.state_bytes, 40 << 20);
}

#[test]
fn a_device_state_of_no_bytes_arrives() {
    for transport in Transport::all() {
        let mut guest = guest_of(&vmm::ram(PageSize::SIZE_4K, &[10]));
        guest.state.clear();
        guest.setup.clear();
        let trip = migrate(transport, 1, Verify::Wire, &mut guest);
        assert_arrived(&guest, &trip);
    }
}

#[test]
fn the_largest_setup_bytes_arrive_and_larger_ones_are_the_callers_mistake() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[10]);
    let mut guest = guest_of(&ram);
    guest.setup = vec![7; 512 << 10];
    let trip = migrate(Transport::Tcp4, 1, Verify::Wire, &mut guest);
    assert_arrived(&guest, &trip);

    let mut guest = guest_of(&ram);
    guest.setup = vec![7; (512 << 10) + 1];
    let trip = migrate(Transport::Tcp4, 1, Verify::Wire, &mut guest);
    assert_stayed(&guest, &trip);
    let why = trip.sent.outcome.to_string();
    assert!(!why.contains("the peer"), "nobody else is to blame: {why}");
    assert!(why.contains("524289") && why.contains("524288"), "{why}");
}

#[test]
fn a_state_over_the_targets_limit_is_refused_and_the_source_hears_why() {
    for transport in Transport::all() {
        let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
        let mut guest = guest_of(&ram);
        guest.start(10);
        guest.state = vec![3; 8 << 20];
        let target = Target::builder().state_bytes_max(1 << 20);
        let (source, target) = transport.connect(Source::builder(ram.clone()), target, 2);
        let mut dirty = guest.dirty.clone();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_stayed(&guest, &trip);
        assert_eq!(guest.resumed, 1);
        let why = trip.sent.outcome.to_string();
        assert!(why.contains("exceeds the limit of 1048576 bytes"), "{transport:?}: {why}");
    }
}

#[test]
fn a_guest_that_outruns_the_link_is_left_alone_and_a_second_attempt_succeeds() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[3000]);
    let mut guest = guest_of(&ram);
    // Everything is dirty again after each round, and each round's writes are remembered.
    let between = |_: u64, bitmap: &DirtyBitmap| bitmap.mark_range(BlockId(0), 0, 3000);
    let mut dirty = Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) };
    let source = Source::builder(ram.clone()).downtime_limit(Duration::from_micros(1)).rounds_max(3);
    let (source, target) = Transport::Tcp4.connect(source, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_stayed(&guest, &trip);
    assert_eq!((guest.paused, guest.resumed), (0, 0), "it never stood still");
    let Outcome::Failed(Failure::NotConverging { rounds: 3, bytes_left, .. }) = trip.sent.outcome else {
        panic!("{}", trip.sent.outcome)
    };
    assert!(bytes_left >= 3000 << 12);
    assert!(trip.received.outcome.to_string().contains("dirties memory faster"), "{}", trip.received.outcome);
    assert_eq!(trip.sent.downtime, Duration::ZERO);

    guest.start(200);
    let trip = migrate(Transport::Tcp4, 3, Verify::Full, &mut guest);
    assert_arrived(&guest, &trip);
}

#[test]
fn a_failed_attempt_gives_back_everything_that_was_taken_since_arm() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[1000, 65]);
    let mut guest = guest_of(&ram);
    // Page 10 r is written before round r, and once more in the pause; page 64 of block 1 while state is saved.
    let between = |round: u64, bitmap: &DirtyBitmap| bitmap.mark(BlockId(0), 10 * round);
    let mut dirty = Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) };
    guest.dirty.mark(BlockId(0), 999);
    guest.on_save = Some(Box::new(|_, dirty| dirty.mark(BlockId(1), 64)));
    let incoming = TestIncoming { fail_load: Some("no such device".to_owned()), ..TestIncoming::new() };
    let (source, target) = Transport::Fds.connect(Source::builder(ram.clone()), Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, incoming);
    let rounds = dirty.rounds;
    drop(dirty);
    assert_stayed(&guest, &trip);
    assert!(trip.sent.outcome.to_string().contains("no such device"), "{}", trip.sent.outcome);
    for round in 0..rounds {
        assert!(guest.dirty.is_marked(BlockId(0), 10 * round), "what round {round} took");
    }
    assert!(guest.dirty.is_marked(BlockId(0), 999) && guest.dirty.is_marked(BlockId(1), 64));
    assert_eq!(guest.dirty.count(), rounds + 2);

    (guest.paused, guest.resumed, guest.on_save) = (0, 0, None);
    let trip = migrate(Transport::Fds, 2, Verify::Full, &mut guest);
    assert_arrived(&guest, &trip);
    assert_eq!(guest.dirty.count(), 0);
}

#[test]
fn memory_that_nobody_writes_needs_no_dirty_source() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    let mut guest = guest_of(&ram);
    let (source, target) = Transport::Fds.connect(Source::builder(ram.clone()), Target::builder(), 2);
    let trip = vmm::travel(source, &mut Still::new(), &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
}

#[test]
fn a_connector_that_runs_out_of_descriptors_is_named_with_the_channel() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[10]);
    let mut guest = guest_of(&ram);
    let (near, far) = vmm::pairs(2);
    let mut near = near.into_iter();
    let fds = pageferry::net::Fds::new(near.next().unwrap(), near);
    let source = Source::builder(ram.clone()).channels(2).connector(fds).unwrap();
    let target = Target::builder().connections(far).unwrap();
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_stayed(&guest, &trip);
    assert!(trip.sent.outcome.to_string().contains("channel 1, generation 1"), "{}", trip.sent.outcome);
}

#[test]
fn a_target_whose_ready_made_connections_lead_to_no_source_says_so_and_does_not_wait_for_more() {
    let strangers: [&[u8]; 3] = [b"", b"GET / HTTP/1.1", &[b'x'; 64]];
    for words in strangers {
        let (near, far) = vmm::pairs(2);
        let target = Target::builder().connections(far).unwrap();
        for near in near {
            UnixStream::from(near).write_all(words).unwrap();
        }
        let report = target.receive(&mut TestIncoming::new());
        let why = report.outcome.to_string();
        assert!(why.contains("none of the connections that were handed over"), "after {words:?}: {why}");
        assert_eq!(report.turned_away, 2);
    }
}
