//! The plain values every layer speaks in: page sizes, page indices, runs, and the numbers that name things.

use std::fmt;

/// The size of one *tracking page*: the unit of the dirty bitmap, of the wire and of the page hashes.
///
/// It is the host's base page size (4096 on x86-64, up to 65536 on Arm), not the size of the pages that back the
/// memory: that is an attribute of its own ([`crate::RamBlock::backing_page_bytes`]).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageSize(u32);

impl PageSize {
    /// 4 KiB, the base page of x86-64.
    pub const SIZE_4K: PageSize = PageSize(4096);
    /// 16 KiB.
    pub const SIZE_16K: PageSize = PageSize(16384);
    /// 64 KiB, the largest base page in use.
    pub const SIZE_64K: PageSize = PageSize(65536);

    /// A page size from its bytes: a power of two from 4096 to 65536, else `None`.
    pub const fn new(bytes: u32) -> Option<PageSize> {
        if bytes.is_power_of_two() && bytes >= 4096 && bytes <= 65536 { Some(PageSize(bytes)) } else { None }
    }

    /// Bytes of one page.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// log2 of the bytes of one page.
    pub const fn shift(self) -> u32 {
        self.0.trailing_zeros()
    }
}

/// Names one RAM block within a migration.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct BlockId(pub u16);

/// Names one data channel: 0 to 254.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ChannelId(pub u8);

/// How often a channel has been connected; the first connection is generation 1. A higher generation replaces a lower one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Generation(pub u32);

/// The generation of a connection that was not there before.
pub const FIRST_GENERATION: Generation = Generation(1);

/// One pass over all RAM blocks. The first is round 0; the largest is [`Round::MAX`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Round(pub u32);

impl Round {
    /// The largest round: a page's digest entry keeps 16 bits of the round's number plus one.
    pub const MAX: Round = Round(u16::MAX as u32 - 1);
}

/// A stretch of the stream whose journal is freed as a whole. The first is epoch 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// Sixteen random bytes that tell one migration from every other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

/// Sixteen random bytes that tell one run of a target process from every other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct InstanceId(pub [u8; 16]);

/// Adjacent dirty pages in one block: what the scanner pushes and a worker ships. Sixteen bytes, `Copy`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Run {
    /// The block.
    pub block: BlockId,
    /// Index of the first page in the block.
    pub first: u64,
    /// Number of pages; never 0.
    pub pages: u32,
}

impl Run {
    /// The page after the last one.
    pub fn end(&self) -> u64 {
        self.first + u64::from(self.pages)
    }

    /// The run in pieces of no more than this many pages each; 0 counts as 1.
    ///
    /// ```
    /// use pageferry::units::{BlockId, Run};
    ///
    /// let run = Run { block: BlockId(0), first: 7, pages: 5 };
    /// let pieces: Vec<_> = run.pieces(2).map(|piece| (piece.first, piece.pages)).collect();
    /// assert_eq!(pieces, [(7, 2), (9, 2), (11, 1)]);
    /// ```
    #[inline]
    pub fn pieces(self, pages_max: u32) -> impl Iterator<Item = Run> {
        let mut rest = self;
        std::iter::from_fn(move || {
            let piece = Run { pages: rest.pages.min(pages_max.max(1)), ..rest };
            rest.first += u64::from(piece.pages);
            rest.pages -= piece.pages;
            (piece.pages > 0).then_some(piece)
        })
    }
}

/// What travels through a ring and stands in a journal: a run, or a mark between runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Item {
    /// Pages to ship.
    Run(Run),
    /// Pages that nobody has ever touched, for a wire that names them: they are zeros, and need no look.
    Untouched(Run),
    /// The round has ended on this channel.
    RoundEnd(Round),
    /// The epoch has ended on this channel.
    Flush(Epoch),
}

impl Item {
    /// The run, if it is one, touched or not.
    pub fn run(self) -> Option<Run> {
        match self {
            Item::Run(run) | Item::Untouched(run) => Some(run),
            Item::RoundEnd(_) | Item::Flush(_) => None,
        }
    }
}

/// Which digests guard a migration.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Verify {
    /// None. Headers, tables and control frames still carry their CRC.
    Off,
    /// Both sides hash every page as it is sent and as it lands; the digests must agree before the hand-over.
    #[default]
    Wire,
    /// As `Wire`, and both sides hash all of RAM while the guest is paused.
    Full,
}

macro_rules! display_plain {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    )*};
}
display_plain!(PageSize, BlockId, ChannelId, Generation, Round, Epoch);

macro_rules! display_hex {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    )*};
}
display_hex!(SessionId, InstanceId);

impl SessionId {
    /// Reads what `Display` writes: 32 hexadecimal digits.
    ///
    /// ```
    /// use pageferry::units::SessionId;
    ///
    /// let id = SessionId([0xA7; 16]);
    /// assert_eq!(SessionId::from_hex(&id.to_string()), Some(id));
    /// assert_eq!(SessionId::from_hex("a7a7"), None);
    /// ```
    pub fn from_hex(text: &str) -> Option<SessionId> {
        // `from_str_radix` would take a sign, too.
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        u128::from_str_radix(text, 16).ok().map(|number| SessionId(number.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_size_is_a_power_of_two_between_4k_and_64k() {
        for bad in [0, 1, 2048, 4097, 12288, 131_072, u32::MAX] {
            assert_eq!(PageSize::new(bad), None, "{bad}");
        }
        assert_eq!(PageSize::new(65536).unwrap().shift(), 16);
    }

    #[test]
    fn a_run_takes_sixteen_bytes_and_an_item_eight_more() {
        assert_eq!((size_of::<Run>(), size_of::<Item>()), (16, 24));
    }
}
