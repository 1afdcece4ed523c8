//! Where dirty pages are learned of.

pub mod bitmap;
#[cfg(not(loom))]
pub mod combined;
pub mod runs;
#[cfg(not(loom))]
pub mod write_protect;
