//! The source's session by hand: channels that are lost and come back, and chunks that travel again.

use super::source::At::{self, AwaitGate, AwaitLanes, AwaitLoaded, AwaitReady, AwaitRunning, Live, Paused, Pausing};
use super::source::{ALL, ends, forget, frame, outcome, session, tells_of_breach};
use super::{Named, join, joined, lost, named, retired};
use crate::error::{Failure, Outcome};
use crate::session::REPAIRS_MAX;
use crate::session::source::{Facts, SourceAction, SourceEvent, SourceSession};
use crate::units::{BlockId, Epoch, Item, Round};
use crate::wire::control::{CHUNKS_PER_FRAME_MAX, SourceFrame, TargetFrame};

fn failed((channel, generation): Named) -> SourceEvent {
    SourceEvent::ChannelFailed { channel, generation, reason: "reset".to_owned() }
}

fn failed_there((channel, generation): Named) -> SourceEvent {
    frame(TargetFrame::ChannelFailed { channel, generation, reason: "reset".to_owned() })
}

fn opened((channel, generation): Named) -> SourceEvent {
    SourceEvent::ChannelOpened { channel, generation }
}

fn send(frame: SourceFrame) -> SourceAction {
    SourceAction::Send(frame)
}

/// What the loss of a channel comes to.
fn closes((channel, generation): Named) -> Vec<SourceAction> {
    let reason = "reset".to_owned();
    vec![SourceAction::CloseChannel { channel, generation, reason }, send(lost((channel, generation)))]
}

fn gives_back(channel: Named) -> Vec<SourceAction> {
    vec![SourceAction::GiveBack { channel: channel.0 }]
}

/// A session that has come this far, and has lost channel 1 and given it back on the way, while rounds were shipped.
fn down_to_one(at: At) -> SourceSession {
    let mut session = session(Live);
    session.on(failed(named(1, 1)));
    session.on(frame(retired(named(1, 1))));
    if at > Live {
        session.on(SourceEvent::RoundPushed);
        session.on(SourceEvent::SwitchOver);
    }
    if at > Pausing {
        session.on(SourceEvent::GuestPaused);
    }
    session
}

const SHIPPING: [At; 4] = [Live, Pausing, Paused, AwaitLoaded];

#[test]
fn whoever_notices_first_a_channel_is_lost_once_and_given_back_when_the_target_has_retired_it() {
    for at in SHIPPING {
        for (first, second) in [(failed, failed_there), (failed_there, failed)] as [(fn(Named) -> _, fn(Named) -> _); 2] {
            let mut session = session(at);
            assert_eq!(session.on(first(named(1, 1))), closes(named(1, 1)), "{at:?}");
            assert_eq!(session.on(second(named(1, 1))), [], "{at:?}");
            assert!(!session.is_live(named(1, 1).0) && !session.is_down(named(1, 1).0));
            assert_eq!(session.on(frame(retired(named(1, 1)))), gives_back(named(1, 1)), "{at:?}");
            assert_eq!(session.on(second(named(1, 1))), [], "a late word of it: {at:?}");
            assert!(session.is_down(named(1, 1).0) && !session.is_ended());
        }
    }
}

#[test]
fn a_channel_is_retired_once_and_only_if_it_was_lost() {
    for at in SHIPPING {
        assert!(tells_of_breach(&ends(at, frame(retired(named(1, 1))))), "{at:?}");
        let lost = || {
            let mut session = session(at);
            session.on(failed(named(1, 1)));
            session
        };
        for wrong in [named(0, 1), named(1, 2), named(2, 1)] {
            assert!(tells_of_breach(&lost().on(frame(retired(wrong)))), "{wrong:?} at {at:?}");
        }
        let mut twice = lost();
        twice.on(frame(retired(named(1, 1))));
        assert!(tells_of_breach(&twice.on(frame(retired(named(1, 1))))), "{at:?}");
    }
}

#[test]
fn a_word_of_a_channel_or_a_generation_that_is_not_there_costs_nothing() {
    for at in ALL.into_iter().filter(|at| *at > AwaitReady) {
        for stranger in [named(2, 1), named(0, 2)] {
            let mut session = session(at);
            assert_eq!(session.on(failed_there(stranger)), [], "{at:?}");
        }
    }
}

#[test]
fn no_channel_joins_or_fails_before_ready() {
    assert!(tells_of_breach(&ends(AwaitReady, frame(joined(named(0, 1))))));
    assert!(tells_of_breach(&ends(AwaitReady, failed_there(named(0, 1)))));
}

#[test]
fn rounds_start_with_the_channels_that_came() {
    let mut session = session(AwaitLanes);
    assert_eq!(session.on(failed(named(0, 1))), closes(named(0, 1)));
    assert_eq!(session.on(frame(joined(named(1, 1)))), []);
    let start = [gives_back(named(0, 1)), vec![SourceAction::StartRounds]].concat();
    assert_eq!(session.on(frame(retired(named(0, 1)))), start);
    // Its Joined may have crossed the word that it is lost.
    let mut crossed = super::source::session(AwaitLanes);
    crossed.on(failed(named(0, 1)));
    assert_eq!(crossed.on(frame(joined(named(0, 1)))), []);
    crossed.on(frame(retired(named(0, 1))));
    assert_eq!(crossed.on(frame(joined(named(1, 1)))), [SourceAction::StartRounds]);
}

#[test]
fn with_no_channel_at_all_nothing_begins() {
    let mut session = session(AwaitLanes);
    session.on(failed(named(0, 1)));
    let actions = session.on(failed(named(1, 1)));
    assert!(matches!(outcome(&actions), Outcome::Failed(Failure::Channel { .. })), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, SourceAction::Send(SourceFrame::Error(_)))));
}

#[test]
fn the_loss_of_all_channels_ends_nothing_once_rounds_have_begun() {
    for at in [Live, Pausing, Paused] {
        let mut session = session(at);
        for channel in [named(0, 1), named(1, 1)] {
            assert_eq!(session.on(failed(channel)), closes(channel));
            assert_eq!(session.on(frame(retired(channel))), gives_back(channel));
        }
        assert_eq!(session.live_channels(), 0);
        assert!(session.wants_channels() && session.channels_are_settled(), "{at:?}");
        assert_eq!(session.on(opened(named(0, 2))), [send(join(named(0, 2)))], "{at:?}");
    }
}

#[test]
fn a_channel_that_comes_back_begins_with_the_last_marks() {
    let mut session = down_to_one(Live);
    assert_eq!(session.on(opened(named(1, 2))), [send(join(named(1, 2)))]);
    assert!(session.joining().eq([named(1, 2)]) && !session.is_live(named(1, 2).0));
    // What is pushed before the target has answered counts too.
    session.on(SourceEvent::EpochDue);
    session.on(SourceEvent::RoundPushed);
    let (channel, generation) = named(1, 2);
    let start =
        SourceAction::StartChannel { channel, generation, round: Some(Round(0)), epoch: Some(Epoch(0)) };
    assert_eq!(session.on(frame(joined(named(1, 2)))), [start]);
    assert!(session.is_live(channel) && session.channels_are_settled());
    assert!(tells_of_breach(&session.on(frame(joined(named(1, 2))))), "it joins once");

    let mut at_once = down_to_one(Live);
    at_once.on(opened(named(1, 2)));
    let start = SourceAction::StartChannel { channel, generation, round: None, epoch: None };
    assert_eq!(at_once.on(frame(joined(named(1, 2)))), [start], "no round has ended, and no epoch was closed");
}

#[test]
fn a_channel_comes_back_with_a_higher_generation_and_only_when_it_is_down() {
    for wrong in [named(1, 1), named(0, 2), named(2, 2)] {
        let mut session = down_to_one(Live);
        assert_eq!(session.on(opened(wrong)), [SourceAction::HangUp { channel: wrong.0 }], "{wrong:?}");
        assert!(session.channels_are_settled());
    }
    let mut retiring = session(Live);
    retiring.on(failed(named(1, 1)));
    assert_eq!(retiring.on(opened(named(1, 2))), [SourceAction::HangUp { channel: named(1, 2).0 }]);
    assert_eq!(retiring.on(frame(retired(named(1, 1)))), gives_back(named(1, 1)));
}

#[test]
fn while_the_guest_stands_still_a_channel_comes_back_only_if_there_is_no_other() {
    for at in [Pausing, Paused] {
        let mut session = down_to_one(at);
        assert!(!session.wants_channels());
        assert_eq!(session.on(opened(named(1, 2))), [SourceAction::HangUp { channel: named(1, 2).0 }], "{at:?}");
        assert!(session.is_down(named(1, 2).0));
    }
}

#[test]
fn a_channel_that_has_not_joined_when_the_guest_is_paused_is_given_up() {
    let mut session = down_to_one(Live);
    session.on(opened(named(1, 2)));
    session.on(SourceEvent::RoundPushed);
    session.on(SourceEvent::SwitchOver);
    let actions = session.on(SourceEvent::GuestPaused);
    assert!(matches!(&actions[..], [SourceAction::CloseChannel { .. }, told] if *told == send(lost(named(1, 2)))));
    assert!(!session.channels_are_settled(), "Final waits for its end");
    assert_eq!(session.on(frame(joined(named(1, 2)))), [], "too late");
    session.on(frame(retired(named(1, 2))));
    assert!(session.channels_are_settled());
}

#[test]
fn an_epoch_frees_the_journals_of_those_it_names_and_not_those_known_to_be_lost() {
    let closed = || {
        let mut session = session(Live);
        session.on(SourceEvent::EpochDue);
        session
    };
    let applied = |lanes: &[Named]| frame(TargetFrame::EpochApplied { epoch: Epoch(0), lanes: lanes.to_vec() });
    let frees = |(channel, _): Named| SourceAction::FreeJournal { channel, through: Epoch(0) };
    let (zero, one) = (named(0, 1), named(1, 1));

    let mut crossed = closed();
    crossed.on(failed(one));
    assert_eq!(crossed.on(applied(&[zero, one])), [frees(zero)], "it crossed the word that channel 1 is lost");

    let mut gone = closed();
    gone.on(failed(one));
    gone.on(frame(retired(one)));
    assert!(tells_of_breach(&gone.clone().on(applied(&[zero, one]))), "its lane has ended");
    assert_eq!(gone.on(applied(&[zero])), [frees(zero)]);

    let back = || {
        let mut session = closed();
        session.on(failed(one));
        session.on(frame(retired(one)));
        session.on(opened(named(1, 2)));
        session
    };
    assert!(tells_of_breach(&back().on(applied(&[named(1, 2)]))), "it has not joined");
    let mut joined_again = back();
    joined_again.on(frame(joined(named(1, 2))));
    assert!(tells_of_breach(&joined_again.clone().on(applied(&[zero, one]))), "that was its connection before");
    assert_eq!(joined_again.on(applied(&[zero, named(1, 2)])), [frees(zero), frees(named(1, 2))]);
    for unknown in [named(2, 1), named(0, 2)] {
        assert!(tells_of_breach(&closed().on(applied(&[unknown]))), "{unknown:?}");
    }
}

/// A session that has lost channel 1 behind its Final.
fn voided() -> SourceSession {
    let mut session = session(AwaitLoaded);
    session.on(failed(named(1, 1)));
    session
}

fn mismatch() -> TargetFrame {
    TargetFrame::DigestMismatch { round: Round(1), block: BlockId(4), chunk_digests: vec![1] }
}

#[test]
fn what_is_said_of_a_final_behind_which_a_channel_was_lost_says_nothing() {
    for answer in [None, Some(TargetFrame::Loaded { round: Round(1) }), Some(mismatch())] {
        let mut session = voided();
        assert!(!session.awaits_loaded() && !session.is_paused());
        if let Some(answer) = answer.clone() {
            assert_eq!(session.on(frame(answer)), []);
        }
        assert_eq!(session.on(frame(retired(named(1, 1)))), gives_back(named(1, 1)), "{answer:?}");
        assert!(session.is_paused());
        // What came back travels in a round of its own, and a new Final names who is left.
        assert_eq!(session.on(SourceEvent::RoundPushed), [SourceAction::PushMark(Item::RoundEnd(Round(2)))]);
        let actions = session.on(SourceEvent::Drained(Facts::default()));
        let last = match &actions[..] {
            [SourceAction::Send(SourceFrame::Final(last))] => last,
            _ => panic!("{actions:?}"),
        };
        assert_eq!((last.round, &last.lanes[..]), (Round(2), &[named(0, 1)][..]));
        assert!(tells_of_breach(&session.clone().on(frame(TargetFrame::Loaded { round: Round(1) }))));
        assert_eq!(session.on(frame(TargetFrame::Loaded { round: Round(2) })), [SourceAction::AskCommit]);
    }
}

#[test]
fn a_final_is_void_until_the_last_lost_channel_is_retired() {
    let mut session = voided();
    session.on(failed(named(0, 1)));
    session.on(frame(retired(named(1, 1))));
    assert!(!session.is_paused(), "an answer may still be on its way");
    session.on(frame(retired(named(0, 1))));
    assert!(session.is_paused() && session.wants_channels());
}

#[test]
fn an_attempt_whose_final_is_void_is_withdrawn_by_the_answer_or_by_the_retired_channel() {
    for (answer, actions) in [
        (TargetFrame::Loaded { round: Round(1) }, vec![forget()]),
        (mismatch(), vec![forget()]),
        (retired(named(1, 1)), [gives_back(named(1, 1)), vec![forget()]].concat()),
    ] {
        let mut session = voided();
        assert_eq!(session.on(SourceEvent::Overran), []);
        assert!(session.is_withdrawing());
        assert_eq!(session.on(frame(answer.clone())), actions, "{answer:?}");
        assert!(!session.is_withdrawing());
        assert_eq!(session.on(SourceEvent::SwitchOver), [SourceAction::PauseGuest]);
    }
}

#[test]
fn a_channel_lost_after_loaded_counts_only_when_rounds_go_on() {
    let mut committed = session(AwaitGate);
    assert_eq!(committed.on(failed(named(1, 1))), []);
    assert_eq!(committed.on(SourceEvent::CommitGranted), [send(SourceFrame::Commit)]);
    let mut overran = session(AwaitGate);
    assert_eq!(overran.on(failed_there(named(1, 1))), []);
    assert_eq!(overran.on(SourceEvent::Overran), [vec![forget()], closes(named(1, 1))].concat());
    assert_eq!(overran.on(frame(retired(named(1, 1)))), gives_back(named(1, 1)));
}

#[test]
fn after_commit_no_channel_matters() {
    for event in [failed(named(1, 1)), failed_there(named(1, 1)), opened(named(1, 2))] {
        assert_eq!(session(AwaitRunning).on(event), []);
    }
}

#[test]
fn the_only_channel_may_join_after_the_guest_was_paused() {
    let mut session = down_to_one(Live);
    session.on(failed(named(0, 1)));
    session.on(frame(retired(named(0, 1))));
    session.on(opened(named(0, 2)));
    session.on(SourceEvent::RoundPushed);
    session.on(SourceEvent::SwitchOver);
    assert_eq!(session.on(SourceEvent::GuestPaused), []);
    let (channel, generation) = named(0, 2);
    let start = SourceAction::StartChannel { channel, generation, round: Some(Round(0)), epoch: None };
    assert_eq!(session.on(frame(joined(named(0, 2)))), [start]);
}

fn damaged(chunks: Vec<u32>) -> SourceEvent {
    SourceEvent::Damaged { block: BlockId(4), chunks }
}

#[test]
fn what_is_damaged_is_found_named_and_shipped_again_in_a_round_of_its_own() {
    let mut session = session(AwaitLoaded);
    let find = SourceAction::FindDamage { block: BlockId(4), chunk_digests: vec![1] };
    assert_eq!(session.on(frame(mismatch())), [find]);
    let chunks = vec![(BlockId(4), 7), (BlockId(4), 9)];
    let again = SourceAction::ShipAgain { block: BlockId(4), chunks: vec![7, 9] };
    assert_eq!(session.on(damaged(vec![7, 9])), [send(SourceFrame::Repair { round: Round(2), chunks }), again]);
    assert!(session.is_paused() && session.repairs() == 1);
    assert_eq!(session.on(SourceEvent::RoundPushed), [SourceAction::PushMark(Item::RoundEnd(Round(2)))]);
    assert_eq!(session.on(SourceEvent::Drained(Facts::default())).len(), 1);
    assert_eq!(session.on(frame(TargetFrame::Loaded { round: Round(2) })), [SourceAction::AskCommit]);
}

#[test]
fn repairs_are_bounded_and_damage_that_nobody_finds_is_not_repaired() {
    let nowhere = session(AwaitLoaded).on(damaged(Vec::new()));
    assert!(matches!(outcome(&nowhere), Outcome::Failed(Failure::Digest { .. })), "{nowhere:?}");

    let mut session = session(AwaitLoaded);
    for repair in 1..=REPAIRS_MAX {
        session.on(damaged(vec![1]));
        assert_eq!(session.repairs(), repair);
        session.on(SourceEvent::RoundPushed);
        session.on(SourceEvent::Drained(Facts::default()));
    }
    let why = Failure::Digest { block: BlockId(4), chunks: vec![1] };
    assert_eq!(*outcome(&session.on(damaged(vec![1]))), Outcome::Failed(why));
}

#[test]
fn more_damage_than_one_frame_holds_is_named_in_several() {
    let chunks: Vec<u32> = (0..CHUNKS_PER_FRAME_MAX as u32 + 1).collect();
    let actions = session(AwaitLoaded).on(damaged(chunks));
    let lengths: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            SourceAction::Send(SourceFrame::Repair { chunks, .. }) => Some(chunks.len()),
            _ => None,
        })
        .collect();
    assert_eq!(lengths, [CHUNKS_PER_FRAME_MAX, 1]);
}
