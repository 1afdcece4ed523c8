//! QEMU's migration stream, as pure functions over bytes. No I/O, no clock, no threads.
//!
//! All numbers are big-endian and nothing is aligned. One migration is a main connection and, with multifd, 1 to 255
//! channels beside it:
//!
//! - the main connection carries [`Record`]s from the source: a [`MainDecoder`] reads them, a [`MainEncoder`] writes
//!   them. If the source opens the return path, [`ReturnMessage`]s come back on the same connection;
//! - a channel begins with an [`InitPacket`]; then packets follow, each a header of fixed length and its data: RAM
//!   ([`RamPacket`]) or the state of a device ([`DevicePacket`]). A [`ChannelDecoder`] reads all of it.
//!
//! Which channel a page travels on says nothing about its age. What orders two copies of a page is the barrier, and the
//! main connection says where it is: see [`Barrier`].
//!
//! **Stricter than QEMU.** What QEMU takes without a look is refused here: offsets that are not aligned, a page twice
//! in a packet, unknown flags, reserved bytes that are not zero, records out of order. Every [`StreamError`] says on
//! which stream, at which byte, what was found there and what was expected. Nothing that the peer sends can make a
//! function here panic. A decoder holds one record at most, of 64 KiB or less, and the list of RAM blocks; pages, packet
//! data and device state are handed through in the pieces they come in.
//!
//! Guest pages are 4096 bytes here. The state of devices is opaque: it is kept as it came.

#![forbid(unsafe_code)]

mod channel;
mod codec;
mod collect;
mod device;
mod dialect;
mod error;
mod init;
mod main;
mod name;
mod packet;
mod return_path;

pub use channel::{ChannelDecoder, ChannelEvent};
pub use device::{DEVICE_DATA_BYTES_MAX, DEVICE_PACKET_BYTES, DevicePacket};
pub use dialect::{Barrier, Dialect};
pub use error::{Fault, Stream, StreamError};
pub use init::{INIT_BYTES, InitPacket};
pub use main::{
    BLOCKS_MAX, Block, Command, MainDecoder, MainEncoder, PACKAGED_BYTES_MAX, Record, Subsection, VMDESC_BYTES_MAX,
};
pub use name::{NAME_BYTES_MAX, Name};
pub use packet::{
    COMMON_BYTES, COMPRESSED_BYTES_MAX, Compression, NewRamPacket, Offsets, PACKET_PAGES_MAX, PacketKind,
    RAM_PACKET_BYTES, RamPacket, packet_kind,
};
pub use return_path::{ReturnDecoder, ReturnMessage};

/// Bytes of a guest page.
pub const PAGE_BYTES: u64 = 4096;

/// The first four bytes of the main connection. Whatever begins otherwise is a channel.
pub const MAIN_MAGIC: [u8; 4] = *b"QEVM";
