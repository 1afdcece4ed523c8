//! Both sessions by hand: the connection is lost after Commit, or somebody asks who owns the guest.

use super::source::At as Source;
use super::target::At as Target;
use super::{source, target};
use crate::error::{Failure, Outcome};
use crate::session::FEATURE_RESUME;
use crate::session::source::{SourceAction, SourceEvent, SourceSession};
use crate::session::target::{TargetAction, TargetEvent};
use crate::units::SessionId;
use crate::wire::control::{SourceFrame, TargetFrame};

const ID: SessionId = SessionId([9; 16]);

fn silent() -> Failure {
    Failure::Silent { waiting_for: "Running", ms: 9 }
}

/// A source that has lost its target after Commit, and has a window.
fn in_doubt() -> SourceSession {
    let mut session = source::session_with(Source::AwaitRunning, FEATURE_RESUME);
    assert_eq!(session.on(SourceEvent::ControlLost(silent())), [SourceAction::Reconnect]);
    assert!(session.wants_control() && session.is_committed());
    session
}

/// The same, when it has asked.
fn asked() -> SourceSession {
    let mut session = in_doubt();
    let query = SourceAction::Send(SourceFrame::Query { session: ID });
    assert_eq!(session.on(SourceEvent::Reconnected(ID)), [query]);
    session
}

#[test]
fn the_answer_to_a_query_settles_who_owns_the_guest() {
    let answer = |running| asked().on(source::frame(TargetFrame::QueryAnswer { running }));
    assert_eq!(answer(true), [SourceAction::End(Outcome::Completed)]);
    assert!(matches!(&answer(false)[..], [SourceAction::End(Outcome::Failed(Failure::Discarded(_)))]));
    assert!(asked().waits_for_hook().is_some_and(|hook| hook.contains("Query")));
}

#[test]
fn a_source_in_doubt_never_resumes_without_an_answer() {
    let why = || Failure::NotResumed { ms: 9, lost: String::new() };
    for mut session in [in_doubt(), asked()] {
        let end = SourceAction::End(Outcome::Uncertain(silent()));
        assert_eq!(session.on(SourceEvent::CancelAsked), [], "too late");
        assert_eq!(session.on(SourceEvent::Failed(why())), [end], "what took the connection is the reason");
    }
    let reason = "it does not know this session".to_owned();
    let refused = asked().on(source::frame(TargetFrame::Refused { reason: reason.clone() }));
    assert_eq!(refused, [SourceAction::End(Outcome::Uncertain(Failure::Refused(reason)))]);
    let breach = asked().on(source::frame(TargetFrame::Running));
    assert!(matches!(&breach[..], [SourceAction::End(Outcome::Uncertain(Failure::Protocol(_)))]), "{breach:?}");
}

#[test]
fn a_query_is_asked_again_where_its_connection_is_lost_too() {
    let mut session = asked();
    assert_eq!(session.on(SourceEvent::ControlLost(Failure::Worker(String::new()))), [SourceAction::Reconnect]);
    assert_eq!(session.lost(), Some(&silent()), "the first loss is what is told");
    assert_eq!(session.on(SourceEvent::Reconnected(ID)).len(), 1);
    assert_eq!(session.on(source::frame(TargetFrame::QueryAnswer { running: true })).len(), 1);
    assert!(session.is_ended());
}

#[test]
fn without_a_window_the_loss_after_commit_is_uncertain() {
    let lost = source::ends(Source::AwaitRunning, SourceEvent::ControlLost(silent()));
    assert_eq!(lost, [SourceAction::End(Outcome::Uncertain(silent()))]);
}

#[test]
fn a_query_before_commit_was_read_is_a_fence() {
    for at in target::ALL.into_iter().filter(|at| *at != Target::Starting) {
        let mut session = target::session(at);
        let actions = session.on(TargetEvent::QueryAsked);
        let place = |wanted: &TargetAction| actions.iter().position(|action| action == wanted);
        let answer = TargetAction::AnswerVisitor(TargetFrame::QueryAnswer { running: false });
        assert_eq!(place(&TargetAction::DropControl), Some(0), "a Commit in it is never read: {at:?}");
        assert!(place(&answer) > place(&TargetAction::Discard), "it answers when it is done: {at:?}");
        assert_eq!(place(&TargetAction::Discard).is_some(), at > Target::Preparing, "{at:?}");
        assert!(matches!(actions.last(), Some(TargetAction::End(Outcome::Failed(Failure::Fenced)))));
        assert_eq!(session.on(target::frame(SourceFrame::Commit)), [], "{at:?}");
    }
}

#[test]
fn a_query_while_the_guest_is_being_started_waits_for_that() {
    let mut session = target::session(Target::Starting);
    assert_eq!(session.on(TargetEvent::QueryAsked), []);
    let actions = session.on(TargetEvent::RunReturned(Ok(())));
    assert_eq!(actions.last(), Some(&TargetAction::End(Outcome::Completed)));
}

#[test]
fn a_target_that_sleeps_answers_a_query_too() {
    let mut session = target::session_with(Target::AwaitCommit, FEATURE_RESUME);
    session.on(TargetEvent::ControlLost(silent()));
    let actions = session.on(TargetEvent::QueryAsked);
    let answer = TargetAction::AnswerVisitor(TargetFrame::QueryAnswer { running: false });
    assert!(actions.contains(&TargetAction::Discard) && actions.contains(&answer), "{actions:?}");
}
