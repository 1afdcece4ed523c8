//! What can be wrong with bytes from the peer, or with a message that is to be sent.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;

use super::hello::Side;
use super::packet::PacketKind;
use crate::units::{BlockId, ChannelId, PageSize};

/// Why bytes are not a message of version 1, or why a message cannot be put into bytes.
///
/// The same checks run on both sides of the wire: what this library refuses to read it also refuses to write.
///
/// ```
/// use pageferry::wire::hello::Hello;
///
/// let mut bytes = [0; 64];
/// bytes[..16].copy_from_slice(b"HTTP/1.1 400 Bad");
/// let error = Hello::decode(&bytes).unwrap_err();
/// assert_eq!(error.to_string(), r#"this is not a pageferry peer: its first bytes were "HTTP/1.1""#);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum WireError {
    /// A connection does not begin with the magic of a hello.
    NotPageferry {
        /// What it begins with.
        first: [u8; 8],
    },
    /// The peer speaks another version.
    UnsupportedVersion {
        /// The version in its hello.
        theirs: u16,
        /// The version of this library.
        ours: u16,
    },
    /// Bytes or flags that have no meaning in version 1 are not zero.
    ReservedNotZero {
        /// The message that holds them.
        message: &'static str,
    },
    /// The checksum does not fit the bytes: they were damaged on the way.
    BadCrc {
        /// The damaged message.
        message: &'static str,
        /// The checksum that it carries.
        stated: u32,
        /// The checksum of its bytes.
        computed: u32,
    },
    /// A field holds a number that has no meaning.
    BadValue {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A field is above its limit.
    TooLarge {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// The most that it may hold.
        limit: u64,
    },
    /// A message ends in the middle of a field.
    CutShort {
        /// The message.
        message: &'static str,
        /// Bytes that the field needs.
        wanted: usize,
        /// Bytes that are left.
        left: usize,
    },
    /// A message goes on after its last field.
    TrailingBytes {
        /// The message.
        message: &'static str,
        /// How many bytes follow.
        bytes: usize,
    },
    /// A text is not UTF-8.
    NotUtf8 {
        /// The field.
        field: &'static str,
        /// How many of its bytes are valid.
        valid_bytes: usize,
    },
    /// A control frame has a type that its sender does not send in version 1.
    UnknownFrame {
        /// Who sent it.
        sender: Side,
        /// Its type.
        frame_type: u16,
    },
    /// A control frame is missing, repeated or out of order.
    OutOfSequence {
        /// The sequence number whose turn it was.
        expected: u32,
        /// The sequence number that came.
        found: u32,
    },
    /// A data connection does not go on with a packet header.
    NotAPacket {
        /// What stands where the magic of a header should.
        magic: u32,
    },
    /// A pages packet has no runs.
    PacketWithoutRuns,
    /// A mark names a block, or carries runs or a payload.
    MarkNotEmpty {
        /// Which mark.
        kind: PacketKind,
        /// The block that it names: must be 0.
        block: BlockId,
        /// Its run count: must be 0.
        run_count: u32,
        /// Its payload: must be 0.
        payload_bytes: u64,
    },
    /// The table is not as long as the header says.
    TableLength {
        /// Runs by the header.
        run_count: u32,
        /// Bytes of the table.
        table_bytes: usize,
    },
    /// The buffer for a header and its table is too small.
    BufferTooSmall {
        /// Bytes that are needed.
        needed: usize,
        /// Bytes of the buffer.
        given: usize,
    },
    /// A run has no pages.
    EmptyRun {
        /// Its place in the table.
        index: usize,
    },
    /// A run reaches past the end of its block.
    RunOutOfBlock {
        /// Its place in the table.
        index: usize,
        /// The block.
        block: BlockId,
        /// Its first page.
        first: u64,
        /// Its length in pages.
        pages: u32,
        /// The length of the block in pages.
        block_pages: u64,
    },
    /// A run begins before the end of the one before it.
    RunOutOfOrder {
        /// Its place in the table.
        index: usize,
        /// Its first page.
        first: u64,
        /// The page after the run before it.
        previous_end: u64,
    },
    /// The payload is not as long as the data runs are.
    PayloadLength {
        /// Bytes by the header.
        payload_bytes: u64,
        /// Pages by the table.
        data_pages: u64,
        /// The size of a page.
        page_size: PageSize,
    },
    /// The blocks of a Setup are not numbered 0, 1, 2, ...
    BlockOutOfOrder {
        /// Its place in the list.
        index: usize,
        /// The id found there.
        id: BlockId,
    },
    /// A block is empty, or not a whole number of pages.
    BlockLength {
        /// The block.
        block: BlockId,
        /// Its length.
        bytes: u64,
        /// The size of its pages.
        page_size: PageSize,
    },
    /// A block reaches past the end of the guest's address space.
    BlockAddress {
        /// The block.
        block: BlockId,
        /// Where it begins.
        guest_address: u64,
        /// Its length.
        bytes: u64,
    },
    /// The pages that back a block are not a power of two, or smaller than its tracking pages.
    BackingPage {
        /// The block.
        block: BlockId,
        /// Bytes of a backing page.
        backing_page_bytes: u64,
        /// The size of its tracking pages.
        page_size: PageSize,
    },
    /// A list of lanes names a channel twice.
    LaneTwice {
        /// The channel.
        channel: ChannelId,
    },
    /// A piece of the device state lies beyond what 64 bits can count.
    StateOutOfRange {
        /// Where the piece begins.
        offset: u64,
        /// Its length.
        bytes: usize,
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use WireError::*;
        match *self {
            NotPageferry { first } => {
                write!(f, "this is not a pageferry peer: its first bytes were \"{}\"", first.escape_ascii())
            }
            UnsupportedVersion { theirs, ours } => {
                let age = if theirs > ours { "a newer" } else { "an older" };
                write!(f, "the peer speaks {age} version of the protocol: {theirs}; this side speaks {ours}")
            }
            ReservedNotZero { message } => {
                write!(f, "the {message} has reserved bits set, which have no meaning in version 1")
            }
            BadCrc { message, stated, computed } => {
                write!(f, "the {message} is damaged: its CRC says {stated:#010x}, its bytes give {computed:#010x}")
            }
            BadValue { field, value } => write!(f, "the {field} is {value}, which has no meaning in version 1"),
            TooLarge { field, value, limit } => write!(f, "the {field} is {value}, the limit is {limit}"),
            CutShort { message, wanted, left } => {
                write!(f, "the {message} ends early: {wanted} bytes are needed, {left} are left")
            }
            TrailingBytes { message, bytes } => write!(f, "the {message} goes on for {bytes} bytes after its end"),
            NotUtf8 { field, valid_bytes } => write!(f, "the {field} is not UTF-8 after {valid_bytes} bytes"),
            UnknownFrame { sender, frame_type } => {
                write!(f, "control frame type {frame_type:#06x} is none that a {sender} sends in version 1")
            }
            OutOfSequence { expected, found } => {
                write!(f, "control frame {found} came when it was the turn of frame {expected}")
            }
            NotAPacket { magic } => {
                write!(f, "the data stream is out of step: {magic:#010x} stands where a packet should begin")
            }
            PacketWithoutRuns => write!(f, "a pages packet has no runs"),
            MarkNotEmpty { kind, block, run_count, payload_bytes } => write!(
                f,
                "a {kind} mark must be empty, but has block {block}, {run_count} runs and {payload_bytes} payload bytes"
            ),
            TableLength { run_count, table_bytes } => {
                write!(f, "a table of {table_bytes} bytes does not fit a header that says {run_count} runs")
            }
            BufferTooSmall { needed, given } => {
                write!(f, "a packet header and its table need {needed} bytes, the buffer has {given}")
            }
            EmptyRun { index } => write!(f, "run {index} of the packet has no pages"),
            RunOutOfBlock { index, block, first, pages, block_pages } => write!(
                f,
                "run {index} of the packet ({pages} pages from page {first}) reaches past the end of block {block}, \
                 which has {block_pages} pages"
            ),
            RunOutOfOrder { index, first, previous_end } => write!(
                f,
                "run {index} of the packet begins at page {first}, before the end of the run before it at {previous_end}"
            ),
            PayloadLength { payload_bytes, data_pages, page_size } => write!(
                f,
                "the packet has {payload_bytes} payload bytes, but its runs name {data_pages} pages of {page_size} bytes"
            ),
            BlockOutOfOrder { index, id } => {
                write!(f, "the RAM blocks are not in order: number {index} in the list has id {id}")
            }
            BlockLength { block, bytes, page_size } => {
                write!(f, "RAM block {block} has {bytes} bytes: not one or more whole pages of {page_size} bytes")
            }
            BlockAddress { block, guest_address, bytes } => write!(
                f,
                "RAM block {block} ({bytes} bytes at {guest_address:#x}) reaches past the end of the address space"
            ),
            BackingPage { block, backing_page_bytes, page_size } => write!(
                f,
                "RAM block {block} has backing pages of {backing_page_bytes} bytes: not a power of two of at least one \
                 page of {page_size} bytes"
            ),
            LaneTwice { channel } => write!(f, "the list of lanes names channel {channel} twice"),
            StateOutOfRange { offset, bytes } => {
                write!(f, "a piece of device state ({bytes} bytes at {offset}) reaches past 64 bits")
            }
        }
    }
}

impl Error for WireError {}
