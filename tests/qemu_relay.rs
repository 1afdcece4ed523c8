//! `qemu::relay` between made-up ends: what is refused does not reach the destination, nobody who is stuck holds it up, and
//! how it ended is never told better than it was.
#![cfg(all(not(loom), feature = "qemu"))]
#![forbid(unsafe_code)]

#[path = "qemu_relay/barriers.rs"]
mod barriers;
#[path = "qemu_relay/ends.rs"]
mod ends;
#[path = "qemu_relay/gathering.rs"]
mod gathering;
#[path = "qemu_relay/mutants.rs"]
mod mutants;
#[path = "qemu_relay/passing.rs"]
mod passing;
#[path = "qemu_relay/stuck.rs"]
mod stuck;
#[path = "qemu_relay/world.rs"]
mod world;

#[cfg(feature = "cli")]
#[path = "qemu_relay/by_program.rs"]
mod by_program;
#[cfg(feature = "cli")]
#[path = "support/program.rs"]
mod program;
