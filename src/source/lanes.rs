#![forbid(unsafe_code)]
//! The source's end of all channels: rings, journals, and the workers that empty the one into the other.

use std::convert::Infallible;
use std::sync::Arc;

use crate::barrier::Barrier;
use crate::bell::{Close, Park, Ringer};
use crate::channel::ChannelError;
use crate::channel::records::Records;
use crate::channel::send::{SendEnd, SendGear, SendRole};
use crate::channel::zero_copy::ByReference;
use crate::config::{CrewOptions, Peer, Placement, WhyCopied};
use crate::crew::{Crew, Exit, Launch};
use crate::error::Failure;
use crate::journal;
use crate::memory::Ram;
use crate::memory::look::Look;
use crate::net::Stream;
use crate::poll::PollSleeper;
use crate::progress::Progress;
use crate::ring::{Consumer, Producer, ring};
use crate::source::Settings;
use crate::sync::AtomicUsize;
use crate::sync::Ordering::Relaxed;
use crate::units::{ChannelId, Epoch, Item, Round, Run};

/// Runs in one ring at the most: as many single pages as [`super::QUEUE_BYTES`] holds, and marks.
const RING_SLOTS: usize = 4096;
/// Slots of a ring that runs leave free, so that marks always find one: Flush marks of all epochs that may be
/// outstanding, and round ends of short rounds.
const MARK_SLOTS: usize = 16;
/// Items of one epoch at the most, over all channels.
pub(super) const EPOCH_ITEMS_MAX: u64 = 16384;
/// Slots of a journal: the items of the two epochs that may be outstanding and of the open one, should all of them have
/// gone through one channel, and their marks.
const JOURNAL_SLOTS: usize = 4 * EPOCH_ITEMS_MAX as usize;

/// What every worker is made from.
pub(super) struct Kit<'a> {
    pub ram: &'a Ram,
    pub settings: &'a Settings,
    pub options: &'a CrewOptions,
    pub records: &'a Records,
    pub controller: &'a Ringer<PollSleeper>,
    pub progress: &'a Progress,
}

/// All channels of the source.
pub(super) struct Lanes {
    channels: Vec<Channel>,
    /// How far each worker has sent; those of no use are out of it.
    sent: Arc<Barrier>,
    /// How many workers have sent what comes first on their connections.
    begun: Arc<AtomicUsize>,
    place: Placement,
    queue_bytes: u64,
    /// The ring that was filled last: of several that are equally empty the next one is taken, so that few runs reach
    /// all channels.
    last: usize,
}

#[derive(Default)]
struct Channel {
    line: Line,
    /// What the counters stood at when its latest worker began.
    wire_bytes_before: u64,
    cpu: Option<usize>,
    why_copied: Option<WhyCopied>,
}

#[derive(Default)]
enum Line {
    /// Nothing is outstanding, and nothing can be sent.
    #[default]
    Down,
    Up(Box<Up>),
    /// Its worker has ended. What it leaves behind is not dirty again before the target has retired the channel.
    Closed {
        journal: Consumer<Item>,
        ring: Consumer<Item>,
    },
}

struct Up {
    crew: Crew<SendRole>,
    ring: Producer<Item>,
    journal: Consumer<Item>,
    bell: Ringer<Park>,
}

/// Runs that travel again.
#[derive(Default)]
pub(super) struct GivenBack {
    /// Those that a worker had taken, and may have sent.
    pub popped: Vec<Run>,
    /// Those that it had not.
    pub queued: Vec<Run>,
}

impl Lanes {
    /// Starts a worker for every channel that is connected; the others may follow.
    pub fn muster(kit: &Kit<'_>, streams: Vec<Option<Stream>>) -> Result<Lanes, Failure> {
        let count = streams.len();
        let peer = Peer::of(streams.iter().flatten().map(|stream| &**stream.socket()));
        let mut lanes = Lanes {
            channels: (0..count).map(|_| Channel::default()).collect(),
            sent: Arc::new(Barrier::new(count)),
            begun: Arc::default(),
            place: kit.options.place(count, peer)?,
            queue_bytes: kit.settings.queue_bytes,
            last: count - 1,
        };
        for (index, stream) in streams.into_iter().enumerate() {
            lanes.sent.retire(index);
            if let Some(stream) = stream {
                lanes.start(kit, ChannelId(index as u8), stream, None, None)?;
            }
        }
        Ok(lanes)
    }

    /// Starts a channel's worker. It counts as having sent everything up to these marks, and tells the target so first.
    pub fn start(
        &mut self,
        kit: &Kit<'_>,
        id: ChannelId,
        stream: Stream,
        round: Option<Round>,
        epoch: Option<Epoch>,
    ) -> Result<(), Failure> {
        let index = usize::from(id.0);
        let by_reference = ByReference::new(kit.settings.zero_copy, &stream)
            .map_err(|why| Failure::Config(format!("no zero copy on data channel {id}: {why}; use auto or off")))?;
        let (mut ring_in, ring_out) = ring(RING_SLOTS);
        let framing = &kit.settings.framing;
        let packets = framing.packets(kit.ram, id).map_err(|e| Failure::Config(format!("this cannot be sent: {e}")))?;
        let mends = framing.mends();
        let (journal_in, journal) = ring(if mends { JOURNAL_SLOTS } else { 2 });
        let marks = [round.map(Item::RoundEnd), epoch.map(Item::Flush)];
        let pushed = ring_in.push_batch(&marks.into_iter().flatten().collect::<Vec<_>>());
        debug_assert!(pushed <= 2, "the ring is new");
        let role = SendRole::new(SendGear {
            channel: id,
            stream,
            by_reference,
            ring: ring_out,
            journal: mends.then_some(journal_in),
            packets,
            ram: kit.ram.clone(),
            look: Look::new(kit.records.want_hashes(), kit.settings.zero_test),
            records: kit.records.clone(),
            sent: self.sent.clone(),
            begun: self.begun.clone(),
            controller: kit.controller.clone(),
            batch_bytes: kit.settings.batch_bytes,
            low_water_bytes: kit.settings.queue_bytes / 2,
            takes_turns: self.place.takes_turns,
            progress: kit.progress.clone(),
            // It is in the round and the epoch that these marks end.
            round: round.unwrap_or(Round(0)),
            epoch: epoch.unwrap_or(Epoch(0)),
        });
        let launch = Launch {
            start: self.place.start.clone(),
            ..Launch::new(&*kit.options.spawn, Arc::new(kit.controller.clone()))
        };
        // Before the worker can say how far it is.
        self.sent.join(index, round.map_or(0, |r| u64::from(r.0) + 1), 0);
        let made = crate::sys::thread::with_signals_blocked(|| {
            Crew::muster(index..index + 1, &launch, |_| Ok::<_, Infallible>(vec![role]))
        });
        let crew = made.map_err(|e| {
            self.sent.retire(index);
            Failure::Worker(e.to_string())
        })?;
        let channel = &mut self.channels[index];
        channel.cpu = crew.workers().first().and_then(|worker| worker.cpu);
        channel.wire_bytes_before = kit.progress.channel(index).map_or(0, |counts| counts.wire_bytes);
        let Some(bell) = crew.ringers().next().cloned() else {
            return Err(Failure::Worker("internal error: a crew without a worker".to_owned()));
        };
        channel.line = Line::Up(Box::new(Up { crew, ring: ring_in, journal, bell }));
        Ok(())
    }

    fn up(&mut self) -> impl Iterator<Item = &mut Up> {
        self.channels.iter_mut().filter_map(|channel| match &mut channel.line {
            Line::Up(up) => Some(&mut **up),
            Line::Down | Line::Closed { .. } => None,
        })
    }

    /// Puts runs into the ring with the fewest queued bytes, if that has room. They go together, so that a worker finds
    /// a batch.
    pub fn push(&mut self, items: &[Item], bytes: u64) -> bool {
        let count = self.channels.len();
        let mut emptiest: Option<(usize, u64)> = None;
        for index in (1..=count).map(|step| (self.last + step) % count) {
            if let Line::Up(up) = &self.channels[index].line {
                let queued = up.ring.queued_bytes();
                if emptiest.is_none_or(|(_, least)| queued < least) {
                    emptiest = Some((index, queued));
                }
            }
        }
        let Some((index, queued)) = emptiest else { return false };
        let Line::Up(up) = &mut self.channels[index].line else { return false };
        if (queued > 0 && queued + bytes > self.queue_bytes) || up.ring.free_slots() < items.len() + MARK_SLOTS {
            return false;
        }
        up.ring.add_bytes(bytes);
        let pushed = up.ring.push_batch(items);
        debug_assert_eq!(pushed, items.len(), "there was room");
        up.bell.ring();
        self.last = index;
        true
    }

    /// From now on a ring holds no more than this: what is queued when the guest is paused keeps it waiting.
    pub fn set_queue_bytes(&mut self, bytes: u64) {
        self.queue_bytes = bytes;
    }

    /// Whether every ring has room for a mark.
    pub fn has_room_for_mark(&mut self) -> bool {
        self.up().all(|up| up.ring.free_slots() > 0)
    }

    /// Puts a mark into every ring. A channel that is not there now is told of the last one when it comes back.
    pub fn push_mark(&mut self, mark: Item) -> bool {
        let mut pushed = true;
        for up in self.up() {
            pushed &= up.ring.push(mark).is_ok();
            up.bell.ring();
        }
        pushed
    }

    /// Frees a journal through an epoch. False if that epoch is not in it.
    pub fn free_journal(&mut self, channel: ChannelId, through: Epoch) -> bool {
        match self.channels.get_mut(usize::from(channel.0)).map(|channel| &mut channel.line) {
            Some(Line::Up(up)) => journal::free_through(&mut up.journal, through),
            _ => false,
        }
    }

    /// Ends a channel's worker and joins it. The runs that it leaves behind are kept. Harmless where there is none.
    pub fn close(&mut self, id: ChannelId) -> Result<(), Failure> {
        let Some(channel) = self.channels.get_mut(usize::from(id.0)) else { return Ok(()) };
        if !matches!(channel.line, Line::Up(_)) {
            return Ok(()); // what one that is closed holds stays until it is given back
        }
        let Line::Up(up) = std::mem::take(&mut channel.line) else { return Ok(()) };
        let Up { mut crew, ring, journal, .. } = *up;
        crew.close(Close::Abort);
        let exit = crew.take_exit(usize::from(id.0));
        // After the join, and before its ring's other end is gone: nobody waits for what it did not send.
        self.sent.retire(usize::from(id.0));
        drop(ring);
        match exit {
            Some(Exit::Done(SendEnd { ring, why_copied, .. })) => {
                channel.why_copied = why_copied;
                channel.line = Line::Closed { journal, ring };
                Ok(())
            }
            // The ring went with its worker, and nobody knows what was in it.
            Some(Exit::Panicked { message }) => {
                Err(Failure::Worker(format!("the worker of data channel {id} panicked: {message}")))
            }
            Some(Exit::NeverRan) | None => Err(Failure::Worker(format!("the worker of data channel {id} never ran"))),
        }
    }

    /// What a channel that was closed had taken in, and the target is not known to have applied.
    pub fn give_back(&mut self, id: ChannelId) -> GivenBack {
        let mut given = GivenBack::default();
        let Some(channel) = self.channels.get_mut(usize::from(id.0)) else { return given };
        if let Line::Closed { mut journal, mut ring } = std::mem::take(&mut channel.line) {
            journal::drain_runs(&mut journal, |run| given.popped.push(run));
            journal::drain_runs(&mut ring, |run| given.queued.push(run));
        }
        given
    }

    /// Bytes in rings and hands.
    pub fn queued_bytes(&self) -> u64 {
        (0..self.channels.len()).map(|index| self.queued_bytes_of(index)).sum()
    }

    /// Bytes in one channel's ring and its worker's hand.
    pub fn queued_bytes_of(&self, index: usize) -> u64 {
        match self.channels.get(index).map(|channel| &channel.line) {
            Some(Line::Up(up)) => up.ring.queued_bytes(),
            _ => 0,
        }
    }

    /// Bytes that a channel has sent over its present connection; 0 while it has none.
    pub fn sent_bytes(&self, index: usize, progress: &Progress) -> u64 {
        match self.channels.get(index) {
            Some(Channel { line: Line::Up(_), wire_bytes_before, .. }) => {
                progress.channel(index).map_or(0, |counts| counts.wire_bytes) - wire_bytes_before
            }
            _ => 0,
        }
    }

    /// Whether as many workers as there are channels have sent what comes first on their connections.
    pub fn all_have_begun(&self) -> bool {
        self.begun.load(Relaxed) >= self.channels.len()
    }

    /// Whether every worker has sent the end of this round: then all rings and hands are empty of it.
    pub fn all_sent(&self, round: Round) -> bool {
        self.sent.may_go(round)
    }

    /// Of how many rounds this worker has sent the end.
    pub fn rounds_sent(&self, index: usize) -> u64 {
        self.sent.passed(index).count()
    }

    /// Whether this worker has sent the end of all rounds before this one.
    pub fn has_sent_before(&self, index: usize, round: Round) -> bool {
        self.rounds_sent(index) >= u64::from(round.0)
    }

    /// A worker that has ended since this was last asked, why, and whether another connection would not help.
    pub fn poll_end(&mut self) -> Option<(ChannelId, String, bool)> {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            let Line::Up(up) = &mut channel.line else { continue };
            if up.crew.poll_exit().is_none() {
                continue;
            }
            let (why, is_ours) = match up.crew.workers().first().and_then(|worker| worker.exit.as_ref()) {
                Some(Exit::Done(end)) => match &end.result {
                    Ok(()) | Err(ChannelError::Aborted) => continue,
                    Err(why) => (why.to_string(), why.is_ours()),
                },
                Some(Exit::Panicked { message }) => (format!("its worker panicked: {message}"), true),
                Some(Exit::NeverRan) | None => ("its worker never ran".to_owned(), true),
            };
            return Some((ChannelId(index as u8), why, is_ours));
        }
        None
    }

    /// Aborts every worker and joins it; the CPU each was pinned to, and why it copied, where it says that it did.
    ///
    /// What was not applied goes with it: a failed migration starts over at round 0.
    pub fn end(mut self) -> (Vec<Option<usize>>, Vec<Option<WhyCopied>>) {
        // All of them first: each may take a moment to come out of its call.
        self.up().for_each(|up| {
            up.crew.close(Close::Abort);
        });
        for index in 0..self.channels.len() {
            // How it ended no longer matters.
            let _ = self.close(ChannelId(index as u8));
        }
        self.channels.iter().map(|channel| (channel.cpu, channel.why_copied)).unzip()
    }
}
