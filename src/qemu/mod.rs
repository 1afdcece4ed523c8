//! QEMU's live migration, spoken by this library: its [`wire`], and [`Qemu`], which lets a
//! [`Source`](crate::Source) or a [`Target`](crate::Target) speak it.

#![forbid(unsafe_code)]

pub mod compress;
mod framing;
pub mod relay;
mod seen;
mod source;
mod target;
pub mod wire;

pub use framing::Qemu;
pub use seen::{Counts, Facts, Seen};
