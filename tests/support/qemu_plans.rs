//! Whole streams of QEMU, made from any bytes: a property test and a fuzz target ask for the same.

#![allow(dead_code)] // Each of them uses a part.

use pageferry::qemu::wire::{
    Block, Command, Compression, DevicePacket, Dialect, InitPacket, MainEncoder, Name, NewRamPacket, Record,
    ReturnMessage, StreamError, Subsection,
};

use super::script::Script;

/// A record that owns its bytes.
#[derive(Clone, Debug)]
pub enum Step {
    Plain(Record<'static>),
    PageData(Vec<u8>),
    Packaged(Vec<u8>),
    Tail(Vec<u8>),
}

impl Step {
    pub fn record(&self) -> Record<'_> {
        match self {
            Step::Plain(record) => record.clone(),
            Step::PageData(bytes) => Record::PageData(bytes),
            Step::Packaged(bytes) => Record::Packaged(bytes),
            Step::Tail(bytes) => Record::Tail(bytes),
        }
    }
}

pub fn dialect(s: &mut Script<'_>) -> Dialect {
    if s.flag() { Dialect::V7_2 } else { Dialect::V10_0 }
}

fn name(s: &mut Script<'_>, index: usize) -> Name {
    let text: String = String::from_utf8_lossy(s.bytes()).chars().filter(|c| !c.is_control()).take(60).collect();
    Name::new(&format!("{text}{index}")).expect("a name of at most 242 bytes")
}

fn command(s: &mut Script<'_>, between: bool, dialect: Dialect) -> Vec<Step> {
    let plain = |command| vec![Step::Plain(Record::Command(command))];
    match s.below(9) {
        0 => plain(Command::Ping { value: s.u32() }),
        1 => plain(Command::PostcopyListen),
        2 => plain(Command::PostcopyRun),
        3 => plain(Command::PostcopyRamDiscard(s.bytes().to_vec())),
        4 => plain(Command::EnableColo),
        5 => plain(Command::PostcopyResume),
        6 => plain(Command::RecvBitmap(name(s, 0))),
        7 if between && dialect == Dialect::V10_0 => plain(Command::SwitchoverStart),
        _ => {
            let mut bytes = s.bytes().to_vec();
            bytes.push(7);
            let command = Command::Packaged { bytes: bytes.len() as u32 };
            vec![Step::Plain(Record::Command(command)), Step::Packaged(bytes)]
        }
    }
}

/// A sound main stream, from the header to the description of the devices.
pub fn plan(s: &mut Script<'_>, dialect: Dialect) -> Vec<Step> {
    let mut steps = vec![Step::Plain(Record::Header), Step::Plain(Record::Machine(name(s, 0)))];
    let mut push = |record| steps.push(Step::Plain(record));
    let (extras, shared) = (s.byte(), s.byte() % 4 == 1);
    if extras & 1 != 0 {
        push(Record::Subsection(Subsection::TargetPageBits));
    }
    if shared {
        let name = Name::new("x-ignore-shared").expect("a name");
        push(Record::Subsection(Subsection::Capabilities(vec![name])));
    }
    if extras & 2 != 0 {
        push(Record::Subsection(Subsection::Uuid(s.array())));
    }
    if extras & 4 != 0 {
        push(Record::Command(Command::OpenReturnPath));
    }
    let huge = if extras & 8 != 0 && !shared { 1_u64 << (13 + s.below(30)) } else { 0 };
    if huge != 0 {
        push(Record::Command(Command::PostcopyAdvise { page_sizes: Some(huge | 4096) }));
    }
    for _ in 0..s.below(3) {
        steps.extend(command(s, false, dialect));
    }
    let mut blocks = Vec::new();
    for index in 0..=s.below(3) {
        let pages = 1 + s.number() % (1 << 40);
        let mut block = Block::new(name(s, index), pages * 4096);
        block.guest_address = shared.then(|| s.number());
        block.page_bytes = (huge != 0 && s.flag()).then_some(huge);
        blocks.push(block);
    }
    let flushes = extras & 16 != 0 && dialect == Dialect::V10_0;
    steps.push(Step::Plain(Record::RamStart { section: s.u32() }));
    steps.push(Step::Plain(Record::Blocks(blocks.clone())));
    if flushes {
        steps.push(Step::Plain(Record::Flush));
    }
    steps.extend([Record::EndOfSection, Record::Footer].map(Step::Plain));
    let parts = s.below(4);
    for part in 0..=parts {
        if s.flag() {
            steps.extend(command(s, true, dialect));
        }
        steps.push(Step::Plain(if part == parts { Record::RamEnd } else { Record::RamPart }));
        for _ in 0..s.below(6) {
            let block = s.below(blocks.len());
            let offset = s.number() % (blocks[block].bytes / 4096) * 4096;
            match s.below(3) {
                0 if flushes => steps.push(Step::Plain(Record::Flush)),
                1 => {
                    steps.push(Step::Plain(Record::Page { block, offset }));
                    steps.push(Step::PageData(vec![s.byte(); 4096]));
                }
                _ => steps.push(Step::Plain(Record::ZeroPage { block, offset })),
            }
        }
        steps.extend([Record::EndOfSection, Record::Footer].map(Step::Plain));
    }
    steps.push(Step::Tail(tail(s)));
    steps.push(Step::Plain(Record::TailWhole));
    steps
}

fn tail(s: &mut Script<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..s.below(4) {
        bytes.push(4);
        bytes.extend(s.bytes());
    }
    let json = match s.below(2) {
        0 => format!(r#"{{"configuration": {{"n": -{}.5}}, "page_size": 4096, "devices": [true]}}"#, s.u32()),
        _ => format!(r#"{{"page_size": {}, "devices": [{{"name": "a\\b\"}}"}}]}}"#, s.u32()),
    };
    bytes.extend([0, 6]);
    bytes.extend((json.len() as u32).to_be_bytes());
    bytes.extend(json.as_bytes());
    bytes
}

/// The bytes of these records.
pub fn encode<'a>(records: impl IntoIterator<Item = Record<'a>>, dialect: Dialect) -> Result<Vec<u8>, StreamError> {
    let (mut encoder, mut out) = (MainEncoder::new(dialect), Vec::new());
    records.into_iter().try_for_each(|record| encoder.encode(&record, &mut out))?;
    assert_eq!(encoder.at(), out.len() as u64);
    Ok(out)
}

/// A RAM packet in fields that own what they hold.
#[derive(Clone, Debug)]
pub struct Packet {
    pub sync: bool,
    pub compression: Compression,
    pub number: u64,
    pub block: Name,
    pub normal: Vec<u64>,
    pub zero: Vec<u64>,
    pub compressed_bytes: u32,
}

impl Packet {
    /// Any sound packet.
    pub fn any(s: &mut Script<'_>, dialect: Dialect) -> Packet {
        let first = s.number() % (1 << 50);
        let stride = 1 + s.number() % (1 << 44) * 8;
        let sync = s.byte() % 4 == 1;
        let most = if sync && dialect == Dialect::V10_0 { 1 } else { 129 };
        let normal = s.below(most);
        let zero = if dialect == Dialect::V7_2 { 0 } else { s.below(most.saturating_sub(normal).max(1)) };
        // Distinct: the stride is odd.
        let mut pages = (0..).map(|index: u64| first.wrapping_add(index.wrapping_mul(stride)) % (1 << 52) * 4096);
        let mut packet = Packet {
            sync,
            compression: [Compression::None, Compression::Zlib, Compression::Zstd][s.below(3)],
            number: s.number(),
            block: name(s, 0),
            normal: pages.by_ref().take(normal).collect(),
            zero: pages.take(zero).collect(),
            compressed_bytes: 1 + s.u32() % (1 << 14),
        };
        // QEMU 10.0 has nothing to say in a packet without pages but SYNC.
        packet.sync |= packet.normal.is_empty() && packet.zero.is_empty();
        packet
    }

    pub fn new_packet(&self) -> NewRamPacket<'_> {
        let pages = !(self.normal.is_empty() && self.zero.is_empty());
        NewRamPacket {
            sync: self.sync,
            compression: self.compression,
            number: self.number,
            block: pages.then_some(&self.block),
            normal: &self.normal,
            zero: &self.zero,
            compressed_bytes: self.compressed_bytes,
        }
    }

    /// Bytes of its data.
    pub fn data_bytes(&self) -> u32 {
        match (self.compression, self.normal.len() as u32) {
            (Compression::None, pages) => pages * 4096,
            (_, 0) => 0,
            _ => self.compressed_bytes,
        }
    }
}

/// The bytes of a sound channel, and how many bytes of data follow each of its headers.
pub fn channel(s: &mut Script<'_>, dialect: Dialect) -> (Vec<u8>, Vec<u64>) {
    let init = InitPacket { uuid: s.array(), channel: s.byte() % 255 };
    let (mut stream, mut data_bytes) = (init.encode().to_vec(), vec![0]);
    for _ in 0..s.below(4) {
        let bytes = if dialect == Dialect::V10_0 && s.byte() % 4 == 1 {
            let (device, data_bytes) = (name(s, 0), 1 + s.u32() % (1 << 14));
            let packet = DevicePacket { device, instance: s.u32(), data_bytes };
            stream.extend(packet.encode().expect("a sound packet"));
            data_bytes
        } else {
            let packet = Packet::any(s, dialect);
            stream.extend(packet.new_packet().encode(dialect).expect("a sound packet"));
            packet.data_bytes()
        };
        stream.resize(stream.len() + bytes as usize, s.byte());
        data_bytes.push(bytes.into());
    }
    (stream, data_bytes)
}

pub fn message(s: &mut Script<'_>) -> ReturnMessage {
    match s.below(6) {
        0 => ReturnMessage::Shut { error: s.u32() },
        1 => ReturnMessage::Pong { value: s.u32() },
        2 => ReturnMessage::RequestPages { block: Some(name(s, 0)), start: s.number(), bytes: s.u32() },
        3 => ReturnMessage::RequestPages { block: None, start: s.number(), bytes: s.u32() },
        4 => ReturnMessage::ResumeAck { value: 1 },
        _ => ReturnMessage::SwitchoverAck,
    }
}

/// Up to three places of a stream, and what is to stand there.
pub fn changes(s: &mut Script<'_>) -> Vec<(u64, u8)> {
    (0..s.below(4)).map(|_| (s.number(), s.byte())).collect()
}

/// Puts `changes` into `stream`.
pub fn change(stream: &mut [u8], changes: &[(u64, u8)]) {
    let length = stream.len() as u64;
    for (at, new) in changes.iter().filter(|_| length > 0) {
        stream[(at % length) as usize] = *new;
    }
}
