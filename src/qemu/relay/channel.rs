#![forbid(unsafe_code)]
//! One multifd channel: a thread that reads a packet's header, looks at it, and passes it on with its data.

use std::io;
use std::sync::Arc;

use crate::bell::Ringer;
use crate::crew::{Cx, Interrupt, Role};
use crate::poll::PollSleeper;
use crate::progress::{ChannelCells, Progress, add};
use crate::qemu::wire::{
    Block, ChannelDecoder, ChannelEvent, Dialect, Fault, INIT_BYTES, PAGE_BYTES, PacketKind, RAM_PACKET_BYTES, RamPacket,
    Stream, StreamError,
};
use crate::sync::Ordering::Relaxed;
use crate::sync::AtomicU64;
use crate::sys::socket::Socket;

/// Where a channel stands between two barriers. Its thread writes, and the controller reads.
#[derive(Debug, Default)]
pub struct Standing {
    /// SYNCs that have come, in bits 32 to 62; packets with pages that have come since, in bits 0 to 31; and
    /// [`CLOSED`]. One word: of a packet that comes and of RAM that closes, one sees the other.
    word: AtomicU64,
    /// SYNCs that have been passed on.
    passed: AtomicU64,
    /// How often it has begun to pass something on, and was done with it: odd while it waits for the destination, and not
    /// for the source.
    turns: AtomicU64,
}

/// Where a channel stood. No number falls: what is alike in two looks was so all the time between them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Look {
    /// SYNCs that had come.
    pub syncs: u64,
    /// SYNCs that had been passed on.
    pub passed: u64,
    turns: u64,
}

impl Look {
    /// Whether it waited for the destination.
    pub fn is_sending(&self) -> bool {
        self.turns % 2 == 1
    }
}

/// RAM is complete.
const CLOSED: u64 = 1 << 63;
const SYNC: u64 = 1 << 32;

impl Standing {
    /// SYNCs that have come.
    pub fn syncs(&self) -> u64 {
        (self.word.load(Relaxed) & !CLOSED) / SYNC
    }

    /// SYNCs that have been passed on, with the pages before them.
    pub fn passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    /// Where it stands.
    pub fn look(&self) -> Look {
        Look { syncs: self.syncs(), passed: self.passed(), turns: self.turns.load(Relaxed) }
    }

    /// RAM is complete, and no packet of it passes any more; the SYNCs that have come, and the packets behind the last.
    pub fn close(&self) -> (u64, u64) {
        let word = self.word.fetch_or(CLOSED, Relaxed) & !CLOSED;
        (word / SYNC, word % SYNC)
    }

    /// A RAM packet has come; false if none may.
    fn take(&self, is_sync: bool) -> bool {
        // Nobody else changes the low bits.
        let before = self.word.load(Relaxed) % SYNC;
        let more = if is_sync { SYNC - before } else { u64::from(before < SYNC - 1) };
        self.word.fetch_add(more, Relaxed) & CLOSED == 0
    }
}

/// The two ends of a connection.
#[derive(Debug)]
pub struct Ends {
    pub source: Arc<Socket>,
    pub destination: Arc<Socket>,
}

impl Interrupt for Ends {
    fn interrupt(&self) {
        self.source.shutdown();
        self.destination.shutdown();
    }
}

/// Why a channel has stopped.
#[derive(Debug)]
pub enum Stopped {
    /// One of its connections is lost.
    Lost(String),
    /// The source has sent what may not be passed on.
    Wrong(String),
}

impl From<StreamError> for Stopped {
    fn from(e: StreamError) -> Stopped {
        Stopped::Wrong(e.to_string())
    }
}

/// Passes one channel on, from behind its first packet, to its end.
pub struct Lane {
    pub init: [u8; INIT_BYTES],
    /// Its first packet, which has been read, and not been passed on.
    pub first: Box<[u8; RAM_PACKET_BYTES]>,
    pub dialect: Dialect,
    pub ends: Arc<Ends>,
    pub blocks: Arc<Vec<Block>>,
    pub standing: Arc<Standing>,
    pub progress: Progress,
    /// Rung when a SYNC has been passed on.
    pub controller: Ringer<PollSleeper>,
}

/// Bytes that are held: a packet of the usual kind, and its header.
const BUFFER_BYTES: usize = RAM_PACKET_BYTES + (512 << 10);

impl Role for Lane {
    const KIND: &'static str = "relay";
    /// `Ok` where the source has ended the channel between two packets.
    type Output = Result<(), Stopped>;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.ends.clone()
    }

    fn run(self, cx: &mut Cx) -> Result<(), Stopped> {
        let mut decoder = ChannelDecoder::new(self.dialect);
        let mut init = &self.init[..];
        while decoder.pull(&mut init)?.is_some() {}
        let progress = self.progress.clone();
        let counts = progress.cells(cx.id());
        let mut buffer = vec![0; BUFFER_BYTES];
        buffer[..RAM_PACKET_BYTES].copy_from_slice(&self.first[..]);
        // Bytes in the buffer, those of them that the decoder has seen, and those that may be passed on.
        let (mut filled, mut seen, mut approved) = (RAM_PACKET_BYTES, 0, 0);
        let mut in_sync = false;
        loop {
            let mut input = &buffer[seen..filled];
            while let Some(event) = decoder.pull(&mut input)? {
                approved += match event {
                    ChannelEvent::Init(_) => 0,
                    ChannelEvent::Ram(packet) => {
                        self.check(&packet, counts)?;
                        in_sync = packet.sync;
                        RAM_PACKET_BYTES
                    }
                    ChannelEvent::DeviceState(_) => {
                        in_sync = false;
                        PacketKind::DeviceState.header_bytes()
                    }
                    ChannelEvent::Data(data) => data.len(),
                };
            }
            self.pass_on(&buffer[..approved]).map_err(|e| Stopped::Lost(format!("the destination takes no more: {e}")))?;
            add(&counts.wire_bytes, approved as u64);
            // Pages of a SYNC packet come before its barrier.
            let passed = self.standing.syncs() - u64::from(in_sync && decoder.data_left() > 0);
            if passed != self.standing.passed.swap(passed, Relaxed) {
                self.controller.ring();
            }
            // What is left is the beginning of a header.
            buffer.copy_within(approved..filled, 0);
            (filled, approved) = (filled - approved, 0);
            seen = filled;
            match self.ends.source.recv(&mut buffer[filled..]) {
                Ok(0) => return Ok(decoder.finish()?),
                Ok(n) => filled += n,
                Err(e) => return Err(Stopped::Lost(format!("nothing more comes from the source: {e}"))),
            }
        }
    }
}

impl Lane {
    /// Compares a packet with the list of blocks, and counts it.
    fn check(&self, packet: &RamPacket<'_>, counts: &ChannelCells) -> Result<(), Stopped> {
        if let Some(name) = packet.block {
            let block = self.blocks.iter().find(|block| block.name.as_str() == name).ok_or_else(|| {
                let fault = Fault::Unknown {
                    what: "the RAM block of a packet",
                    name: name.to_owned(),
                    expected: "one that the main connection has named",
                };
                StreamError { stream: Stream::Channel, at: packet.at.saturating_add(64), fault }
            })?;
            packet.check_inside(block.bytes)?;
        }
        // QEMU 7.2 sends an empty packet behind a SYNC that had pages.
        let says_something = packet.sync || packet.block.is_some();
        if says_something && !self.standing.take(packet.sync) {
            return Err(Stopped::Wrong("a packet of RAM came behind the last barrier".to_owned()));
        }
        add(&counts.payload_bytes, packet.normal.len() as u64 * PAGE_BYTES);
        add(&counts.zero_bytes, packet.zero.len() as u64 * PAGE_BYTES);
        add(&counts.packets, 1);
        Ok(())
    }

    /// Sends everything on a blocking socket.
    fn pass_on(&self, mut bytes: &[u8]) -> io::Result<()> {
        self.standing.turns.fetch_add(1, Relaxed);
        while !bytes.is_empty() {
            let sent = self.ends.destination.send(bytes)?;
            bytes = &bytes[sent..];
        }
        self.standing.turns.fetch_add(1, Relaxed);
        Ok(())
    }
}
