#![forbid(unsafe_code)]
//! What the source does about lost connections: a channel's runs are given back and it is connected again; where all is
//! lost, the session is taken up again, or the target is asked who owns the guest.

use std::time::Instant;

use crate::error::Failure;
use crate::net::{Control, Endpoint, Opening, Stream, open};
use crate::progress::Stage;
use crate::session::source::SourceEvent;
use crate::source::Guest;
use crate::source::dial::{Destination, Dial, say_hello};
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::source::lanes::Lanes;
use crate::source::ways::{Joining, TRIES_MAX, WayBack, wait_before};
use crate::units::{BlockId, ChannelId, Epoch, Generation, Round, Run};
use crate::wire::crc::Crc32c;
use crate::wire::hello::{Hello, HelloRole};

/// How often in a row a session is taken up again without getting an epoch through.
const RESUMES_MAX: u32 = 32;

impl Driver<'_> {
    /// A channel is lost: its worker ends.
    pub fn close_channel(&mut self, channel: ChannelId, generation: Generation, reason: &str) -> Result<(), Over> {
        let failure = Failure::Channel { channel, generation, reason: reason.to_owned() };
        self.remark(failure.to_string());
        self.losses.last = Some(failure);
        self.losses.channels_lost += 1;
        if let Some(way) = self.losses.ways.get_mut(usize::from(channel.0)) {
            way.joining = None;
            way.tries += 1;
            way.at = (way.tries <= TRIES_MAX).then(|| Instant::now() + wait_before(way.tries));
        }
        match self.lanes.as_mut().map_or(Ok(()), |lanes| lanes.close(channel)) {
            Ok(()) => Ok(()),
            Err(why) => self.fail(why),
        }
    }

    /// The target has retired a channel: its runs travel again.
    pub fn give_back(&mut self, channel: ChannelId) {
        self.losses.retired_since = None;
        let Some(given) = self.lanes.as_mut().map(|lanes| lanes.give_back(channel)) else { return };
        let bytes = |runs: &[Run]| runs.iter().map(|run| self.bytes_of(run)).sum::<u64>();
        let popped = bytes(&given.popped);
        let all = popped + bytes(&given.queued);
        self.losses.reshipped_bytes += popped;
        self.losses.returned_bytes += all;
        self.losses.returned.extend(given.popped);
        self.losses.returned.extend(given.queued);
        self.take_back();
    }

    fn bytes_of(&self, run: &Run) -> u64 {
        self.ram.block(run.block).map_or(0, |block| u64::from(run.pages) * block.page_size().bytes())
    }

    /// These chunks travel again.
    pub fn ship_again(&mut self, block: BlockId, chunks: &[u32]) {
        let Some(table) = &self.records.digests else { return };
        let mut bytes = 0;
        for chunk in chunks {
            let pages = table.chunk_pages(block, *chunk as usize);
            let run = Run { block, first: pages.start, pages: (pages.end - pages.start) as u32 };
            bytes += self.bytes_of(&run);
            self.losses.returned.push(run);
        }
        self.losses.repaired_bytes += bytes;
        self.losses.returned_bytes += bytes;
        self.take_back();
    }

    /// Puts what was given back into the next round: not into one that is being pushed, in which an older copy may
    /// already be on its way.
    pub fn take_back(&mut self) {
        if let (false, Some(scanner)) = (self.filling, &mut self.scanner) {
            scanner.keep_back(&self.losses.returned);
            self.losses.returned.clear();
        }
    }

    /// Connects lost channels again, and looks after those that are about to join. `readable` are those whose target has
    /// said something, or has left: neither is to be before they have joined.
    pub fn look_after_channels(&mut self, readable: &[ChannelId]) -> Result<(), Over> {
        let now = Instant::now();
        let limit = self.settings.timeouts.hello;
        for channel in (0..self.settings.channels).map(ChannelId) {
            let way = &mut self.losses.ways[usize::from(channel.0)];
            let generation = self.session.generation(channel);
            let joined = self.session.is_live(channel);
            let waits_since = way.joining.as_ref().map(|(_, since)| *since).filter(|_| !joined);
            if waits_since.is_some() && readable.contains(&channel) {
                let reason = "the target closed it before it had joined".to_owned();
                self.event(SourceEvent::ChannelFailed { channel, generation, reason })?;
            } else if waits_since.is_some_and(|since| now >= since + limit) {
                let reason = format!("the target did not take it in within {} ms", limit.as_millis());
                self.event(SourceEvent::ChannelFailed { channel, generation, reason })?;
            } else if let Some(result) = way.dial.as_mut().and_then(Dial::poll) {
                way.dial = None;
                self.dialled(channel, result)?;
            } else if way.at.is_some_and(|at| now >= at)
                && way.dial.is_none()
                && self.session.is_down(channel)
                && self.session.wants_channels()
            {
                self.dial(channel)?;
            }
        }
        self.check_that_one_is_left(now)
    }

    fn dial(&mut self, channel: ChannelId) -> Result<(), Over> {
        let way = &mut self.losses.ways[usize::from(channel.0)];
        let tried = way.generation.unwrap_or(Generation(0)).max(self.session.generation(channel));
        let generation = Generation(tried.0.saturating_add(1));
        way.generation = Some(generation);
        way.at = None;
        let opening = Opening::Data { channel, generation };
        let hello = Hello { generation, ..self.hello(HelloRole::Data(channel)) };
        let hello = self.settings.framing.hello(&hello);
        let limit = self.settings.timeouts.connect;
        match &mut self.endpoint {
            Endpoint::Addresses(addresses) => {
                let ringer = self.bell.ringer();
                let to = Destination { addresses: addresses.clone(), tls: self.settings.tls.clone() };
                let number = channel.0.into();
                match Dial::start(number, to, opening, hello, limit, &self.options, &ringer) {
                    Ok(dial) => {
                        self.losses.ways[usize::from(channel.0)].dial = Some(dial);
                        Ok(())
                    }
                    Err(why) => self.dialled(channel, Err(why)),
                }
            }
            endpoint => {
                let opened = open(endpoint, opening, self.settings.tls.as_ref(), &mut self.bell, Instant::now() + limit, &|| false);
                let said = opened.and_then(|stream| {
                    let mut stream = stream.ok_or_else(|| Failure::Config("no connection".to_owned()))?;
                    let said = say_hello(&mut stream, &hello).map(|()| stream);
                    said.map_err(|e| Failure::Connect { address: opening.to_string(), reason: e.into() })
                });
                if said.is_err() {
                    // What the VMM has not got now it will not have later.
                    self.losses.ways[usize::from(channel.0)].tries = TRIES_MAX;
                }
                self.dialled(channel, said)
            }
        }
    }

    fn dialled(&mut self, channel: ChannelId, result: Result<Stream, Failure>) -> Result<(), Over> {
        let way = &mut self.losses.ways[usize::from(channel.0)];
        let generation = way.generation.unwrap_or(Generation(1));
        let opened = result.and_then(|mut stream| {
            let ready = stream.set_nonblocking(false).map(|()| stream);
            ready.map_err(|e| Failure::Connect { address: format!("channel {channel}"), reason: e.into() })
        });
        match opened {
            Ok(stream) => {
                self.tls = self.tls.map(|tls| tls.and(&stream));
                let joining = Joining { socket: stream.socket().clone(), stream: Some(stream) };
                way.joining = Some((joining, Instant::now()));
                self.event(SourceEvent::ChannelOpened { channel, generation })
            }
            Err(why) => {
                way.tries += 1;
                way.at = (way.tries <= TRIES_MAX).then(|| Instant::now() + wait_before(way.tries));
                self.remark(format!("data channel {channel} could not be connected again: {why}"));
                Ok(())
            }
        }
    }

    /// Rounds wait for a channel as long as there is hope for one.
    fn check_that_one_is_left(&mut self, now: Instant) -> Result<(), Over> {
        if self.session.live_channels() > 0 || self.lanes.is_none() || self.session.is_committed() {
            self.losses.none_since = None;
            return Ok(());
        }
        if self.session.awaits_lanes() || self.session.wants_control() || self.session.awaits_resumed() {
            return Ok(());
        }
        let since = *self.losses.none_since.get_or_insert(now);
        if (self.losses.has_hope() || !self.session.channels_are_settled()) && now < since + self.settings.timeouts.stall {
            return Ok(());
        }
        let none = || Failure::Worker("internal error: no channel is left, and none was lost".to_owned());
        let why = self.losses.last.clone().unwrap_or_else(none);
        self.fail(why)
    }

    /// When a channel is next to be looked after, if no one rings.
    pub fn channels_wake_at(&self) -> Option<Instant> {
        let (hello, stall) = (self.settings.timeouts.hello, self.settings.timeouts.stall);
        let wants = self.session.wants_channels();
        let of = |(channel, way): (ChannelId, &WayBack)| match &way.joining {
            Some((_, since)) => Some(*since + hello).filter(|_| !self.session.is_live(channel)),
            None => way.at.filter(|_| wants && self.session.is_down(channel)),
        };
        (0..=u8::MAX).map(ChannelId).zip(&self.losses.ways).filter_map(of).chain(self.losses.none_since.map(|since| since + stall)).min()
    }

    /// Everything is lost: no worker is left, and all that was outstanding travels again.
    pub fn close_everything(&mut self) -> Result<(), Over> {
        self.control = None;
        self.losses.none_since = None;
        for channel in (0..self.settings.channels).map(ChannelId) {
            self.losses.ways[usize::from(channel.0)] = WayBack {
                generation: self.losses.ways[usize::from(channel.0)].generation,
                at: Some(Instant::now()),
                ..WayBack::default()
            };
            if let Err(why) = self.lanes.as_mut().map_or(Ok(()), |lanes| lanes.close(channel)) {
                return self.fail(why);
            }
            self.give_back(channel);
        }
        (self.epoch_bytes, self.epoch_items) = (0, 0);
        self.pongs.clear();
        Ok(())
    }

    /// The control connection is lost, and the session is kept: lets the guest run meanwhile, if it is ours, and comes
    /// back when the target has taken the session up again.
    pub fn come_back(&mut self, guest: &mut dyn Guest, paused_at: &mut Option<Instant>) -> Result<(), Over> {
        self.in_round = false;
        if !self.session.is_committed() {
            self.run_on(guest, paused_at)?;
        }
        // Losses without end, each of which is mended: something breaks the connection again and again.
        if self.losses.resumes_in_vain >= RESUMES_MAX && !self.session.is_committed() {
            let lost = self.session.lost().map_or_else(String::new, Failure::to_string);
            return self.fail(Failure::NotResumed { ms: 0, lost: format!("{lost}, {RESUMES_MAX} times in a row") });
        }
        let until = Instant::now() + self.settings.resume_window;
        let mut attempt = 0;
        while self.session.wants_control() {
            attempt += 1;
            let next = Instant::now() + wait_before(attempt);
            while Instant::now() < next.min(until) {
                self.wait_for_control(next.min(until))?;
            }
            if Instant::now() >= until {
                let ms = self.settings.resume_window.as_millis() as u64;
                let lost = self.session.lost().map_or_else(String::new, Failure::to_string);
                return self.fail(Failure::NotResumed { ms, lost });
            }
            self.control_again(until)?;
        }
        Ok(())
    }

    /// One attempt at a new control connection, and at what is to be said on it.
    fn control_again(&mut self, until: Instant) -> Result<(), Over> {
        let generation = Generation(self.losses.control_generation.0.saturating_add(1));
        self.losses.control_generation = generation;
        let framing = self.settings.framing.clone();
        let hello = framing.hello(&Hello { generation, ..self.hello(HelloRole::Control) });
        let limit = self.settings.timeouts.connect.min(until.saturating_duration_since(Instant::now()));
        let stream = match &mut self.endpoint {
            Endpoint::Addresses(addresses) => {
                let ringer = self.bell.ringer();
                let to = Destination { addresses: addresses.clone(), tls: self.settings.tls.clone() };
                let number = usize::from(u8::MAX);
                let started = Dial::start(number, to, Opening::Control, hello, limit, &self.options, &ringer);
                match started {
                    Ok(mut dial) => loop {
                        if let Some(result) = dial.poll() {
                            break result;
                        }
                        self.wait_for_control(until)?;
                    },
                    Err(why) => Err(why),
                }
            }
            endpoint => {
                let opened = open(endpoint, Opening::Control, self.settings.tls.as_ref(), &mut self.bell, Instant::now() + limit, &|| false);
                let mut stream = match opened {
                    Ok(Some(stream)) => stream,
                    Ok(None) => return Ok(()),
                    // What the VMM has not got now it will not have later.
                    Err(why) => return self.fail(why),
                };
                say_hello(&mut stream, &hello)
                    .map(|()| stream)
                    .map_err(|e| Failure::Connect { address: "the VMM's connector".to_owned(), reason: e.into() })
            }
        };
        let control = stream.and_then(|stream| {
            Control::speaking(stream, framing.at_source()).map_err(|e| Failure::Control { doing: "setting it up", reason: e.into() })
        });
        match control {
            Ok(control) => self.control = Some(control),
            Err(why) => {
                self.remark(format!("no way back to the target: {why}"));
                return Ok(());
            }
        }
        self.greeted = false;
        let greeted_until = until.min(Instant::now() + self.settings.timeouts.hello);
        while !self.greeted {
            if Instant::now() >= greeted_until {
                self.control = None;
                return Ok(());
            }
            self.wait_for_control(greeted_until)?;
            if self.hear_hello().is_err() {
                if self.session.is_ended() {
                    return Err(Over);
                }
                self.control = None;
                return Ok(());
            }
        }
        self.excuse_silence();
        self.ping_at = Instant::now();
        self.event(SourceEvent::Reconnected(self.id))?;
        let committed = self.session.is_committed();
        while self.session.awaits_resumed() || (committed && !self.session.wants_control()) {
            if Instant::now() >= until {
                // It is there, and does not answer: no better than one that is not.
                let ms = self.settings.resume_window.as_millis() as u64;
                let lost = self.session.lost().map_or_else(String::new, Failure::to_string);
                return self.fail(Failure::NotResumed { ms, lost });
            }
            self.wake_at = Some(until);
            match self.service(true) {
                Ok(()) => {}
                // Lost again: another attempt is due.
                Err(Over) if self.session.wants_control() => return Ok(()),
                Err(over) => return Err(over),
            }
        }
        self.losses.resumes += 1;
        self.losses.resumes_in_vain += 1;
        self.remark("all connections were lost, and the session was taken up again".to_owned());
        Ok(())
    }

    /// Sleeps until somebody rings, the control connection says something, or it is time.
    fn wait_for_control(&mut self, until: Instant) -> Result<(), Over> {
        let set = self.bell.sleeper().set();
        set.clear();
        set.until(until);
        if let Some(control) = &self.control {
            set.watch(control.fd(), true, control.unsent_bytes() > 0);
        }
        self.bell.wait();
        if self.gate.is_cancelled() && !self.session.is_committed() {
            return self.event(SourceEvent::CancelAsked);
        }
        Ok(())
    }

    /// Lets a paused guest run on here: nobody knows when there will be a way to the target again.
    fn run_on(&mut self, guest: &mut dyn Guest, paused_at: &mut Option<Instant>) -> Result<(), Over> {
        self.progress.stage(Stage::Precopy);
        self.forget_attempt();
        let Some(begun) = paused_at.take() else { return Ok(()) };
        if let Err(e) = guest.resume() {
            let reason = format!("{e}; the guest stands still at the source, which has lost its target");
            return self.fail(Failure::Hook { hook: "resume", reason });
        }
        self.interrupted += begun.elapsed();
        Ok(())
    }

    /// An attempt to hand over came to nothing: what was saved for it is forgotten.
    pub fn forget_attempt(&mut self) {
        while self.state.pop().is_some() {}
        (self.state_bytes, self.state_crc) = (0, Crc32c::new());
        (self.flags.pause, self.flags.ask_commit) = (false, false);
        (self.break_off_at, self.broken_off) = (None, false);
        self.parts = crate::source::DowntimeParts::default();
    }

    /// Starts the worker of a channel that the target has taken in again.
    pub fn start_channel(&mut self, channel: ChannelId, round: Option<Round>, epoch: Option<Epoch>) -> Result<(), Over> {
        let Some(stream) = self.losses.take_joining(channel) else {
            return self.fail(Failure::Worker("internal error: a channel without a socket has joined".to_owned()));
        };
        self.losses.reconnects += 1;
        let mut lanes = self.lanes.take();
        let started = lanes.as_mut().map_or(Ok(()), |lanes: &mut Lanes| {
            let ringer = self.bell.ringer();
            lanes.start(&self.kit(&ringer), channel, stream, round, epoch)
        });
        self.lanes = lanes;
        match started {
            Ok(()) => Ok(()),
            Err(why) => {
                let (generation, reason) = (self.session.generation(channel), why.to_string());
                self.event(SourceEvent::ChannelFailed { channel, generation, reason })
            }
        }
    }
}
