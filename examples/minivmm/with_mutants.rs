//! Two mistakes that a dirty source can make, on request: the guest's check has to find both, or it proves nothing.
//!
//! For tests; beside `ferry.rs` the only file that names pageferry.
#![forbid(unsafe_code)]

use clap::ValueEnum;
use pageferry::units::BlockId;
use pageferry::{DirtyError, DirtySource, Ram};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
pub enum Mutant {
    /// Clears the dirty bits of a page after it was read: a write in between is forgotten
    LateClear,
    /// Loses one word of dirty bits in every round but the first
    DropWord,
}

/// A dirty source that makes a mistake.
pub fn spoil(inner: Box<dyn DirtySource>, mutant: Option<Mutant>) -> Box<dyn DirtySource> {
    match mutant {
        None => inner,
        Some(Mutant::DropWord) => Box::new(DropWord { inner, armed: false }),
        Some(Mutant::LateClear) => Box::new(LateClear { inner, shipped: Vec::new(), kept: Vec::new() }),
    }
}

struct DropWord {
    inner: Box<dyn DirtySource>,
    /// A round has begun, and has lost nothing yet.
    armed: bool,
}

impl DirtySource for DropWord {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.armed = false;
        self.inner.arm(ram)
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        self.armed = true;
        self.inner.begin_round()
    }

    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.inner.harvest(block, first_page, words)?;
        // Not in the first block, where the device writes: it is the guest that is to find this one.
        let may = self.armed && block != BlockId(0);
        if let Some(word) = words.iter_mut().rfind(|word| **word != 0).filter(|_| may) {
            *word = 0;
            self.armed = false;
        }
        Ok(())
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.inner.give_back(block, first_page, words)
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }
}

/// What is written to a page between its harvest and the next round is cleared with the bits of the harvest, as if they
/// had been cleared only then.
struct LateClear {
    inner: Box<dyn DirtySource>,
    /// Block by block: what was harvested in this round.
    shipped: Vec<Vec<u64>>,
    /// What else was dirty when it should have been cleared.
    kept: Vec<Vec<u64>>,
}

impl DirtySource for LateClear {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.shipped = ram.blocks().iter().map(|block| vec![0; block.pages().div_ceil(64) as usize]).collect();
        self.kept = self.shipped.clone();
        self.inner.arm(ram)
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        let mut pages = self.inner.begin_round()?;
        for (block, (shipped, kept)) in self.shipped.iter_mut().zip(&mut self.kept).enumerate() {
            let mut dirty = vec![0; shipped.len()];
            self.inner.harvest(BlockId(block as u16), 0, &mut dirty)?;
            for ((shipped, kept), dirty) in shipped.iter_mut().zip(kept).zip(dirty) {
                pages -= u64::from((dirty & *shipped).count_ones()).min(pages);
                *kept |= dirty & !*shipped;
                *shipped = 0;
            }
        }
        Ok(pages)
    }

    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.inner.harvest(block, first_page, words)?;
        let (index, first) = (usize::from(block.0), first_page as usize / 64);
        for (offset, word) in words.iter_mut().enumerate() {
            *word |= std::mem::take(&mut self.kept[index][first + offset]);
            self.shipped[index][first + offset] |= *word;
        }
        Ok(())
    }

    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.inner.give_back(block, first_page, words)
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }
}
