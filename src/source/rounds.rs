#![forbid(unsafe_code)]
//! The rounds of the source: decide, harvest, scan, push.

use std::time::{Duration, Instant};

use crate::error::Failure;
use crate::memory::Ram;
use crate::precopy::{AtLimit, Decision, Estimate, Why};
use crate::scanner::{Chunk, Which, chunks};
use crate::session::source::SourceEvent;
use crate::source::Guest;
use crate::source::driver::{Driver, run_pages_max};
use crate::source::ends::Over;
use crate::source::lanes::EPOCH_ITEMS_MAX;
use crate::source::pace::Pace;
use crate::units::{Item, PageSize, Round, Run};

/// Runs that are handed to a ring at once: a batch of single 4 KiB pages.
const PUSH_RUNS_MAX: usize = 256;

impl Driver<'_> {
    /// Rounds while the guest runs, until it is time to switch over. What is dirty has been counted.
    pub fn precopy(&mut self, guest: &mut dyn Guest) -> Result<(), Over> {
        let cap = self.settings.bandwidth_max;
        self.pace = (cap > 0).then(|| Pace::new(cap, Instant::now()));
        loop {
            let begun = Instant::now();
            let defer_bytes = self.policy.defer_budget_bytes(&self.estimate(0));
            self.in_round = true;
            self.ship_round(self.which, defer_bytes, self.settings.batch_bytes as u64)?;
            self.in_round = false;
            // There is another one in any case, be it that of the pause: what the target is to be told of this one need not
            // wait for that, when the guest stands still.
            self.round_begins()?;
            self.sample_rate();
            let dirty_bytes = self.dirty_bytes()?;
            self.dirty_rate = (dirty_bytes as f64 / begun.elapsed().as_secs_f64().max(1e-3)) as u64;
            if self.decide(guest, dirty_bytes)? == Decision::SwitchOver {
                return Ok(());
            }
            self.shrink_queues();
        }
    }

    /// Another round, or the switchover; waits meanwhile where that is what the policy says.
    fn decide(&mut self, guest: &mut dyn Guest, mut dirty_bytes: u64) -> Result<Decision, Over> {
        let mut fresh = true;
        loop {
            let now = self.estimate(dirty_bytes);
            self.show(&now);
            let verdict = self.policy.decide(&now);
            self.set_throttle(guest, verdict.throttle);
            // What lost channels hold is not known before they are retired; without any, the rest could not be sent.
            let ready = !self.session.awaits_retired() && self.session.live_channels() > 0 && self.all_is_told();
            let decision = match verdict.decision {
                Decision::SwitchOver if !ready => Decision::Wait,
                other => other,
            };
            self.draining = decision == Decision::Wait;
            match decision {
                Decision::Wait => {
                    // The target is asked how far it is: what is on its way to it counts.
                    self.ask_soon();
                    self.service(true)?;
                    self.sample_rate();
                    fresh = false;
                }
                // Counted anew only when the answer matters: a count can cost a scan of all page tables.
                _ if !fresh => {
                    dirty_bytes = self.dirty_bytes()?;
                    fresh = true;
                }
                Decision::GiveUp(why) => return self.give_up(&now, why),
                Decision::AnotherRound => return self.another_round(&now),
                // It fits, as far as is known: a hand-over crosses the link four times, and that has not been measured.
                Decision::SwitchOver if !self.gauge.knows_the_way() && self.policy.forced().is_none() => {
                    self.measure_the_way()?;
                    fresh = false;
                }
                Decision::SwitchOver => {
                    self.expected = now.downtime();
                    return Ok(Decision::SwitchOver);
                }
            }
        }
    }

    /// Where what a hand-over costs beside the bytes stands in the way more than they do, that is measured again first:
    /// else rounds of next to nothing would follow each other as fast as they can be counted.
    fn another_round(&mut self, now: &Estimate) -> Result<Decision, Over> {
        let expected = now.downtime().unwrap_or(Duration::MAX);
        if now.fixed_cost * 2 > expected {
            self.measure_the_way()?;
        }
        Ok(Decision::AnotherRound)
    }

    /// Waits for the answer to a Ping.
    fn measure_the_way(&mut self) -> Result<(), Over> {
        self.ask_now()?;
        let asked = Instant::now();
        while self.gauge.awaits_pong() {
            self.service(true)?;
            // A target may be heard all the time and never say what it was asked for.
            if asked.elapsed() > self.settings.timeouts.silence {
                let ms = asked.elapsed().as_millis() as u64;
                let why = Failure::Silent { waiting_for: "the answer to a Ping", ms };
                return if self.session.resumes() { self.control_lost(why) } else { self.fail(why) };
            }
        }
        Ok(())
    }

    /// A round of a large guest takes long: where the guest is to be left alone when time is up, the round is not waited
    /// for.
    pub fn check_precopy_time(&mut self) -> Result<(), Over> {
        let limits = &self.settings.limits;
        let late = limits.precopy_time_max.is_some_and(|time| self.armed_at.elapsed() > time);
        if late && limits.at_limit == AtLimit::GiveUp && self.in_round {
            let dirty_bytes = self.dirty_bytes()?;
            self.give_up(&self.estimate(dirty_bytes), Why::Time)?;
        }
        Ok(())
    }

    fn give_up(&mut self, now: &Estimate, why: Why) -> Result<Decision, Over> {
        self.fail(Failure::NotConverging {
            why,
            rounds: now.rounds,
            bytes_left: now.left_bytes(),
            rate: now.rate,
            dirty_rate: now.dirty_rate,
            throttle: self.policy.summary().highest,
            fixed_cost: now.fixed_cost,
        })?;
        Ok(Decision::GiveUp(why))
    }

    /// Slows the guest down, or lets it go. A VMM that cannot is not asked again.
    pub fn set_throttle(&mut self, guest: &mut dyn Guest, percent: u8) {
        if percent == self.throttle {
            return;
        }
        let answer = guest.throttle(percent);
        self.excuse_silence();
        match answer {
            Ok(()) => self.throttle = percent,
            Err(e) => self.remark(format!("the guest could not be throttled by {percent} %: {e}")),
        }
        self.policy.throttled(self.throttle == percent);
        self.progress.set(|c| &c.throttle, self.throttle.into());
    }

    /// What waits in rings when the guest is paused keeps it waiting: no more of it than fits half of the downtime limit.
    fn shrink_queues(&mut self) {
        let settings = &self.settings;
        let budget = self.gauge.bytes_in(settings.limits.downtime_limit) / 2 / u64::from(settings.channels.max(1));
        // A worker needs a batch in its hand and another one in its ring.
        let bytes = budget.clamp(2 * settings.batch_bytes as u64, settings.queue_bytes);
        if let Some(lanes) = &mut self.lanes {
            lanes.set_queue_bytes(bytes);
        }
    }

    /// Counts what is dirty.
    pub fn dirty_bytes(&mut self) -> Result<u64, Over> {
        let begun = Instant::now();
        let counted = self.dirty.begin_round();
        self.gauge.counted(begun.elapsed());
        match counted {
            Ok(pages) => Ok(bytes_at_most(&self.ram, pages)),
            Err(e) => self.fail(Failure::Dirty(e.to_string())).map(|()| 0),
        }
    }

    /// Updates what others see, now and then.
    pub fn measure(&self) {
        // While a chunk is pushed the scanner is elsewhere: what was seen last stays.
        if let Some(scanner) = &self.scanner {
            self.progress.set(|c| &c.untouched_bytes, scanner.untouched_bytes());
        }
        self.progress.set(|c| &c.rounds, u64::from(self.session.round().0));
    }

    /// One round: harvests RAM chunk by chunk and pushes what is dirty in batches of so many bytes, then the end mark.
    /// Workers send one chunk while the next is harvested. A round that was interrupted by the loss of all connections
    /// goes on with the chunk behind the last one.
    pub fn ship_round(&mut self, which: Which, defer_bytes: u64, batch_bytes: u64) -> Result<(), Over> {
        self.take_back();
        self.losses.returned_bytes = 0;
        if let Some(scanner) = &mut self.scanner {
            scanner.begin_round(defer_bytes);
        }
        self.filling = true;
        let pushed = self.push_round(which, batch_bytes);
        self.filling = false;
        if pushed.is_ok() {
            self.chunks_done = 0;
            self.which = Which::Dirty;
        }
        self.take_back();
        pushed
    }

    /// Where hashes are kept, no page of a round is looked at before all of the last one have been: of two notes the later
    /// one counts. Elsewhere rounds overlap, and the link is not kept waiting.
    fn finish_last_round(&mut self) -> Result<(), Over> {
        let last = self.session.round().0.checked_sub(1).filter(|_| self.records.contents.is_some());
        let Some(last) = last else { return Ok(()) };
        while !self.breaks_off() && !self.lanes.as_ref().is_some_and(|lanes| lanes.all_sent(Round(last))) {
            self.carry()?;
            self.wake_at = self.break_off_at;
            self.service(true)?;
        }
        Ok(())
    }

    fn push_round(&mut self, which: Which, batch_bytes: u64) -> Result<(), Over> {
        self.finish_last_round()?;
        self.round_begins()?;
        let ram = self.ram.clone();
        let mut batch = Vec::with_capacity(PUSH_RUNS_MAX);
        let (mut harvest_time, pushed_before) = (Duration::ZERO, self.pushed_bytes);
        for chunk in chunks(&ram).skip(self.chunks_done) {
            // What has not been harvested stays dirty where it is.
            if self.breaks_off() {
                break;
            }
            // Whatever comes of it: what of it is not pushed is kept back.
            self.chunks_done += 1;
            harvest_time += self.ship_chunk(chunk, which, batch_bytes, &mut batch)?;
            // Frames and ended workers are looked after between chunks even if no ring is ever full.
            self.service(false)?;
        }
        if which == Which::Dirty {
            self.gauge.round_harvested(self.pushed_bytes - pushed_before, harvest_time);
        }
        // The mark is an item of the journal like any other.
        self.epoch_items += 1;
        if self.epoch_items >= EPOCH_ITEMS_MAX && self.settings.framing.mends() {
            self.close_epoch()?;
        }
        self.room_for_marks()?;
        if self.session.round() >= Round::MAX {
            return self.fail(Failure::Worker("more rounds than a migration can have".to_owned()));
        }
        self.event(SourceEvent::RoundPushed)
    }

    /// Harvests a chunk and pushes it; how long the harvest took.
    fn ship_chunk(
        &mut self,
        chunk: Chunk,
        which: Which,
        batch_bytes: u64,
        batch: &mut Vec<Item>,
    ) -> Result<Duration, Over> {
        let ram = self.ram.clone();
        let Some(block) = ram.block(chunk.block) else { return Ok(Duration::ZERO) };
        let page_bytes = block.page_size().bytes();
        let pages_max = run_pages_max(batch_bytes, page_bytes);
        // Taken out for the time of the chunk: the runs borrow it while batches are pushed.
        let Some(mut scanner) = self.scanner.take() else { return Ok(Duration::ZERO) };
        let begun = Instant::now();
        if let Some(e) = scanner.harvest(&ram, self.dirty, chunk, which) {
            self.remark(format!("a harvest failed, and its pages count as dirty: {e}"));
        }
        let harvest_time = begun.elapsed();
        let mut bytes = 0;
        let mut result = Ok(true);
        let touched = scanner.runs(chunk).flat_map(|run| run.pieces(pages_max)).map(Item::Run);
        let untouched = scanner.untouched_runs(chunk).flat_map(|run| run.pieces(pages_max)).map(Item::Untouched);
        let mut items = touched.chain(untouched);
        for item in items.by_ref() {
            batch.push(item);
            bytes += item.run().map_or(0, |run| u64::from(run.pages)) * page_bytes;
            if batch.len() == PUSH_RUNS_MAX || bytes >= batch_bytes {
                result = self.push(batch, &mut bytes);
                if !matches!(result, Ok(true)) {
                    break;
                }
            }
        }
        if matches!(result, Ok(true)) && !batch.is_empty() {
            result = self.push(batch, &mut bytes);
        }
        // Harvested and not pushed: kept back for the next round. Allocates, where nothing is in a hurry any more.
        let broken_off = !matches!(result, Ok(true));
        let rest = batch.drain(..).chain(items).filter_map(Item::run).take_while(|_| broken_off);
        let rest: Vec<Run> = rest.collect();
        scanner.keep_back(&rest);
        self.scanner = Some(scanner);
        result.map(|_| harvest_time)
    }

    /// Whether the guest has stood still for too long, and this attempt to hand it over is withdrawn for that.
    pub fn breaks_off(&mut self) -> bool {
        self.broken_off |= self.break_off_at.is_some_and(|at| Instant::now() >= at);
        self.broken_off
    }

    /// Pushes a batch to the ring with the fewest queued bytes; waits for room, and for the cap on bandwidth, and looks
    /// after the rest meanwhile. False, and nothing is pushed, if the attempt is broken off.
    fn push(&mut self, batch: &mut Vec<Item>, bytes: &mut u64) -> Result<bool, Over> {
        let items = batch.len() as u64;
        let full = self.epoch_bytes + *bytes > self.settings.epoch_bytes || self.epoch_items + items > EPOCH_ITEMS_MAX;
        // Where the target does not say what has landed, there is nothing to wait for.
        if full && self.epoch_items > 0 && self.settings.framing.mends() {
            self.close_epoch()?;
        }
        while let Some(pace) = &mut self.pace {
            let Some(until) = pace.waits_until(self.progress.channels().zero_bytes, Instant::now()) else { break };
            self.wake_at = Some(until);
            self.service(true)?;
        }
        while !self.lanes.as_mut().is_some_and(|lanes| lanes.push(batch, *bytes)) {
            if self.breaks_off() {
                return Ok(false);
            }
            self.wake_at = self.break_off_at;
            self.service(true)?;
        }
        if let Some(pace) = &mut self.pace {
            pace.pushed(*bytes, Instant::now());
        }
        self.epoch_bytes += *bytes;
        self.epoch_items += items;
        self.pushed_bytes += *bytes;
        self.progress.set(|c| &c.pushed_bytes, self.pushed_bytes);
        batch.clear();
        *bytes = 0;
        Ok(true)
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
}

/// Bytes of so many pages at the most. Sources count pages of all blocks together: where sizes differ, the largest are
/// taken to be dirty first, so that the estimate is too high rather than too low. It is never more than all of RAM.
fn bytes_at_most(ram: &Ram, pages: u64) -> u64 {
    let (mut left, mut bytes) = (pages, 0);
    for size in (12..=16).rev().filter_map(|shift| PageSize::new(1 << shift)) {
        let there: u64 = ram.blocks().iter().filter(|b| b.page_size() == size).map(|b| b.pages()).sum();
        let dirty = left.min(there);
        left -= dirty;
        bytes += dirty * size.bytes();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, RamBlock};

    #[test]
    fn a_small_block_of_large_pages_does_not_make_all_that_is_dirty_seem_large() {
        let block = |name, address, pages, size: PageSize| {
            RamBlock::anonymous(name, address, pages * size.bytes(), size, Backing::Base).unwrap()
        };
        let small = block("small", 0, 1000, PageSize::SIZE_4K);
        let large = block("large", 1 << 40, 2, PageSize::SIZE_64K);
        let ram = Ram::new([small, large]).unwrap();
        let of = |pages| bytes_at_most(&ram, pages);
        assert_eq!([of(0), of(1), of(2), of(102)], [0, 65536, 131_072, 131_072 + 409_600]);
        assert_eq!([of(1002), of(5000), of(u64::MAX)], [ram.bytes(); 3], "a source may count too many");
    }
}
