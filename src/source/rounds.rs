#![forbid(unsafe_code)]
//! The rounds of the source: harvest, scan, push; decide; and, with the guest paused, the rest of it.

use std::time::{Duration, Instant};

use crate::crew::Alarm;
use crate::error::Failure;
use crate::memory::full;
use crate::precopy::{Decision, Estimate, Precopy};
use crate::scanner::{Chunk, Which, chunks};
use crate::session::source::{Facts, SourceEvent};
use crate::source::driver::{Driver, Over, run_pages_max};
use crate::source::lanes::EPOCH_ITEMS_MAX;
use crate::source::{Guest, StateWriter};
use crate::units::{Item, Round, Verify};

/// Runs that are handed to a ring at once: a batch of single 4 KiB pages.
const PUSH_RUNS_MAX: usize = 256;

/// What a switchover costs even if nothing is left: pause, Final, Loaded, Commit, Running. Measured at 0.3 ms over
/// loopback; allowed for generously, as the VMM's own hooks are in it.
const FIXED_COST: Duration = Duration::from_millis(1);

impl Driver<'_> {
    /// Rounds while the guest runs, until it is time to switch over.
    pub fn precopy(&mut self) -> Result<(), Over> {
        let mut which = Which::All;
        let started = Instant::now();
        let mut begun = started;
        // The throttle is not passed on: `Limits::throttle_max` is 0.
        let mut policy = Precopy::new(self.settings.limits);
        loop {
            let mut sample = self.sample();
            self.ship_round(which)?;
            which = Which::Dirty;
            self.take_sample(&mut sample);
            let mut dirty_bytes = self.dirty_bytes()?;
            let dirty_rate = (dirty_bytes as f64 / begun.elapsed().as_secs_f64().max(1e-3)) as u64;
            loop {
                let now = Estimate { elapsed: started.elapsed(), dirty_rate, ..self.estimate(dirty_bytes) };
                self.show(&now);
                match policy.decide(&now).decision {
                    Decision::SwitchOver => return Ok(()),
                    // An entry of the digest table has 16 bits for the round; the paused rounds need some of them.
                    Decision::AnotherRound if now.rounds < Round::MAX.0 - 4 => break,
                    Decision::AnotherRound | Decision::GiveUp(_) => {
                        let bytes_left = now.left_bytes();
                        let Estimate { rounds, rate, .. } = now;
                        return self.fail(Failure::NotConverging { rounds, bytes_left, rate });
                    }
                    Decision::Wait => {
                        self.service(true)?;
                        self.take_sample(&mut sample);
                        // Counted anew only when the answer could matter: a count can cost a scan of all page tables.
                        let now = Estimate { elapsed: started.elapsed(), ..self.estimate(dirty_bytes) };
                        if policy.clone().decide(&now).decision != Decision::Wait {
                            dirty_bytes = self.dirty_bytes()?;
                        }
                    }
                }
            }
            begun = Instant::now();
        }
    }

    fn estimate(&self, dirty_bytes: u64) -> Estimate {
        Estimate {
            rounds: self.session.round().0,
            queued_bytes: self.queued_bytes(),
            dirty_bytes,
            rate: self.rate.bytes_per_second(),
            fixed_cost: FIXED_COST,
            ..Estimate::default()
        }
    }

    /// Bytes sent, and the time the channels were busy with it, all together. A link that is idle says nothing of its
    /// rate: a guest that dirties little would seem to have a slow one.
    fn sample(&self) -> (u64, u64) {
        let counts = self.progress.channels();
        (counts.wire_bytes, counts.busy_ns)
    }

    fn take_sample(&mut self, since: &mut (u64, u64)) {
        let now = self.sample();
        let busy = Duration::from_nanos(now.1.saturating_sub(since.1) / u64::from(self.settings.channels.max(1)));
        self.rate.add(now.0.saturating_sub(since.0), busy);
        *since = now;
    }

    fn show(&self, now: &Estimate) {
        self.progress.set(|c| &c.rate, now.rate);
        self.progress.set(|c| &c.bytes_left, now.left_bytes());
        self.progress.set(|c| &c.dirty_rate, now.dirty_rate);
        let expected = now.downtime().map_or(u64::MAX, |d| d.as_micros() as u64);
        self.progress.set(|c| &c.expected_downtime_us, expected);
    }

    fn dirty_bytes(&mut self) -> Result<u64, Over> {
        // Sources count pages of all blocks together: where sizes differ, the estimate is too high rather than too low.
        let page_bytes = self.ram.blocks().iter().map(|b| b.page_size().bytes()).max().unwrap_or(0);
        match self.dirty.begin_round() {
            Ok(pages) => Ok(pages * page_bytes),
            Err(e) => self.fail(Failure::Dirty(e.to_string())).map(|()| 0),
        }
    }

    fn queued_bytes(&self) -> u64 {
        self.lanes.as_ref().map_or(0, |lanes| lanes.queued_bytes())
    }

    /// Updates what others see, now and then.
    pub fn measure(&self) {
        // While a chunk is pushed the scanner is elsewhere: what was seen last stays.
        if let Some(scanner) = &self.scanner {
            self.progress.set(|c| &c.untouched_bytes, scanner.untouched_bytes());
        }
        self.progress.set(|c| &c.rounds, u64::from(self.session.round().0));
    }

    /// One round: harvests RAM chunk by chunk and pushes what is dirty, then the end mark.
    fn ship_round(&mut self, which: Which) -> Result<(), Over> {
        let ram = self.ram.clone();
        let mut batch = Vec::with_capacity(PUSH_RUNS_MAX);
        for chunk in chunks(&ram) {
            self.ship_chunk(chunk, which, &mut batch)?;
            // Frames and ended workers are looked after between chunks even if no ring is ever full.
            self.service(false)?;
        }
        // The mark is an item of the journal like any other.
        self.epoch_items += 1;
        if self.epoch_items >= EPOCH_ITEMS_MAX {
            self.close_epoch()?;
        }
        self.room_for_marks()?;
        self.event(SourceEvent::RoundPushed)
    }

    fn ship_chunk(&mut self, chunk: Chunk, which: Which, batch: &mut Vec<Item>) -> Result<(), Over> {
        let ram = self.ram.clone();
        let Some(block) = ram.block(chunk.block) else { return Ok(()) };
        let page_bytes = block.page_size().bytes();
        let pages_max = run_pages_max(&self.settings, page_bytes);
        // Taken out for the time of the chunk: the runs borrow it while batches are pushed.
        let Some(mut scanner) = self.scanner.take() else { return Ok(()) };
        if let Some(e) = scanner.harvest(&ram, self.dirty, chunk, which) {
            self.remark(format!("a harvest failed, and its pages count as dirty: {e}"));
        }
        let mut bytes = 0;
        let mut result = Ok(());
        for run in scanner.runs(chunk).flat_map(|run| run.pieces(pages_max)) {
            batch.push(Item::Run(run));
            bytes += u64::from(run.pages) * page_bytes;
            if batch.len() == PUSH_RUNS_MAX || bytes >= self.settings.batch_bytes as u64 {
                result = self.push(batch, &mut bytes);
                if result.is_err() {
                    break;
                }
            }
        }
        self.scanner = Some(scanner);
        result?;
        if batch.is_empty() { Ok(()) } else { self.push(batch, &mut bytes) }
    }

    /// Pushes a batch to the ring with the fewest queued bytes; waits for room, and looks after the rest meanwhile.
    fn push(&mut self, batch: &mut Vec<Item>, bytes: &mut u64) -> Result<(), Over> {
        let items = batch.len() as u64;
        let full = self.epoch_bytes + *bytes > self.settings.epoch_bytes || self.epoch_items + items > EPOCH_ITEMS_MAX;
        if full && self.epoch_items > 0 {
            self.close_epoch()?;
        }
        while !self.lanes.as_mut().is_some_and(|lanes| lanes.push(batch, *bytes)) {
            self.service(true)?;
        }
        self.epoch_bytes += *bytes;
        self.epoch_items += items;
        self.pushed_bytes += *bytes;
        self.progress.set(|c| &c.pushed_bytes, self.pushed_bytes);
        batch.clear();
        *bytes = 0;
        Ok(())
    }

    fn close_epoch(&mut self) -> Result<(), Over> {
        while !self.session.may_close_epoch() {
            self.service(true)?;
        }
        self.room_for_marks()?;
        self.epoch_bytes = 0;
        self.epoch_items = 0;
        self.event(SourceEvent::EpochDue)
    }

    fn room_for_marks(&mut self) -> Result<(), Over> {
        while !self.lanes.as_mut().is_some_and(|lanes| lanes.has_room_for_mark()) {
            self.service(true)?;
        }
        Ok(())
    }

    /// With the guest paused: ships what is dirty over all channels while the VMM saves its state, and once more when it
    /// has; then waits until every ring and every hand is empty.
    pub fn ship_the_rest(&mut self, guest: &mut dyn Guest) -> Result<(), Over> {
        let mut writer = StateWriter::new(self.state.clone(), self.bell.ringer());
        let (shipped, saved) = self.beside("scan", Driver::ship_paused_round, move || guest.save_state(&mut writer));
        shipped?;
        if let Err(e) = saved {
            return self.fail(Failure::Hook { hook: "save_state", reason: e.to_string() });
        }
        // save_state may have written guest RAM.
        self.ship_paused_round()?;
        let last = Round(self.session.round().0 - 1);
        while !self.lanes.as_ref().is_some_and(|lanes| lanes.all_sent(last)) || !self.state.is_empty() {
            self.service(true)?;
        }
        Ok(())
    }

    fn ship_paused_round(&mut self) -> Result<(), Over> {
        self.dirty_bytes()?;
        self.ship_round(Which::Dirty)
    }

    /// What Final says: taken when every ring and every hand is empty.
    pub fn facts(&mut self) -> Result<Facts, Over> {
        let mut facts =
            Facts { state_bytes: self.state_bytes, state_crc: self.state_crc.finish(), ..Facts::default() };
        if let Some(table) = &self.digests {
            facts.block_digests = self.ram.iter().map(|(id, _)| table.block_digest(id)).collect();
        }
        if self.settings.verify == Verify::Full {
            facts.full_digests = self.full_digests()?;
        }
        Ok(facts)
    }

    /// Hashes all of RAM on other threads, and looks after the rest meanwhile.
    fn full_digests(&mut self) -> Result<Vec<u64>, Over> {
        let (hashing, ram, ringer) = (full::Hashing::default(), self.ram.clone(), self.bell.ringer());
        std::thread::scope(|scope| {
            hashing.start(scope, &ram, self.id, self.settings.channels.into(), move || Alarm::ring(&ringer));
            loop {
                if let Some(digests) = hashing.take() {
                    return Ok(digests);
                }
                if let Err(over) = self.service(true) {
                    hashing.stop();
                    return Err(over);
                }
            }
        })
    }
}
