//! Pages that QEMU compressed, and pages compressed for QEMU.
//!
//! A compressor lives as long as its channel: [`Compression::Zlib`] is one zlib stream a channel, which a sync flush cuts
//! at the end of each packet; [`Compression::Zstd`] is one zstd frame a channel, cut by a flush. Neither ends, not even
//! with the migration. So the packets of a channel go through one [`Inflate`] or one [`Deflate`], each of them, in their
//! order; a packet without normal pages has no data and does not go through it.
//!
//! **Stricter than QEMU.** The data of a packet must give the bytes of its pages, not one more or less, and a stream that
//! ends, wants a dictionary or breaks its checksum is refused. What a peer can make a decompressor hold is bounded: 32 KiB
//! for zlib, [`ZSTD_WINDOW_BYTES_MAX`] and some 300 KiB for zstd.
//!
//! Without the feature `qemu-compression` the types are here, and no value of them can be had. With it, zlib is zlib-rs,
//! in Rust; zstd is libzstd, which is C.

#![forbid(unsafe_code)]

mod error;
#[cfg(feature = "qemu-compression")]
mod deflate;
#[cfg(feature = "qemu-compression")]
mod inflate;
#[cfg(not(feature = "qemu-compression"))]
mod none;

#[cfg(feature = "qemu-compression")]
pub use deflate::Deflate;
pub use error::{PackError, PackFault};
#[cfg(feature = "qemu-compression")]
pub use inflate::Inflate;
#[cfg(not(feature = "qemu-compression"))]
pub use none::{Deflate, Inflate};

#[cfg(feature = "qemu-compression")]
use super::wire::{COMPRESSED_BYTES_MAX, Compression};
use super::wire::{PACKET_PAGES_MAX, PAGE_BYTES};

/// Most bytes of the pages of a packet: 512 KiB.
pub const PACKET_BYTES_MAX: usize = PACKET_PAGES_MAX * PAGE_BYTES as usize;

/// Most bytes that a zstd frame may make its reader remember. QEMU's highest level, 20, wants these 32 MiB; its default
/// wants 512 KiB.
pub const ZSTD_WINDOW_BYTES_MAX: usize = 32 << 20;

/// What is wrong with the length of what a packet's pages are, or are to be put into.
#[cfg(feature = "qemu-compression")]
fn check_pages(method: Compression, bytes: usize) -> Result<(), PackError> {
    if bytes > 0 && bytes <= PACKET_BYTES_MAX && bytes % PAGE_BYTES as usize == 0 {
        return Ok(());
    }
    Err(PackError { method, at: 0, fault: PackFault::Pages { bytes } })
}

/// What is wrong with the length of a packet's data.
#[cfg(feature = "qemu-compression")]
fn check_data(method: Compression, bytes: usize) -> Result<(), PackError> {
    let limit = COMPRESSED_BYTES_MAX as usize;
    if (1..=limit).contains(&bytes) {
        return Ok(());
    }
    Err(PackError { method, at: 0, fault: PackFault::Data { bytes, limit } })
}
