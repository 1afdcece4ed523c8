#![forbid(unsafe_code)]
//! The relay's workers: each carries what comes on one connection on to another, and lets nothing pass that makes no
//! sense.

use std::io;
use std::sync::{Arc, OnceLock};

use super::super::seen::{Counts, Seen};
use super::super::wire::{
    Block, COMMON_BYTES, COMPRESSED_BYTES_MAX, DEVICE_PACKET_BYTES, DevicePacket, Dialect, MAIN_MAGIC, MainDecoder,
    PacketKind, RAM_PACKET_BYTES, RamPacket, Record, ReturnDecoder, ReturnMessage, packet_kind,
};
use crate::bell::{Ringer, Wake};
use crate::crew::{Cx, Interrupt, Role};
use crate::net::Stream;
use crate::poll::PollSleeper;
use crate::sync::Ordering::Relaxed;
use crate::sync::{AtomicBool, AtomicU64};
use crate::sys::socket::Socket;

/// What all workers know together.
#[derive(Debug)]
pub(super) struct Shared {
    pub seen: Seen,
    /// The RAM blocks, once the source has listed them.
    pub blocks: OnceLock<Vec<Block>>,
    pub return_path: AtomicBool,
    /// Whether the main stream has come to where it may end.
    pub whole: AtomicBool,
    /// The destination's last word, plus one; 0 while it has not said it.
    pub shut: AtomicU64,
    /// Bytes that were carried, over all connections: to see whether anything moves.
    pub moved: AtomicU64,
    pub controller: Ringer<PollSleeper>,
}

impl Shared {
    pub fn new(controller: Ringer<PollSleeper>) -> Shared {
        Shared {
            seen: Seen::default(),
            blocks: OnceLock::new(),
            return_path: AtomicBool::new(false),
            whole: AtomicBool::new(false),
            shut: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            controller,
        }
    }
}

/// What a worker carries.
#[derive(Debug)]
pub(super) enum Freight {
    /// A channel.
    Channel,
    /// The main stream, from the source.
    Forth,
    /// The return path, from the destination.
    Back,
}

/// A worker of the relay: reads from one connection and writes to another.
#[derive(Debug)]
pub(super) struct Carrier {
    pub freight: Freight,
    pub from: Stream,
    pub to: Stream,
    pub shared: Arc<Shared>,
}

/// How a carrier ended. It keeps its connections: what the destination finds closed, it takes for ended.
#[derive(Debug)]
pub(super) struct Carried {
    pub result: Result<(), Stop>,
    _connections: (Stream, Stream),
}

/// Why a carrier ended early.
#[derive(Debug)]
pub(super) enum Stop {
    Aborted,
    /// The bytes that came make no sense, or end in the middle of something: why.
    Refused(String),
    Io {
        doing: &'static str,
        source: io::Error,
    },
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Aborted => f.write_str("stopped on request"),
            Stop::Refused(why) => f.write_str(why),
            Stop::Io { doing, source } => write!(f, "{doing}: {source}"),
        }
    }
}

/// Ends both of a carrier's system calls.
struct HangUp(Arc<Socket>, Arc<Socket>);

impl Interrupt for HangUp {
    fn interrupt(&self) {
        self.0.shutdown();
        self.1.shutdown();
    }
}

impl Role for Carrier {
    const KIND: &'static str = "relay";
    type Output = Carried;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(HangUp(self.from.socket().clone(), self.to.socket().clone()))
    }

    fn run(mut self, cx: &mut Cx) -> Carried {
        let result = match self.freight {
            Freight::Channel => self.channel(cx),
            Freight::Forth => self.forth(),
            Freight::Back => self.back(),
        };
        // An abort shuts the sockets down under a call: that is the abort, not a failure of the network.
        let result = if cx.aborted() { result.map_err(|_| Stop::Aborted) } else { result };
        Carried { result, _connections: (self.from, self.to) }
    }
}

/// The largest piece that is carried at once: a packet and its pages.
const PIECE_BYTES: usize = RAM_PACKET_BYTES + COMPRESSED_BYTES_MAX as usize;
/// What is read at once of a connection that has no packets.
const MAIN_PIECE_BYTES: usize = 64 << 10;

impl Carrier {
    /// Packet by packet: none goes on before it is here and found good.
    fn channel(&mut self, cx: &mut Cx) -> Result<(), Stop> {
        let mut piece = vec![0; PIECE_BYTES];
        let (mut at, mut dialect) = (super::super::wire::INIT_BYTES as u64, None);
        self.shared.seen.count(&Counts { channel_bytes: at, ..Counts::default() });
        while self.fill(&mut piece[..COMMON_BYTES], true)? {
            let common = piece.first_chunk::<COMMON_BYTES>().copied().unwrap_or_default();
            let kind = packet_kind(&common, at).map_err(refused)?;
            self.fill(&mut piece[COMMON_BYTES..kind.header_bytes()], false)?;
            let bytes = match kind {
                PacketKind::Ram => {
                    let header: [u8; RAM_PACKET_BYTES] = *piece.first_chunk().unwrap_or(&[0; RAM_PACKET_BYTES]);
                    let dialect = *dialect.get_or_insert_with(|| Dialect::of_first_packet(&header));
                    let packet = RamPacket::decode(&header, dialect, at).map_err(refused)?;
                    self.check_block(&packet, cx)?;
                    let counts = Counts {
                        normal_pages: packet.normal.len() as u64,
                        zero_pages: packet.zero.len() as u64,
                        sync_packets: packet.sync.into(),
                        ..Counts::default()
                    };
                    let whole = RAM_PACKET_BYTES + packet.data_bytes as usize;
                    self.fill(&mut piece[RAM_PACKET_BYTES..whole], false)?;
                    self.shared.seen.count(&counts);
                    self.pass(&piece[..whole])?;
                    whole as u64
                }
                PacketKind::DeviceState => {
                    let header: [u8; DEVICE_PACKET_BYTES] = *piece.first_chunk().unwrap_or(&[0; DEVICE_PACKET_BYTES]);
                    let packet = DevicePacket::decode(&header, at).map_err(refused)?;
                    self.pass(&header)?;
                    let mut left = packet.data_bytes as usize;
                    while left > 0 {
                        let some = left.min(PIECE_BYTES);
                        self.fill(&mut piece[..some], false)?;
                        self.pass(&piece[..some])?;
                        left -= some;
                    }
                    (DEVICE_PACKET_BYTES + packet.data_bytes as usize) as u64
                }
            };
            at += bytes;
            self.shared.seen.count(&Counts { channel_bytes: bytes, ..Counts::default() });
        }
        Ok(())
    }

    /// Whether the packet's pages lie in a block of the source's list, which may still be on its way.
    fn check_block(&self, packet: &RamPacket<'_>, cx: &mut Cx) -> Result<(), Stop> {
        let Some(name) = packet.block else { return Ok(()) };
        let blocks = loop {
            match self.shared.blocks.get() {
                Some(blocks) => break blocks,
                None => match cx.bell().wait() {
                    Wake::Abort | Wake::Drain => return Err(Stop::Aborted),
                    Wake::Rung | Wake::Elsewhere => {}
                },
            }
        };
        let Some(block) = blocks.iter().find(|block| block.name.as_str() == name) else {
            let name = crate::wire::printable(name);
            return Err(Stop::Refused(format!("byte {}: it names RAM block {name}, which does not exist", packet.at)));
        };
        packet.check_inside(block.bytes).map_err(refused)
    }

    fn forth(&mut self) -> Result<(), Stop> {
        let mut decoder = MainDecoder::new(Dialect::V10_0);
        // These have been said to the destination when it was connected.
        decoder.pull(&mut &MAIN_MAGIC[..]).map_err(refused)?;
        self.shared.seen.count(&Counts { main_bytes: MAIN_MAGIC.len() as u64, ..Counts::default() });
        let mut piece = vec![0; MAIN_PIECE_BYTES];
        loop {
            let n = self.receive(&mut piece)?;
            if n == 0 {
                decoder.finish().map_err(refused)?;
                self.shared.whole.store(true, Relaxed);
                self.to.end_sending();
                return Ok(());
            }
            let mut counts = Counts { main_bytes: n as u64, ..Counts::default() };
            let mut input = &piece[..n];
            while let Some(record) = decoder.pull(&mut input).map_err(refused)? {
                self.note(&record, &mut counts);
            }
            self.shared.return_path.store(decoder.return_path_is_open(), Relaxed);
            self.shared.seen.count(&counts);
            self.pass(&piece[..n])?;
        }
    }

    fn note(&self, record: &Record<'_>, counts: &mut Counts) {
        match record {
            Record::Blocks(blocks) => {
                // The list comes once.
                let _ = self.shared.blocks.set(blocks.clone());
                self.shared.controller.ring();
            }
            Record::Page { .. } => counts.normal_pages += 1,
            Record::ZeroPage { .. } => counts.zero_pages += 1,
            Record::Flush => counts.barriers += 1,
            Record::Tail(_) => self.shared.whole.store(false, Relaxed),
            Record::TailWhole => self.shared.whole.store(true, Relaxed),
            _ => {}
        }
    }

    fn back(&mut self) -> Result<(), Stop> {
        let mut decoder = ReturnDecoder::new();
        let mut piece = vec![0; 4096];
        loop {
            let n = self.receive(&mut piece)?;
            if n == 0 {
                decoder.finish().map_err(refused)?;
                return Ok(());
            }
            let (mut input, mut shut) = (&piece[..n], None);
            while let Some(message) = decoder.pull(&mut input).map_err(refused)? {
                if let ReturnMessage::Shut { error } = message {
                    shut = Some(error);
                }
            }
            self.pass(&piece[..n])?;
            if let Some(error) = shut {
                // Once the source has been told.
                self.shared.shut.store(u64::from(error) + 1, Relaxed);
                self.shared.controller.ring();
            }
        }
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<usize, Stop> {
        self.from.recv(into).map_err(|source| Stop::Io { doing: "receiving", source })
    }

    /// Receives so much; false if the stream ends right here, where it may.
    fn fill(&mut self, mut into: &mut [u8], may_end: bool) -> Result<bool, Stop> {
        let wanted = into.len();
        while !into.is_empty() {
            match self.receive(into)? {
                0 if may_end && into.len() == wanted => return Ok(false),
                0 => return Err(Stop::Refused(format!("it ends within a packet, {} bytes early", into.len()))),
                n => into = &mut into[n..],
            }
        }
        Ok(true)
    }

    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), Stop> {
        while !bytes.is_empty() {
            let n = self.to.send(bytes).map_err(|source| Stop::Io { doing: "passing it on", source })?;
            self.shared.moved.fetch_add(n as u64, Relaxed);
            bytes = &bytes[n..];
        }
        Ok(())
    }
}

fn refused(e: super::super::wire::StreamError) -> Stop {
    Stop::Refused(e.to_string())
}
