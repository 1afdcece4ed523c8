#![forbid(unsafe_code)]
//! After a Commit without an answer: asks the target whether the guest runs there, which is a fence.

use std::time::Instant;

use crate::config::Timeouts;
use crate::error::Failure;
use crate::net::{Control, Endpoint, Opening, Tls, open};
use crate::poll::PollSleeper;
use crate::sys::event::PollSet;
use crate::units::{Generation, SessionId};
use crate::wire::control::{ErrorCode, Frame, PeerError, SourceFrame, TargetFrame};
use crate::wire::hello::{Hello, HelloRole, Side};

/// What the target said.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[must_use = "it says which side owns the guest"]
pub enum Settled {
    /// The guest runs at the target: the paused copy at the source must never run again, and is to be destroyed.
    RunsThere,
    /// The guest does not run at the target, and never will: the source may resume it.
    NeverWillRunThere,
}

/// The generation in a settler's Hello: later than any connection that the source itself has made.
pub const SETTLER: Generation = Generation(u32::MAX);

/// Asks the target of this session whether the guest runs there. To be used after
/// [`Outcome::Uncertain`](crate::Outcome::Uncertain), by the VMM or whoever has its report, as often as need be: the
/// answer does not change.
///
/// It is a fence: a target that has not run the guest when it is asked gives it up for good before it answers, even if
/// the source's Commit is still on its way. So do not ask about a migration that is still going on.
///
/// Waits for `timeouts.connect` to be connected, and for `timeouts.hook` to be answered: a target whose VMM is busy in a
/// hook answers after it.
///
/// ```no_run
/// use pageferry::net::Endpoint;
/// use pageferry::settle::{Settled, settle};
/// use pageferry::{Outcome, SourceReport, Timeouts};
/// # fn resume() {}
/// # fn destroy() {}
/// # fn after(report: SourceReport) -> Result<(), pageferry::Failure> {
/// if let Outcome::Uncertain(_) = report.outcome {
///     let target = Endpoint::Addresses(vec!["10.0.0.2:4444".parse()?]);
///     match settle(target, report.session, &Timeouts::default())? {
///         Settled::RunsThere => destroy(),
///         Settled::NeverWillRunThere => resume(),
///     }
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Whatever kept the answer from coming, and then it is as uncertain as before: the target has gone, or cannot be
/// reached, or another process that knows nothing of this session listens there. Ask again, or make sure by other means
/// that the guest does not run there (end the process, power the host off) before it is resumed here.
pub fn settle(target: Endpoint, session: SessionId, timeouts: &Timeouts) -> Result<Settled, Failure> {
    ask(target, session, timeouts, None)
}

/// As [`settle`], of a target that takes encrypted connections only.
///
/// # Errors
/// As [`settle`]'s, and [`Failure::Tls`].
#[cfg(feature = "tls")]
pub fn settle_over_tls(
    target: Endpoint,
    session: SessionId,
    timeouts: &Timeouts,
    tls: &Tls,
) -> Result<Settled, Failure> {
    ask(target, session, timeouts, Some(tls))
}

fn ask(
    mut target: Endpoint,
    session: SessionId,
    timeouts: &Timeouts,
    tls: Option<&Tls>,
) -> Result<Settled, Failure> {
    let timeouts = timeouts.bounded();
    let mut bell =
        PollSleeper::bell().map_err(|e| Failure::Config(format!("no eventfd for the settler's bell: {e}")))?;
    let until = Instant::now() + timeouts.connect;
    let connected = open(&mut target, Opening::Control, tls, &mut bell, until, &|| false)?;
    let Some(socket) = connected else {
        return Err(Failure::Worker("internal error: a query was cancelled, which nobody can".to_owned()));
    };
    let failed = |doing, e: std::io::Error| Failure::Control { doing, reason: e.into() };
    let mut control = Control::<SourceFrame, TargetFrame>::new(socket).map_err(|e| failed("setting it up", e))?;
    let own =
        Hello { role: HelloRole::Control, side: Side::Source, generation: SETTLER, session, features: 0 };
    control.send_raw(&own.encode());
    // What the socket refuses is found again below, after what the target may have said before it left.
    let _ = control.send(&SourceFrame::Query { session });
    let asked = Instant::now();
    let until = asked + timeouts.hook;
    let set = bell.sleeper().set();
    let mut greeted = false;
    loop {
        let flushed = control.flush();
        if let Some(settled) = hear(&mut control, &mut greeted, session)? {
            control.farewell(set, LAST_WORDS);
            return Ok(settled);
        }
        flushed.map_err(|e| failed("asking on it", e))?;
        if Instant::now() >= until {
            let ms = asked.elapsed().as_millis() as u64;
            return Err(Failure::Silent { waiting_for: "the target's answer to a query", ms });
        }
        wait(set, &control, until);
    }
}

/// How long the target may take to see that it was heard.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(50);

fn wait(set: &mut PollSet, control: &Control<SourceFrame, TargetFrame>, until: Instant) {
    set.clear();
    set.until(until);
    set.watch(control.fd(), true, control.unsent_bytes() > 0);
    set.wait();
}

/// What the target has said so far; `None` if that is no answer yet.
fn hear(
    control: &mut Control<SourceFrame, TargetFrame>,
    greeted: &mut bool,
    session: SessionId,
) -> Result<Option<Settled>, Failure> {
    const DOING: &str = "waiting for the answer to a query";
    if !*greeted {
        let Some(hello) = control.receive_hello().map_err(|e| e.into_failure(DOING))? else { return Ok(None) };
        if hello.session != session || hello.side != Side::Target || hello.role != HelloRole::Control {
            return Err(Failure::Protocol("its Hello is for another connection".to_owned()));
        }
        *greeted = true;
    }
    let mut frames = Vec::new();
    let received = control.receive(&mut frames);
    // The first frame decides: a target has nothing else to say to a settler.
    match frames.into_iter().next() {
        Some(TargetFrame::QueryAnswer { running: true }) => Ok(Some(Settled::RunsThere)),
        Some(TargetFrame::QueryAnswer { running: false }) => Ok(Some(Settled::NeverWillRunThere)),
        Some(TargetFrame::Error(PeerError { code: ErrorCode::Session, .. })) => Err(Failure::UnknownSession),
        Some(TargetFrame::Refused { .. }) => Err(Failure::UnknownSession),
        Some(TargetFrame::Error(PeerError { text, .. })) => Err(Failure::Peer(text)),
        Some(frame) => Err(Failure::Protocol(format!("{} came instead of the answer to a query", frame.name()))),
        None => received.map(|()| None).map_err(|e| e.into_failure(DOING)),
    }
}
