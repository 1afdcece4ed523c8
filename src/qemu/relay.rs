#![forbid(unsafe_code)]
//! Passes a migration on from one QEMU to another while it goes on, and looks at every packet of it.
//!
//! Each connection of the source gets one of its own to the destination, once the source is all there: until then the
//! destination hears of nobody. What is refused never reaches the destination, and no more is held than one buffer a
//! connection: rounds flow while the guest still runs, and a destination that is slow slows the source down. A barrier goes
//! on when every channel has passed on its SYNC, so that a destination never waits for one that does not come. The
//! destination's answers go back, so that the source learns the truth.

mod channel;
mod driver;
mod gather;
mod passage;
mod trunk;

use std::sync::Arc;
use std::time::Duration;

use crate::bell::Bell;
use crate::cancel::CancelHandle;
use crate::config::Timeouts;
use crate::error::{Failure, Outcome};
use crate::gate::{CancelAnswer, Gate};
use crate::net::{Address, Listener};
use crate::poll::PollSleeper;
use crate::progress::Progress;
use crate::sync::AtomicU32;
use crate::sync::Ordering::Relaxed;

/// What was passed on to the destination.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RelayCounters {
    /// Bytes of the main connection.
    pub main_bytes: u64,
    /// Bytes of all channels, with the first 64 of each.
    pub channel_bytes: u64,
    /// Pages with data.
    pub normal_pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// SYNC packets of all channels.
    pub sync_packets: u64,
    /// Barriers of the main connection: in as many rounds, or sections.
    pub barriers: u64,
}

/// How it ended.
#[derive(Clone, PartialEq, Debug)]
#[must_use = "the outcome says whether the destination has taken the guest"]
pub struct RelayReport {
    /// Completed: the destination has said so, and the source's system has taken that in. Without a return path nobody says
    /// so; then it is enough that the destination has taken everything and closed in order. Uncertain: the destination may
    /// have had everything, and what became of it is not known; or it has taken the guest, and the source does not know.
    pub outcome: Outcome,
    /// What was passed on.
    pub counters: RelayCounters,
    /// Multifd channels that came.
    pub channels: usize,
    /// Connections that were turned away.
    pub turned_away: u64,
    /// From the source's first word to the end.
    pub total: Duration,
    /// What went wrong without deciding the outcome.
    pub remarks: Vec<String>,
}

/// Everything that can be set about a relay.
#[derive(Clone, Default, Debug)]
pub struct RelayBuilder {
    channels: Option<u8>,
    timeouts: Timeouts,
}

impl RelayBuilder {
    /// How many multifd channels there are, which no stream says. Unless told, the source has those that have said SYNC when
    /// its first barrier has come, and half a second has brought no more of them.
    #[must_use]
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = Some(channels);
        self
    }

    /// How long to wait for what: [`Timeouts::hello`] and [`Timeouts::connect`] together for a destination to answer the
    /// source's ping. There is no limit to how long a source may be silent after that.
    #[must_use]
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts.bounded();
        self
    }

    /// Listens on `host:port` (port 0: any) or `unix:PATH`.
    ///
    /// # Errors
    /// [`Failure::Config`] for an address that makes no sense, [`Failure::Listen`] for one that cannot be had.
    pub fn listen(self, address: &str) -> Result<Listening, Failure> {
        Ok(Listening { listener: Listener::bind(&address.parse()?)?, settings: self })
    }
}

/// A relay that listens, and does not know yet whom for.
#[derive(Debug)]
pub struct Listening {
    listener: Listener,
    settings: RelayBuilder,
}

impl Listening {
    /// Passes everything on to this address, which is connected to when the source has come.
    ///
    /// # Errors
    /// [`Failure::Config`] for an address that makes no sense.
    pub fn to(self, address: &str) -> Result<Relay, Failure> {
        let bell =
            PollSleeper::bell().map_err(|e| Failure::Config(format!("no eventfd for the relay's bell: {e}")))?;
        let Listening { listener, settings } = self;
        let (to, progress) = (address.parse()?, Progress::new(MAIN + 1));
        Ok(Relay { settings, listener, to, bell, gate: Gate::new(), stops: Arc::default(), progress })
    }
}

/// One migration that is to be passed on.
///
/// ```no_run
/// use pageferry::qemu::relay::Relay;
///
/// let relay = Relay::builder().channels(2).listen("0.0.0.0:4444")?.to("10.0.0.2:4444")?;
/// println!("{}", relay.run().outcome);
/// # Ok::<(), pageferry::Failure>(())
/// ```
#[derive(Debug)]
pub struct Relay {
    settings: RelayBuilder,
    listener: Listener,
    to: Address,
    bell: Bell<PollSleeper>,
    gate: Gate,
    /// How often it was asked to stop.
    stops: Arc<AtomicU32>,
    progress: Progress,
}

/// Where the progress of the main connection is, behind those of all channels that there can be.
const MAIN: usize = u8::MAX as usize;

impl Relay {
    /// Begins to describe a relay.
    pub fn builder() -> RelayBuilder {
        RelayBuilder::default()
    }

    /// The address that a source connects to, with the port that the system chose.
    pub fn address(&self) -> Option<Address> {
        self.listener.address()
    }

    /// What is passed on, while it is: a channel's under its number. Rounds are barriers here.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Stops it from any thread, also past the point where it can be cancelled.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { cancel: self.cancel_handle(), stops: self.stops.clone() }
    }

    /// Cancels, from any thread. It is too late once the state of the devices is on its way to the destination, which may
    /// run the guest when it has that.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { gate: self.gate.clone(), controller: self.bell.ringer() }
    }

    /// Waits for a source, and passes its migration on. Every thread that it started has been joined when it returns.
    pub fn run(self) -> RelayReport {
        driver::run(self)
    }
}

/// Stops a relay, from any thread, any number of times.
#[derive(Clone, Debug)]
pub struct StopHandle {
    cancel: CancelHandle,
    stops: Arc<AtomicU32>,
}

impl StopHandle {
    /// Cancels if that is possible. If it is too late, the destination may have the guest: it is given
    /// [`Timeouts::silence`] to say so, and asked once more to stop, the relay does not wait for it any longer. Without an
    /// answer the outcome is [`Outcome::Uncertain`], and a source that still waits takes its guest back.
    pub fn stop(&self) -> CancelAnswer {
        self.stops.fetch_add(1, Relaxed);
        self.cancel.cancel()
    }
}
