#![forbid(unsafe_code)]
//! One multifd channel: a thread that reads a packet's header, looks at it, and passes it on with its data.

use std::io;
use std::sync::{Arc, OnceLock};

use crate::bell::Wake;
use crate::crew::{Cx, Interrupt, Role};
use crate::qemu::wire::{
    Block, COMMON_BYTES, ChannelDecoder, ChannelEvent, Dialect, Fault, INIT_BYTES, PacketKind, RAM_PACKET_BYTES,
    RamPacket, Stream, StreamError, packet_kind,
};
use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;
use crate::sys::socket::Socket;

/// What all connections of a migration know.
#[derive(Debug, Default)]
pub struct Shared {
    /// The RAM blocks, once the main connection has named them.
    pub blocks: OnceLock<Vec<Block>>,
    /// Which QEMU the source is: the first channel's first packet says so.
    pub dialect: OnceLock<Dialect>,
}

/// What a channel has passed on.
#[derive(Debug, Default)]
pub struct Counts {
    pub bytes: AtomicU64,
    pub normal_pages: AtomicU64,
    pub zero_pages: AtomicU64,
    pub syncs: AtomicU64,
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

/// Passes one channel on, from behind its first 64 bytes, to its end.
pub struct Lane {
    pub init: [u8; INIT_BYTES],
    pub ends: Arc<Ends>,
    pub shared: Arc<Shared>,
    pub counts: Arc<Counts>,
}

/// Bytes that are held: a packet of the usual kind, and its header.
const BUFFER_BYTES: usize = RAM_PACKET_BYTES + (512 << 10);

impl Role for Lane {
    const KIND: &'static str = "relay";
    /// `Ok` where the source has ended the channel between two packets.
    type Output = Result<(), String>;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.ends.clone()
    }

    fn run(self, cx: &mut Cx) -> Result<(), String> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let Some(dialect) = self.first_packet(&mut buffer[..RAM_PACKET_BYTES])? else { return Ok(()) };
        let known = *self.shared.dialect.get_or_init(|| dialect);
        if dialect != known {
            return Err(format!("its first packet is of {dialect:?}, and that of another channel of {known:?}"));
        }
        let mut decoder = ChannelDecoder::new(dialect);
        let mut init = &self.init[..];
        while decoder.pull(&mut init).map_err(|e| e.to_string())?.is_some() {}
        // Bytes in the buffer, those of them that the decoder has not seen, and those that may be passed on.
        let (mut filled, mut seen, mut approved) = (RAM_PACKET_BYTES, 0, 0);
        loop {
            let mut input = &buffer[seen..filled];
            while let Some(event) = decoder.pull(&mut input).map_err(|e| e.to_string())? {
                approved += match event {
                    ChannelEvent::Init(_) => 0,
                    ChannelEvent::Ram(packet) => {
                        self.check(&packet, cx)?;
                        RAM_PACKET_BYTES
                    }
                    ChannelEvent::DeviceState(_) => PacketKind::DeviceState.header_bytes(),
                    ChannelEvent::Data(data) => data.len(),
                };
            }
            send_all(&self.ends.destination, &buffer[..approved])
                .map_err(|e| format!("the destination takes no more: {e}"))?;
            self.counts.bytes.fetch_add(approved as u64, Relaxed);
            // What is left is the beginning of a header.
            buffer.copy_within(approved..filled, 0);
            (filled, approved) = (filled - approved, 0);
            seen = filled;
            match self.ends.source.recv(&mut buffer[filled..]) {
                Ok(0) => return decoder.finish().map_err(|e| e.to_string()),
                Ok(n) => filled += n,
                Err(e) => return Err(format!("nothing more comes from the source: {e}")),
            }
        }
    }
}

impl Lane {
    /// Reads the header of the first packet, which says which dialect this is; `None` if there is no packet.
    fn first_packet(&self, header: &mut [u8]) -> Result<Option<Dialect>, String> {
        let mut filled = 0;
        while filled < header.len() {
            match self.ends.source.recv(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => {
                    let (message, wanted) = ("header of a packet", (header.len() - filled) as u64);
                    let fault = Fault::CutShort { message, wanted };
                    return Err(StreamError { stream: Stream::Channel, at: INIT_BYTES as u64, fault }.to_string());
                }
                Ok(n) => filled += n,
                Err(e) => return Err(format!("nothing comes from the source: {e}")),
            }
            // A packet of another kind is shorter, and not waited for.
            if let Some(common) = header[..filled].first_chunk::<COMMON_BYTES>() {
                if packet_kind(common, INIT_BYTES as u64).map_err(|e| e.to_string())? != PacketKind::Ram {
                    return Err("its first packet is no SYNC".to_owned());
                }
            }
        }
        Ok(header.first_chunk().map(Dialect::of_first_packet))
    }

    /// Compares a packet with the list of blocks, for which it waits.
    fn check(&self, packet: &RamPacket<'_>, cx: &mut Cx) -> Result<(), String> {
        if let Some(name) = packet.block {
            let blocks = loop {
                if let Some(blocks) = self.shared.blocks.get() {
                    break blocks;
                }
                if cx.bell().wait() == Wake::Abort {
                    return Err("the relay has ended".to_owned());
                }
            };
            let block = blocks.iter().find(|block| block.name.as_str() == name).ok_or_else(|| {
                let fault = Fault::Unknown {
                    what: "the RAM block of a packet",
                    name: name.to_owned(),
                    expected: "one that the main connection has named",
                };
                StreamError { stream: Stream::Channel, at: packet.at + 64, fault }.to_string()
            })?;
            packet.check_inside(block.bytes).map_err(|e| e.to_string())?;
        }
        self.counts.normal_pages.fetch_add(packet.normal.len() as u64, Relaxed);
        self.counts.zero_pages.fetch_add(packet.zero.len() as u64, Relaxed);
        self.counts.syncs.fetch_add(packet.sync.into(), Relaxed);
        Ok(())
    }
}

/// Sends everything on a blocking socket.
fn send_all(to: &Socket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = to.send(bytes)?;
        bytes = &bytes[sent..];
    }
    Ok(())
}
