//! What is shipped: which pages of what guest, and how the library learns of them.
// UNSAFETY: guest RAM is a pointer and a length; here one memory is shown to the library in two ways.
#![expect(unsafe_code)]
// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use pageferry::memory::{Backing, Initial, Ram, RamBlock, words};
use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyError, DirtySource, Guest, HookError, StateWriter};

#[path = "still.rs"]
pub mod still;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// 8-byte words of a page.
pub const WORDS: u64 = PAGE / 8;

/// What a guest's memory holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Noise in every page.
    Noise,
    /// Zeros that were written, but for one page in sixteen.
    MostlyZero,
    /// Nothing: nobody ever touched it.
    Untouched,
}

impl Content {
    /// The word that stands at this place.
    pub fn word(self, page: u64, word: u64) -> u64 {
        match self {
            Content::Noise => noise(page * WORDS + word),
            Content::MostlyZero if noise(page) % 16 == 0 => noise(page * WORDS + word),
            Content::MostlyZero | Content::Untouched => 0,
        }
    }

    /// Fills all of RAM.
    pub fn fill(self, ram: &Ram) {
        if self == Content::Untouched {
            return;
        }
        for block in ram.blocks() {
            for page in 0..block.pages() {
                words::fill(block, page, |word| self.word(page, word));
            }
        }
    }
}

/// Noise that no page of zeros and no equal neighbours come from.
fn noise(index: u64) -> u64 {
    let x = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 31)
}

/// Which pages travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// All of them, in round 0.
    Full,
    /// In a later round, every so many'th.
    Every(u64),
    /// In a later round, one in ten, wherever it lies.
    RandomTenth,
    /// All of them, in round 0; fifteen in sixteen are zeros.
    MostlyZero,
    /// None: nobody touched any.
    Untouched,
}

impl Kind {
    /// Every kind there is, as the command line has them.
    pub const ALL: [(&str, Kind); 7] = [
        ("full", Kind::Full),
        ("every-2nd", Kind::Every(2)),
        ("every-8th", Kind::Every(8)),
        ("every-64th", Kind::Every(64)),
        ("random-10", Kind::RandomTenth),
        ("mostly-zero", Kind::MostlyZero),
        ("untouched", Kind::Untouched),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Kind::ALL.iter().find(|(_, kind)| *kind == self).map_or("other", |(name, _)| name)
    }

    /// By its name.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn named(name: &str) -> Kind {
        let found = Kind::ALL.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("there is no kind {name:?}: see Kind::ALL")).1
    }

    /// What the guest's memory holds.
    pub fn content(self) -> Content {
        match self {
            Kind::Full | Kind::Every(_) | Kind::RandomTenth => Content::Noise,
            Kind::MostlyZero => Content::MostlyZero,
            Kind::Untouched => Content::Untouched,
        }
    }

    /// Whether its pages are dirty ones of a later round, with clean ones between them.
    pub fn is_scattered(self) -> bool {
        matches!(self, Kind::Every(_) | Kind::RandomTenth)
    }

    /// Whether this page is one of them.
    pub fn holds(self, page: u64) -> bool {
        match self {
            Kind::Every(nth) => page % nth == 0,
            Kind::RandomTenth => noise(page) % 10 == 0,
            Kind::Full | Kind::MostlyZero | Kind::Untouched => true,
        }
    }

    /// Its pages, of so many.
    pub fn pages(self, of: u64) -> Vec<u64> {
        (0..of).filter(|page| self.holds(*page)).collect()
    }
}

/// New memory of so many bytes, not touched.
///
/// Its initial state is [`Initial::Zeroed`], though in a warm run the target's holds the bytes of the run before. That is
/// harmless here and nowhere else: pages that are zero at the source are zero at the target before the run, and all
/// others are overwritten by data. Zeroing it would be counted against the library, and never against the bare loop.
pub fn ram(bytes: u64) -> Ram {
    let block =
        RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).expect("memory for the benchmark");
    Ram::new([block.with_initial(Initial::Zeroed)]).expect("one block is RAM")
}

/// The same memory, passed off as untouched: round 0 finds one page of it (the last, which always counts), so that the
/// pages of a later round can be measured by themselves. The claim is false, which costs a real guest its pages.
pub fn passed_off_as_untouched(ram: &Ram) -> Ram {
    let block = &ram.blocks()[0];
    let all = block.range(0, block.pages()).expect("all of a block is inside it");
    let hole = RamBlock::memfd("hole", 0, block.bytes(), PageSize::SIZE_4K, Backing::Base).expect("address space");
    let file = hole.fd().expect("a memfd has a descriptor");
    // SAFETY: the block's own mapping, which lives as long as `ram`, which the new block keeps alive.
    let view = unsafe { RamBlock::new(block.name(), 0, all.ptr, block.bytes(), block.page_size()) };
    let view = view.expect("as valid as the block it shows").with_keep_alive(ram.clone());
    Ram::new([view.with_shared_file(file, 0).expect("a descriptor")]).expect("one block is RAM")
}

/// When pages become dirty.
#[derive(Clone, Debug)]
pub enum DirtyAt {
    /// In round 0.
    RoundZero,
    /// In the last instant before the guest stands still: when this is set, by [`Pausing`].
    Pause(Arc<AtomicBool>),
}

/// A guest that dirties some pages once, and as a dirty source tells when their round begins.
pub struct Still {
    pages: Vec<u64>,
    words: Vec<u64>,
    at: DirtyAt,
    counted: bool,
    begun: Option<Instant>,
}

impl Still {
    /// A guest of so many pages that dirties these, or none.
    pub fn new(of: u64, pages: Vec<u64>, at: DirtyAt) -> Still {
        Still { pages, words: vec![0; of.div_ceil(64) as usize], at, counted: false, begun: None }
    }

    /// When the round began that this guest is about: round 0 for one that dirties nothing, else the harvest of its pages.
    ///
    /// # Panics
    /// If it never did.
    pub fn begun(&self) -> Instant {
        self.begun.expect("its round began")
    }

    /// The guest writes its pages.
    fn write(&mut self) {
        self.pages.drain(..).for_each(|page| self.words[(page / 64) as usize] |= 1 << (page % 64));
    }
}

impl DirtySource for Still {
    fn arm(&mut self, _: &Ram) -> Result<(), DirtyError> {
        if self.pages.is_empty() {
            self.begun = Some(Instant::now());
        }
        Ok(())
    }

    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        match &self.at {
            DirtyAt::RoundZero if !self.counted => self.write(),
            DirtyAt::Pause(paused) if paused.load(Relaxed) => self.write(),
            _ => {}
        }
        self.counted = true;
        Ok(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    fn harvest(&mut self, _: BlockId, first: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        if self.counted && self.begun.is_none() {
            self.begun = Some(Instant::now());
        }
        // A guest that dirties nothing has no words.
        for (word, held) in words.iter_mut().zip(self.words.iter_mut().skip((first / 64) as usize)) {
            *word |= std::mem::take(held);
        }
        Ok(())
    }

    fn give_back(&mut self, _: BlockId, _: u64, _: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn disarm(&mut self) {}
}

/// A guest without devices that says when it stands still.
pub struct Pausing(pub Arc<AtomicBool>);

impl Guest for Pausing {
    fn pause(&mut self) -> Result<(), HookError> {
        self.0.store(true, Relaxed);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self, _: &mut StateWriter) -> Result<(), HookError> {
        Ok(())
    }
}

/// Spoils one word of each of these pages that holds something, so that [`all_arrived`] proves that the run brought it.
/// What is to be zero stays so: see [`ram`].
pub fn spoil(block: &RamBlock, content: Content, pages: &[u64], at: u64) {
    for &page in pages {
        if content.word(page, at) != 0 {
            words::store(block, page, at, 0);
        }
    }
}

/// Whether each of these pages has, in two places, what the source has there.
pub fn all_arrived(block: &RamBlock, content: Content, pages: &[u64], at: u64) -> bool {
    let same = |page, at| words::load(block, page, at) == Some(content.word(page, at));
    pages.iter().all(|&page| same(page, at) && same(page, WORDS - 1 - at))
}
