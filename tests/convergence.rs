//! A guest that keeps writing: rounds end, the last one is quick, limits hold, and an attempt that takes too long is
//! tried again.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::error::Why;
use pageferry::precopy::{AtLimit, Overrun};
use pageferry::progress::Progress;
use pageferry::source::SourceBuilder;
use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyBitmap, DirtyError, DirtySource, Failure, Outcome, Ram, Source, Target, Timeouts, Verify};
use vmm::{Script, TestGuest, TestIncoming, Transport, Trip, assert_arrived, assert_stayed};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A guest of so many full pages.
fn guest_of(pages: u64) -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[pages]);
    (0..pages).for_each(|page| vmm::touch_page(&ram, BlockId(0), page));
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}

/// Without a look at the pages: what is under test is when they travel.
fn quick(guest: &TestGuest) -> SourceBuilder {
    Source::builder(guest.ram.clone()).verify(Verify::Off).zero_test(false)
}

fn payload_by_channel(progress: &Progress, channels: u8) -> Vec<u64> {
    (0..usize::from(channels)).map(|channel| progress.channel(channel).unwrap().payload_bytes).collect()
}

#[test]
fn the_paused_round_uses_every_channel_whatever_its_size() {
    for (channels, dirty_pages) in [(2, 2), (4, 4), (4, 9), (8, 300), (3, 5000)] {
        let mut guest = guest_of(6000);
        let (source, target) = Transport::Unix.connect(Source::builder(guest.ram.clone()), Target::builder(), channels);
        let progress = source.progress();
        let before = Arc::new(Mutex::new(Vec::new()));
        let (bitmap, seen, look) = (guest.dirty.clone(), before.clone(), progress.clone());
        // Scattered, as a guest writes.
        let write = move || (0..dirty_pages).for_each(|page| bitmap.mark(BlockId(0), page * 6000 / dirty_pages));
        guest.on_pause = Some(Box::new(move || {
            // What was pushed before may still be under way.
            while look.channels().payload_bytes < look.now().pushed_bytes {
                std::thread::yield_now();
            }
            write();
            *seen.lock().unwrap() = payload_by_channel(&look, channels);
        }));
        let mut dirty = guest.dirty.clone();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_arrived(&guest, &trip);
        let after = payload_by_channel(&progress, channels);
        let shares: Vec<_> = after.iter().zip(before.lock().unwrap().iter()).map(|(a, b)| (a - b) >> 12).collect();
        assert_eq!(shares.iter().sum::<u64>(), dirty_pages, "{shares:?}");
        assert!(shares.iter().all(|pages| *pages > 0), "{dirty_pages} pages over {channels} channels: {shares:?}");
    }
}

/// Notes what was on the wire when each chunk was harvested.
struct Watched {
    bitmap: DirtyBitmap,
    progress: Progress,
    /// Wire bytes at each harvest, for each round.
    seen: Vec<Vec<u64>>,
}

impl DirtySource for Watched {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.seen.push(Vec::new());
        self.bitmap.arm(ram)
    }
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        // All of it is dirty again after the first round, and nothing after the second.
        if self.seen.len() == 1 {
            self.bitmap.mark_range(BlockId(0), 0, u64::MAX);
        }
        if self.seen.last().is_some_and(|round| !round.is_empty()) {
            self.seen.push(Vec::new());
        }
        self.bitmap.begin_round()
    }
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.seen.last_mut().unwrap().push(self.progress.channels().wire_bytes);
        self.bitmap.harvest(block, first_page, words)
    }
    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.bitmap.give_back(block, first_page, words)
    }
    fn disarm(&mut self) {}
}

#[test]
fn a_chunk_is_harvested_while_the_one_before_it_is_on_its_way() {
    // Five chunks; a ring holds far less than one.
    let pages = 5 * 16384;
    let mut guest = guest_of(pages);
    let builder = quick(&guest).downtime_limit(ms(1)).rounds_max(2).at_limit(AtLimit::SwitchOver);
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let (bitmap, progress) = (guest.dirty.clone(), source.progress());
    let mut dirty = Watched { bitmap, progress, seen: Vec::new() };
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    let full: Vec<_> = dirty.seen.iter().take(2).collect();
    for round in full {
        assert_eq!(round.len(), 5);
        let steps: Vec<_> = round.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(
            steps.iter().all(|bytes| *bytes > 16 << 20),
            "each harvest finds most of the last chunk sent: {steps:?}"
        );
    }
}

/// Marks as many pages between rounds as the throttle leaves.
fn hot<'a>(guest: &TestGuest, pages: u64, throttled: Option<Arc<Mutex<Vec<u8>>>>) -> Script<'a> {
    let between = move |_: u64, bitmap: &DirtyBitmap| {
        let percent = throttled.as_ref().and_then(|all| all.lock().unwrap().last().copied()).unwrap_or(0);
        bitmap.mark_range(BlockId(0), 0, pages * u64::from(100 - percent) / 100);
    };
    Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) }
}

/// A limit that this many pages do not keep on any link, and hardly any do.
const TIGHT: Duration = Duration::from_millis(3);
const HOT_PAGES: u64 = 30_000;

#[test]
fn a_guest_that_outruns_the_link_is_slowed_down_until_the_rest_fits() {
    let mut guest = guest_of(HOT_PAGES);
    let throttles = Arc::new(Mutex::new(Vec::new()));
    guest.throttles = Some(throttles.clone());
    let mut dirty = hot(&guest, HOT_PAGES, Some(throttles.clone()));
    let builder = quick(&guest).downtime_limit(ms(15)).throttle_max(99).rounds_max(1000);
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    let throttles = throttles.lock().unwrap();
    let (last, steps) = throttles.split_last().unwrap();
    assert_eq!(*last, 0, "it is let go at the end: {throttles:?}");
    assert!(!steps.is_empty() && steps.is_sorted(), "{throttles:?}");
    assert_eq!(trip.sent.throttling.highest, *steps.last().unwrap());
    assert!(trip.sent.throttling.rounds > 0 && trip.sent.throttling.time > Duration::ZERO);
}

#[test]
fn without_throttling_a_guest_that_outruns_the_link_is_reported_and_runs_on() {
    let mut guest = guest_of(HOT_PAGES);
    let mut dirty = hot(&guest, HOT_PAGES, None);
    let builder = quick(&guest).downtime_limit(TIGHT).rounds_max(100_000);
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_stayed(&guest, &trip);
    assert_eq!(guest.paused, 0);
    let Outcome::Failed(why @ Failure::NotConverging { why: Why::Stalled, bytes_left, .. }) = &trip.sent.outcome else {
        panic!("{}", trip.sent.outcome)
    };
    assert!(*bytes_left >= HOT_PAGES << 12);
    assert!(why.to_string().contains("rounds no longer shrink"), "{why}");
}

#[test]
fn a_vmm_that_cannot_throttle_is_asked_once_and_named() {
    let mut guest = guest_of(HOT_PAGES);
    let mut dirty = hot(&guest, HOT_PAGES, None);
    let builder = quick(&guest).downtime_limit(TIGHT).throttle_max(80).rounds_max(100_000);
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_stayed(&guest, &trip);
    let said: Vec<_> = trip.sent.remarks.iter().filter(|remark| remark.contains("no throttle here")).collect();
    assert_eq!(said.len(), 1, "{:?}", trip.sent.remarks);
}

#[test]
fn at_the_limit_of_time_or_rounds_the_guest_stays_or_goes_as_asked() {
    let limits: [fn(SourceBuilder) -> SourceBuilder; 2] =
        [|builder| builder.rounds_max(3), |builder| builder.precopy_time_max(ms(50)).rounds_max(100_000)];
    for (limit, expected) in limits.into_iter().zip([Why::Rounds, Why::Time]) {
        for at_limit in [AtLimit::GiveUp, AtLimit::SwitchOver] {
            let mut guest = guest_of(HOT_PAGES);
            let mut dirty = hot(&guest, HOT_PAGES, None);
            let builder = quick(&guest).downtime_limit(TIGHT).at_limit(at_limit);
            let (source, target) = Transport::Unix.connect(limit(builder), Target::builder(), 2);
            let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
            match at_limit {
                AtLimit::SwitchOver => assert_arrived(&guest, &trip),
                AtLimit::GiveUp => {
                    assert_stayed(&guest, &trip);
                    let Outcome::Failed(Failure::NotConverging { why, .. }) = trip.sent.outcome else {
                        panic!("{}", trip.sent.outcome)
                    };
                    assert_eq!(why, expected);
                }
            }
        }
    }
}

#[test]
fn a_guest_that_is_to_be_left_alone_when_time_is_up_does_not_wait_for_the_round() {
    let mut guest = guest_of(8192);
    let builder = quick(&guest).bandwidth_max(1 << 20).precopy_time_max(ms(100));
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_stayed(&guest, &trip);
    let Outcome::Failed(Failure::NotConverging { why: Why::Time, rounds: 0, .. }) = trip.sent.outcome else {
        panic!("{}", trip.sent.outcome)
    };
    assert!(trip.sent.payload_bytes < 16 << 20, "round 0 went on for {} bytes", trip.sent.payload_bytes);
}

/// Where an attempt takes too long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slow {
    Pause,
    Save,
    Load,
}

/// Long enough for any machine, and far below any time limit.
const LIMIT: Duration = Duration::from_millis(400);

/// Migrates a guest whose first `times` attempts take longer than the limit.
fn slow_at(slow: Slow, times: u32, overrun: Overrun) -> (TestGuest, Trip) {
    let mut guest = guest_of(2000);
    let calls = Arc::new(AtomicU32::new(0));
    let hook = {
        let calls = calls.clone();
        move || {
            if calls.fetch_add(1, Ordering::Relaxed) < times {
                vmm::wait(LIMIT + ms(50));
            }
        }
    };
    let mut incoming = TestIncoming::new();
    match slow {
        Slow::Pause => guest.on_pause = Some(Box::new(hook)),
        // What the device writes while its state is saved arrives, whichever attempt it is.
        Slow::Save => {
            guest.on_save = Some(Box::new(move |ram, dirty| {
                hook();
                vmm::write_page(ram, BlockId(0), 77, u64::from(calls.load(Ordering::Relaxed)));
                dirty.mark(BlockId(0), 77);
            }));
        }
        Slow::Load => incoming.on_load = Some(Box::new(hook)),
    }
    let builder = Source::builder(guest.ram.clone()).downtime_limit(LIMIT).overrun(overrun).verify(Verify::Wire);
    let (source, target) = Transport::Tcp4.connect(builder, Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, incoming);
    (guest, trip)
}

#[test]
fn an_attempt_that_takes_too_long_lets_the_guest_run_on_and_is_tried_again() {
    for slow in [Slow::Pause, Slow::Save, Slow::Load] {
        let (guest, trip) = slow_at(slow, 1, Overrun::Retry { tries: 3 });
        assert_arrived(&guest, &trip);
        // On a machine with much other work another attempt may take too long: but none is withdrawn that did not.
        let overruns = trip.sent.overruns;
        assert!(overruns >= 1 && overruns == guest.resumed, "{slow:?}: {:?}", trip.sent.remarks);
        assert!(trip.sent.interrupted > LIMIT * overruns, "{slow:?}: {:?}", trip.sent.interrupted);
        let loads = if slow == Slow::Load { 2 } else { 1 };
        assert!((loads..=overruns + 1).contains(&trip.incoming.loads), "{slow:?}: {}", trip.incoming.loads);
        assert!(
            trip.sent.remarks.iter().any(|remark| remark.contains("exceeded its limit")),
            "{:?}",
            trip.sent.remarks
        );
    }
}

#[test]
fn an_attempt_is_broken_off_in_the_middle_of_its_round_and_nothing_is_lost() {
    // 400 MiB in 20 ms: more than any link has time for, and nobody could see it coming.
    let pages = 100_000;
    let mut guest = guest_of(pages);
    let (bitmap, mut first) = (guest.dirty.clone(), true);
    guest.on_pause = Some(Box::new(move || {
        if std::mem::take(&mut first) {
            bitmap.mark_range(BlockId(0), 0, pages);
        }
    }));
    let builder = quick(&guest).downtime_limit(ms(20)).overrun(Overrun::Retry { tries: 9 });
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    // Where in its round the clock finds it is chance: between two chunks, in one, or behind the last.
    assert!(trip.sent.overruns > 0, "{:?}", trip.sent);
}

#[test]
fn an_overrun_is_accepted_where_nothing_else_was_asked_for_and_when_no_try_is_left() {
    for slow in [Slow::Save, Slow::Load] {
        let (guest, trip) = slow_at(slow, 9, Overrun::Accept);
        assert_arrived(&guest, &trip);
        assert_eq!((trip.sent.overruns, guest.resumed), (0, 0));
        assert!(trip.sent.downtime > LIMIT);

        let (guest, trip) = slow_at(slow, 9, Overrun::Retry { tries: 2 });
        assert_arrived(&guest, &trip);
        assert_eq!((trip.sent.overruns, guest.resumed), (2, 2), "{slow:?}");
        assert!(trip.sent.downtime > LIMIT);
    }
}

#[test]
fn a_cancel_between_two_attempts_leaves_the_guest_running() {
    let mut guest = guest_of(2000);
    let builder = Source::builder(guest.ram.clone()).downtime_limit(LIMIT).overrun(Overrun::Retry { tries: 9 });
    let (source, target) = Transport::Tcp4.connect(builder, Target::builder(), 2);
    let cancel = source.cancel_handle();
    let mut incoming = TestIncoming::new();
    // The first attempt is withdrawn while the target loads it, and cancelled before the target has answered.
    incoming.on_load = Some(Box::new(move || {
        vmm::wait(LIMIT + ms(50));
        cancel.cancel();
    }));
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, incoming);
    assert_stayed(&guest, &trip);
    assert_eq!(trip.sent.outcome, Outcome::Cancelled);
    assert!(guest.resumed > 0);
}

#[test]
fn a_cap_on_bandwidth_holds_while_the_guest_runs_and_zeros_cost_none_of_it() {
    const PAGES: u64 = 8192;
    let migrate = |cap: u64, zeros: u64| {
        let mut guest = guest_of(PAGES);
        (0..zeros).for_each(|page| vmm::zero_page(&guest.ram, BlockId(0), page));
        let builder = Source::builder(guest.ram.clone()).bandwidth_max(cap);
        let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
        let mut dirty = guest.dirty.clone();
        let begun = Instant::now();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        let took = begun.elapsed();
        assert_arrived(&guest, &trip);
        took
    };
    // 32 MiB at 64 MiB/s; the first 10 ms may run ahead, and nobody waits for the last push, of one or two MiB.
    let full = migrate(64 << 20, 0);
    assert!(full >= ms(450), "{full:?}");
    // At 256 KiB/s they would take two minutes.
    let zero = migrate(256 << 10, PAGES);
    assert!(zero < ms(60_000), "zeros took {zero:?}");
}

#[test]
fn pages_that_are_dirty_in_every_round_are_kept_back_for_the_end() {
    // Beside a few pages that are dirty in every round one half of the rest is, and then the other: that never fits. They
    // are so few that a machine with much other work has room for them, too.
    let hot_pages = 4;
    let mut guest = guest_of(HOT_PAGES);
    let between = |round: u64, bitmap: &DirtyBitmap| {
        bitmap.mark_range(BlockId(0), 0, hot_pages);
        bitmap.mark_range(BlockId(0), if round % 2 == 0 { 1000 } else { HOT_PAGES / 2 }, HOT_PAGES / 2 - 1000);
    };
    let mut dirty = Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) };
    let builder = quick(&guest).downtime_limit(ms(20)).rounds_max(10).at_limit(AtLimit::SwitchOver);
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    assert!(trip.sent.deferred_bytes >= hot_pages << 12, "{} bytes", trip.sent.deferred_bytes);
}

#[test]
fn the_time_that_an_earlier_attempt_waited_for_the_target_does_not_count_against_the_next() {
    let mut guest = guest_of(100);
    let mut incoming = TestIncoming::new();
    let mut loads = [LIMIT + ms(50), ms(350)].into_iter();
    incoming.on_load = Some(Box::new(move || vmm::wait(loads.next().unwrap_or_default())));
    let builder = quick(&guest)
        .downtime_limit(LIMIT)
        .overrun(Overrun::Retry { tries: 1 })
        .timeouts(Timeouts { hook: LIMIT + ms(300), ..Timeouts::default() });
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, incoming);
    assert_arrived(&guest, &trip);
    assert_eq!(trip.sent.overruns, 1);
}

#[test]
fn a_limit_of_rounds_is_for_a_guest_that_outruns_the_link_and_not_for_tries() {
    let mut guest = guest_of(100);
    let mut pauses = [LIMIT + ms(50)].into_iter();
    guest.on_pause = Some(Box::new(move || vmm::wait(pauses.next().unwrap_or_default())));
    let builder = quick(&guest).downtime_limit(LIMIT).overrun(Overrun::Retry { tries: 1 }).rounds_max(1);
    let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    assert_arrived(&guest, &trip);
    assert_eq!(trip.sent.overruns, 1, "{:?}", trip.sent.downtime);
}

/// Zeros take time to look at and none of the link: counted as the link's, they would make it seem slow.
#[test]
fn pages_of_zeros_do_not_make_the_link_seem_slow() {
    const ZEROS: u64 = 30_000;
    for hot_pages in [1, 100, 5000] {
        let ram = vmm::ram(PageSize::SIZE_4K, &[ZEROS]);
        (0..ZEROS).for_each(|page| vmm::zero_page(&ram, BlockId(0), page));
        let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
        let mut dirty = hot(&guest, hot_pages, None);
        let builder = Source::builder(ram.clone()).verify(Verify::Off);
        let (source, target) = Transport::Unix.connect(builder, Target::builder(), 2);
        let progress = source.progress();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_eq!(progress.channels().busy_ns, 0, "of {:?}", trip.sent.total);
        // Nor do they leave it unknown for ever.
        assert_arrived(&guest, &trip);
    }
}
