//! The demo guest's vCPUs: threads that keep dirtying its RAM, at a rate.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use pageferry::sync::{AtomicBool, AtomicU64, Ordering};
use pageferry::units::BlockId;
use pageferry::{DirtyBitmap, Ram};

use crate::state::{Written, mix, write_line};

/// How long a writer rests between slices of its work.
const REST: Duration = Duration::from_millis(1);
/// Pages that a writer writes before it looks at the clock, and whether it is to stop.
const SLICE_PAGES: u64 = 64;
/// How far behind a writer may fall before it gives up the difference, in parts of a second: a machine that is too slow
/// gets no flood when it is fast again.
const DEBT_PARTS: u64 = 10;

/// What the writers go by.
pub struct Work {
    pub ram: Ram,
    pub seed: u64,
    pub writers: usize,
    /// Pages a second, all writers together; 0 for none.
    pub pages_per_second: u64,
    /// Where they write. Each writer has stretches of its own, so that its last write stays where it is.
    pub touched: Vec<Range<u64>>,
    /// Whom they tell, where the kernel tells nobody.
    pub marks: Option<DirtyBitmap>,
}

/// Some threads, which can be stopped and started.
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    started: Option<Instant>,
    ran: Duration,
}

struct Shared {
    work: Work,
    /// Relaxed: all it says is that it is time to go. What was written is published by the join.
    stop: AtomicBool,
    /// Percent of the time that writers rest. Relaxed: a writer that learns of it a little later writes a little more.
    throttle: AtomicU64,
    /// Each is written by its writer alone.
    done: Vec<CachePadded<Done>>,
}

#[derive(Default)]
struct Done {
    count: AtomicU64,
    page: AtomicU64,
}

impl Writers {
    pub fn new(mut work: Work) -> Writers {
        // No writer without a stretch of its own.
        work.writers = if work.pages_per_second == 0 { 0 } else { work.writers.min(work.touched.len()) };
        let done = (0..work.writers).map(|_| CachePadded::default()).collect();
        let shared = Arc::new(Shared { work, stop: AtomicBool::new(false), throttle: AtomicU64::new(0), done });
        Writers { shared, threads: Vec::new(), started: None, ran: Duration::ZERO }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.shared.work.writers
    }

    /// Lets them write on from where they stopped. Those that run are left alone.
    pub fn start(&mut self) -> io::Result<()> {
        if !self.threads.is_empty() {
            return Ok(());
        }
        self.shared.stop.store(false, Ordering::Relaxed);
        self.started = Some(Instant::now());
        for writer in 0..self.len() {
            let shared = self.shared.clone();
            let name = format!("vcpu-{writer}");
            self.threads.push(thread::Builder::new().name(name).spawn(move || shared.write(writer))?);
        }
        Ok(())
    }

    /// Stops them. When it returns, nobody writes, and everything that was written can be seen.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in &self.threads {
            thread.thread().unpark();
        }
        for thread in self.threads.drain(..) {
            // A writer that panicked has said so on standard error, and writes no more.
            let _ = thread.join();
        }
        self.ran += self.started.take().map_or(Duration::ZERO, |at| at.elapsed());
    }

    /// Lets them write so many percent less.
    pub fn throttle(&self, percent: u8) {
        self.shared.throttle.store(percent.into(), Ordering::Relaxed);
    }

    /// What each has done.
    pub fn written(&self) -> Vec<Written> {
        let read = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        self.shared.done.iter().map(|done| Written { count: read(&done.count), page: read(&done.page) }).collect()
    }

    /// Pages written, by all.
    pub fn pages_written(&self) -> u64 {
        self.written().iter().map(|w| w.count).sum()
    }

    /// For how long they have run.
    pub fn ran(&self) -> Duration {
        self.ran + self.started.map_or(Duration::ZERO, |at| at.elapsed())
    }

    /// Waits until they have written something more. False if they do not.
    pub fn go_on(&self, patience: Duration) -> bool {
        let (before, until) = (self.pages_written(), Instant::now() + patience);
        while self.pages_written() == before {
            if Instant::now() >= until || self.threads.is_empty() {
                return false;
            }
            thread::park_timeout(REST);
        }
        true
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn write(&self, writer: usize) {
        let Work { ram, seed, writers, pages_per_second, touched, marks } = &self.work;
        let Some(block) = ram.block(BlockId(0)) else { return };
        let own: Vec<_> = touched.iter().skip(writer).step_by(*writers).collect();
        let cell = &self.done[writer];
        let mut count = cell.count.load(Ordering::Relaxed);
        let rate = (pages_per_second / *writers as u64).max(1);
        // Counted from here: what was not written while it was stopped is not made up for.
        let (mut counted, mut due) = (Instant::now(), 0.0);
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let share = (100 - self.throttle.load(Ordering::Relaxed).min(100)) as f64 / 100.0;
            due += (now - counted).as_secs_f64() * rate as f64 * share;
            counted = now;
            if due < 1.0 {
                thread::park_timeout(REST);
                continue;
            }
            due = due.min(rate.div_ceil(DEBT_PARTS) as f64);
            let slice = (due as u64).clamp(1, SLICE_PAGES);
            for _ in 0..slice {
                count += 1;
                let dice = mix(seed ^ mix((writer as u64) << 48 ^ count));
                let stretch = own[(dice % own.len() as u64) as usize];
                let page = stretch.start + (dice >> 32) % (stretch.end - stretch.start);
                write_line(block, writer, count, page);
                if let Some(marks) = marks {
                    // After the write: that is the contract.
                    marks.mark(BlockId(0), page);
                }
                cell.page.store(page, Ordering::Relaxed);
                cell.count.store(count, Ordering::Relaxed);
            }
            due -= slice as f64;
        }
    }
}
