//! Finds the packets of a multifd channel in bytes that come in pieces of any size.

#![forbid(unsafe_code)]

use super::device::{DEVICE_PACKET_BYTES, DevicePacket};
use super::dialect::Dialect;
use super::error::{Fault, Stream, StreamError};
use super::init::{INIT_BYTES, InitPacket};
use super::packet::{COMMON_BYTES, PacketKind, RAM_PACKET_BYTES, RamPacket, packet_kind};

/// What came on a channel.
#[derive(Clone, PartialEq, Debug)]
pub enum ChannelEvent<'a> {
    /// The first packet.
    Init(InitPacket),
    /// The header of a RAM packet, not yet compared with its block.
    Ram(RamPacket<'a>),
    /// The header of a packet with the state of a device.
    DeviceState(DevicePacket),
    /// The next bytes of the data of the packet before.
    Data(&'a [u8]),
}

/// What the next bytes are.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Next {
    Init,
    Common,
    Header(PacketKind),
    Data(u64),
}

/// Takes the bytes of one channel, and gives what is in them. It holds one header; data is handed through.
///
/// An error is final: nothing after it can be told apart from damage, so every later call returns it again.
///
/// ```
/// use pageferry::qemu::wire::{ChannelDecoder, ChannelEvent, Dialect, InitPacket, NewRamPacket};
///
/// let mut stream = InitPacket { uuid: [0; 16], channel: 1 }.encode().to_vec();
/// stream.extend(NewRamPacket::sync(1).encode(Dialect::V10_0)?);
///
/// let mut decoder = ChannelDecoder::new(Dialect::V10_0);
/// let mut syncs = 0;
/// for mut piece in stream.chunks(100) {
///     while let Some(event) = decoder.pull(&mut piece)? {
///         syncs += usize::from(matches!(event, ChannelEvent::Ram(packet) if packet.sync));
///     }
/// }
/// decoder.finish()?;
/// assert_eq!(syncs, 1);
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Debug)]
pub struct ChannelDecoder {
    dialect: Dialect,
    next: Next,
    /// Bytes of the channel before the header that is being collected, or before the next byte of data.
    at: u64,
    header: [u8; RAM_PACKET_BYTES],
    filled: usize,
    failed: Option<StreamError>,
}

impl ChannelDecoder {
    /// Before the first byte of a channel.
    pub const fn new(dialect: Dialect) -> ChannelDecoder {
        ChannelDecoder { dialect, next: Next::Init, at: 0, header: [0; RAM_PACKET_BYTES], filled: 0, failed: None }
    }

    /// Takes bytes from the front of `input` until something is known, and returns it; `None` once `input` is used up.
    ///
    /// # Errors
    ///
    /// What is wrong with the stream: from then on, always the same.
    pub fn pull<'s, 'i: 's>(&'s mut self, input: &mut &'i [u8]) -> Result<Option<ChannelEvent<'s>>, StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if let Next::Data(left) = self.next {
            let Some(data) = take(input, left) else { return Ok(None) };
            self.data_taken(data.len() as u64);
            return Ok(Some(ChannelEvent::Data(data)));
        }
        loop {
            let wanted = match self.next {
                Next::Init => INIT_BYTES,
                Next::Common => COMMON_BYTES,
                Next::Header(kind) => kind.header_bytes(),
                Next::Data(_) => 0,
            };
            let Some(more) = take(input, (wanted - self.filled) as u64) else { return Ok(None) };
            self.header[self.filled..self.filled + more.len()].copy_from_slice(more);
            self.filled += more.len();
            if self.filled < wanted {
                return Ok(None);
            }
            if self.next != Next::Common {
                break;
            }
            match packet_kind(front(&self.header), self.at) {
                Ok(kind) => self.next = Next::Header(kind),
                Err(error) => return Err(self.failed.insert(error).clone()),
            }
        }
        let at = self.at;
        let decoded = match self.next {
            Next::Header(PacketKind::Ram) => {
                RamPacket::decode(&self.header, self.dialect, at).map(|p| (p.data_bytes, ChannelEvent::Ram(p)))
            }
            Next::Header(PacketKind::DeviceState) if self.dialect == Dialect::V10_0 => {
                let packet = DevicePacket::decode(front::<DEVICE_PACKET_BYTES>(&self.header), at);
                packet.map(|p| (p.data_bytes, ChannelEvent::DeviceState(p)))
            }
            Next::Header(PacketKind::DeviceState) => {
                let (what, expected) = ("a packet with device state", "RAM packets from QEMU 7.2");
                let fault = Fault::Unsupported { what, expected };
                Err(StreamError { stream: Stream::Channel, at: at.saturating_add(8), fault })
            }
            _ => InitPacket::decode(front(&self.header)).map(|init| (0, ChannelEvent::Init(init))),
        };
        match decoded {
            Ok((data_bytes, event)) => {
                self.at = at.saturating_add(self.filled as u64);
                self.filled = 0;
                self.next = if data_bytes > 0 { Next::Data(data_bytes.into()) } else { Next::Common };
                Ok(Some(event))
            }
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }

    /// Bytes of the packet's data that are still to come. A caller may take them from the connection itself, straight
    /// to where they belong, and say so with [`ChannelDecoder::data_taken`].
    pub const fn data_left(&self) -> u64 {
        match self.next {
            Next::Data(left) => left,
            _ => 0,
        }
    }

    /// So many of the bytes that were to come have been taken past this decoder; no more than
    /// [`ChannelDecoder::data_left`] count.
    pub const fn data_taken(&mut self, bytes: u64) {
        if let Next::Data(left) = self.next {
            let bytes = if bytes < left { bytes } else { left };
            self.at = self.at.saturating_add(bytes);
            self.next = if bytes < left { Next::Data(left - bytes) } else { Next::Common };
        }
    }

    /// Bytes of the channel so far.
    pub const fn at(&self) -> u64 {
        self.at.saturating_add(self.filled as u64)
    }

    /// The channel has ended.
    ///
    /// # Errors
    ///
    /// If it ended before or within a packet, or was wrong before. Whether anything was still to come is not known
    /// here: the barriers tell.
    pub fn finish(&self) -> Result<(), StreamError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (message, wanted) = match self.next {
            Next::Common if self.filled == 0 => return Ok(()),
            Next::Init => ("init packet", INIT_BYTES - self.filled),
            Next::Common => ("beginning of a packet", COMMON_BYTES - self.filled),
            Next::Header(kind) => ("header of a packet", kind.header_bytes() - self.filled),
            Next::Data(left) => ("data of a packet", usize::try_from(left).unwrap_or(usize::MAX)),
        };
        let fault = Fault::CutShort { message, wanted: wanted as u64 };
        Err(StreamError { stream: Stream::Channel, at: self.at(), fault })
    }
}

/// Takes up to `most` bytes from the front of `input`; `None` if it has none.
pub(super) fn take<'i>(input: &mut &'i [u8], most: u64) -> Option<&'i [u8]> {
    let length = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
    let (taken, rest) = input.split_at(length);
    *input = rest;
    if taken.is_empty() { None } else { Some(taken) }
}

/// The first bytes of a header that is all there.
fn front<const N: usize>(header: &[u8; RAM_PACKET_BYTES]) -> &[u8; N] {
    const { assert!(N <= RAM_PACKET_BYTES) };
    header.first_chunk().unwrap_or(&[0; N])
}
