//! Both sessions by hand: all connections are lost, and the session goes on.

use super::source::At as Source;
use super::target::At as Target;
use super::{Named, join, joined, lost, named, source, target};
use crate::error::{Failure, Outcome};
use crate::session::FEATURE_RESUME;
use crate::session::source::{SourceAction, SourceEvent, SourceSession};
use crate::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use crate::units::{ChannelId, Epoch, InstanceId, Item, Round, SessionId};
use crate::wire::control::{SourceFrame, TargetFrame};

const ID: SessionId = SessionId([9; 16]);

fn silent() -> Failure {
    Failure::Silent { waiting_for: "Loaded", ms: 9 }
}

fn ready() -> TargetFrame {
    TargetFrame::Ready { instance: source::INSTANCE, features: FEATURE_RESUME }
}

/// The source's phases in which the guest is its own, and rounds have begun.
const SHIPPING: [Source; 5] = [Source::Live, Source::Pausing, Source::Paused, Source::AwaitLoaded, Source::AwaitGate];

/// A source that has lost all connections, having come this far.
fn source_lost(at: Source) -> SourceSession {
    let mut session = source::session_with(at, FEATURE_RESUME);
    assert_eq!(session.on(SourceEvent::ControlLost(silent())), [SourceAction::Reconnect], "{at:?}");
    session
}

#[test]
fn a_source_comes_back_and_goes_on_with_the_round_that_was_interrupted() {
    for at in SHIPPING {
        let before = source::session_with(at, FEATURE_RESUME).round();
        let mut session = source_lost(at);
        assert!(session.wants_control() && !session.is_committed() && session.lost() == Some(&silent()));
        let (round, instance) = (before, source::INSTANCE);
        let resume = SourceFrame::Resume { session: ID, instance, round, epoch: Epoch(0) };
        assert_eq!(session.on(SourceEvent::Reconnected(ID)), [SourceAction::Send(resume)], "{at:?}");
        assert!(session.awaits_resumed());
        assert_eq!(session.on(source::frame(ready())), [], "{at:?}");
        assert!(session.resumes() && session.wants_channels() && session.live_channels() == 0);
        let (channel, generation) = named(0, 2);
        let opened = session.on(SourceEvent::ChannelOpened { channel, generation });
        assert_eq!(opened, [SourceAction::Send(join(named(0, 2)))]);
        let round = before.0.checked_sub(1).map(Round);
        let start = SourceAction::StartChannel { channel, generation, round, epoch: None };
        assert_eq!(session.on(source::frame(joined(named(0, 2)))), [start], "{at:?}");
        assert_eq!(session.on(SourceEvent::RoundPushed), [SourceAction::PushMark(Item::RoundEnd(before))]);
    }
}

#[test]
fn epochs_that_were_outstanding_travel_again_in_later_ones() {
    let mut session = source::session_with(Source::Live, FEATURE_RESUME);
    session.on(SourceEvent::EpochDue);
    session.on(SourceEvent::EpochDue);
    assert!(!session.may_close_epoch());
    session.on(SourceEvent::ControlLost(silent()));
    assert!(session.may_close_epoch());
    let actions = session.on(SourceEvent::Reconnected(ID));
    assert!(matches!(actions[0], SourceAction::Send(SourceFrame::Resume { epoch: Epoch(2), .. })), "{actions:?}");
    session.on(source::frame(ready()));
    let (channel, generation) = named(0, 2);
    session.on(SourceEvent::ChannelOpened { channel, generation });
    let joins = session.on(source::frame(joined(named(0, 2))));
    assert!(matches!(joins[0], SourceAction::StartChannel { epoch: Some(Epoch(1)), .. }), "{joins:?}");
    assert_eq!(session.on(SourceEvent::EpochDue), [SourceAction::PushMark(Item::Flush(Epoch(2)))]);
}

#[test]
fn channels_of_before_are_gone_and_nobody_is_told_of_them() {
    let mut session = source_lost(Source::Live);
    let (channel, generation) = named(1, 1);
    assert_eq!(session.on(SourceEvent::ChannelFailed { channel, generation, reason: String::new() }), []);
    let (channel, generation) = named(1, 2);
    let opened = SourceEvent::ChannelOpened { channel, generation };
    assert_eq!(session.on(opened), [SourceAction::HangUp { channel }], "there is nobody to be told of it");
    session.on(SourceEvent::Reconnected(ID));
    assert!(source::tells_of_breach(&session.on(source::frame(joined(named(1, 1))))));
}

#[test]
fn a_source_that_loses_its_way_back_tries_again_and_may_be_cancelled() {
    let mut session = source_lost(Source::Live);
    for _ in 0..3 {
        session.on(SourceEvent::Reconnected(ID));
        assert_eq!(session.on(SourceEvent::ControlLost(silent())), [SourceAction::Reconnect]);
        assert!(session.wants_control());
    }
    let mut cancelled = session.clone();
    assert_eq!(*source::outcome(&cancelled.on(SourceEvent::CancelAsked)), Outcome::Cancelled);
    let why = Failure::NotResumed { ms: 9, lost: silent().to_string() };
    assert_eq!(*source::outcome(&session.on(SourceEvent::Failed(why.clone()))), Outcome::Failed(why));
}

#[test]
fn a_target_that_is_another_process_is_told_apart() {
    let asked = || {
        let mut session = source_lost(Source::Live);
        session.on(SourceEvent::Reconnected(ID));
        session
    };
    let reason = "it does not know this session".to_owned();
    let refused = asked().on(source::frame(TargetFrame::Refused { reason: reason.clone() }));
    assert_eq!(refused, [SourceAction::End(Outcome::Failed(Failure::Refused(reason)))]);
    let other = TargetFrame::Ready { instance: InstanceId([4; 16]), features: FEATURE_RESUME };
    assert!(source::tells_of_breach(&asked().on(source::frame(other))));
}

#[test]
fn without_a_window_or_before_rounds_a_lost_control_connection_ends_it() {
    for at in SHIPPING {
        let actions = source::ends(at, SourceEvent::ControlLost(silent()));
        assert_eq!(*source::outcome(&actions), Outcome::Failed(silent()), "{at:?}");
    }
    for at in [Source::AwaitReady, Source::AwaitLanes] {
        let mut session = source::session_with(at, FEATURE_RESUME);
        let actions = session.on(SourceEvent::ControlLost(silent()));
        assert_eq!(*source::outcome(&actions), Outcome::Failed(silent()), "{at:?}");
    }
    // Both must want it.
    let mut session = source::session_with(Source::AwaitReady, FEATURE_RESUME);
    session.on(source::frame(TargetFrame::Ready { instance: source::INSTANCE, features: 0 }));
    assert!(!session.resumes());
}

/// The target's phases in which it can be taken up again.
const RESUMABLE: [Target; 4] = [Target::Live, Target::AwaitLanes, Target::Checking, Target::AwaitCommit];

fn resume_asked(epoch: u64) -> TargetEvent {
    TargetEvent::ResumeAsked { instance: target::INSTANCE, epoch: Epoch(epoch) }
}

fn taken_up(lanes: &[u8]) -> Vec<TargetAction> {
    let mut actions = vec![TargetAction::DropControl];
    actions.extend(lanes.iter().map(|channel| TargetAction::RetireLane { channel: ChannelId(*channel) }));
    actions.extend([TargetAction::TakeVisitor, TargetAction::ForgetState]);
    actions.push(TargetAction::Send(TargetFrame::Ready { instance: target::INSTANCE, features: FEATURE_RESUME }));
    actions
}

/// A target that has noticed that all connections are lost, having come this far.
fn dormant(at: Target) -> TargetSession {
    let mut session = target::session_with(at, FEATURE_RESUME);
    assert_eq!(session.on(TargetEvent::ControlLost(silent())), [TargetAction::DropControl], "{at:?}");
    assert!(session.is_dormant() && session.resumes());
    session
}

#[test]
fn a_target_joins_every_lane_before_it_says_that_it_is_ready_again() {
    for at in RESUMABLE {
        for mut session in [dormant(at), target::session_with(at, FEATURE_RESUME)] {
            assert_eq!(session.on(resume_asked(4)), taken_up(&[0, 1]), "{at:?}");
            assert!(!session.is_dormant());
            // What was asked of it before has come to nothing.
            assert_eq!(session.on(TargetEvent::Checked(Check::Agrees)), [], "{at:?}");
            assert!(target::is_breach(&session.clone().on(target::frame(SourceFrame::Commit))), "{at:?}");
            assert!(target::is_breach(&session.clone().on(target::frame(lost(named(0, 1))))), "it is out of the set");
            let (channel, generation) = named(0, 1);
            assert!(!session.expects(channel, generation), "a connection of before does not join");
            session.on(target::frame(join(named(0, 2))));
            let (channel, generation) = named(0, 2);
            let start = session.on(TargetEvent::ChannelConnected { channel, generation });
            assert_eq!(start[0], TargetAction::StartLane { channel });
            // All epochs before the one that the source is in will come again, or are applied.
            assert_eq!(session.on(target::moved(0, 3, 4)), []);
            let applied = TargetFrame::EpochApplied { epoch: Epoch(4), lanes: vec![named(0, 2)] };
            assert_eq!(session.on(target::moved(0, 3, 5)), [TargetAction::Send(applied)]);
        }
    }
}

#[test]
fn a_session_is_taken_up_as_often_as_it_is_lost() {
    let mut session = dormant(Target::Live);
    assert_eq!(session.on(resume_asked(0)), taken_up(&[0, 1]));
    assert_eq!(session.on(resume_asked(0)), taken_up(&[]), "the first answer was lost");
    session.on(target::frame(join(named(1, 2))));
    let (channel, generation) = named(1, 2);
    session.on(TargetEvent::ChannelConnected { channel, generation });
    session.on(TargetEvent::ControlLost(silent()));
    assert_eq!(session.on(resume_asked(0)), taken_up(&[1]));
    // A connection that was announced, or was there, before the last loss is one of before.
    for old in [named(1, 2), named(0, 1)] {
        assert!(!session.expects(old.0, old.1), "{old:?}");
    }
}

#[test]
fn a_connection_that_waits_to_be_announced_is_one_of_before_after_a_resume() {
    let mut session = target::session_with(Target::Live, FEATURE_RESUME);
    session.on(target::frame(lost(named(1, 1))));
    let (channel, generation) = named(1, 5);
    session.on(TargetEvent::ChannelConnected { channel, generation });
    session.on(resume_asked(0));
    assert!(target::is_breach(&session.clone().on(target::frame(join(named(1, 5))))));
    assert_eq!(session.on(target::frame(join(named(1, 6)))), []);
}

#[test]
fn a_stranger_a_session_without_a_window_and_one_in_a_hook_are_not_taken_up() {
    let refused = |actions: &[TargetAction]| {
        matches!(actions, [TargetAction::AnswerVisitor(TargetFrame::Refused { .. })])
    };
    for at in target::ALL {
        let resumable = RESUMABLE.contains(&at);
        let mut session = target::session_with(at, FEATURE_RESUME);
        let other = TargetEvent::ResumeAsked { instance: InstanceId([4; 16]), epoch: Epoch(0) };
        if at == Target::Starting {
            assert_eq!(session.on(other), []);
            assert_eq!(session.on(resume_asked(0)), [], "the guest is ours");
            continue;
        }
        assert!(refused(&session.on(other)), "{at:?}");
        assert_eq!(refused(&session.on(resume_asked(0))), !resumable, "{at:?}");
        assert!(refused(&target::session(at).on(resume_asked(0))), "no window: {at:?}");
    }
}

#[test]
fn a_target_without_a_window_or_in_a_hook_gives_up_with_its_control_connection() {
    for at in target::ALL.into_iter().filter(|at| *at != Target::Starting) {
        let lost = target::ends(at, TargetEvent::ControlLost(silent()));
        assert_eq!(*target::told_failure(&lost), silent(), "{at:?}");
        if !RESUMABLE.contains(&at) {
            let mut session = target::session_with(at, FEATURE_RESUME);
            session.on(TargetEvent::ControlLost(silent()));
            assert!(session.is_ended(), "{at:?}");
        }
    }
}

#[test]
fn when_the_window_ends_the_target_discards() {
    for at in RESUMABLE {
        let mut session = dormant(at);
        let why = Failure::NotResumed { ms: 9, lost: silent().to_string() };
        let actions = session.on(TargetEvent::Failed(why.clone()));
        assert!(actions.contains(&TargetAction::Discard), "{at:?}");
        assert_eq!(actions.last(), Some(&TargetAction::End(Outcome::Failed(why))));
    }
}

#[test]
fn lanes_may_go_on_landing_while_nobody_is_there_and_that_is_all_they_do() {
    let mut session = dormant(Target::AwaitLanes);
    // Epochs that come through meanwhile are told to nobody: the source asks for them again.
    assert_eq!(session.on(target::moved(1, 2, 0)), [], "the pending Final was dropped");
    assert!(session.on(target::lane_failed()).len() == 1 && session.is_dormant());
}

#[test]
fn a_generation_is_never_used_twice_across_a_resume() {
    let refuses = |session: &mut TargetSession, (channel, generation): Named| !session.expects(channel, generation);
    let mut session = target::session_with(Target::Live, FEATURE_RESUME);
    session.on(target::frame(lost(named(0, 1))));
    session.on(target::frame(join(named(0, 3))));
    session.on(resume_asked(0));
    assert!(refuses(&mut session, named(0, 2)) && refuses(&mut session, named(0, 3)));
    assert!(!refuses(&mut session, named(0, 4)));
}
