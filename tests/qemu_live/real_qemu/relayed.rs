//! Through a relay, while the guest still runs at the source.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{LINUX, Q35_7, Q35_10, judged, run, run_case};
use crate::case::{Case, Way, goes_on};
use crate::files::pages_in_use;
use crate::forwarder::Forwarder;
use crate::machine::{Lacking, Machine, PLAIN, Setup, Wire};
use crate::program;
use crate::qmp::PATIENCE;

fn relayed(setup: Setup, wire: Wire) -> Case {
    Case::new(setup, wire, Way::Relayed)
}

#[test]
fn a_guest_of_qemu_10_0_is_relayed() {
    run_case("a_guest_of_qemu_10_0_is_relayed", &relayed(Q35_10, PLAIN));
}

#[test]
fn a_guest_of_qemu_7_2_is_relayed() {
    run_case("a_guest_of_qemu_7_2_is_relayed", &relayed(Q35_7, Wire { channels: 3, ..PLAIN }));
}

#[test]
fn a_guest_is_relayed_without_channels() {
    run_case("a_guest_is_relayed_without_channels", &relayed(Q35_10, Wire { channels: 0, ..PLAIN }));
}

#[test]
fn a_guest_is_relayed_with_a_barrier_after_each_section() {
    let setup = Setup { machine: "pc-q35-8.0", ..Q35_10 };
    run_case("a_guest_is_relayed_with_a_barrier_after_each_section", &relayed(setup, Wire { channels: 8, ..PLAIN }));
}

#[test]
fn compressed_pages_are_relayed() {
    let wire = Wire { channels: 3, compression: "zstd", ..PLAIN };
    run_case("compressed_pages_are_relayed", &relayed(Q35_10, wire));
}

#[test]
fn a_guest_is_relayed_without_a_return_path() {
    run_case("a_guest_is_relayed_without_a_return_path", &relayed(Q35_10, Wire { return_path: false, ..PLAIN }));
}

#[test]
fn a_guest_is_relayed_whose_devices_are_not_described() {
    let setup = Setup { machine: "pc-q35-10.0,suppress-vmdesc=on", ..Q35_10 };
    run_case("a_guest_is_relayed_whose_devices_are_not_described", &relayed(setup, PLAIN));
}

/// What a channel says first: QEMU 10.0 dies of one whose number is that of the channels.
fn first_words(channel: u8) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
    bytes[24] = channel;
    bytes
}

#[test]
fn strangers_at_a_relay_do_not_reach_the_destination() {
    run("strangers_at_a_relay_do_not_reach_the_destination", || {
        let mut source = Machine::start(Q35_10, false)?;
        PLAIN.set(&mut source)?;
        source.wait_for_number(40);
        let mut destination = Machine::start(Q35_10, true)?;
        let address = destination.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        let mut relay = program::start(&["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &address, "--json"]);
        let at = relay.address();
        let one_too_many = first_words(PLAIN.channels);
        let strangers = [&b""[..], b"QE", b"QEVM", &one_too_many[..40], &one_too_many, &first_words(0)];
        let connect = |said: &[u8]| {
            let mut stranger = TcpStream::connect(&at).unwrap();
            stranger.write_all(said).unwrap();
            stranger
        };
        let before = strangers.map(connect);
        source.migrate_to(&at);
        assert_eq!(source.qmp.wait_for_migration(&["completed", "failed"]), "completed", "{}", source.query());
        assert_eq!(
            destination.qmp.wait_for_migration(&["completed", "failed"]),
            "completed",
            "{}",
            destination.errors()
        );
        drop(before);
        let report = relay.end();
        let report = report.expect(0, "completed");
        assert_eq!(report["channels"], PLAIN.channels, "{report}");
        let (ram, said) = source.quit();
        judged(goes_on(destination, &ram, &said))
    });
}

#[test]
fn linux_is_relayed() {
    run_case("linux_is_relayed", &relayed(LINUX, Wire { switchover_ack: true, ..PLAIN }));
}

/// Slow enough for a first round of seconds.
const SLOW: Wire = Wire { bandwidth: 4 << 20, ..PLAIN };

/// Looks into the destination's RAM during the source's first round, and lets the rest come after that.
fn pages_are_there_in_the_first_round(through: impl FnOnce(&str) -> String) -> Result<(), Lacking> {
    let mut source = Machine::start(Q35_10, false)?;
    SLOW.set(&mut source)?;
    source.wait_for_number(40);
    let mut destination = Machine::start(Q35_10, true)?;
    let address = destination.listen(&PLAIN, "tcp:127.0.0.1:0")?;
    source.migrate_to(&through(&address));
    let until = Instant::now() + PATIENCE;
    while pages_in_use(&destination.ram_path()) < 256 {
        assert!(Instant::now() < until, "no page comes: {}", source.query());
        thread::park_timeout(Duration::from_millis(5));
    }
    let said = source.query();
    assert_eq!((&said["status"], &said["ram"]["dirty-sync-count"]), (&json!("active"), &json!(1)), "{said}");
    assert!(source.qmp.runs(), "the guest runs meanwhile");
    source.qmp.run("migrate-set-parameters", json!({ "max-bandwidth": PLAIN.bandwidth }));
    assert_eq!(source.qmp.wait_for_migration(&["completed", "failed"]), "completed", "{}", source.query());
    assert_eq!(destination.qmp.wait_for_migration(&["completed", "failed"]), "completed", "{}", destination.errors());
    let (ram, said) = source.quit();
    judged(goes_on(destination, &ram, &said))
}

#[test]
fn this_rig_sees_pages_of_the_first_round() {
    run("this_rig_sees_pages_of_the_first_round", || {
        pages_are_there_in_the_first_round(|address| Forwarder::to(address.to_owned()).address.to_string())
    });
}

#[test]
fn the_destination_holds_pages_before_the_first_round_is_over() {
    run("the_destination_holds_pages_before_the_first_round_is_over", || {
        let mut relay = None;
        pages_are_there_in_the_first_round(|address| {
            let words = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", address, "--json"];
            relay.insert(program::start(&words)).address()
        })?;
        relay.expect("it was started").end().expect(0, "completed");
        Ok(())
    });
}
