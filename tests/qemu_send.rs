//! A source that speaks QEMU's wire, to a destination that is made of the decoders: what it counts, and what it keeps.
#![cfg(all(not(loom), feature = "qemu"))]

#[path = "support/qemu_tail.rs"]
mod qemu_tail;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use pageferry::dirty::combined::Still;
use pageferry::memory::{Backing, Ram, RamBlock};
use pageferry::qemu::Qemu;
use pageferry::qemu::compress::Inflate;
use pageferry::qemu::wire::{
    Barrier, ChannelDecoder, ChannelEvent, Command, Compression, Dialect, MainDecoder, Record, ReturnMessage,
};
use pageferry::source::SourceBuilder;
use pageferry::units::{BlockId, PageSize};
use pageferry::{
    DirtyBitmap, DirtySource, Failure, Guest, HookError, Outcome, Source, SourceReport, StateWriter, Verify,
};

const PAGE: usize = 4096;

/// A configuration as QEMU writes it: a machine type and a uuid.
fn configuration() -> Vec<u8> {
    let mut bytes = b"\x07\0\0\0\x0bpc-q35-10.0\x05\x12configuration/uuid\0\0\0\x01".to_vec();
    bytes.extend(UUID);
    bytes
}

const UUID: [u8; 16] = *b"0123456789abcdef";

/// The state of no devices.
fn tail() -> Vec<u8> {
    qemu_tail::tail(&[], qemu_tail::DEVICES)
}

/// What the destination answers at the end.
#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Shut(u32),
    Nothing,
    /// It closes everything when it has seen so many parts of RAM.
    LeavesAfter(usize),
}

/// What a destination has seen.
#[derive(Default)]
struct Seen {
    machine: String,
    blocks: Vec<(String, u64)>,
    barriers: usize,
    syncs: Vec<usize>,
    numbers: Vec<u64>,
    uuids: Vec<[u8; 16]>,
    tail: Vec<u8>,
    /// Pages by block and offset; those named as zeros are empty. The last that came counts.
    pages: BTreeMap<(String, u64), Vec<u8>>,
    /// What the main connection has said of pages, between two barriers.
    on_main: Vec<Round>,
    bytes: u64,
}

impl Seen {
    /// A page came on the main connection.
    fn hears(&mut self, block: String, offset: u64, page: Vec<u8>) {
        self.on_main.resize_with(self.on_main.len().max(self.barriers + 1), Vec::new);
        self.on_main[self.barriers].push((block, offset, page));
    }
}

/// What one channel has sent between two SYNCs.
type Round = Vec<(String, u64, Vec<u8>)>;

struct OneChannel {
    rounds: Vec<Round>,
    numbers: Vec<u64>,
    uuid: [u8; 16],
    bytes: u64,
}

fn hear_channel(mut stream: TcpStream, dialect: Dialect) -> OneChannel {
    let mut decoder = ChannelDecoder::new(dialect);
    let mut heard = OneChannel { rounds: vec![Vec::new()], numbers: Vec::new(), uuid: [0; 16], bytes: 0 };
    let (mut wanted, mut data): (Vec<(String, u64)>, Vec<u8>) = (Vec::new(), Vec::new());
    let (mut inflate, mut packed_bytes) = (None, 0);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        heard.bytes += n as u64;
        let mut input = &buffer[..n];
        while let Some(event) = decoder.pull(&mut input).expect("a sound channel") {
            match event {
                ChannelEvent::Init(init) => heard.uuid = init.uuid,
                ChannelEvent::DeviceState(packet) => panic!("nobody has such a device: {packet:?}"),
                ChannelEvent::Ram(packet) => {
                    heard.numbers.push(packet.number);
                    let block = packet.block.unwrap_or_default().to_owned();
                    let Some(round) = heard.rounds.last_mut() else { unreachable!() };
                    round.extend(packet.zero.iter().map(|offset| (block.clone(), offset, Vec::new())));
                    wanted = packet.normal.iter().map(|offset| (block.clone(), offset)).collect();
                    data.clear();
                    packed_bytes = packet.data_bytes as usize;
                    if packet.compression != Compression::None {
                        inflate.get_or_insert_with(|| Inflate::new(packet.compression).expect("a decompressor"));
                    }
                    if packet.sync {
                        heard.rounds.push(Vec::new());
                    }
                }
                ChannelEvent::Data(bytes) => {
                    data.extend_from_slice(bytes);
                    if data.len() == packed_bytes {
                        if let Some(inflate) = &mut inflate {
                            let mut pages = vec![0; wanted.len() * PAGE];
                            inflate.packet(&data, &mut pages).expect("sound data");
                            data = pages;
                        }
                        let Some(round) = heard.rounds.last_mut() else { unreachable!() };
                        let pages = wanted.drain(..).zip(data.chunks(PAGE));
                        round.extend(pages.map(|((block, offset), page)| (block, offset, page.to_vec())));
                    }
                }
            }
        }
    }
    heard
}

fn hear_main(mut stream: TcpStream, dialect: Dialect, answer: Answer, seen: &mut Seen) {
    let mut decoder = MainDecoder::new(dialect);
    let mut buffer = vec![0; 1 << 16];
    let mut page: Option<((String, u64), Vec<u8>)> = None;
    let (mut parts, mut whole, mut opened) = (0, false, false);
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        seen.bytes += n as u64;
        let mut input = &buffer[..n];
        while let Some(record) = decoder.pull(&mut input).expect("a sound main stream") {
            let mut answers = Vec::new();
            match record {
                Record::Machine(name) => seen.machine = name.as_str().to_owned(),
                Record::Blocks(blocks) => {
                    seen.blocks = blocks.iter().map(|b| (b.name.as_str().to_owned(), b.bytes)).collect();
                }
                Record::Command(Command::OpenReturnPath) => opened = true,
                Record::Command(Command::Ping { value }) => ReturnMessage::Pong { value }.encode(&mut answers),
                Record::Flush => seen.barriers += 1,
                Record::EndOfSection => seen.barriers += usize::from(decoder.barrier() == Some(Barrier::PerSection)),
                Record::RamPart => {
                    parts += 1;
                    if answer == Answer::LeavesAfter(parts) {
                        return;
                    }
                }
                Record::ZeroPage { block, offset } => {
                    seen.hears(seen.blocks[block].0.clone(), offset, Vec::new());
                }
                Record::Page { block, offset } => page = Some(((seen.blocks[block].0.clone(), offset), Vec::new())),
                Record::PageData(bytes) => {
                    let Some((_, data)) = &mut page else { panic!("data of no page") };
                    data.extend_from_slice(bytes);
                    if data.len() == PAGE {
                        let Some(((block, offset), data)) = page.take() else { unreachable!() };
                        seen.hears(block, offset, data);
                    }
                }
                Record::Tail(bytes) => seen.tail.extend_from_slice(bytes),
                Record::TailWhole => whole = true,
                _ => {}
            }
            if let (true, Answer::Shut(error), true) = (whole, answer, opened) {
                ReturnMessage::Shut { error }.encode(&mut answers);
                (whole, opened) = (false, false);
            }
            stream.write_all(&answers).expect("the source hears");
        }
    }
}

/// Takes one migration with so many channels, and compares the SYNCs.
fn receive(listener: &TcpListener, channels: usize, dialect: Dialect, answer: Answer) -> Seen {
    let mut seen = Seen::default();
    let mut main = None;
    let mut lanes: BTreeMap<u8, _> = BTreeMap::new();
    for _ in 0..=channels {
        let (stream, _) = listener.accept().expect("a connection");
        let mut first = [0; 25];
        // Nobody is to connect and say nothing.
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        while stream.peek(&mut first).expect("first bytes in time") < 4 {}
        if first.starts_with(b"QEVM") {
            main = Some(stream);
            continue;
        }
        while stream.peek(&mut first).expect("an init packet in time") < first.len() {}
        let lane = thread::spawn(move || hear_channel(stream, dialect));
        assert!(lanes.insert(first[24], lane).is_none(), "channel {} came twice", first[24]);
    }
    hear_main(main.expect("a main connection"), dialect, answer, &mut seen);
    assert!(lanes.keys().copied().eq(0..channels as u8), "{:?}", lanes.keys());
    let lanes: Vec<OneChannel> = lanes.into_values().map(|lane| lane.join().unwrap()).collect();
    let rounds = lanes.iter().map(|lane| lane.rounds.len()).max().unwrap_or_default().max(seen.on_main.len());
    let on_main = std::mem::take(&mut seen.on_main);
    for round in 0..rounds {
        let mut named = BTreeSet::new();
        let on_channels = lanes.iter().filter_map(|lane| lane.rounds.get(round));
        for (block, offset, page) in on_channels.chain(on_main.get(round)).flatten() {
            seen.pages.insert((block.clone(), *offset), page.clone());
            assert!(named.insert((block, *offset)), "page {offset} of {block} came twice in round {round}");
        }
    }
    for lane in lanes {
        seen.syncs.push(lane.rounds.len() - 1);
        seen.numbers.extend(lane.numbers);
        seen.uuids.push(lane.uuid);
        seen.bytes += lane.bytes;
    }
    seen
}

/// RAM with pages of data, and of zeros; and a small block, of which a destination may have a copy of its own.
fn ram() -> Ram {
    let ram = RamBlock::anonymous("pc.ram", 0, 16 << 20, PageSize::SIZE_4K, Backing::Base).unwrap();
    let rom = RamBlock::anonymous("pc.rom", 1 << 32, 64 << 10, PageSize::SIZE_4K, Backing::Base).unwrap();
    let ram = Ram::new([ram, rom]).unwrap();
    (0..4096).filter(|page| page % 5 != 0).for_each(|page| fill(&ram, BlockId(0), page, page as u8 | 1));
    fill(&ram, BlockId(1), 3, 7);
    // Touched, and zero.
    fill(&ram, BlockId(0), 10, 0);
    ram
}

fn fill(ram: &Ram, block: BlockId, page: u64, byte: u8) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    #[expect(unsafe_code)]
    // SAFETY: the page is in its block, and only this thread and the workers, by system calls, use it.
    unsafe {
        range.ptr.write_bytes(byte, range.len);
    }
}

fn bytes_of(ram: &Ram, block: BlockId, page: u64) -> Vec<u8> {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    #[expect(unsafe_code)]
    // SAFETY: as above, and nobody writes now.
    unsafe { std::slice::from_raw_parts(range.ptr, range.len) }.to_vec()
}

/// A machine that writes before it stands still, so that there are several rounds.
struct Machine {
    ram: Ram,
    dirty: Option<DirtyBitmap>,
    paused: bool,
    resumed: bool,
}

impl Guest for Machine {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(configuration())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.paused = true;
        if let Some(dirty) = &self.dirty {
            // Some that were data become zeros, and the other way round.
            for page in 0..600 {
                fill(&self.ram, BlockId(0), page, if page % 3 == 0 { 0 } else { 9 });
                dirty.mark(BlockId(0), page);
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.resumed = true;
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        Ok(out.write_all(&tail())?)
    }
}

struct Run {
    ram: Ram,
    report: SourceReport,
    seen: Seen,
    paused: bool,
    resumed: bool,
    counted: u64,
}

fn run(qemu: Qemu, channels: u8, dialect: Dialect, answer: Answer, writes: bool) -> Run {
    run_with(qemu, channels, dialect, answer, writes, |builder| builder)
}

fn run_with(
    qemu: Qemu,
    channels: u8,
    dialect: Dialect,
    answer: Answer,
    writes: bool,
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
) -> Run {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let destination = thread::spawn(move || receive(&listener, channels.into(), dialect, answer));
    let ram = ram();
    let bitmap = DirtyBitmap::for_ram(&ram);
    let mut machine =
        Machine { ram: ram.clone(), dirty: writes.then(|| bitmap.clone()), paused: false, resumed: false };
    let counts = qemu.seen();
    let builder = set(Source::builder(ram.clone()).verify(Verify::Off).framing(qemu));
    let (mut live, mut still) = (bitmap, Still::new());
    let dirty: &mut dyn DirtySource = if writes { &mut live } else { &mut still };
    let report = builder.connect(&address).unwrap().migrate(dirty, &mut machine);
    let seen = destination.join().unwrap();
    let counted = counts.counts().main_bytes + counts.counts().channel_bytes;
    Run { ram, report, seen, paused: machine.paused, resumed: machine.resumed, counted }
}

impl Run {
    /// It completed, and the destination has everything.
    fn is_whole(&self, channels: u8) {
        assert_eq!(self.report.outcome, Outcome::Completed, "{:?}", self.report);
        assert_eq!(self.report.channels, channels);
        assert_eq!(self.seen.machine, "pc-q35-10.0");
        assert_eq!(self.seen.blocks, [("pc.ram".to_owned(), 16 << 20), ("pc.rom".to_owned(), 64 << 10)]);
        assert_eq!(self.seen.tail, tail());
        assert_eq!(self.seen.uuids, vec![UUID; channels.into()]);
        assert_eq!(self.seen.syncs, vec![self.seen.barriers; channels.into()], "one SYNC a channel for each barrier");
        assert_eq!(self.seen.bytes, self.counted, "every byte was counted");
        for (id, block) in self.ram.iter() {
            for page in 0..block.pages() {
                let here = bytes_of(&self.ram, id, page);
                let there = self.seen.pages.get(&(block.name().to_owned(), page * PAGE as u64));
                let zero = here.iter().all(|byte| *byte == 0);
                match there {
                    // QEMU takes such a stream; whoever stores it does not know whether anything is missing.
                    None => panic!("nobody has spoken of page {page} of {}", block.name()),
                    Some(data) if data.is_empty() => assert!(zero, "page {page} of {} is no zeros", block.name()),
                    Some(data) => assert!(*data == here, "page {page} of {} differs", block.name()),
                }
                if block.name() == "pc.rom" {
                    assert!(there.is_some_and(|data| !data.is_empty()), "page {page} of {} as data", block.name());
                }
            }
        }
    }
}

#[test]
fn a_machine_that_stands_still_arrives_whole() {
    for channels in [1, 2, 8] {
        let run = run(Qemu::new(channels), channels, Dialect::V10_0, Answer::Shut(0), false);
        run.is_whole(channels);
        let mut numbers = run.seen.numbers.clone();
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..numbers.len() as u64), "packets are numbered without gaps");
    }
}

#[test]
fn a_machine_that_writes_arrives_as_it_stood_still() {
    let run = run(Qemu::new(3), 3, Dialect::V10_0, Answer::Shut(0), true);
    run.is_whole(3);
    assert!(run.seen.barriers > 2, "{} barriers", run.seen.barriers);
}

#[test]
fn a_barrier_after_each_section_has_no_words() {
    let qemu = Qemu::new(2).dialect(Dialect::V10_0, Barrier::PerSection);
    run(qemu, 2, Dialect::V10_0, Answer::Shut(0), true).is_whole(2);
}

#[test]
fn qemu_7_2_is_told_of_all_pages_of_zeros_on_the_main_connection() {
    let qemu = Qemu::new(2).dialect(Dialect::V7_2, Barrier::PerSection).section(2);
    let run = run(qemu, 2, Dialect::V7_2, Answer::Shut(0), true);
    run.is_whole(2);
    let zeros = run.seen.pages.values().filter(|page| page.is_empty()).count();
    assert!(zeros > 800, "{zeros} pages of zeros were named");
    assert_eq!(run.report.untouched_bytes, 0, "no page was left out");
}

#[test]
fn without_channels_everything_is_on_the_main_connection() {
    for (dialect, section) in [(Dialect::V10_0, 1), (Dialect::V7_2, 2)] {
        let qemu = Qemu::new(0).dialect(dialect, Barrier::PerSection).section(section);
        let run = run(qemu, 0, dialect, Answer::Shut(0), true);
        run.is_whole(0);
    }
}

#[test]
fn without_a_return_path_it_is_complete_when_all_of_it_is_out() {
    let run = run(Qemu::new(2).return_path(false), 2, Dialect::V10_0, Answer::Nothing, false);
    run.is_whole(2);
}

#[test]
fn a_destination_that_says_that_it_failed_leaves_the_machine_with_the_source() {
    let run = run(Qemu::new(2), 2, Dialect::V10_0, Answer::Shut(5), false);
    assert!(matches!(run.report.outcome, Outcome::Failed(Failure::RunFailed(_))), "{:?}", run.report.outcome);
    assert!(run.resumed);
}

#[test]
fn a_destination_that_leaves_without_a_word_leaves_it_open_who_has_the_machine() {
    let run = run(Qemu::new(2), 2, Dialect::V10_0, Answer::LeavesAfter(1), true);
    // Where it was noticed decides: before the state was sent it is the source's.
    assert!(matches!(run.report.outcome, Outcome::Failed(_) | Outcome::Uncertain(_)), "{:?}", run.report.outcome);
    assert_eq!(run.resumed, run.paused && matches!(run.report.outcome, Outcome::Failed(_)));
}

#[test]
fn digests_are_refused_where_nobody_compares_them() {
    let source = Source::builder(ram()).framing(Qemu::new(2)).connect("127.0.0.1:1");
    assert!(matches!(source, Err(Failure::Config(_))), "{source:?}");
}

#[cfg(feature = "qemu-compression")]
#[test]
fn compressed_pages_arrive() {
    for method in [Compression::Zlib, Compression::Zstd] {
        let run = run(Qemu::new(2).compression(method), 2, Dialect::V10_0, Answer::Shut(0), true);
        run.is_whole(2);
        assert!(run.seen.bytes < 8 << 20, "{} bytes of 16 MiB of pages that each repeat a byte", run.seen.bytes);
    }
}
