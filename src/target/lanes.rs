#![forbid(unsafe_code)]
//! The target's end of all channels: the barrier where the lanes meet, and the crew that runs them.

use std::sync::Arc;

use crate::barrier::{Barrier, LaneWord};
use crate::bell::{Close, Ringer};
use crate::channel::ChannelError;
use crate::channel::recv::{RecvGear, RecvRole};
use crate::config::{CrewOptions, Peer};
use crate::crew::{Crew, Exit, Launch};
use crate::digest::DigestTable;
use crate::dirty::bitmap::DirtyBitmap;
use crate::error::Failure;
use crate::memory::Ram;
use crate::memory::look::Look;
use crate::poll::PollSleeper;
use crate::progress::Progress;
use crate::session::source::FIRST_GENERATION;
use crate::session::target::TargetEvent;
use crate::net::Stream;
use crate::units::{BlockId, ChannelId};
use crate::wire::control::LanePong;

/// What all lanes share.
pub(super) struct LaneGear {
    pub ram: Ram,
    pub digests: Option<Arc<DigestTable>>,
    pub controller: Ringer<PollSleeper>,
    pub progress: Progress,
}

/// All lanes of the target.
pub(super) struct Lanes {
    crew: Crew<RecvRole>,
    barrier: Arc<Barrier>,
    named: DirtyBitmap,
    page_bytes: Vec<u64>,
    seen: Vec<(LaneWord, LaneWord)>,
}

impl Lanes {
    pub fn muster(streams: Vec<Stream>, gear: &LaneGear, options: &CrewOptions) -> Result<Lanes, Failure> {
        let count = streams.len();
        let barrier = Arc::new(Barrier::new(count));
        let (landed, named) = (DirtyBitmap::for_ram(&gear.ram), DirtyBitmap::for_ram(&gear.ram));
        let look = Look::new(gear.digests.is_some(), false);
        let launch = Launch {
            start: options.place(count, Peer::of(streams.iter().map(|stream| &**stream.socket())))?.start,
            ..Launch::new(&*options.spawn, Arc::new(gear.controller.clone()))
        };
        let made = crate::sys::thread::with_signals_blocked(|| {
            Crew::muster(0..count, &launch, |bells| {
                let roles = streams.into_iter().enumerate().map(|(index, stream)| {
                    let own = RecvGear {
                        channel: ChannelId(index as u8),
                        stream,
                        ram: gear.ram.clone(),
                        landed: landed.clone(),
                        named: named.clone(),
                        look,
                        digests: gear.digests.clone(),
                        barrier: barrier.clone(),
                        controller: gear.controller.clone(),
                        progress: gear.progress.clone(),
                    };
                    RecvRole::new(own, bells)
                });
                Ok::<_, std::convert::Infallible>(roles.collect())
            })
        });
        let crew = made.map_err(|e| Failure::Worker(e.to_string()))?;
        let page_bytes = gear.ram.blocks().iter().map(|b| b.page_size().bytes()).collect();
        Ok(Lanes { crew, barrier, named, page_bytes, seen: vec![Default::default(); count] })
    }

    /// What has changed in the barrier since the last look.
    pub fn poll_moved(&mut self) -> Vec<TargetEvent> {
        // Ordered reads first: what the lanes landed and recorded before their marks is seen from here on.
        let (_, _) = (self.barrier.all_passed(), self.barrier.all_flushed());
        let mut events = Vec::new();
        for (index, seen) in self.seen.iter_mut().enumerate() {
            let now = (self.barrier.passed(index), self.barrier.flushed(index));
            if now != *seen {
                *seen = now;
                events.push(TargetEvent::LaneMoved { channel: ChannelId(index as u8), rounds: now.0, epochs: now.1 });
            }
        }
        events
    }

    /// A lane that has ended by itself since this was last asked, and why. No lane may: the target ends them all before
    /// it runs the guest.
    pub fn poll_failed(&mut self) -> Option<(ChannelId, String)> {
        while let Some(id) = self.crew.poll_exit() {
            let why = match &self.crew.workers()[id].exit {
                Some(Exit::Done(end)) => match &end.result {
                    Ok(()) => "the source ended it before the hand-over".to_owned(),
                    Err(ChannelError::Aborted) => continue,
                    Err(why) => why.to_string(),
                },
                Some(Exit::Panicked { message }) => format!("its lane panicked: {message}"),
                Some(Exit::NeverRan) | None => "its lane never ran".to_owned(),
            };
            return Some((ChannelId(id as u8), why));
        }
        None
    }

    /// How far each lane is, for the source to see who lags.
    pub fn pongs(&self, progress: &Progress) -> Vec<LanePong> {
        let slowest = self.barrier.all_passed();
        let pong = |index: usize| {
            let rounds_passed = self.barrier.passed(index).count() as u32;
            LanePong {
                channel: ChannelId(index as u8),
                generation: FIRST_GENERATION,
                rounds_passed,
                at_barrier: u64::from(rounds_passed) > slowest,
                bytes: progress.channel(index).map_or(0, |c| c.wire_bytes),
            }
        };
        (0..self.barrier.lanes()).map(pong).collect()
    }

    /// Ends every lane and joins it. Harmless when done before.
    pub fn end(&mut self) {
        self.crew.close(Close::Abort);
        self.crew.join();
    }

    /// Bytes that the source has spoken of, as data or as zeros.
    pub fn named_bytes(&self) -> u64 {
        let of = |(block, page_bytes): (usize, &u64)| {
            let id = BlockId(block as u16);
            let pages = self.named.shape(id).map_or(0, |(pages, _)| pages);
            self.named.count_range(id, 0, pages) * page_bytes
        };
        self.page_bytes.iter().enumerate().map(of).sum()
    }

    /// The CPU each lane was pinned to.
    pub fn cpus(&self) -> impl Iterator<Item = Option<usize>> + '_ {
        self.crew.workers().iter().map(|worker| worker.cpu)
    }
}
