//! Explores both sessions as they ship, with everything around them that can interleave, fail or die.
//!
//! The sessions, the journal's rules and the barrier's decision are the code of the library. The drivers, workers,
//! lanes and the guest around them are modelled here step by step, and an onlooker compares versions of pages. Each
//! configuration is explored to its end; each mutant breaks one rule, and a property must notice.
#![cfg(not(loom))]
#![forbid(unsafe_code)]

#[path = "model/broken.rs"]
mod broken;
#[path = "model/link.rs"]
mod link;
#[path = "model/losses.rs"]
mod losses;
#[path = "model/mutants.rs"]
mod mutants;
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
use world::{Bounds, Fault};

const ALL_FAULTS: &[Fault] =
    &[Fault::Crash, Fault::Cut, Fault::ChannelDeath, Fault::Deadline, Fault::Hook, Fault::Cancel];

/// One page, one channel, one round: the least that a hand-over needs.
const LEAST: Bounds = Bounds {
    pages: 1,
    channels: 1,
    writes: 0,
    save_writes: 0,
    overruns: 0,
    live_rounds: 1,
    epochs: 0,
    ring_slots: 2,
    wire_slots: 1,
    under_way: false,
    redials: 0,
    resumes: 0,
    patient: false,
    survives: false,
    slow_checks: false,
    faults: 0,
    kinds: &[],
    mutant: None,
};

/// Whether there is time for the larger worlds, which take minutes: if the environment variable `PAGEFERRY_MODEL_LARGE` is
/// set, as `tests/soak model` does.
fn large() -> bool {
    std::env::var_os("PAGEFERRY_MODEL_LARGE").is_some()
}

/// Explores every state within the bounds, and expects every property to hold.
fn explore(name: &str, bounds: Bounds) {
    let begun = Instant::now();
    let checker = Ferry(bounds).checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    let (states, steps, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    eprintln!("{name}: {states} states, {steps} steps, {depth} deep, {:.1?}", begun.elapsed());
    checker.assert_properties();
}

/// A world of pages in motion: two channels, so that copies of a page can overtake each other.
const ROUNDS: Bounds = Bounds { channels: 2, writes: 1, live_rounds: 2, ring_slots: 3, wire_slots: 2, ..LEAST };

#[test]
fn rounds_overtake_each_other_and_nothing_is_lost() {
    let writes = if large() { 2 } else { 1 };
    let live_rounds = if large() { 2 } else { 1 };
    explore("2 pages", Bounds { pages: 2, writes, live_rounds, ..ROUNDS });
}

#[test]
fn three_rounds_before_the_pause_lose_nothing() {
    let writes = if large() { 2 } else { 1 };
    explore("1 page over 3 rounds", Bounds { writes, live_rounds: 3, ..ROUNDS });
}

#[test]
fn what_save_state_writes_arrives() {
    let writes = if large() { 2 } else { 0 };
    explore("writes while paused", Bounds { writes, save_writes: 1, ..ROUNDS });
}

#[test]
fn journals_keep_what_has_not_landed() {
    let one_round = Bounds { live_rounds: 1, ..ROUNDS };
    explore("2 epochs", Bounds { epochs: 2, writes: 0, ..one_round.clone() });
    if large() {
        explore("3 epochs", Bounds { epochs: 3, writes: 0, ..one_round.clone() });
        explore("2 epochs and a write", Bounds { epochs: 2, ..one_round.clone() });
        explore("2 pages, an epoch and a write", Bounds { epochs: 1, pages: 2, ..one_round });
    }
}

#[test]
fn one_fault_at_any_moment_of_the_rounds_ends_in_the_truth() {
    let faults = Bounds { faults: 1, kinds: ALL_FAULTS, ..ROUNDS };
    explore("a fault in a round", Bounds { live_rounds: 1, writes: 0, ..faults.clone() });
    if large() {
        explore("a fault among 2 pages", Bounds { pages: 2, live_rounds: 1, writes: 0, ..faults.clone() });
        explore("a fault in 2 rounds and a write", faults.clone());
        explore("a fault and an epoch", Bounds { epochs: 1, live_rounds: 1, ..faults });
    }
}

#[test]
fn several_faults_in_the_hand_over_end_in_the_truth() {
    let faults = if large() { 3 } else { 2 };
    explore("hand-over", Bounds { save_writes: 1, faults, kinds: ALL_FAULTS, ..LEAST });
    if large() {
        explore("hand-over of 2 channels", Bounds { channels: 2, faults, kinds: ALL_FAULTS, ..LEAST });
    }
}

#[test]
fn an_attempt_that_took_too_long_is_withdrawn_and_nothing_is_lost() {
    let again = Bounds { overruns: 1, writes: 1, ..LEAST };
    explore("a second attempt", Bounds { save_writes: 1, ..again.clone() });
    if large() {
        explore("a second attempt, 2 channels", Bounds { channels: 2, wire_slots: 2, ..again.clone() });
        explore("a third attempt", Bounds { overruns: 2, writes: 2, ..again.clone() });
        explore("a fault around a second attempt", Bounds { faults: 1, kinds: ALL_FAULTS, ..again });
    }
}

/// Rounds in which channels may die: whatever happens to them must not end the migration.
const FAILOVER: Bounds = Bounds {
    under_way: true,
    survives: true,
    writes: 0,
    live_rounds: 1,
    faults: 1,
    kinds: &[Fault::ChannelDeath],
    ..ROUNDS
};

#[test]
fn a_channel_dies_at_any_moment_and_the_other_carries_on() {
    explore("1 of 2 channels dies", FAILOVER);
    explore("1 of 2 is taken for dead", Bounds { kinds: &[Fault::Stall], ..FAILOVER });
    if large() {
        explore("1 of 2 dies, and a write", Bounds { writes: 1, ..FAILOVER });
        explore("1 of 2 is taken for dead, and a write", Bounds { writes: 1, kinds: &[Fault::Stall], ..FAILOVER });
        explore("1 of 2 dies, and an epoch", Bounds { epochs: 1, ..FAILOVER });
        explore("1 of 2 dies, 2 pages", Bounds { pages: 2, ..FAILOVER });
    }
}

#[test]
fn a_channel_that_died_comes_back_and_carries_again() {
    explore("1 of 2 dies and comes back", Bounds { redials: 1, ..FAILOVER });
    if large() {
        explore("1 of 2 dies and comes back, and a write", Bounds { redials: 1, writes: 1, ..FAILOVER });
        explore("1 of 2 dies and comes back, and an epoch", Bounds { redials: 1, epochs: 1, ..FAILOVER });
    }
}

#[test]
fn the_last_channel_dies_and_comes_back() {
    let one = Bounds { channels: 1, redials: 1, ..FAILOVER };
    explore("the only channel dies", Bounds { writes: 1, save_writes: 1, ..one.clone() });
    explore("the only channel dies, and an epoch", Bounds { epochs: 1, ..one.clone() });
    let twice = Bounds { faults: 2, redials: 2, ..one.clone() };
    explore("the only channel dies twice", twice.clone());
    if large() {
        explore("the only channel dies twice, and a write", Bounds { writes: 1, ..twice });
        explore("the only channel dies, an epoch and writes", Bounds { writes: 1, save_writes: 1, epochs: 1, ..one });
        explore("both channels die", Bounds { faults: 2, redials: 2, ..FAILOVER });
    }
}

#[test]
fn a_channel_dies_around_an_attempt_that_is_withdrawn() {
    let one = Bounds { channels: 1, redials: 1, overruns: 1, ..FAILOVER };
    explore("a death and an overrun", one.clone());
    if large() {
        explore("a death, an overrun and a write", Bounds { writes: 1, ..one });
        explore("a death of 1 of 2 and an overrun", Bounds { overruns: 1, ..FAILOVER });
    }
}

#[test]
fn a_channel_dies_while_a_final_is_checked_slowly() {
    explore("a death and slow checks", Bounds { channels: 1, redials: 1, slow_checks: true, ..FAILOVER });
    if large() {
        explore("a death of 1 of 2 and slow checks", Bounds { slow_checks: true, ..FAILOVER });
    }
}

/// Everything is lost, and comes back.
const RESUME: Bounds = Bounds {
    under_way: true,
    survives: true,
    patient: true,
    writes: 1,
    redials: 1,
    resumes: 1,
    wire_slots: 2,
    faults: 1,
    kinds: &[Fault::Cut],
    ..LEAST
};

#[test]
fn all_connections_are_lost_at_any_moment_and_the_session_goes_on() {
    explore("all is lost", RESUME);
    explore("all is lost, 2 pages", Bounds { pages: 2, ring_slots: 3, writes: 0, ..RESUME });
    explore("all is lost, and slow checks", Bounds { slow_checks: true, writes: 0, ..RESUME });
    if large() {
        explore("all is lost, 2 pages and a write", Bounds { pages: 2, ring_slots: 3, ..RESUME });
        explore("all is lost, and an overrun", Bounds { overruns: 1, ..RESUME });
        explore("all is lost, and an epoch", Bounds { epochs: 1, save_writes: 1, ..RESUME });
        explore("all is lost, 2 channels", Bounds { channels: 2, redials: 2, writes: 0, ..RESUME });
        explore("all is lost, 2 channels, and a write", Bounds { channels: 2, redials: 2, ..RESUME });
    }
}

#[test]
fn a_session_is_taken_up_as_often_as_it_is_lost() {
    let twice = Bounds { faults: 2, resumes: 2, redials: 2, ..RESUME };
    explore("all is lost twice", Bounds { writes: 0, ..twice.clone() });
    let kinds = &[Fault::Cut, Fault::ChannelDeath];
    if large() {
        explore("all is lost twice, and a write", twice.clone());
        explore("a death, and all is lost", Bounds { kinds, ..twice });
    }
}

#[test]
fn a_hand_over_with_a_window_has_one_owner_and_an_answer() {
    // With whom the window ends is not said: either side may lose patience at any moment.
    let any = Bounds { survives: false, patient: false, writes: 0, kinds: ALL_FAULTS, ..RESUME };
    explore("any fault, with a window", any.clone());
    explore("a target that is put back", Bounds { kinds: &[Fault::PutBack], ..any.clone() });
    if large() {
        explore("any fault and a write, with a window", Bounds { writes: 1, ..any.clone() });
        explore("any 2 faults, with a window", Bounds { faults: 2, resumes: 2, ..any.clone() });
        explore("any 3 faults, with a window", Bounds { faults: 3, resumes: 2, ..any.clone() });
        explore("any fault of 2 channels, with a window", Bounds { channels: 2, redials: 2, ..any });
    }
}

#[test]
fn what_was_damaged_is_repaired() {
    let damage = Bounds { under_way: true, survives: true, faults: 1, kinds: &[Fault::Damage], ..LEAST };
    explore("damage", Bounds { writes: 1, ..damage.clone() });
    explore("damage of 2 pages on 2 channels", Bounds { channels: 2, pages: 2, ring_slots: 3, ..damage.clone() });
    explore("damage twice", Bounds { faults: 2, writes: 1, ..damage.clone() });
    explore("damage and an overrun", Bounds { overruns: 1, ..damage.clone() });
    let both = Bounds { faults: 2, redials: 2, wire_slots: 2, ..damage };
    explore("damage and a death", Bounds { kinds: &[Fault::Damage, Fault::ChannelDeath], ..both.clone() });
    let lost = Bounds { kinds: &[Fault::Damage, Fault::Cut], resumes: 2, patient: true, ..both };
    explore("damage, and all is lost", lost);
}
