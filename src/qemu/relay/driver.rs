#![forbid(unsafe_code)]
//! The relay's controller: the door, the main connection, and the threads of the channels.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Counts, Ends, Lane, Shared};
use super::trunk::{Broken, Trunk};
use super::{Relay, RelayCounters, RelayReport};
use crate::bell::Close;
use crate::config::CrewOptions;
use crate::crew::{Crew, Exit, Launch, StdSpawn};
use crate::error::{Failure, Outcome};
use crate::net::{CROWD_PAUSE, ENTRANTS_MAX, Endpoint, Greeting, Lobby, Opening, Stream, open, passes};
use crate::qemu::Qemu;
use crate::qemu::wire::InitPacket;
use crate::sync::Ordering::Relaxed;
use crate::sys::event::{EventFd, PollSet};
use crate::sys::socket::Socket;
use crate::units::{ChannelId, FIRST_GENERATION};
use crate::wire::hello::{Hello, HelloRole};

/// Remarks about strangers, at the most.
const REMARKS_MAX: usize = 16;
/// How long a source has to close its end after the last word, and after a cancel.
const LAST_WORD: Duration = Duration::from_secs(1);
const LAST_WORD_OF_CANCEL: Duration = Duration::from_millis(30);

struct Channel {
    crew: Crew<Lane>,
    ends: Arc<Ends>,
    counts: Arc<Counts>,
    ended: bool,
}

struct Driver {
    relay: Relay,
    lobby: Lobby,
    shared: Arc<Shared>,
    trunk: Option<Trunk>,
    channels: BTreeMap<u8, Channel>,
    uuid: Option<[u8; 16]>,
    begun: Option<Instant>,
    accept_again: Option<Instant>,
    turned_away: u64,
    remarks: Vec<String>,
    /// Bytes of all connections, and since when it has been so many.
    moved: (u64, Instant),
}

pub fn run(relay: Relay) -> RelayReport {
    // Any channel that QEMU can have, where nobody has said how many there are.
    let lobby = Lobby::new(Arc::new(Qemu::new(relay.settings.channels.unwrap_or(u8::MAX))));
    let mut driver = Driver {
        relay,
        lobby,
        shared: Arc::default(),
        trunk: None,
        channels: BTreeMap::new(),
        uuid: None,
        begun: None,
        accept_again: None,
        turned_away: 0,
        remarks: Vec::new(),
        moved: (0, Instant::now()),
    };
    let outcome = loop {
        if driver.relay.gate.is_cancelled() {
            break Outcome::Cancelled;
        }
        match driver.step() {
            Ok(false) => {}
            Ok(true) => break Outcome::Completed,
            Err(_) if driver.relay.gate.is_cancelled() => break Outcome::Cancelled,
            Err(Broken { why, uncertain: true }) => break Outcome::Uncertain(why),
            Err(Broken { why, uncertain: false }) => break Outcome::Failed(why),
        }
    };
    driver.finish(outcome)
}

impl Driver {
    /// Does what can be done, then waits; true once the destination has taken the guest.
    fn step(&mut self) -> Result<bool, Broken> {
        self.accept()?;
        for greeting in self.lobby.listen(self.relay.bell.sleeper().set()) {
            match greeting {
                Greeting::Hello(stream, hello) => self.greet(stream, &hello)?,
                Greeting::Stranger(why) => self.turn_away(&why),
                Greeting::Silent => {}
            }
        }
        let mut dead_places = Vec::new();
        if let Some(trunk) = &mut self.trunk {
            trunk.pump(&self.relay.gate)?;
            if !trunk.blocks().is_empty() && self.shared.blocks.set(trunk.blocks().to_vec()).is_ok() {
                for bell in self.channels.values().flat_map(|channel| channel.crew.ringers()) {
                    bell.ring();
                }
            }
            if let Some(verdict) = trunk.verdict() {
                return verdict.map(|()| true);
            }
        }
        self.reap()?;
        let stall = self.check_barriers()?;

        let set = self.relay.bell.sleeper().set();
        set.clear();
        self.lobby.watch(set);
        if let Some(when) = self.accept_again {
            set.until(when);
        } else if let Some(fd) = self.relay.listener.fd() {
            set.watch(fd, true, false);
        }
        if let Some(when) = stall {
            set.until(when);
        }
        let whole = self.trunk.as_ref().is_some_and(|trunk| trunk.is_whole);
        if let Some(trunk) = &self.trunk {
            let [read_there, write_back, read_back, write_there] = trunk.wants();
            if read_there || write_back {
                set.watch(trunk.source.as_fd(), read_there, write_back);
            }
            if read_back || write_there {
                set.watch(trunk.destination.as_fd(), read_back, write_there);
            }
        }
        if !whole {
            for (id, channel) in &self.channels {
                dead_places.push((*id, set.watch(channel.ends.destination.as_fd(), true, false)));
            }
        }
        self.relay.bell.wait();
        // A destination says nothing on a channel: it can only have closed it.
        let set = self.relay.bell.sleeper().set();
        if let Some((id, _)) = dead_places.iter().find(|(_, place)| set.ready(*place).readable) {
            let id = *id;
            // It may have said why on the main connection.
            if let Some(trunk) = &mut self.trunk {
                trunk.pump(&self.relay.gate)?;
                if let Some(verdict) = trunk.verdict() {
                    return verdict.map(|()| true);
                }
                if trunk.is_whole {
                    return Ok(false);
                }
            }
            return Err(broken(id, "the destination has closed it before the source's stream has ended"));
        }
        Ok(false)
    }

    fn accept(&mut self) -> Result<(), Broken> {
        if self.accept_again.is_some_and(|when| Instant::now() < when) {
            return Ok(());
        }
        self.accept_again = None;
        for _ in 0..ENTRANTS_MAX {
            let patience = self.relay.settings.timeouts.hello;
            match self.relay.listener.accept() {
                Ok(Some(socket)) => {
                    let _ = self.lobby.enter(socket, patience);
                }
                Ok(None) => return Ok(()),
                Err(e) if passes(&e) => {
                    self.lobby.make_room();
                    break;
                }
                Err(e) => {
                    let address = self.relay.address().map_or_else(String::new, |a| a.to_string());
                    return Err(Failure::Listen { address, reason: e.into() }.into());
                }
            }
        }
        self.accept_again = Some(Instant::now() + CROWD_PAUSE);
        Ok(())
    }

    fn turn_away(&mut self, why: &str) {
        if self.remarks.len() < REMARKS_MAX {
            self.remarks.push(format!("a connection was turned away: {why}"));
        }
    }

    /// Connects to the destination for somebody who has said who it is, and passes that on at once: a connection that says
    /// nothing, or half of it, brings a QEMU destination to a standstill.
    fn greet(&mut self, stream: Stream, hello: &Hello) -> Result<(), Broken> {
        let refused = match hello.role {
            _ if self.trunk.as_ref().is_some_and(|trunk| trunk.is_whole) => Some("the migration is at its end".to_owned()),
            HelloRole::Control => self.trunk.is_some().then(|| "there is a main connection already".to_owned()),
            HelloRole::Data(ChannelId(id)) if self.channels.contains_key(&id) => Some(format!("channel {id} is there already")),
            HelloRole::Data(_) if self.uuid.is_some_and(|uuid| uuid != hello.session.0) => {
                Some("its uuid is not that of the channels before".to_owned())
            }
            HelloRole::Data(_) => None,
        };
        if let Some(why) = refused {
            self.turned_away += 1;
            self.turn_away(&why);
            return Ok(());
        }
        self.begun.get_or_insert_with(Instant::now);
        let source = stream.socket().clone();
        let (opening, init) = match hello.role {
            HelloRole::Control => (Opening::Control, None),
            HelloRole::Data(channel) => {
                let init = InitPacket { uuid: hello.session.0, channel: channel.0 };
                (Opening::Data { channel, generation: FIRST_GENERATION }, Some(init))
            }
        };
        let mut endpoint = Endpoint::Addresses(vec![self.relay.to.clone()]);
        let deadline = Instant::now() + self.relay.settings.timeouts.connect;
        let gate = self.relay.gate.clone();
        let connected =
            open(&mut endpoint, opening, None, &mut self.relay.bell, deadline, &|| gate.is_cancelled())?;
        let Some(destination) = connected else { return Ok(()) };
        let destination = destination.socket().clone();
        let mode = |blocks: bool| {
            let set = source.set_nonblocking(!blocks).and_then(|()| destination.set_nonblocking(!blocks));
            set.map_err(|e| Failure::Control { doing: "setting it up", reason: e.into() })
        };
        let Some(init) = init else {
            mode(false)?;
            let mut trunk = Trunk::new(source, destination)?;
            trunk.pump(&self.relay.gate)?;
            self.trunk = Some(trunk);
            return Ok(());
        };
        self.uuid = Some(init.uuid);
        mode(true)?;
        let bytes = init.encode();
        match destination.send(&bytes) {
            Ok(n) if n == bytes.len() => {}
            _ => return Err(broken(init.channel, "the destination does not take its first bytes")),
        }
        let ends = Arc::new(Ends { source, destination });
        let counts = Arc::new(Counts::default());
        counts.bytes.fetch_add(bytes.len() as u64, Relaxed);
        let lane = Lane { init: bytes, ends: ends.clone(), shared: self.shared.clone(), counts: counts.clone() };
        let mut launch = Launch::new(&StdSpawn, Arc::new(self.relay.bell.ringer()));
        let options = CrewOptions::default();
        launch.start = Arc::new(move |starting: &_| options.own_hook(starting).map(|()| None));
        let id = usize::from(init.channel);
        let crew = crate::sys::thread::with_signals_blocked(|| {
            Crew::muster(id..id + 1, &launch, |_| Ok::<_, Infallible>(vec![lane]))
        });
        let crew = crew.map_err(|e| Failure::Worker(e.to_string()))?;
        self.channels.insert(init.channel, Channel { crew, ends, counts, ended: false });
        Ok(())
    }

    /// Takes note of the threads that have ended.
    fn reap(&mut self) -> Result<(), Broken> {
        for (id, channel) in &mut self.channels {
            while let Some(worker) = channel.crew.poll_exit() {
                match channel.crew.take_exit(worker) {
                    Some(Exit::Done(Ok(()))) => channel.ended = true,
                    Some(Exit::Done(Err(why))) => return Err(broken(*id, &why)),
                    Some(Exit::Panicked { message }) => return Err(Failure::Worker(message).into()),
                    Some(Exit::NeverRan) | None => return Err(broken(*id, "its thread has not run")),
                }
            }
        }
        Ok(())
    }

    /// Compares the SYNCs of the channels with the barriers of the main connection: a destination would wait for ever
    /// where they differ. Gives the time at which to look again.
    fn check_barriers(&mut self) -> Result<Option<Instant>, Broken> {
        let Some(trunk) = &self.trunk else { return Ok(None) };
        let bytes = trunk.bytes + self.channels.values().map(|c| c.counts.bytes.load(Relaxed)).sum::<u64>();
        if bytes != self.moved.0 {
            self.moved = (bytes, Instant::now());
        }
        let mut stall = None;
        for (id, channel) in &self.channels {
            let syncs = channel.counts.syncs.load(Relaxed);
            let differ = |what: &str| {
                let text = format!("{what}: {syncs} SYNCs on channel {id}, {} barriers on the main connection", trunk.barriers);
                Broken::from(Failure::Protocol(text))
            };
            if trunk.is_last && syncs > trunk.barriers {
                return Err(differ("a SYNC too many"));
            }
            if channel.ended && (trunk.is_last && syncs != trunk.barriers || syncs < trunk.barriers) {
                return Err(differ("the source has ended a channel too early"));
            }
            if channel.ended && trunk.is_whole {
                channel.ends.destination.shutdown_write();
            }
            // What the source's main connection says comes behind what it has put into the channels.
            let [reading, ..] = trunk.wants();
            if reading && (syncs < trunk.barriers || channel.ended && !trunk.is_whole) {
                let when = self.moved.1 + self.relay.settings.timeouts.stall;
                if Instant::now() >= when {
                    return Err(differ("nothing moves"));
                }
                stall = Some(when);
            }
        }
        Ok(stall)
    }

    fn finish(mut self, outcome: Outcome) -> RelayReport {
        let (completed, cancelled) = (outcome == Outcome::Completed, outcome == Outcome::Cancelled);
        if !completed {
            if let Some(trunk) = &mut self.trunk {
                trunk.refuse();
                trunk.destination.shutdown();
            }
            for channel in self.channels.values() {
                channel.crew.close(Close::Abort);
            }
        }
        if let Some(trunk) = &self.trunk {
            if !completed {
                trunk.source.shutdown_write();
            }
            await_close(&trunk.source, if cancelled { LAST_WORD_OF_CANCEL } else { LAST_WORD });
        }
        let mut counters = RelayCounters::default();
        if let Some(trunk) = &self.trunk {
            counters.main_bytes = trunk.bytes;
            (counters.normal_pages, counters.zero_pages) = (trunk.normal_pages, trunk.zero_pages);
        }
        for channel in self.channels.values_mut() {
            channel.crew.close(Close::Abort);
            channel.crew.join();
            counters.channel_bytes += channel.counts.bytes.load(Relaxed);
            counters.normal_pages += channel.counts.normal_pages.load(Relaxed);
            counters.zero_pages += channel.counts.zero_pages.load(Relaxed);
            counters.sync_packets += channel.counts.syncs.load(Relaxed);
        }
        RelayReport {
            outcome,
            counters,
            channels: self.channels.len(),
            turned_away: self.turned_away + self.lobby.turned_away(),
            total: self.begun.map_or(Duration::ZERO, |begun| begun.elapsed()),
            remarks: self.remarks,
        }
    }
}

/// Lets a source hear the last word: to close a socket with bytes in it that nobody has read would take the word back.
fn await_close(source: &Socket, patience: Duration) {
    let Ok(event) = EventFd::new() else { return };
    let (mut set, until, mut bytes) = (PollSet::new(Arc::new(event)), Instant::now() + patience, [0; 4096]);
    loop {
        match source.recv(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                set.clear();
                set.watch(source.as_fd(), true, false);
                set.until(until);
                set.wait();
            }
            Err(_) => return,
        }
        if Instant::now() >= until {
            return;
        }
    }
}

fn broken(id: u8, reason: &str) -> Broken {
    Failure::Channel { channel: ChannelId(id), generation: FIRST_GENERATION, reason: reason.to_owned() }.into()
}
