//! Which record may follow which, and what the stream has said so far. A decoder and an encoder keep the same.

#![forbid(unsafe_code)]

use super::record::{Block, Command, PACKAGED_BYTES_MAX, Record, Subsection};
use super::vmdesc::Vmdesc;
use super::{CAPABILITIES, IGNORE_SHARED, MAPPED_RAM, PAGE_BITS, UUID};
use crate::qemu::wire::{Barrier, Dialect, Fault, Name, PAGE_BYTES};

/// Most RAM blocks of a stream. A PC has half a dozen.
pub const BLOCKS_MAX: usize = 1024;

/// Most capabilities in the configuration. QEMU names two at most.
pub const CAPABILITIES_MAX: usize = 16;

/// The parts of the section of RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Start,
    Middle,
    End,
}

/// What may come next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Header,
    Machine,
    /// Subsections of the configuration, or what follows it.
    Configuration,
    /// Commands, until RAM begins.
    Before,
    Blocks,
    Words(Part),
    Footer(Part),
    /// Between two parts of RAM.
    Between,
    /// After RAM.
    After,
    Tail,
}

impl Phase {
    fn expected(self) -> &'static str {
        match self {
            Phase::Header => "the header",
            Phase::Machine => "the configuration",
            Phase::Configuration => "a subsection of the configuration, a command or the START section of RAM",
            Phase::Before => "a command or the START section of RAM",
            Phase::Blocks => "the list of RAM blocks",
            Phase::Words(Part::Start) => "a flush word or the end word of the section",
            Phase::Words(_) => "a page, a flush word or the end word of the section",
            Phase::Footer(_) => "a footer",
            Phase::Between => "a command or the next section of RAM",
            Phase::After => "a command or the sections of the devices",
            Phase::Tail => "the sections of the devices up to their description",
        }
    }
}

/// Bytes that are handed through: how many are still to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Payload {
    None,
    Page(u64),
    Package(u64),
}

impl Payload {
    pub const fn left(self) -> u64 {
        match self {
            Payload::None => 0,
            Payload::Page(left) | Payload::Package(left) => left,
        }
    }

    /// So many of its bytes have passed, but no more than were to come.
    pub const fn pass(&mut self, bytes: u64) {
        let left = self.left().saturating_sub(bytes);
        *self = match self {
            Payload::Page(_) if left > 0 => Payload::Page(left),
            Payload::Package(_) if left > 0 => Payload::Package(left),
            _ => Payload::None,
        };
    }
}

/// Where a main stream is, and what it has said.
#[derive(Clone, Debug)]
pub struct Order {
    pub dialect: Dialect,
    pub phase: Phase,
    pub payload: Payload,
    /// The number of the section of RAM.
    pub section: u32,
    pub blocks: Vec<Block>,
    /// The block of the last page, of the whole stream.
    pub last_block: Option<usize>,
    pub barrier: Option<Barrier>,
    pub return_path: bool,
    /// The list of blocks carries addresses.
    pub addresses: bool,
    /// Page sizes that post-copy was advised of, other than 4096: the list of blocks may carry them.
    pub page_sizes: u64,
    pub tail: Vmdesc,
    advised: bool,
    flushed: bool,
    /// Subsections that have come, a bit each.
    subsections: u32,
}

impl Order {
    pub const fn new(dialect: Dialect) -> Order {
        Order {
            dialect,
            phase: Phase::Header,
            payload: Payload::None,
            section: 0,
            blocks: Vec::new(),
            last_block: None,
            barrier: None,
            return_path: false,
            addresses: false,
            page_sizes: 0,
            tail: Vmdesc::new(),
            advised: false,
            flushed: false,
            subsections: 0,
        }
    }

    /// What must come next.
    pub fn expected(&self) -> &'static str {
        match self.payload {
            Payload::None => self.phase.expected(),
            Payload::Page(_) => "bytes of a page",
            Payload::Package(_) => "bytes of a package",
        }
    }

    /// `record` comes next. If it may not, nothing changes.
    pub fn accept(&mut self, record: &Record<'_>) -> Result<(), Fault> {
        let out_of_place = Fault::OutOfPlace { found: record.name(), expected: self.expected() };
        match (self.payload, record) {
            (Payload::Page(left), Record::PageData(bytes)) | (Payload::Package(left), Record::Packaged(bytes)) => {
                let found = bytes.len() as u64;
                if found > left {
                    return Err(Fault::TooLarge { field: "length of what was announced", found, limit: left });
                }
                self.payload.pass(found);
                return Ok(());
            }
            (Payload::None, _) => {}
            _ => return Err(out_of_place),
        }
        self.phase = match (self.phase, record) {
            (Phase::Header, Record::Header) => Phase::Machine,
            (Phase::Machine, Record::Machine(_)) => Phase::Configuration,
            (Phase::Configuration, Record::Subsection(subsection)) => {
                self.configure(subsection)?;
                Phase::Configuration
            }
            (Phase::Configuration | Phase::Before | Phase::Between | Phase::After, Record::Command(command)) => {
                self.command(command)?;
                if self.phase == Phase::Configuration { Phase::Before } else { self.phase }
            }
            (Phase::Configuration | Phase::Before, Record::RamStart { section }) => {
                self.section = *section;
                Phase::Blocks
            }
            (Phase::Blocks, Record::Blocks(blocks)) => {
                self.check_blocks(blocks)?;
                self.blocks.clone_from(blocks);
                Phase::Words(Part::Start)
            }
            (Phase::Words(part), Record::Flush) => {
                self.flush(part)?;
                self.phase
            }
            (Phase::Words(Part::Middle | Part::End), Record::ZeroPage { block, offset }) => {
                self.page(*block, *offset)?;
                self.phase
            }
            (Phase::Words(Part::Middle | Part::End), Record::Page { block, offset }) => {
                self.page(*block, *offset)?;
                self.payload = Payload::Page(PAGE_BYTES);
                self.phase
            }
            (Phase::Words(part), Record::EndOfSection) => {
                if part == Part::Start {
                    self.barrier = Some(if self.flushed { Barrier::PerRound } else { Barrier::PerSection });
                }
                Phase::Footer(part)
            }
            (Phase::Footer(Part::Start | Part::Middle), Record::Footer) => Phase::Between,
            (Phase::Footer(Part::End), Record::Footer) => Phase::After,
            (Phase::Between, Record::RamPart) => Phase::Words(Part::Middle),
            (Phase::Between, Record::RamEnd) => Phase::Words(Part::End),
            (Phase::After | Phase::Tail, Record::Tail(_)) => Phase::Tail,
            (Phase::Tail, Record::TailWhole) if self.tail.is_whole() => Phase::Tail,
            _ => return Err(out_of_place),
        };
        Ok(())
    }

    fn configure(&mut self, subsection: &Subsection) -> Result<(), Fault> {
        let (bit, name) = match subsection {
            Subsection::TargetPageBits => (1, PAGE_BITS),
            Subsection::Capabilities(_) => (2, CAPABILITIES),
            Subsection::Uuid(_) => (4, UUID),
        };
        if self.subsections & bit != 0 {
            return Err(Fault::Twice { what: "the subsection", name: name.to_owned() });
        }
        if let Subsection::Capabilities(names) = subsection {
            if names.len() > CAPABILITIES_MAX {
                let (found, limit) = (names.len() as u64, CAPABILITIES_MAX as u64);
                return Err(Fault::TooLarge { field: "number of capabilities", found, limit });
            }
            let has = |name: &str| names.iter().any(|n| n.as_str() == name);
            if has(MAPPED_RAM) {
                let (what, expected) = ("the capability mapped-ram", "a stream, not a file with holes");
                return Err(Fault::Unsupported { what, expected });
            }
            if let Some(name) = names.iter().find(|name| name.as_str() != IGNORE_SHARED) {
                let expected = "x-ignore-shared, the only one that changes a stream";
                return Err(Fault::Unknown { what: "a capability", name: name.as_str().to_owned(), expected });
            }
            if names.len() > 1 {
                return Err(Fault::Twice { what: "the capability", name: IGNORE_SHARED.to_owned() });
            }
            self.addresses = has(IGNORE_SHARED);
        }
        self.subsections |= bit;
        Ok(())
    }

    fn command(&mut self, command: &Command) -> Result<(), Fault> {
        let fault = |found, expected| Err(Fault::OutOfPlace { found, expected });
        match command {
            Command::OpenReturnPath if self.return_path => fault("OPEN_RETURN_PATH again", "it once"),
            Command::OpenReturnPath => {
                self.return_path = true;
                Ok(())
            }
            Command::SwitchoverStart if self.dialect == Dialect::V7_2 => {
                fault("SWITCHOVER_START", "commands of QEMU 7.2, which has none of that name")
            }
            Command::SwitchoverStart if self.phase != Phase::Between => fault("SWITCHOVER_START", self.phase.expected()),
            Command::PostcopyAdvise { .. } if !matches!(self.phase, Phase::Configuration | Phase::Before) => {
                fault("POSTCOPY_ADVISE", self.phase.expected())
            }
            Command::PostcopyAdvise { .. } if self.advised => fault("POSTCOPY_ADVISE again", "it once"),
            Command::PostcopyAdvise { page_sizes } => {
                let page_sizes = page_sizes.unwrap_or(PAGE_BYTES);
                if page_sizes == 0 || page_sizes % PAGE_BYTES != 0 {
                    let expected = "page sizes from 4096 on, a bit each";
                    return Err(Fault::Value { field: "summary of page sizes", found: page_sizes, expected });
                }
                self.advised = true;
                self.page_sizes = page_sizes & !PAGE_BYTES;
                Ok(())
            }
            Command::Packaged { bytes } => {
                let (field, found, limit) = ("length of a package", u64::from(*bytes), u64::from(PACKAGED_BYTES_MAX));
                if found == 0 {
                    return Err(Fault::Value { field, found, expected: "some bytes" });
                }
                if found > limit {
                    return Err(Fault::TooLarge { field, found, limit });
                }
                self.payload = Payload::Package(found);
                Ok(())
            }
            Command::PostcopyRamDiscard(bytes) if bytes.len() > usize::from(u16::MAX) => {
                let (found, limit) = (bytes.len() as u64, u16::MAX.into());
                Err(Fault::TooLarge { field: "length of a command", found, limit })
            }
            _ => Ok(()),
        }
    }

    /// What is wrong with one block by itself.
    pub fn check_block(&self, block: &Block) -> Result<(), Fault> {
        let (bytes, name) = (block.bytes, block.name.as_str());
        if bytes == 0 || bytes % PAGE_BYTES != 0 {
            let expected = "one or more pages of 4096 bytes";
            return Err(Fault::Value { field: "length of a RAM block", found: bytes, expected });
        }
        if block.guest_address.is_some() != self.addresses {
            let expected = "an address with x-ignore-shared, and none without";
            return Err(Fault::Unknown { what: "a RAM block", name: name.to_owned(), expected });
        }
        let Some(found) = block.page_bytes else { return Ok(()) };
        if self.addresses {
            let (what, expected) = ("a page size beside an address", "x-ignore-shared or post-copy with huge pages");
            return Err(Fault::Unsupported { what, expected });
        }
        if !self.is_page_size(found) {
            let expected = "one that POSTCOPY_ADVISE has named";
            return Err(Fault::Value { field: "page size of a RAM block", found, expected });
        }
        Ok(())
    }

    /// Whether the list of blocks may name this page size. The smallest, 4096, it leaves out.
    pub const fn is_page_size(&self, bytes: u64) -> bool {
        bytes.is_power_of_two() && self.page_sizes & bytes != 0
    }

    fn check_blocks(&self, blocks: &[Block]) -> Result<(), Fault> {
        let (field, found, limit) = ("number of RAM blocks", blocks.len() as u64, BLOCKS_MAX as u64);
        if blocks.is_empty() {
            return Err(Fault::Value { field, found, expected: "one or more" });
        }
        if found > limit {
            return Err(Fault::TooLarge { field, found, limit });
        }
        blocks.iter().try_for_each(|block| self.check_block(block))?;
        let total = blocks.iter().try_fold(0_u64, |total, block| total.checked_add(block.bytes));
        if total.is_none() {
            let (field, limit) = ("sum of all RAM blocks", u64::MAX);
            return Err(Fault::TooLarge { field, found: limit, limit: limit & !(PAGE_BYTES - 1) });
        }
        let mut names: Vec<&Name> = blocks.iter().map(|block| &block.name).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Fault::Twice { what: "the RAM block", name: pair[0].as_str().to_owned() }),
            None => Ok(()),
        }
    }

    fn flush(&mut self, part: Part) -> Result<(), Fault> {
        let fault = |expected| Err(Fault::OutOfPlace { found: "a flush word", expected });
        match (self.dialect, part) {
            (Dialect::V7_2, _) => fault("words of QEMU 7.2, which has no flush word"),
            (Dialect::V10_0, Part::Start) if self.flushed => fault("the end word: START has one flush word"),
            (Dialect::V10_0, Part::Start) => {
                self.flushed = true;
                Ok(())
            }
            (Dialect::V10_0, _) if self.barrier == Some(Barrier::PerRound) => Ok(()),
            (Dialect::V10_0, _) => fault("a page or the end word: START had no flush word"),
        }
    }

    fn page(&mut self, block: usize, offset: u64) -> Result<(), Fault> {
        let Some(found) = self.blocks.get(block) else {
            let (found, limit) = (block as u64, self.blocks.len() as u64 - 1);
            return Err(Fault::TooLarge { field: "index of a RAM block", found, limit });
        };
        let block_bytes = found.bytes;
        let inside = offset.checked_add(PAGE_BYTES).is_some_and(|end| end <= block_bytes);
        if !inside || offset % PAGE_BYTES != 0 {
            return Err(Fault::Offset { offset, block_bytes });
        }
        self.last_block = Some(block);
        Ok(())
    }
}
