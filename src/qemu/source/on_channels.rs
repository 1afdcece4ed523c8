//! Packets of a multifd channel.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::opening::words;
use super::{Shared, is_firmware};
use crate::framing::{Garbled, PacketWriter, Place, Room, Zeros};
use crate::memory::Ram;
use crate::memory::gather::Gather;
use crate::qemu::compress::Deflate;
use crate::qemu::framing::Qemu;
use crate::qemu::seen::{Counts, Seen};
use crate::qemu::wire::{
    COMPRESSED_BYTES_MAX, Compression, Dialect, INIT_BYTES, Name, NewRamPacket, PACKET_PAGES_MAX, PAGE_BYTES,
    RAM_PACKET_BYTES,
};
use crate::sync::Ordering::Relaxed;
use crate::units::{BlockId, Item, Round};
use crate::wire::packet::{RunEntry, RunKind};

/// Most bytes of the pages of a packet.
const PAGES_BYTES_MAX: usize = PACKET_PAGES_MAX * PAGE_BYTES as usize;

/// What a destination must know of a block before it gets pages of it.
#[derive(Debug)]
pub(super) struct Known {
    pub name: Name,
    /// What becomes of its pages of zeros.
    pub zeros: Zeros,
}

/// Blocks as a writer knows them.
pub(super) fn known(ram: &Ram) -> Result<Vec<Known>, Garbled> {
    let known = |block: &crate::memory::RamBlock| {
        let name = Name::new(block.name());
        let name = name.ok_or_else(|| Garbled(format!("{:?} cannot be a name in QEMU's stream", block.name())))?;
        Ok(Known { name, zeros: if is_firmware(block) { Zeros::Data } else { Zeros::Named } })
    };
    ram.blocks().iter().map(known).collect()
}

/// Puts packets of one channel together.
#[derive(Debug)]
pub(super) struct ChannelWriter {
    dialect: Dialect,
    shared: Arc<Shared>,
    seen: Seen,
    blocks: Vec<Known>,
    compression: Compression,
    deflate: Option<Deflate>,
    /// Copies of pages, to be compressed; guest RAM does not lie still.
    copies: Vec<u8>,
    normal: Vec<u64>,
    zero: Vec<u64>,
}

impl ChannelWriter {
    pub fn new(qemu: &Qemu, ram: &Ram) -> Result<ChannelWriter, Garbled> {
        let sending = &qemu.sending;
        let (deflate, copies) = match sending.compression {
            Compression::None => (None, Vec::new()),
            method => (Some(Deflate::new(method).map_err(|e| Garbled(e.to_string()))?), vec![0; PAGES_BYTES_MAX]),
        };
        qemu.seen.count(&Counts { channel_bytes: INIT_BYTES as u64, ..Counts::default() });
        Ok(ChannelWriter {
            dialect: sending.dialect,
            shared: sending.shared.clone(),
            seen: qemu.seen.clone(),
            blocks: known(ram)?,
            compression: sending.compression,
            deflate,
            copies,
            normal: Vec::with_capacity(PACKET_PAGES_MAX),
            zero: Vec::with_capacity(PACKET_PAGES_MAX),
        })
    }

    fn next_number(&self) -> u64 {
        self.shared.packets.fetch_add(1, Relaxed)
    }

    fn sync(&mut self, packet: &mut Gather) -> Result<usize, Garbled> {
        let header = NewRamPacket::sync(self.next_number()).encode(self.dialect).map_err(words)?;
        packet.head_mut()[..RAM_PACKET_BYTES].copy_from_slice(&header);
        self.seen.count(&Counts { channel_bytes: RAM_PACKET_BYTES as u64, sync_packets: 1, ..Counts::default() });
        Ok(RAM_PACKET_BYTES)
    }

    /// Replaces the payload by what it is compressed to, in the head; its length.
    fn compress(&mut self, packet: &mut Gather) -> Result<usize, Garbled> {
        let Some(deflate) = self.deflate.as_mut().filter(|_| packet.payload_bytes() > 0) else { return Ok(0) };
        let copies = &mut self.copies[..packet.payload_bytes()];
        packet.take_payload(copies);
        let compressed = deflate.packet(copies).map_err(|e| Garbled(e.to_string()))?;
        packet.head_mut()[RAM_PACKET_BYTES..RAM_PACKET_BYTES + compressed.len()].copy_from_slice(compressed);
        Ok(compressed.len())
    }
}

impl PacketWriter for ChannelWriter {
    fn room(&self) -> Room {
        let compressed = if self.deflate.is_some() { COMPRESSED_BYTES_MAX as usize } else { 0 };
        Room {
            head_bytes: RAM_PACKET_BYTES + compressed,
            payload_bytes: PAGES_BYTES_MAX,
            runs: PACKET_PAGES_MAX,
            pages: PACKET_PAGES_MAX as u64,
        }
    }

    fn zeros(&self, block: BlockId, _: Round) -> Zeros {
        self.blocks.get(usize::from(block.0)).map_or(Zeros::Data, |known| known.zeros)
    }

    fn begin(&mut self, packet: &mut Gather) -> Result<usize, Garbled> {
        // That of the START section, before any page.
        self.sync(packet)
    }

    fn pages(&mut self, at: Place, block: BlockId, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled> {
        self.normal.clear();
        self.zero.clear();
        for entry in table {
            let offsets = (entry.first..entry.first + u64::from(entry.pages)).map(|page| page * PAGE_BYTES);
            match entry.kind {
                RunKind::Data => self.normal.extend(offsets),
                RunKind::Zero => match self.shared.zeros.get() {
                    Some(zeros) => zeros.note(at.round, block, entry),
                    None => self.zero.extend(offsets),
                },
            }
        }
        if self.normal.is_empty() && self.zero.is_empty() {
            return Ok(0);
        }
        let compressed = self.compress(packet)?;
        let Some(known) = self.blocks.get(usize::from(block.0)) else {
            return Err(Garbled("a run names no block".to_owned()));
        };
        let new = NewRamPacket {
            compression: self.compression,
            normal: &self.normal,
            zero: &self.zero,
            compressed_bytes: compressed as u32,
            ..NewRamPacket::pages(self.next_number(), &known.name)
        };
        let header = new.encode(self.dialect).map_err(words)?;
        packet.head_mut()[..RAM_PACKET_BYTES].copy_from_slice(&header);
        let head_len = RAM_PACKET_BYTES + compressed;
        self.seen.count(&Counts {
            channel_bytes: (head_len + packet.payload_bytes()) as u64,
            normal_pages: self.normal.len() as u64,
            zero_pages: self.zero.len() as u64,
            ..Counts::default()
        });
        Ok(head_len)
    }

    fn mark(&mut self, _: Place, mark: Item, packet: &mut Gather) -> Result<usize, Garbled> {
        match mark {
            Item::RoundEnd(_) => self.sync(packet),
            Item::Flush(_) | Item::Run(_) | Item::Untouched(_) => Ok(0),
        }
    }

    fn bye(&mut self, _: Place, _: &mut Gather) -> Result<usize, Garbled> {
        Ok(0)
    }
}
