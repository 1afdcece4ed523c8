//! The source's session by hand.

use super::setup;
use crate::error::{Failure, Outcome};
use crate::session::source::{FIRST_GENERATION, Facts, SourceAction, SourceEvent, SourceSession};
use crate::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Item, Round};
use crate::wire::control::{ErrorCode, Final, PeerError, Setup, SourceFrame, TargetFrame};

/// How far a session has come, in order.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
pub(super) enum At {
    Fresh,
    AwaitReady,
    AwaitLanes,
    Live,
    Pausing,
    Paused,
    AwaitLoaded,
    AwaitGate,
    AwaitRunning,
}

use At::{AwaitGate, AwaitLanes, AwaitLoaded, AwaitReady, AwaitRunning, Fresh, Live, Paused, Pausing};

pub(super) const ALL: [At; 9] =
    [Fresh, AwaitReady, AwaitLanes, Live, Pausing, Paused, AwaitLoaded, AwaitGate, AwaitRunning];

/// The target process.
pub(super) const INSTANCE: InstanceId = InstanceId([3; 16]);

pub(super) fn frame(frame: TargetFrame) -> SourceEvent {
    SourceEvent::Frame(frame)
}

pub(super) fn ready() -> TargetFrame {
    TargetFrame::Ready { instance: INSTANCE, features: 0 }
}

pub(super) fn joined(channel: u8) -> TargetFrame {
    TargetFrame::ChannelJoined { channel: ChannelId(channel), generation: FIRST_GENERATION }
}

fn applied(epoch: u64) -> TargetFrame {
    TargetFrame::EpochApplied { epoch: Epoch(epoch), lanes: vec![(ChannelId(0), FIRST_GENERATION)] }
}

fn error_of_peer() -> TargetFrame {
    TargetFrame::Error(PeerError { code: ErrorCode::Memory, text: "no memory".to_owned() })
}

/// A session over two channels that has come this far.
pub(super) fn session(at: At) -> SourceSession {
    session_with(at, 0)
}

/// The same, with these features asked for and granted.
pub(super) fn session_with(at: At, features: u64) -> SourceSession {
    let mut session = SourceSession::new(2);
    let way = [
        (AwaitReady, vec![SourceEvent::Connected(Setup { features, ..setup(2) })]),
        (AwaitLanes, vec![frame(TargetFrame::Ready { instance: INSTANCE, features })]),
        (Live, vec![frame(joined(1)), frame(joined(0))]),
        (Pausing, vec![SourceEvent::RoundPushed, SourceEvent::SwitchOver]),
        (Paused, vec![SourceEvent::GuestPaused]),
        (AwaitLoaded, vec![SourceEvent::RoundPushed, SourceEvent::Drained(Facts::default())]),
        (AwaitGate, vec![frame(TargetFrame::Loaded { round: Round(1) })]),
        (AwaitRunning, vec![SourceEvent::CommitGranted]),
    ];
    for (reached, events) in way {
        if at >= reached {
            events.into_iter().for_each(|event| drop(session.on(event)));
        }
    }
    assert!(!session.is_ended(), "{at:?}");
    session
}

/// The outcome that ends these actions.
pub(super) fn outcome(actions: &[SourceAction]) -> &Outcome {
    match actions.last() {
        Some(SourceAction::End(outcome)) => outcome,
        other => panic!("not an end: {other:?}"),
    }
}

/// What an event does to a session that has come this far: its actions, which must end it.
pub(super) fn ends(at: At, event: SourceEvent) -> Vec<SourceAction> {
    let mut session = session(at);
    let actions = session.on(event);
    assert!(session.is_ended(), "{at:?}: {actions:?}");
    assert_eq!(session.on(SourceEvent::CancelAsked), [], "what has ended does nothing more");
    actions
}

/// Whether the target is told that the source gives up for a breach of the protocol.
pub(super) fn tells_of_breach(actions: &[SourceAction]) -> bool {
    actions.iter().any(|action| {
        matches!(action, SourceAction::Send(SourceFrame::Error(PeerError { code: ErrorCode::Protocol, .. })))
    })
}

#[test]
fn the_happy_path_from_setup_to_running() {
    let mut session = SourceSession::new(2);
    let sent = |frame| vec![SourceAction::Send(frame)];
    assert_eq!(session.on(SourceEvent::Connected(setup(2))), sent(SourceFrame::Setup(setup(2))));
    assert!(session.waits_for_hook().is_some_and(|hook| hook.contains("prepare")));
    assert_eq!(session.on(frame(ready())), [SourceAction::OpenChannels]);
    assert!(session.awaits_lanes());
    assert_eq!(session.on(frame(joined(1))), []);
    assert_eq!(session.on(frame(joined(0))), [SourceAction::StartRounds]);
    assert!(!session.awaits_lanes() && session.waits_for_hook().is_none());

    assert_eq!(session.on(SourceEvent::EpochDue), [SourceAction::PushMark(Item::Flush(Epoch(0)))]);
    assert_eq!(session.on(SourceEvent::RoundPushed), [SourceAction::PushMark(Item::RoundEnd(Round(0)))]);
    let freed = SourceAction::FreeJournal { channel: ChannelId(0), through: Epoch(0) };
    assert_eq!(session.on(frame(applied(0))), [freed]);
    assert_eq!((session.round(), session.epoch()), (Round(1), Epoch(1)));

    assert_eq!(session.on(SourceEvent::SwitchOver), [SourceAction::PauseGuest]);
    assert_eq!(session.on(SourceEvent::GuestPaused), []);
    assert_eq!(session.on(SourceEvent::RoundPushed), [SourceAction::PushMark(Item::RoundEnd(Round(1)))]);
    let facts = Facts { block_digests: vec![5], full_digests: vec![6], state_bytes: 7, state_crc: 8 };
    let last = Final {
        round: Round(1),
        epoch: Epoch(1),
        lanes: vec![(ChannelId(0), FIRST_GENERATION), (ChannelId(1), FIRST_GENERATION)],
        block_digests: vec![5],
        full_digests: vec![6],
        state_bytes: 7,
        state_crc: 8,
    };
    assert_eq!(session.on(SourceEvent::Drained(facts)), sent(SourceFrame::Final(last)));
    assert!(session.waits_for_hook().is_some_and(|hook| hook.contains("load_state")));
    assert_eq!(session.on(frame(TargetFrame::Loaded { round: Round(1) })), [SourceAction::AskCommit]);
    assert!(!session.is_committed(), "the gate has not spoken");
    assert_eq!(session.on(SourceEvent::CommitGranted), sent(SourceFrame::Commit));
    assert!(session.is_committed() && session.waits_for_hook().is_some_and(|hook| hook.contains("run")));
    assert_eq!(session.on(frame(TargetFrame::Running)), [SourceAction::End(Outcome::Completed)]);
    assert!(session.is_ended() && !session.is_committed());
}

#[test]
fn a_frame_that_no_phase_waits_for_is_a_breach() {
    // Frames, with the one phase that takes each.
    let frames: [(TargetFrame, At); 7] = [
        (ready(), AwaitReady),
        (TargetFrame::Refused { reason: String::new() }, AwaitReady),
        (joined(0), AwaitLanes),
        (TargetFrame::Loaded { round: Round(1) }, AwaitLoaded),
        (TargetFrame::DigestMismatch { round: Round(1), block: BlockId(0), chunk_digests: vec![] }, AwaitLoaded),
        (TargetFrame::Running, AwaitRunning),
        (TargetFrame::RunFailed { reason: String::new() }, AwaitRunning),
    ];
    for (unexpected, good) in frames {
        for at in ALL.into_iter().filter(|at| *at != good && *at != Fresh) {
            let actions = ends(at, frame(unexpected.clone()));
            if at == AwaitRunning {
                // Nothing is told: Commit is out, and the target may run the guest.
                assert_eq!(actions.len(), 1, "{unexpected:?}");
                assert!(matches!(outcome(&actions), Outcome::Uncertain(Failure::Protocol(_))), "{actions:?}");
            } else {
                assert!(tells_of_breach(&actions), "{unexpected:?} at {at:?}");
                assert!(matches!(outcome(&actions), Outcome::Failed(Failure::Protocol(_))), "{actions:?}");
            }
        }
    }
}

#[test]
fn an_answer_to_what_was_not_asked_is_a_breach() {
    let (channel, generation) = (ChannelId(0), FIRST_GENERATION);
    for unexpected in [
        TargetFrame::ChannelRetired { channel, generation },
        TargetFrame::QueryAnswer { running: false },
        TargetFrame::QueryAnswer { running: true },
    ] {
        for at in ALL.into_iter().filter(|at| *at != Fresh && *at != AwaitRunning) {
            assert!(tells_of_breach(&ends(at, frame(unexpected.clone()))), "{unexpected:?} at {at:?}");
        }
    }
}

#[test]
fn a_pong_changes_nothing_at_any_time() {
    for at in ALL {
        let mut other = session(at);
        assert_eq!(other.on(frame(TargetFrame::Pong { nonce: 1, lanes: Vec::new() })), []);
        assert_eq!(other, session(at));
    }
}

#[test]
fn a_channel_joins_once_at_its_first_generation_and_only_if_it_is_one_of_ours() {
    let mut twice = session(AwaitLanes);
    twice.on(frame(joined(0)));
    assert!(tells_of_breach(&twice.on(frame(joined(0)))));
    assert!(tells_of_breach(&ends(AwaitLanes, frame(joined(2)))));
    let (channel, generation) = (ChannelId(0), Generation(2));
    let later = TargetFrame::ChannelJoined { channel, generation };
    assert!(tells_of_breach(&ends(AwaitLanes, frame(later))));
}

#[test]
fn an_epoch_is_applied_after_it_was_closed_once_and_for_channels_that_exist() {
    assert!(tells_of_breach(&ends(Live, frame(applied(0)))), "epoch 0 is open");
    let closed = || {
        let mut session = session(Live);
        session.on(SourceEvent::EpochDue);
        session
    };
    let mut twice = closed();
    assert_eq!(twice.on(frame(applied(0))).len(), 1);
    assert!(tells_of_breach(&twice.on(frame(applied(0)))));
    for lane in [(ChannelId(2), FIRST_GENERATION), (ChannelId(0), Generation(2))] {
        let strange = TargetFrame::EpochApplied { epoch: Epoch(0), lanes: vec![lane] };
        assert!(tells_of_breach(&closed().on(frame(strange))), "{lane:?}");
    }
    // Those lanes only that it names.
    let none = TargetFrame::EpochApplied { epoch: Epoch(0), lanes: Vec::new() };
    assert_eq!(closed().on(frame(none)), []);
}

#[test]
fn a_third_outstanding_epoch_is_not_closed() {
    let mut session = session(Live);
    assert_eq!((session.on(SourceEvent::EpochDue).len(), session.on(SourceEvent::EpochDue).len()), (1, 1));
    assert!(!session.may_close_epoch());
    assert_eq!(session.on(SourceEvent::EpochDue), []);
    session.on(frame(applied(1)));
    assert_eq!(session.on(SourceEvent::EpochDue), [SourceAction::PushMark(Item::Flush(Epoch(2)))]);
}

#[test]
fn loaded_for_another_round_is_a_breach() {
    for round in [0, 2] {
        assert!(tells_of_breach(&ends(AwaitLoaded, frame(TargetFrame::Loaded { round: Round(round) }))));
    }
}

#[test]
fn what_the_target_says_before_it_leaves_is_the_reason() {
    let refused = ends(AwaitReady, frame(TargetFrame::Refused { reason: "no AVX".to_owned() }));
    assert_eq!(refused, [SourceAction::End(Outcome::Failed(Failure::Refused("no AVX".to_owned())))]);

    for at in ALL.into_iter().filter(|at| (AwaitReady..AwaitRunning).contains(at)) {
        let discarded = ends(at, frame(TargetFrame::Discarded { reason: "bye".to_owned() }));
        assert_eq!(discarded, [SourceAction::End(Outcome::Failed(Failure::Discarded("bye".to_owned())))]);
        let error = ends(at, frame(error_of_peer()));
        assert_eq!(error, [SourceAction::End(Outcome::Failed(Failure::Peer("no memory".to_owned())))]);
    }
}

#[test]
fn after_commit_only_run_failed_gives_the_guest_back() {
    let after = |event| ends(AwaitRunning, event);
    let run_failed = after(frame(TargetFrame::RunFailed { reason: "no KVM".to_owned() }));
    assert_eq!(run_failed, [SourceAction::End(Outcome::Failed(Failure::RunFailed("no KVM".to_owned())))]);
    let silent = || Failure::Silent { waiting_for: "Running", ms: 9 };
    let uncertain = [
        (frame(TargetFrame::Discarded { reason: "bye".to_owned() }), Failure::Discarded("bye".to_owned())),
        (frame(error_of_peer()), Failure::Peer("no memory".to_owned())),
        (SourceEvent::Failed(silent()), silent()),
    ];
    for (event, why) in uncertain {
        assert_eq!(after(event), [SourceAction::End(Outcome::Uncertain(why))]);
    }
    let breach = after(frame(applied(7)));
    assert!(matches!(breach[..], [SourceAction::End(Outcome::Uncertain(Failure::Protocol(_)))]), "{breach:?}");
}

#[test]
fn after_commit_a_cancel_and_a_dead_channel_change_nothing() {
    let (channel, generation, reason) = (ChannelId(0), FIRST_GENERATION, String::new());
    let late = [
        SourceEvent::CancelAsked,
        SourceEvent::ChannelFailed { channel, generation, reason: reason.clone() },
        frame(TargetFrame::ChannelFailed { channel, generation, reason }),
    ];
    for event in late {
        let mut session = session(AwaitRunning);
        assert_eq!(session.on(event), []);
        assert_eq!(session.on(frame(TargetFrame::Running)), [SourceAction::End(Outcome::Completed)]);
    }
}

#[test]
fn before_commit_a_cancel_is_told_and_ends_it() {
    for at in ALL.into_iter().filter(|at| *at < AwaitRunning) {
        let actions = ends(at, SourceEvent::CancelAsked);
        assert_eq!(*outcome(&actions), Outcome::Cancelled);
        let told = matches!(&actions[0], SourceAction::Send(SourceFrame::Cancel { .. }));
        assert_eq!(told, at != Fresh, "before Setup nobody is there to be told");
    }
}

#[test]
fn before_commit_a_failure_of_ours_is_told_with_its_kind() {
    for at in ALL.into_iter().filter(|at| *at < AwaitRunning) {
        let why = Failure::Control { doing: "sending on it", reason: std::io::Error::from(std::io::ErrorKind::BrokenPipe).into() };
        let text = why.to_string();
        for event in [SourceEvent::Failed(why.clone()), SourceEvent::ControlLost(why.clone())] {
            let actions = ends(at, event);
            assert_eq!(*outcome(&actions), Outcome::Failed(why.clone()));
            let error = PeerError { code: ErrorCode::Connection, text: text.clone() };
            assert_eq!(actions.contains(&SourceAction::Send(SourceFrame::Error(error))), at != Fresh);
        }
    }
    let kinds = [
        (Failure::Stalled { channel: Some(ChannelId(0)), ms: 1 }, ErrorCode::Timeout),
        (Failure::Hook { hook: "pause", reason: String::new() }, ErrorCode::Guest),
        (Failure::Worker(String::new()), ErrorCode::Resources),
        (Failure::Dirty(String::new()), ErrorCode::Other(0)),
    ];
    for (why, code) in kinds {
        let text = why.to_string();
        let actions = ends(Live, SourceEvent::Failed(why));
        assert_eq!(actions[0], SourceAction::Send(SourceFrame::Error(PeerError { code, text })));
    }
}

pub(super) fn forget() -> SourceAction {
    SourceAction::Send(SourceFrame::State { offset: 0, bytes: Vec::new() })
}

#[test]
fn an_attempt_is_withdrawn_at_once_where_the_target_owes_no_answer() {
    for at in [Paused, AwaitGate] {
        let mut session = session(at);
        assert_eq!(session.on(SourceEvent::Overran), [forget()], "{at:?}");
        assert!(!session.is_withdrawing());
        assert_eq!(session.on(SourceEvent::SwitchOver), [SourceAction::PauseGuest], "the guest may be paused again");
    }
}

#[test]
fn a_final_that_was_withdrawn_is_answered_before_rounds_go_on() {
    let mut session = session(AwaitLoaded);
    assert_eq!(session.on(SourceEvent::Overran), []);
    assert!(session.is_withdrawing() && session.waits_for_hook().is_some());
    assert_eq!(session.on(frame(TargetFrame::Loaded { round: Round(1) })), [forget()]);
    assert!(!session.is_withdrawing());
    assert_eq!(session.on(SourceEvent::RoundPushed), [SourceAction::PushMark(Item::RoundEnd(Round(2)))]);

    let withdrawn = || {
        let mut session = self::session(AwaitLoaded);
        session.on(SourceEvent::Overran);
        session
    };
    assert!(tells_of_breach(&withdrawn().on(frame(TargetFrame::Loaded { round: Round(0) }))));
    assert_eq!(*outcome(&withdrawn().on(SourceEvent::CancelAsked)), Outcome::Cancelled);
    // What differs is dirty again soon enough, or is repaired at the next attempt.
    let mismatch = TargetFrame::DigestMismatch { round: Round(1), block: BlockId(4), chunk_digests: vec![1] };
    assert_eq!(withdrawn().on(frame(mismatch)), [forget()]);
}
