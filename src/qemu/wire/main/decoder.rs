//! Finds the records of the main stream in bytes that come in pieces of any size.

#![forbid(unsafe_code)]

use super::order::{BLOCKS_MAX, Order, Payload, Phase};
use super::record::{Block, Record};
use super::{EOF, FULL, read};
use crate::qemu::wire::channel::take;
use crate::qemu::wire::collect::Collector;
use crate::qemu::wire::{Barrier, Dialect, Fault, Stream, StreamError};

/// Takes the bytes of a main stream, and gives the records in them, in one order that is checked. It holds one record at
/// most, of up to 64 KiB, and the list of RAM blocks; pages, packages and the tail are handed through.
///
/// **Where it ends.** The sections of the devices have no lengths. Behind them stands a description of them, which does,
/// and [`Record::TailWhole`] says that one has been seen whole. That is the end unless more bytes come, which a guest
/// can bring about that has the same bytes in the state of a device: then the tail goes on, to the next
/// [`Record::TailWhole`]. Without a return path the connection closes behind the end, and
/// [`MainDecoder::finish`] has the last word; with one, a caller gives what follows some time to come.
///
/// An error is final: nothing after it can be told apart from damage, so every later call returns it again.
///
/// ```
/// use pageferry::qemu::wire::{Dialect, MainDecoder, Name, Record};
///
/// let mut decoder = MainDecoder::new(Dialect::V10_0);
/// let mut piece = &b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0\x08\0"[..];
/// assert_eq!(decoder.pull(&mut piece)?, Some(Record::Header));
/// assert_eq!(decoder.pull(&mut piece)?, Some(Record::Machine(Name::new("pc-q35-10.0").unwrap())));
/// assert_eq!(decoder.pull(&mut piece)?, None);
/// let error = decoder.pull(&mut &b"\x2a"[..]).unwrap_err();
/// let words = "main stream, byte 25: the command is 42 (0x2a), expected 1 (OPEN_RETURN_PATH) to 11 (SWITCHOVER_START)";
/// assert_eq!(error.to_string(), words);
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Debug)]
pub struct MainDecoder {
    order: Order,
    bytes: Collector,
    /// The list of blocks, while it is coming: bytes of RAM that it must still name, and what it has named.
    list: Option<(u64, Vec<Block>)>,
    /// A description has been seen whole, and nobody has been told.
    whole: bool,
    failed: Option<StreamError>,
}

impl MainDecoder {
    /// Before the first byte of a stream.
    pub const fn new(dialect: Dialect) -> MainDecoder {
        let bytes = Collector::new(Stream::Main);
        MainDecoder { order: Order::new(dialect), bytes, list: None, whole: false, failed: None }
    }

    /// Takes bytes from the front of `input` until a record is known, and returns it; `None` once `input` is used up
    /// and nothing more is known.
    ///
    /// # Errors
    ///
    /// What is wrong with the stream: from then on, always the same.
    pub fn pull<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Record<'i>>, StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.next(input).map_err(|error| self.failed.insert(error).clone())
    }

    fn next<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Record<'i>>, StreamError> {
        if self.order.payload != Payload::None {
            let page = matches!(self.order.payload, Payload::Page(_));
            let Some(bytes) = take(input, self.order.payload.left()) else { return Ok(None) };
            self.data_taken(bytes.len() as u64);
            return Ok(Some(if page { Record::PageData(bytes) } else { Record::Packaged(bytes) }));
        }
        match self.order.phase {
            Phase::Tail => return Ok(self.tail(input)),
            Phase::After if !self.bytes.is_collecting() && matches!(input.first(), Some(&(FULL | EOF))) => {
                self.order.phase = Phase::Tail;
                return Ok(self.tail(input));
            }
            Phase::Blocks => return self.blocks_of(input),
            _ => {}
        }
        let (order, at) = (&self.order, self.bytes.at());
        let Some(record) = self.bytes.collect(input, |from| read::record(from, order))? else { return Ok(None) };
        self.accept(&record, at)?;
        Ok(Some(record))
    }

    /// `record` came; it began at byte `at`.
    fn accept(&mut self, record: &Record<'_>, at: u64) -> Result<(), StreamError> {
        self.order.accept(record).map_err(|fault| StreamError { stream: Stream::Main, at, fault })
    }

    fn blocks_of(&mut self, input: &mut &[u8]) -> Result<Option<Record<'static>>, StreamError> {
        loop {
            let (order, at) = (&self.order, self.bytes.at());
            let Some((left, blocks)) = &mut self.list else {
                let Some(total) = self.bytes.collect(input, read::blocks_total)? else { return Ok(None) };
                self.list = Some((total, Vec::new()));
                continue;
            };
            let Some(block) = self.bytes.collect(input, |from| read::block(from, order, *left))? else {
                return Ok(None);
            };
            if blocks.len() == BLOCKS_MAX {
                let (field, limit) = ("number of RAM blocks", BLOCKS_MAX as u64);
                let fault = Fault::TooLarge { field, found: limit + 1, limit };
                return Err(StreamError { stream: Stream::Main, at, fault });
            }
            *left = left.saturating_sub(block.bytes);
            blocks.push(block);
            if *left == 0 {
                let record = Record::Blocks(std::mem::take(blocks));
                self.list = None;
                self.accept(&record, at)?;
                return Ok(Some(record));
            }
        }
    }

    fn tail<'i>(&mut self, input: &mut &'i [u8]) -> Option<Record<'i>> {
        if std::mem::take(&mut self.whole) {
            return Some(Record::TailWhole);
        }
        let length = self.order.tail.scan(input);
        let bytes = take(input, length as u64)?;
        self.whole = self.order.tail.is_whole();
        self.bytes.passed(bytes.len() as u64);
        Some(Record::Tail(bytes))
    }

    /// The RAM blocks; none before [`Record::Blocks`].
    pub fn blocks(&self) -> &[Block] {
        &self.order.blocks
    }

    /// Where the barriers are, known at the first [`Record::EndOfSection`].
    pub const fn barrier(&self) -> Option<Barrier> {
        self.order.barrier
    }

    /// Whether the source has opened the return path: then it waits for an answer at the end.
    pub const fn return_path_is_open(&self) -> bool {
        self.order.return_path
    }

    /// Which QEMU made the stream, by the last description of the devices that has been seen whole: where there are no
    /// packets, nothing else tells.
    pub const fn dialect_of_description(&self) -> Option<Dialect> {
        self.order.tail.dialect()
    }

    /// Bytes of a page or package that are still to come. A caller may take them from the connection itself, straight
    /// to where they belong, and say so with [`MainDecoder::data_taken`].
    pub const fn data_left(&self) -> u64 {
        self.order.payload.left()
    }

    /// So many of the bytes that were to come have been taken past this decoder; no more than
    /// [`MainDecoder::data_left`] count.
    pub const fn data_taken(&mut self, bytes: u64) {
        let left = self.order.payload.left();
        self.order.payload.pass(bytes);
        self.bytes.passed(if bytes < left { bytes } else { left });
    }

    /// Bytes of the stream before the next record, or before the one that is not yet whole.
    pub const fn at(&self) -> u64 {
        self.bytes.at()
    }

    /// Bytes of memory in use for what is not yet whole; the list of RAM blocks is not among them.
    pub fn capacity_bytes(&self) -> usize {
        self.bytes.capacity_bytes()
    }

    /// The connection has ended.
    ///
    /// # Errors
    ///
    /// If it ended anywhere but at the end of a description of the devices, or was wrong before.
    pub fn finish(&self) -> Result<(), StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.bytes.finish("next record")?;
        let (at, left) = (self.bytes.at(), self.order.payload.left());
        let fault = match self.order.phase {
            Phase::Tail if self.order.tail.is_whole() => return Ok(()),
            _ if left > 0 => Fault::CutShort { message: self.order.expected(), wanted: left },
            _ => Fault::Unfinished { expected: self.order.expected() },
        };
        Err(StreamError { stream: Stream::Main, at, fault })
    }
}
