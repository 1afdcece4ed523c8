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
    overruns: 0,
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

/// A world of pages in motion: two channels, so that copies of a page can overtake each other.
const ROUNDS: Bounds = Bounds { channels: 2, writes: 1, live_rounds: 2, ring_slots: 3, wire_slots: 2, ..LEAST };

#[test]
fn rounds_overtake_each_other_and_nothing_is_lost() {
    let writes = if cfg!(debug_assertions) { 1 } else { 2 };
    explore("2 pages over 2 rounds", Bounds { pages: 2, writes, ..ROUNDS });
}

#[test]
fn three_rounds_before_the_pause_lose_nothing() {
    let writes = if cfg!(debug_assertions) { 1 } else { 2 };
    explore("1 page over 3 rounds", Bounds { writes, live_rounds: 3, ..ROUNDS });
}

#[test]
fn what_save_state_writes_arrives() {
    let writes = if cfg!(debug_assertions) { 0 } else { 2 };
    explore("writes while paused", Bounds { writes, save_writes: 1, ..ROUNDS });
}

#[test]
fn journals_keep_what_has_not_landed() {
    let one_round = Bounds { live_rounds: 1, ..ROUNDS };
    explore("3 epochs", Bounds { epochs: 3, writes: 0, ..one_round.clone() });
    if !cfg!(debug_assertions) {
        explore("2 epochs and a write", Bounds { epochs: 2, ..one_round.clone() });
        explore("2 pages, an epoch and a write", Bounds { epochs: 1, pages: 2, ..one_round });
    }
}

#[test]
fn one_fault_at_any_moment_of_the_rounds_ends_in_the_truth() {
    let faults = Bounds { faults: 1, kinds: ALL_FAULTS, ..ROUNDS };
    explore("a fault among 2 pages", Bounds { pages: 2, live_rounds: 1, writes: 0, ..faults.clone() });
    if !cfg!(debug_assertions) {
        explore("a fault in 2 rounds and a write", faults.clone());
        explore("a fault and an epoch", Bounds { epochs: 1, live_rounds: 1, ..faults });
    }
}

#[test]
fn several_faults_in_the_hand_over_end_in_the_truth() {
    let faults = if cfg!(debug_assertions) { 2 } else { 3 };
    explore("hand-over", Bounds { save_writes: 1, faults, kinds: ALL_FAULTS, ..LEAST });
    explore("hand-over of 2 channels", Bounds { channels: 2, faults, kinds: ALL_FAULTS, ..LEAST });
}

#[test]
fn an_attempt_that_took_too_long_is_withdrawn_and_nothing_is_lost() {
    let again = Bounds { overruns: 1, writes: 1, ..LEAST };
    explore("a second attempt", Bounds { save_writes: 1, ..again.clone() });
    explore("a second attempt, 2 channels", Bounds { channels: 2, wire_slots: 2, ..again.clone() });
    if !cfg!(debug_assertions) {
        explore("a third attempt", Bounds { overruns: 2, writes: 2, ..again.clone() });
        explore("a fault around a second attempt", Bounds { faults: 1, kinds: ALL_FAULTS, ..again });
    }
}

/// What breaks when a rule is broken. The environment variable `PAGEFERRY_MODEL_PATHS` shows the way to it, step by step.
///
/// Breadth first, so that the way is short.
fn notices(mutant: Mutant, broken: &'static str, bounds: Bounds) {
    let begun = Instant::now();
    let only = HasDiscoveries::AnyOf([broken].into());
    let checker = Ferry(Bounds { mutant: Some(mutant), ..bounds }).checker().finish_when(only).spawn_bfs().join();
    let states = checker.unique_state_count();
    let path = checker.discovery(broken).unwrap_or_else(|| panic!("{mutant:?} went unnoticed in {states} states"));
    let actions = path.into_actions();
    eprintln!("{mutant:?}: {} steps to \"{broken}\", {states} states, {:.1?}", actions.len(), begun.elapsed());
    if std::env::var_os("PAGEFERRY_MODEL_PATHS").is_some() {
        actions.iter().for_each(|action| eprintln!("    {action:?}"));
    }
}

#[test]
fn a_dirty_bit_cleared_after_the_read_loses_a_write() {
    notices(Mutant::ClearAfterRead, oracle::NOTHING_LOST_ON_THE_WAY, Bounds { channels: 1, ..ROUNDS });
}

#[test]
fn a_write_marked_before_it_is_done_is_lost() {
    notices(Mutant::MarkBeforeWrite, oracle::NOTHING_LOST_ON_THE_WAY, Bounds { channels: 1, ..ROUNDS });
}

#[test]
fn a_barrier_that_ignores_a_lane_lets_an_old_copy_win() {
    notices(Mutant::BarrierIgnoresLane0, oracle::NOTHING_LOST_ON_THE_WAY, ROUNDS);
}

#[test]
fn a_journal_freed_at_flush_forgets_what_has_not_landed() {
    notices(Mutant::FreeAtFlush, oracle::JOURNAL_KEEPS, Bounds { epochs: 1, wire_slots: 2, ..LEAST });
}

#[test]
fn a_journal_written_after_the_send_forgets_what_is_in_the_hand() {
    notices(Mutant::JournalAfterSend, oracle::JOURNAL_KEEPS, Bounds { epochs: 1, wire_slots: 2, ..LEAST });
}

#[test]
fn an_epoch_applied_where_the_furthest_lane_is_frees_too_much() {
    let bounds = Bounds { epochs: 1, writes: 0, live_rounds: 1, ..ROUNDS };
    notices(Mutant::AllLanesAsTheFurthest, oracle::JOURNAL_KEEPS, bounds);
}

#[test]
fn a_target_that_runs_on_loaded_makes_two_owners() {
    notices(Mutant::RunOnLoaded, oracle::ONE_OWNER, Bounds { faults: 1, kinds: ALL_FAULTS, ..LEAST });
}

#[test]
fn a_source_that_resumes_after_commit_makes_two_owners() {
    notices(Mutant::ResumeAfterCommit, oracle::ONE_OWNER, Bounds { faults: 1, kinds: ALL_FAULTS, ..LEAST });
}

#[test]
fn a_final_sent_too_early_makes_honest_digests_differ() {
    notices(Mutant::FinalBeforeDrained, oracle::DIGESTS_AGREE, Bounds { save_writes: 1, ..LEAST });
}

#[test]
fn what_save_state_writes_is_lost_without_another_harvest() {
    notices(Mutant::NoHarvestAfterSave, oracle::RUNS_WHAT_WAS, Bounds { save_writes: 1, ..LEAST });
}

#[test]
fn a_commit_past_the_gate_breaks_a_cancel_that_was_accepted() {
    notices(Mutant::CommitPastTheGate, oracle::CANCEL_IS_KEPT, Bounds { faults: 1, kinds: &[Fault::Cancel], ..LEAST });
}

#[test]
fn a_running_said_before_it_is_true_completes_falsely() {
    notices(Mutant::RunningBeforeRun, oracle::COMPLETED_IS_TRUE, LEAST);
}

#[test]
fn rounds_before_the_answer_to_a_withdrawn_final_land_under_load_state() {
    notices(Mutant::RoundsBeforeTheAnswer, oracle::LOADS_IN_PEACE, Bounds { overruns: 1, writes: 1, ..LEAST });
}

#[test]
fn a_target_that_misses_the_end_of_the_connection_hangs() {
    notices(Mutant::NobodyAtTheTarget, oracle::NOBODY_HANGS, Bounds { faults: 1, kinds: &[Fault::Crash], ..LEAST });
}
