//! QEMU's wire as a framing: who is on a connection, and who speaks on it.

#![forbid(unsafe_code)]

use super::seen::Seen;
use super::source::{Sending, is_firmware};
use super::target::{QemuReader, TargetDialogue};
use super::wire::{COMMON_BYTES, INIT_BYTES, InitPacket, MAIN_MAGIC, packet_kind};
use crate::framing::read::PacketReader;
use crate::framing::{Dialogue, Framing, Garbled, PacketWriter, Zeros};
use crate::memory::{Ram, RamBlock};
use crate::units::{ChannelId, FIRST_GENERATION, SessionId};
use crate::wire::control::{BlockInfo, SourceFrame, TargetFrame};
use crate::wire::hello::{Hello, HelloRole, Side};
use crate::wire::printable;

/// QEMU's migration stream, with so many multifd channels or with none. One value is one migration.
///
/// ```
/// use pageferry::Target;
/// use pageferry::qemu::Qemu;
///
/// let qemu = Qemu::new(2);
/// let seen = qemu.seen();
/// let target = Target::builder().framing(qemu).listen("127.0.0.1:0")?;
/// # drop((target, seen));
/// # Ok::<(), pageferry::Failure>(())
/// ```
#[derive(Clone, Debug)]
pub struct Qemu {
    pub(super) channels: u8,
    pub(super) accept_missing: bool,
    pub(super) seen: Seen,
    pub(super) sending: Sending,
}

impl Qemu {
    /// A migration over a main connection and this many channels, on which both sides have agreed elsewhere: QEMU calls
    /// it `multifd-channels`. Without channels, `multifd` is off, and all pages travel on the main connection.
    pub fn new(channels: u8) -> Qemu {
        Qemu { channels, accept_missing: false, seen: Seen::default(), sending: Sending::default() }
    }

    /// At a target: whether a page of which the source never spoke is taken to be zero. No, unless told otherwise: QEMU
    /// names every page at least once, but for those that a guest's balloon has given back as free.
    #[must_use]
    pub fn accept_missing(mut self, yes: bool) -> Qemu {
        self.accept_missing = yes;
        self
    }

    /// What a target has seen, now and later.
    pub fn seen(&self) -> Seen {
        self.seen.clone()
    }
}

impl Framing for Qemu {
    fn hello_bytes(&self, said: &[u8]) -> usize {
        match said.first_chunk::<4>() {
            None => 4,
            Some(&MAIN_MAGIC) => 4,
            // Whoever speaks another language is not waited for.
            Some(magic) if *magic != InitPacket { uuid: [0; 16], channel: 0 }.encode()[..4] => said.len(),
            Some(_) => INIT_BYTES,
        }
    }

    fn who(&self, said: &[u8]) -> Result<Hello, String> {
        let hello = |role, session| Hello {
            role,
            side: Side::Source,
            generation: FIRST_GENERATION,
            session: SessionId(session),
            features: 0,
        };
        if said == MAIN_MAGIC {
            return Ok(hello(HelloRole::Control, [0; 16]));
        }
        let Some(bytes) = said.first_chunk::<INIT_BYTES>() else {
            let mut common = [0; COMMON_BYTES];
            let known = said.len().min(COMMON_BYTES);
            common[..known].copy_from_slice(&said[..known]);
            let why = packet_kind(&common, 0).err().map_or_else(String::new, |e| e.fault.to_string());
            return Err(format!("it is neither QEMU's main connection nor a channel: {why}"));
        };
        let init = InitPacket::decode(bytes).map_err(|e| e.to_string())?;
        self.seen.called(init);
        if init.channel >= self.channels {
            return Err(format!("it is channel {}, and there are {} channels", init.channel, self.channels));
        }
        Ok(hello(HelloRole::Data(ChannelId(init.channel)), init.uuid))
    }

    fn hello(&self, hello: &Hello) -> Vec<u8> {
        self.first_bytes(hello)
    }

    fn answers_hello(&self) -> bool {
        false
    }

    fn without_tls(&self) -> &'static str {
        "turn QEMU's parameter tls-creds off"
    }

    fn channels(&self) -> Option<u8> {
        Some(self.channels)
    }

    fn chosen(&self, session: SessionId) {
        self.seen.learn(|facts| facts.uuid = Some(session.0).filter(|uuid| *uuid != [0; 16]));
    }

    fn mends(&self) -> bool {
        false
    }

    fn untouched(&self, block: &RamBlock) -> Zeros {
        if is_firmware(block) { Zeros::Data } else { Zeros::Named }
    }

    fn at_source(&self) -> Box<dyn Dialogue<SourceFrame, TargetFrame>> {
        Box::new(self.source_dialogue())
    }

    fn packets(&self, ram: &Ram, channel: ChannelId) -> Result<Box<dyn PacketWriter>, Garbled> {
        self.packets_of(ram, channel)
    }

    fn at_target(&self) -> Box<dyn Dialogue<TargetFrame, SourceFrame>> {
        Box::new(TargetDialogue::new(self.channels, self.seen()))
    }

    fn reader(&self, blocks: &[BlockInfo], _joins_late: bool) -> Box<dyn PacketReader> {
        Box::new(QemuReader::new(blocks, self.seen()))
    }

    fn control_meets(&self) -> bool {
        true
    }

    fn is_complete(&self, blocks: &[BlockInfo], named: &[u64]) -> Result<(), String> {
        // A source that shares memory with this host leaves such blocks out, and says only that it may.
        let shares = self.seen.facts().blocks.iter().any(|block| block.guest_address.is_some());
        let lacks = |(block, named): &(&BlockInfo, &u64)| **named < block.pages() && !(shares && **named == 0);
        match blocks.iter().zip(named).find(lacks) {
            Some((block, named)) if !self.accept_missing => Err(format!(
                "of RAM block {}, the source has sent {named} of {} pages: the rest is not known to be zero",
                printable(&block.name),
                block.pages()
            )),
            _ => Ok(()),
        }
    }
}
