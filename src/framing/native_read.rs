#![forbid(unsafe_code)]
//! Packets of this library's own wire, as a target reads them.

use super::Garbled;
use super::read::{Mark, Packet, PacketReader, Payload};
use crate::units::{Epoch, Round};
use crate::wire::WireError;
use crate::wire::control::BlockInfo;
use crate::wire::packet::{
    PACKET_HEADER_BYTES, PacketHeader, PacketKind, RunEntry, check_crc, entries, validate_table,
};

/// Reads version 1 of this library's own packets.
#[derive(Debug)]
pub struct NativeReader {
    blocks: Vec<BlockInfo>,
    /// The channel was connected before. Then its first marks say how far it counts as having come: it carries nothing of
    /// before.
    joins_late: bool,
    round: Round,
    epoch: Epoch,
    sequence: u64,
}

impl NativeReader {
    /// Before the first packet of a connection.
    pub fn new(blocks: &[BlockInfo], joins_late: bool) -> NativeReader {
        NativeReader { blocks: blocks.to_vec(), joins_late, round: Round(0), epoch: Epoch(0), sequence: 0 }
    }

    fn decode(header: &[u8]) -> Result<(PacketHeader, &[u8; PACKET_HEADER_BYTES]), WireError> {
        let (needed, given) = (PACKET_HEADER_BYTES, header.len());
        let bytes = header.first_chunk().ok_or(WireError::BufferTooSmall { needed, given })?;
        Ok((PacketHeader::decode(bytes)?, bytes))
    }

    /// The packet must be the next one of this connection, of the round and epoch that the marks so far have led to.
    fn in_order(&self, header: &PacketHeader) -> Result<(), Garbled> {
        let is = (header.sequence, header.round, header.epoch);
        let expected = (self.sequence, self.round, self.epoch);
        let bye = header.kind == PacketKind::Bye;
        if is == expected || (bye && header.sequence == self.sequence) || self.catches_up(header) {
            return Ok(());
        }
        Err(Garbled(format!(
            "a {} packet has sequence, round and epoch {}, {}, {} where {}, {}, {} were expected",
            header.kind, is.0, is.1, is.2, expected.0, expected.1, expected.2
        )))
    }

    /// Whether this is the mark with which a channel begins that was connected before: it counts as having passed that
    /// round, or epoch, and goes on from there.
    fn catches_up(&self, header: &PacketHeader) -> bool {
        let is_mark = matches!(header.kind, PacketKind::RoundEnd | PacketKind::Flush);
        self.joins_late && is_mark && (self.sequence, header.sequence) == (0, 0)
    }

    /// Proves the table, and appends its runs.
    fn pages(&self, header: &PacketHeader, table: &[u8], runs: &mut Vec<RunEntry>) -> Result<(), Garbled> {
        let block = self.blocks.get(usize::from(header.block.0)).ok_or_else(|| {
            Garbled(format!("a packet names block {}, which does not exist", header.block))
        })?;
        validate_table(header, table, block.page_size, block.pages())?;
        for entry in entries(table) {
            runs.push(entry?);
        }
        Ok(())
    }
}

impl PacketReader for NativeReader {
    fn header_bytes(&self) -> usize {
        PACKET_HEADER_BYTES
    }

    fn table_bytes(&self, header: &[u8]) -> Result<usize, Garbled> {
        Ok(NativeReader::decode(header)?.0.table_bytes())
    }

    fn packet(&mut self, header: &[u8], table: &[u8], runs: &mut Vec<RunEntry>) -> Result<Packet, Garbled> {
        let (header, bytes) = NativeReader::decode(header)?;
        check_crc(bytes, table)?;
        self.in_order(&header)?;
        self.sequence += 1;
        let mut payload = Payload::None;
        let mark = match header.kind {
            PacketKind::Pages => {
                self.pages(&header, table, runs)?;
                payload = Payload::Plain(header.payload_bytes);
                None
            }
            PacketKind::Flush => {
                self.epoch = Epoch(header.epoch.0.saturating_add(1));
                self.round = header.round;
                Some(Mark::Flush(header.epoch))
            }
            PacketKind::RoundEnd => {
                self.round = Round(header.round.0 + 1);
                self.epoch = header.epoch;
                Some(Mark::RoundEnd(header.round))
            }
            PacketKind::Bye => Some(Mark::Bye),
        };
        Ok(Packet { block: header.block, round: header.round, payload, mark })
    }
}
