//! QEMU's live migration, spoken by this library: so far its [`wire`].

#![forbid(unsafe_code)]

pub mod wire;
