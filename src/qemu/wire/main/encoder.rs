//! Puts the records of a main stream into bytes.

#![forbid(unsafe_code)]

use super::order::{Order, Phase};
use super::record::{Block, Command, Record, Subsection};
use super::*;
use crate::qemu::wire::codec::Writer;
use crate::qemu::wire::{Dialect, Fault, MAIN_MAGIC, Name, PAGE_BYTES, Stream, StreamError};

/// Puts the records of one main stream into bytes, and checks their order as a [`MainDecoder`] does: what it writes, the
/// decoder reads.
///
/// ```
/// use pageferry::qemu::wire::{Dialect, MainEncoder, Name, Record};
///
/// let mut encoder = MainEncoder::new(Dialect::V10_0);
/// let mut out = Vec::new();
/// encoder.encode(&Record::Header, &mut out)?;
/// encoder.encode(&Record::Machine(Name::new("pc-q35-10.0").unwrap()), &mut out)?;
/// assert_eq!(out, b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0");
/// let error = encoder.encode(&Record::Flush, &mut out).unwrap_err();
/// assert!(error.to_string().starts_with("main stream, byte 24: found a flush word, expected a subsection"));
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Clone, Debug)]
pub struct MainEncoder {
    order: Order,
    at: u64,
}

impl MainEncoder {
    /// Before the first byte of a stream.
    pub const fn new(dialect: Dialect) -> MainEncoder {
        MainEncoder { order: Order::new(dialect), at: 0 }
    }

    /// Appends the bytes of `record` to `out`. The tail must be put in as it came, from its first byte.
    ///
    /// # Errors
    ///
    /// If the record may not come next, or holds what a decoder would refuse. Nothing is written then, and nothing
    /// changes.
    pub fn encode(&mut self, record: &Record<'_>, out: &mut Vec<u8>) -> Result<(), StreamError> {
        let before = out.len();
        let same_block = self.order.last_block;
        self.check(record).map_err(|fault| StreamError { stream: Stream::Main, at: self.at, fault })?;
        let mut to = Writer::new(out);
        match record {
            Record::Header => {
                to.bytes(&MAIN_MAGIC);
                to.u32(3);
            }
            Record::Machine(name) => {
                to.u8(CONFIGURATION);
                to.u32(name.length().into());
                to.bytes(name.as_str().as_bytes());
            }
            Record::Subsection(subsection) => put_subsection(&mut to, subsection),
            Record::Command(command) => put_command(&mut to, command),
            Record::RamStart { section } => {
                to.u8(START);
                to.u32(*section);
                to.u8(RAM.len() as u8);
                to.bytes(RAM.as_bytes());
                to.u32(0);
                to.u32(RAM_VERSION);
            }
            Record::Blocks(blocks) => put_blocks(&mut to, blocks),
            Record::RamPart | Record::RamEnd | Record::Footer => {
                to.u8(match record {
                    Record::RamPart => PART,
                    Record::RamEnd => END,
                    _ => FOOTER,
                });
                to.u32(self.order.section);
            }
            Record::ZeroPage { block, offset } => {
                self.put_page(&mut to, WORD_ZERO | offset, *block, same_block);
                to.u8(0);
            }
            Record::Page { block, offset } => self.put_page(&mut to, WORD_PAGE | offset, *block, same_block),
            Record::Flush => to.u64(WORD_FLUSH),
            Record::EndOfSection => to.u64(WORD_EOS),
            Record::PageData(bytes) | Record::Packaged(bytes) | Record::Tail(bytes) => to.bytes(bytes),
            Record::TailWhole => {}
        }
        self.at = self.at.saturating_add((out.len() - before) as u64);
        Ok(())
    }

    fn check(&mut self, record: &Record<'_>) -> Result<(), Fault> {
        if let Record::Tail(bytes) = record {
            let begins = bytes.first().is_none_or(|first| matches!(*first, FULL | EOF));
            if self.order.phase == Phase::After && !begins {
                let (field, found) = ("first byte of the tail", bytes[0].into());
                return Err(Fault::Value { field, found, expected: "0x04, a section, or 0x00, the end mark" });
            }
            if bytes.is_empty() && self.order.phase == Phase::After {
                return Ok(());
            }
        }
        self.order.accept(record)?;
        if let &Record::Tail(mut bytes) = record {
            while !bytes.is_empty() {
                bytes = &bytes[self.order.tail.scan(bytes)..];
            }
        }
        Ok(())
    }

    fn put_page(&self, to: &mut Writer<'_>, word: u64, block: usize, same_block: Option<usize>) {
        if same_block == Some(block) {
            return to.u64(word | WORD_CONTINUE);
        }
        to.u64(word);
        to.name(&self.order.blocks[block].name);
    }

    /// Bytes of the stream so far.
    pub const fn at(&self) -> u64 {
        self.at
    }

    /// The stream is to end here.
    ///
    /// # Errors
    ///
    /// If it may not: a destination would wait for more.
    pub fn finish(&self) -> Result<(), StreamError> {
        if self.order.phase == Phase::Tail && self.order.tail.is_whole() {
            return Ok(());
        }
        let fault = Fault::Unfinished { expected: self.order.expected() };
        Err(StreamError { stream: Stream::Main, at: self.at, fault })
    }
}

fn put_subsection(to: &mut Writer<'_>, subsection: &Subsection) {
    let mut head = |name: &str| {
        to.u8(SUBSECTION);
        to.u8(name.len() as u8);
        to.bytes(name.as_bytes());
        to.u32(1);
    };
    match subsection {
        Subsection::TargetPageBits => {
            head(PAGE_BITS);
            to.u32(12);
        }
        Subsection::Capabilities(names) => {
            head(CAPABILITIES);
            to.u32(names.len() as u32);
            names.iter().for_each(|name| to.name(name));
        }
        Subsection::Uuid(uuid) => {
            head(UUID);
            to.bytes(uuid);
        }
    }
}

fn put_command(to: &mut Writer<'_>, command: &Command) {
    let mut head = |number: u16, length: u16| {
        to.u8(COMMAND);
        to.u16(number);
        to.u16(length);
    };
    match command {
        Command::OpenReturnPath => head(1, 0),
        Command::Ping { value } => {
            head(2, 4);
            to.u32(*value);
        }
        Command::PostcopyAdvise { page_sizes: None } => head(3, 0),
        Command::PostcopyAdvise { page_sizes: Some(page_sizes) } => {
            head(3, 16);
            to.u64(*page_sizes);
            to.u64(PAGE_BYTES);
        }
        Command::PostcopyListen => head(4, 0),
        Command::PostcopyRun => head(5, 0),
        Command::PostcopyRamDiscard(bytes) => {
            head(6, bytes.len() as u16);
            to.bytes(bytes);
        }
        Command::Packaged { bytes } => {
            head(7, 4);
            to.u32(*bytes);
        }
        Command::EnableColo => head(8, 0),
        Command::PostcopyResume => head(9, 0),
        Command::RecvBitmap(name) => put_named(to, name),
        Command::SwitchoverStart => head(11, 0),
    }
}

/// The command that carries the name of a block.
fn put_named(to: &mut Writer<'_>, name: &Name) {
    to.u8(COMMAND);
    to.u16(10);
    to.u16(u16::from(name.length()) + 1);
    to.name(name);
}

fn put_blocks(to: &mut Writer<'_>, blocks: &[Block]) {
    let total = blocks.iter().fold(0_u64, |total, block| total.saturating_add(block.bytes));
    to.u64(total | WORD_MEM_SIZE);
    for block in blocks {
        to.name(&block.name);
        to.u64(block.bytes);
        [block.page_bytes, block.guest_address].into_iter().flatten().for_each(|field| to.u64(field));
    }
}
