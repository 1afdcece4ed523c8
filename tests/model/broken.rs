//! Each rule broken in turn: a property must notice, and which one is part of the claim.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::mutants::Mutant;
use crate::rules::Ferry;
use crate::world::{Bounds, Fault};
use crate::{ALL_FAULTS, FAILOVER, LEAST, RESUME, ROUNDS, oracle};

/// What breaks when a rule is broken. The environment variable `PAGEFERRY_MODEL_PATHS` shows the way to it, step by step.
///
/// Breadth first, so that the way is short.
fn notices(mutant: Mutant, broken: &'static str, bounds: Bounds) {
    let begun = Instant::now();
    let only = HasDiscoveries::AnyOf([broken].into());
    let checker = Ferry(Bounds { mutant: Some(mutant), ..bounds }).checker().finish_when(only).spawn_bfs().join();
    report(mutant, broken, begun, &checker);
}

/// Depth first: where the way is long, and the world wide.
fn finds(mutant: Mutant, broken: &'static str, bounds: Bounds) {
    let begun = Instant::now();
    let only = HasDiscoveries::AnyOf([broken].into());
    let checker = Ferry(Bounds { mutant: Some(mutant), ..bounds }).checker().finish_when(only).spawn_dfs().join();
    report(mutant, broken, begun, &checker);
}

fn report(mutant: Mutant, broken: &'static str, begun: Instant, checker: &impl Checker<Ferry>) {
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

/// One channel, which dies once and comes back.
const ONE_DIES: Bounds = Bounds { channels: 1, redials: 1, ..FAILOVER };

#[test]
fn an_epoch_that_frees_the_journal_of_a_lane_it_does_not_name_forgets_what_was_lost() {
    notices(Mutant::FreeUnnamed, oracle::JOURNAL_KEEPS, Bounds { epochs: 1, ..FAILOVER });
}

#[test]
fn what_a_lost_channel_had_taken_is_lost_unless_it_is_given_back() {
    notices(Mutant::NoGiveBack, oracle::JOURNAL_KEEPS, ONE_DIES);
}

#[test]
fn what_was_left_in_the_ring_of_a_lost_channel_is_lost_unless_it_is_given_back() {
    notices(Mutant::RingForgotten, oracle::JOURNAL_KEEPS, ONE_DIES);
}

#[test]
fn what_is_given_back_into_the_round_that_is_being_filled_travels_twice_in_it() {
    finds(Mutant::GiveBackIntoThisRound, oracle::DIGESTS_AGREE, Bounds { writes: 1, ..FAILOVER });
}

#[test]
fn a_lane_that_is_retired_and_not_joined_lands_what_is_old() {
    let bounds = Bounds { writes: 1, kinds: &[Fault::Stall], ..FAILOVER };
    finds(Mutant::RetireWithoutJoin, oracle::RUNS_WHAT_WAS, bounds);
}

#[test]
fn lanes_that_nobody_wakes_when_a_lane_is_retired_wait_for_ever() {
    notices(Mutant::NoWakeAfterRetire, oracle::NOBODY_HANGS, FAILOVER);
}

#[test]
fn a_channel_that_begins_without_the_end_of_the_last_round_is_not_kept_in_step() {
    finds(Mutant::NoMarkOnRejoin, oracle::DIGESTS_AGREE, Bounds { redials: 1, live_rounds: 2, ..FAILOVER });
}

#[test]
fn a_loaded_for_a_final_that_was_void_commits_to_what_has_not_landed() {
    notices(Mutant::LateLoadedCounts, oracle::SURVIVES, ONE_DIES);
}

#[test]
fn an_epoch_that_frees_past_a_later_mark_forgets_what_came_after() {
    let bounds = Bounds { redials: 1, epochs: 2, ..FAILOVER };
    finds(Mutant::FreePastLaterMarks, oracle::JOURNAL_KEEPS, bounds);
}

#[test]
fn a_target_that_does_not_join_its_lanes_on_resume_lands_what_is_old() {
    finds(Mutant::ResumeWithoutJoin, oracle::RUNS_WHAT_WAS, RESUME);
}

#[test]
fn another_process_that_takes_the_session_up_has_not_its_memory() {
    let bounds = Bounds { epochs: 1, writes: 0, kinds: &[Fault::PutBack], survives: false, ..RESUME };
    notices(Mutant::ResumeByAnother, oracle::DIGESTS_AGREE, bounds);
}

#[test]
fn a_round_that_begins_anew_under_its_number_makes_honest_digests_differ() {
    notices(Mutant::RoundBeginsAnew, oracle::DIGESTS_AGREE, RESUME);
}

#[test]
fn what_was_outstanding_when_all_was_lost_is_lost_unless_it_is_given_back() {
    notices(Mutant::ResumeWithoutGiveBack, oracle::JOURNAL_KEEPS, RESUME);
}

#[test]
fn a_query_that_is_answered_before_the_fence_stands_makes_two_owners() {
    let bounds = Bounds { writes: 0, patient: false, survives: false, ..RESUME };
    notices(Mutant::AnswerBeforeDiscard, oracle::ONE_OWNER, bounds);
}

#[test]
fn a_query_without_an_answer_settles_nothing() {
    let bounds = Bounds { writes: 0, patient: false, survives: false, faults: 2, ..RESUME };
    notices(Mutant::NoAnswerIsNo, oracle::ONE_OWNER, bounds);
}

const DAMAGE: Bounds = Bounds { under_way: true, faults: 1, kinds: &[Fault::Damage], ..LEAST };

#[test]
fn damage_that_is_found_and_not_shipped_again_is_found_for_ever() {
    notices(Mutant::RepairNotShipped, oracle::SURVIVES, Bounds { survives: true, ..DAMAGE });
}

#[test]
fn damage_that_nobody_looks_for_is_run() {
    notices(Mutant::DigestIgnored, oracle::RUNS_WHAT_WAS, DAMAGE);
}

#[test]
fn a_connection_of_before_that_is_taken_for_the_new_one_carries_nothing() {
    notices(Mutant::AnyGeneration, oracle::NOBODY_HANGS, Bounds { faults: 2, redials: 2, ..ONE_DIES });
}

#[test]
fn an_epoch_that_a_retired_lane_held_up_is_owed_for_ever_if_nobody_looks_again() {
    notices(Mutant::NoLookAfterRetire, oracle::EPOCHS_ARE_TOLD, Bounds { epochs: 1, ..FAILOVER });
}
