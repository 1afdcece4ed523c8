#![forbid(unsafe_code)]
//! The target's door: accepts connections, hears who they say they are, and lets in those that belong to the migration. A
//! second control connection is a source that comes back, or somebody who asks who owns the guest.

use std::io;
use std::time::{Duration, Instant};

use crate::error::{Failure, OsReason};
use crate::net::{CROWD_PAUSE, Control, ENTRANTS_MAX, Greeting, Listener, Stream, passes};
use crate::session::source::FIRST_GENERATION;
use crate::session::target::TargetEvent;
use crate::target::driver::{Driver, Over};
use crate::units::Generation;
use crate::wire::control::{SourceFrame, TargetFrame};
use crate::wire::hello::{Hello, HelloRole, Side};

/// How long the listener is left alone when a connection cannot be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Remarks about strangers, at the most: they come from anybody.
const REMARKS_MAX: usize = 16;

/// A control connection beside the first, until its first frame has come.
pub(super) struct Visitor {
    pub control: Control<TargetFrame, SourceFrame>,
    pub generation: Generation,
    pub until: Instant,
}

impl Driver<'_> {
    /// Keeps a remark for the report; not more than a person would read, as they come from anybody.
    pub fn remark(&mut self, what: String) {
        if self.remarks.len() < REMARKS_MAX {
            self.remarks.push(what);
        }
    }

    pub fn accept(&mut self) -> Result<(), Over> {
        if self.accept_again.is_some_and(|when| Instant::now() < when) {
            return Ok(());
        }
        self.accept_again = None;
        // Ready-made connections wait for a source that may be slow to speak; strangers do not get that time.
        let ready = matches!(self.listener, Listener::Ready(_));
        let patience = if ready { Duration::from_secs(24 * 3600) } else { self.settings.timeouts.hello };
        for _ in 0..ENTRANTS_MAX {
            let accepted = self.listener.accept().and_then(|socket| {
                let Some(socket) = socket else { return Ok(None) };
                let stream = match &self.settings.tls {
                    None => Stream::from(socket),
                    // Ready-made ones come all at once: a data channel among them must not be given tickets.
                    Some(tls) => tls.accept(socket, self.begun.is_none() && !ready)?,
                };
                self.lobby.enter(stream, patience).map(Some)
            });
            match accepted {
                Ok(Some(())) => {}
                Ok(None) => return Ok(()),
                // Out of descriptors, say: those who are here already are served all the same, and the listener, which
                // stays ready, is left alone for a while.
                Err(e) if self.control.is_some() || passes(&e) => {
                    self.lobby.make_room();
                    self.turned_away += self.early.make_room();
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    self.remark(format!("a connection could not be accepted: {e}"));
                    return Ok(());
                }
                Err(e) => {
                    let address = self.listener.address().map_or_else(String::new, |a| a.to_string());
                    return self.event(TargetEvent::Failed(Failure::Listen { address, reason: e.into() }));
                }
            }
        }
        self.accept_again = Some(Instant::now() + CROWD_PAUSE);
        Ok(())
    }

    pub fn greet(&mut self) -> Result<(), Over> {
        for greeting in self.lobby.listen(self.bell.sleeper().set()) {
            match greeting {
                Greeting::Hello(stream, hello) => self.greet_one(stream, &hello)?,
                Greeting::Stranger(why) => {
                    self.remark(format!("a connection was turned away: {why}"));
                }
                Greeting::Silent => {}
            }
        }
        Ok(())
    }

    /// Ends the wait for a source where nobody else can come: nothing else ever would.
    pub fn miss_source(&mut self) -> Result<(), Over> {
        let nobody_is_left = self.listener.is_exhausted() && self.lobby.is_empty() && self.early.has_no_applicant();
        if self.begun.is_none() && nobody_is_left {
            if let Some(why) = self.early.refusal() {
                return self.event(TargetEvent::Failed(why));
            }
            let text = "none of the connections that were handed over is a source's control connection".to_owned();
            let reason = OsReason { errno: None, text };
            let doing = "waiting for the source's Hello";
            return self.event(TargetEvent::Failed(Failure::Control { doing, reason }));
        }
        Ok(())
    }

    /// Takes a connection for what it says it is; anything that does not belong to this migration is dropped, and
    /// disturbs nobody.
    fn greet_one(&mut self, stream: Stream, hello: &Hello) -> Result<(), Over> {
        if let Some(channels) = self.settings.framing.channels() {
            self.greet_early(stream, hello, channels);
            return Ok(());
        }
        match hello.role {
            HelloRole::Control if hello.side == Side::Source && hello.generation > FIRST_GENERATION => {
                self.let_in(stream, hello)
            }
            HelloRole::Control if self.begun.is_none() && hello.side == Side::Source => {
                let control = match self.welcome(stream, hello) {
                    Ok(control) => control,
                    Err(e) => {
                        let why = Failure::Control { doing: "setting it up", reason: e.into() };
                        return self.event(TargetEvent::Failed(why));
                    }
                };
                self.begun = Some(Instant::now());
                self.id = hello.session;
                self.control = Some(control);
                Ok(())
            }
            HelloRole::Data(channel)
                if self.begun.is_some()
                    && hello.side == Side::Source
                    && hello.session == self.id
                    && self.session.expects(channel, hello.generation) =>
            {
                let generation = hello.generation;
                self.streams[usize::from(channel.0)] = Some((stream, generation));
                self.event(TargetEvent::ChannelConnected { channel, generation })
            }
            HelloRole::Control | HelloRole::Data(_) => {
                self.turned_away += 1;
                Ok(())
            }
        }
    }

    /// Answers a control connection's Hello.
    pub fn welcome(&self, stream: Stream, hello: &Hello) -> io::Result<Control<TargetFrame, SourceFrame>> {
        let framing = &self.settings.framing;
        let mut control = Control::speaking(stream, framing.at_target())?;
        if framing.answers_hello() {
            control.send_raw(&framing.hello(&Hello { side: Side::Target, features: 0, ..*hello }));
        }
        Ok(control)
    }

    /// Lets a second control connection in. One that names another session is told that it is not known here: the target
    /// that had it is gone. The newest takes the place of one that has not yet said what it wants: each names the session,
    /// which strangers do not know.
    pub fn let_in(&mut self, stream: Stream, hello: &Hello) -> Result<(), Over> {
        // A connection that cannot be used is as good as one that was lost: whoever made it tries again.
        let Ok(mut control) = self.welcome(stream, hello) else { return Ok(()) };
        if self.begun.is_some() && hello.session == self.id {
            let until = Instant::now() + self.settings.timeouts.hello;
            self.visitor = Some(Visitor { control, generation: hello.generation, until });
        } else {
            self.turned_away += 1;
            let reason = "it does not know this session: the process that had it has ended, or was started anew".to_owned();
            // The socket's buffer takes so little at once; nobody is waited for.
            let _ = control.send(&TargetFrame::Refused { reason });
        }
        Ok(())
    }

    /// Hears what a second control connection wants.
    pub fn hear_visitor(&mut self) -> Result<(), Over> {
        let Some(visitor) = &mut self.visitor else { return Ok(()) };
        let generation = visitor.generation;
        let mut frames = Vec::new();
        let heard = visitor.control.flush().is_ok() && visitor.control.receive(&mut frames).is_ok();
        let newer = visitor.generation > self.control_generation;
        let mut frames = frames.into_iter();
        match frames.next() {
            Some(SourceFrame::Resume { session, instance, epoch, .. }) if session == self.id && newer => {
                self.event(TargetEvent::ResumeAsked { instance, epoch })?;
                if self.control_generation != generation {
                    return Ok(()); // it was refused
                }
                // What came behind is said on what is the control connection now.
                frames.try_for_each(|frame| self.event(TargetEvent::Frame(frame)))
            }
            Some(SourceFrame::Query { session }) if session == self.id => self.event(TargetEvent::QueryAsked),
            None if heard && Instant::now() < visitor.until => Ok(()),
            Some(_) | None => {
                self.visitor = None;
                self.turned_away += 1;
                Ok(())
            }
        }
    }
}

