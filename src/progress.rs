#![forbid(unsafe_code)]
//! Live counters: written by the threads that do the work, read by anybody. Relaxed throughout; no decision hangs on
//! them.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;

macro_rules! counters {
    ($(#[$doc:meta])* $cells:ident, $(#[$snap_doc:meta])* $snapshot:ident { $($(#[$field_doc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $cells {
            $($(#[$field_doc])* pub $field: AtomicU64,)*
        }

        $(#[$snap_doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct $snapshot {
            $($(#[$field_doc])* pub $field: u64,)*
        }

        impl $cells {
            /// What they say now.
            pub fn snapshot(&self) -> $snapshot {
                $snapshot { $($field: self.$field.load(Relaxed),)* }
            }
        }

        impl std::ops::AddAssign for $snapshot {
            fn add_assign(&mut self, other: $snapshot) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

counters! {
    /// The counters of one channel. Each is written by the channel's worker alone.
    ChannelCells,
    /// What a channel, or all of them, has done.
    ChannelCounts {
        /// Bytes that crossed the socket: headers, tables and payload.
        wire_bytes,
        /// Bytes of guest pages that crossed the socket.
        payload_bytes,
        /// Bytes of guest pages that were zero and travelled as an entry in a table.
        zero_bytes,
        /// Bytes of guest pages that a lane made or mapped before their content came, which saves page faults.
        prefaulted_bytes,
        /// Bytes of guest pages that were handed to the kernel by reference, at a source.
        by_reference_bytes,
        /// Those of them that the kernel is known to have copied after all.
        copied_after_all_bytes,
        /// Packets, marks among them.
        packets,
        /// System calls of the worker: sends or receives, prefaulting, sleeps, and wake-ups of others.
        syscalls,
        /// Nanoseconds in which a send worker had something to send, looks at pages of zeros not counted: its link's share
        /// of a rate.
        busy_ns,
    }
}

/// Adds to a counter that only the calling thread writes: no locked instruction.
#[inline]
pub fn add(cell: &AtomicU64, n: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(n), Relaxed);
}

#[derive(Debug, Default)]
pub(crate) struct Cells {
    channels: Vec<CachePadded<ChannelCells>>,
    pub(crate) ram_bytes: AtomicU64,
    pub(crate) untouched_bytes: AtomicU64,
    pub(crate) rounds: AtomicU64,
    pub(crate) pushed_bytes: AtomicU64,
    pub(crate) rate: AtomicU64,
    pub(crate) dirty_rate: AtomicU64,
    pub(crate) bytes_left: AtomicU64,
    pub(crate) expected_downtime_us: AtomicU64,
    pub(crate) throttle: AtomicU64,
    pub(crate) stage: AtomicU64,
}

/// Where a migration stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Stage {
    /// Connecting, or waiting for the other side.
    #[default]
    Connecting,
    /// Pages travel while the guest runs.
    Precopy,
    /// The guest stands still; the rest travels.
    Paused,
    /// Everything has been sent; the two sides agree on who runs the guest.
    HandOver,
    /// It is over.
    Ended,
}

const STAGES: [Stage; 5] = [Stage::Connecting, Stage::Precopy, Stage::Paused, Stage::HandOver, Stage::Ended];

/// A window on a migration that any thread may look through, while it runs and after.
#[derive(Clone, Debug)]
pub struct Progress(pub(crate) Arc<Cells>);

/// What [`Progress::now`] saw. Numbers are read one by one: they need not fit each other to the byte.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Snapshot {
    /// Where it stands.
    pub stage: Stage,
    /// Bytes of guest RAM, all blocks.
    pub ram_bytes: u64,
    /// Bytes found never to have been touched; they cost nothing.
    pub untouched_bytes: u64,
    /// Rounds begun.
    pub rounds: u64,
    /// Bytes of pages handed to the channels so far; pages sent again count again.
    pub pushed_bytes: u64,
    /// All channels together.
    pub channels: ChannelCounts,
    /// Bytes per second of the link.
    pub rate: u64,
    /// Bytes per second the guest dirties.
    pub dirty_rate: u64,
    /// Bytes harvested and not yet shipped, and bytes dirty, at the last look.
    pub bytes_left: u64,
    /// How long the guest would stand still if it were paused now.
    pub expected_downtime: Duration,
    /// By how many percent the guest is slowed down.
    pub throttle: u8,
}

impl Progress {
    pub(crate) fn new(channels: usize) -> Progress {
        let channels = (0..channels).map(|_| CachePadded::default()).collect();
        Progress(Arc::new(Cells { channels, ..Cells::default() }))
    }

    /// Looks.
    pub fn now(&self) -> Snapshot {
        let cells = &self.0;
        let read = |cell: &AtomicU64| cell.load(Relaxed);
        Snapshot {
            stage: STAGES[read(&cells.stage) as usize % STAGES.len()],
            ram_bytes: read(&cells.ram_bytes),
            untouched_bytes: read(&cells.untouched_bytes),
            rounds: read(&cells.rounds),
            pushed_bytes: read(&cells.pushed_bytes),
            channels: self.channels(),
            rate: read(&cells.rate),
            dirty_rate: read(&cells.dirty_rate),
            bytes_left: read(&cells.bytes_left),
            expected_downtime: Duration::from_micros(read(&cells.expected_downtime_us)),
            throttle: read(&cells.throttle) as u8,
        }
    }

    /// The sum over all channels.
    pub fn channels(&self) -> ChannelCounts {
        let mut sum = ChannelCounts::default();
        for cells in &self.0.channels {
            sum += cells.snapshot();
        }
        sum
    }

    /// One channel's counters.
    pub fn channel(&self, index: usize) -> Option<ChannelCounts> {
        self.0.channels.get(index).map(|cells| cells.snapshot())
    }

    pub(crate) fn cells(&self, index: usize) -> &ChannelCells {
        &self.0.channels[index]
    }

    pub(crate) fn set(&self, cell: impl Fn(&Cells) -> &AtomicU64, value: u64) {
        cell(&self.0).store(value, Relaxed);
    }

    pub(crate) fn stage(&self, stage: Stage) {
        self.set(|c| &c.stage, stage as u64);
    }
}
