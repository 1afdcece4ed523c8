//! The beginning of a main stream, up to the first round.

#![forbid(unsafe_code)]

use super::Sending;
use crate::framing::Garbled;
use crate::qemu::wire::{
    Barrier, Block, Command, Dialect, MainDecoder, MainEncoder, Name, PAGE_BYTES, Record, StreamError, Subsection,
};
use crate::wire::control::Setup;

/// The beginning, as it is written.
#[derive(Debug)]
pub(super) struct Opening {
    /// The machine's uuid, where the configuration has it.
    pub uuid: Option<[u8; 16]>,
    /// The configuration, and the commands behind it.
    pub before: Vec<u8>,
    /// The START section of RAM, with its barrier.
    pub start: Vec<u8>,
    /// What comes behind it is written with a copy of this.
    pub encoder: MainEncoder,
}

/// Every main stream is written as 10.0's: 7.2 says nothing on it that 10.0 may not say, and from QEMU 8.1 to 9.1 there are
/// flush words beside the packets of 7.2. Where the barrier is, a source is told.
const MAIN: Dialect = Dialect::V10_0;
/// The number that the only ping carries.
const PING: u32 = 1;

impl Opening {
    /// What comes before everything: the header.
    pub fn header() -> Vec<u8> {
        let mut out = Vec::new();
        let put = MainEncoder::new(MAIN).encode(&Record::Header, &mut out);
        debug_assert!(put.is_ok(), "the first record of any stream");
        out
    }

    /// Of a machine that Setup describes; its opaque bytes are the configuration. `has_channels` says whether the
    /// pages travel on channels.
    pub fn new(setup: &Setup, sending: &Sending, has_channels: bool) -> Result<Opening, Garbled> {
        let mut encoder = MainEncoder::new(MAIN);
        let (mut before, mut start) = (Vec::new(), Vec::new());
        encoder.encode(&Record::Header, &mut Vec::new()).map_err(words)?;
        let configuration = configuration(&setup.opaque)?;
        for record in &configuration {
            encoder.encode(record, &mut before).map_err(words)?;
        }
        if before != setup.opaque {
            return Err(Garbled("the configuration of the machine is not whole, or not what QEMU writes".to_owned()));
        }
        if sending.return_path {
            for command in [Command::OpenReturnPath, Command::Ping { value: PING }] {
                encoder.encode(&Record::Command(command), &mut before).map_err(words)?;
            }
        }
        let subsections = || configuration.iter().filter_map(|record| match record {
            Record::Subsection(subsection) => Some(subsection),
            _ => None,
        });
        let addresses = subsections().any(|s| matches!(s, Subsection::Capabilities(names) if !names.is_empty()));
        let uuid = subsections().find_map(|s| if let Subsection::Uuid(uuid) = s { Some(*uuid) } else { None });
        encoder.encode(&Record::RamStart { section: sending.section }, &mut start).map_err(words)?;
        encoder.encode(&Record::Blocks(blocks(setup, addresses)?), &mut start).map_err(words)?;
        // Without channels there is nobody to wait for, and no word for it.
        if has_channels && sending.barrier == Barrier::PerRound {
            encoder.encode(&Record::Flush, &mut start).map_err(words)?;
        }
        for record in [Record::EndOfSection, Record::Footer] {
            encoder.encode(&record, &mut start).map_err(words)?;
        }
        Ok(Opening { uuid, before, start, encoder })
    }
}

/// What the configuration is made of.
fn configuration(bytes: &[u8]) -> Result<Vec<Record<'static>>, Garbled> {
    let mut decoder = MainDecoder::new(MAIN);
    let mut records = Vec::new();
    let mut header = &Opening::header()[..];
    decoder.pull(&mut header).map_err(words)?;
    let mut left = bytes;
    loop {
        match decoder.pull(&mut left).map_err(words)? {
            Some(Record::Machine(name)) => records.push(Record::Machine(name)),
            Some(Record::Subsection(subsection)) => records.push(Record::Subsection(subsection)),
            Some(_) => return Err(Garbled("the configuration of the machine goes on with something else".to_owned())),
            None => return Ok(records),
        }
    }
}

fn blocks(setup: &Setup, addresses: bool) -> Result<Vec<Block>, Garbled> {
    let block = |info: &crate::wire::control::BlockInfo| {
        if info.page_size.bytes() != PAGE_BYTES {
            let bytes = info.page_size.bytes();
            return Err(Garbled(format!("RAM block {} has pages of {bytes} bytes, and QEMU's have 4096", info.name)));
        }
        let name = Name::new(&info.name)
            .ok_or_else(|| Garbled(format!("{:?} cannot be the name of a RAM block of QEMU", info.name)))?;
        Ok(Block { guest_address: addresses.then_some(info.guest_address), ..Block::new(name, info.bytes) })
    };
    setup.blocks.iter().map(block).collect()
}

/// What cannot be put into a stream, in words.
pub(super) fn words(error: StreamError) -> Garbled {
    Garbled(error.to_string())
}
