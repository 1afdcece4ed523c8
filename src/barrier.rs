//! Keeps the receive lanes in step: who has passed which round, who has flushed which epoch, and may we go on.
#![forbid(unsafe_code)]

use crossbeam_utils::CachePadded;

use crate::bell::{Bell, Ringer, Sleeper, Wake};
use crate::sync::Ordering::Relaxed;
use crate::sync::{AtomicU64, Ordering, acquire, mutated, release};
use crate::units::{Epoch, Round};

/// How far one lane has come, and whether it still counts: one word.
///
/// The count is a number of rounds passed, or of epochs flushed. A retired lane keeps its count, but nobody waits for it.
///
/// ```
/// use pageferry::barrier::{LaneWord, min_over_set};
///
/// let lanes = [LaneWord::counting(3), LaneWord::counting(1).retired(), LaneWord::counting(2)];
/// assert_eq!(min_over_set(lanes.into_iter()), Some(2));
/// assert_eq!(min_over_set([LaneWord::counting(7).retired()].into_iter()), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct LaneWord(u64);

impl LaneWord {
    const RETIRED: u64 = 1 << 63;

    /// The word of a lane of the set. Counts end at 2^63 - 1: one that a peer made up must not reach the retired bit.
    pub const fn counting(count: u64) -> LaneWord {
        LaneWord(if count < LaneWord::RETIRED { count } else { LaneWord::RETIRED - 1 })
    }

    /// The same count, out of the set.
    #[must_use]
    pub const fn retired(self) -> LaneWord {
        LaneWord(self.0 | LaneWord::RETIRED)
    }

    /// Whether the lane is out of the set.
    pub const fn is_retired(self) -> bool {
        self.0 & LaneWord::RETIRED != 0
    }

    /// The count.
    pub const fn count(self) -> u64 {
        self.0 & !LaneWord::RETIRED
    }
}

/// The smallest count over the lanes of the set; `None` if no lane is left in it.
///
/// All decisions of the barrier are this function. Nobody may go on over an empty set: that all lanes are lost does not
/// mean that all has landed.
pub fn min_over_set(words: impl Iterator<Item = LaneWord>) -> Option<u64> {
    words.filter(|word| !word.is_retired()).map(LaneWord::count).min()
}

/// Both words of one lane. Written by the lane (`pass`, `flush`) and by the control thread (`retire`, `join`).
#[derive(Debug)]
struct Lane {
    // Rounds passed. Publishes the pages of those rounds.
    passed: AtomicU64,
    // Epochs flushed. Publishes the pages of those epochs.
    flushed: AtomicU64,
}

/// The barrier that the receive lanes meet at between rounds.
///
/// Within a round a page travels once. In the next round it may travel on another channel, so no lane may read a page of
/// round r + 1 before every lane has landed all its pages of round r. A lane publishes a number and never waits for
/// anybody to take note of it; so a lane that has died, or is joined late, leaves nothing half-counted.
///
/// A failed lane stays in the set, and the others wait for it, until the control thread has joined its thread and calls
/// [`Barrier::retire`].
///
/// ```
/// use pageferry::barrier::Barrier;
/// use pageferry::units::Round;
///
/// let barrier = Barrier::new(2);
/// barrier.pass(0, Round(0));
/// assert!(!barrier.may_go(Round(0)));
/// barrier.retire(1);
/// assert!(barrier.may_go(Round(0)));
/// ```
///
/// # Panics
/// Each method that takes a lane panics if there is no such lane.
#[derive(Debug)]
pub struct Barrier {
    // One cache line for each lane: its owner writes it, the others read it once a round.
    lanes: Box<[CachePadded<Lane>]>,
}

impl Barrier {
    /// A barrier for lanes 0 to `lanes` - 1, all of them in the set, none of them past anything.
    pub fn new(lanes: usize) -> Self {
        let lane = |_| CachePadded::new(Lane { passed: AtomicU64::new(0), flushed: AtomicU64::new(0) });
        Barrier { lanes: (0..lanes).map(lane).collect() }
    }

    /// The number of lanes, in the set or not.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Says that `lane` has landed all its pages of `round` and of all rounds before it. Marks are cumulative: a lower
    /// round than before changes nothing. Ring every other lane's bell afterwards.
    pub fn pass(&self, lane: usize, round: Round) {
        let word = LaneWord::counting(u64::from(round.0) + 1);
        // Release: publishes the pages that this lane has landed. Pairs with the Acquire in `words`. As `fetch_max`, it
        // never goes back, keeps the retired bit, and never breaks the release sequence of a retire or a join.
        self.lanes[lane].passed.fetch_max(word.0, release("barrier/pass"));
    }

    /// Says that `lane` has landed everything up to the end of `epoch`. Cumulative, as [`Barrier::pass`].
    pub fn flush(&self, lane: usize, epoch: Epoch) {
        let word = LaneWord::counting(epoch.0.saturating_add(1));
        // Release: publishes the pages of that epoch. Pairs with the Acquire in `words`.
        self.lanes[lane].flushed.fetch_max(word.0, release("barrier/flush"));
    }

    /// Whether every lane of the set has passed `round`. Then everything they landed in it is seen by the caller.
    pub fn may_go(&self, round: Round) -> bool {
        self.all_passed() > u64::from(round.0)
    }

    /// The number of rounds that every lane of the set has passed; 0 if the set is empty.
    pub fn all_passed(&self) -> u64 {
        min_over_set(self.words(|lane| &lane.passed, acquire("barrier/read-passed"))).unwrap_or(0)
    }

    /// The number of epochs that every lane of the set has flushed; 0 if the set is empty.
    pub fn all_flushed(&self) -> u64 {
        min_over_set(self.words(|lane| &lane.flushed, acquire("barrier/read-flushed"))).unwrap_or(0)
    }

    /// How many rounds one lane has passed, and whether it is retired. For reports: it orders no memory.
    pub fn passed(&self, lane: usize) -> LaneWord {
        LaneWord(self.lanes[lane].passed.load(Relaxed))
    }

    /// How many epochs one lane has flushed, and whether it is retired. For reports: it orders no memory.
    pub fn flushed(&self, lane: usize) -> LaneWord {
        LaneWord(self.lanes[lane].flushed.load(Relaxed))
    }

    /// Takes a lane out of the set, for good or until it joins again. Join its thread first: what it has landed by then
    /// is seen by everybody who goes on without it. Ring every lane's bell afterwards.
    pub fn retire(&self, lane: usize) {
        // Release: publishes what the retired lane has landed, which the caller saw when it joined its thread. Pairs
        // with the Acquire in `words`.
        self.lanes[lane].passed.fetch_or(LaneWord::RETIRED, release("barrier/retire-passed"));
        self.lanes[lane].flushed.fetch_or(LaneWord::RETIRED, release("barrier/retire-flushed"));
    }

    /// Puts a lane into the set, with the rounds it counts as having passed and the epochs it counts as having flushed.
    ///
    /// Do it before the source is told that the lane has joined: only then does the round trip keep the other lanes from
    /// going on without it.
    pub fn join(&self, lane: usize, passed: u64, flushed: u64) {
        // Release: publishes what the caller has seen landed, which the new counts vouch for. Pairs with the Acquire in
        // `words`.
        self.lanes[lane].passed.swap(LaneWord::counting(passed).0, release("barrier/join-passed"));
        self.lanes[lane].flushed.swap(LaneWord::counting(flushed).0, release("barrier/join-flushed"));
    }

    /// Passes `round`, rings everybody else, and waits until every lane of the set has passed it.
    ///
    /// `Rung` means go on; whatever else the bell says ends the wait early. It takes every ring that comes meanwhile: look
    /// again at everything else you wait for. `ringers` are the bells of the other lanes, or of all: ringing one's own
    /// costs an extra loop.
    pub fn wait_for_all<S: Sleeper>(
        &self,
        lane: usize,
        round: Round,
        bell: &mut Bell<S>,
        ringers: &[Ringer<S>],
    ) -> Wake {
        self.pass(lane, round);
        // Always: two lanes that pass at the same time may each miss the other's number when they look. To ring only if
        // "I was the last" would then let both sleep.
        for bell in ringers {
            bell.ring();
        }
        while !self.may_go(round) {
            match bell.wait() {
                Wake::Rung => {}
                other => return other,
            }
        }
        Wake::Rung
    }

    fn words(&self, of: impl Fn(&Lane) -> &AtomicU64, order: Ordering) -> impl Iterator<Item = LaneWord> {
        // The words are read one after the other, not at one instant. That is enough: a count only grows while its lane
        // is in the set, and a lane that joins carries pages only of rounds whose end the source marks after the join.
        let ignored = usize::from(mutated("barrier/ignore-one-lane"));
        self.lanes.iter().skip(ignored).map(move |lane| LaneWord(of(lane).load(order)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_set_never_passes() {
        assert_eq!(min_over_set(std::iter::empty()), None);
        for lanes in [0, 2] {
            let barrier = Barrier::new(lanes);
            for lane in 0..lanes {
                barrier.pass(lane, Round(9));
                barrier.flush(lane, Epoch(9));
                barrier.retire(lane);
            }
            assert!(!barrier.may_go(Round(0)));
            assert_eq!((barrier.all_passed(), barrier.all_flushed()), (0, 0));
        }
    }

    #[test]
    fn marks_are_cumulative_and_never_go_back() {
        let barrier = Barrier::new(1);
        barrier.pass(0, Round(4));
        barrier.pass(0, Round(2));
        barrier.flush(0, Epoch(7));
        barrier.flush(0, Epoch(0));
        assert_eq!((barrier.all_passed(), barrier.all_flushed()), (5, 8));
        assert!(barrier.may_go(Round(4)) && !barrier.may_go(Round(5)));
    }

    #[test]
    fn a_mark_of_a_retired_lane_does_not_bring_it_back() {
        let barrier = Barrier::new(2);
        barrier.retire(0);
        barrier.pass(0, Round(1));
        barrier.flush(0, Epoch(1));
        assert!(barrier.passed(0).is_retired() && barrier.flushed(0).is_retired());
        assert_eq!(barrier.passed(0).count(), 0, "a retired lane keeps the count it had");
        assert_eq!(barrier.all_passed(), 0, "lane 1 has passed nothing");
    }

    #[test]
    fn a_lane_that_joins_again_is_waited_for_from_the_counts_it_joins_with() {
        let barrier = Barrier::new(2);
        barrier.retire(1);
        barrier.pass(0, Round(2));
        barrier.flush(0, Epoch(2));
        assert!(barrier.may_go(Round(2)));
        barrier.join(1, 2, 1);
        assert_eq!((barrier.all_passed(), barrier.all_flushed()), (2, 1));
        barrier.pass(1, Round(2));
        assert!(barrier.may_go(Round(2)));
    }

    #[test]
    fn an_abort_ends_the_wait_for_a_lane_that_never_comes_and_the_mark_stays() {
        let barrier = Barrier::new(2);
        let mut bell = Bell::here();
        bell.ringer().close(crate::bell::Close::Abort);
        assert_eq!(barrier.wait_for_all(0, Round(0), &mut bell, &[]), Wake::Abort);
        assert_eq!(barrier.passed(0), LaneWord::counting(1));
    }

    #[test]
    fn a_count_that_a_peer_made_up_retires_nobody() {
        let barrier = Barrier::new(1);
        barrier.flush(0, Epoch(u64::MAX));
        assert_eq!((barrier.flushed(0).is_retired(), barrier.all_flushed()), (false, u64::MAX / 2));
        barrier.pass(0, Round(u32::MAX));
        assert!(barrier.may_go(Round(u32::MAX)));
    }
}
