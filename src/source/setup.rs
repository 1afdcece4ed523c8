#![forbid(unsafe_code)]
//! The beginning: connects, says Hello and Setup, opens the channels, arms the tracking.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bell::Ringer;
use crate::digest::DigestTable;
use crate::error::Failure;
use crate::net::{Control, Endpoint, Opening, Stream, one_of, open};
use crate::poll::PollSleeper;
use crate::scanner::Scanner;
use crate::session::FEATURE_RESUME;
use crate::session::source::{FIRST_GENERATION, SourceEvent};
use crate::source::Guest;
use crate::source::dial::say_hello;
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::source::lanes::{Kit, Lanes};
use crate::source::pipe::Pipe;
use crate::source::TlsReport;
use crate::sys::random::random_16;
use crate::units::{ChannelId, SessionId, Verify};
use crate::wire::control::{BlockInfo, Setup};
use crate::wire::hello::{Hello, HelloRole, Side};

/// A connection that took this long to fail has met a network that does not answer.
const SLOW: Duration = Duration::from_secs(1);
/// How long a data channel's first connection may take where there are other networks.
const DETOUR_AFTER: Duration = Duration::from_secs(3);

impl Driver<'_> {
    /// Connects, says Hello and Setup.
    pub fn prepare(&mut self, guest: &mut dyn Guest) -> Result<(), Over> {
        if self.gate.is_cancelled() {
            return self.event(SourceEvent::CancelAsked);
        }
        let opaque = match guest.setup_bytes() {
            Ok(opaque) => opaque,
            Err(e) => return self.fail(Failure::Hook { hook: "setup_bytes", reason: e.to_string() }),
        };
        self.id = match random_16() {
            Ok(id) => SessionId(id),
            Err(e) => return self.fail(Failure::Config(format!("no random number for the session: {e}"))),
        };
        if self.settings.verify != Verify::Off {
            match DigestTable::new(self.id, &self.ram.shapes()) {
                Ok(table) => self.records.digests = Some(Arc::new(table)),
                Err(e) => return self.fail(Failure::Memory(format!("no memory for the page digests: {e}"))),
            }
        }
        let stream = self.open(Opening::Control)?;
        self.tls = TlsReport::of(&stream);
        let framing = self.settings.framing.clone();
        let mut control = match Control::speaking(stream, framing.at_source()) {
            Ok(control) => control,
            Err(e) => return self.fail(Failure::Control { doing: "setting it up", reason: e.into() }),
        };
        control.send_raw(&framing.hello(&self.hello(HelloRole::Control)));
        self.control = Some(control);
        let blocks = self.ram.iter().map(|(id, b)| BlockInfo {
            id,
            name: b.name().to_owned(),
            guest_address: b.guest_address(),
            bytes: b.bytes(),
            page_size: b.page_size(),
            // The wire's unit is the tracking page, and this host's pages may be smaller.
            backing_page_bytes: b.backing_page_bytes().max(b.page_size().bytes()),
        });
        let setup = Setup {
            verify: self.settings.verify,
            channels: self.settings.channels,
            features: if self.keeps_session() { FEATURE_RESUME } else { 0 },
            state_bytes_max: 0,
            blocks: blocks.collect(),
            opaque,
        };
        self.event(SourceEvent::Connected(setup))
    }

    /// Whether this side would keep the session when all connections are lost.
    fn keeps_session(&self) -> bool {
        self.settings.framing.mends() && !self.settings.resume_window.is_zero()
    }

    pub fn hello(&self, role: HelloRole) -> Hello {
        let generation = FIRST_GENERATION;
        Hello { role, side: Side::Source, generation, session: self.id, features: 0 }
    }

    fn open(&mut self, opening: Opening) -> Result<Stream, Over> {
        let deadline = Instant::now() + self.settings.timeouts.connect;
        let gate = self.gate.clone();
        match open(&mut self.endpoint, opening, self.settings.tls.as_ref(), &mut self.bell, deadline, &|| gate.is_cancelled()) {
            Ok(Some(stream)) => Ok(stream),
            Ok(None) => {
                self.event(SourceEvent::CancelAsked)?;
                Err(Over)
            }
            Err(why) => self.fail(why).map(|()| unreachable!("fail is over")),
        }
    }

    /// Connects the data channels and starts their workers. One that cannot be connected costs only itself, where there
    /// are others.
    pub fn open_channels(&mut self) -> Result<(), Over> {
        let mut streams = Vec::new();
        let (mut failed, mut slow) = (Vec::new(), Vec::new());
        for channel in (0..self.settings.channels).map(ChannelId) {
            // One after the other, over a long link many of them take longer than the target bears silence.
            self.heartbeat()?;
            let begun = Instant::now();
            match self.open_channel(channel, &slow)? {
                Ok(stream) => {
                    self.tls = self.tls.map(|tls| tls.and(&stream));
                    self.losses.joins(channel, stream.socket().clone());
                    streams.push(Some(stream));
                }
                Err(why) => {
                    if begun.elapsed() >= SLOW {
                        slow.push((channel, why.clone()));
                    }
                    failed.push((channel, why));
                    streams.push(None);
                }
            }
        }
        if failed.len() == streams.len() {
            if let Some((_, why)) = failed.into_iter().next() {
                return self.fail(why);
            }
            return self.fail(Failure::Config("there are no channels".to_owned()));
        }
        // Held beside the workers' own handles: should these fail to start, the target is told why before it finds the
        // channels closed.
        let ringer = self.bell.ringer();
        match Lanes::muster(&self.kit(&ringer), streams) {
            Ok(lanes) => self.lanes = Some(lanes),
            Err(why) => return self.fail(why),
        }
        for (channel, why) in failed {
            let reason = why.to_string();
            self.event(SourceEvent::ChannelFailed { channel, generation: FIRST_GENERATION, reason })?;
        }
        Ok(())
    }

    /// Connects a channel for the first time, and says Hello on it.
    fn open_channel(
        &mut self,
        channel: ChannelId,
        slow: &[(ChannelId, Failure)],
    ) -> Result<Result<Stream, Failure>, Over> {
        let generation = FIRST_GENERATION;
        if self.settings.framing.channels() == Some(0) {
            return Ok(self.lay_pipe(channel));
        }
        let mut limit = self.settings.timeouts.connect;
        if let Endpoint::Addresses(addresses) = &self.endpoint {
            let same = |other: &ChannelId| one_of(addresses, *other, generation) == one_of(addresses, channel, generation);
            // A network that took one channel's time in vain does not get that of all the others.
            if let Some((_, why)) = slow.iter().find(|(other, _)| same(other)) {
                return Ok(Err(why.clone()));
            }
            if addresses.len() > 1 {
                limit = limit.min(DETOUR_AFTER);
            }
        }
        let (gate, until) = (self.gate.clone(), Instant::now() + limit);
        let opening = Opening::Data { channel, generation };
        match open(&mut self.endpoint, opening, self.settings.tls.as_ref(), &mut self.bell, until, &|| gate.is_cancelled()) {
            Ok(Some(mut stream)) => {
                let hello = self.settings.framing.hello(&self.hello(HelloRole::Data(channel)));
                let said = say_hello(&mut stream, &hello).and_then(|()| stream.set_nonblocking(false));
                let reason = |e| Failure::Channel { channel, generation, reason: format!("saying Hello: {e}") };
                Ok(said.map(|()| stream).map_err(reason))
            }
            Ok(None) => {
                self.event(SourceEvent::CancelAsked)?;
                Err(Over)
            }
            // What the VMM's connector refuses is refused: it knows how many there are to be.
            Err(why) if matches!(self.endpoint, Endpoint::Connector(_)) => Err(self.fail(why).err().unwrap_or(Over)),
            Err(why) => Ok(Err(why)),
        }
    }

    /// The worker's end of the way to the control connection.
    fn lay_pipe(&mut self, channel: ChannelId) -> Result<Stream, Failure> {
        let failure = |e| Failure::Channel {
            channel,
            generation: FIRST_GENERATION,
            reason: format!("laying a pipe to the control connection: {e}"),
        };
        let (pipe, stream) = Pipe::new().map_err(failure)?;
        self.pipe = Some(pipe);
        Ok(stream)
    }

    /// What workers are made from.
    pub fn kit<'k>(&'k self, controller: &'k Ringer<PollSleeper>) -> Kit<'k> {
        Kit {
            ram: &self.ram,
            settings: &self.settings,
            options: &self.options,
            records: &self.records,
            controller,
            progress: &self.progress,
        }
    }

    pub fn arm(&mut self) -> Result<(), Over> {
        // Allocated before tracking begins: from then on, rounds allocate nothing.
        let framing = self.settings.framing.clone();
        self.scanner = Some(Scanner::new(&self.ram).treating(&self.ram, |block| framing.untouched(block)));
        self.armed = true;
        let armed = self.dirty.arm(&self.ram);
        self.armed_at = Instant::now();
        self.excuse_silence();
        // The way is measured anew, while round 0 is shipped: what was measured so far waited for what the target prepared.
        self.gauge.forget_pings();
        self.ping_at = self.armed_at;
        match armed {
            Ok(()) => Ok(()),
            Err(e) => self.fail(Failure::Dirty(e.to_string())),
        }
    }
}
