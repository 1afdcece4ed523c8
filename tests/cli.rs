//! The program as its users meet it: processes, files, exit codes, and what it says.
#![cfg(all(not(loom), feature = "cli"))]
#![forbid(unsafe_code)]

#[path = "support/program.rs"]
mod program;
#[path = "support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use program::{Folder, StallingLink, number, run, start};
use serde_json::Value;

/// Everything that the report promises, and that its numbers fit each other.
fn check_numbers(report: &Value) {
    for field in ["wire_bytes", "state_bytes", "rounds", "channels"] {
        number(report, field);
    }
    for field in ["total_ms", "downtime_ms", "throughput_gib_s", "cpu_s"] {
        assert!(report[field].as_f64().is_some_and(|x| x >= 0.0), "{field} in {report}");
    }
    assert!(report["remarks"].is_array(), "{report}");
    assert_eq!(report["cpus"].as_array().unwrap().len() as u64, number(report, "channels"), "{report}");
    let [ram, payload, zero, untouched] =
        ["ram_bytes", "payload_bytes", "zero_bytes", "untouched_bytes"].map(|field| number(report, field));
    assert!(untouched <= ram, "{report}");
    // Pages that are sent again count again.
    assert!(payload + zero + untouched >= ram, "{report}");
    assert!(number(report, "wire_bytes") > payload, "{report}");
}

#[test]
fn a_demo_completes_however_it_travels_and_is_verified() {
    // A build without optimisation hashes some 100 MiB a second: more RAM, or more writes, would take long.
    for (ram, transport, verify, channels, tracking) in [
        ("64M", "tcp", "full", "1", "auto"),
        ("16M", "unix", "wire", "2", "auto"),
        ("64M", "tcp", "off", "3", "bitmap"),
        ("16M", "unix", "full", "8", "auto"),
        ("16M", "tcp", "wire", "8", "bitmap"),
        ("64M", "unix", "off", "2", "auto"),
    ] {
        let how = ["--transport", transport, "--verify", verify, "--channels", channels, "--tracking", tracking];
        let ended = run(&[&["demo", "--ram", ram, "--writers", "2", "--dirty-rate", "10"], &how[..]].concat());
        let report = ended.expect(0, "completed");
        assert_eq!(report["verified"], verify != "off", "{report}");
        assert_eq!((report["verify"].as_str(), report["transport"].as_str()), (Some(verify), Some(transport)));
        assert_eq!(report["channels"].to_string(), channels);
        check_numbers(report);
        assert!(number(report, "pages_written") > 0, "{report}");
        assert!(number(report, "send_syscalls") > 0 && number(report, "recv_syscalls") > 0, "{report}");
        // The target's process has found the writers' last writes where the device state says that they are.
        assert_eq!(report["target"]["writers_checked"], 2, "{report}");
        assert_eq!(report["target"]["outcome"], "completed", "{report}");
        assert_eq!(ended.stderr, "", "{report}");
    }
}

#[test]
fn a_guest_that_nobody_writes_is_shipped_once_and_counted_to_the_byte() {
    let ended = run(&["demo", "--ram", "32M", "--dirty-rate", "0", "--verify", "full"]);
    let report = ended.expect(0, "completed");
    check_numbers(report);
    assert_eq!(number(report, "payload_bytes"), number(report, "random_bytes") + number(report, "text_bytes"));
    assert_eq!(number(report, "zero_bytes"), number(report, "zeroed_bytes"));
    assert_eq!(number(report, "untouched_bytes"), number(report, "never_touched_bytes"));
    assert_eq!(number(report, "ram_bytes"), 32 << 20);
}

#[test]
fn the_seed_decides_what_ram_holds() {
    let digest = |seed: &str| {
        let ended = run(&["demo", "--ram", "8M", "--seed", seed, "--dirty-rate", "10"]);
        ended.expect(0, "completed")["ram_digest"].as_str().unwrap().to_owned()
    };
    assert_eq!(digest("7"), digest("7"));
    assert_ne!(digest("7"), digest("8"));
}

#[test]
fn a_guest_that_outruns_the_link_stays_and_runs_on() {
    // No downtime at all can be kept, whatever the guest does.
    let ended = run(&["demo", "--ram", "16M", "--dirty-rate", "200", "--downtime-limit", "0", "--verify", "wire"]);
    let report = ended.expect(1, "failed");
    assert!(report["error"].as_str().unwrap().contains("a hand-over takes"), "{report}");
    assert_eq!(report["guest_runs_on"], true, "{report}");
    assert_eq!(report["downtime_ms"], 0.0, "{report}");
}

/// A demo that goes on for long enough to be disturbed.
fn long_demo() -> program::Program {
    start(&["demo", "--ram", "128M", "--dirty-rate", "4000", "--downtime-limit", "0", "--transport", "unix", "--json"])
}

#[test]
fn ctrl_c_leaves_the_demo_guest_running_and_no_process_behind() {
    let mut demo = long_demo();
    let target = demo.wait_for("the target was there", |line| line["event"] == "target");
    demo.wait_for_pages();
    demo.signal("INT");
    let ended = demo.end();
    let report = ended.expect(130, "cancelled");
    assert_eq!(report["guest_runs_on"], true, "{report}");
    assert!(!program::runs(number(&target, "pid") as u32), "the target's process has outlived its starter");
    let socket = target["addr"].as_str().unwrap().strip_prefix("unix:").unwrap().to_owned();
    assert!(!fs::exists(std::path::Path::new(&socket).parent().unwrap()).unwrap(), "{socket} is left");
}

#[test]
fn the_target_of_a_demo_that_is_killed_ends_by_itself() {
    let mut demo = long_demo();
    let target = demo.wait_for("the target was there", |line| line["event"] == "target");
    demo.wait_for_pages();
    demo.signal("KILL");
    program::wait_until_gone(number(&target, "pid") as u32);
    let socket = target["addr"].as_str().unwrap().strip_prefix("unix:").unwrap().to_owned();
    assert!(!fs::exists(std::path::Path::new(&socket).parent().unwrap()).unwrap(), "{socket} is left");
}

/// An image of this length with data at these places, each of a length of its own.
fn image(path: &str, bytes: u64, data: &[(u64, usize)]) {
    let mut file = File::create(path).unwrap();
    for &(at, length) in data {
        file.seek(SeekFrom::Start(at)).unwrap();
        // Of an odd length, so that no two pages are alike for long.
        let unit: Vec<_> = (0..4099).map(|i| (((at + i) * 2_654_435_761) >> 7) as u8).collect();
        file.write_all(&unit.repeat(length / unit.len() + 1)[..length]).unwrap();
    }
    file.set_len(bytes).unwrap();
}

/// Sends one file to another over an address; checks that both ends are content and the bytes the same.
fn ship(listen: &str, from: &str, to: &str, options: &[&str]) -> (Value, Value) {
    let mut receiver = start(&["receive", "--listen", listen, "--ram", to, "--json"]);
    let address = receiver.address();
    let sent = run(&[&["send", "--to", &address, "--ram", from], options].concat());
    let received = receiver.end();
    assert_eq!((&*sent.stderr, &*received.stderr), ("", ""));
    let (sent, received) = (sent.expect(0, "completed").clone(), received.expect(0, "completed").clone());
    assert!(fs::read(from).unwrap() == fs::read(to).unwrap(), "the files differ: {sent} {received}");
    check_numbers(&sent);
    check_numbers(&received);
    assert!(number(&received, "recv_syscalls") > 0);
    (sent, received)
}

#[test]
fn images_arrive_to_the_byte_whatever_their_length() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from"), folder.file("to"));
    for (bytes, data, options) in [
        (4096, &[(0, 4096)][..], &["--channels", "1"][..]),
        (1, &[(0, 1)], &["--channels", "8"]),
        (4097, &[(4096, 1)], &["--verify", "off"]),
        ((3 << 20) + 123, &[(0, 5000), (3 << 20, 123)], &["--verify", "full", "--channels", "3"]),
        (5 << 20, &[], &[]),
    ] {
        image(&from, bytes, data);
        // The receiver refuses a file of another length.
        let _ = fs::remove_file(&to);
        let (sent, received) = ship("127.0.0.1:0", &from, &to, options);
        let shipped = bytes.next_multiple_of(4096);
        assert_eq!((number(&sent, "ram_bytes"), number(&received, "ram_bytes")), (shipped, shipped));
        let sum: u64 =
            ["payload_bytes", "zero_bytes", "untouched_bytes"].map(|field| number(&sent, field)).iter().sum();
        assert_eq!(sum, shipped, "{sent}");
        assert_eq!(sent["verified"], !options.contains(&"off"));
    }
    assert_eq!(folder.names(), ["from", "to"]);
}

#[test]
fn holes_stay_holes_and_zeros_become_holes() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from"), folder.file("to"));
    let socket = format!("unix:{}", folder.file("socket"));
    image(&from, 64 << 20, &[(1 << 20, 1 << 20), (40 << 20, 300_000)]);
    let mut file = fs::OpenOptions::new().write(true).open(&from).unwrap();
    file.seek(SeekFrom::Start(20 << 20)).unwrap();
    file.write_all(&vec![0; 4 << 20]).unwrap();
    drop(file);
    let (sent, _) = ship(&socket, &from, &to, &["--channels", "4"]);
    // The last page of a file always counts as one that exists.
    assert_eq!(number(&sent, "zero_bytes"), (4 << 20) + 4096);
    let kept = fs::metadata(&to).unwrap().blocks() * 512;
    assert!(kept < 3 << 20, "{kept} bytes of disk for 1.3 MiB of data");
    assert_eq!(folder.names(), ["from", "to"], "the socket's file is gone, too");
}

#[test]
fn a_file_of_the_same_length_is_replaced_and_one_of_another_only_by_force() {
    let folder = Folder::new();
    let (from, to) = (folder.file("from"), folder.file("to"));
    image(&from, 8192, &[(0, 8192)]);
    image(&to, 8192, &[(100, 10)]);
    ship("127.0.0.1:0", &from, &to, &[]);

    image(&to, 5000, &[(0, 5000)]);
    let before = fs::read(&to).unwrap();
    let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &to, "--json"]);
    let sent = run(&["send", "--to", &receiver.address(), "--ram", &from]);
    for ended in [sent, receiver.end()] {
        let error = ended.expect(1, "failed")["error"].as_str().unwrap().to_owned();
        assert!(error.contains("has 5000 bytes") && error.contains("--force"), "both sides hear it: {error}");
    }
    assert!(fs::read(&to).unwrap() == before, "it is as it was");
    assert_eq!(folder.names(), ["from", "to"]);

    let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &to, "--force", "--json"]);
    run(&["send", "--to", &receiver.address(), "--ram", &from]).expect(0, "completed");
    receiver.end().expect(0, "completed");
    assert!(fs::read(&to).unwrap() == fs::read(&from).unwrap());
}

/// A transfer that stands still in its middle.
fn stalled(folder: &Folder) -> (program::Program, program::Program, StallingLink) {
    let from = folder.file("from");
    // More than fits into queues and sockets' buffers: the rest of it is read when the transfer goes on.
    image(&from, 64 << 20, &[(0, 60 << 20)]);
    let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &folder.file("to"), "--json"]);
    let link = StallingLink::to(&receiver.address());
    let mut sender = start(&["send", "--to", &link.address.to_string(), "--ram", &from, "--json"]);
    sender.wait_for_pages();
    receiver.wait_for_pages();
    let partial = format!(".to.pageferry-{}.partial", receiver.pid());
    assert_eq!(folder.names(), [partial.as_str(), "from"], "it is in its middle");
    (sender, receiver, link)
}

#[test]
fn a_sender_that_is_cancelled_says_so_and_the_receiver_keeps_nothing() {
    let folder = Folder::new();
    let (sender, receiver, _link) = stalled(&folder);
    sender.signal("INT");
    sender.end().expect(130, "cancelled");
    let received = receiver.end();
    let error = received.expect(1, "failed")["error"].as_str().unwrap().to_owned();
    assert!(error.contains("cancelled"), "{error}");
    assert_eq!(folder.names(), ["from"]);
}

#[test]
fn a_receiver_that_is_cancelled_tells_the_sender_and_keeps_nothing() {
    let folder = Folder::new();
    let (sender, receiver, _link) = stalled(&folder);
    receiver.signal("TERM");
    receiver.end().expect(130, "cancelled");
    let sent = sender.end();
    let error = sent.expect(1, "failed")["error"].as_str().unwrap().to_owned();
    assert!(error.contains("cancelled at the target"), "{error}");
    assert_eq!(folder.names(), ["from"]);
}

#[test]
fn a_sender_that_dies_leaves_nothing_at_the_receiver() {
    let folder = Folder::new();
    let (sender, receiver, _link) = stalled(&folder);
    sender.signal("KILL");
    receiver.end().expect(1, "failed");
    assert_eq!(folder.names(), ["from"]);
}

#[test]
fn a_transfer_that_stood_still_goes_on() {
    let folder = Folder::new();
    let (sender, receiver, link) = stalled(&folder);
    link.release(2);
    sender.end().expect(0, "completed");
    receiver.end().expect(0, "completed");
    assert!(fs::read(folder.file("from")).unwrap() == fs::read(folder.file("to")).unwrap());
}

#[test]
fn an_image_that_is_written_or_cut_short_meanwhile_is_not_handed_over() {
    for (new_length, said) in [(64 << 20, "was written while it was sent"), (4096, "let it lie still")] {
        let folder = Folder::new();
        let (sender, receiver, link) = stalled(&folder);
        let mut file = fs::OpenOptions::new().write(true).open(folder.file("from")).unwrap();
        file.write_all(b"a write").unwrap();
        file.set_len(new_length).unwrap();
        link.release(2);
        let sent = sender.end();
        let error = sent.expect(1, "failed")["error"].as_str().unwrap().to_owned();
        assert!(error.contains(said), "{error}");
        receiver.end().expect(1, "failed");
        assert_eq!(folder.names(), ["from"]);
    }
}

#[test]
fn ctrl_c_ends_a_receiver_that_nobody_came_to_and_a_sender_that_nobody_answers() {
    let folder = Folder::new();
    let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &folder.file("to"), "--json"]);
    receiver.address();
    receiver.signal("INT");
    receiver.end().expect(130, "cancelled");
    assert_eq!(folder.names(), [""; 0]);

    let from = folder.file("from");
    image(&from, 4096, &[(0, 1)]);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = silent.local_addr().unwrap().to_string();
    let sender = start(&["send", "--to", &to, "--ram", &from, "--json"]);
    let _connection = silent.accept().unwrap();
    sender.signal("INT");
    sender.end().expect(130, "cancelled");
}

#[test]
fn what_is_wrong_is_said_in_one_sentence() {
    let folder = Folder::new();
    let (good, empty, absent) = (folder.file("good"), folder.file("empty"), folder.file("absent"));
    image(&good, 4096, &[(0, 1)]);
    image(&empty, 0, &[]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let here = folder.path().to_str().unwrap();
    let nowhere = format!("{absent}/file");
    for (arguments, parts) in [
        // Port 1 is nobody's.
        (["send", "--to", "127.0.0.1:1", "--ram", &good], ["127.0.0.1:1", "os error 111", "listening there"]),
        (["send", "--to", "127.0.0.1:1", "--ram", &absent], [&*absent, "os error 2", "check the path"]),
        (["send", "--to", "127.0.0.1:1", "--ram", here], [here, "os error 21", "name a file"]),
        (["send", "--to", "127.0.0.1:1", "--ram", &empty], [&*empty, "is empty", "name a RAM image"]),
        (["send", "--to", "127.0.0.1:1", "--ram", "/dev/null"], ["/dev/null", "device", "regular file"]),
        (["receive", "--listen", &taken, "--ram", &absent], [&*taken, "os error 98", "another port"]),
        (["receive", "--listen", "127.0.0.1:0", "--ram", here], [here, "os error 21", "name a file"]),
        (["receive", "--listen", "127.0.0.1:0", "--ram", &nowhere], [&*absent, "os error 2", "check the path"]),
    ] {
        let ended = run(&arguments);
        let report = ended.expect(1, "failed");
        assert_eq!(ended.stderr, format!("pageferry: {}\n", report["error"].as_str().unwrap()));
        for part in parts {
            assert!(ended.stderr.contains(part), "{part} is not in: {}", ended.stderr);
        }
    }
    assert_eq!(folder.names(), ["empty", "good"]);
}

#[test]
fn an_open_network_is_warned_of_once() {
    let folder = Folder::new();
    let from = folder.file("from");
    let to = folder.file("to");
    image(&from, 4096, &[(0, 4096)]);
    let mut receiver = start(&["receive", "--listen", "0.0.0.0:0", "--ram", &to, "--json"]);
    let address = receiver.address().replace("0.0.0.0", "127.0.0.1");
    let sent = run(&["send", "--to", &address, "--ram", &from]);
    sent.expect(0, "completed");
    assert_eq!(sent.stderr, "", "loopback is nobody else's business");
    let received = receiver.end();
    received.expect(0, "completed");
    assert_eq!(received.stderr.lines().count(), 1, "{}", received.stderr);
    assert!(received.stderr.contains("nothing is encrypted"), "{}", received.stderr);
}

#[test]
fn a_demo_guest_is_no_image() {
    let folder = Folder::new();
    let from = folder.file("from");
    image(&from, 4096, &[(0, 1)]);
    // The other way round: an image for a process that waits for a guest.
    let mut child = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    child.args(["demo-target", "--transport", "tcp"]).stdin(std::process::Stdio::piped());
    let mut child = child.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
    let listening: Value = serde_json::from_str(&line).unwrap();
    let sent = run(&["send", "--to", listening["addr"].as_str().unwrap(), "--ram", &from]);
    drop(child.stdin.take());
    child.wait().unwrap();
    let error = sent.expect(1, "failed")["error"].as_str().unwrap().to_owned();
    assert!(error.contains("refused") && error.contains("not the guest of a demo"), "{error}");
}

#[test]
fn wrong_usage_is_told_apart() {
    for arguments in [
        &["demo", "--ram", "5"][..],
        &["demo", "--channels", "0"],
        &["demo", "--channels", "256"],
        &["demo", "--verify", "perhaps"],
        &["demo", "--cpus", "x"],
        &["demo", "--writers", "65"],
        &["send", "--to", "nowhere", "--ram", "x"],
        &["send", "--to", "127.0.0.1:1"],
        &["receive", "--listen", "127.0.0.1:70000", "--ram", "x"],
        &["reserve"],
        &[],
    ] {
        let ended = start(arguments).end();
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains("sage: pageferry") || ended.stderr.contains("--help"), "{}", ended.stderr);
    }
}

/// A file system of a few MiB, unmounted when it is dropped.
struct SmallDisk(Folder);

impl SmallDisk {
    fn new() -> Option<SmallDisk> {
        let folder = Folder::new();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=4m", "pageferry-test"]).arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(SmallDisk(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking(), "it stays mounted");
    }
}

#[test]
fn a_full_disk_is_a_clear_error_and_leaves_no_file() {
    let Some(disk) = SmallDisk::new() else {
        return support::skip("a_full_disk_is_a_clear_error_and_leaves_no_file", "only root may mount a small tmpfs");
    };
    let folder = Folder::new();
    let from = folder.file("from");
    // What does not fit as data, and what does, but not once full verification has read its holes on a tmpfs.
    for (data, verify) in [(8 << 20, "wire"), (1 << 20, "full")] {
        image(&from, 16 << 20, &[(0, data)]);
        let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &disk.0.file("to"), "--json"]);
        let sent = run(&["send", "--to", &receiver.address(), "--ram", &from, "--verify", verify]);
        let sent = sent.expect(1, "failed").clone();
        let received = receiver.end();
        let error = received.expect(1, "failed")["error"].as_str().unwrap().to_owned();
        assert!(error.contains("may be full"), "{verify}: {error}");
        if verify == "wire" {
            assert!(sent["error"].as_str().unwrap().contains("may be full"), "the sender hears it, too: {sent}");
        }
        assert!(received.stderr.contains("may be full"), "{verify}: {}", received.stderr);
        assert_eq!(disk.0.names(), [""; 0], "{verify}");
    }
}
