#![forbid(unsafe_code)]
//! What was lost, channel by channel, and how far each is on its way back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::net::Stream;
use crate::source::dial::Dial;
use crate::sys::socket::Socket;
use crate::units::{ChannelId, Generation, Run};

/// How long after a loss a channel is connected again, and how long a second attempt waits: each one twice as long as the
/// one before.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(2);
/// How often in a row a channel is connected again without getting an epoch through. Then something is wrong with it.
pub(super) const TRIES_MAX: u32 = 12;

/// The wait before this attempt, counted from 1: the first is made at once.
pub(super) fn wait_before(attempt: u32) -> Duration {
    match attempt {
        0 | 1 => Duration::ZERO,
        n => FIRST_WAIT.saturating_mul(1 << (n - 2).min(16)).min(WAIT_MAX),
    }
}

/// The way back of one channel.
#[derive(Default)]
pub(super) struct WayBack {
    /// Of the latest connection that was tried.
    pub generation: Option<Generation>,
    /// Losses since it last got an epoch through.
    pub tries: u32,
    pub at: Option<Instant>,
    pub dial: Option<Dial>,
    /// Connected, and not yet in the set; since when.
    pub joining: Option<(Joining, Instant)>,
}

/// A connection that the target has not yet taken in.
pub(super) struct Joining {
    pub socket: Arc<Socket>,
    /// Nothing where a worker has it already.
    pub stream: Option<Stream>,
}

/// What was lost, and what is done about it.
pub(super) struct Losses {
    pub ways: Vec<WayBack>,
    /// Runs that travel again, from the next round on.
    pub returned: Vec<Run>,
    /// What that comes to.
    pub returned_bytes: u64,
    /// Since when no channel is left.
    pub none_since: Option<Instant>,
    /// Since when the target has not answered that a lost channel is out of its set.
    pub retired_since: Option<Instant>,
    pub last: Option<Failure>,
    /// Bytes that were sent, or taken up to be sent, and travelled again as nobody knew whether they had been applied.
    pub reshipped_bytes: u64,
    pub repaired_bytes: u64,
    pub channels_lost: u32,
    pub reconnects: u32,
    pub resumes: u32,
    /// Those since the last epoch was applied.
    pub resumes_in_vain: u32,
    /// How often the control connection was made.
    pub control_generation: Generation,
}

impl Losses {
    pub fn new(channels: u8, first: Generation) -> Losses {
        Losses {
            ways: (0..channels).map(|_| WayBack::default()).collect(),
            returned: Vec::new(),
            returned_bytes: 0,
            none_since: None,
            retired_since: None,
            last: None,
            reshipped_bytes: 0,
            repaired_bytes: 0,
            channels_lost: 0,
            reconnects: 0,
            resumes: 0,
            resumes_in_vain: 0,
            control_generation: first,
        }
    }

    /// Connected and with a worker, and to be joined.
    pub fn joins(&mut self, channel: ChannelId, socket: Arc<Socket>) {
        if let Some(way) = self.ways.get_mut(usize::from(channel.0)) {
            way.joining = Some((Joining { socket, stream: None }, Instant::now()));
        }
    }

    /// The connection that was to be joined, as it is now, or is of no use.
    pub fn take_joining(&mut self, channel: ChannelId) -> Option<Stream> {
        let way = self.ways.get_mut(usize::from(channel.0))?;
        way.joining.take().and_then(|(joining, _)| joining.stream)
    }

    /// The connections that are about to join.
    pub fn joining_sockets(&self) -> impl Iterator<Item = (ChannelId, &Socket)> {
        let all = (0..=u8::MAX).map(ChannelId).zip(&self.ways);
        all.filter_map(|(channel, way)| way.joining.as_ref().map(|(joining, _)| (channel, &*joining.socket)))
    }

    /// A connection that is of no use now: it is made again when there is one.
    pub fn hang_up(&mut self, channel: ChannelId) {
        if let Some(way) = self.ways.get_mut(usize::from(channel.0)) {
            way.joining = None;
            way.at = Some(Instant::now() + FIRST_WAIT);
        }
    }

    /// Whether another connection is under way, or will be.
    pub fn has_hope(&self) -> bool {
        self.ways.iter().any(|way| way.at.is_some() || way.dial.is_some() || way.joining.is_some())
    }

    /// A channel has got an epoch through: what happened before is forgotten.
    pub fn got_through(&mut self, channel: ChannelId) {
        if let Some(way) = self.ways.get_mut(usize::from(channel.0)) {
            way.tries = 0;
        }
        self.resumes_in_vain = 0;
    }
}
