#![forbid(unsafe_code)]
//! Gathers the connections of one source, before the destination hears of any.
//!
//! No stream says how many channels there are, and a QEMU destination falls over one that is wrong: it stands still for one
//! that says nothing, and dies of one too many. But a source says the first barrier, in the section START, only when each of
//! its channels has sent its SYNC. So the channels are those that have said it when that barrier is there, and a stranger,
//! even one that says the first 64 bytes of a channel, is none.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::trunk::Trunk;
use crate::error::Failure;
use crate::gate::Gate;
use crate::progress::ChannelCells;
use crate::qemu::wire::{Barrier, Dialect, INIT_BYTES, InitPacket, RAM_PACKET_BYTES, RamPacket};
use crate::sys::event::PollSet;
use crate::sys::socket::Socket;

/// How long no channel may have come any more where nobody has said how many there are: connections overtake each other,
/// and TCP sends a lost segment once more after 200 ms and some round trips.
const SETTLED: Duration = Duration::from_millis(500);
/// How long a source's channels may still be coming behind its main connection, where only such are here as had left before
/// it came: a lost SYN is sent again after a second.
const COMES_LATE: Duration = Duration::from_millis(1200);
/// Connections that begin like a main connection, at the most. Each has half a MiB of address space.
const MAINS_MAX: usize = 8;
/// Connections that begin like a channel, at the most.
const CHANNELS_MAX: usize = 512;

/// A source that is all there.
#[derive(Debug)]
pub struct Gathered {
    pub trunk: Trunk,
    /// From 0 on, without a gap.
    pub channels: Vec<Channel>,
    pub dialect: Dialect,
}

/// A connection that has begun like a channel.
#[derive(Debug)]
pub struct Channel {
    pub source: Arc<Socket>,
    pub init: InitPacket,
    /// Its first packet.
    pub first: Box<[u8; RAM_PACKET_BYTES]>,
    filled: usize,
    until: Instant,
    place: Option<usize>,
    number: u64,
    /// It is one of the source's, as far as can be seen.
    counts: bool,
}

#[derive(Debug)]
struct Main {
    trunk: Trunk,
    until: Instant,
    /// Numbers of the channels that had left when it came.
    given_up: Vec<u64>,
}

/// Those who have said who they are, and may be a source.
#[derive(Debug)]
pub struct Gathering {
    told: Option<u8>,
    patience: Duration,
    mains: Vec<Main>,
    channels: Vec<Channel>,
    /// The number of the next one.
    next: u64,
    /// When a channel, or the first barrier, came last.
    moved: Instant,
    /// Since when the first barrier is there.
    started: Option<Instant>,
}

impl Gathering {
    /// For so many channels, if somebody has said so. Each connection has this long for what must come on it.
    pub fn new(told: Option<u8>, patience: Duration) -> Gathering {
        let (mains, channels) = (Vec::new(), Vec::new());
        Gathering { told, patience, mains, channels, next: 0, moved: Instant::now(), started: None }
    }

    /// A connection that has said the magic of a main connection.
    ///
    /// # Errors
    /// Why it is turned away.
    pub fn main(&mut self, source: Arc<Socket>) -> Result<(), String> {
        if self.started.is_some() {
            return Err("there is a main connection already".to_owned());
        }
        if self.mains.len() == MAINS_MAX {
            return Err("there are too many main connections".to_owned());
        }
        let trunk = Trunk::new(source).map_err(|e| e.to_string())?;
        let given_up = self.channels.iter().filter(|channel| channel.has_left()).map(|channel| channel.number).collect();
        self.mains.push(Main { trunk, until: Instant::now() + self.patience, given_up });
        Ok(())
    }

    /// A connection that has said the first bytes of a channel.
    ///
    /// # Errors
    /// Why one is turned away.
    pub fn channel(&mut self, source: Arc<Socket>, init: InitPacket) -> Result<(), String> {
        let until = Instant::now() + self.patience;
        let first = Box::new([0; RAM_PACKET_BYTES]);
        let number = self.next;
        self.next += 1;
        self.channels.push(Channel { source, init, first, filled: 0, until, place: None, number, counts: false });
        if self.channels.len() > CHANNELS_MAX {
            // The oldest of those that have left, or of those that have said nothing more.
            let oldest = |leaves: fn(&Channel) -> bool| self.channels.iter().position(leaves);
            let index = oldest(Channel::has_left).or_else(|| oldest(|channel| !channel.is_whole()));
            let index = index.unwrap_or(CHANNELS_MAX);
            self.channels.remove(index);
            return Err("too many connections say that they are channels".to_owned());
        }
        Ok(())
    }

    /// Adds everybody who is still to say something to a poll set.
    pub fn watch(&mut self, set: &mut PollSet) {
        for main in &self.mains {
            main.trunk.watch(set);
            if main.trunk.barrier.is_none() {
                set.until(main.until);
            }
        }
        for channel in self.channels.iter_mut().filter(|channel| !channel.is_whole()) {
            channel.place = Some(set.watch(channel.source.as_fd(), true, false));
            set.until(channel.until);
        }
        if let Some(started) = self.started {
            set.until(started + self.patience);
            if self.told.is_none() && self.moved + SETTLED > Instant::now() {
                set.until(self.moved + SETTLED);
            }
            let late = self.moved + COMES_LATE;
            if late > Instant::now() && self.mains.iter().any(|main| !main.given_up.is_empty()) {
                set.until(late);
            }
        }
    }

    /// Listens to everybody, without waiting; the source, once it is all there. Who turns out to be a stranger is let go,
    /// and why is added to `strangers`.
    ///
    /// # Errors
    /// Why the source, or what must be taken for one, cannot be relayed.
    pub fn listen(
        &mut self,
        set: &PollSet,
        gate: &Gate,
        counts: &ChannelCells,
        strangers: &mut Vec<String>,
    ) -> Result<Option<Gathered>, Failure> {
        let now = Instant::now();
        self.hear_channels(set, now, strangers);
        self.hear_mains(gate, counts, now, strangers)?;
        let Some(started) = self.started else { return Ok(None) };
        let Some(index) = self.mains.iter().position(|main| main.trunk.barrier.is_some()) else { return Ok(None) };
        let barrier = self.mains[index].trunk.barrier;
        self.count(index, now);
        if !self.is_complete(barrier, now)? {
            if now < started + self.patience {
                return Ok(None);
            }
            return Err(Failure::Protocol(format!("{}, {:?} after the first barrier", self.census(), self.patience)));
        }
        let trunk = self.mains.swap_remove(index).trunk;
        let others = self.mains.drain(..).map(|_| "another one's main connection is the source's".to_owned());
        strangers.extend(others);
        let (mut channels, rest): (Vec<_>, Vec<_>) = self.channels.drain(..).partition(|channel| channel.counts);
        let why = |channel: &Channel| if channel.is_whole() { "has left" } else { "has not said SYNC in time" };
        strangers.extend(rest.iter().map(|channel| format!("channel {} {}", channel.init.channel, why(channel))));
        channels.sort_by_key(|channel| channel.init.channel);
        let dialect = channels.first().map_or(Dialect::V10_0, Channel::dialect);
        Ok(Some(Gathered { trunk, channels, dialect }))
    }

    /// All main connections, to be told that it is over.
    pub fn into_mains(self) -> impl Iterator<Item = Trunk> {
        self.mains.into_iter().map(|main| main.trunk)
    }

    fn hear_channels(&mut self, set: &PollSet, now: Instant, strangers: &mut Vec<String>) {
        let moved = &mut self.moved;
        self.channels.retain_mut(|channel| {
            let why = match channel.hear(set) {
                Ok(false) if now < channel.until => return true,
                Ok(false) => "it has not said SYNC in time".to_owned(),
                Ok(true) => {
                    *moved = now;
                    return true;
                }
                Err(None) => return true,
                Err(Some(why)) => why,
            };
            strangers.push(format!("channel {}: {why}", channel.init.channel));
            false
        });
    }

    fn hear_mains(
        &mut self,
        gate: &Gate,
        counts: &ChannelCells,
        now: Instant,
        strangers: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let mut index = 0;
        while let Some(Main { trunk, until, .. }) = self.mains.get_mut(index) {
            let heard = trunk.pump(gate, counts);
            let is_late = trunk.barrier.is_none() && now >= *until;
            if !trunk.is_source && (trunk.has_ended() || is_late) {
                strangers.push("a main connection that has named no machine".to_owned());
                self.mains.remove(index);
                continue;
            }
            heard?;
            if is_late {
                let (waiting_for, ms) = ("the first barrier of the source", self.patience.as_millis() as u64);
                return Err(Failure::Silent { waiting_for, ms });
            }
            if trunk.barrier.is_some() && self.started.is_none() {
                (self.started, self.moved) = (Some(now), now);
            }
            index += 1;
        }
        Ok(())
    }

    /// Says which channels count for the source with this main connection: those that have said SYNC. One that had left when
    /// the source came is of an attempt that was given up, as long as the source stays; unless no other comes.
    fn count(&mut self, main: usize, now: Instant) {
        let Main { trunk, given_up, .. } = &self.mains[main];
        let is_old = |channel: &Channel| given_up.contains(&channel.number);
        let others = self.channels.iter().any(|channel| channel.is_whole() && !is_old(channel));
        let old_ones_count = trunk.source.has_left() || !others && now >= self.moved + COMES_LATE;
        for channel in &mut self.channels {
            channel.counts = channel.is_whole() && (old_ones_count || !is_old(channel));
        }
    }

    /// Whether those channels that count are all there are.
    fn is_complete(&self, barrier: Option<Barrier>, now: Instant) -> Result<bool, Failure> {
        let whole: Vec<&Channel> = self.channels.iter().filter(|channel| channel.counts).collect();
        let ids: BTreeSet<u8> = whole.iter().map(|channel| channel.init.channel).collect();
        let wrong = |what: &str| Err(Failure::Protocol(format!("{what}: do two sources migrate to this address?")));
        if ids.len() < whole.len() {
            return wrong("two connections say that they are one channel");
        }
        if whole.windows(2).any(|pair| pair[0].init.uuid != pair[1].init.uuid) {
            return wrong("the channels are of VMs with different uuids");
        }
        if whole.windows(2).any(|pair| pair[0].dialect() != pair[1].dialect()) {
            return wrong("the channels are of different versions of QEMU");
        }
        if self.told == Some(0) && barrier == Some(Barrier::PerRound) {
            let text = "the source has multifd on, and was said to have no channels".to_owned();
            return Err(Failure::Protocol(text));
        }
        let is_gapless = ids.iter().copied().eq(0..ids.len() as u8);
        Ok(match self.told {
            Some(told) => ids.len() == usize::from(told),
            None => {
                is_gapless && now >= self.moved + SETTLED && (!ids.is_empty() || barrier == Some(Barrier::PerSection))
            }
        })
    }

    /// Which channels there are, in words.
    fn census(&self) -> String {
        let ids: Vec<_> = self.channels.iter().filter(|channel| channel.counts).map(|c| c.init.channel).collect();
        match self.told {
            Some(told) => format!("of {told} channels, the source has {}: {ids:?}", ids.len()),
            None => format!("the source has channels {ids:?}, which cannot be all"),
        }
    }
}

impl Channel {
    fn has_left(&self) -> bool {
        self.source.has_left()
    }

    fn is_whole(&self) -> bool {
        self.filled == self.first.len()
    }

    fn dialect(&self) -> Dialect {
        Dialect::of_first_packet(&self.first)
    }

    /// Whether its first packet is whole by now; `Err(None)` if it was before.
    fn hear(&mut self, set: &PollSet) -> Result<bool, Option<String>> {
        if self.is_whole() {
            return Err(None);
        }
        let ready = self.place.take().is_none_or(|place| set.ready(place).readable);
        while ready && !self.is_whole() {
            match self.source.recv(&mut self.first[self.filled..]) {
                Ok(0) => return Err(Some("it has closed".to_owned())),
                Ok(n) => self.filled += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(Some(e.to_string())),
            }
        }
        if !self.is_whole() {
            return Ok(false);
        }
        let packet = RamPacket::decode(&self.first, self.dialect(), INIT_BYTES as u64).map_err(|e| Some(e.to_string()))?;
        match packet.sync && packet.block.is_none() {
            true => Ok(true),
            false => Err(Some("its first packet is no SYNC".to_owned())),
        }
    }
}
