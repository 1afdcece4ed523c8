//! A guest that writes: which pages are dirty, and how its writes fall.

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// SplitMix64: the same numbers for the same seed, everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 up to, and without, 1.
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From `low` to `high`, all magnitudes alike.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low * (high / low).powf(self.share())
    }

    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[(self.next() % choices.len() as u64) as usize]
    }
}

/// How writes fall into the pages of a hot set.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Shape {
    /// Any page, each time.
    Uniform,
    /// One page after the other, round and round.
    Sweep,
    /// The n-th most popular page 1/n times as often as the first.
    Zipf,
}

/// Somebody who writes guest RAM.
#[derive(Clone, Debug)]
pub struct Writer {
    pub shape: Shape,
    /// The first byte of its hot set, and the length.
    pub first: u64,
    pub bytes: u64,
    /// Bytes of pages that it touches in a second, running freely.
    pub rate: f64,
    /// A device does not heed the throttle.
    pub is_device: bool,
    /// How long it goes on writing, in time that the guest runs.
    pub left_ns: u64,
    /// Bytes that it is due to touch, and where its sweep stands.
    pub due: f64,
    pub at: u64,
}

impl Writer {
    pub fn new(shape: Shape, bytes: u64, rate: u64) -> Writer {
        Writer { shape, first: 0, bytes, rate: rate as f64, is_device: false, left_ns: u64::MAX, due: 0.0, at: 0 }
    }

    pub fn at(self, first: u64) -> Writer {
        Writer { first, ..self }
    }

    pub fn device(self) -> Writer {
        Writer { is_device: true, ..self }
    }

    pub fn until(self, time: std::time::Duration) -> Writer {
        Writer { left_ns: time.as_nanos() as u64, ..self }
    }

    fn page(&mut self, random: &mut Random) -> u64 {
        let pages = self.bytes / PAGE;
        let page = match self.shape {
            Shape::Uniform => random.next() % pages,
            Shape::Sweep => {
                self.at = (self.at + 1) % pages;
                self.at
            }
            Shape::Zipf => {
                let rank = (pages as f64).powf(random.share()) as u64 - 1;
                // Popular pages are anywhere.
                rank * 0x9E37_79B1 % pages
            }
        };
        self.first / PAGE + page
    }
}

/// The guest, with its dirty bitmap.
#[derive(Debug)]
pub struct Guest {
    pub writers: Vec<Writer>,
    pub throttle: u8,
    pub dirty: Vec<bool>,
    pub dirty_pages: u64,
    /// Pages that were kept back; and how many of them are dirty again.
    pub kept: Vec<bool>,
    pub dirty_kept_pages: u64,
    random: Random,
}

impl Guest {
    pub fn new(ram_bytes: u64, writers: Vec<Writer>, seed: u64) -> Guest {
        let pages = (ram_bytes / PAGE) as usize;
        Guest {
            writers,
            throttle: 0,
            dirty: vec![true; pages],
            dirty_pages: pages as u64,
            kept: vec![false; pages],
            dirty_kept_pages: 0,
            random: Random(seed),
        }
    }

    /// Runs, and writes.
    pub fn run(&mut self, ns: u64) {
        for writer in &mut self.writers {
            let share = if writer.is_device { 1.0 } else { f64::from(100 - self.throttle) / 100.0 };
            writer.due += writer.rate * share * ns.min(writer.left_ns) as f64 / 1e9;
            writer.left_ns = writer.left_ns.saturating_sub(ns);
            while writer.due >= PAGE as f64 {
                writer.due -= PAGE as f64;
                let page = writer.page(&mut self.random) as usize;
                if !self.dirty[page] {
                    self.dirty[page] = true;
                    self.dirty_pages += 1;
                    self.dirty_kept_pages += u64::from(self.kept[page]);
                }
            }
        }
    }

    /// Whether a page is dirty; it is clean then.
    pub fn take(&mut self, page: usize) -> bool {
        let was = std::mem::take(&mut self.dirty[page]);
        self.dirty_pages -= u64::from(was);
        self.dirty_kept_pages -= u64::from(was && self.kept[page]);
        was
    }
}
