//! The numbers of a source's packets: whether any is missing, or came twice.

use std::fmt;

use crate::sync::Ordering::Relaxed;
use crate::sync::{AtomicBool, AtomicU64};

/// QEMU 10.0 takes the numbers of the packets of all channels from one counter, which begins at 0, when it fills them: so
/// they rise on each channel, and none is left out. QEMU as a destination does not look at them, and other programs may
/// number as they like: only a source that begins as QEMU does is held to it.
#[derive(Default, Debug)]
pub(in crate::qemu) struct Numbers {
    packets: AtomicU64,
    highest: AtomicU64,
    /// The numbers of the channels' first packets, all added up.
    firsts: AtomicU64,
    /// A number that is not higher than the one before it on its channel.
    has_fallen: AtomicBool,
}

impl Numbers {
    /// A packet, and the number of the one before it on its channel.
    pub fn take(&self, number: u64, before: Option<u64>) {
        self.packets.fetch_add(1, Relaxed);
        self.highest.fetch_max(number, Relaxed);
        match before {
            None => drop(self.firsts.fetch_add(number, Relaxed)),
            Some(before) if before >= number => self.has_fallen.store(true, Relaxed),
            Some(_) => {}
        }
    }

    /// Whether all packets have come, and each once, when so many channels have come to their end.
    pub fn check(&self, channels: u8) -> Result<(), Misnumbered> {
        let (packets, highest) = (self.packets.load(Relaxed), self.highest.load(Relaxed));
        let channels = u64::from(channels);
        let begins_as_qemu = self.firsts.load(Relaxed) == channels * channels.saturating_sub(1) / 2 && highest > 0;
        if begins_as_qemu && (self.has_fallen.load(Relaxed) || highest.checked_add(1) != Some(packets)) {
            return Err(Misnumbered { packets, highest });
        }
        Ok(())
    }
}

/// Packets are missing, or came twice, or changed places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::qemu) struct Misnumbered {
    packets: u64,
    highest: u64,
}

impl fmt::Display for Misnumbered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Misnumbered { packets, highest } = self;
        write!(f, "of the packets on the channels, numbered from 0 to {highest}, {packets} came: some are missing, ")?;
        f.write_str("came twice, or have changed places")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(channels: &[&[u64]]) -> bool {
        let numbers = Numbers::default();
        for channel in channels {
            let before = [None].into_iter().chain(channel.iter().copied().map(Some));
            channel.iter().zip(before).for_each(|(number, before)| numbers.take(*number, before));
        }
        numbers.check(channels.len() as u8).is_ok()
    }

    #[test]
    fn packets_that_are_missing_or_came_twice_are_noticed() {
        assert!(check(&[&[0, 2, 5], &[1, 3, 4]]) && check(&[&[0, 1, 2]]) && check(&[]));
        assert!(!check(&[&[0, 2, 5], &[1, 4]]), "one is missing");
        assert!(!check(&[&[0, 2, 2, 5], &[1, 3, 4]]), "one came twice");
        assert!(!check(&[&[0, 2, 5], &[1, 3, 3]]), "one in another's place");
        assert!(!check(&[&[0, 5, 2], &[1, 3, 4]]), "two have changed places");
        assert!(!check(&[&[0, u64::MAX], &[1]]), "one was never there");
    }

    #[test]
    fn a_source_that_numbers_in_another_way_is_not_held_to_it() {
        assert!(check(&[&[0, 0, 0], &[0, 0]]), "not at all");
        assert!(check(&[&[0, 0, 0]]), "not at all, on one channel");
        assert!(check(&[&[0, 1, 2], &[0, 1]]), "each channel for itself");
        assert!(check(&[&[7, 3], &[9, 9]]));
    }
}
