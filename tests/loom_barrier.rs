//! Models of the barrier: pages are cells, so loom reports two lanes that write one page without the barrier between.
//!
//! Exhaustive, each within a second, if LOOM_MAX_PREEMPTIONS is unset; but `two_lanes_that_meet_both_go_on_and_swap_a_page`
//! is bounded: give it three.
//!
//! The one unsafe impl shares loom's checked cell between threads: that is what the models are about. No cell is dereferenced.
#![cfg(loom)]
#![expect(unsafe_code)]

use loom::cell::UnsafeCell;
use loom::thread;
use pageferry::barrier::Barrier;
use pageferry::bell::{Bell, Wake};
use pageferry::sync::Arc;
use pageferry::units::{Epoch, Round};

struct Page(UnsafeCell<()>);

// SAFETY: loom checks every access to the cell and fails the model if two are not ordered.
unsafe impl Sync for Page {}

impl Page {
    fn land(&self) {
        self.0.with_mut(|_| ());
    }

    fn read(&self) {
        self.0.with(|_| ());
    }
}

struct Target {
    page: Page,
    barrier: Barrier,
}

fn target(lanes: usize) -> Arc<Target> {
    Arc::new(Target { page: Page(UnsafeCell::new(())), barrier: Barrier::new(lanes) })
}

#[test]
fn a_page_of_the_next_round_lands_after_that_of_this_round() {
    loom::model(|| {
        let target = target(2);
        let mut bell = Bell::here();
        let (other, ringer) = (target.clone(), bell.ringer());
        let lane = thread::spawn(move || {
            other.page.land();
            other.barrier.pass(1, Round(0));
            ringer.ring();
        });
        assert_eq!(target.barrier.wait_for_all(0, Round(0), &mut bell, &[]), Wake::Rung);
        target.page.land();
        lane.join().unwrap();
    });
}

#[test]
fn two_lanes_that_meet_both_go_on_and_swap_a_page() {
    // Lane 0 lands the page in rounds 0 and 2, lane 1 in round 1.
    loom::model(|| {
        let target = target(2);
        let mut bell = Bell::here();
        let (other, ringer) = (target.clone(), bell.ringer());
        let (mut to_main, mut from_lane) = pageferry::ring::ring(1);
        let hello = bell.ringer();
        let lane = thread::spawn(move || {
            let mut bell = Bell::here();
            to_main.push(bell.ringer()).unwrap();
            hello.ring();
            let others = [ringer];
            assert_eq!(other.barrier.wait_for_all(1, Round(0), &mut bell, &others), Wake::Rung);
            other.page.land();
            assert_eq!(other.barrier.wait_for_all(1, Round(1), &mut bell, &others), Wake::Rung);
        });
        target.page.land();
        let others = loop {
            match from_lane.pop() {
                Some(ringer) => break [ringer],
                None => assert_eq!(bell.wait(), Wake::Rung),
            }
        };
        for round in 0..2 {
            assert_eq!(target.barrier.wait_for_all(0, Round(round), &mut bell, &others), Wake::Rung);
        }
        target.page.land();
        lane.join().unwrap();
    });
}

#[test]
fn a_retired_lane_releases_who_waits_for_it_and_its_page_is_seen() {
    // A third thread stands for the lost lane, joined by the control thread, which then takes the lane out of the set.
    loom::model(|| {
        let target = target(2);
        let mut bell = Bell::here();
        let (control, ringer) = (target.clone(), bell.ringer());
        let control = thread::spawn(move || {
            let lost = control.clone();
            thread::spawn(move || lost.page.land()).join().unwrap();
            control.barrier.retire(1);
            ringer.ring();
        });
        assert_eq!(target.barrier.wait_for_all(0, Round(0), &mut bell, &[]), Wake::Rung);
        target.page.land();
        control.join().unwrap();
    });
}

#[test]
fn a_lane_that_came_late_is_woken_by_the_controller_whom_the_others_ring() {
    // Lane 0 does not know the bell of lane 1, which came later; the controller knows both.
    loom::model(|| {
        let target = target(2);
        let mut bell = Bell::here();
        let (other, late) = (target.clone(), bell.ringer());
        let controller = thread::spawn(move || {
            let mut bell = Bell::here();
            let ringer = bell.ringer();
            let lane = thread::spawn(move || {
                other.page.land();
                other.barrier.pass(0, Round(0));
                ringer.ring();
            });
            assert_eq!(bell.wait(), Wake::Rung);
            late.ring();
            lane.join().unwrap();
        });
        assert_eq!(target.barrier.wait_for_all(1, Round(0), &mut bell, &[]), Wake::Rung);
        target.page.land();
        controller.join().unwrap();
    });
}

#[test]
fn a_lane_that_joins_with_nothing_passed_is_waited_for() {
    // The source marks the end of the round only after it was told that lane 1 has joined: here, by a ring.
    loom::model(|| {
        let target = target(2);
        target.barrier.retire(1);
        let mut bell = Bell::here();
        let (other, told) = (target.clone(), bell.ringer());
        let control = thread::spawn(move || {
            other.barrier.join(1, 0, 0);
            told.ring();
            other.page.land();
            other.barrier.pass(1, Round(0));
            told.ring();
        });
        assert_eq!(bell.wait(), Wake::Rung);
        assert_eq!(target.barrier.wait_for_all(0, Round(0), &mut bell, &[]), Wake::Rung);
        target.page.land();
        control.join().unwrap();
    });
}

#[test]
fn a_lane_that_is_retired_again_after_it_joined_releases_who_waits_for_it() {
    loom::model(|| {
        let target = target(2);
        target.barrier.retire(1);
        target.barrier.join(1, 0, 0);
        let mut bell = Bell::here();
        let (control, ringer) = (target.clone(), bell.ringer());
        let control = thread::spawn(move || {
            control.page.land();
            control.barrier.retire(1);
            ringer.ring();
        });
        assert_eq!(target.barrier.wait_for_all(0, Round(0), &mut bell, &[]), Wake::Rung);
        target.page.land();
        control.join().unwrap();
    });
}

#[test]
fn a_lane_that_joins_vouches_for_what_was_done_before() {
    loom::model(|| {
        let target = target(1);
        target.barrier.retire(0);
        let control = target.clone();
        let control = thread::spawn(move || {
            control.page.land();
            control.barrier.join(0, 1, 1);
        });
        if target.barrier.may_go(Round(0)) {
            target.page.read();
        }
        control.join().unwrap();
    });
}

#[test]
fn a_lane_that_joins_vouches_for_what_was_flushed_before() {
    loom::model(|| {
        let target = target(1);
        target.barrier.retire(0);
        let control = target.clone();
        let control = thread::spawn(move || {
            control.page.land();
            control.barrier.join(0, 0, 1);
        });
        if target.barrier.all_flushed() > 0 {
            target.page.read();
        }
        control.join().unwrap();
    });
}

#[test]
fn a_flushed_epoch_has_landed() {
    loom::model(|| {
        let target = target(2);
        let lane = {
            let target = target.clone();
            thread::spawn(move || {
                target.page.land();
                target.barrier.flush(1, Epoch(0));
            })
        };
        target.barrier.flush(0, Epoch(0));
        if target.barrier.all_flushed() > 0 {
            target.page.read();
        }
        lane.join().unwrap();
    });
}

#[test]
fn an_epoch_counts_as_flushed_when_its_last_lane_is_retired_and_its_page_is_seen() {
    loom::model(|| {
        let target = target(2);
        let control = target.clone();
        let control = thread::spawn(move || {
            control.page.land();
            control.barrier.retire(1);
        });
        target.barrier.flush(0, Epoch(0));
        if target.barrier.all_flushed() > 0 {
            target.page.read();
        }
        control.join().unwrap();
    });
}
