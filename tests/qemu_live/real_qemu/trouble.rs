//! What goes wrong with real QEMU: somebody dies, cancels, says no, or has no business here.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Q35_10, judged, run};
use crate::case::{goes_on, holds};
use crate::machine::{Lacking, Machine, PLAIN, RICH, Scratch, Setup, Wire};
use crate::program::{self, Program};

/// Slow enough to be in mid-flight for as long as a test likes.
const SLOW: Wire = Wire { bandwidth: 1 << 20, ..PLAIN };

/// What must be over at once is over in far less than this.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A guest that counts, and a source that is ready to migrate.
fn source(setup: Setup, wire: Wire) -> Result<Machine, Lacking> {
    let mut source = Machine::start(setup, false)?;
    wire.set(&mut source)?;
    source.wait_for_number(40);
    Ok(source)
}

fn receive(out: &str) -> (Program, String) {
    let mut receive = program::start(&["qemu", "receive", "--listen", "127.0.0.1:0", "--out", out, "--json"]);
    let address = receive.address();
    (receive, address)
}

/// Waits until pages are on their way.
fn wait_until_active(source: &mut Machine) {
    source.qmp.wait_for_migration(&["active"]);
    // The state comes before the first page.
    source.serial.wait_for_more(9 * 200);
}

/// Nothing is left in the folder of a store that was not finished.
fn nothing_in(folder: &str) {
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The guest at the source goes on counting as if nothing had been.
fn runs_on(mut source: Machine) {
    assert!(source.qmp.runs(), "{}", source.query());
    source.serial.wait_for_more(9 * 2000);
    let numbers = source.setup.guest.numbers();
    let (_, said) = source.quit();
    assert!(numbers.count(&said).unwrap() > 2000);
}

#[test]
fn a_migration_that_the_source_cancels_leaves_no_store() {
    run("a_migration_that_the_source_cancels_leaves_no_store", || {
        let mut source = source(Q35_10, SLOW)?;
        let folder = Scratch::new();
        let (receive, address) = receive(&folder.file("store"));
        source.migrate_to(&address);
        wait_until_active(&mut source);
        source.qmp.run("migrate_cancel", json!({}));
        source.qmp.wait_for_migration(&["cancelled", "failed"]);
        receive.end().expect(1, "failed");
        nothing_in(&folder.file(""));
        runs_on(source);
        Ok(())
    });
}

#[test]
fn a_source_that_dies_leaves_no_store() {
    run("a_source_that_dies_leaves_no_store", || {
        let mut source = source(Q35_10, SLOW)?;
        let folder = Scratch::new();
        let (receive, address) = receive(&folder.file("store"));
        source.migrate_to(&address);
        wait_until_active(&mut source);
        source.kill();
        receive.end().expect(1, "failed");
        nothing_in(&folder.file(""));
        Ok(())
    });
}

#[test]
fn a_receiver_is_cancelled_while_the_source_is_stuck() {
    run("a_receiver_is_cancelled_while_the_source_is_stuck", || {
        let mut source = source(Q35_10, SLOW)?;
        let folder = Scratch::new();
        let (receive, address) = receive(&folder.file("store"));
        source.migrate_to(&address);
        wait_until_active(&mut source);
        program::signal("STOP", source.pid());
        let begun = Instant::now();
        receive.signal("INT");
        receive.end().expect(130, "cancelled");
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        nothing_in(&folder.file(""));
        program::signal("CONT", source.pid());
        source.qmp.wait_for_migration(&["failed"]);
        runs_on(source);
        Ok(())
    });
}

#[test]
fn a_source_learns_that_its_guest_could_not_be_stored_and_runs_on() {
    run("a_source_learns_that_its_guest_could_not_be_stored_and_runs_on", || {
        let mut source = source(Q35_10, SLOW)?;
        let folder = Scratch::new();
        std::fs::create_dir(folder.file("sub")).unwrap();
        let (receive, address) = receive(&folder.file("sub/store"));
        source.migrate_to(&address);
        wait_until_active(&mut source);
        // Where should it go now?
        std::fs::remove_dir_all(folder.file("sub")).unwrap();
        source.qmp.run("migrate-set-parameters", json!({ "max-bandwidth": PLAIN.bandwidth }));
        assert_eq!(source.qmp.wait_for_migration(&["completed", "failed"]), "failed", "{}", source.query());
        receive.end().expect(1, "failed");
        assert!(!Path::new(&folder.file("sub/store")).exists());
        runs_on(source);
        Ok(())
    });
}

/// Connections of people who have no business here: one is silent, one says too little, one begins as a channel would.
fn strangers(address: &str) -> Vec<TcpStream> {
    let begun_channel = [&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1][..], &[0; 32]].concat();
    let said: [&[u8]; 4] = [b"", b"QE", &begun_channel, b"GET / HTTP/1.1\r\n\r\n"];
    let stranger = |said: &[u8]| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(said).unwrap();
        stream
    };
    said.into_iter().map(stranger).collect()
}

#[test]
fn strangers_at_the_door_cost_nobody_else_anything() {
    run("strangers_at_the_door_cost_nobody_else_anything", || {
        let mut source = source(Q35_10, SLOW)?;
        let folder = Scratch::new();
        let store = folder.file("store");
        let (receive, address) = receive(&store);
        let before = strangers(&address);
        source.migrate_to(&address);
        wait_until_active(&mut source);
        let meanwhile = strangers(&address);
        source.qmp.run("migrate-set-parameters", json!({ "max-bandwidth": PLAIN.bandwidth }));
        assert_eq!(source.qmp.wait_for_migration(&["completed", "failed"]), "completed", "{}", source.query());
        judged(holds(&store, &receive.end(), &source))?;
        drop((before, meanwhile));
        Ok(())
    });
}

/// A store of a guest, made by the program, and the source that it was made of.
fn store(setup: Setup, folder: &Scratch) -> Result<(Machine, String), Lacking> {
    let mut source = source(setup, PLAIN)?;
    let store = folder.file("store");
    let (receive, address) = receive(&store);
    source.migrate_to(&address);
    source.qmp.wait_for_migration(&["completed", "failed"]);
    judged(holds(&store, &receive.end(), &source))?;
    Ok((source, store))
}

#[test]
fn a_destination_that_dies_while_it_takes_a_store_is_a_failure_and_the_store_is_as_good_as_before() {
    run("a_destination_that_dies_while_it_takes_a_store_is_a_failure_and_the_store_is_as_good_as_before", || {
        let folder = Scratch::new();
        let (source, store) = store(Q35_10, &folder)?;
        let mut dies = Machine::start(Q35_10, true)?;
        let address = dies.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        // More than sockets hold is on its way to somebody who does not read.
        program::signal("STOP", dies.pid());
        let mut send = program::start(&["qemu", "send", "--to", &address, "--in", &store, "--json"]);
        send.wait_for("it was on its way", |line| line["event"] == "progress");
        dies.kill();
        let ended = send.end();
        assert!(matches!(ended.code, Some(1 | 3)), "{ended:#?}");

        let mut destination = Machine::start(Q35_10, true)?;
        let address = destination.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        program::run(&["qemu", "send", "--to", &address, "--in", &store]).expect(0, "completed");
        let (ram, said) = source.quit();
        judged(goes_on(destination, &ram, &said))
    });
}

#[test]
fn a_sender_is_cancelled_while_the_destination_is_stuck() {
    run("a_sender_is_cancelled_while_the_destination_is_stuck", || {
        let folder = Scratch::new();
        let (_source, store) = store(Q35_10, &folder)?;
        let mut stuck = Machine::start(Q35_10, true)?;
        let address = stuck.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        program::signal("STOP", stuck.pid());
        let mut send = program::start(&["qemu", "send", "--to", &address, "--in", &store, "--json"]);
        send.wait_for("it was on its way", |line| line["event"] == "progress");
        let begun = Instant::now();
        send.signal("INT");
        send.end().expect(130, "cancelled");
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        Ok(())
    });
}

/// What lacks a device that the source has: it fails when the state of that comes, after all RAM.
const LESS: Setup = Setup { devices: &[RICH[0], RICH[1], RICH[2], RICH[4]], ..Q35_10 };

#[test]
fn a_destination_that_cannot_load_a_store_is_reported() {
    run("a_destination_that_cannot_load_a_store_is_reported", || {
        let folder = Scratch::new();
        let (_source, store) = store(Setup { devices: RICH, ..Q35_10 }, &folder)?;
        let mut destination = Machine::start(LESS, true)?;
        let address = destination.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        program::run(&["qemu", "send", "--to", &address, "--in", &store]).expect(1, "failed");
        assert_eq!(destination.qmp.wait_for_migration(&["completed", "failed"]), "failed");
        Ok(())
    });
}

#[test]
fn a_source_learns_from_a_relay_that_the_destination_failed_and_runs_on() {
    run("a_source_learns_from_a_relay_that_the_destination_failed_and_runs_on", || {
        let mut source = source(Setup { devices: RICH, ..Q35_10 }, PLAIN)?;
        let mut destination = Machine::start(LESS, true)?;
        let address = destination.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        let words = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &address, "--json"];
        let mut relay = program::start(&words);
        source.migrate_to(&relay.address());
        assert_eq!(source.qmp.wait_for_migration(&["completed", "failed"]), "failed", "{}", source.query());
        relay.end().expect(1, "failed");
        runs_on(source);
        Ok(())
    });
}

#[test]
fn a_source_runs_on_when_the_destination_behind_a_relay_dies() {
    run("a_source_runs_on_when_the_destination_behind_a_relay_dies", || {
        let mut source = source(Q35_10, SLOW)?;
        let mut destination = Machine::start(Q35_10, true)?;
        let address = destination.listen(&PLAIN, "tcp:127.0.0.1:0")?;
        let words = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &address, "--json"];
        let mut relay = program::start(&words);
        source.migrate_to(&relay.address());
        wait_until_active(&mut source);
        destination.kill();
        source.qmp.wait_for_migration(&["failed"]);
        relay.end().expect(1, "failed");
        runs_on(source);
        Ok(())
    });
}

#[test]
fn a_source_runs_on_when_the_destination_behind_a_relay_wants_one_channel_more() {
    run("a_source_runs_on_when_the_destination_behind_a_relay_wants_one_channel_more", || {
        let mut source = source(Q35_10, PLAIN)?;
        let mut destination = Machine::start(Q35_10, true)?;
        let more = Wire { channels: PLAIN.channels + 1, ..PLAIN };
        let address = destination.listen(&more, "tcp:127.0.0.1:0")?;
        let words = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &address, "--json"];
        let mut relay = program::start(&words);
        source.migrate_to(&relay.address());
        source.qmp.wait_for_migration(&["failed"]);
        let ended = relay.end();
        let report = ended.expect(1, "failed");
        assert!(report["error"].as_str().unwrap().contains("are multifd and multifd-channels the same"), "{report}");
        runs_on(source);
        Ok(())
    });
}
