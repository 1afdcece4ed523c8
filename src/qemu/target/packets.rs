//! The packets of a multifd channel, as a target reads them.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use crate::framing::Garbled;
use crate::framing::read::{Mark, Packet, PacketReader, Payload};
use crate::qemu::compress::{Inflate, PackError};
use crate::qemu::seen::{Counts, Seen};
use crate::qemu::wire::{
    COMMON_BYTES, Compression, Dialect, INIT_BYTES, Offsets, PAGE_BYTES, PacketKind, RAM_PACKET_BYTES, RamPacket,
    StreamError, packet_kind,
};
use crate::units::{BlockId, Round};
use crate::wire::control::BlockInfo;
use crate::wire::packet::{RunEntry, RunKind};

/// Reads the packets of one channel.
#[derive(Debug)]
pub struct QemuReader {
    seen: Seen,
    /// The blocks, by their names: each one's place in the list, and its length in bytes.
    blocks: HashMap<String, (BlockId, u64)>,
    /// Known from the first packet on.
    dialect: Option<Dialect>,
    /// How its pages are compressed, known from the first of them on; what is goes through this.
    method: Option<Compression>,
    inflate: Option<Inflate>,
    /// Bytes of the channel before the next packet.
    at: u64,
    syncs: u32,
    /// The number of the packet before.
    number: Option<u64>,
    /// Something has come since the last SYNC.
    begun: bool,
}

impl QemuReader {
    /// Behind the init packet of a channel.
    pub fn new(blocks: &[BlockInfo], seen: Seen) -> QemuReader {
        let by_name = |block: &BlockInfo| (block.name.clone(), (block.id, block.bytes));
        let channel_bytes = INIT_BYTES as u64;
        seen.count(&Counts { channel_bytes, ..Counts::default() });
        QemuReader {
            seen,
            blocks: blocks.iter().map(by_name).collect(),
            dialect: None,
            method: None,
            inflate: None,
            at: channel_bytes,
            syncs: 0,
            number: None,
            begun: false,
        }
    }

    /// All channels come from one program.
    fn first(&mut self, header: &[u8; RAM_PACKET_BYTES]) -> Result<Dialect, Garbled> {
        let dialect = Dialect::of_first_packet(header);
        let mut agreed = dialect;
        self.seen.learn(|facts| agreed = *facts.dialect.get_or_insert(dialect));
        if agreed != dialect {
            let at = self.at;
            return Err(Garbled(format!("multifd channel, byte {at}: it is of another QEMU than the channels before")));
        }
        self.dialect = Some(dialect);
        Ok(dialect)
    }

    fn unpackable(&self, error: &PackError) -> Garbled {
        Garbled(format!("multifd channel, before byte {}: {error}", self.at))
    }

    /// How many bytes follow, and of what kind.
    fn payload(&mut self, packet: &RamPacket<'_>) -> Result<Payload, Garbled> {
        if packet.normal.is_empty() {
            return Ok(if packet.zero.is_empty() { Payload::None } else { Payload::Plain(0) });
        }
        let method = packet.compression;
        if *self.method.get_or_insert(method) != method {
            let at = packet.at;
            return Err(Garbled(format!("multifd channel, byte {at}: the way of compression has changed")));
        }
        if method == Compression::None {
            return Ok(Payload::Plain(packet.data_bytes.into()));
        }
        if self.inflate.is_none() {
            self.inflate = Some(Inflate::new(method).map_err(|e| self.unpackable(&e))?);
            self.seen.learn(|facts| facts.compression = Some(method));
        }
        Ok(Payload::Packed(packet.data_bytes as usize))
    }
}

impl PacketReader for QemuReader {
    fn header_bytes(&self) -> usize {
        RAM_PACKET_BYTES
    }

    /// A header of another kind may be shorter, and no more may come behind it.
    fn glance(&self, header: &[u8]) -> Result<(), Garbled> {
        let Some(common) = header.first_chunk::<COMMON_BYTES>() else { return Ok(()) };
        match packet_kind(common, self.at).map_err(words)? {
            PacketKind::Ram => Ok(()),
            PacketKind::DeviceState => Err(Garbled(format!(
                "multifd channel, byte {}: the state of a device came on a channel; it is taken on the main connection only",
                self.at
            ))),
        }
    }

    fn table_bytes(&self, header: &[u8]) -> Result<usize, Garbled> {
        self.glance(header).map(|()| 0)
    }

    fn packet(&mut self, header: &[u8], _table: &[u8], runs: &mut Vec<RunEntry>) -> Result<Packet, Garbled> {
        let header = header.first_chunk().ok_or_else(|| Garbled("a header is cut short".to_owned()))?;
        let dialect = self.dialect.map_or_else(|| self.first(header), Ok)?;
        let packet = RamPacket::decode(header, dialect, self.at).map_err(words)?;
        let pages = packet.normal.len() + packet.zero.len();
        if self.syncs == 0 && pages > 0 {
            return Err(Garbled(format!("multifd channel, byte {}: pages came before the first SYNC", self.at)));
        }
        let mut block = BlockId(0);
        if let Some(name) = packet.block {
            let Some((id, bytes)) = self.blocks.get(name) else {
                let (at, name) = (self.at, crate::wire::printable(name));
                return Err(Garbled(format!("multifd channel, byte {at}: there is no RAM block {name}")));
            };
            packet.check_inside(*bytes).map_err(words)?;
            block = *id;
        }
        // QEMU 7.2 sends an empty packet behind a SYNC that had pages.
        let says_something = packet.sync || pages > 0;
        if says_something && !std::mem::replace(&mut self.begun, true) && !self.seen.begin_round() {
            return Err(Garbled(format!("multifd channel, byte {}: a packet came behind the last SYNC", self.at)));
        }
        if dialect == Dialect::V10_0 {
            let before = self.number.replace(packet.number);
            self.seen.numbers().take(packet.number, before);
        }
        append(packet.normal, RunKind::Data, runs);
        append(packet.zero, RunKind::Zero, runs);
        let payload = self.payload(&packet)?;
        let packet_bytes = RAM_PACKET_BYTES as u64 + u64::from(packet.data_bytes);
        self.at = self.at.saturating_add(packet_bytes);
        self.seen.count(&Counts {
            channel_bytes: packet_bytes,
            normal_pages: packet.normal.len() as u64,
            zero_pages: packet.zero.len() as u64,
            sync_packets: packet.sync.into(),
            ..Counts::default()
        });
        let round = Round(self.syncs);
        let mark = packet.sync.then_some(Mark::RoundEnd(round));
        if packet.sync {
            self.syncs = self.syncs.checked_add(1).ok_or_else(|| Garbled("more rounds than can be counted".to_owned()))?;
            self.begun = false;
        }
        Ok(Packet { block, round, payload, mark })
    }

    fn unpack(&mut self, packed: &[u8], pages: &mut [u8]) -> Result<(), Garbled> {
        let Some(inflate) = &mut self.inflate else { return Err(Garbled("nothing was compressed".to_owned())) };
        inflate.packet(packed, pages).map_err(|e| self.unpackable(&e))
    }

    /// The last thing on a channel is a SYNC. Whether another was to come is seen when the main stream waits for it.
    fn may_end(&self) -> bool {
        self.syncs > 0 && !self.begun
    }
}

/// Appends these pages, neighbours joined, in their order.
fn append(offsets: Offsets<'_>, kind: RunKind, runs: &mut Vec<RunEntry>) {
    let begun = runs.len();
    for page in offsets.iter().map(|offset| offset / PAGE_BYTES) {
        match runs[begun..].last_mut() {
            Some(run) if run.first + u64::from(run.pages) == page => run.pages += 1,
            _ => runs.push(RunEntry { first: page, pages: 1, kind }),
        }
    }
}

fn words(error: StreamError) -> Garbled {
    Garbled(error.to_string())
}

#[cfg(test)]
mod tests;
