//! The target's session by hand.

use super::setup;
use crate::barrier::LaneWord;
use crate::error::{Failure, Outcome};
use crate::session::FEATURE_RESUME;
use crate::session::source::FIRST_GENERATION;
use crate::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use crate::units::{ChannelId, Epoch, Generation, InstanceId, Round};
use crate::wire::control::{ErrorCode, Final, PeerError, Setup, SourceFrame, TargetFrame};

/// The most device state these sessions take.
const STATE_BYTES_MAX: u64 = 8;

/// The target process.
pub(super) const INSTANCE: InstanceId = InstanceId([3; 16]);

/// How far a session has come, in order.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
pub(super) enum At {
    AwaitSetup,
    Preparing,
    AwaitChannels,
    Live,
    AwaitLanes,
    Checking,
    Loading,
    AwaitCommit,
    Starting,
}

use At::{AwaitChannels, AwaitCommit, AwaitLanes, AwaitSetup, Checking, Live, Loading, Preparing, Starting};

pub(super) const ALL: [At; 9] =
    [AwaitSetup, Preparing, AwaitChannels, Live, AwaitLanes, Checking, Loading, AwaitCommit, Starting];

pub(super) fn frame(frame: SourceFrame) -> TargetEvent {
    TargetEvent::Frame(frame)
}

pub(super) fn state(offset: u64, bytes: usize) -> TargetEvent {
    frame(SourceFrame::State { offset, bytes: vec![9; bytes] })
}

pub(super) fn last() -> Final {
    Final {
        round: Round(1),
        epoch: Epoch(0),
        lanes: vec![(ChannelId(0), FIRST_GENERATION), (ChannelId(1), FIRST_GENERATION)],
        block_digests: vec![5],
        full_digests: Vec::new(),
        state_bytes: 3,
        state_crc: 0,
    }
}

pub(super) fn connected(channel: u8) -> TargetEvent {
    TargetEvent::ChannelConnected { channel: ChannelId(channel), generation: FIRST_GENERATION }
}

pub(super) fn moved(channel: u8, rounds: u64, epochs: u64) -> TargetEvent {
    let (rounds, epochs) = (LaneWord::counting(rounds), LaneWord::counting(epochs));
    TargetEvent::LaneMoved { channel: ChannelId(channel), rounds, epochs }
}

pub(super) fn lane_failed() -> TargetEvent {
    TargetEvent::LaneFailed { channel: ChannelId(1), reason: "reset".to_owned() }
}

/// A session over two channels that has come this far.
pub(super) fn session(at: At) -> TargetSession {
    session_with(at, 0)
}

/// The same, with these features asked for and granted.
pub(super) fn session_with(at: At, features: u64) -> TargetSession {
    let mut session = TargetSession::new(STATE_BYTES_MAX, features & FEATURE_RESUME != 0);
    let way = [
        (Preparing, vec![frame(SourceFrame::Setup(Setup { features, ..setup(2) }))]),
        (AwaitChannels, vec![TargetEvent::Prepared(INSTANCE)]),
        (Live, vec![connected(1), connected(0)]),
        (AwaitLanes, vec![moved(0, 2, 0), state(0, 3), frame(SourceFrame::Final(last()))]),
        (Checking, vec![moved(1, 2, 0)]),
        (Loading, vec![TargetEvent::Checked(Check::Agrees)]),
        (AwaitCommit, vec![TargetEvent::StateLoaded(Ok(()))]),
        (Starting, vec![frame(SourceFrame::Commit)]),
    ];
    for (reached, events) in way {
        if at >= reached {
            events.into_iter().for_each(|event| drop(session.on(event)));
        }
    }
    assert!(!session.is_ended(), "{at:?}");
    session
}

/// What an event does to a session that has come this far: its actions, which must end it.
pub(super) fn ends(at: At, event: TargetEvent) -> Vec<TargetAction> {
    let mut session = session(at);
    let actions = session.on(event);
    assert!(session.is_ended(), "{at:?}: {actions:?}");
    assert_eq!(session.on(TargetEvent::CancelAsked), [], "what has ended does nothing more");
    let discards = actions.iter().filter(|action| **action == TargetAction::Discard).count();
    assert_eq!(discards, usize::from(at > Preparing), "what was prepared is discarded, once: {at:?}");
    actions
}

/// The failure that ends these actions, of which the source was told.
pub(super) fn told_failure(actions: &[TargetAction]) -> &Failure {
    let told = actions.iter().any(|a| matches!(a, TargetAction::Send(TargetFrame::Discarded { .. })));
    match actions.last() {
        Some(TargetAction::End(Outcome::Failed(why))) if told => why,
        _ => panic!("not a failure that was told: {actions:?}"),
    }
}

pub(super) fn is_breach(actions: &[TargetAction]) -> bool {
    let told = actions.iter().any(|action| {
        matches!(action, TargetAction::Send(TargetFrame::Error(PeerError { code: ErrorCode::Protocol, .. })))
    });
    told && matches!(told_failure(actions), Failure::Protocol(_))
}

#[test]
fn the_happy_path_from_setup_to_running() {
    let mut session = TargetSession::new(STATE_BYTES_MAX, false);
    assert_eq!(session.waits_for(), "Setup");
    assert_eq!(session.on(frame(SourceFrame::Setup(setup(2)))), [TargetAction::Prepare(setup(2))]);
    let (instance, features) = (InstanceId([3; 16]), 0);
    let ready = TargetAction::Send(TargetFrame::Ready { instance, features });
    assert_eq!(session.on(TargetEvent::Prepared(instance)), [ready]);

    let joined = |channel| {
        let (channel, generation) = (ChannelId(channel), FIRST_GENERATION);
        TargetAction::Send(TargetFrame::ChannelJoined { channel, generation })
    };
    assert!(session.expects(ChannelId(1), FIRST_GENERATION));
    assert_eq!(session.on(connected(1)), [joined(1)]);
    assert!(!session.expects(ChannelId(1), FIRST_GENERATION));
    // The lanes are there before the source hears of the last of them.
    assert_eq!(session.on(connected(0)), [TargetAction::StartLanes, joined(0)]);

    assert_eq!(session.on(moved(0, 1, 1)), []);
    let lanes = vec![(ChannelId(0), FIRST_GENERATION), (ChannelId(1), FIRST_GENERATION)];
    let applied = TargetFrame::EpochApplied { epoch: Epoch(0), lanes };
    assert_eq!(session.on(moved(1, 1, 1)), [TargetAction::Send(applied)]);

    assert_eq!(session.on(state(0, 2)), [TargetAction::ForgetState, TargetAction::KeepState(vec![9; 2])]);
    assert_eq!(session.on(state(2, 1)), [TargetAction::KeepState(vec![9; 1])]);
    assert_eq!(session.on(moved(0, 2, 1)), []);
    assert_eq!(session.on(frame(SourceFrame::Final(last()))), [], "lane 1 has not passed the last round");
    assert_eq!(session.on(moved(1, 2, 1)), [TargetAction::Pong { nonce: 0 }, TargetAction::Check(last())]);
    assert_eq!(session.on(TargetEvent::Checked(Check::Agrees)), [TargetAction::LoadState]);
    let loaded = TargetAction::Send(TargetFrame::Loaded { round: Round(1) });
    assert_eq!(session.on(TargetEvent::StateLoaded(Ok(()))), [loaded]);
    assert_eq!(session.on(frame(SourceFrame::Commit)), [TargetAction::Run]);
    let running = TargetAction::Send(TargetFrame::Running);
    assert_eq!(session.on(TargetEvent::RunReturned(Ok(()))), [running, TargetAction::End(Outcome::Completed)]);
    assert!(session.is_ended());
}

#[test]
fn a_final_after_the_last_lane_is_checked_at_once() {
    let mut session = session(Live);
    session.on(moved(0, 2, 0));
    session.on(moved(1, 2, 0));
    session.on(state(0, 3));
    let checks = [TargetAction::Pong { nonce: 0 }, TargetAction::Check(last())];
    assert_eq!(session.on(frame(SourceFrame::Final(last()))), checks);
}

#[test]
fn a_frame_that_no_phase_waits_for_is_a_breach() {
    let frames: [(SourceFrame, &[At]); 4] = [
        (SourceFrame::Setup(setup(1)), &[AwaitSetup]),
        (SourceFrame::State { offset: 0, bytes: vec![1] }, &[Live, AwaitCommit]),
        (SourceFrame::Final(last()), &[Live]),
        (SourceFrame::Commit, &[AwaitCommit]),
    ];
    for (unexpected, good) in frames {
        // A Starting target is past all of this: see `after_commit_nothing_but_run_counts`.
        for at in ALL.into_iter().filter(|at| !good.contains(at) && *at != Starting) {
            assert!(is_breach(&ends(at, frame(unexpected.clone()))), "{unexpected:?} at {at:?}");
        }
    }
}

#[test]
fn a_ping_is_answered_at_any_time_and_changes_nothing() {
    for at in ALL.into_iter().filter(|at| *at != Starting) {
        let mut other = session(at);
        assert_eq!(other.on(frame(SourceFrame::Ping { nonce: 4 })), [TargetAction::Pong { nonce: 4 }]);
        assert_eq!(other, session(at));
    }
}

#[test]
fn a_strange_a_second_and_a_late_connection_disturb_nobody() {
    let mut session = session(AwaitChannels);
    session.on(connected(1));
    let before = session.clone();
    let (channel, generation) = (ChannelId(0), Generation(2));
    for stranger in [connected(1), connected(2), TargetEvent::ChannelConnected { channel, generation }] {
        assert_eq!(session.on(stranger), []);
    }
    assert_eq!(session, before);
    assert_eq!(self::session(Live).on(connected(0)), []);
}

#[test]
fn an_epoch_is_applied_once_every_lane_has_flushed_it() {
    let mut session = session(Live);
    assert_eq!(session.on(moved(0, 0, 2)), []);
    let epochs = |actions: Vec<TargetAction>| match &actions[..] {
        [TargetAction::Send(TargetFrame::EpochApplied { epoch, .. })] => Some(epoch.0),
        [] => None,
        _ => panic!("{actions:?}"),
    };
    assert_eq!(epochs(session.on(moved(1, 0, 1))), Some(0));
    assert_eq!(epochs(session.on(moved(1, 1, 1))), None, "not twice");
    assert_eq!(epochs(session.on(moved(1, 1, 2))), Some(1));
    assert_eq!(epochs(session.on(moved(7, 9, 9))), None, "no such lane");
}

#[test]
fn device_state_comes_in_order_without_gaps_and_within_the_limit() {
    for (first, second) in [((1, 1), None), ((0, 3), Some((4, 1))), ((0, 3), Some((2, 1))), ((0, 8), Some((8, 1)))] {
        let mut session = session(Live);
        let pieces = [Some(first), second];
        let mut actions = Vec::new();
        for (offset, bytes) in pieces.into_iter().flatten() {
            assert!(!session.is_ended());
            actions = session.on(state(offset, bytes));
        }
        assert!(is_breach(&actions), "{first:?}, {second:?}");
    }
    assert!(is_breach(&ends(Live, state(0, 9))), "a single piece over the limit");
    // A new attempt starts over.
    let mut again = session(Live);
    again.on(state(0, 8));
    assert_eq!(again.on(state(0, 1)), [TargetAction::ForgetState, TargetAction::KeepState(vec![9])]);
    again.on(state(1, 2));
    assert_eq!(again.on(frame(SourceFrame::Final(last()))), [], "three bytes are what counts");
}

#[test]
fn a_final_names_the_lanes_that_are_here_and_the_state_that_came() {
    let zero = (ChannelId(0), FIRST_GENERATION);
    let wrong = [vec![], vec![zero], vec![zero, zero], vec![zero, (ChannelId(1), Generation(2))], {
        let mut three = last().lanes;
        three.push((ChannelId(2), FIRST_GENERATION));
        three
    }];
    for lanes in wrong {
        let mut session = session(Live);
        session.on(state(0, 3));
        assert!(is_breach(&session.on(frame(SourceFrame::Final(Final { lanes: lanes.clone(), ..last() })))), "{lanes:?}");
    }
    for bytes in [2, 4] {
        let mut session = session(Live);
        session.on(state(0, bytes));
        assert!(is_breach(&session.on(frame(SourceFrame::Final(last())))), "{bytes} bytes came");
    }
}

#[test]
fn device_state_that_is_not_what_was_sent_is_a_breach() {
    assert!(is_breach(&ends(Checking, TargetEvent::Checked(Check::StateDiffers("crc".to_owned())))));
}

#[test]
fn a_vmm_that_refuses_or_cannot_load_is_quoted() {
    let reason = "no AVX".to_owned();
    let refused = ends(Preparing, TargetEvent::Refused(reason.clone()));
    let told = TargetAction::Send(TargetFrame::Refused { reason: reason.clone() });
    assert_eq!(refused, [told, TargetAction::End(Outcome::Failed(Failure::Refused(reason)))]);

    let failed = ends(Loading, TargetEvent::StateLoaded(Err("bad device".to_owned())));
    assert_eq!(*told_failure(&failed), Failure::Hook { hook: "load_state", reason: "bad device".to_owned() });
    assert!(matches!(&failed[0], TargetAction::Send(TargetFrame::Error(e)) if e.code == ErrorCode::Guest));
}

#[test]
fn before_commit_whoever_gives_up_the_target_discards_and_says_so() {
    for at in ALL.into_iter().filter(|at| *at != Starting) {
        let cancelled = ends(at, frame(SourceFrame::Cancel { reason: "operator".to_owned() }));
        assert_eq!(*told_failure(&cancelled), Failure::CancelledBySource("operator".to_owned()));
        let error = PeerError { code: ErrorCode::Memory, text: "no memory".to_owned() };
        let error = ends(at, frame(SourceFrame::Error(error)));
        assert_eq!(*told_failure(&error), Failure::Peer("no memory".to_owned()));
        let silent = Failure::Silent { waiting_for: "Commit", ms: 9 };
        let failed = ends(at, TargetEvent::Failed(silent.clone()));
        assert_eq!(*told_failure(&failed), silent);

        let own = ends(at, TargetEvent::CancelAsked);
        assert!(matches!(&own[0], TargetAction::Send(TargetFrame::Discarded { .. })));
        assert_eq!(own.last(), Some(&TargetAction::End(Outcome::Cancelled)));
    }
}

#[test]
fn after_commit_nothing_but_run_counts() {
    let ignored = [
        frame(SourceFrame::Cancel { reason: String::new() }),
        frame(SourceFrame::Error(PeerError { code: ErrorCode::Memory, text: String::new() })),
        frame(SourceFrame::Commit),
        TargetEvent::CancelAsked,
        TargetEvent::Failed(Failure::Worker(String::new())),
        lane_failed(),
        moved(0, 9, 9),
    ];
    let mut session = session(Starting);
    for event in ignored {
        assert_eq!(session.on(event.clone()), [], "{event:?}");
    }
    let reason = "no KVM".to_owned();
    let failed = session.on(TargetEvent::RunReturned(Err(reason.clone())));
    let told = TargetAction::Send(TargetFrame::RunFailed { reason: reason.clone() });
    let end = TargetAction::End(Outcome::Failed(Failure::Hook { hook: "run", reason }));
    assert_eq!(failed, [told, TargetAction::Discard, end]);
}

#[test]
fn state_from_the_beginning_withdraws_what_was_loaded() {
    let mut session = session(AwaitCommit);
    assert_eq!(session.on(state(0, 0)), [TargetAction::ForgetState]);
    assert!(is_breach(&session.clone().on(frame(SourceFrame::Commit))), "there is nothing to commit to");
    session.on(moved(0, 3, 0));
    session.on(moved(1, 3, 0));
    assert_eq!(session.on(state(0, 2)).len(), 2);
    let again = Final { round: Round(2), state_bytes: 2, ..last() };
    let actions = session.on(frame(SourceFrame::Final(again.clone())));
    assert_eq!(actions.last(), Some(&TargetAction::Check(again)));
    session.on(TargetEvent::Checked(Check::Agrees));
    let loaded = session.on(TargetEvent::StateLoaded(Ok(())));
    assert_eq!(loaded, [TargetAction::Send(TargetFrame::Loaded { round: Round(2) })]);
}

#[test]
fn after_loaded_state_does_not_go_on_in_the_middle() {
    assert!(is_breach(&ends(AwaitCommit, state(3, 1))));
}
