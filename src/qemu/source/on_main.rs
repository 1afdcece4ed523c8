//! Pages on the main connection, where there are no channels.

#![forbid(unsafe_code)]

use super::on_channels::{Known, known};
use super::opening::words;
use crate::framing::{Garbled, PacketWriter, Place, Room, Zeros};
use crate::memory::Ram;
use crate::memory::gather::Gather;
use crate::qemu::framing::Qemu;
use crate::qemu::seen::{Counts, Seen};
use crate::qemu::wire::{MainEncoder, NAME_BYTES_MAX, PACKET_PAGES_MAX, PAGE_BYTES, Record};
use crate::units::{BlockId, Item, Round};
use crate::wire::packet::{RunEntry, RunKind};

/// What a batch begins or ends with at the most: the beginning of a section, or its end word and footer.
const SECTION_BYTES_MAX: usize = 32;
/// The word of a page, the length of a name, and the byte of a page of zeros.
const RECORD_BYTES_MAX: usize = 8 + 1 + 1;

/// Puts the pages of a round into one part of the section of RAM.
#[derive(Debug)]
pub(super) struct MainWriter {
    encoder: MainEncoder,
    seen: Seen,
    blocks: Vec<Known>,
    /// Whether the round's part has begun.
    open: bool,
    record: Vec<u8>,
}

impl MainWriter {
    pub fn new(qemu: &Qemu, ram: &Ram) -> Result<MainWriter, Garbled> {
        let opening = qemu.sending.shared.opening.get();
        let opening = opening.ok_or_else(|| Garbled("a channel came before Setup".to_owned()))?;
        Ok(MainWriter {
            encoder: opening.encoder.clone(),
            seen: qemu.seen.clone(),
            blocks: known(ram)?,
            open: false,
            record: Vec::with_capacity(NAME_BYTES_MAX + SECTION_BYTES_MAX),
        })
    }

    /// Writes a record at `at` of the head, and says where the next one stands.
    fn put(&mut self, record: &Record<'_>, at: usize, packet: &mut Gather) -> Result<usize, Garbled> {
        self.record.clear();
        self.encoder.encode(record, &mut self.record).map_err(words)?;
        let end = at + self.record.len();
        packet.head_mut()[at..end].copy_from_slice(&self.record);
        Ok(end)
    }

    fn open(&mut self, packet: &mut Gather) -> Result<usize, Garbled> {
        if std::mem::replace(&mut self.open, true) {
            return Ok(0);
        }
        self.put(&Record::RamPart, 0, packet)
    }

    fn count(&self, bytes: usize, normal: u64, zero: u64) {
        let main_bytes = bytes as u64;
        self.seen.count(&Counts { main_bytes, normal_pages: normal, zero_pages: zero, ..Counts::default() });
    }
}

impl PacketWriter for MainWriter {
    fn room(&self) -> Room {
        let records = PACKET_PAGES_MAX * (RECORD_BYTES_MAX + PAGE_BYTES as usize);
        Room {
            head_bytes: SECTION_BYTES_MAX + NAME_BYTES_MAX + records,
            payload_bytes: PACKET_PAGES_MAX * PAGE_BYTES as usize,
            runs: PACKET_PAGES_MAX,
            pages: PACKET_PAGES_MAX as u64,
        }
    }

    fn zeros(&self, block: BlockId, _: Round) -> Zeros {
        self.blocks.get(usize::from(block.0)).map_or(Zeros::Data, |known| known.zeros)
    }

    fn begin(&mut self, _: &mut Gather) -> Result<usize, Garbled> {
        Ok(0)
    }

    fn pages(&mut self, _: Place, block: BlockId, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled> {
        let mut at = self.open(packet)?;
        let (mut normal, mut zero) = (0, 0);
        let index = usize::from(block.0);
        packet.begin(0);
        for entry in table {
            for page in entry.first..entry.first + u64::from(entry.pages) {
                let offset = page * PAGE_BYTES;
                if entry.kind == RunKind::Zero {
                    at = self.put(&Record::ZeroPage { block: index, offset }, at, packet)?;
                    zero += 1;
                    continue;
                }
                at = self.put(&Record::Page { block: index, offset }, at, packet)?;
                let end = at + PAGE_BYTES as usize;
                packet.copy_to_head(at..end);
                self.encoder.encode(&Record::PageData(&packet.head_mut()[at..end]), &mut self.record).map_err(words)?;
                at = end;
                normal += 1;
            }
        }
        packet.clear();
        self.count(at, normal, zero);
        Ok(at)
    }

    fn mark(&mut self, _: Place, mark: Item, packet: &mut Gather) -> Result<usize, Garbled> {
        if !matches!(mark, Item::RoundEnd(_)) {
            return Ok(0);
        }
        // A round without pages is a part without pages.
        let mut at = self.open(packet)?;
        for record in [Record::EndOfSection, Record::Footer] {
            at = self.put(&record, at, packet)?;
        }
        self.open = false;
        self.count(at, 0, 0);
        self.seen.count(&Counts { barriers: 1, ..Counts::default() });
        Ok(at)
    }

    fn bye(&mut self, _: Place, _: &mut Gather) -> Result<usize, Garbled> {
        Ok(0)
    }
}
