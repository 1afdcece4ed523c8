//! Several dirty sources as one, and the source for memory that lies still.
#![forbid(unsafe_code)]

use super::bitmap::DirtyBitmap;
use super::runs::set_range;
use super::{DirtyError, DirtySource};
use crate::memory::Ram;
use crate::units::BlockId;

/// Several sources of the same RAM, OR-ed: what KVM and a device both marked is sent once.
///
/// ```
/// use pageferry::dirty::{DirtySource, bitmap::DirtyBitmap, combined::Combined};
/// use pageferry::memory::{Backing, Ram, RamBlock};
/// use pageferry::units::{BlockId, PageSize};
///
/// let ram = Ram::new([RamBlock::anonymous("ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?])?;
/// let (vcpus, disk) = (DirtyBitmap::for_ram(&ram), DirtyBitmap::for_ram(&ram));
/// let mut both = Combined::new(vec![Box::new(vcpus.clone()), Box::new(disk.clone())]);
/// both.arm(&ram)?;
/// vcpus.mark(BlockId(0), 1);
/// disk.mark_range(BlockId(0), 1, 2);
/// let mut words = [0];
/// both.harvest(BlockId(0), 0, &mut words)?;
/// assert_eq!(words, [0b110]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Combined<'a> {
    sources: Vec<Box<dyn DirtySource + 'a>>,
    ram: Option<Ram>,
}

impl<'a> Combined<'a> {
    /// The union of these sources. With none it reports nothing, and cannot take anything back: see [`Still`].
    pub fn new(sources: Vec<Box<dyn DirtySource + 'a>>) -> Self {
        Combined { sources, ram: None }
    }
}

impl std::fmt::Debug for Combined<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let armed = self.ram.is_some();
        f.debug_struct("Combined").field("sources", &self.sources.len()).field("armed", &armed).finish()
    }
}

impl DirtySource for Combined<'_> {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.disarm();
        for source in &mut self.sources {
            if let Err(e) = source.arm(ram) {
                // Those that were armed are disarmed with those that were not: disarming these is harmless.
                self.disarm();
                return Err(e);
            }
        }
        self.ram = Some(ram.clone());
        Ok(())
    }

    /// The sum, which counts pages twice that two sources report; never more than there are pages.
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        let pages = self.ram.as_ref().ok_or(DirtyError::NotArmed)?.pages();
        // Every source is asked even after one has failed: a kernel log is fetched here, and each has its own.
        let counts: Vec<_> = self.sources.iter_mut().map(DirtySource::begin_round).collect();
        let mut sum = 0u64;
        for count in counts {
            sum = sum.saturating_add(count?);
        }
        Ok(sum.min(pages))
    }

    /// If one source fails the whole range is dirty: `words` says so, and the first error is returned.
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        let ram = self.ram.as_ref().ok_or(DirtyError::NotArmed)?;
        let mut first_error = None;
        for source in &mut self.sources {
            // The others are harvested all the same: what they hold for this range is shipped with it.
            if let Err(e) = source.harvest(block, first_page, words) {
                first_error.get_or_insert(e);
            }
        }
        let Some(e) = first_error else { return Ok(()) };
        let pages = ram.block(block).map_or(0, |block| block.pages());
        set_range(words, 0, pages.saturating_sub(first_page));
        Err(e)
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        // To all: the caller may read any of them afterwards, and one that is disarmed forgets. A page that two report is
        // shipped once. One that takes them is enough for none to be lost.
        let (mut taken, mut first_error) = (false, DirtyError::NotArmed);
        for (tried, source) in self.sources.iter_mut().enumerate() {
            match source.give_back(block, first_page, words) {
                Ok(()) => taken = true,
                Err(e) if tried == 0 => first_error = e,
                Err(_) => {}
            }
        }
        if taken { Ok(()) } else { Err(first_error) }
    }

    fn disarm(&mut self) {
        self.ram = None;
        self.sources.iter_mut().for_each(DirtySource::disarm);
    }
}

/// A source for memory that nobody writes to: a stopped VM, a snapshot file. Reports only what was given back.
///
/// Not for a running guest: every write to it would be lost.
///
/// ```
/// use pageferry::dirty::{DirtySource, combined::Still};
/// use pageferry::memory::{Backing, Ram, RamBlock};
/// use pageferry::units::{BlockId, PageSize};
///
/// let ram = Ram::new([RamBlock::anonymous("ram", 0, 1 << 20, PageSize::SIZE_4K, Backing::Base)?])?;
/// let mut still = Still::new();
/// still.arm(&ram)?;
/// assert_eq!(still.begin_round()?, 0);
/// still.give_back(BlockId(0), 0, &[0b1000])?;
/// assert_eq!(still.begin_round()?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Still {
    given_back: Option<DirtyBitmap>,
}

impl Still {
    /// A source that reports nothing by itself.
    pub fn new() -> Self {
        Still::default()
    }
}

impl DirtySource for Still {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.given_back = Some(DirtyBitmap::for_ram(ram));
        Ok(())
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        self.given_back.as_mut().ok_or(DirtyError::NotArmed)?.begin_round()
    }

    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.given_back.as_mut().ok_or(DirtyError::NotArmed)?.harvest(block, first_page, words)
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.given_back.as_mut().ok_or(DirtyError::NotArmed)?.give_back(block, first_page, words)
    }

    fn disarm(&mut self) {
        self.given_back = None;
    }
}
