//! A small migration as its source would send it: the main stream and the channels, record by record.

use pageferry::qemu::compress::Deflate;
use pageferry::qemu::wire::{
    Barrier, Block, Command, Compression, Dialect, INIT_BYTES, InitPacket, MainEncoder, Name, NewRamPacket,
    RAM_PACKET_BYTES, Record,
};

pub const CHANNELS: u8 = 3;
pub const PAGE: usize = 4096;

/// What a real QEMU sent after its RAM: the sections of its devices and their description.
const DEVICES: &[u8] = include_bytes!("../qemu_golden/main.raw");
const DEVICES_AT: usize = 1771;

/// The streams of a migration, the main one first; each a list of records, as they would be written.
#[derive(Clone, Debug)]
pub struct Capture {
    pub dialect: Dialect,
    pub return_path: bool,
    pub streams: Vec<Vec<Vec<u8>>>,
}

/// The blocks, and their pages.
pub const BLOCKS: [(&str, u64); 2] = [("ram0", 64), ("/rom@etc/table", 3)];

/// A page that nobody else has at this place in this round.
fn page(block: usize, page: u64, round: u64) -> Vec<u8> {
    let seed = (block as u64) << 40 | page << 8 | round | 1 << 50;
    (0..PAGE as u64 / 8).flat_map(|word| (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word).to_le_bytes()).collect()
}

struct Maker {
    dialect: Dialect,
    main: MainEncoder,
    streams: Vec<Vec<Vec<u8>>>,
    /// Of each channel, unless nothing is compressed.
    deflate: Vec<Deflate>,
    number: u64,
}

impl Maker {
    fn say(&mut self, record: &Record<'_>) {
        let mut bytes = Vec::new();
        self.main.encode(record, &mut bytes).expect("a sound record");
        self.streams[0].push(bytes);
    }

    fn packet(&mut self, channel: u64, packet: NewRamPacket<'_>, data: &[u8]) {
        let mut numbered = NewRamPacket { number: self.number, ..packet };
        let mut data = data;
        self.number += 1;
        if let Some(deflate) = self.deflate.get_mut(channel as usize).filter(|_| !packet.sync) {
            numbered.compression = deflate.method();
            if !data.is_empty() {
                data = deflate.packet(data).expect("a compressor");
                numbered.compressed_bytes = data.len() as u32;
            }
        }
        let mut bytes = numbered.encode(self.dialect).expect("a sound packet").to_vec();
        bytes.extend(data);
        self.streams[1 + channel as usize].push(bytes);
    }

    /// In QEMU 7.2 a SYNC may be the last packet with pages: so it is here on the first channel.
    fn sync(&mut self) {
        for channel in 0..u64::from(CHANNELS) {
            match self.streams[1 + channel as usize].last_mut() {
                Some(pages) if channel == 0 && self.dialect == Dialect::V7_2 && pages.len() > RAM_PACKET_BYTES => {
                    pages[11] |= 1;
                }
                _ => self.packet(channel, NewRamPacket::sync(0), &[]),
            }
        }
    }

    /// Every `step`-th page once: a third of them zeros.
    fn round(&mut self, round: u64, step: u64) {
        for (index, (name, pages)) in BLOCKS.into_iter().enumerate() {
            let name = Name::new(name).expect("a name");
            let taken: Vec<u64> = (0..pages).step_by(step as usize).collect();
            for (channel, taken) in taken.chunks(8).enumerate() {
                let zeros = |page: &&u64| (**page + round) % 3 == 0;
                let zero: Vec<_> = taken.iter().filter(zeros).map(|page| page * PAGE as u64).collect();
                let normal: Vec<_> = taken.iter().filter(|page| !zeros(page)).map(|page| page * PAGE as u64).collect();
                let data: Vec<u8> = normal.iter().flat_map(|offset| page(index, offset / PAGE as u64, round)).collect();
                let mut packet = NewRamPacket { normal: &normal, zero: &zero, ..NewRamPacket::pages(0, &name) };
                if self.dialect == Dialect::V7_2 {
                    packet.zero = &[];
                    zero.iter().for_each(|&offset| self.say(&Record::ZeroPage { block: index, offset }));
                }
                if !(packet.normal.is_empty() && packet.zero.is_empty()) {
                    self.packet(channel as u64 % u64::from(CHANNELS), packet, &data);
                }
            }
        }
    }
}

/// Three rounds of two blocks, nothing of which is compressed.
pub fn capture(dialect: Dialect, return_path: bool) -> Capture {
    compressed(dialect, return_path, Compression::None)
}

/// The same, compressed.
pub fn compressed(dialect: Dialect, return_path: bool, compression: Compression) -> Capture {
    let barrier = if dialect == Dialect::V7_2 { Barrier::PerSection } else { Barrier::PerRound };
    let streams = vec![Vec::new(); 1 + usize::from(CHANNELS)];
    let compressed = (0..CHANNELS).filter(|_| compression != Compression::None);
    let deflate = compressed.map(|_| Deflate::new(compression).expect("a compressor")).collect();
    let mut maker = Maker { dialect, main: MainEncoder::new(dialect), streams, deflate, number: 0 };
    for channel in 0..CHANNELS {
        let init: [u8; INIT_BYTES] = InitPacket { uuid: [0; 16], channel }.encode();
        maker.streams[1 + usize::from(channel)].push(init.to_vec());
    }
    let name = |text| Name::new(text).expect("a name");
    maker.say(&Record::Header);
    maker.say(&Record::Machine(name("pc-q35-7.2")));
    if return_path {
        maker.say(&Record::Command(Command::OpenReturnPath));
        maker.say(&Record::Command(Command::Ping { value: 1 }));
    }
    maker.say(&Record::RamStart { section: 1 });
    maker.say(&Record::Blocks(BLOCKS.map(|(text, pages)| Block::new(name(text), pages * PAGE as u64)).to_vec()));
    let end = |maker: &mut Maker| {
        maker.sync();
        if barrier == Barrier::PerRound {
            maker.say(&Record::Flush);
        }
        maker.say(&Record::EndOfSection);
        maker.say(&Record::Footer);
    };
    end(&mut maker);
    for (round, step) in [(0, 1), (1, 5), (2, 11)] {
        maker.say(&if round == 2 { Record::RamEnd } else { Record::RamPart });
        maker.round(round, step);
        end(&mut maker);
    }
    maker.say(&Record::Tail(&DEVICES[DEVICES_AT..]));
    Capture { dialect, return_path, streams: maker.streams }
}
