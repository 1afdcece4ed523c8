#![forbid(unsafe_code)]
//! The relay's controller: the door, the main connection, and the threads of the channels.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Ends, Lane, Look, Standing, Stopped};
use super::gather::{Gathered, Gathering};
use super::trunk::{TURNS_MAX, Trunk, untold};
use super::{MAIN, Relay, RelayCounters, RelayReport};
use crate::bell::Close;
use crate::config::CrewOptions;
use crate::crew::{Crew, Exit, Launch, StdSpawn};
use crate::error::{Failure, Outcome};
use crate::net::{CROWD_PAUSE, ENTRANTS_MAX, Endpoint, Greeting, Lobby, Opening, Stream, is_taken_in, open, passes};
use crate::progress::Stage;
use crate::qemu::Qemu;
use crate::qemu::wire::{InitPacket, PAGE_BYTES};
use crate::sync::Ordering::Relaxed;
use crate::sys::event::{EventFd, PollSet};
use crate::sys::socket::Socket;
use crate::units::{ChannelId, FIRST_GENERATION};
use crate::wire::hello::{Hello, HelloRole};

/// Remarks, at the most.
const REMARKS_MAX: usize = 16;
/// How long a source has to close its end after the last word, and after a cancel.
const LAST_WORD: Duration = Duration::from_secs(1);
const LAST_WORD_OF_CANCEL: Duration = Duration::from_millis(30);
/// How long its system has, then, to acknowledge that the destination has taken the guest: a few round trips, and one that was
/// lost.
const ACKNOWLEDGED: Duration = Duration::from_secs(3);

struct Channel {
    ends: Arc<Ends>,
    standing: Arc<Standing>,
    /// At the last look at all of them.
    last: Look,
    ended: bool,
}

struct Driver {
    relay: Relay,
    lobby: Lobby,
    /// Until the source is all there.
    gathering: Option<Gathering>,
    trunk: Option<Trunk>,
    channels: Vec<Channel>,
    crew: Option<Crew<Lane>>,
    /// The last barrier has been passed on: RAM is complete, and the channels have nothing more to say of it.
    closed: bool,
    accept_again: Option<Instant>,
    turned_away: u64,
    remarks: Vec<String>,
    /// Bytes of the main connection that have come and were passed on, and since when these, and all channels, stand as
    /// they do.
    moved: ([u64; 2], Instant),
    /// Until when the destination must have answered the source's ping.
    pong_until: Option<Instant>,
    /// Until when the destination's answer is waited for, where that has a limit.
    answer_until: Option<Instant>,
}

pub fn run(relay: Relay) -> RelayReport {
    // Any channel that QEMU can have, where nobody has said how many there are.
    let told = relay.settings.channels;
    let lobby = Lobby::new(Arc::new(Qemu::new(told.unwrap_or(u8::MAX))));
    let gathering = Gathering::new(told, relay.settings.timeouts.hello);
    let mut driver = Driver {
        relay,
        lobby,
        gathering: Some(gathering),
        trunk: None,
        channels: Vec::new(),
        crew: None,
        closed: false,
        accept_again: None,
        turned_away: 0,
        remarks: Vec::new(),
        moved: ([0; 2], Instant::now()),
        pong_until: None,
        answer_until: None,
    };
    let outcome = loop {
        if driver.relay.gate.is_cancelled() {
            break Outcome::Cancelled;
        }
        match driver.step() {
            Ok(None) => {}
            Ok(Some(outcome)) => break outcome,
            Err(_) if driver.relay.gate.is_cancelled() => break Outcome::Cancelled,
            Err(why) if driver.may_run() => break Outcome::Uncertain(why),
            Err(why) => break Outcome::Failed(why),
        }
    };
    driver.finish(outcome)
}

impl Driver {
    fn may_run(&self) -> bool {
        self.trunk.as_ref().is_some_and(Trunk::may_run)
    }

    /// Does what can be done, then waits; how it ended, once it has.
    fn step(&mut self) -> Result<Option<Outcome>, Failure> {
        self.accept()?;
        for greeting in self.lobby.listen(self.relay.bell.sleeper().set()) {
            match greeting {
                Greeting::Hello(stream, hello) => self.greet(&stream, &hello),
                Greeting::Stranger(why) => self.remark(format!("a connection was turned away: {why}")),
                Greeting::Silent => {}
            }
        }
        self.gather()?;
        if let Some(outcome) = self.pump()? {
            return Ok(Some(outcome));
        }
        if let Err(why) = self.reap() {
            // A destination that gives up may have said so on the main connection.
            return self.pump()?.map_or(Err(why), |outcome| Ok(Some(outcome)));
        }
        self.check_pong()?;
        let stall = self.check_barriers()?;
        if let Some(outcome) = self.check_patience() {
            return Ok(Some(outcome));
        }

        let set = self.relay.bell.sleeper().set();
        set.clear();
        self.lobby.watch(set);
        if let Some(when) = self.accept_again {
            set.until(when);
        } else if let Some(fd) = self.relay.listener.fd() {
            set.watch(fd, true, false);
        }
        for when in [stall, self.pong_until, self.answer_until].into_iter().flatten() {
            set.until(when);
        }
        if let Some(gathering) = &mut self.gathering {
            gathering.watch(set);
        }
        if let Some(trunk) = &self.trunk {
            trunk.watch(set);
        }
        let mut places = Vec::new();
        if !self.closed {
            for (id, channel) in self.channels.iter().enumerate() {
                places.push((id, set.watch(channel.ends.destination.as_fd(), true, false)));
            }
        }
        self.relay.bell.wait();
        // A destination says nothing on a channel: it can only have closed it.
        let set = self.relay.bell.sleeper().set();
        if let Some((id, _)) = places.iter().find(|(_, place)| set.ready(*place).readable) {
            let id = *id;
            // It may have said why on the main connection.
            if let Some(outcome) = self.pump()? {
                return Ok(Some(outcome));
            }
            if !self.closed {
                return Err(broken(id, "the destination has closed it before the source's stream has ended"));
            }
        }
        Ok(None)
    }

    fn accept(&mut self) -> Result<(), Failure> {
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
                    return Err(Failure::Listen { address, reason: e.into() });
                }
            }
        }
        self.accept_again = Some(Instant::now() + CROWD_PAUSE);
        Ok(())
    }

    fn remark(&mut self, what: String) {
        if self.remarks.len() < REMARKS_MAX {
            self.remarks.push(what);
        }
    }

    fn turn_away(&mut self, why: &str) {
        self.turned_away += 1;
        self.remark(format!("a connection was turned away: {why}"));
    }

    /// Somebody has said who it is.
    fn greet(&mut self, stream: &Stream, hello: &Hello) {
        let source = stream.socket().clone();
        source.set_keep_alive();
        let greeted = match (&mut self.gathering, hello.role) {
            (Some(gathering), HelloRole::Control) => gathering.main(source),
            (Some(gathering), HelloRole::Data(id)) => {
                gathering.channel(source, InitPacket { uuid: hello.session.0, channel: id.0 })
            }
            (None, HelloRole::Control) => Err("there is a main connection already".to_owned()),
            (None, HelloRole::Data(ChannelId(id))) => {
                Err(format!("channel {id} came when the migration had begun with {} channels", self.channels.len()))
            }
        };
        if let Err(why) = greeted {
            self.turn_away(&why);
        }
    }

    /// Hears those who may be a source; once one is all there, connects it to the destination.
    fn gather(&mut self) -> Result<(), Failure> {
        let Some(gathering) = &mut self.gathering else { return Ok(()) };
        let mut strangers = Vec::new();
        let set = self.relay.bell.sleeper().set();
        let gathered = gathering.listen(set, &self.relay.gate, self.relay.progress.cells(MAIN), &mut strangers);
        strangers.iter().for_each(|why| self.turn_away(why));
        let Some(Gathered { trunk, channels, dialect }) = gathered? else { return Ok(()) };
        self.gathering = None;
        let blocks = Arc::new(trunk.blocks().to_vec());
        self.trunk = Some(trunk);

        // The main connection first, which QEMU 7.2 takes the first one for, and its first bytes at once: a connection that
        // says nothing, or half of what it should, brings a QEMU destination to a standstill.
        let Some(destination) = self.connect(Opening::Control)? else { return Ok(()) };
        let Some(trunk) = &mut self.trunk else { return Ok(()) };
        destination.set_nonblocking(true).map_err(set_up)?;
        trunk.destination = Some(destination);
        trunk.pump(&self.relay.gate, self.relay.progress.cells(MAIN))?;
        let mut lanes = Vec::new();
        for channel in channels {
            let id = channel.init.channel;
            let opening = Opening::Data { channel: ChannelId(id), generation: FIRST_GENERATION };
            let Some(destination) = self.connect(opening)? else { return Ok(()) };
            let init = channel.init.encode();
            match destination.send(&init) {
                Ok(n) if n == init.len() => {}
                _ => return Err(broken(id.into(), "the destination does not take its first bytes")),
            }
            channel.source.set_nonblocking(false).and_then(|()| destination.set_nonblocking(false)).map_err(set_up)?;
            self.relay.progress.cells(id.into()).wire_bytes.fetch_add(init.len() as u64, Relaxed);
            let ends = Arc::new(Ends { source: channel.source, destination });
            let standing = Arc::new(Standing::default());
            let last = Look::default();
            self.channels.push(Channel { ends: ends.clone(), standing: standing.clone(), last, ended: false });
            let (progress, controller) = (self.relay.progress.clone(), self.relay.bell.ringer());
            let blocks = blocks.clone();
            lanes.push(Lane { init, first: channel.first, dialect, ends, blocks, standing, progress, controller });
        }
        if !lanes.is_empty() {
            let mut launch = Launch::new(&StdSpawn, Arc::new(self.relay.bell.ringer()));
            let options = CrewOptions::default();
            launch.start = Arc::new(move |starting: &_| options.own_hook(starting).map(|()| None));
            let ids = 0..lanes.len();
            let crew = crate::sys::thread::with_signals_blocked(|| {
                Crew::muster(ids, &launch, |_| Ok::<_, Infallible>(lanes))
            });
            self.crew = Some(crew.map_err(|e| Failure::Worker(e.to_string()))?);
        }
        self.relay.progress.set(|c| &c.ram_bytes, blocks.iter().map(|block| block.bytes).sum());
        self.relay.progress.stage(Stage::Precopy);
        self.pong_until = Some(Instant::now() + self.pong_limit());
        Ok(())
    }

    /// A connection to the destination; `None` if it was cancelled meanwhile.
    fn connect(&mut self, opening: Opening) -> Result<Option<Arc<Socket>>, Failure> {
        let deadline = Instant::now() + self.relay.settings.timeouts.connect;
        let mut endpoint = Endpoint::Addresses(vec![self.relay.to.clone()]);
        let gate = self.relay.gate.clone();
        let connected = open(&mut endpoint, opening, None, &mut self.relay.bell, deadline, &|| gate.is_cancelled())?;
        // A destination is waited for without a limit: a machine that is gone must be noticed all the same.
        Ok(connected.map(|stream| stream.socket().clone()).inspect(|socket| socket.set_keep_alive()))
    }

    /// Moves the main connection on, past every barrier for which all channels are there.
    fn pump(&mut self) -> Result<Option<Outcome>, Failure> {
        let Some(trunk) = &mut self.trunk else { return Ok(None) };
        let progress = &self.relay.progress;
        // What is left over can be sent, and so is not waited for.
        for _ in 0..TURNS_MAX {
            trunk.pump(&self.relay.gate, progress.cells(MAIN))?;
            let Some(hold) = trunk.hold() else { break };
            if !self.channels.iter().all(|channel| channel.standing.passed() >= hold.syncs) {
                break;
            }
            if hold.closes {
                // One that has not begun is not given what it may run.
                if trunk.awaits_pong() {
                    break;
                }
                for (id, channel) in self.channels.iter().enumerate() {
                    let (syncs, behind) = channel.standing.close();
                    if syncs > hold.syncs {
                        return Err(differ("a SYNC too many", id, syncs, hold.syncs));
                    }
                    if behind > 0 {
                        return Err(broken(id, "pages came behind the last barrier"));
                    }
                }
                self.closed = true;
            }
            trunk.let_go();
        }
        progress.set(|c| &c.rounds, trunk.barriers);
        if trunk.awaits_answer() {
            progress.stage(Stage::HandOver);
        } else if trunk.is_in_end() {
            progress.stage(Stage::Paused);
        }
        Ok(trunk.verdict())
    }

    /// Takes note of the threads that have ended.
    fn reap(&mut self) -> Result<(), Failure> {
        let Some(crew) = &mut self.crew else { return Ok(()) };
        let mut lost = Vec::new();
        while let Some(id) = crew.poll_exit() {
            match crew.take_exit(id) {
                Some(Exit::Done(Ok(()))) => self.channels[id].ended = true,
                // All that it had to say of RAM has been passed on.
                Some(Exit::Done(Err(Stopped::Lost(why)))) if self.closed => {
                    self.channels[id].ended = true;
                    lost.push(format!("channel {id} ended badly, behind the last barrier: {why}"));
                }
                Some(Exit::Done(Err(Stopped::Lost(why) | Stopped::Wrong(why)))) => return Err(broken(id, &why)),
                Some(Exit::Panicked { message }) => return Err(Failure::Worker(message)),
                Some(Exit::NeverRan) | None => return Err(broken(id, "its thread has not run")),
            }
        }
        lost.into_iter().for_each(|what| self.remark(what));
        Ok(())
    }

    /// Compares the SYNCs of the channels with the barriers of the main connection: a destination would wait for ever
    /// where they differ. Gives the time at which to look again.
    fn check_barriers(&mut self) -> Result<Option<Instant>, Failure> {
        let Some(trunk) = &self.trunk else { return Ok(None) };
        let now = Instant::now();
        let main = [trunk.received(), self.relay.progress.cells(MAIN).wire_bytes.load(Relaxed)];
        let mut moved = main != self.moved.0;
        for channel in &mut self.channels {
            let look = channel.standing.look();
            moved |= look != channel.last;
            channel.last = look;
        }
        if moved {
            self.moved = (main, now);
        }
        if self.closed {
            if trunk.awaits_answer() {
                for channel in self.channels.iter().filter(|channel| channel.ended) {
                    channel.ends.destination.shutdown_write();
                }
            }
            return Ok(None);
        }
        let barriers = trunk.barriers;
        let stall = self.relay.settings.timeouts.stall;
        let until = self.moved.1 + stall;
        let mut again = None;
        // A destination that is slow holds up channels, and those hold up the source's main connection.
        let held_up = |channel: &Channel| channel.last.is_sending() && channel.last.syncs <= barriers;
        let nobody_held_up = trunk.is_idle() && !self.channels.iter().any(held_up);
        for (id, channel) in self.channels.iter().enumerate() {
            let Look { syncs, passed, .. } = channel.last;
            if channel.ended && syncs < barriers {
                return Err(differ("the source has ended a channel too early", id, syncs, barriers));
            }
            // What the source says on its main connection comes behind what it has put into the channels.
            let lacks_syncs = passed < barriers && !channel.last.is_sending();
            if (lacks_syncs || nobody_held_up && (syncs > barriers || channel.ended)) && now >= until {
                return Err(differ("nothing moves", id, if lacks_syncs { passed } else { syncs }, barriers));
            }
            // Nobody says when a channel is held up no longer.
            if passed != barriers || channel.ended {
                again = Some(if now < until { until } else { now + stall });
            }
        }
        Ok(again)
    }

    /// How long a destination may take to answer: another relay gathers the source's connections first, and connects to its own.
    fn pong_limit(&self) -> Duration {
        self.relay.settings.timeouts.hello + self.relay.settings.timeouts.connect
    }

    /// A destination answers the source's ping as soon as it reads the main connection, which it does when all channels are
    /// there that it wants.
    fn check_pong(&mut self) -> Result<(), Failure> {
        if !self.trunk.as_ref().is_some_and(Trunk::awaits_pong) {
            self.pong_until = None;
        }
        if self.pong_until.is_none_or(|until| Instant::now() < until) {
            return Ok(());
        }
        let ms = self.pong_limit().as_millis() as u64;
        let waiting_for = "the destination to begin: are multifd and multifd-channels the same at both ends?";
        Err(Failure::Silent { waiting_for, ms })
    }

    /// Whether nobody waits for the destination's answer any longer.
    fn check_patience(&mut self) -> Option<Outcome> {
        let trunk = self.trunk.as_ref()?;
        let asked = self.relay.stops.load(Relaxed);
        let give_up = |why: Failure| match trunk.may_run() {
            true => Outcome::Uncertain(why),
            false => Outcome::Failed(why),
        };
        if asked > 0 && !trunk.may_run() {
            return Some(Outcome::Cancelled);
        }
        if asked > 1 {
            let text = "nobody waits for the destination's answer any longer, which may have the guest";
            return Some(give_up(super::trunk::broken(text)));
        }
        if asked == 0 && trunk.deaf().is_none() {
            return None;
        }
        let patience = self.relay.settings.timeouts.silence;
        let now = Instant::now();
        let mut until = self.answer_until.unwrap_or(now + patience);
        if asked == 0 {
            // It is still being given what the source has said.
            until = until.max(self.moved.1 + patience);
        }
        self.answer_until = Some(until);
        if now < until {
            return None;
        }
        let (waiting_for, ms) = ("the destination's answer", patience.as_millis() as u64);
        Some(give_up(trunk.deaf().cloned().unwrap_or(Failure::Silent { waiting_for, ms })))
    }

    fn finish(mut self, mut outcome: Outcome) -> RelayReport {
        let patience = if outcome == Outcome::Cancelled { LAST_WORD_OF_CANCEL } else { LAST_WORD };
        if outcome != Outcome::Completed {
            // Whoever does not know says nothing: the source learns as much as if the destination had closed.
            let tells = !matches!(outcome, Outcome::Uncertain(_));
            let mut mains: Vec<Trunk> = self.gathering.take().into_iter().flat_map(Gathering::into_mains).collect();
            for trunk in mains.iter_mut().chain(&mut self.trunk) {
                if tells {
                    trunk.refuse();
                }
                trunk.source.shutdown_write();
                if let Some(destination) = &trunk.destination {
                    destination.shutdown();
                }
            }
            if let Some(crew) = &self.crew {
                crew.close(Close::Abort);
            }
            for trunk in mains.iter().filter(|trunk| trunk.has_return_path()) {
                await_close(&trunk.source, patience);
            }
        }
        if let Some(trunk) = &self.trunk {
            // Where the destination may run the guest, the source must not take it back for want of a reader.
            let may_run = matches!(outcome, Outcome::Completed | Outcome::Uncertain(_));
            if may_run || trunk.has_return_path() {
                let in_order = await_close(&trunk.source, patience);
                let set = self.relay.bell.sleeper().set();
                let asks = outcome == Outcome::Completed && trunk.has_return_path();
                if asks && !(in_order && is_taken_in(&trunk.source, set, ACKNOWLEDGED)) {
                    outcome = untold("it left, or was cut off, before it took in the answer");
                }
            } else {
                // It takes what it has sent for received: whatever is still to come must not be taken from it.
                trunk.source.shutdown();
                if trunk.has_ended() || trunk.awaits_answer() {
                    let what = "the source has no return path, and may take its guest for gone: continue it there";
                    self.remarks.push(what.to_owned());
                }
            }
        }
        if let Some(crew) = &mut self.crew {
            crew.close(Close::Abort);
            crew.join();
        }
        if outcome == Outcome::Completed && self.trunk.as_ref().is_some_and(|trunk| !trunk.has_return_path()) {
            self.remark("the source had no return path: nobody has said that the destination has taken the guest".to_owned());
        }
        let progress = &self.relay.progress;
        progress.stage(Stage::Ended);
        let (all, main) = (progress.channels(), progress.channel(MAIN).unwrap_or_default());
        let counters = RelayCounters {
            main_bytes: main.wire_bytes,
            channel_bytes: all.wire_bytes - main.wire_bytes,
            normal_pages: all.payload_bytes / PAGE_BYTES,
            zero_pages: all.zero_bytes / PAGE_BYTES,
            sync_packets: self.channels.iter().map(|channel| channel.standing.syncs()).sum(),
            barriers: self.trunk.as_ref().map_or(0, |trunk| trunk.barriers),
        };
        RelayReport {
            outcome,
            counters,
            channels: self.channels.len(),
            turned_away: self.turned_away + self.lobby.turned_away(),
            total: self.trunk.as_ref().map_or(Duration::ZERO, |trunk| trunk.since.elapsed()),
            remarks: self.remarks,
        }
    }
}

fn set_up(e: std::io::Error) -> Failure {
    Failure::Control { doing: "setting it up", reason: e.into() }
}

fn differ(what: &str, channel: usize, syncs: u64, barriers: u64) -> Failure {
    let text = format!("{what}: {syncs} SYNCs on channel {channel}, {barriers} barriers on the main connection");
    Failure::Protocol(text)
}

/// Lets a source hear the last word: to close a socket with bytes in it that nobody has read would take the word back. False
/// where the connection broke instead of ending.
fn await_close(source: &Socket, patience: Duration) -> bool {
    let Ok(event) = EventFd::new() else { return true };
    let (mut set, until, mut bytes) = (PollSet::new(Arc::new(event)), Instant::now() + patience, [0; 4096]);
    loop {
        match source.recv(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                set.clear();
                set.watch(source.as_fd(), true, false);
                set.until(until);
                set.wait();
            }
            Err(_) => return false,
        }
        if Instant::now() >= until {
            return true;
        }
    }
}

fn broken(id: usize, reason: &str) -> Failure {
    // There are 255 at the most.
    Failure::Channel { channel: ChannelId(id as u8), generation: FIRST_GENERATION, reason: reason.to_owned() }
}
