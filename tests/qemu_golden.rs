//! Bytes that a running QEMU made, read and written again.
//!
//! `tests/qemu_golden` holds them: a QEMU 10.0.13 of Debian 13 (pc-q35-10.0, 128 MiB, 3 channels) migrated a guest that
//! kept writing. `main.raw` is its main stream from the first byte to the last, `chN_init.bin` the first 64 bytes of
//! channel N, `chN_packetK.bin` the headers of its first packets, without the pages.

#![cfg(not(loom))]
#![cfg(feature = "qemu")]
#![forbid(unsafe_code)]

#[path = "qemu_golden/channels.rs"]
mod channels;
#[path = "qemu_golden/main_stream.rs"]
mod main_stream;
#[path = "qemu_golden/order.rs"]
mod order;
#[path = "qemu_golden/refusals.rs"]
mod refusals;
#[path = "support/qemu_streams.rs"]
mod streams;
