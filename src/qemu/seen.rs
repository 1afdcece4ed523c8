//! What was seen of a migration that QEMU sent: for whoever stores it.

#![forbid(unsafe_code)]

mod numbers;

use std::sync::{Arc, Mutex, PoisonError};

use numbers::Numbers;

use super::wire::{Barrier, Block, Compression, Dialect, InitPacket, Name};
use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;

/// What was seen, and still is: it may be asked at any time, from any thread.
///
/// ```
/// assert_eq!(pageferry::qemu::Seen::default().facts().machine, None);
/// ```
#[derive(Clone, Default, Debug)]
pub struct Seen(Arc<Inner>);

#[derive(Default, Debug)]
struct Inner {
    facts: Mutex<Facts>,
    main_bytes: AtomicU64,
    channel_bytes: AtomicU64,
    normal_pages: AtomicU64,
    zero_pages: AtomicU64,
    sync_packets: AtomicU64,
    barriers: AtomicU64,
    /// Rounds that channels have begun, all added up, and [`CLOSED`]. One word: of two who change it, one sees the other.
    begun: AtomicU64,
    numbers: Numbers,
}

/// RAM is complete.
const CLOSED: u64 = 1 << 63;

/// What is said once.
#[derive(Clone, Default, Debug)]
pub struct Facts {
    /// The machine type.
    pub machine: Option<Name>,
    /// The configuration as it came: from its type byte, 07, to the last byte of its last subsection.
    pub configuration: Vec<u8>,
    /// The RAM blocks.
    pub blocks: Vec<Block>,
    /// The number of the section of RAM.
    pub section: u32,
    /// Where the barriers are.
    pub barrier: Option<Barrier>,
    /// Which QEMU it is, by its first packet; without channels by the description of the devices, which comes last.
    pub dialect: Option<Dialect>,
    /// How pages were compressed, by the last packet that had any; `None` while none was.
    pub compression: Option<Compression>,
    /// Whether the source waits for an answer at the end.
    pub return_path: bool,
    /// The uuid of the machine, as its channels have said it; `None` before they have begun, without channels, and where
    /// there is none (zeros).
    pub uuid: Option<[u8; 16]>,
    /// What connections that came as channels have said of themselves, each different word once: among them may be some
    /// that were turned away, as they belong to nobody, or as no such channel was expected.
    pub callers: Vec<InitPacket>,
}

/// Different words of channels that are kept: those of all channels, and of a good many strangers.
const CALLERS_MAX: usize = 1024;

/// What was counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Bytes of the main connection.
    pub main_bytes: u64,
    /// Bytes of all channels, their first packets included.
    pub channel_bytes: u64,
    /// Pages whose bytes came, on the channels or on the main connection.
    pub normal_pages: u64,
    /// Pages of zeros that were named.
    pub zero_pages: u64,
    /// SYNC packets, of all channels together.
    pub sync_packets: u64,
    /// Barriers, that of the START section among them; without channels, the ends of sections that stand in their place.
    pub barriers: u64,
}

impl Seen {
    /// What has been said so far.
    pub fn facts(&self) -> Facts {
        self.0.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What has been counted so far.
    pub fn counts(&self) -> Counts {
        let of = |count: &AtomicU64| count.load(Relaxed);
        Counts {
            main_bytes: of(&self.0.main_bytes),
            channel_bytes: of(&self.0.channel_bytes),
            normal_pages: of(&self.0.normal_pages),
            zero_pages: of(&self.0.zero_pages),
            sync_packets: of(&self.0.sync_packets),
            barriers: of(&self.0.barriers),
        }
    }

    /// A connection has said that it is a channel.
    pub(super) fn called(&self, init: InitPacket) {
        self.learn(|facts| {
            if facts.callers.len() < CALLERS_MAX && !facts.callers.contains(&init) {
                facts.callers.push(init);
            }
        });
    }

    /// A channel begins a round. False if RAM is complete: then nothing of it may land.
    pub(super) fn begin_round(&self) -> bool {
        self.0.begun.fetch_add(1, Relaxed) & CLOSED == 0
    }

    /// RAM is complete: no round begins any more. False if there are not as many as there should be.
    pub(super) fn close(&self, rounds: u64) -> bool {
        self.0.begun.fetch_or(CLOSED, Relaxed) == rounds
    }

    /// The numbers of the packets.
    pub(super) fn numbers(&self) -> &Numbers {
        &self.0.numbers
    }

    pub(super) fn learn(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.0.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn count(&self, more: &Counts) {
        let add = |count: &AtomicU64, more: u64| {
            if more > 0 {
                count.fetch_add(more, Relaxed);
            }
        };
        add(&self.0.main_bytes, more.main_bytes);
        add(&self.0.channel_bytes, more.channel_bytes);
        add(&self.0.normal_pages, more.normal_pages);
        add(&self.0.zero_pages, more.zero_pages);
        add(&self.0.sync_packets, more.sync_packets);
        add(&self.0.barriers, more.barriers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_cost_little_memory() {
        let seen = Seen::default();
        (0..=u16::MAX).for_each(|n| seen.called(InitPacket { uuid: [(n >> 8) as u8; 16], channel: n as u8 }));
        assert_eq!(seen.facts().callers.len(), CALLERS_MAX);
    }
}
