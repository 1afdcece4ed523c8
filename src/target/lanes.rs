#![forbid(unsafe_code)]
//! The target's end of all channels: the barrier where the lanes meet, and the workers that run them.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Weak};

use crate::barrier::{Barrier, LaneWord};
use crate::bell::{Close, Park, Ringer};
use crate::channel::ChannelError;
use crate::channel::records::Records;
use crate::channel::recv::{RecvEnd, RecvGear, RecvRole};
use crate::config::{CrewOptions, Peer, Placement};
use crate::crew::{Crew, Exit, Launch};
use crate::dirty::bitmap::DirtyBitmap;
use crate::error::Failure;
use crate::framing::Framing;
use crate::memory::Ram;
use crate::memory::look::Look;
use crate::memory::scatter::{write_bytes, write_zeros};
use crate::net::Stream;
use crate::poll::PollSleeper;
use crate::progress::Progress;
use crate::session::source::FIRST_GENERATION;
use crate::session::target::TargetEvent;
use crate::sys::event::EventFd;
use crate::sys::socket::Socket;
use crate::units::{BlockId, ChannelId, Generation, Round};
use crate::wire::control::{BlockInfo, LanePong};

/// What all lanes share.
pub(super) struct LaneGear {
    pub ram: Ram,
    pub framing: Arc<dyn Framing>,
    pub blocks: Arc<[BlockInfo]>,
    pub records: Records,
    pub controller: Ringer<PollSleeper>,
    pub progress: Progress,
}

/// All lanes of the target.
pub(super) struct Lanes {
    gear: LaneGear,
    options: CrewOptions,
    place: Placement,
    look: Look,
    barrier: Arc<Barrier>,
    landed: DirtyBitmap,
    named: DirtyBitmap,
    lanes: Vec<Lane>,
    /// The lanes that were there from the start. They know each other's bells, and wake each other.
    first: Crew<RecvRole>,
}

struct Lane {
    at: Place,
    seen: (LaneWord, LaneWord),
    generation: Generation,
    /// What the counters stood at when it began.
    wire_bytes_before: u64,
    cpu: Option<usize>,
    /// Its connection, if it was there from the start.
    socket: Weak<Socket>,
    /// Tells it that the source has said all elsewhere: see [`Lanes::drain`].
    last_call: Option<Arc<EventFd>>,
    /// Its connection has ended where the wire lets it.
    ended: bool,
}

/// Where a lane's worker is.
#[derive(Default)]
enum Place {
    /// There is none, or it has been joined.
    #[default]
    Nowhere,
    /// In the first crew.
    First,
    /// It came later, in a crew of its own. Nobody but the controller knows its bell, and wakes it.
    Late(Box<Crew<RecvRole>>, Ringer<Park>),
}

impl Lanes {
    /// Starts the lanes whose channels are connected; others may follow.
    pub fn muster(streams: Vec<Option<Stream>>, gear: LaneGear, options: &CrewOptions) -> Result<Lanes, Failure> {
        let count = streams.len();
        // The control connection is the last member, where it is one.
        let barrier = Arc::new(Barrier::new(count + usize::from(gear.framing.control_meets())));
        let place = options.place(count, Peer::of(streams.iter().flatten().map(|stream| &**stream.socket())))?;
        let (landed, named) = (DirtyBitmap::for_ram(&gear.ram), DirtyBitmap::for_ram(&gear.ram));
        let look = Look::new(gear.records.want_hashes(), false);
        let ids: Vec<_> = streams.iter().enumerate().filter(|(_, stream)| stream.is_some()).map(|(id, _)| id).collect();
        (0..count).filter(|id| !ids.contains(id)).for_each(|id| barrier.retire(id));
        let kit = LaneKit { gear: &gear, look, barrier: &barrier, landed: &landed, named: &named };
        let last_call = |_: &usize| gear.framing.control_meets().then(|| EventFd::new().map(Arc::new)).transpose();
        let calls = ids.iter().map(last_call).collect::<io::Result<Vec<_>>>();
        let calls = calls.map_err(|e| Failure::Worker(format!("no eventfd for a lane: {e}")))?;
        let socket = |stream: &Option<Stream>| stream.as_ref().map_or_else(Weak::new, |s| Arc::downgrade(s.socket()));
        let sockets: Vec<_> = streams.iter().map(socket).collect();
        let first = launch(&place, options, &gear, ids, |bells| {
            let connected = streams.into_iter().enumerate().filter_map(|(id, stream)| stream.map(|stream| (id, stream)));
            let role = |(own, (id, stream)): (usize, (usize, Stream))| {
                let others = bells.iter().enumerate().filter(|(other, _)| *other != own).map(|(_, bell)| bell.clone());
                RecvRole::new(RecvGear { last_call: calls[own].clone(), ..kit.of(id, stream, false) }, others.collect())
            };
            connected.enumerate().map(role).collect()
        })?;
        let lane = |socket| Lane {
            at: Place::Nowhere,
            seen: Default::default(),
            generation: FIRST_GENERATION,
            wire_bytes_before: 0,
            cpu: None,
            socket,
            last_call: None,
            ended: false,
        };
        let mut lanes: Vec<_> = sockets.into_iter().map(lane).collect();
        for (worker, last_call) in first.workers().iter().zip(calls) {
            let lane = &mut lanes[worker.id];
            (lane.at, lane.cpu, lane.last_call) = (Place::First, worker.cpu, last_call);
        }
        Ok(Lanes { gear, options: options.clone(), place, look, barrier, landed, named, lanes, first })
    }

    /// Puts a lane into the set that counts as having passed nothing, and then starts it: by its first marks the source
    /// says how far it counts as having come.
    pub fn start(&mut self, channel: ChannelId, generation: Generation, stream: Stream) -> Result<(), Failure> {
        let id = usize::from(channel.0);
        self.barrier.join(id, 0, 0);
        let kit = LaneKit {
            gear: &self.gear,
            look: self.look,
            barrier: &self.barrier,
            landed: &self.landed,
            named: &self.named,
        };
        // Those that came later than this one are woken by the controller.
        let mut others: Vec<_> = self.first.ringers().cloned().collect();
        others.extend(self.lanes.iter().filter_map(|lane| match &lane.at {
            Place::Late(_, bell) => Some(bell.clone()),
            Place::First | Place::Nowhere => None,
        }));
        let started = launch(&self.place, &self.options, &self.gear, vec![id], |_| {
            vec![RecvRole::new(kit.of(id, stream, true), others)]
        });
        let crew = match started {
            Ok(crew) => crew,
            Err(why) => {
                self.barrier.retire(id);
                return Err(why);
            }
        };
        let lane = &mut self.lanes[id];
        lane.cpu = crew.workers().first().and_then(|worker| worker.cpu);
        lane.generation = generation;
        lane.wire_bytes_before = self.gear.progress.channel(id).map_or(0, |counts| counts.wire_bytes);
        lane.seen = (LaneWord::default(), LaneWord::default());
        let bell = crew.ringers().next().cloned();
        lane.at = bell.map_or(Place::Nowhere, |bell| Place::Late(Box::new(crew), bell));
        Ok(())
    }

    /// Ends a lane and joins it, then takes it out of the set: nothing of it lands any more, and what has landed is seen by
    /// all that go on without it. Harmless if it is out already.
    pub fn retire(&mut self, channel: ChannelId) {
        let id = usize::from(channel.0);
        let Some(lane) = self.lanes.get_mut(id) else { return };
        match std::mem::take(&mut lane.at) {
            Place::Nowhere => return,
            Place::First => {
                self.first.handle().close_worker(id, Close::Abort);
                self.first.take_exit(id);
            }
            Place::Late(mut crew, _) => {
                crew.close(Close::Abort);
                crew.join();
            }
        }
        self.barrier.retire(id);
        self.first.ringers().for_each(|bell| {
            bell.ring();
        });
        self.wake_late();
    }

    /// Wakes the lanes that came later: the others do not know them all.
    fn wake_late(&self) {
        for lane in &self.lanes {
            if let Place::Late(_, bell) = &lane.at {
                bell.ring();
            }
        }
    }

    /// A lane that has moved since the last look. Ask until there is none: one by one, as what is done about the first can
    /// end the lanes behind it.
    pub fn poll_moved(&mut self) -> Option<TargetEvent> {
        // Ordered reads first: what the lanes landed and recorded before their marks is seen from here on.
        let (_, _) = (self.barrier.all_passed(), self.barrier.all_flushed());
        let now = |index: usize| (self.barrier.passed(index), self.barrier.flushed(index));
        let index = (0..self.lanes.len()).find(|index| now(*index) != self.lanes[*index].seen)?;
        let (rounds, epochs) = now(index);
        self.lanes[index].seen = (rounds, epochs);
        self.wake_late();
        Some(TargetEvent::LaneMoved { channel: ChannelId(index as u8), rounds, epochs })
    }

    /// A lane that has ended by itself since this was last asked, why, and whether another connection would not help. No
    /// lane may: the target ends them all before it runs the guest.
    pub fn poll_failed(&mut self) -> Option<(ChannelId, String, bool)> {
        while let Some(id) = self.first.poll_exit() {
            // One that was retired is not told of.
            let exit = self.first.workers().iter().find(|worker| worker.id == id).and_then(|worker| worker.exit.as_ref());
            // Where the control connection says when a round ends, it also says whether a lane was still needed.
            if let (true, Some(Exit::Done(RecvEnd { result: Ok(()) }))) = (self.gear.framing.control_meets(), exit) {
                self.lanes[id].ended = true;
                continue;
            }
            if let (Some((why, is_ours)), Place::First) = (why_ended(exit), &self.lanes[id].at) {
                return Some((ChannelId(id as u8), why, is_ours));
            }
        }
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let Place::Late(crew, _) = &mut lane.at else { continue };
            if crew.poll_exit().is_some() {
                if let Some((why, is_ours)) = why_ended(crew.workers().first().and_then(|worker| worker.exit.as_ref())) {
                    return Some((ChannelId(index as u8), why, is_ours));
                }
            }
        }
        None
    }

    /// How far each lane is, for the source to see who lags.
    pub fn pongs(&self) -> Vec<LanePong> {
        let slowest = self.barrier.all_passed();
        let pong = |(index, lane): (usize, &Lane)| {
            let rounds_passed = self.barrier.passed(index).count() as u32;
            let wire_bytes = self.gear.progress.channel(index).map_or(0, |counts| counts.wire_bytes);
            LanePong {
                channel: ChannelId(index as u8),
                generation: lane.generation,
                rounds_passed,
                at_barrier: u64::from(rounds_passed) > slowest,
                bytes: wire_bytes - lane.wire_bytes_before,
            }
        };
        self.lanes.iter().enumerate().map(pong).collect()
    }

    /// Lets every lane read what has come by now, and the rest of a packet that has begun to; and then end as if the source
    /// had ended its connection there.
    pub fn drain(&self) {
        self.lanes.iter().filter_map(|lane| lane.last_call.as_ref()).for_each(|call| call.signal());
    }

    /// Ends every lane and joins it. Harmless when done before.
    pub fn end(&mut self) {
        self.first.close(Close::Abort);
        for lane in &self.lanes {
            if let Place::Late(crew, _) = &lane.at {
                crew.close(Close::Abort);
            }
        }
        self.first.join();
        for lane in &mut self.lanes {
            if let Place::Late(crew, _) = &mut lane.at {
                crew.join();
            }
        }
    }

    /// The control connection has come to the end of a round: the lanes wait for it there, and for each other.
    pub fn pass_control(&self, round: Round) {
        self.barrier.pass(self.lanes.len(), round);
        self.first.ringers().for_each(|bell| {
            bell.ring();
        });
    }

    /// Whether everybody has come to the end of the round.
    pub fn may_go(&self, round: Round) -> bool {
        self.barrier.may_go(round)
    }

    /// Whether somebody waits for others at the end of a round.
    pub fn someone_waits(&self) -> bool {
        let all = self.barrier.all_passed();
        (0..self.barrier.lanes()).any(|lane| self.barrier.passed(lane).count() > all)
    }

    /// Whether there are bytes to be read that a lane does not read, although it is not at the end of its round: it waits
    /// for our own memory, which a disk that stands still may be behind, and not for the source.
    pub fn leaves_unread(&self) -> bool {
        let all = self.barrier.all_passed();
        let leaves_unread = |(index, lane): (usize, &Lane)| {
            let is_at_work = !lane.ended && self.barrier.passed(index).count() <= all;
            is_at_work && lane.socket.upgrade().is_some_and(|socket| socket.has_unread())
        };
        self.lanes.iter().enumerate().any(leaves_unread)
    }

    /// A lane whose connection has ended where it may, before it came to the end of this round.
    pub fn ended_before(&self, round: Round) -> Option<ChannelId> {
        let is_short = |(index, lane): &(usize, &Lane)| {
            lane.ended && self.barrier.passed(*index).count() <= u64::from(round.0)
        };
        self.lanes.iter().enumerate().find(is_short).map(|(index, _)| ChannelId(index as u8))
    }

    /// Puts some bytes of a page where they belong; the last ones last. False if nothing may be written there.
    pub fn land(&self, round: Round, id: BlockId, at: u64, bytes: &[u8]) -> bool {
        let Some(block) = self.gear.ram.block(id) else { return false };
        let page_bytes = block.page_size().bytes();
        let page = at / page_bytes;
        if page >= block.pages() {
            return false;
        }
        self.named.mark_range(id, page, 1);
        self.landed.mark_range(id, page, 1);
        let has_landed = write_bytes(block, at, bytes);
        let ends_page = (at + bytes.len() as u64) % page_bytes == 0;
        if has_landed && ends_page {
            if let Some(hash) = self.look.hash_at(block, page) {
                self.gear.records.of(id, round).data(page, hash);
            }
        }
        has_landed
    }

    /// Makes a page zero, as lanes do; how long it is. `None` if it cannot be.
    pub fn land_zero(&self, round: Round, id: BlockId, page: u64) -> Option<u64> {
        let block = self.gear.ram.block(id).filter(|block| page < block.pages())?;
        self.named.mark_range(id, page, 1);
        let is_zero = !self.landed.is_marked(id, page) || write_zeros(block, page, 1);
        self.gear.records.of(id, round).zeros(page, 1);
        is_zero.then_some(block.page_size().bytes())
    }

    /// Whether the connections of all lanes have ended where they may.
    pub fn all_ended(&self) -> bool {
        self.lanes.iter().all(|lane| lane.ended)
    }

    /// Whether a lane's connection has ended where it may.
    pub fn any_ended(&self) -> bool {
        self.lanes.iter().any(|lane| lane.ended)
    }

    /// How many pages of each block the source has spoken of, as data or as zeros.
    pub fn named(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.gear.ram.blocks().len()).map(|index| {
            let id = BlockId(index as u16);
            let pages = self.named.shape(id).map_or(0, |(pages, _)| pages);
            self.named.count_range(id, 0, pages)
        })
    }

    /// The same, in bytes of all blocks.
    pub fn named_bytes(&self) -> u64 {
        self.named().zip(self.gear.ram.blocks()).map(|(pages, block)| pages * block.page_size().bytes()).sum()
    }

    /// The CPU each lane was pinned to.
    pub fn cpus(&self) -> impl Iterator<Item = Option<usize>> + '_ {
        self.lanes.iter().map(|lane| lane.cpu)
    }
}

/// What a lane is made from.
struct LaneKit<'a> {
    gear: &'a LaneGear,
    look: Look,
    barrier: &'a Arc<Barrier>,
    landed: &'a DirtyBitmap,
    named: &'a DirtyBitmap,
}

impl LaneKit<'_> {
    fn of(&self, id: usize, stream: Stream, joins_late: bool) -> RecvGear {
        RecvGear {
            channel: ChannelId(id as u8),
            stream,
            ram: self.gear.ram.clone(),
            landed: self.landed.clone(),
            named: self.named.clone(),
            look: self.look,
            records: self.gear.records.clone(),
            barrier: self.barrier.clone(),
            controller: self.gear.controller.clone(),
            progress: self.gear.progress.clone(),
            reader: self.gear.framing.reader(&self.gear.blocks, joins_late),
            last_call: None,
        }
    }
}

fn launch(
    place: &Placement,
    options: &CrewOptions,
    gear: &LaneGear,
    ids: Vec<usize>,
    make: impl FnOnce(&[Ringer<Park>]) -> Vec<RecvRole>,
) -> Result<Crew<RecvRole>, Failure> {
    let launch = Launch {
        start: place.start.clone(),
        ..Launch::new(&*options.spawn, Arc::new(gear.controller.clone()))
    };
    let made = crate::sys::thread::with_signals_blocked(|| {
        Crew::muster(ids, &launch, |bells| Ok::<_, Infallible>(make(bells)))
    });
    made.map_err(|e| Failure::Worker(e.to_string()))
}

/// Why a lane ended that was not told to, and whether another connection would not help.
fn why_ended(exit: Option<&Exit<RecvEnd>>) -> Option<(String, bool)> {
    match exit {
        Some(Exit::Done(end)) => match &end.result {
            Ok(()) => Some(("the source ended it before the hand-over".to_owned(), false)),
            Err(ChannelError::Aborted) => None,
            Err(why) => Some((why.to_string(), why.is_ours())),
        },
        Some(Exit::Panicked { message }) => Some((format!("its lane panicked: {message}"), true)),
        Some(Exit::NeverRan) | None => Some(("its lane never ran".to_owned(), true)),
    }
}
