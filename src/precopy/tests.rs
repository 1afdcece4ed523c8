#![forbid(unsafe_code)]
//! Single decisions. Whole migrations are simulated in tests/precopy_sim.rs.

use super::*;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn decide(limits: Limits, now: Estimate) -> Decision {
    Precopy::new(limits).decide(&now).decision
}

#[test]
fn nothing_left_switches_over_even_when_the_rate_is_unknown() {
    assert_eq!(decide(Limits::default(), Estimate::default()), Decision::SwitchOver);
}

#[test]
fn unknown_rate_with_bytes_left_ships_another_round() {
    let now = Estimate { dirty_bytes: 4096, ..Estimate::default() };
    assert_eq!(decide(Limits::default(), now), Decision::AnotherRound);
}

#[test]
fn what_is_on_its_way_runs_down_before_another_round_is_begun_for_little() {
    let queued = Estimate { queued_bytes: GIB, dirty_bytes: 4096, rate: GIB, ..Estimate::default() };
    let in_flight = Estimate { queued_bytes: 0, in_flight_bytes: GIB, ..queued };
    for now in [queued, in_flight] {
        assert_eq!(decide(Limits::default(), now), Decision::Wait);
        let clean = Estimate { dirty_bytes: 0, fixed_cost: Duration::from_secs(1), ..now };
        assert_eq!(decide(Limits::default(), clean), Decision::Wait, "a round would carry nothing");
        let unknown = Estimate { rate: 0, ..now };
        assert_eq!(decide(Limits::default(), unknown), Decision::Wait, "nobody knows the link yet");
        let dirty = Estimate { dirty_bytes: GIB, ..now };
        assert_eq!(decide(Limits::default(), dirty), Decision::AnotherRound, "there is plenty to do");
        let deferred = Estimate { deferred_bytes: GIB, ..now };
        assert_eq!(decide(Limits::default(), deferred), Decision::AnotherRound, "what is kept back counts as dirty");
    }
}

#[test]
fn what_is_on_its_way_runs_down_before_the_pause_unless_the_guest_dirties_more_meanwhile() {
    let fits = Estimate { queued_bytes: 8 * MIB, in_flight_bytes: 8 * MIB, dirty_bytes: MIB, rate: GIB, ..Estimate::default() };
    assert_eq!(decide(Limits::default(), fits), Decision::Wait);
    let busy = Estimate { dirty_rate: GIB / 2, ..fits };
    assert_eq!(decide(Limits::default(), busy), Decision::SwitchOver);
    let mostly_dirty = Estimate { dirty_bytes: 17 * MIB, ..fits };
    assert_eq!(decide(Limits::default(), mostly_dirty), Decision::SwitchOver);
    let late = Limits { precopy_time_max: Some(Duration::ZERO), ..Limits::default() };
    assert_eq!(decide(late, fits), Decision::SwitchOver, "it fits, and time is up");
}

#[test]
fn a_tenth_of_the_time_to_ship_stays_to_spare() {
    let now = Estimate { dirty_bytes: 100 * MIB, rate: 1000 * MIB, fixed_cost: ms(5), ..Estimate::default() };
    assert_eq!(now.downtime(), Some(ms(105)));
    assert_eq!(decide(Limits { downtime_limit: ms(114), ..Limits::default() }, now), Decision::AnotherRound);
    assert_eq!(decide(Limits { downtime_limit: ms(115), ..Limits::default() }, now), Decision::SwitchOver);
}

#[test]
fn the_limits_on_rounds_and_time_end_it_one_way_or_the_other() {
    let now = Estimate { rounds: 3, elapsed: ms(500), dirty_bytes: 1 << 40, rate: 1, ..Estimate::default() };
    assert!(now.downtime().unwrap() > Duration::from_secs(1 << 30), "no overflow");
    let by_rounds = Limits { rounds_max: 3, ..Limits::default() };
    let by_time = Limits { precopy_time_max: Some(ms(500)), ..Limits::default() };
    for (limits, why) in [(by_rounds, Why::Rounds), (by_time, Why::Time)] {
        assert_eq!(decide(limits, now), Decision::GiveUp(why));
        let mut precopy = Precopy::new(Limits { at_limit: AtLimit::SwitchOver, ..limits });
        assert_eq!(precopy.decide(&now).decision, Decision::SwitchOver);
        assert_eq!(precopy.forced(), Some(why));
    }
    let waiting = Estimate { dirty_bytes: 0, queued_bytes: 1 << 40, ..now };
    assert_eq!(decide(by_rounds, waiting), Decision::Wait, "no round is needed");
    assert_eq!(decide(by_time, waiting), Decision::GiveUp(Why::Time));
}

#[test]
fn fixed_costs_count_against_the_limit_and_no_throttle_helps_against_them() {
    let mut precopy = Precopy::new(Limits { throttle_max: 99, ..Limits::default() });
    let now = Estimate { fixed_cost: Duration::from_secs(1), rate: GIB, ..Estimate::default() };
    let decided: Vec<_> =
        (1..6).map(|rounds| precopy.decide(&Estimate { rounds, elapsed: ms(300) * rounds, ..now })).collect();
    assert!(decided[..4].iter().all(|v| *v == Verdict { decision: Decision::AnotherRound, throttle: 0 }), "{decided:?}");
    assert_eq!(decided[4].decision, Decision::GiveUp(Why::Stalled));
}

#[test]
fn asking_again_about_the_same_round_counts_once() {
    let mut precopy = Precopy::new(Limits { throttle_max: 99, ..Limits::default() });
    for ask in 0..100 {
        let now = Estimate { rounds: 1, elapsed: ms(100 * ask), dirty_bytes: GIB, rate: MIB, ..Estimate::default() };
        assert_eq!(precopy.decide(&now), Verdict { decision: Decision::AnotherRound, throttle: 0 });
    }
}

/// Rounds of 100 ms that are all equally large; the throttle after each.
fn equal_rounds(precopy: &mut Precopy, rounds: std::ops::Range<u32>, dirty_rate: u64) -> Vec<u8> {
    let now = Estimate { dirty_bytes: GIB, rate: GIB, dirty_rate, ..Estimate::default() };
    let mut throttles = Vec::new();
    for rounds in rounds {
        let verdict = precopy.decide(&Estimate { rounds, elapsed: ms(100) * rounds, ..now });
        if verdict.throttle != precopy.throttle_in_force {
            precopy.throttled(true);
        }
        throttles.push(verdict.throttle);
    }
    throttles
}

#[test]
fn steps_halve_the_guests_time_or_go_by_what_it_dirties_and_end_at_the_limit() {
    let limits = Limits { throttle_max: 99, ..Limits::default() };
    assert_eq!(equal_rounds(&mut Precopy::new(limits), 1..10, GIB), [0, 0, 50, 75, 88, 94, 97, 99, 99]);
    assert_eq!(equal_rounds(&mut Precopy::new(limits), 1..7, 3 * GIB / 2), [0, 0, 67, 89, 97, 99]);
    assert_eq!(equal_rounds(&mut Precopy::new(limits), 1..7, 100 * GIB), [0, 0, 75, 94, 99, 99]);
    let limits = Limits { throttle_max: 60, ..limits };
    assert_eq!(equal_rounds(&mut Precopy::new(limits), 1..6, GIB), [0, 0, 50, 60, 60]);
    let limits = Limits { throttle_max: 0, ..limits };
    assert_eq!(equal_rounds(&mut Precopy::new(limits), 1..6, GIB), [0; 5]);
}

#[test]
fn a_hook_that_fails_leaves_the_throttle_where_it_was() {
    let mut precopy = Precopy::new(Limits { throttle_max: 99, ..Limits::default() });
    assert_eq!(equal_rounds(&mut precopy, 1..4, GIB), [0, 0, 50]);
    let now = Estimate { rounds: 4, elapsed: ms(400), dirty_bytes: GIB, rate: GIB, ..Estimate::default() };
    assert_eq!(precopy.decide(&now).throttle, 75);
    precopy.throttled(false);
    assert_eq!(equal_rounds(&mut precopy, 5..9, GIB), [50; 4]);
    let Throttled { highest, rounds, time, .. } = precopy.summary();
    assert_eq!((highest, rounds, time), (50, 5, ms(500)));
}

#[test]
fn the_throttle_is_taken_back_with_the_giving_up() {
    let mut precopy = Precopy::new(Limits { throttle_max: 50, ..Limits::default() });
    assert_eq!(equal_rounds(&mut precopy, 1..4, 2 * GIB), [0, 0, 50]);
    // It dirties less, and still too much: the throttle stays while there is hope.
    assert_eq!(equal_rounds(&mut precopy, 4..14, GIB), [50, 50, 50, 50, 50, 50, 50, 50, 50, 0]);
    let expected = Throttled {
        highest: 50,
        rounds: 10,
        time: ms(1000),
        dirty_rate_before: 2 * GIB,
        dirty_rate_after: GIB,
        round_bytes_before: GIB,
        round_bytes_after: GIB,
    };
    assert_eq!(precopy.summary(), expected);
}

#[test]
fn an_overrun_is_retried_as_often_as_asked_with_more_to_spare_each_time() {
    let limits = Limits { downtime_limit: ms(100), overrun: Overrun::Retry { tries: 2 }, ..Limits::default() };
    let mut precopy = Precopy::new(limits);
    let mut now = Estimate { dirty_bytes: 90 * MIB, rate: 1000 * MIB, ..Estimate::default() };
    let budget = precopy.defer_budget_bytes(&now);
    for (rounds, over_percent) in [(1, 125), (2, 200)] {
        now.rounds = rounds;
        assert_eq!(precopy.decide(&now).decision, Decision::SwitchOver);
        assert!(precopy.overran(ms(over_percent)));
        assert_eq!(precopy.decide(&now).decision, Decision::AnotherRound);
        now.dirty_bytes = now.dirty_bytes * 100 / over_percent;
        assert_eq!(precopy.decide(&now).decision, Decision::SwitchOver, "after the overrun of {over_percent} %");
    }
    assert!(precopy.defer_budget_bytes(&now) < budget / 2);
    assert!(!precopy.overran(ms(200)), "the third is accepted");
    assert!(!Precopy::new(Limits::default()).overran(ms(1000)), "so is the first, unless told otherwise");
}

#[test]
fn a_switchover_that_was_not_expected_to_keep_the_limit_is_not_retried() {
    let limits = Limits { rounds_max: 1, at_limit: AtLimit::SwitchOver, ..Limits::default() };
    let mut precopy = Precopy::new(Limits { overrun: Overrun::Retry { tries: 5 }, ..limits });
    let now = Estimate { rounds: 1, dirty_bytes: GIB, rate: MIB, ..Estimate::default() };
    assert_eq!(precopy.decide(&now).decision, Decision::SwitchOver);
    assert!(!precopy.overran(Duration::from_secs(1024)));
}

#[test]
fn what_may_be_kept_back_is_half_of_what_fits() {
    let precopy = Precopy::new(Limits { downtime_limit: ms(111), ..Limits::default() });
    let now = Estimate { rate: 1000 * MIB, fixed_cost: ms(1), ..Estimate::default() };
    assert_eq!(precopy.defer_budget_bytes(&now), 50 * MIB);
    assert_eq!(precopy.defer_budget_bytes(&Estimate { rate: 0, ..now }), 0);
    assert_eq!(precopy.defer_budget_bytes(&Estimate { fixed_cost: ms(200), ..now }), 0);
    assert_eq!(precopy.defer_budget_bytes(&Estimate { rate: u64::MAX, ..now }), (u64::MAX as u128 * 50 / 1000) as u64);
}

#[test]
fn however_many_tries_overran_there_is_a_next_one_for_a_guest_that_fits() {
    let tries = Limits { overrun: Overrun::Retry { tries: u32::MAX }, ..Limits::default() };
    let mut precopy = Precopy::new(tries);
    let now = Estimate { dirty_bytes: MIB, rate: GIB, ..Estimate::default() };
    for rounds in 1..1000 {
        assert_eq!(precopy.decide(&Estimate { rounds, ..now }).decision, Decision::SwitchOver);
        assert!(precopy.overran(Duration::from_secs(1)));
    }
    assert!(precopy.defer_budget_bytes(&now) > 0);
}
