#![forbid(unsafe_code)]
//! The target of a migration: what a VMM calls to take a guest in.

mod check;
mod door;
mod driver;
mod early;
mod hear;
mod lanes;
mod witness;

use std::fmt;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::bell::Bell;
use crate::cancel::CancelHandle;
use crate::config::{CrewOptions, Pin, Timeouts, YEAR};
use crate::crew::{Spawn, StartHook};
use crate::digest::Contents;
use crate::error::{Failure, HookError, Outcome};
use crate::framing::{Framing, Native};
use crate::gate::Gate;
use crate::memory::Ram;
use crate::net::{Address, Listener, Tls};
use crate::poll::PollSleeper;
use crate::progress::Progress;
use crate::units::{SessionId, Verify};
use crate::wire::control::Setup;

pub use witness::Witness;

/// The VMM that takes the guest in. All hooks run on the thread that called [`Target::receive`].
pub trait Incoming {
    /// Looks at the machine that wants to come, and gives the memory it will live in: the same blocks, in the same
    /// order, of the same length and page size. What the memory held before does not matter: each block is made to read
    /// as zeros first, in the way its [`Initial`](crate::memory::Initial) allows.
    ///
    /// # Errors
    /// The machine is refused, and the source is told why.
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError>;

    /// Where the hash of each page goes as it lands, if that is wanted: of the blocks that `prepare` has given. Asked once,
    /// after that, and for this migration alone.
    ///
    /// Hashes of other blocks refuse the machine.
    fn contents(&mut self) -> Option<Arc<Contents>> {
        None
    }

    /// Takes the device state. All of RAM is there.
    ///
    /// May be called again, with state that replaces all of the former: where the source would rather let the guest run on
    /// and try again than exceed its downtime limit ([`Overrun::Retry`](crate::precopy::Overrun)), where a channel was lost
    /// while this went on, and where a session is resumed. RAM changes in between, so nothing that was read from it may be
    /// kept.
    ///
    /// # Errors
    /// The guest stays at the source, which is told why.
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError>;

    /// Runs the guest: it is ours from now on.
    ///
    /// # Errors
    /// No vCPU has run and none will: the source may resume the guest.
    fn run(&mut self) -> Result<(), HookError>;

    /// The guest will not run here. Undoes `prepare` and `load_state`; called at most once, and only after `prepare`
    /// succeeded.
    fn discard(&mut self) {}
}

/// How a migration ended, and what it took.
#[derive(Clone, PartialEq, Debug)]
#[must_use = "the outcome says which side owns the guest"]
pub struct TargetReport {
    /// Who owns the guest, and why.
    pub outcome: Outcome,
    /// Which digests guarded it.
    pub verify: Verify,
    /// Whether the digests agreed.
    pub verified: bool,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of guest pages that travelled.
    pub payload_bytes: u64,
    /// Bytes that travelled, over all connections; without what TLS adds, 22 in each 16 KiB.
    pub wire_bytes: u64,
    /// Bytes of guest pages that were zero, and travelled as table entries.
    pub zero_bytes: u64,
    /// Bytes that the source never spoke of: they read as zeros.
    pub untouched_bytes: u64,
    /// Bytes of guest pages that were made or mapped before their content came, because page faults were seen.
    pub prefaulted_bytes: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// Rounds.
    pub rounds: u32,
    /// Data channels.
    pub channels: u8,
    /// From the source's first word to the end.
    pub total: Duration,
    /// From Final until the guest ran; zero if it did not.
    pub downtime: Duration,
    /// System calls of the lanes.
    pub recv_syscalls: u64,
    /// The CPU each lane was pinned to.
    pub cpus: Vec<Option<usize>>,
    /// Connections that were turned away: strangers, doubles, and silent ones.
    pub turned_away: u64,
    /// The session, as the source calls it.
    pub session: SessionId,
    /// Whether the source's system, or that of a relay or proxy that stands in its place, is known to have taken in all that was
    /// said to it, the last word included. If not, the source may take the guest for its own, whatever the outcome here.
    pub source_told: bool,
    /// Connections of data channels that were lost on the way.
    pub channels_lost: u32,
    /// How often all connections were lost, and the source took the session up again.
    pub resumes: u32,
    /// How often what had landed was not what was sent, and chunks travelled again.
    pub repairs: u32,
    /// What went wrong without deciding the outcome.
    pub remarks: Vec<String>,
}

/// Everything that can be set about a target.
#[derive(Debug)]
pub struct TargetBuilder {
    settings: Settings,
    crew: CrewOptions,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub timeouts: Timeouts,
    pub state_bytes_max: u64,
    pub tls: Option<Tls>,
    pub framing: Arc<dyn Framing>,
    /// For how long the session is kept when the control connection is lost; zero is not at all.
    pub resume_window: Duration,
}

/// Device state that a target takes unless told otherwise.
const STATE_BYTES_MAX: u64 = 1 << 30;

impl TargetBuilder {
    /// Pins the lanes to these CPUs, by best effort.
    pub fn cpus(self, cpus: impl IntoIterator<Item = usize>) -> Self {
        let cpus: Vec<_> = cpus.into_iter().collect();
        self.pin(if cpus.is_empty() { Pin::Auto } else { Pin::BestEffort(cpus) })
    }

    /// Where the lanes run.
    pub fn pin(mut self, pin: Pin) -> Self {
        self.crew.pin = pin;
        self
    }

    /// Creates the lanes' threads in the VMM's own way.
    pub fn spawn(mut self, spawn: Arc<dyn Spawn>) -> Self {
        self.crew.spawn = spawn;
        self
    }

    /// Runs first on every lane's thread, after it was pinned.
    pub fn start_hook(mut self, hook: Arc<StartHook>) -> Self {
        self.crew.hook = Some(hook);
        self
    }

    /// How long to wait for what.
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.settings.timeouts = timeouts.bounded();
        self
    }

    /// The most device state to take; it is kept in memory until it is loaded. 1 GiB unless told otherwise.
    pub fn state_bytes_max(mut self, bytes: u64) -> Self {
        self.settings.state_bytes_max = bytes;
        self
    }

    /// Encrypts every connection, and lets in nobody but who shows a certificate of the CA; anybody is let in, and nothing
    /// is encrypted, unless told otherwise.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.settings.tls = Some(tls);
        self
    }

    /// What is spoken on all connections; this library's own wire unless told otherwise. The other side must speak the
    /// same.
    pub fn framing(mut self, framing: impl Framing + 'static) -> Self {
        self.settings.framing = Arc::new(framing);
        self
    }

    /// How long the session is kept when all connections are lost, for a source that has a
    /// [window](crate::source::SourceBuilder::resume_window), too, to come back: what has landed is kept meanwhile, and the
    /// guest is not run. Zero, not at all, unless told otherwise.
    pub fn resume_window(mut self, window: Duration) -> Self {
        self.settings.resume_window = window.min(YEAR);
        self
    }

    /// Listens on `host:port` (port 0: any) or `unix:PATH`. The source may connect from now on.
    ///
    /// # Errors
    /// [`Failure::Config`] for an address that makes no sense, [`Failure::Listen`] for one that cannot be had.
    pub fn listen(self, address: &str) -> Result<Target, Failure> {
        let address: Address = address.parse()?;
        let listener = Listener::bind(&address)?;
        self.build(listener)
    }

    /// Takes connections that are there already, the control connection and the data channels in any order.
    ///
    /// # Errors
    /// [`Failure::Config`] if one of them is no stream socket.
    pub fn connections(self, fds: impl IntoIterator<Item = OwnedFd>) -> Result<Target, Failure> {
        let listener = Listener::ready(fds)?;
        self.build(listener)
    }

    fn build(self, listener: Listener) -> Result<Target, Failure> {
        let bell = PollSleeper::bell()
            .map_err(|e| Failure::Config(format!("no eventfd for the target's bell: {e}")))?;
        let TargetBuilder { settings, crew } = self;
        let progress = Progress::new(crate::wire::CHANNELS_MAX);
        Ok(Target { settings, crew, listener, bell, gate: Gate::new(), progress })
    }
}

/// One migration that is waited for. A second attempt is a second target.
///
/// ```no_run
/// use pageferry::{Incoming, Outcome, Target};
/// # fn take_in(mut vmm: impl Incoming) -> Result<(), pageferry::Failure> {
/// let target = Target::builder().listen("0.0.0.0:4444")?;
/// let report = target.receive(&mut vmm);
/// match report.outcome {
///     Outcome::Completed => println!("the guest runs here"),
///     other => println!("{other}"),
/// }
/// # Ok(())
/// # }
/// ```
pub struct Target {
    settings: Settings,
    crew: CrewOptions,
    listener: Listener,
    bell: Bell<PollSleeper>,
    gate: Gate,
    progress: Progress,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("at", &self.address()).field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Target {
    /// Begins to describe a target.
    pub fn builder() -> TargetBuilder {
        let settings = Settings {
            timeouts: Timeouts::default(),
            state_bytes_max: STATE_BYTES_MAX,
            tls: None,
            framing: Arc::new(Native),
            resume_window: Duration::ZERO,
        };
        TargetBuilder { settings, crew: CrewOptions::default() }
    }

    /// The address to connect to, with the port that the system chose; `None` for ready-made connections.
    pub fn address(&self) -> Option<Address> {
        self.listener.address()
    }

    /// Cancels this migration, from any thread, also while nobody has come.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { gate: self.gate.clone(), controller: self.bell.ringer() }
    }

    /// Shows this migration, to any thread.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Waits for a source, takes its guest in, and runs it. Comes back when the guest runs, or when it is known that it
    /// will not run here; the report says which.
    ///
    /// Every thread that it started has been joined when it returns.
    pub fn receive(self, incoming: &mut dyn Incoming) -> TargetReport {
        driver::receive(self, incoming).0
    }

    /// As [`Target::receive`], and leaves somebody behind who can say how it ended: a source that has sent Commit and
    /// heard no answer stays paused until it is told. Without a witness nobody listens any more once this has returned.
    pub fn receive_and_witness(self, incoming: &mut dyn Incoming) -> (TargetReport, Witness) {
        driver::receive(self, incoming)
    }
}
