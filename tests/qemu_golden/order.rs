//! Which records may follow which: an encoder refuses what a decoder would.

use pageferry::qemu::wire::{
    Block, ChannelDecoder, ChannelEvent, Command, Dialect, InitPacket, MainDecoder, MainEncoder, Name, NewRamPacket,
    Record, Subsection,
};

use crate::main_stream::STREAM;
use crate::streams::receive;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn block(text: &str, pages: u64) -> Block {
    Block::new(name(text), pages * 4096)
}

/// An encoder after these records.
fn after<'a>(dialect: Dialect, records: impl IntoIterator<Item = Record<'a>>) -> MainEncoder {
    let mut encoder = MainEncoder::new(dialect);
    for record in records {
        encoder.encode(&record, &mut Vec::new()).unwrap();
    }
    encoder
}

/// Refuses `record`, writes nothing, and then takes what it would have taken before.
fn refuses(mut encoder: MainEncoder, record: Record<'_>, words: &str, instead: Record<'_>) {
    let (at, mut out) = (encoder.at(), Vec::new());
    let error = encoder.encode(&record, &mut out).unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!((error.at, encoder.at(), out.len()), (at, at, 0));
    assert_eq!(encoder.encode(&instead, &mut out), Ok(()), "after the refusal of {record:?}");
}

fn begun() -> Vec<Record<'static>> {
    vec![Record::Header, Record::Machine(name("pc"))]
}

fn started(flush: bool) -> Vec<Record<'static>> {
    let blocks = Record::Blocks(vec![block("a", 2), block("b", 1)]);
    let mut records = [begun(), vec![Record::RamStart { section: 2 }, blocks]].concat();
    records.extend(flush.then_some(Record::Flush));
    records.extend([Record::EndOfSection, Record::Footer]);
    records
}

#[test]
fn records_out_of_their_place_are_refused() {
    let v10 = |records: Vec<Record<'static>>| after(Dialect::V10_0, records);
    let command = |command| Record::Command(command);
    let part = |flush| [started(flush), vec![Record::RamPart]].concat();

    refuses(v10(vec![]), Record::RamPart, "found a PART section of RAM, expected the header", Record::Header);
    refuses(v10(begun()), Record::RamEnd, "expected a subsection", Record::Subsection(Subsection::TargetPageBits));
    let start = started(false)[..4].to_vec();
    refuses(v10(start), Record::ZeroPage { block: 0, offset: 0 }, "expected a flush word or the end", Record::Flush);
    let twice = started(true)[..5].to_vec();
    refuses(v10(twice), Record::Flush, "START has one flush word", Record::EndOfSection);
    refuses(v10(part(false)), Record::Flush, "START had no flush word", Record::EndOfSection);
    refuses(v10(part(true)), Record::Footer, "expected a page", Record::Flush);
    refuses(v10(started(true)), Record::Tail(&[4]), "expected a command or the next section", Record::RamEnd);
    let switch = command(Command::SwitchoverStart);
    refuses(v10(begun()), switch.clone(), "found SWITCHOVER_START", command(Command::OpenReturnPath));
    refuses(after(Dialect::V7_2, started(false)), switch, "QEMU 7.2, which has none", Record::RamPart);
    let opened = [begun(), vec![command(Command::OpenReturnPath)]].concat();
    refuses(v10(opened), command(Command::OpenReturnPath), "expected it once", command(Command::Ping { value: 1 }));
    let page = [part(true), vec![Record::Page { block: 0, offset: 0 }]].concat();
    refuses(v10(page.clone()), Record::EndOfSection, "expected bytes of a page", Record::PageData(&[0; 4096]));
    refuses(v10(page), Record::PageData(&[0; 4097]), "expected at most 4096", Record::PageData(&[0; 4096]));
    let ended = [started(true), vec![Record::RamEnd, Record::EndOfSection, Record::Footer]].concat();
    refuses(v10(ended.clone()), Record::RamPart, "expected a command or the sections", Record::Tail(&[4]));
    refuses(v10(ended), Record::Tail(&[6]), "expected 0x04, a section, or 0x00", Record::Tail(&[0]));
}

#[test]
fn pages_outside_their_block_are_refused() {
    for (block, offset, words) in [
        (0, 0x2000, "the offset of a page is 0x2000"),
        (1, 0x1000, "the offset of a page is 0x1000"),
        (0, 1, "the offset of a page is 0x1"),
        (0, u64::MAX - 4095, "the offset of a page is 0xfffffffffffff000"),
        (2, 0, "the index of a RAM block is 2, expected at most 1"),
    ] {
        let encoder = after(Dialect::V7_2, [started(false), vec![Record::RamPart]].concat());
        refuses(encoder, Record::ZeroPage { block, offset }, words, Record::ZeroPage { block: 0, offset: 0x1000 });
    }
}

#[test]
fn lists_of_blocks_that_name_no_ram_are_refused() {
    let huge = Block { page_bytes: Some(2 << 20), ..block("a", 512) };
    let placed = Block { guest_address: Some(0), ..block("a", 1) };
    for (blocks, words) in [
        (vec![], "the number of RAM blocks is 0"),
        (vec![block("a", 1), block("b", 1), block("a", 1)], "the RAM block a comes twice"),
        (vec![block("a", 0)], "the length of a RAM block is 0"),
        (vec![Block { bytes: 4097, ..block("a", 1) }], "the length of a RAM block is 4097"),
        (vec![block("a", 1 << 51), block("b", 1 << 51)], "the sum of all RAM blocks"),
        (vec![huge], "expected one that POSTCOPY_ADVISE has named"),
        (vec![placed], "expected an address with x-ignore-shared, and none without"),
        (
            (0..1025).map(|i| block(&i.to_string(), 1)).collect(),
            "the number of RAM blocks is 1025, expected at most 1024",
        ),
    ] {
        let encoder = after(Dialect::V10_0, [begun(), vec![Record::RamStart { section: 1 }]].concat());
        refuses(encoder, Record::Blocks(blocks), words, Record::Blocks(vec![block("a", 1)]));
    }
}

#[test]
fn capabilities_that_change_the_stream_in_unknown_ways_are_refused() {
    for (capability, words) in [
        ("mapped-ram", "the capability mapped-ram cannot be followed"),
        ("x-colo", "a capability is called \"x-colo\", expected x-ignore-shared"),
    ] {
        let capabilities = Record::Subsection(Subsection::Capabilities(vec![name(capability)]));
        let instead = Record::Subsection(Subsection::Capabilities(vec![name("x-ignore-shared")]));
        refuses(after(Dialect::V10_0, begun()), capabilities, words, instead);
    }
}

#[test]
fn a_description_inside_the_state_of_a_device_does_not_end_the_stream() {
    let forged = [&b"\x04\0\0\0\x09\0\x06\0\0\0\x1f"[..], br#"{"page_size":4096,"devices":[]}"#, b"more"].concat();
    let tail_at = 1771;
    let stream = [&STREAM[..tail_at], &forged, &STREAM[tail_at..]].concat();
    let received = receive(&stream, Dialect::V10_0, &[]);
    let forged_end = tail_at + forged.len() - 4;
    let ends = [
        Record::Tail(&stream[tail_at..forged_end]),
        Record::TailWhole,
        Record::Tail(&stream[forged_end..]),
        Record::TailWhole,
    ];
    assert_eq!(received.records[received.records.len() - 4..], ends);
    assert_eq!(received.end, Ok(()));
    let cut = receive(&stream[..stream.len() - 1], Dialect::V10_0, &[]);
    assert!(cut.end.unwrap_err().to_string().ends_with("expected the sections of the devices up to their description"));
}

#[test]
fn a_caller_may_take_pages_past_the_decoders() {
    let records = [started(false), vec![Record::RamEnd, Record::Page { block: 0, offset: 4096 }]].concat();
    let (mut encoder, mut bytes) = (MainEncoder::new(Dialect::V7_2), Vec::new());
    records.iter().for_each(|record| encoder.encode(record, &mut bytes).unwrap());
    let (mut decoder, mut input, mut last) = (MainDecoder::new(Dialect::V7_2), &bytes[..], None);
    while let Some(record) = decoder.pull(&mut input).unwrap() {
        last = Some(record);
    }
    assert_eq!((last, decoder.data_left()), (Some(Record::Page { block: 0, offset: 4096 }), 4096));
    decoder.data_taken(4000);
    assert_eq!(
        decoder.finish().unwrap_err().to_string().split_once(": ").unwrap().1,
        "the stream ends within the bytes of a page, expected 96 bytes more"
    );
    decoder.data_taken(5000);
    assert_eq!((decoder.data_left(), decoder.at()), (0, bytes.len() as u64 + 4096));
    assert_eq!(decoder.pull(&mut &0x10_u64.to_be_bytes()[..]), Ok(Some(Record::EndOfSection)));

    let block = name("a");
    let packet = NewRamPacket { normal: &[0, 4096], ..NewRamPacket::pages(0, &block) }.encode(Dialect::V7_2).unwrap();
    let bytes = [&InitPacket { uuid: [1; 16], channel: 0 }.encode()[..], &packet].concat();
    let (mut decoder, mut input) = (ChannelDecoder::new(Dialect::V7_2), &bytes[..]);
    while decoder.pull(&mut input).unwrap().is_some() {}
    assert_eq!(decoder.data_left(), 8192);
    decoder.data_taken(8191);
    assert_eq!(decoder.pull(&mut &[9, 0x11][..]), Ok(Some(ChannelEvent::Data(&[9]))));
    assert_eq!((decoder.finish(), decoder.at()), (Ok(()), 64 + 1344 + 8192));
}

#[test]
fn a_capability_that_comes_twice_is_refused() {
    let named = |names: &[&str]| Record::Subsection(Subsection::Capabilities(names.iter().map(|n| name(n)).collect()));
    let twice = named(&["x-ignore-shared", "x-ignore-shared"]);
    refuses(after(Dialect::V10_0, begun()), twice, "x-ignore-shared comes twice", named(&["x-ignore-shared"]));
}

#[test]
fn blocks_have_only_huge_page_sizes_that_were_advised() {
    let advise = Record::Command(Command::PostcopyAdvise { page_sizes: Some((2 << 20) | 4096) });
    let begun = [begun(), vec![advise, Record::RamStart { section: 1 }]].concat();
    let of = |page_bytes| Record::Blocks(vec![Block { page_bytes: Some(page_bytes), ..block("a", 1024) }]);
    for wrong in [4096, 1 << 20, 3 << 20] {
        refuses(after(Dialect::V10_0, begun.clone()), of(wrong), "POSTCOPY_ADVISE has named", of(2 << 20));
    }
}

#[test]
fn a_list_of_blocks_without_end_is_refused_before_it_is_held() {
    let mut out = Vec::new();
    let mut encoder = MainEncoder::new(Dialect::V10_0);
    let records = [begun(), vec![Record::RamStart { section: 1 }]].concat();
    records.iter().for_each(|record| encoder.encode(record, &mut out).unwrap());
    out.extend(((1_u64 << 40) | 4).to_be_bytes());
    for index in 0..1025 {
        let text = format!("{index:04}");
        out.push(4);
        out.extend(text.as_bytes());
        out.extend(4096_u64.to_be_bytes());
    }
    let mut decoder = MainDecoder::new(Dialect::V10_0);
    let mut input = &out[..];
    let error = loop {
        match decoder.pull(&mut input) {
            Ok(record) => assert!(record.is_some(), "the 1025th block is refused, whatever follows"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.ends_with("the number of RAM blocks is 1025, expected at most 1024"), "{error}");
}

#[test]
fn names_of_255_bytes_come_back_wherever_there_are_names() {
    let long = "n".repeat(255);
    let block = block(&long, 2);
    let records = vec![
        Record::Header,
        Record::Machine(name(&long)),
        Record::RamStart { section: 1 },
        Record::Blocks(vec![block]),
        Record::EndOfSection,
        Record::Footer,
        Record::Command(Command::RecvBitmap(name(&long))),
        Record::RamEnd,
        Record::ZeroPage { block: 0, offset: 4096 },
        Record::EndOfSection,
        Record::Footer,
    ];
    let mut out = Vec::new();
    let mut encoder = MainEncoder::new(Dialect::V7_2);
    records.iter().for_each(|record| encoder.encode(record, &mut out).unwrap());
    let (mut decoder, mut input, mut came) = (MainDecoder::new(Dialect::V7_2), &out[..], Vec::new());
    while let Some(record) = decoder.pull(&mut input).unwrap() {
        came.push(record);
    }
    assert_eq!(came, records);
    // A zero page is filled with zeros, and with nothing else.
    let at = out.len() - 5 - 8 - 1;
    for fill in [1, 2, 255] {
        let mut bytes = out.clone();
        assert_eq!(std::mem::replace(&mut bytes[at], fill), 0);
        let (mut decoder, mut input) = (MainDecoder::new(Dialect::V7_2), &bytes[..]);
        assert!((0..records.len()).any(|_| decoder.pull(&mut input).is_err()), "filled with {fill}");
    }
}
