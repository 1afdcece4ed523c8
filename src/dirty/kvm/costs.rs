//! What the calls into KVM cost: how many, how long, the longest, the largest. Counted always, and told one by one.
#![forbid(unsafe_code)]

use crate::sync::{Arc, AtomicU64, Ordering::Relaxed};
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Which call it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum KvmCallKind {
    /// KVM_GET_DIRTY_LOG.
    Get,
    /// KVM_CLEAR_DIRTY_LOG.
    Clear,
    /// KVM_RESET_DIRTY_RINGS.
    Reset,
}

/// One call into KVM, made or failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct KvmCall {
    /// Which call it was.
    pub kind: KvmCallKind,
    /// The slot, as [`KvmSlot::slot`](super::KvmSlot::slot) has it; none for a reset, which is for all.
    pub slot: Option<u32>,
    /// Its pages: of the slot for a get, of the range for a clear, of the entries taken for a reset.
    pub pages: u64,
    /// How long it took.
    pub time: Duration,
    /// Whether KVM did it.
    pub done: bool,
}

/// What all calls of one kind cost together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct CallCosts {
    /// How many there were, failed ones among them.
    pub calls: u64,
    /// How long they took together.
    pub time: Duration,
    /// How long the longest took.
    pub longest: Duration,
    /// The pages of all calls, as [`KvmCall::pages`] counts them.
    pub pages: u64,
    /// The most pages of one call.
    pub pages_max: u64,
}

/// What dirty tracking by KVM has cost since its source was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct KvmCosts {
    /// How long the last arming took.
    pub arm: Duration,
    /// How long the last disarming took.
    pub disarm: Duration,
    /// The calls of KVM_GET_DIRTY_LOG.
    pub get: CallCosts,
    /// The calls of KVM_CLEAR_DIRTY_LOG.
    pub clear: CallCosts,
    /// The calls of KVM_RESET_DIRTY_RINGS.
    pub reset: CallCosts,
    /// Entries of dirty rings that named no page of a slot we know: counted and left out.
    pub entries_ignored: u64,
}

/// Reads the costs of a source while a migration has it. A clone reads the same.
#[derive(Clone, Debug, Default)]
pub struct CostMeter {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    arm_ns: AtomicU64,
    disarm_ns: AtomicU64,
    get: CallCounts,
    clear: CallCounts,
    reset: CallCounts,
    entries_ignored: AtomicU64,
}

/// Relaxed all of it: nothing hangs on these numbers, and a reader may see a call counted whose time is not yet.
#[derive(Debug, Default)]
struct CallCounts {
    calls: AtomicU64,
    time_ns: AtomicU64,
    longest_ns: AtomicU64,
    pages: AtomicU64,
    pages_max: AtomicU64,
}

impl CostMeter {
    /// The costs as they are now.
    pub fn read(&self) -> KvmCosts {
        let nanoseconds = |count: &AtomicU64| Duration::from_nanos(count.load(Relaxed));
        KvmCosts {
            arm: nanoseconds(&self.counts.arm_ns),
            disarm: nanoseconds(&self.counts.disarm_ns),
            get: self.counts.get.read(),
            clear: self.counts.clear.read(),
            reset: self.counts.reset.read(),
            entries_ignored: self.counts.entries_ignored.load(Relaxed),
        }
    }

    pub(super) fn armed(&self, since: Instant) {
        self.counts.arm_ns.store(as_ns(since.elapsed()), Relaxed);
    }

    pub(super) fn disarmed(&self, since: Instant) {
        self.counts.disarm_ns.store(as_ns(since.elapsed()), Relaxed);
    }

    pub(super) fn ignored(&self, entries: u64) {
        self.counts.entries_ignored.fetch_add(entries, Relaxed);
    }
}

impl CallCounts {
    fn read(&self) -> CallCosts {
        CallCosts {
            calls: self.calls.load(Relaxed),
            time: Duration::from_nanos(self.time_ns.load(Relaxed)),
            longest: Duration::from_nanos(self.longest_ns.load(Relaxed)),
            pages: self.pages.load(Relaxed),
            pages_max: self.pages_max.load(Relaxed),
        }
    }

    fn add(&self, call: &KvmCall) {
        let ns = as_ns(call.time);
        self.calls.fetch_add(1, Relaxed);
        self.time_ns.fetch_add(ns, Relaxed);
        self.longest_ns.fetch_max(ns, Relaxed);
        self.pages.fetch_add(call.pages, Relaxed);
        self.pages_max.fetch_max(call.pages, Relaxed);
    }
}

fn as_ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Who is told of each call: on the thread that made it, which may be a vCPU's.
type OnCall = Box<dyn Fn(&KvmCall) + Send + Sync>;

/// Counts calls and tells of them.
#[derive(Default)]
pub(super) struct Recorder {
    pub(super) meter: CostMeter,
    on_call: OnceLock<OnCall>,
}

impl Recorder {
    /// Tells `on_call` of each call from now on, unless somebody is told already.
    pub(super) fn tell(&self, on_call: impl Fn(&KvmCall) + Send + Sync + 'static) {
        let _ = self.on_call.set(Box::new(on_call));
    }

    /// Makes a call. `pages` is what it is about, given what it returned.
    pub(super) fn call<T>(
        &self,
        kind: KvmCallKind,
        slot: Option<u32>,
        make: impl FnOnce() -> std::io::Result<T>,
        pages: impl FnOnce(Option<&T>) -> u64,
    ) -> std::io::Result<T> {
        let begun = Instant::now();
        let made = make();
        let time = begun.elapsed();
        let call = KvmCall { kind, slot, pages: pages(made.as_ref().ok()), time, done: made.is_ok() };
        let counts = match kind {
            KvmCallKind::Get => &self.meter.counts.get,
            KvmCallKind::Clear => &self.meter.counts.clear,
            KvmCallKind::Reset => &self.meter.counts.reset,
        };
        counts.add(&call);
        if let Some(on_call) = self.on_call.get() {
            on_call(&call);
        }
        made
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tells = self.on_call.get().is_some();
        f.debug_struct("Recorder").field("costs", &self.meter.read()).field("tells", &tells).finish()
    }
}
