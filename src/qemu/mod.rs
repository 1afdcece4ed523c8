//! QEMU's live migration, spoken by this library: so far its [`wire`], and how pages on it are [compressed](compress).

#![forbid(unsafe_code)]

pub mod compress;
pub mod wire;
