//! The source's side of QEMU's wire: what a session's frames, rounds and runs are there.

#![forbid(unsafe_code)]

mod dialogue;
mod on_channels;
mod on_main;
mod opening;
mod zeros;

use std::sync::{Arc, OnceLock};

use super::framing::Qemu;
use super::wire::{Barrier, Compression, Dialect, InitPacket};
use crate::framing::{Garbled, PacketWriter};
use crate::memory::{Ram, RamBlock};
use crate::sync::AtomicU64;
use crate::units::ChannelId;
use crate::wire::hello::{Hello, HelloRole};

pub(super) use dialogue::SourceDialogue;
use on_channels::ChannelWriter;
use on_main::MainWriter;
use opening::Opening;
use zeros::ZeroPages;

/// Blocks up to this size are taken for firmware, of which a destination has a copy of its own before anything comes:
/// their pages of zeros travel as data. Of all others it holds zeros, and of a page that is zero it is told only that.
/// It is told, though QEMU would take it without: whoever stores a machine must know that nothing of it is missing.
const FIRMWARE_BYTES_MAX: u64 = 4 << 20;

/// What a source does in one of several ways.
#[derive(Clone, Debug)]
pub(super) struct Sending {
    dialect: Dialect,
    barrier: Barrier,
    section: u32,
    return_path: bool,
    compression: Compression,
    uuid: Option<[u8; 16]>,
    shared: Arc<Shared>,
}

/// What is known of a migration once it is set up, and what its channels share.
#[derive(Default, Debug)]
struct Shared {
    opening: OnceLock<Opening>,
    /// Packets so far, of all channels.
    packets: AtomicU64,
    /// Pages of zeros that the packets of the channels have no word for; none where they have one.
    zeros: OnceLock<ZeroPages>,
}

impl Default for Sending {
    fn default() -> Sending {
        Sending {
            dialect: Dialect::V10_0,
            barrier: Barrier::PerRound,
            section: 1,
            return_path: true,
            compression: Compression::None,
            uuid: None,
            shared: Arc::default(),
        }
    }
}

impl Qemu {
    /// At a source: what the destination's program speaks, and where its machine type has the barrier; QEMU 10.0's, and
    /// [`Barrier::PerRound`], unless told otherwise. The stream does not say it: a destination that waits elsewhere
    /// waits for ever.
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect, barrier: Barrier) -> Qemu {
        (self.sending.dialect, self.sending.barrier) = (dialect, barrier);
        self
    }

    /// At a source: the number of the section of RAM; 1, as QEMU 10.0 has it, unless told otherwise. A destination takes
    /// any.
    #[must_use]
    pub fn section(mut self, section: u32) -> Qemu {
        self.sending.section = section;
        self
    }

    /// At a source: whether the destination is asked whether it has taken the machine; it is unless told otherwise. If
    /// not, the migration is complete when its last byte is with the kernel, and nobody knows what became of it.
    #[must_use]
    pub fn return_path(mut self, yes: bool) -> Qemu {
        self.sending.return_path = yes;
        self
    }

    /// At a source: how pages on the channels are compressed; not at all unless told otherwise. The destination's
    /// `multifd-compression` must be the same.
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Qemu {
        self.sending.compression = compression;
        self
    }

    /// At a source: the uuid of the machine, which the destination compares with its own; the configuration's unless told
    /// otherwise, and zeros where that has none.
    #[must_use]
    pub fn uuid(mut self, uuid: [u8; 16]) -> Qemu {
        self.sending.uuid = Some(uuid);
        self
    }

    /// What a source says first: a destination that finds a connection silent waits for it, and for nothing else.
    pub(super) fn first_bytes(&self, hello: &Hello) -> Vec<u8> {
        match hello.role {
            HelloRole::Control => Opening::header(),
            HelloRole::Data(channel) => {
                let of_configuration = self.sending.shared.opening.get().and_then(|opening| opening.uuid);
                let uuid = self.sending.uuid.or(of_configuration).unwrap_or_default();
                InitPacket { uuid, channel: channel.0 }.encode().to_vec()
            }
        }
    }

    pub(super) fn source_dialogue(&self) -> SourceDialogue {
        SourceDialogue::new(self)
    }

    pub(super) fn packets_of(&self, ram: &Ram, _: ChannelId) -> Result<Box<dyn PacketWriter>, Garbled> {
        if self.channels == 0 {
            return Ok(Box::new(MainWriter::new(self, ram)?));
        }
        Ok(Box::new(ChannelWriter::new(self, ram)?))
    }
}

/// Whether a destination may hold something there before anything has come.
pub(super) fn is_firmware(block: &RamBlock) -> bool {
    block.bytes() <= FIRMWARE_BYTES_MAX
}
