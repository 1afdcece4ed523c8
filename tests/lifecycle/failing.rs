//! Hooks of the VMM that fail, one after the other: the guest keeps one owner, and the other side hears why.

use pageferry::{Failure, Outcome, Source, SourceReport, Target};

use super::leaks::alone;
use super::vmm::{self, TestGuest, TestIncoming, Transport, Trip};

/// A migration in which what `set` has set fails.
fn travel(set: impl FnOnce(&mut TestGuest, &mut TestIncoming)) -> (TestGuest, Trip) {
    let mut guest = super::guest(50);
    guest.start(10);
    let mut incoming = TestIncoming::new();
    set(&mut guest, &mut incoming);
    let (source, target) = Transport::Tcp4.connect(Source::builder(guest.ram.clone()), Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, incoming);
    (guest, trip)
}

fn says(report: &SourceReport, what: &str) -> bool {
    matches!(report.outcome, Outcome::Failed(_)) && report.outcome.to_string().contains(what)
}

#[test]
fn a_machine_that_prepare_refuses_stays_and_the_source_hears_why() {
    alone("failing::a_machine_that_prepare_refuses_stays_and_the_source_hears_why", || {
        let (guest, trip) = travel(|_, incoming| incoming.refuse = Some("no AVX-512 here".to_owned()));
        vmm::assert_stayed(&guest, &trip);
        assert!(says(&trip.sent, "the target refused this machine: no AVX-512 here"), "{}", trip.sent.outcome);
        assert_eq!((guest.paused, trip.received.payload_bytes), (0, 0));
    });
}

#[test]
fn memory_of_another_shape_is_refused_and_the_preparation_undone() {
    alone("failing::memory_of_another_shape_is_refused_and_the_preparation_undone", || {
        let (guest, trip) = travel(|_, incoming| {
            incoming.make = Box::new(|name, gpa, bytes, page_size| {
                let backing = pageferry::memory::Backing::Base;
                pageferry::RamBlock::anonymous(name, gpa, bytes + page_size.bytes(), page_size, backing).unwrap()
            });
        });
        vmm::assert_stayed(&guest, &trip);
        assert!(says(&trip.sent, "block 0 has 204800 bytes in pages of 4096, 208896 bytes"), "{}", trip.sent.outcome);
    });
}

#[test]
fn a_pause_that_fails_leaves_the_guest_alone() {
    alone("failing::a_pause_that_fails_leaves_the_guest_alone", || {
        let (mut guest, trip) = travel(|guest, _| guest.fail_pause = Some("a device is busy".to_owned()));
        guest.stop();
        vmm::assert_stayed(&guest, &trip);
        assert_eq!((guest.paused, guest.resumed), (0, 0), "by contract it runs: nobody may resume it");
        assert!(says(&trip.sent, "pause hook failed: a device is busy"), "{}", trip.sent.outcome);
        assert!(trip.received.outcome.to_string().contains("a device is busy"), "{}", trip.received.outcome);
    });
}

#[test]
fn a_state_that_cannot_be_saved_or_loaded_lets_the_guest_run_on() {
    alone("failing::a_state_that_cannot_be_saved_or_loaded_lets_the_guest_run_on", || {
        let (guest, trip) = travel(|guest, _| guest.fail_save = Some("a disk is gone".to_owned()));
        vmm::assert_stayed(&guest, &trip);
        assert_eq!((guest.paused, guest.resumed), (1, 1));
        assert!(says(&trip.sent, "save_state hook failed: a disk is gone"), "{}", trip.sent.outcome);
        assert!(trip.received.outcome.to_string().contains("a disk is gone"), "{}", trip.received.outcome);

        let (guest, trip) = travel(|_, incoming| incoming.fail_load = Some("another disk".to_owned()));
        vmm::assert_stayed(&guest, &trip);
        assert_eq!((guest.paused, guest.resumed), (1, 1));
        assert!(says(&trip.sent, "load_state hook failed: another disk"), "{}", trip.sent.outcome);
    });
}

#[test]
fn a_run_that_fails_gives_the_guest_back() {
    alone("failing::a_run_that_fails_gives_the_guest_back", || {
        let (guest, trip) = travel(|_, incoming| incoming.fail_run = Some("no vCPU".to_owned()));
        assert_eq!(trip.sent.outcome, Outcome::Failed(Failure::RunFailed("no vCPU".to_owned())));
        assert_eq!((guest.paused, guest.resumed), (1, 1));
        assert!(trip.received.outcome.to_string().contains("run hook failed: no vCPU"), "{}", trip.received.outcome);
        assert_eq!((trip.incoming.runs, trip.incoming.discards), (1, 1), "asked to run once, and undone");
        assert!(trip.sent.downtime > std::time::Duration::ZERO);
    });
}

#[test]
fn an_address_where_nobody_listens_is_named() {
    alone("failing::an_address_where_nobody_listens_is_named", || {
        // A port that was free a moment ago: nobody has it, as it was never given away.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = listener.local_addr().unwrap().to_string();
        drop(listener);
        for to in [tcp, vmm::unix_address()] {
            let mut guest = super::guest(10);
            let source = Source::builder(guest.ram.clone()).connect(&to).unwrap();
            let mut dirty = guest.dirty.clone();
            let report = source.migrate(&mut dirty, &mut guest);
            assert!(says(&report, &format!("cannot connect to {to}")), "{}", report.outcome);
            assert_eq!(guest.paused, 0);
        }
    });
}

#[test]
fn an_address_that_is_taken_is_named() {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let (_source, target) = transport.connect(Source::builder(super::guest(1).ram.clone()), Target::builder(), 1);
        let taken = target.address().unwrap().to_string();
        let why = Target::builder().listen(&taken).unwrap_err().to_string();
        assert!(why.contains(&format!("cannot listen on {taken}")), "{why}");
    }
}

#[test]
fn limits_without_end_are_limits_too() {
    let longest = std::time::Duration::MAX;
    let timeouts =
        pageferry::Timeouts { connect: longest, hello: longest, silence: longest, hook: longest, stall: longest };
    let mut guest = super::guest(50);
    let source = Source::builder(guest.ram.clone()).timeouts(timeouts).downtime_limit(longest);
    let (source, target) = Transport::Tcp4.connect(source, Target::builder().timeouts(timeouts), 2);
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
    vmm::assert_arrived(&guest, &trip);
}
