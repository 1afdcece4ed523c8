#![forbid(unsafe_code)]
//! The door for a second control connection: a source that comes back, or somebody who asks who owns the guest.

use std::io;
use std::time::Instant;

use crate::net::Control;
use crate::session::target::TargetEvent;
use crate::sys::socket::Socket;
use crate::target::driver::{Driver, Over};
use crate::units::Generation;
use crate::wire::control::{SourceFrame, TargetFrame};
use crate::wire::hello::{Hello, HelloRole, Side};

/// A control connection beside the first, until its first frame has come.
pub(super) struct Visitor {
    pub control: Control<TargetFrame, SourceFrame>,
    pub generation: Generation,
    pub until: Instant,
}

impl Driver<'_> {
    /// Answers a control connection's Hello.
    pub fn welcome(&self, socket: Socket, hello: &Hello) -> io::Result<Control<TargetFrame, SourceFrame>> {
        let mut control = Control::new(socket)?;
        let own = Hello {
            role: HelloRole::Control,
            side: Side::Target,
            generation: hello.generation,
            session: hello.session,
            features: 0,
        };
        control.send_raw(&own.encode());
        Ok(control)
    }

    /// Lets a second control connection in. One that names another session is told that it is not known here: the target
    /// that had it is gone. The newest takes the place of one that has not yet said what it wants: each names the session,
    /// which strangers do not know.
    pub fn let_in(&mut self, socket: Socket, hello: &Hello) -> Result<(), Over> {
        // A connection that cannot be used is as good as one that was lost: whoever made it tries again.
        let Ok(mut control) = self.welcome(socket, hello) else { return Ok(()) };
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
        let mut frames = Vec::new();
        let heard = visitor.control.flush().is_ok() && visitor.control.receive(&mut frames).is_ok();
        let newer = visitor.generation > self.control_generation;
        match frames.into_iter().next() {
            Some(SourceFrame::Resume { session, instance, epoch, .. }) if session == self.id && newer => {
                self.event(TargetEvent::ResumeAsked { instance, epoch })
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

