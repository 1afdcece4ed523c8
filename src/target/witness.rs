#![forbid(unsafe_code)]
//! What stays of a target after the end: somebody who says to a source in doubt how it ended.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::cancel::CancelHandle;
use crate::config::YEAR;
use crate::error::{Failure, Outcome};
use crate::gate::Gate;
use crate::net::{Control, Greeting, Listener, Lobby, Stream, Tls};
use crate::poll::PollSleeper;
use crate::session::source::FIRST_GENERATION;
use crate::sys::socket::Socket;
use crate::units::SessionId;
use crate::wire::control::{ErrorCode, HEARD_THE_END, PeerError, SourceFrame, TargetFrame};
use crate::wire::hello::{Hello, HelloRole, Side};

/// What the target leaves to its witness.
pub(super) struct Testimony {
    pub listener: Listener,
    pub bell: Bell<PollSleeper>,
    pub lobby: Lobby,
    /// The session, if there was one.
    pub session: Option<SessionId>,
    /// Whether the guest runs here. If not, it never will.
    pub runs: bool,
    /// Whether the source may have sent Commit, and not know how it ended.
    pub in_doubt: bool,
    /// Somebody who knows the session, and had not yet said what it wants.
    pub visitor: Option<Control<TargetFrame, SourceFrame>>,
    /// Its control connection: it may still say that it knows.
    pub source: Option<Control<TargetFrame, SourceFrame>>,
    pub hello: Duration,
    pub tls: Option<Tls>,
}

impl Testimony {
    /// Hears a connection, in the way that the target took its own.
    fn enter(&mut self, socket: Socket) -> std::io::Result<()> {
        let stream = match &self.tls {
            None => Stream::from(socket),
            Some(tls) => tls.accept(socket, false)?,
        };
        self.lobby.enter(stream, self.hello)
    }
}

/// Whether a source that was told Loaded may wait for an answer to Commit: unless it said afterwards that it had ended
/// before Commit, or that it has heard the answer.
pub(super) fn may_be_in_doubt(outcome: &Outcome, last_word: Option<&SourceFrame>) -> bool {
    // Frames come in order: after Cancel or Error there is no Commit.
    let ended_before = matches!(outcome, Outcome::Failed(Failure::CancelledBySource(_) | Failure::Peer(_)));
    !ended_before && !last_word.is_some_and(settles)
}

fn settles(frame: &SourceFrame) -> bool {
    matches!(frame, SourceFrame::Ping { nonce: HEARD_THE_END } | SourceFrame::Cancel { .. } | SourceFrame::Error(_))
}

/// Knows how a migration ended at its target, and says so to whoever asks with [`settle`](crate::settle::settle) and
/// knows the session.
///
/// It holds the address that the target listened on, and nothing of the guest. It answers only while
/// [`answer`](Witness::answer) runs; whoever connects before waits for that, and dropping it ends all.
pub struct Witness {
    known: Testimony,
    gate: Gate,
    askers: Vec<Asker>,
    accept_again: Option<Instant>,
    answered: u64,
}

/// Somebody with a good Hello.
struct Asker {
    control: Control<TargetFrame, SourceFrame>,
    knows_session: bool,
    answered: bool,
    until: Instant,
}

/// Askers at once. They hold a buffer of 64 KiB each.
const ASKERS_MAX: usize = 16;
/// Connections accepted before those in the lobby are heard, at the most.
const ACCEPTS_MAX: usize = 64;
/// How long the listener is left alone when a connection cannot be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Witness").field("runs", &self.known.runs).field("in_doubt", &self.known.in_doubt).finish()
    }
}

impl Witness {
    pub(super) fn new(mut known: Testimony) -> Witness {
        let until = Instant::now() + known.hello;
        let visitor = known.visitor.take();
        let askers = visitor.map(|control| Asker { control, knows_session: true, answered: false, until });
        Witness { known, gate: Gate::new(), askers: askers.into_iter().collect(), accept_again: None, answered: 0 }
    }

    /// The session; `None` if no source ever came.
    pub fn session(&self) -> Option<SessionId> {
        self.known.session
    }

    /// Whether the source may not know how it ended: Loaded was said, and the source has neither confirmed what came of
    /// it nor said that it had stopped before. If not, there is nothing to be asked.
    pub fn is_needed(&self) -> bool {
        self.known.in_doubt
    }

    /// Ends [`answer`](Witness::answer), from any thread.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { gate: self.gate.clone(), controller: self.known.bell.ringer() }
    }

    /// Also hears this connection: for a target that does not listen by itself.
    ///
    /// # Errors
    /// What the system says of a descriptor that is no stream socket.
    pub fn admit(&mut self, connection: OwnedFd) -> std::io::Result<()> {
        self.known.enter(Socket::from_fd(connection)?)
    }

    /// Answers queries for so long; comes back sooner when the source is known to know, or when cancelled. Says how many
    /// queries it has answered in all. Nobody can keep it for longer, and of strangers only a few are listened to at a
    /// time.
    ///
    /// The answer never changes: a guest that runs here was run by its source's Commit, and one that does not has been
    /// discarded before.
    pub fn answer(&mut self, time: Duration) -> u64 {
        let until = Instant::now() + time.min(YEAR);
        while self.known.in_doubt && !self.gate.is_cancelled() {
            self.hear_source();
            self.accept();
            self.greet();
            self.serve();
            if !self.known.in_doubt || Instant::now() >= until {
                break;
            }
            self.sleep(until);
        }
        self.answered
    }

    fn sleep(&mut self, until: Instant) {
        let Testimony { listener, bell, lobby, source, .. } = &mut self.known;
        let set = bell.sleeper().set();
        set.clear();
        set.until(until);
        match (self.accept_again, listener.fd()) {
            (Some(when), _) => set.until(when),
            (None, Some(fd)) => {
                set.watch(fd, true, false);
            }
            (None, None) => {}
        }
        lobby.watch(set);
        if let Some(source) = source {
            set.watch(source.fd(), true, source.unsent_bytes() > 0);
        }
        for asker in &self.askers {
            set.watch(asker.control.fd(), true, asker.control.unsent_bytes() > 0);
            set.until(asker.until);
        }
        bell.wait();
    }

    /// What the source still says on its control connection, over a long link.
    fn hear_source(&mut self) {
        let Some(source) = &mut self.known.source else { return };
        let mut frames = Vec::new();
        let alive = source.flush().is_ok() & source.receive(&mut frames).is_ok();
        if frames.iter().any(settles) {
            self.known.in_doubt = false;
        }
        if !alive {
            self.known.source = None;
        }
    }

    fn accept(&mut self) {
        if self.accept_again.is_some_and(|when| Instant::now() < when) {
            return;
        }
        self.accept_again = None;
        for _ in 0..ACCEPTS_MAX {
            match self.known.listener.accept().and_then(|socket| socket.map(|s| self.known.enter(s)).transpose()) {
                Ok(Some(())) => {}
                Ok(None) => return,
                Err(_) => {
                    self.known.lobby.make_room();
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn greet(&mut self) {
        let Testimony { lobby, bell, .. } = &mut self.known;
        for greeting in lobby.listen(bell.sleeper().set()) {
            let Greeting::Hello(socket, hello) = greeting else { continue };
            // The source's own connections, come late, are of the first generation.
            if hello.role != HelloRole::Control || hello.side != Side::Source || hello.generation == FIRST_GENERATION {
                continue;
            }
            let Ok(mut control) = Control::new(socket) else { continue };
            // Its own session back, whatever it is: ours is no stranger's business.
            control.send_raw(&Hello { side: Side::Target, features: 0, ..hello }.encode());
            if self.askers.len() >= ASKERS_MAX {
                // Those who do not know the session go first.
                let least = self.askers.iter().position(|asker| !asker.knows_session);
                self.askers.remove(least.unwrap_or(0));
            }
            let knows_session = self.known.session == Some(hello.session);
            let until = Instant::now() + self.known.hello;
            self.askers.push(Asker { control, knows_session, answered: false, until });
        }
    }

    fn serve(&mut self) {
        let (session, running) = (self.known.session, self.known.runs);
        let now = Instant::now();
        let mut answered = 0;
        self.askers.retain_mut(|asker| {
            let mut frames = Vec::new();
            let received = asker.control.receive(&mut frames);
            for frame in frames {
                let asked = match frame {
                    SourceFrame::Query { session } => session,
                    SourceFrame::Resume { .. } => {
                        let reason = "the session has ended".to_owned();
                        let _ = asker.control.send(&TargetFrame::Refused { reason });
                        return false;
                    }
                    _ => return false,
                };
                if std::mem::replace(&mut asker.answered, true) {
                    return false;
                }
                let known = asker.knows_session && session == Some(asked);
                let answer = if known {
                    TargetFrame::QueryAnswer { running }
                } else {
                    let text = "this target knows nothing of that session".to_owned();
                    TargetFrame::Error(PeerError { code: ErrorCode::Session, text })
                };
                answered += u64::from(known);
                if asker.control.send(&answer).is_err() {
                    return false;
                }
            }
            received.is_ok() && asker.control.flush().is_ok() && now < asker.until
        });
        self.answered += answered;
    }
}
