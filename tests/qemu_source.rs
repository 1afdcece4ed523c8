//! What a source of QEMU's wire says on its main connection, frame by frame: no socket, no thread.
#![cfg(all(not(loom), feature = "qemu"))]
#![forbid(unsafe_code)]

#[path = "support/qemu_tail.rs"]
mod qemu_tail;

use pageferry::framing::{Dialogue, Framing, Heard, PacketWriter, Place, Zeros};
use pageferry::memory::gather::Gather;
use pageferry::memory::{Backing, Ram, RamBlock};
use pageferry::qemu::Qemu;
use pageferry::qemu::wire::{Barrier, Dialect, MainDecoder, Record, ReturnMessage};
use pageferry::units::{BlockId, ChannelId, Epoch, FIRST_GENERATION, Item, PageSize, Round, Verify};
use pageferry::wire::control::{BlockInfo, Final, Setup, SourceFrame, TargetFrame};
use pageferry::wire::packet::{RunEntry, RunKind};

const PAGE: u64 = 4096;
/// Pages of the only block: no multiple of 64, nor of 128.
const PAGES: u64 = (8 << 20) / PAGE + 67;

/// The state of a device, of so many bytes, and a description of none.
fn tail(bytes: usize) -> Vec<u8> {
    qemu_tail::tail(&[&[4], &vec![0x55; bytes][..]].concat(), qemu_tail::DEVICES)
}

struct Side {
    dialogue: Box<dyn Dialogue<SourceFrame, TargetFrame>>,
    writer: Box<dyn PacketWriter>,
    packet: Gather,
    dialect: Dialect,
    out: Vec<u8>,
}

impl Side {
    /// Behind Setup, with one channel.
    fn new(dialect: Dialect, barrier: Barrier) -> Side {
        Side::with(Qemu::new(1).dialect(dialect, barrier), dialect)
    }

    fn with(qemu: Qemu, dialect: Dialect) -> Side {
        let block = RamBlock::anonymous("pc.ram", 0, PAGES * PAGE, PageSize::SIZE_4K, Backing::Base).unwrap();
        let mut dialogue = qemu.at_source();
        let mut out = qemu_header();
        dialogue.say(&SourceFrame::Setup(setup()), &mut out).unwrap();
        let ram = Ram::new([block]).unwrap();
        let writer = qemu.packets(&ram, ChannelId(0)).unwrap();
        let packet = Gather::new(ram, writer.room().head_bytes);
        Side { dialogue, writer, packet, dialect, out }
    }

    fn begins(&mut self, round: u32) {
        self.dialogue.round_begins(Round(round), &mut self.out).unwrap();
    }

    /// The channel meets pages of zeros in this round.
    fn meets(&mut self, round: u32, first: u64, pages: u32) {
        let at = Place { round: Round(round), epoch: Epoch(0) };
        let entry = RunEntry { first, pages, kind: RunKind::Zero };
        self.writer.pages(at, BlockId(0), &[entry], &mut self.packet).unwrap();
    }

    fn says(&mut self, frame: SourceFrame) {
        self.dialogue.say(&frame, &mut self.out).unwrap();
    }

    fn hands_over(&mut self, last_round: u32, tail: &[u8]) {
        self.says(SourceFrame::State { offset: 0, bytes: tail.to_vec() });
        self.says(last(last_round, tail));
    }

    /// As if everything went out at once, again and again; the bytes so far.
    fn drains(&mut self) -> &[u8] {
        loop {
            let mut more = Vec::new();
            self.dialogue.go_on(&mut more);
            if more.is_empty() {
                return &self.out;
            }
            assert!(more.len() < 2 << 20, "{} bytes at once", more.len());
            self.out.extend(more);
        }
    }

    fn hears(&mut self, message: &ReturnMessage) -> Vec<TargetFrame> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let (mut input, mut frames) = (&bytes[..], Vec::new());
        while let Some(Heard::Frame(frame)) = self.dialogue.hear(&mut input).unwrap() {
            frames.push(frame);
        }
        frames
    }

    /// The pages that each section has named, in order: START, every part, the end.
    fn sections(&mut self) -> Vec<Vec<u64>> {
        let dialect = self.dialect;
        let (mut decoder, mut sections) = (MainDecoder::new(dialect), Vec::new());
        let mut input = self.drains();
        while let Some(record) = decoder.pull(&mut input).expect("a sound stream") {
            match record {
                Record::RamStart { .. } | Record::RamPart | Record::RamEnd => sections.push(Vec::new()),
                Record::ZeroPage { block: 0, offset } => sections.last_mut().unwrap().push(offset / PAGE),
                _ => {}
            }
        }
        sections
    }
}

fn setup() -> Setup {
    let info = BlockInfo {
        id: BlockId(0),
        name: "pc.ram".to_owned(),
        guest_address: 0,
        bytes: PAGES * PAGE,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: PAGE,
    };
    let opaque = b"\x07\0\0\0\x02pc".to_vec();
    Setup { verify: Verify::Off, channels: 1, features: 0, state_bytes_max: 0, blocks: vec![info], opaque }
}

fn last(round: u32, tail: &[u8]) -> SourceFrame {
    SourceFrame::Final(Final {
        round: Round(round),
        epoch: Epoch(0),
        lanes: vec![(ChannelId(0), FIRST_GENERATION)],
        block_digests: Vec::new(),
        full_digests: Vec::new(),
        state_bytes: tail.len() as u64,
        state_crc: 0,
    })
}

fn qemu_header() -> Vec<u8> {
    b"QEVM\0\0\0\x03".to_vec()
}

#[test]
fn a_stream_begins_as_qemu_begins_it_to_the_byte() {
    let before = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec();
    let asked = b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01".to_vec();
    let start = |section: u8| {
        let bytes = (PAGES * PAGE).to_be_bytes();
        let total = ((PAGES * PAGE) | 4).to_be_bytes();
        let head = [1, 0, 0, 0, section, 3, b'r', b'a', b'm', 0, 0, 0, 0, 0, 0, 0, 4];
        [&head[..], &total, b"\x06pc.ram", &bytes].concat()
    };
    let flush = [0, 0, 0, 0, 0, 0, 2, 0];
    let end = |section: u8| vec![0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, section];
    let begun = |qemu: Qemu| {
        let mut side = Side::with(qemu, Dialect::V10_0);
        side.begins(0);
        side.out
    };
    let per_section = |channels| Qemu::new(channels).dialect(Dialect::V10_0, Barrier::PerSection);
    assert_eq!(begun(Qemu::new(1)), [&before[..], &asked, &start(1), &flush, &end(1)].concat());
    assert_eq!(begun(per_section(1).section(2)), [&before[..], &asked, &start(2), &end(2)].concat());
    assert_eq!(begun(per_section(1).return_path(false)), [&before[..], &start(1), &end(1)].concat());
    // Without channels nobody is to be waited for.
    assert_eq!(begun(Qemu::new(0)), [&before[..], &asked, &start(1), &end(1)].concat());
}

#[test]
fn a_configuration_that_is_not_whole_is_not_sent() {
    let mut dialogue = Qemu::new(1).at_source();
    for opaque in [&b""[..], b"\x07\0\0\0\x03pc", b"\x07\0\0\0\x02pc\x05", b"\x07\0\0\0\x02pc\x08\0\x01\0\0"] {
        let setup = Setup { opaque: opaque.to_vec(), ..setup() };
        let mut out = Vec::new();
        assert!(dialogue.say(&SourceFrame::Setup(setup), &mut out).is_err(), "{opaque:?}");
        assert_eq!(out, []);
    }
}

#[test]
fn pages_of_zeros_are_data_in_blocks_that_may_be_firmware_and_named_in_others() {
    for (bytes, becomes) in [(PAGE, Zeros::Data), (4 << 20, Zeros::Data), ((4 << 20) + PAGE, Zeros::Named)] {
        let block = RamBlock::anonymous("pc.ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap();
        let ram = Ram::new([block]).unwrap();
        for (dialect, barrier) in [(Dialect::V10_0, Barrier::PerRound), (Dialect::V7_2, Barrier::PerSection)] {
            let qemu = Qemu::new(1).dialect(dialect, barrier);
            assert_eq!(qemu.untouched(&ram.blocks()[0]), becomes);
            let writer = qemu.packets(&ram, ChannelId(0)).unwrap();
            assert_eq!([writer.zeros(BlockId(0), Round(0)), writer.zeros(BlockId(0), Round(7))], [becomes; 2]);
        }
    }
}

#[test]
fn a_tail_without_its_end_is_refused_while_the_guest_is_still_ours() {
    let mut side = Side::new(Dialect::V10_0, Barrier::PerRound);
    side.begins(0);
    let cut = &tail(9)[..40];
    side.says(SourceFrame::State { offset: 0, bytes: cut.to_vec() });
    assert!(side.dialogue.say(&last(0, cut), &mut Vec::new()).is_err());
}

#[test]
fn qemu_7_2_hears_of_zeros_in_the_part_of_their_round_and_of_each_once() {
    let mut side = Side::new(Dialect::V7_2, Barrier::PerSection);
    side.begins(0);
    side.meets(0, 60, 10);
    side.meets(0, PAGES - 1, 1);
    // A channel may be at the next round before the main connection says so.
    side.meets(1, 61, 1);
    side.begins(1);
    side.begins(2);
    side.meets(2, 7, 1);
    side.hands_over(2, &tail(0));
    side.says(SourceFrame::Commit);
    let first: Vec<u64> = (60..70).chain([PAGES - 1]).collect();
    assert_eq!(side.sections(), [vec![], first, vec![61], vec![7]]);
}

/// QEMU from 8.1 to 9.1.
#[test]
fn the_packets_of_7_2_go_with_flush_words_where_the_machine_has_its_barrier_there() {
    let mut side = Side::with(Qemu::new(1).dialect(Dialect::V7_2, Barrier::PerRound), Dialect::V10_0);
    side.begins(0);
    side.meets(0, 7, 2);
    side.begins(1);
    side.hands_over(1, &tail(0));
    side.says(SourceFrame::Commit);
    assert_eq!(side.sections(), [vec![], vec![7, 8], vec![]]);
    let (mut decoder, mut input, mut words) = (MainDecoder::new(Dialect::V10_0), &side.out[..], Vec::new());
    while let Some(record) = decoder.pull(&mut input).expect("a sound stream") {
        match record {
            Record::RamStart { .. } | Record::RamPart | Record::RamEnd => words.push(0),
            Record::Flush => *words.last_mut().unwrap() += 1,
            _ => {}
        }
    }
    assert_eq!(words, [1; 3], "a flush word for each SYNC");
}

#[test]
fn a_second_migration_of_one_value_is_refused_before_a_word_of_it() {
    let qemu = Qemu::new(1);
    let first = Side::with(qemu.clone(), Dialect::V10_0);
    let (mut second, mut out) = (qemu.at_source(), Vec::new());
    assert!(second.say(&SourceFrame::Setup(setup()), &mut out).is_err());
    assert_eq!(out, []);
    drop(first);
}

#[test]
fn what_an_attempt_that_is_taken_back_would_have_named_is_named_in_a_part() {
    let mut side = Side::new(Dialect::V7_2, Barrier::PerSection);
    side.begins(0);
    side.begins(1);
    side.meets(1, 5, 2);
    side.hands_over(1, &tail(0));
    // Taken back.
    side.says(SourceFrame::State { offset: 0, bytes: Vec::new() });
    side.begins(2);
    side.meets(2, 9, 1);
    side.hands_over(2, &tail(0));
    side.says(SourceFrame::Commit);
    assert_eq!(side.sections(), [vec![], vec![], vec![5, 6], vec![9]]);
}

#[test]
fn parts_that_wait_for_room_keep_their_order_and_their_pages() {
    let mut side = Side::new(Dialect::V7_2, Barrier::PerSection);
    side.begins(0);
    side.meets(0, 0, PAGES as u32);
    // So much waits already that nothing more is to be added.
    let before = side.out.len();
    side.out.resize(before + (1 << 20), 0);
    side.begins(1);
    side.meets(1, 1, 1);
    side.begins(2);
    assert!(side.out.len() < before + (1 << 20) + 64, "the pages wait, too");
    side.out.drain(before..before + (1 << 20));
    side.hands_over(2, &tail(0));
    side.says(SourceFrame::Commit);
    let all: Vec<u64> = (0..PAGES).collect();
    assert_eq!(side.sections(), [vec![], all, vec![1], vec![]]);
    // A page takes nine bytes, but for the first one of a part, which names its block.
    assert!(side.out.len() < before + PAGES as usize * 9 + 300, "{} bytes", side.out.len());
}

#[test]
fn a_destination_that_says_that_all_is_well_is_believed_when_all_of_it_is_out() {
    let mut side = Side::new(Dialect::V10_0, Barrier::PerRound);
    side.begins(0);
    side.hands_over(0, &tail(3 << 20));
    assert!(side.hears(&ReturnMessage::Pong { value: 1 }).iter().any(|f| matches!(f, TargetFrame::Loaded { .. })));
    side.says(SourceFrame::Commit);
    let mut out = Vec::new();
    for piece in 1..=4 {
        side.dialogue.go_on(&mut out);
        assert!(!out.is_empty(), "piece {piece}");
        if piece < 4 {
            out.clear();
        }
    }
    // The last piece is handed out, and nobody knows yet whether the socket has taken it.
    let early = side.hears(&ReturnMessage::Shut { error: 0 });
    assert!(matches!(early[..], [TargetFrame::Error(_)]), "{early:?}");

    let mut side = Side::new(Dialect::V10_0, Barrier::PerRound);
    side.begins(0);
    side.hands_over(0, &tail(3 << 20));
    side.hears(&ReturnMessage::Pong { value: 1 });
    side.says(SourceFrame::Commit);
    side.drains();
    let late = side.hears(&ReturnMessage::Shut { error: 0 });
    assert!(matches!(late[..], [TargetFrame::Running]), "{late:?}");
    // Its last word is its last.
    assert_eq!(side.hears(&ReturnMessage::Shut { error: 1 }), []);
}

#[test]
fn every_word_of_a_destination_before_commit_is_heard_for_what_it_is() {
    let start = || {
        let mut side = Side::new(Dialect::V10_0, Barrier::PerRound);
        side.begins(0);
        side.hears(&ReturnMessage::Pong { value: 7 });
        side
    };
    for error in [0, 1] {
        let heard = start().hears(&ReturnMessage::Shut { error });
        assert!(matches!(heard[..], [TargetFrame::Error(_)]), "SHUT({error}) early: {heard:?}");
    }
    assert_eq!(start().hears(&ReturnMessage::SwitchoverAck), []);
    // Post-copy was not offered, a length is wrong, a type is unknown.
    let mut asks = Vec::new();
    ReturnMessage::RequestPages { block: None, start: 0, bytes: 4096 }.encode(&mut asks);
    for bytes in [&asks[..], &[0, 1, 0, 5], &[0, 9, 0, 0]] {
        let mut side = start();
        assert!(side.dialogue.hear(&mut &bytes[..]).is_err(), "{bytes:?}");
        assert!(side.dialogue.hear(&mut &[][..]).is_err(), "and from then on always");
    }
    let mut side = start();
    assert!(matches!(side.dialogue.hear(&mut &[0, 1, 0][..]), Ok(None)));
    assert!(side.dialogue.ended().is_err(), "in the middle of a message");
    assert_eq!(start().dialogue.ended(), Ok(false));
}

#[test]
fn a_packet_of_zeros_only_is_no_packet_to_qemu_7_2_and_a_mark_is_a_sync() {
    let mut side = Side::new(Dialect::V7_2, Barrier::PerSection);
    let at = Place { round: Round(0), epoch: Epoch(0) };
    let entry = RunEntry { first: 0, pages: 128, kind: RunKind::Zero };
    let bytes = side.writer.pages(at, BlockId(0), &[entry], &mut side.packet).unwrap();
    assert_eq!(bytes, 0);
    assert_eq!(side.writer.mark(at, Item::RoundEnd(Round(0)), &mut side.packet), Ok(1344));
    let mut side = Side::new(Dialect::V10_0, Barrier::PerRound);
    let bytes = side.writer.pages(at, BlockId(0), &[entry], &mut side.packet).unwrap();
    assert_eq!(bytes, 1344);
}
