//! Which QEMU made the bytes.

#![forbid(unsafe_code)]

use super::packet::RAM_PACKET_BYTES;

/// How a QEMU lays out its packets and its main stream. It belongs to the program, not to the machine type that the
/// program runs: QEMU 10.0 speaks [`Dialect::V10_0`] for `pc-q35-7.2` too, only its [`Barrier`] is another.
///
/// ```
/// use pageferry::qemu::wire::{Dialect, NewRamPacket};
///
/// let sync = NewRamPacket::sync(0).encode(Dialect::V7_2)?;
/// assert_eq!(Dialect::of_first_packet(&sync), Dialect::V7_2);
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dialect {
    /// QEMU 10.0, and what packs as it does: zero pages may stand in the packets, a SYNC packet is empty, and what a
    /// packet does not use is zero.
    V10_0,
    /// QEMU 7.2: zero pages travel on the main connection, a SYNC packet may carry pages, and what a packet does not
    /// use may be left over from an earlier one. There is no flush word. QEMU up to 9.1 is taken for it: from 8.1 on that
    /// has flush words, and from 9.0 on zero pages in its packets, which are both taken.
    V7_2,
}

impl Dialect {
    /// Tells the dialects apart by the first packet of any channel. It is a SYNC without pages; QEMU 7.2 says in it how
    /// many pages a packet has room for, 10.0 says 0. Whether the packet is sound is left to [`super::RamPacket`].
    pub fn of_first_packet(packet: &[u8; RAM_PACKET_BYTES]) -> Dialect {
        match packet[12..16] {
            [0, 0, 0, 0] => Dialect::V10_0,
            _ => Dialect::V7_2,
        }
    }
}

/// Where the main connection and the channels wait for each other. At the barrier every channel sends one SYNC, and no
/// page that comes after it may be stored before all that came before it, on every channel, are stored.
///
/// The stream does not name it, but the START section shows it.
///
/// ```
/// assert_ne!(pageferry::qemu::wire::Barrier::PerRound, pageferry::qemu::wire::Barrier::PerSection);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Barrier {
    /// At every flush word: once a round, and in the START section.
    PerRound,
    /// At the end of every section of RAM: machine types up to 8.0, and everything before QEMU 8.1. A main stream
    /// without multifd looks the same; it needs no barrier.
    PerSection,
}
