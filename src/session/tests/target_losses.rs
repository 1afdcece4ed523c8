//! The target's session by hand: lanes that fail, are retired and join again, and blocks that differ.

use super::target::At::{self, AwaitChannels, AwaitCommit, AwaitLanes, Checking, Live, Loading, Starting};
use super::target::{ALL, connected, ends, frame, is_breach, lane_failed, last, moved, session, state, told_failure};
use super::{Named, join, joined, lost, named, retired};
use crate::error::{Failure, Outcome};
use crate::session::REPAIRS_MAX;
use crate::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use crate::units::{BlockId, Epoch, Round};
use crate::wire::control::{Final, SourceFrame, TargetFrame};

fn arrives((channel, generation): Named) -> TargetEvent {
    TargetEvent::ChannelConnected { channel, generation }
}

fn send(frame: TargetFrame) -> TargetAction {
    TargetAction::Send(frame)
}

fn retires(channel: Named) -> Vec<TargetAction> {
    vec![TargetAction::RetireLane { channel: channel.0 }, send(retired(channel))]
}

fn starts(channel: Named) -> Vec<TargetAction> {
    vec![TargetAction::StartLane { channel: channel.0 }, send(joined(channel))]
}

/// Where a ChannelLost may find the target.
const CARRYING: [At; 5] = [AwaitChannels, Live, AwaitLanes, Checking, AwaitCommit];

/// A session of which channel 1 was retired while pages landed.
fn down_to_one() -> TargetSession {
    let mut session = session(Live);
    session.on(frame(lost(named(1, 1))));
    session
}

#[test]
fn a_lane_that_fails_stays_in_the_set_until_the_source_says_that_it_is_lost() {
    for at in [Live, AwaitLanes, Checking, AwaitCommit] {
        let mut session = session(at);
        let (channel, generation) = named(1, 1);
        let told = TargetFrame::ChannelFailed { channel, generation, reason: "reset".to_owned() };
        assert_eq!(session.on(lane_failed()), [send(told)], "{at:?}");
        assert!(!session.is_ended());
    }
    let mut session = session(Live);
    session.on(lane_failed());
    assert_eq!(session.on(moved(0, 2, 2)), [], "the others wait for it");
}

#[test]
fn a_lost_lane_has_ended_before_the_source_is_told_so() {
    for at in CARRYING {
        assert_eq!(session(at).on(frame(lost(named(1, 1)))), retires(named(1, 1)), "{at:?}");
    }
}

#[test]
fn only_what_is_in_the_set_or_was_announced_can_be_lost_and_once() {
    for at in CARRYING {
        for wrong in [named(1, 2), named(2, 1)] {
            assert!(is_breach(&ends(at, frame(lost(wrong)))), "{wrong:?} at {at:?}");
        }
        let mut twice = session(at);
        twice.on(frame(lost(named(1, 1))));
        assert!(is_breach(&twice.on(frame(lost(named(1, 1))))), "{at:?}");
    }
    for at in ALL.into_iter().filter(|at| !CARRYING.contains(at) && *at != Starting) {
        assert!(is_breach(&ends(at, frame(lost(named(1, 1))))), "{at:?}");
    }
}

#[test]
fn lanes_start_without_a_channel_that_never_came() {
    let mut session = session(AwaitChannels);
    session.on(connected(1));
    let actions = session.on(frame(lost(named(0, 1))));
    assert_eq!(actions, [retires(named(0, 1)), vec![TargetAction::StartLanes]].concat());
    assert_eq!(session.on(connected(0)), [], "too late: it comes again with a higher generation");
    // The last one that could have come does not start a set of none.
    let mut none = super::target::session(AwaitChannels);
    none.on(frame(lost(named(0, 1))));
    assert_eq!(none.on(frame(lost(named(1, 1)))), retires(named(1, 1)));
}

#[test]
fn what_the_others_were_kept_from_by_a_lost_lane_is_done_when_it_is_retired() {
    let mut session = session(Live);
    assert_eq!(session.on(moved(0, 1, 2)), []);
    let applied = TargetFrame::EpochApplied { epoch: Epoch(1), lanes: vec![named(0, 1)] };
    assert_eq!(session.on(frame(lost(named(1, 1)))), [retires(named(1, 1)), vec![send(applied)]].concat());
    session.on(state(0, 3));
    session.on(moved(0, 2, 2));
    let one = Final { lanes: vec![named(0, 1)], ..last() };
    let checks = [TargetAction::Pong { nonce: 0 }, TargetAction::Check(one.clone())];
    assert_eq!(session.on(frame(SourceFrame::Final(one))), checks);
}

#[test]
fn with_no_lane_left_nothing_counts_as_applied_or_passed() {
    let mut session = session(Live);
    session.on(moved(0, 9, 9));
    session.on(frame(lost(named(0, 1))));
    assert_eq!(session.on(frame(lost(named(1, 1)))), retires(named(1, 1)));
    session.on(state(0, 3));
    let none = Final { lanes: Vec::new(), ..last() };
    assert_eq!(session.on(frame(SourceFrame::Final(none))), [], "nobody has passed its round");
}

#[test]
fn a_final_behind_which_a_channel_is_lost_is_dropped_and_another_one_comes() {
    for at in [AwaitLanes, Checking, AwaitCommit] {
        let mut session = session(at);
        session.on(frame(lost(named(1, 1))));
        // What was being checked was for the Final of before.
        assert_eq!(session.on(TargetEvent::Checked(Check::Agrees)), [], "{at:?}");
        assert!(is_breach(&session.clone().on(frame(SourceFrame::Commit))), "there is nothing to commit to: {at:?}");
        assert_eq!(session.on(moved(0, 3, 0)), []);
        let again = Final { round: Round(2), lanes: vec![named(0, 1)], ..last() };
        let checks = [TargetAction::Pong { nonce: 0 }, TargetAction::Check(again.clone())];
        assert_eq!(session.on(frame(SourceFrame::Final(again))), checks, "the state is still here: {at:?}");
        assert_eq!(session.on(TargetEvent::Checked(Check::Agrees)), [TargetAction::LoadState]);
        let loaded = TargetFrame::Loaded { round: Round(2) };
        assert_eq!(session.on(TargetEvent::StateLoaded(Ok(()))), [send(loaded)]);
    }
}

#[test]
fn a_check_that_ends_after_its_final_was_replaced_says_nothing() {
    let mut waiting = session(Checking);
    waiting.on(frame(lost(named(1, 1))));
    waiting.on(frame(SourceFrame::Final(Final { round: Round(2), lanes: vec![named(0, 1)], ..last() })));
    assert_eq!(waiting.on(TargetEvent::Checked(Check::Agrees)), [], "lane 0 has not passed round 2");
    assert_eq!(session(AwaitCommit).on(TargetEvent::Checked(Check::Agrees)), []);
}

#[test]
fn a_channel_comes_back_when_both_its_connection_and_the_word_of_it_have_come() {
    let mut word_first = down_to_one();
    assert_eq!(word_first.on(frame(join(named(1, 2)))), []);
    assert_eq!(word_first.on(arrives(named(1, 2))), starts(named(1, 2)));
    let mut connection_first = down_to_one();
    assert_eq!(connection_first.on(arrives(named(1, 2))), []);
    assert_eq!(connection_first.on(frame(join(named(1, 2)))), starts(named(1, 2)));
    for session in [&mut word_first, &mut connection_first] {
        assert_eq!(session.generation(named(1, 2).0), named(1, 2).1);
        assert!(!session.expects(named(1, 3).0, named(1, 3).1));
        // It counts as having passed nothing until its first marks say more.
        assert_eq!(session.on(moved(0, 3, 3)), []);
        let applied = TargetFrame::EpochApplied { epoch: Epoch(1), lanes: vec![named(0, 1), named(1, 2)] };
        assert_eq!(session.on(moved(1, 3, 2)), [send(applied)]);
    }
}

#[test]
fn a_generation_at_or_below_the_retired_one_never_comes_back() {
    let mut session = down_to_one();
    assert_eq!(session.on(arrives(named(1, 1))), []);
    assert!(is_breach(&session.clone().on(frame(join(named(1, 1))))));
    session.on(frame(join(named(1, 4))));
    session.on(frame(lost(named(1, 4))));
    for old in [named(1, 2), named(1, 3), named(1, 4)] {
        assert!(!session.expects(old.0, old.1));
        assert!(is_breach(&session.clone().on(frame(join(old)))), "{old:?}");
    }
    session.on(frame(join(named(1, 5))));
    assert_eq!(session.on(arrives(named(1, 5))), starts(named(1, 5)));
}

#[test]
fn a_channel_that_is_in_the_set_or_announced_or_unknown_cannot_be_announced() {
    for wrong in [named(0, 2), named(2, 2)] {
        assert!(is_breach(&down_to_one().on(frame(join(wrong)))), "{wrong:?}");
    }
    let mut twice = down_to_one();
    twice.on(frame(join(named(1, 2))));
    assert!(is_breach(&twice.on(frame(join(named(1, 3))))));
    for at in ALL.into_iter().filter(|at| *at != Live && *at != Starting) {
        assert!(is_breach(&ends(at, frame(join(named(1, 2))))), "{at:?}");
    }
}

#[test]
fn one_that_was_announced_and_given_up_is_retired_like_any_other() {
    let mut session = down_to_one();
    session.on(frame(join(named(1, 2))));
    assert_eq!(session.on(frame(lost(named(1, 2)))), retires(named(1, 2)));
    assert_eq!(session.on(arrives(named(1, 2))), [], "its connection comes too late");
    // A newer connection that was there before is not taken for it.
    let mut newer = down_to_one();
    newer.on(arrives(named(1, 3)));
    assert_eq!(newer.on(frame(join(named(1, 2)))), []);
    newer.on(frame(lost(named(1, 2))));
    assert_eq!(newer.on(frame(join(named(1, 3)))), starts(named(1, 3)));
}

#[test]
fn a_connection_that_comes_while_no_pages_land_is_turned_away() {
    for at in [AwaitLanes, Checking, Loading, AwaitCommit] {
        assert!(!session(at).expects(named(1, 2).0, named(1, 2).1), "{at:?}");
        assert_eq!(session(at).on(arrives(named(1, 2))), [], "{at:?}");
    }
}

fn differs(chunk_digests: Vec<u64>) -> TargetEvent {
    TargetEvent::Checked(Check::Differs { block: BlockId(2), chunk_digests })
}

#[test]
fn a_block_that_differs_is_named_and_travels_again() {
    let mut session = session(Checking);
    let mismatch = TargetFrame::DigestMismatch { round: Round(1), block: BlockId(2), chunk_digests: vec![1, 2] };
    assert_eq!(session.on(differs(vec![1, 2])), [send(mismatch)]);
    assert_eq!(session.mismatches(), 1);
    let chunks = vec![(BlockId(2), 0)];
    assert_eq!(session.on(frame(SourceFrame::Repair { round: Round(2), chunks })), []);
    session.on(moved(0, 3, 0));
    session.on(moved(1, 3, 0));
    let again = Final { round: Round(2), ..last() };
    let checks = [TargetAction::Pong { nonce: 0 }, TargetAction::Check(again.clone())];
    assert_eq!(session.on(frame(SourceFrame::Final(again))), checks);
    assert_eq!(session.on(TargetEvent::Checked(Check::Agrees)), [TargetAction::LoadState]);
}

#[test]
fn a_repair_comes_only_while_pages_may_land() {
    for at in ALL.into_iter().filter(|at| *at != Live && *at != Starting) {
        let repair = SourceFrame::Repair { round: Round(1), chunks: Vec::new() };
        assert!(is_breach(&ends(at, frame(repair))), "{at:?}");
    }
}

#[test]
fn what_sending_again_would_not_mend_is_given_up() {
    // What was sent is what landed, and RAM differs all the same.
    let actions = ends(Checking, differs(Vec::new()));
    assert_eq!(*told_failure(&actions), Failure::Digest { block: BlockId(2), chunks: Vec::new() });
    // Nor what has been mended too often.
    let mut session = session(Checking);
    let mut actions = session.on(differs(vec![1]));
    for repair in 1..=REPAIRS_MAX {
        assert!(!session.is_ended(), "{repair}");
        session.on(frame(SourceFrame::Final(last())));
        actions = session.on(differs(vec![1]));
    }
    assert!(matches!(actions.last(), Some(TargetAction::End(Outcome::Failed(Failure::Digest { .. })))), "{actions:?}");
}
