//! What the fuzz targets do with an input: plain functions, which panic on a finding. `tests/fuzz_corpus.rs` calls them
//! with every input of the corpus.

// A fuzz target uses one of them, the test all.
#![allow(dead_code)]

#[path = "../../support/qemu_checks.rs"]
mod checks;
mod control;
mod frames;
mod guarded;
mod hello;
mod packet;
mod peer;
#[path = "../../support/qemu_plans.rs"]
mod plans;
mod qemu_channel;
mod qemu_main;
#[cfg(feature = "cli")]
mod qemu_pack;
#[path = "../../support/script.rs"]
mod script;
mod source_session;
mod source_wire;
#[cfg(feature = "cli")]
mod store;
#[path = "../../support/qemu_streams.rs"]
mod streams;
mod target_session;
mod target_wire;
#[path = "../../support/wire_checks.rs"]
mod wire_checks;

/// A fuzz target: what a bin in `fuzz_targets` and a folder in `corpus` are named after, and what it does. It gives a word
/// for how far the input led.
pub type Target = (&'static str, fn(&[u8]) -> &'static str);

/// The word for a migration that was going on when the script was over.
pub const OPEN: &str = "open";

/// All of them; without the feature `cli` all that need neither compression nor the program's own files.
pub const TARGETS: &[Target] = &[
    ("packet", packet::run),
    ("control", control::run),
    ("hello", hello::run),
    ("target_session", target_session::run),
    ("source_session", source_session::run),
    ("target_wire", target_wire::run),
    ("source_wire", source_wire::run),
    ("qemu_main", qemu_main::run),
    ("qemu_channel", qemu_channel::run),
    #[cfg(feature = "cli")]
    ("qemu_pack", qemu_pack::run),
    #[cfg(feature = "cli")]
    ("qemu_store", store::run),
];

/// Runs the target of this name.
pub fn run(name: &str, input: &[u8]) -> &'static str {
    let (_, run) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of this name");
    run(input)
}
