//! Channels die, and all connections with them: the migration goes on over what is left, and nothing is lost.
#![cfg(not(loom))]

#[cfg(feature = "tls")]
#[path = "support/certs.rs"]
mod certs;
#[path = "failover/cutter.rs"]
mod cutter;
#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use cutter::{Cutter, Plan};
use pageferry::source::SourceBuilder;
use pageferry::target::TargetBuilder;
use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Failure, Outcome, Ram, Source, Target, Timeouts, Verify};
use vmm::{TestGuest, TestIncoming, Trip};

const MIB: u64 = 1 << 20;

fn timeouts() -> Timeouts {
    let ms = Duration::from_millis;
    Timeouts { connect: ms(2000), hello: ms(1000), silence: ms(3000), hook: ms(5000), stall: ms(2000) }
}

fn ram(mib: u64) -> Ram {
    let ram = vmm::ram(PageSize::SIZE_4K, &[mib << 8]);
    vmm::fill(&ram, 1);
    ram
}

/// A migration through a proxy with this plan.
fn travel(
    guest: &mut TestGuest,
    plan: Box<Plan>,
    source: impl FnOnce(SourceBuilder) -> SourceBuilder,
    target: impl FnOnce(TargetBuilder) -> TargetBuilder,
    prepare: impl FnOnce(&mut TestGuest, &mut TestIncoming, &Cutter),
) -> Trip {
    let target = target(Target::builder().timeouts(timeouts())).listen("127.0.0.1:0").unwrap();
    let cutter = Cutter::before(&target.address().unwrap().to_string(), plan);
    let builder = Source::builder(guest.ram.clone()).verify(Verify::Full).timeouts(timeouts());
    let source = source(builder.channels(4)).connect(cutter.address()).unwrap();
    let mut incoming = TestIncoming::new();
    prepare(guest, &mut incoming, &cutter);
    let mut dirty = guest.dirty.clone();
    vmm::travel(source, &mut dirty, guest, target, incoming)
}

fn guest_of(ram: &Ram) -> TestGuest {
    TestGuest::new(ram, &DirtyBitmap::for_ram(ram))
}

/// Data connections 1 to this many are cut after so many bytes, each later than the one before.
fn cut_first(count: usize, bytes: u64) -> Box<Plan> {
    Box::new(move |number| (1..=count).contains(&number).then(|| bytes * number as u64))
}

#[test]
fn three_of_four_channels_die_and_the_guest_arrives() {
    let ram = ram(48);
    let mut guest = guest_of(&ram);
    guest.start(500);
    let trip = travel(&mut guest, cut_first(3, 2 * MIB), |s| s, |t| t, |_, _, _| {});
    vmm::assert_arrived(&guest, &trip);
    let sent = &trip.sent;
    // Those in their place may come when the guest is about to pause, and are not waited for.
    let too_late = sent.remarks.iter().filter(|remark| remark.contains("paused before it had joined")).count();
    assert_eq!(sent.channels_lost as usize, 3 + too_late, "{:?}", sent.remarks);
    assert!(sent.reshipped_bytes > 0 && sent.reshipped_bytes <= 48 * MIB, "{}", sent.reshipped_bytes);
    println!("{} reconnects, {} MiB again, {:?}", sent.reconnects, sent.reshipped_bytes / MIB, sent.remarks);
}

#[test]
fn all_channels_die_at_once_again_and_again_and_the_guest_arrives() {
    let ram = ram(48);
    let mut guest = guest_of(&ram);
    guest.start(500);
    let plan = |number: usize| (1..=12).contains(&number).then_some(3 * MIB);
    let trip = travel(&mut guest, Box::new(plan), |s| s, |t| t, |_, _, _| {});
    vmm::assert_arrived(&guest, &trip);
    assert!(trip.sent.channels_lost >= 8 && trip.sent.reconnects >= 4, "{:?}", trip.sent);
}

#[test]
fn channels_die_while_the_guest_is_paused_and_it_arrives() {
    let ram = ram(32);
    let mut guest = guest_of(&ram);
    guest.start(2000);
    let trip = travel(
        &mut guest,
        Box::new(|_| None),
        |s| s.downtime_limit(Duration::from_secs(5)),
        |t| t,
        |guest, _, cutter| {
            // All but the control connection, the oldest.
            let cut = cutter.data_scissors();
            guest.on_pause = Some(Box::new(move || cut(3)));
        },
    );
    vmm::assert_arrived(&guest, &trip);
    assert_eq!(trip.sent.channels_lost, 3, "{:?}", trip.sent.remarks);
}

#[test]
fn everything_dies_and_the_session_is_taken_up_again() {
    for paused in [false, true] {
        let ram = ram(32);
        let mut guest = guest_of(&ram);
        guest.start(200);
        let window = Duration::from_secs(5);
        let cap = if paused { 0 } else { 60 * MIB };
        let trip = travel(
            &mut guest,
            Box::new(|_| None),
            |s| s.resume_window(window).bandwidth_max(cap),
            |t| t.resume_window(window),
            |guest, _, cutter| {
                let cut = cutter.scissors();
                if paused {
                    let mut once = Some(cut);
                    guest.on_pause = Some(Box::new(move || {
                        if let Some(cut) = once.take() {
                            cut();
                        }
                    }));
                } else {
                    cutter.cut_after(10 * MIB, cut);
                }
            },
        );
        assert_eq!(trip.sent.outcome, Outcome::Completed, "{:?}", trip.sent.remarks);
        assert_eq!((trip.sent.resumes, trip.received.resumes), (1, 1), "{:?}", trip.sent.remarks);
        assert_eq!(vmm::first_difference(&guest.ram, trip.incoming.ram.as_ref().unwrap()), None);
        assert_eq!(guest.resumed, u32::from(paused), "it ran on here meanwhile");
        assert_eq!(trip.incoming.runs, 1);
    }
}

#[test]
fn without_a_window_the_loss_of_the_control_connection_ends_it_and_the_guest_stays() {
    let ram = ram(16);
    let mut guest = guest_of(&ram);
    let trip = travel(
        &mut guest,
        Box::new(|_| None),
        |s| s.bandwidth_max(40 * MIB),
        |t| t.resume_window(Duration::from_secs(5)),
        |_, _, cutter| cutter.cut_after(4 * MIB, cutter.control_scissors()),
    );
    assert!(matches!(trip.sent.outcome, Outcome::Failed(_)), "{}", trip.sent.outcome);
    assert_eq!((guest.resumed, trip.incoming.runs), (guest.paused, 0));
}

#[test]
fn when_the_window_ends_both_sides_say_so_and_the_guest_stays() {
    for paused in [false, true] {
        let ram = ram(16);
        let mut guest = guest_of(&ram);
        let window = Duration::from_millis(700);
        // All that there is is cut, in the middle of it all, and every connection that comes later.
        let plan = |number: usize| (number > 4).then_some(0);
        let cap = if paused { 0 } else { 40 * MIB };
        let trip = travel(
            &mut guest,
            Box::new(plan),
            |s| s.resume_window(window).bandwidth_max(cap),
            |t| t.resume_window(window),
            |guest, _, cutter| {
                let cut = cutter.scissors();
                if paused {
                    guest.on_pause = Some(Box::new(cut));
                } else {
                    cutter.cut_after(4 * MIB, cut);
                }
            },
        );
        let not_resumed = |outcome: &Outcome| matches!(outcome, Outcome::Failed(Failure::NotResumed { .. }));
        assert!(not_resumed(&trip.sent.outcome), "{}", trip.sent.outcome);
        assert!(not_resumed(&trip.received.outcome), "{}", trip.received.outcome);
        assert_eq!((guest.paused, guest.resumed, trip.incoming.runs), (u32::from(paused), u32::from(paused), 0));
    }
}

#[test]
fn a_network_that_is_down_costs_the_channels_on_it_and_not_the_migration() {
    // Nobody listens on port 1.
    let dead = "127.0.0.1:1";
    for dead_first in [false, true] {
        let ram = ram(32);
        let mut guest = guest_of(&ram);
        guest.start(300);
        let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
        let live = target.address().unwrap().to_string();
        let to = if dead_first { [dead, &live] } else { [&live, dead] };
        let builder = Source::builder(ram).channels(4).verify(Verify::Full).bandwidth_max(100 * MIB);
        let source = builder.timeouts(timeouts()).connect_any(to).unwrap();
        let mut dirty = guest.dirty.clone();
        let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        vmm::assert_arrived(&guest, &trip);
        let sent = &trip.sent;
        assert_eq!((sent.channels_lost, sent.reconnects, sent.resumes), (2, 2, 0), "{:?}", sent.remarks);
        assert!(sent.remarks.iter().any(|remark| remark.contains(dead)), "{:?}", sent.remarks);
    }
}

#[test]
fn where_no_network_answers_the_first_address_is_not_blamed_for_all() {
    let ram = ram(1);
    let mut guest = guest_of(&ram);
    let source = Source::builder(ram).timeouts(timeouts()).connect_any(["127.0.0.1:1", "127.0.0.1:2"]).unwrap();
    let report = source.migrate(&mut guest.dirty.clone(), &mut guest);
    assert!(matches!(&report.outcome, Outcome::Failed(Failure::Connect { .. })), "{}", report.outcome);
    let none: [&str; 0] = [];
    assert!(matches!(Source::builder(guest.ram.clone()).connect_any(none), Err(Failure::Config(_))));
}

#[test]
#[cfg(feature = "tls")]
fn a_session_of_which_everything_is_lost_is_taken_up_again_encrypted() {
    let ca = certs::Ca::new("ca");
    let ram = ram(32);
    let mut guest = guest_of(&ram);
    guest.start(100);
    let window = Duration::from_secs(10);
    let trip = travel(
        &mut guest,
        Box::new(|_| None),
        |s| s.resume_window(window).bandwidth_max(60 * MIB).tls(ca.side(&["source"])),
        |t| t.resume_window(window).tls(ca.side(&["127.0.0.1"])),
        |_, _, cutter| cutter.cut_after(10 * MIB, cutter.scissors()),
    );
    vmm::assert_arrived(&guest, &trip);
    assert_eq!((trip.sent.resumes, trip.received.resumes), (1, 1), "{:?}", trip.sent.remarks);
    assert!(trip.sent.tls.is_some());
}
