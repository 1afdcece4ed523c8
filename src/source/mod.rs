#![forbid(unsafe_code)]
//! The source of a migration: what a VMM calls to send its guest away.

mod dial;
mod driver;
mod ends;
mod estimate;
mod gauge;
mod hand_over;
mod hooks;
mod lanes;
mod losses;
mod motion;
mod pace;
mod pipe;
mod rounds;
mod setup;
mod state;
mod talk;
mod watch;
mod ways;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::bell::Bell;
use crate::cancel::CancelHandle;
use crate::config::{CrewOptions, Pin, Timeouts, WhyCopied, YEAR, ZeroCopy};
use crate::digest::Contents;
use crate::crew::{Spawn, StartHook};
use crate::dirty::DirtySource;
use crate::error::{Failure, HookError, Outcome};
use crate::framing::{Framing, Native};
use crate::gate::Gate;
use crate::memory::Ram;
use crate::net::{Address, Connector, Endpoint, Stream, Tls};
use crate::poll::PollSleeper;
use crate::precopy::{AtLimit, Limits, Overrun, Throttled};
use crate::progress::{ChannelCounts, Progress};
use crate::units::{Round, SessionId, Verify};

pub use state::StateWriter;

/// The guest, as the source needs it. All hooks run on the thread that called [`Source::migrate`].
pub trait Guest {
    /// What the VMM at the target must know before it can take the machine. At most 512 KiB.
    ///
    /// # Errors
    /// The migration fails with it.
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(Vec::new())
    }

    /// Stops all vCPUs and all DMA. When it returns, nobody writes guest RAM but [`Guest::save_state`].
    ///
    /// # Errors
    /// The guest must be running again; the migration fails.
    fn pause(&mut self) -> Result<(), HookError>;

    /// Lets the guest run on here, after a failed or cancelled migration.
    ///
    /// # Errors
    /// Becomes the reason of the outcome: the guest is still the source's, and stands still.
    fn resume(&mut self) -> Result<(), HookError>;

    /// Slows the guest down: it is to run `100 - percent` of the time, on every vCPU; 0 lets it run freely. Called with
    /// more and more while the guest outruns the link, and with 0 before the migration ends, however it ends. Never
    /// called unless a builder's `throttle_max` allows it.
    ///
    /// # Errors
    /// The guest is not slowed down any further; the migration goes on without.
    fn throttle(&mut self, percent: u8) -> Result<(), HookError> {
        let _ = percent;
        Err("this VMM cannot slow its guest down".into())
    }

    /// Writes the device state, of any size. It travels as it is written, and RAM travels meanwhile; guest RAM that it
    /// writes is harvested once more when it returns.
    ///
    /// # Errors
    /// The guest is resumed here; the migration fails.
    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError>;

    /// The guest stands still, and all of its RAM and state has been sent, but not the word that it is complete: the last
    /// moment to object. Called only where [`SourceBuilder::contents`] keeps hashes, which are settled now; once an attempt
    /// to hand over, and once more where something had to travel again since.
    ///
    /// # Errors
    /// The guest is resumed here; the migration fails.
    fn sent(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

/// How a migration ended, and what it took.
#[derive(Clone, PartialEq, Debug)]
#[must_use = "the outcome says which side owns the guest"]
pub struct SourceReport {
    /// Who owns the guest, and why.
    pub outcome: Outcome,
    /// Which digests guarded it.
    pub verify: Verify,
    /// Whether the digests agreed before the hand-over.
    pub verified: bool,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of guest pages that travelled.
    pub payload_bytes: u64,
    /// Bytes that travelled, over all connections; without what TLS adds, 22 in each 16 KiB.
    pub wire_bytes: u64,
    /// Bytes of guest pages that were zero, and travelled as table entries.
    pub zero_bytes: u64,
    /// Bytes that nobody had ever touched.
    pub untouched_bytes: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// Rounds, those after the pause included.
    pub rounds: u32,
    /// Data channels.
    pub channels: u8,
    /// From the call to the end.
    pub total: Duration,
    /// From the call of [`Guest::pause`] until the target said that the guest runs, or until it was resumed here; zero
    /// if it was never paused.
    pub downtime: Duration,
    /// What it was expected to be when the guest was paused for the last time, as far as that could be known.
    pub downtime_expected: Option<Duration>,
    /// What it was made of; zero where it was never paused, and up to the end where it was resumed here.
    pub downtime_parts: DowntimeParts,
    /// Attempts to hand over that were withdrawn because they took longer than the downtime limit.
    pub overruns: u32,
    /// How long the guest stood still for these, all together; not part of the downtime.
    pub interrupted: Duration,
    /// The most bytes that were kept back at once for the end, because they were dirty in every round.
    pub deferred_bytes: u64,
    /// How the guest was slowed down, and what that brought.
    pub throttling: Throttled,
    /// System calls of the send workers.
    pub send_syscalls: u64,
    /// What became of sending by reference.
    pub zero_copy: ZeroCopyReport,
    /// How the connections were encrypted; `None` if they were not.
    pub tls: Option<TlsReport>,
    /// The CPU each worker was pinned to.
    pub cpus: Vec<Option<usize>>,
    /// The session: by it a target is asked who owns the guest, where that is uncertain
    /// ([`settle`](crate::settle::settle)).
    pub session: SessionId,
    /// Connections of data channels that were lost on the way.
    pub channels_lost: u32,
    /// How often a lost data channel was connected again, and used.
    pub reconnects: u32,
    /// How often all connections were lost, and the session was taken up again.
    pub resumes: u32,
    /// How often the digests disagreed, and chunks travelled again.
    pub repairs: u32,
    /// Bytes of guest pages that a lost channel had taken, and that travelled again as nobody knew whether they had landed:
    /// never more than its epochs that were not applied.
    pub reshipped_bytes: u64,
    /// Bytes of guest pages that travelled again because digests disagreed.
    pub repaired_bytes: u64,
    /// A failure that did not decide the outcome: a hook that failed while cleaning up, a harvest that counted as all
    /// dirty.
    pub remarks: Vec<String>,
}

/// What a downtime was made of, in the order of time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DowntimeParts {
    /// In [`Guest::pause`].
    pub pause: Duration,
    /// Until the rest of RAM, and the state, had left this side: harvests, [`Guest::save_state`], and what was queued.
    pub ship: Duration,
    /// Until the target said that all of it has landed, that the digests agree, and that its VMM has loaded the state.
    pub load: Duration,
    /// From Commit until the target said that the guest runs.
    pub run: Duration,
}

/// How the connections of a migration were encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlsReport {
    /// The cipher suite, by its name in RFC 8446.
    pub suite: &'static str,
    /// Data channels that went on from the session of the control connection, with neither certificates nor signatures.
    pub channels_resumed: u8,
}

impl TlsReport {
    /// Of the control connection, if it is encrypted.
    fn of(control: &Stream) -> Option<TlsReport> {
        control.encryption().map(|how| TlsReport { suite: how.suite, channels_resumed: 0 })
    }

    /// The same, with one more data channel.
    fn and(self, channel: &Stream) -> TlsReport {
        let resumed = u8::from(channel.encryption().is_some_and(|how| how.resumed));
        TlsReport { channels_resumed: self.channels_resumed.saturating_add(resumed), ..self }
    }
}

/// What became of sending by reference.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ZeroCopyReport {
    /// Bytes of guest pages that were handed to the kernel by reference.
    pub bytes: u64,
    /// Those of them that the kernel is known to have copied after all.
    pub copied_bytes: u64,
    /// For each channel why it copied, from the start or from some time on; `None` if it did not.
    pub why_copied: Vec<Option<WhyCopied>>,
}

impl ZeroCopyReport {
    fn new(counts: &ChannelCounts, why_copied: Vec<Option<WhyCopied>>) -> ZeroCopyReport {
        ZeroCopyReport { bytes: counts.by_reference_bytes, copied_bytes: counts.copied_after_all_bytes, why_copied }
    }
}

/// Everything that can be set about a source.
#[derive(Debug)]
pub struct SourceBuilder {
    ram: Ram,
    settings: Settings,
    crew: CrewOptions,
}

/// What the driver goes by.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub channels: u8,
    pub verify: Verify,
    pub zero_test: bool,
    pub zero_copy: ZeroCopy,
    pub tls: Option<Tls>,
    pub framing: Arc<dyn Framing>,
    pub limits: Limits,
    pub timeouts: Timeouts,
    /// For how long the session is kept when all connections are lost; zero is not at all.
    pub resume_window: Duration,
    pub contents: Option<Arc<Contents>>,
    /// Bytes a second before the pause; 0 is no limit.
    pub bandwidth_max: u64,
    pub batch_bytes: usize,
    pub queue_bytes: u64,
    pub epoch_bytes: u64,
}

/// Bytes of one run at the most, and of one batch: what a worker hashes and tests for zeros is still in the second-level
/// cache when the kernel copies it, and scattered 4 KiB pages go 256 to a call.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes that may be queued in one ring: bounds imbalance, staleness, and the last round.
const QUEUE_BYTES: u64 = 8 << 20;
/// Bytes after which an epoch is closed: bounds what is sent again when a channel dies, and how late a journal is freed.
const EPOCH_BYTES: u64 = 128 << 20;
/// Rounds while the guest runs, at the most: an entry of the digest table has 16 bits for the round, and paused rounds
/// need some of them.
const ROUNDS_MAX: u32 = Round::MAX.0 - 4;
/// Channels, at the most: a channel's number is one byte, and 255 is kept free.
const CHANNELS_MAX: usize = 255;

impl SourceBuilder {
    /// Data channels, 1 to 255; 2 unless told otherwise. Each is a connection, a thread and a ring.
    pub fn channels(mut self, channels: u8) -> Self {
        self.settings.channels = channels;
        self
    }

    /// Pins the workers to these CPUs, by best effort.
    pub fn cpus(self, cpus: impl IntoIterator<Item = usize>) -> Self {
        let cpus: Vec<_> = cpus.into_iter().collect();
        self.pin(if cpus.is_empty() { Pin::Auto } else { Pin::BestEffort(cpus) })
    }

    /// Where the workers run.
    pub fn pin(mut self, pin: Pin) -> Self {
        self.crew.pin = pin;
        self
    }

    /// Creates the workers' threads in the VMM's own way.
    pub fn spawn(mut self, spawn: Arc<dyn Spawn>) -> Self {
        self.crew.spawn = spawn;
        self
    }

    /// Runs first on every worker's thread, after it was pinned: a seccomp filter, say.
    pub fn start_hook(mut self, hook: Arc<StartHook>) -> Self {
        self.crew.hook = Some(hook);
        self
    }

    /// Which digests guard the migration; [`Verify::Wire`] unless told otherwise.
    pub fn verify(mut self, verify: Verify) -> Self {
        self.settings.verify = verify;
        self
    }

    /// Keeps the hash of each page that is sent, of these blocks: for [`Guest::sent`], where the guest's RAM ought to be
    /// something that is known. A hash costs a look at the page, which the zero test has put into the cache; and a round
    /// begins when the last one has been sent. For one migration: a second attempt needs hashes of its own.
    pub fn contents(mut self, contents: Arc<Contents>) -> Self {
        self.settings.contents = Some(contents);
        self
    }

    /// Whether pages are tested for zeros before they are sent; they are unless told otherwise.
    pub fn zero_test(mut self, zero_test: bool) -> Self {
        self.settings.zero_test = zero_test;
        self
    }

    /// Whether pages are handed to the kernel by reference; [`ZeroCopy::Auto`] unless told otherwise.
    pub fn zero_copy(mut self, zero_copy: ZeroCopy) -> Self {
        self.settings.zero_copy = zero_copy;
        self
    }

    /// Encrypts every connection, and proves to each side who the other is; nothing is unless told otherwise. The target's
    /// certificate must be for the host of the address, or for [`Tls::name`].
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

    /// The longest the guest may stand still; 300 ms unless told otherwise.
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.settings.limits.downtime_limit = limit.min(YEAR);
        self
    }

    /// Rounds, up to 65,530, after which [`at_limit`](Self::at_limit) says what happens to a guest that outruns the link;
    /// 1000 unless told otherwise. Rounds of a guest that writes little take milliseconds.
    pub fn rounds_max(mut self, rounds: u32) -> Self {
        self.settings.limits.rounds_max = rounds.min(ROUNDS_MAX);
        self
    }

    /// The longest that rounds may go on before the guest is paused; no limit unless told otherwise. A round in progress
    /// ends first where the guest is to be switched over then.
    pub fn precopy_time_max(mut self, time: Duration) -> Self {
        self.settings.limits.precopy_time_max = Some(time.min(YEAR));
        self
    }

    /// What happens at [`rounds_max`](Self::rounds_max) and [`precopy_time_max`](Self::precopy_time_max), and with a
    /// guest that outruns the link for good: the migration fails and the guest runs on, unless told otherwise.
    pub fn at_limit(mut self, at_limit: AtLimit) -> Self {
        self.settings.limits.at_limit = at_limit;
        self
    }

    /// How much a guest that outruns the link may be slowed down, in percent up to 99, by [`Guest::throttle`]; 0, not at
    /// all, unless told otherwise. At this limit, a guest that still outruns the link is given up on.
    pub fn throttle_max(mut self, percent: u8) -> Self {
        self.settings.limits.throttle_max = percent.min(99);
        self
    }

    /// What happens when a hand-over takes longer than the downtime limit and the point of no return is not reached:
    /// it is accepted, unless told otherwise.
    pub fn overrun(mut self, overrun: Overrun) -> Self {
        self.settings.limits.overrun = overrun;
        self
    }

    /// The most bytes a second that are sent while the guest runs; 0, no limit, unless told otherwise. While it is
    /// paused the limit does not hold: there it would cost downtime.
    pub fn bandwidth_max(mut self, bytes_per_second: u64) -> Self {
        self.settings.bandwidth_max = bytes_per_second;
        self
    }

    /// How long to wait for what.
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.settings.timeouts = timeouts.bounded();
        self
    }

    /// How long the session is kept when all connections are lost, the control connection among them: the guest runs on
    /// here meanwhile, and when the target is reached again, rounds go on where they were. Zero, not at all, unless told
    /// otherwise. The target must have a [window](crate::target::TargetBuilder::resume_window), too.
    ///
    /// A connection that is lost after the guest was handed over is used to learn who owns it: see [`Outcome::Uncertain`].
    pub fn resume_window(mut self, window: Duration) -> Self {
        self.settings.resume_window = window.min(YEAR);
        self
    }

    /// A source that will connect to this address: `host:port` or `unix:PATH`. Nothing is connected yet.
    ///
    /// # Errors
    /// [`Failure::Config`] for an address or a setting that makes no sense.
    pub fn connect(self, address: &str) -> Result<Source, Failure> {
        self.connect_any([address])
    }

    /// As [`SourceBuilder::connect`], to a target that is reached over several networks: data channels are spread over
    /// these addresses in turn, and one that is lost tries the next. The control connection is made over the first that
    /// answers. A network that is down costs the channels on it, not the migration.
    ///
    /// # Errors
    /// [`Failure::Config`] for an address or a setting that makes no sense, or for no address at all.
    pub fn connect_any<'a>(self, addresses: impl IntoIterator<Item = &'a str>) -> Result<Source, Failure> {
        let addresses = addresses.into_iter().map(str::parse).collect::<Result<Vec<Address>, Failure>>()?;
        if addresses.is_empty() {
            return Err(Failure::Config("there is no address to connect to".to_owned()));
        }
        self.build(Endpoint::Addresses(addresses))
    }

    /// As [`SourceBuilder::connect`], to a Unix socket.
    ///
    /// # Errors
    /// [`Failure::Config`] for a setting that makes no sense.
    pub fn connect_unix(self, path: impl Into<PathBuf>) -> Result<Source, Failure> {
        self.build(Endpoint::Addresses(vec![Address::Unix(path.into())]))
    }

    /// A source that asks for its connections: [`crate::net::Fds`] hands out ready-made ones.
    ///
    /// # Errors
    /// [`Failure::Config`] for a setting that makes no sense.
    pub fn connector(self, connector: impl Connector + 'static) -> Result<Source, Failure> {
        self.build(Endpoint::Connector(Box::new(connector)))
    }

    fn build(mut self, endpoint: Endpoint) -> Result<Source, Failure> {
        if let Some(agreed) = self.settings.framing.channels() {
            // Without any, one worker puts pages into bytes for the control connection.
            self.settings.channels = agreed.max(1);
        }
        let channels = usize::from(self.settings.channels);
        if channels == 0 || channels > CHANNELS_MAX {
            return Err(Failure::Config(format!("{channels} channels are not possible; 1 to {CHANNELS_MAX} are")));
        }
        if self.settings.contents.as_ref().is_some_and(|contents| !contents.fits(&self.ram.shapes())) {
            return Err(Failure::Config("the hashes that are to be kept are not of these RAM blocks".to_owned()));
        }
        if !self.settings.framing.mends() && self.settings.verify != Verify::Off {
            let what = "this framing carries no digests that could be compared; use Verify::Off";
            return Err(Failure::Config(what.to_owned()));
        }
        if let Some(tls) = &self.settings.tls {
            if self.settings.zero_copy == ZeroCopy::On {
                return Err(Failure::Config(format!("no zero copy: {}; use auto or off", WhyCopied::Encrypted)));
            }
            tls.check(&endpoint)?;
        }
        // Said before anybody is disturbed; of a connector's sockets it is known only when they are there.
        let is_unix = |address: &Address| matches!(address, Address::Unix(_));
        let unix = matches!(&endpoint, Endpoint::Addresses(addresses) if addresses.iter().any(is_unix));
        if self.settings.zero_copy == ZeroCopy::On && unix {
            return Err(Failure::Config(format!("no zero copy to {endpoint:?}: {}; use auto or off", WhyCopied::NotTcp)));
        }
        let bell = PollSleeper::bell()
            .map_err(|e| Failure::Config(format!("no eventfd for the source's bell: {e}")))?;
        let progress = Progress::new(channels);
        progress.set(|c| &c.ram_bytes, self.ram.bytes());
        let SourceBuilder { ram, settings, crew } = self;
        Ok(Source { ram, settings, crew, endpoint, bell, gate: Gate::new(), progress })
    }
}

/// One migration, ready to go. A second attempt is a second source over the same [`Ram`].
///
/// # When not to use it
/// For memory that another process writes without this one's dirty source learning of it.
///
/// ```no_run
/// use std::time::Duration;
/// use pageferry::dirty::bitmap::DirtyBitmap;
/// use pageferry::{Guest, Outcome, Ram, Source};
/// # fn send_away(ram: Ram, mut guest: impl Guest) -> Result<(), pageferry::Failure> {
/// let mut dirty = DirtyBitmap::for_ram(&ram);
/// let source = Source::builder(ram)
///     .channels(4)
///     .downtime_limit(Duration::from_millis(50))
///     .connect("10.0.0.2:4444")?;
/// let cancel = source.cancel_handle(); // for another thread
/// let report = source.migrate(&mut dirty, &mut guest);
/// match report.outcome {
///     Outcome::Completed => println!("gone; the guest stood still for {:?}", report.downtime),
///     other => println!("{other}"),
/// }
/// # Ok(())
/// # }
/// ```
pub struct Source {
    ram: Ram,
    settings: Settings,
    crew: CrewOptions,
    endpoint: Endpoint,
    bell: Bell<PollSleeper>,
    gate: Gate,
    progress: Progress,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("to", &self.endpoint).field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Source {
    /// Begins to describe a migration of this memory.
    pub fn builder(ram: Ram) -> SourceBuilder {
        let settings = Settings {
            channels: 2,
            verify: Verify::default(),
            zero_test: true,
            zero_copy: ZeroCopy::default(),
            tls: None,
            framing: Arc::new(Native),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            resume_window: Duration::ZERO,
            contents: None,
            bandwidth_max: 0,
            batch_bytes: BATCH_BYTES,
            queue_bytes: QUEUE_BYTES,
            epoch_bytes: EPOCH_BYTES,
        };
        SourceBuilder { ram, settings, crew: CrewOptions::default() }
    }

    /// Cancels this migration, from any thread.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { gate: self.gate.clone(), controller: self.bell.ringer() }
    }

    /// Shows this migration, to any thread.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Ships the guest. Comes back when it runs at the target, or when it is known that it will not, or when that cannot
    /// be known; the report says which. Unless it completed or is uncertain, the guest runs on here, and `dirty` has
    /// back everything that was taken from it.
    ///
    /// Every thread that it started has been joined when it returns.
    pub fn migrate(self, dirty: &mut dyn DirtySource, guest: &mut dyn Guest) -> SourceReport {
        driver::migrate(self, dirty, guest)
    }
}
