//! A store: a folder that holds a stopped QEMU guest, its RAM in a file a block and the state of its devices as it came.
//!
//! ```text
//! DIR/manifest.json            what is here, and whence: `Manifest`
//! DIR/device.state             the end of the main stream, verbatim, from the first section of a device on
//! DIR/blocks/00-pc.ram.ram     one RAM block, sparse: holes are zeros
//! ```
//!
//! A [`Writer`] builds it under another name beside DIR; DIR itself is there only when all of it is on the disk. A
//! [`Reader`] trusts nothing that it finds.

mod digest;
mod leftovers;
mod manifest;
mod names;
mod reader;
#[cfg(test)]
mod tests;
mod writeback;
mod writer;

pub use digest::contents;
pub use manifest::{Counters, Manifest, Uuid};
pub use reader::Reader;
pub use writer::{Facts, Stored, Writer};

/// The manifest's name in a store.
const MANIFEST: &str = "manifest.json";

/// The name of the device state in a store.
const TAIL: &str = "device.state";

/// The folder of the RAM blocks in a store.
const BLOCKS: &str = "blocks";

/// QEMU's page. RAM blocks are whole pages.
const PAGE_BYTES: u64 = 4096;
