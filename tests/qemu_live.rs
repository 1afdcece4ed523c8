//! Real QEMU at both ends: a guest that counts goes through `pageferry`, and must not notice.
//!
//! The guest prints number after number on its serial port and looks into its RAM with each. What the source printed and
//! what the destination prints must make one count without a break, and the RAM that arrives must be that of the source,
//! byte for byte. Everything runs under TCG: no /dev/kvm is needed. `tests/run qemu` runs what begins with `real_qemu`,
//! and `tests/soak qemu` all combinations.
#![cfg(all(not(loom), feature = "cli"))]
#![forbid(unsafe_code)]

#[path = "support/files.rs"]
mod files;
#[path = "support/program.rs"]
mod program;
mod support;

#[path = "qemu_live/case.rs"]
mod case;
#[path = "qemu_live/forwarder.rs"]
mod forwarder;
#[path = "qemu_live/guest.rs"]
mod guest;
#[path = "qemu_live/machine.rs"]
mod machine;
#[path = "qemu_live/qmp.rs"]
mod qmp;
#[path = "qemu_live/real_qemu/mod.rs"]
mod real_qemu;
#[path = "qemu_live/serial.rs"]
mod serial;
