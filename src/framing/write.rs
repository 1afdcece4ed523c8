#![forbid(unsafe_code)]
//! The packets of a data channel at the source: what a send worker puts together, as bytes of one wire.

use std::fmt;

use super::Garbled;
use crate::memory::gather::Gather;
use crate::units::{BlockId, Epoch, Item, Round};
use crate::wire::packet::{
    HEADER_AND_TABLE_BYTES_MAX, PAYLOAD_BYTES_MAX, PacketHeader, PacketKind, RUNS_PER_PACKET_MAX, RunEntry,
};

/// What one packet has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes of its head: all but the payload that is sent from where it lies.
    pub head_bytes: usize,
    /// Bytes of guest pages.
    pub payload_bytes: usize,
    /// Entries of the table of runs.
    pub runs: usize,
    /// Pages, those of zeros included.
    pub pages: u64,
}

/// What becomes of pages of zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zeros {
    /// They are entries of the table, without payload.
    Named,
    /// They travel as any other page.
    Data,
    /// They are left out: the target's memory is known to hold zeros there.
    LeftOut,
}

/// Where a worker stands in the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The round that is being sent.
    pub round: Round,
    /// The epoch that is being sent.
    pub epoch: Epoch,
}

/// Puts the packets of one data channel into bytes. It makes no calls, but may copy payload into the head, and clear the
/// packet of it.
///
/// Whatever is put together gives how many bytes at the front of [`Gather::head_mut`] are to be sent, before the payload;
/// none at all where the wire has no word for it.
pub trait PacketWriter: fmt::Debug + Send {
    /// What one packet has room for.
    fn room(&self) -> Room;

    /// What becomes of pages of zeros of this block, in this round.
    fn zeros(&self, block: BlockId, round: Round) -> Zeros;

    /// What comes first on the connection, behind the hello.
    ///
    /// # Errors
    /// What cannot be put into bytes.
    fn begin(&mut self, packet: &mut Gather) -> Result<usize, Garbled>;

    /// Pages of one block: `table` says which, and `packet` holds those that are not zeros, in its order.
    ///
    /// # Errors
    /// What cannot be put into bytes.
    fn pages(&mut self, at: Place, block: BlockId, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled>;

    /// The mark of the end of a round, or of an epoch. The packet is empty.
    ///
    /// # Errors
    /// What cannot be put into bytes.
    fn mark(&mut self, at: Place, mark: Item, packet: &mut Gather) -> Result<usize, Garbled>;

    /// The end of the channel. The packet is empty.
    ///
    /// # Errors
    /// What cannot be put into bytes.
    fn bye(&mut self, at: Place, packet: &mut Gather) -> Result<usize, Garbled>;
}

/// Packets of this library's own wire, version 1.
#[derive(Default, Debug)]
pub struct NativeWriter {
    sequence: u64,
}

impl NativeWriter {
    fn put(&mut self, header: &PacketHeader, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled> {
        let bytes = header.encode_into(table, packet.head_mut())?;
        self.sequence += 1;
        Ok(bytes)
    }
}

impl PacketWriter for NativeWriter {
    fn room(&self) -> Room {
        Room {
            head_bytes: HEADER_AND_TABLE_BYTES_MAX,
            payload_bytes: PAYLOAD_BYTES_MAX as usize,
            runs: RUNS_PER_PACKET_MAX,
            pages: u64::MAX,
        }
    }

    fn zeros(&self, _: BlockId, _: Round) -> Zeros {
        Zeros::Named
    }

    fn begin(&mut self, _: &mut Gather) -> Result<usize, Garbled> {
        Ok(0)
    }

    fn pages(&mut self, at: Place, block: BlockId, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled> {
        let header = PacketHeader {
            kind: PacketKind::Pages,
            block,
            run_count: table.len() as u32,
            round: at.round,
            epoch: at.epoch,
            sequence: self.sequence,
            payload_bytes: packet.payload_bytes() as u64,
        };
        self.put(&header, table, packet)
    }

    fn mark(&mut self, at: Place, mark: Item, packet: &mut Gather) -> Result<usize, Garbled> {
        let header = match mark {
            Item::RoundEnd(round) => PacketHeader::round_end(round, at.epoch, self.sequence),
            Item::Flush(epoch) => PacketHeader::flush(epoch, at.round, self.sequence),
            Item::Run(_) | Item::Untouched(_) => return Err(Garbled("a run is no mark".to_owned())),
        };
        self.put(&header, &[], packet)
    }

    fn bye(&mut self, at: Place, packet: &mut Gather) -> Result<usize, Garbled> {
        let round = Round(at.round.0.min(Round::MAX.0));
        self.put(&PacketHeader::bye(round, at.epoch, self.sequence), &[], packet)
    }
}
