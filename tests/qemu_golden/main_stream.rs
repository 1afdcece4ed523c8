//! The main stream.

use pageferry::qemu::wire::{Barrier, Command, Dialect, MainDecoder, MainEncoder, Record};

use crate::streams::{Received, receive};

pub const STREAM: &[u8] = include_bytes!("main.raw");

/// Where the state of the devices begins, where its end mark is, and the length of the description after it.
const TAIL_AT: usize = 1771;
const END_MARK_AT: usize = 34_830;
const DESCRIPTION_BYTES: usize = 44_694;

fn whole() -> Received<'static> {
    let received = receive(STREAM, Dialect::V10_0, &[]);
    assert_eq!(received.end, Ok(()));
    received
}

#[test]
fn the_stream_of_qemu_is_read_to_its_last_byte() {
    let records = whole().records;
    assert_eq!(records[0], Record::Header);
    assert!(matches!(&records[1], Record::Machine(name) if name.as_str() == "pc-q35-10.0"));
    assert_eq!(records[2], Record::RamStart { section: 1 });
    let Record::Blocks(blocks) = &records[3] else { panic!("no blocks: {:?}", records[3]) };
    let named: Vec<_> = blocks.iter().map(|block| (block.name.as_str(), block.bytes)).collect();
    assert_eq!(
        named,
        [
            ("ram0", 134_217_728),
            ("/rom@etc/acpi/tables", 131_072),
            ("pc.bios", 262_144),
            ("pc.rom", 131_072),
            ("/rom@etc/table-loader", 4096),
            ("/rom@etc/acpi/rsdp", 4096),
        ]
    );
    assert!(blocks.iter().all(|block| block.page_bytes.is_none() && block.guest_address.is_none()));
    assert_eq!(records[4..7], [Record::Flush, Record::EndOfSection, Record::Footer]);

    let count = |wanted: &Record<'_>| records.iter().filter(|record| *record == wanted).count();
    // START, 82 parts, END; the flushes are those of START, of seven rounds in parts, and two in END.
    assert_eq!((count(&Record::RamPart), count(&Record::RamEnd), count(&Record::Footer)), (82, 1, 84));
    assert_eq!((count(&Record::EndOfSection), count(&Record::Flush)), (84, 10));
    assert_eq!(count(&Record::Command(Command::SwitchoverStart)), 1);

    let tail = &records[records.len() - 2..];
    assert_eq!(tail, [Record::Tail(&STREAM[TAIL_AT..]), Record::TailWhole]);
    assert_eq!(STREAM[END_MARK_AT..END_MARK_AT + 2], [0, 6]);
    assert_eq!(STREAM.len(), END_MARK_AT + 6 + DESCRIPTION_BYTES);
}

#[test]
fn the_stream_of_qemu_is_written_again_to_the_byte() {
    let (mut encoder, mut out) = (MainEncoder::new(Dialect::V10_0), Vec::new());
    for record in whole().records {
        encoder.encode(&record, &mut out).unwrap();
    }
    assert_eq!(encoder.finish(), Ok(()));
    assert!(out == STREAM, "{} bytes of {}", out.len(), STREAM.len());
}

#[test]
fn the_stream_of_qemu_is_the_same_in_pieces() {
    let whole = whole();
    for piece in [1, 2, 3, 7, 64, 1000, 65_536] {
        assert_eq!(receive(STREAM, Dialect::V10_0, &[piece]), whole, "pieces of {piece} bytes");
    }
}

#[test]
fn start_shows_where_the_barriers_are() {
    let mut decoder = MainDecoder::new(Dialect::V10_0);
    let mut input = STREAM;
    assert_eq!(decoder.barrier(), None);
    while decoder.pull(&mut input).unwrap() != Some(Record::Footer) {}
    assert_eq!((decoder.at(), decoder.barrier()), (200, Some(Barrier::PerRound)));
    assert_eq!(decoder.blocks().len(), 6);
    assert!(!decoder.return_path_is_open());
}

#[test]
fn no_beginning_of_the_stream_is_a_whole_one() {
    let mut decoder = MainDecoder::new(Dialect::V10_0);
    for (length, byte) in STREAM.chunks(1).enumerate() {
        assert!(decoder.finish().is_err(), "{length} bytes");
        let mut byte = byte;
        while decoder.pull(&mut byte).unwrap().is_some() {}
    }
    assert_eq!(decoder.finish(), Ok(()));
    // One byte more, and it is none either.
    decoder.pull(&mut &[0][..]).unwrap();
    assert!(decoder.finish().is_err());
}

#[test]
fn a_flush_word_is_none_of_qemu_7_2() {
    let received = receive(STREAM, Dialect::V7_2, &[]);
    let error = received.end.unwrap_err();
    assert_eq!(error.at, 179);
    assert!(error.to_string().ends_with("expected words of QEMU 7.2, which has no flush word"), "{error}");
}
