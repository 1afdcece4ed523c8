#![forbid(unsafe_code)]
//! What a target makes of a data channel's bytes.

use std::fmt;

use super::Garbled;
use crate::units::{BlockId, Epoch, Round};
use crate::wire::packet::RunEntry;

/// Reads the headers of the packets of one data channel, in order, from its first. A packet is a header of fixed length,
/// a table (which may be empty), and the bytes of its pages.
pub trait PacketReader: fmt::Debug + Send {
    /// Bytes of each header; always the same.
    fn header_bytes(&self) -> usize;

    /// What is known to be wrong by the first bytes of a header, of which more are waited for.
    ///
    /// # Errors
    /// There is no sense in waiting: why.
    fn glance(&self, _header: &[u8]) -> Result<(), Garbled> {
        Ok(())
    }

    /// Bytes of the table that follows this header: no more than
    /// [`RUNS_PER_PACKET_MAX`](crate::wire::packet::RUNS_PER_PACKET_MAX) of this library's own rows take. The header is
    /// not believed for anything else until [`PacketReader::packet`] has seen both.
    ///
    /// # Errors
    /// A header that makes no sense.
    fn table_bytes(&self, header: &[u8]) -> Result<usize, Garbled>;

    /// Takes the next packet: appends its runs to `runs`, in the order in which their bytes follow. All of them lie in the
    /// block that is named, none overlaps another, and the pages of the data runs are as many as `payload` says.
    ///
    /// # Errors
    /// A packet that makes no sense, or does not belong here.
    fn packet(&mut self, header: &[u8], table: &[u8], runs: &mut Vec<RunEntry>) -> Result<Packet, Garbled>;

    /// Puts the pages of the packet before together, all of them, from the bytes that came.
    ///
    /// # Errors
    /// Bytes that are not these pages.
    fn unpack(&mut self, _packed: &[u8], _pages: &mut [u8]) -> Result<(), Garbled> {
        Err(Garbled("compressed pages came, and this wire has none".to_owned()))
    }

    /// Whether the channel may end before the next header without a mark that says so.
    fn may_end(&self) -> bool {
        false
    }
}

/// A packet whose bytes are to be received next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The block of its pages.
    pub block: BlockId,
    /// The round of its pages.
    pub round: Round,
    /// The bytes that follow.
    pub payload: Payload,
    /// What it means once its pages have landed.
    pub mark: Option<Mark>,
}

/// The bytes of pages in a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Payload {
    /// It is a mark only, without runs.
    None,
    /// So many bytes of pages, as they are.
    Plain(u64),
    /// So many bytes, from which [`PacketReader::unpack`] makes all pages of the data runs. They are held in memory, as are
    /// these pages: a reader bounds both.
    Packed(usize),
}

/// What a packet says beside pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// The epoch has ended on this channel.
    Flush(Epoch),
    /// The round has ended on this channel.
    RoundEnd(Round),
    /// Nothing more comes.
    Bye,
}
