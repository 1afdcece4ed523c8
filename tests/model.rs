//! Explores both sessions as they ship, with everything around them that can interleave, fail or die.
//!
//! The sessions, the journal's rules and the barrier's decision are the code of the library. The drivers, workers,
//! lanes and the guest around them are modelled here step by step, and an onlooker compares versions of pages. Each
//! configuration is explored to its end; each mutant breaks one rule, and a property must notice.
#![cfg(not(loom))]
#![forbid(unsafe_code)]

#[path = "model/link.rs"]
mod link;
#[path = "model/oracle.rs"]
mod oracle;
#[path = "model/rules.rs"]
mod rules;
#[path = "model/source_side.rs"]
mod source_side;
#[path = "model/target_side.rs"]
mod target_side;
#[path = "model/world.rs"]
mod world;

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use rules::Ferry;
use world::{Bounds, Fault, Mutant};

const ALL_FAULTS: &[Fault] =
    &[Fault::Crash, Fault::Cut, Fault::ChannelDeath, Fault::Deadline, Fault::Hook, Fault::Cancel];

/// One page, one channel, one round: the least that a hand-over needs.
const LEAST: Bounds = Bounds {
    pages: 1,
    channels: 1,
    writes: 0,
    save_writes: 0,
    live_rounds: 1,
    epochs: 0,
    ring_slots: 2,
    wire_slots: 1,
    faults: 0,
    kinds: &[],
    mutant: None,
};

/// Explores every state within the bounds, and expects every property to hold.
fn explore(name: &str, bounds: Bounds) {
    let begun = Instant::now();
    let checker = Ferry(bounds).checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    let (states, steps, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    eprintln!("{name}: {states} states, {steps} steps, {depth} deep, {:.1?}", begun.elapsed());
    checker.assert_properties();
}

#[test]
fn hand_over_with_faults() {
    explore("hand-over", Bounds { faults: 2, kinds: ALL_FAULTS, ..LEAST });
}

#[test]
fn pages_one() {
    explore("pages", Bounds { writes: 1, save_writes: 1, channels: 2, ring_slots: 3, wire_slots: 2, ..LEAST });
}
