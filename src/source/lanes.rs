#![forbid(unsafe_code)]
//! The source's end of all channels: rings, journals, and the crew that empties the one into the other.

use std::sync::Arc;

use crate::barrier::Barrier;
use crate::bell::{Close, Park, Ringer};
use crate::channel::ChannelError;
use crate::channel::send::{SendEnd, SendGear, SendRole};
use crate::channel::zero_copy::ByReference;
use crate::config::{CrewOptions, Peer, WhyCopied};
use crate::crew::{Crew, Exit, Launch};
use crate::digest::DigestTable;
use crate::error::Failure;
use crate::journal;
use crate::memory::Ram;
use crate::memory::look::Look;
use crate::poll::PollSleeper;
use crate::progress::Progress;
use crate::ring::{Consumer, Producer, ring};
use crate::source::Settings;
use crate::net::Stream;
use crate::units::{ChannelId, Epoch, Item, Round};

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

/// All channels of the source.
pub(super) struct Lanes {
    rings: Vec<Producer<Item>>,
    bells: Vec<Ringer<Park>>,
    journals: Vec<Consumer<Item>>,
    sent: Arc<Barrier>,
    pub crew: Crew<SendRole>,
    queue_bytes: u64,
    /// The ring that was filled last: of several that are equally empty the next one is taken, so that few runs reach
    /// all channels.
    last: usize,
}

impl Lanes {
    pub fn muster(
        ram: &Ram,
        settings: &Settings,
        options: &CrewOptions,
        streams: Vec<Stream>,
        digests: Option<&Arc<DigestTable>>,
        controller: &Ringer<PollSleeper>,
        progress: &Progress,
    ) -> Result<Lanes, Failure> {
        let count = streams.len();
        let sent = Arc::new(Barrier::new(count));
        let look = Look::new(digests.is_some(), settings.zero_test);
        let place = options.place(count, Peer::of(streams.iter().map(|stream| &**stream.socket())))?;
        let (mut rings, mut journals, mut roles) = (Vec::new(), Vec::new(), Vec::new());
        for (index, stream) in streams.into_iter().enumerate() {
            let by_reference = ByReference::new(settings.zero_copy, &stream)
                .map_err(|why| Failure::Config(format!("no zero copy on data channel {index}: {why}; use auto or off")))?;
            let (ring_in, ring_out) = ring(RING_SLOTS);
            let (journal_in, journal_out) = ring(JOURNAL_SLOTS);
            rings.push(ring_in);
            journals.push(journal_out);
            roles.push(SendRole::new(SendGear {
                channel: ChannelId(index as u8),
                stream,
                by_reference,
                ring: ring_out,
                journal: journal_in,
                ram: ram.clone(),
                look,
                digests: digests.cloned(),
                sent: sent.clone(),
                controller: controller.clone(),
                batch_bytes: settings.batch_bytes,
                low_water_bytes: settings.queue_bytes / 2,
                takes_turns: place.takes_turns,
                progress: progress.clone(),
            }));
        }
        let launch = Launch { start: place.start, ..Launch::new(&*options.spawn, Arc::new(controller.clone())) };
        let made = crate::sys::thread::with_signals_blocked(|| {
            Crew::muster(0..count, &launch, |_| Ok::<_, std::convert::Infallible>(roles))
        });
        let crew = made.map_err(|e| Failure::Worker(e.to_string()))?;
        let bells = crew.ringers().cloned().collect();
        Ok(Lanes { rings, bells, journals, sent, crew, queue_bytes: settings.queue_bytes, last: count - 1 })
    }

    /// Puts runs into the ring with the fewest queued bytes, if that has room. They go together, so that a worker finds
    /// a batch.
    pub fn push(&mut self, items: &[Item], bytes: u64) -> bool {
        let count = self.rings.len();
        let from_next = (1..=count).map(|step| (self.last + step) % count);
        let Some(index) = from_next.min_by_key(|index| self.rings[*index].queued_bytes()) else { return false };
        let ring = &mut self.rings[index];
        let queued = ring.queued_bytes();
        if (queued > 0 && queued + bytes > self.queue_bytes) || ring.free_slots() < items.len() + MARK_SLOTS {
            return false;
        }
        ring.add_bytes(bytes);
        let pushed = ring.push_batch(items);
        debug_assert_eq!(pushed, items.len(), "there was room");
        self.bells[index].ring();
        self.last = index;
        true
    }

    /// From now on a ring holds no more than this: what is queued when the guest is paused keeps it waiting.
    pub fn set_queue_bytes(&mut self, bytes: u64) {
        self.queue_bytes = bytes;
    }

    /// Whether every ring has room for a mark.
    pub fn has_room_for_mark(&mut self) -> bool {
        self.rings.iter_mut().all(|ring| ring.free_slots() > 0)
    }

    /// Puts a mark into every ring.
    pub fn push_mark(&mut self, mark: Item) -> bool {
        let pushed = self.rings.iter_mut().all(|ring| ring.push(mark).is_ok());
        for bell in &self.bells {
            bell.ring();
        }
        pushed
    }

    /// Frees a journal through an epoch. False if that epoch is not in it.
    pub fn free_journal(&mut self, channel: ChannelId, through: Epoch) -> bool {
        self.journals.get_mut(usize::from(channel.0)).is_some_and(|j| journal::free_through(j, through))
    }

    /// Bytes in rings and hands.
    pub fn queued_bytes(&self) -> u64 {
        self.rings.iter().map(Producer::queued_bytes).sum()
    }

    /// Whether every worker has sent the end of this round: then all rings and hands are empty of it.
    pub fn all_sent(&self, round: Round) -> bool {
        self.sent.may_go(round)
    }

    /// The first worker that has ended since this was last asked, and why.
    pub fn poll_end(&mut self) -> Option<(ChannelId, String)> {
        while let Some(id) = self.crew.poll_exit() {
            let why = match &self.crew.workers()[id].exit {
                Some(Exit::Done(end)) => match &end.result {
                    Ok(()) | Err(ChannelError::Aborted) => continue,
                    Err(why) => why.to_string(),
                },
                Some(Exit::Panicked { message }) => format!("its worker panicked: {message}"),
                Some(Exit::NeverRan) | None => "its worker never ran".to_owned(),
            };
            return Some((ChannelId(id as u8), why));
        }
        None
    }

    /// Aborts every worker and joins it; the CPU each was pinned to, and why it copied, where it says that it did.
    ///
    /// Its ring's other end and its journal go with it: they say what was not applied, but nobody goes on from there.
    pub fn end(self) -> (Vec<Option<usize>>, Vec<Option<WhyCopied>>) {
        self.crew.close(Close::Abort);
        let why_copied = |exit: &Option<Exit<SendEnd>>| match exit {
            Some(Exit::Done(end)) => end.why_copied,
            Some(Exit::Panicked { .. } | Exit::NeverRan) | None => None,
        };
        self.crew.into_report().workers.iter().map(|worker| (worker.cpu, why_copied(&worker.exit))).unzip()
    }
}
