//! `pageferry qemu receive` and `send`, and the folder between them: what a source is told, and what is on the disk then.
#![cfg(all(not(loom), feature = "cli", feature = "qemu"))]
#![forbid(unsafe_code)]

#[path = "support/program.rs"]
mod program;
#[path = "qemu_store/source.rs"]
mod source;
#[path = "support/stores.rs"]
mod stores;
#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::qemu::wire::{Block, Name, Record, ReturnMessage, Subsection};
use program::{Ended, Folder, Program, launch, start};
use source::{PAGE, PAGES, Source, page, stored};
use stores::{manifest, receive};

/// A source of the one machine that there is here, and who stores it.
fn both(store: &str) -> (Source, Program) {
    let (receiver, address) = receive(store, "0", &[]);
    (Source::new(TcpStream::connect(address).unwrap()), receiver)
}

fn block_file(store: &str) -> std::path::PathBuf {
    Path::new(store).join(manifest(store)["blocks"][0]["file"].as_str().unwrap())
}

/// The store holds what the source has sent.
fn is_whole(store: &str) {
    let bytes = fs::read(block_file(store)).unwrap();
    assert_eq!(bytes.len() as u64, PAGES * PAGE as u64);
    for (number, found) in bytes.chunks(PAGE).enumerate() {
        assert!(found == page(number as u64), "page {number}");
    }
}

#[test]
fn a_source_that_waits_is_told_and_counters_and_times_are_there() {
    let folder = Folder::new();
    let store = stored(&folder);
    is_whole(&store);
    let counters = &manifest(&store)["counters"];
    assert_eq!(counters["normal_pages"].as_u64().unwrap() + counters["zero_pages"].as_u64().unwrap(), PAGES);
    assert_eq!(folder.names(), ["store"]);
}

#[test]
fn people_are_told_how_long_the_disk_took_and_what_was_counted() {
    let folder = Folder::new();
    let address = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap()
    };
    let store = folder.file("store");
    let mut command = Command::new(program::PAGEFERRY);
    command.args(["qemu", "receive", "--channels", "0", "--listen", &address.to_string(), "--out", &store]);
    let receiver = thread::spawn(move || command.output().unwrap());
    let until = Instant::now() + program::PATIENCE;
    let mut source = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break Source::new(stream),
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
        thread::park_timeout(Duration::from_millis(5));
    };
    source.migrate();
    source.answer();
    drop(source);
    let output = receiver.join().unwrap();
    let words = String::from_utf8(output.stdout).unwrap();
    let counters = &manifest(&store)["counters"];
    let (normal, zero) = (&counters["normal_pages"], &counters["zero_pages"]);
    for word in [
        "completed; every page has come, each round was whole, and digests of RAM are stored\n".to_owned(),
        format!("{store}, 4.00 MiB"),
        " ms to hash it, and ".to_owned(),
        " ms more until all of it was on the disk".to_owned(),
        format!("; {normal} pages with data, {zero} of zeros, 0 SYNC packets"),
    ] {
        assert!(words.contains(&word), "{word:?} is not in {words}");
    }
}

#[test]
fn a_source_that_is_cancelled_before_it_is_told_makes_it_uncertain_who_has_the_guest() {
    let folder = Folder::new();
    let store = folder.file("store");
    let (mut source, receiver) = both(&store);
    source.migrate();
    // As QEMU's migrate_cancel does; the socket itself stays.
    source.stream.shutdown(Shutdown::Both).unwrap();
    let ended = receiver.end();
    let report = ended.expect(3, "uncertain");
    assert_eq!(report["source_told"], false, "{report}");
    assert!(report["error"].as_str().unwrap().contains("its guest may run on there"), "{report}");
    drop(source);
    // It holds the guest as it stood still: perhaps there is no other.
    is_whole(&store);
}

#[test]
fn a_source_that_is_cancelled_is_noticed_over_a_unix_socket_too() {
    let folder = Folder::new();
    let (store, socket) = (folder.file("store"), folder.file("socket"));
    let at = format!("unix:{socket}");
    let mut receiver = start(&stores::receiver(&store, &at, "0"));
    receiver.address();
    let mut source = Source::new(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    source.migrate();
    source.stream.shutdown(Shutdown::Both).unwrap();
    let ended = receiver.end();
    assert_eq!(ended.expect(3, "uncertain")["source_told"], false);
    is_whole(&store);
}

#[test]
fn a_source_that_takes_a_while_to_hear_it_is_told() {
    let folder = Folder::new();
    let (store, socket) = (folder.file("store"), folder.file("socket"));
    let at = format!("unix:{socket}");
    let words = ["qemu", "receive", "--listen", &at, "--channels", "0", "--out", &store, "--json"];
    let mut receiver = start(&words);
    receiver.address();
    let mut source = Source::new(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    source.migrate();
    // As over a long link: what has not been read counts as not acknowledged here.
    let (begun, far) = (Instant::now(), Duration::from_millis(500));
    while begun.elapsed() < far {
        thread::park_timeout(far);
    }
    assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 0 }));
    assert_eq!(receiver.end().expect(0, "completed")["source_told"], true);
}

#[test]
fn a_source_that_only_says_no_more_is_told() {
    let folder = Folder::new();
    let store = folder.file("store");
    let (mut source, receiver) = both(&store);
    source.migrate();
    source.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 0 }));
    assert_eq!(receiver.end().expect(0, "completed")["source_told"], true);
}

#[test]
fn a_guest_whose_shared_memory_does_not_travel_is_refused_and_its_source_told() {
    let folder = Folder::new();
    let store = folder.file("store");
    let (mut source, receiver) = both(&store);
    source.head(&[Subsection::Capabilities(vec![Name::new("x-ignore-shared").unwrap()])]);
    source.say(&Record::RamStart { section: 1 });
    let block = Block::new(Name::new("pc.ram").unwrap(), PAGES * PAGE as u64);
    source.say(&Record::Blocks(vec![Block { guest_address: Some(0), ..block }]));
    assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 1 }));
    let ended = receiver.end();
    let report = ended.expect(1, "failed");
    assert!(report["error"].as_str().unwrap().contains("x-ignore-shared"), "{report}");
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn a_killed_receiver_leaves_no_store_and_the_next_one_says_what_it_left() {
    let folder = Folder::new();
    let store = folder.file("store");
    let (mut source, mut killed) = both(&store);
    source.begin();
    killed.wait_for_pages();
    // One that is at work is none that is left.
    let (beside, _) = receive(&store, "0", &[]);
    beside.signal("INT");
    assert!(!beside.end().stderr.contains("cut off"));
    killed.signal("KILL");
    assert_eq!(killed.end().code, None);
    let left = folder.names();
    assert!(left.len() == 1 && left[0].starts_with("store.partial-"), "{left:?}");

    let (mut source, next) = both(&store);
    source.migrate();
    source.answer();
    drop(source);
    let ended = next.end();
    ended.expect(0, "completed");
    assert!(ended.stderr.contains(&left[0]) && ended.stderr.contains("remove it"), "{}", ended.stderr);
    is_whole(&store);
    // It is somebody's to remove.
    assert!(folder.names().contains(&left[0]));
}

/// Sends a store to `receive`, in the place of a QEMU that waits for it; the sender's end and the receiver's.
fn send(store: &str, to: &str) -> (Ended, Ended) {
    let (receiver, address) = receive(to, "0", &["--accept-missing"]);
    (stores::send(store, &address, "0", &[]).end(), receiver.end())
}

#[test]
fn a_store_arrives_as_it_is_and_a_damaged_one_never_runs() {
    let folder = Folder::new();
    let store = stored(&folder);
    let copy = folder.file("copy");
    let (sent, received) = send(&store, &copy);
    sent.expect(0, "completed");
    received.expect(0, "completed");
    is_whole(&copy);
    let digest = |store: &str| manifest(store)["blocks"][0]["digest"].clone();
    assert_eq!(digest(&store), digest(&copy));

    let file = fs::OpenOptions::new().write(true).open(block_file(&store)).unwrap();
    file.write_all_at(&[99], 7 * PAGE as u64).unwrap();
    let (sent, received) = send(&store, &folder.file("damaged"));
    let report = sent.expect(1, "failed");
    assert!(report["error"].as_str().unwrap().contains("is not what was written"), "{report}");
    received.expect(1, "failed");
    assert_eq!(folder.names(), ["copy", "store"]);
}

#[test]
fn without_channels_the_description_of_the_devices_tells_which_qemu_it_came_from() {
    let folder = Folder::new();
    for (devices, dialect) in [(source::DEVICES, "10.0"), (r#"{"page_size": 4096, "devices": []}"#, "7.2")] {
        let store = folder.file(dialect);
        let (mut source, receiver) = both(&store);
        source.migrate_with(devices);
        assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 0 }));
        drop(source);
        receiver.end().expect(0, "completed");
        assert_eq!(manifest(&store)["dialect"], dialect);
    }
}

#[test]
fn a_store_that_cannot_be_put_back_is_not_removed() {
    let folder = Folder::new();
    let test = "a_store_that_cannot_be_put_back_is_not_removed";
    if !Command::new("strace").arg("-V").output().is_ok_and(|output| output.status.success()) {
        return support::skip(test, "no strace, which makes system calls fail");
    }
    let store = stored(&folder);
    let parent = Path::new(&store).parent().unwrap().canonicalize().unwrap();
    // It changes places with the new one; that does not get to the disk (what comes first does); and they do not change
    // places again.
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-P"]).arg(&parent).arg("-P").arg(parent.join("store"));
    command.args(["-e", "inject=fsync,fdatasync:error=EIO:when=2+", "-e", "inject=renameat2:error=EIO:when=2+"]);
    command.args([program::PAGEFERRY, "qemu", "receive", "--listen", "127.0.0.1:0", "--channels", "0", "--force"]);
    command.args(["--out", &store, "--json"]);
    let mut receiver = launch(command);
    let mut source = Source::new(TcpStream::connect(receiver.address()).unwrap());
    source.migrate();
    assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 1 }));
    drop(source);
    let ended = receiver.end();
    let error = ended.expect(1, "failed")["error"].as_str().unwrap();
    assert!(error.contains("take it away again") && error.contains("what stood there may be"), "{error}");
    let names = folder.names();
    assert_eq!(names.len(), 2, "{names:?}: {error}");
    names.iter().for_each(|name| is_whole(&folder.file(name)));
}

/// The program in a mount namespace of its own, where one script has mounted something, and another looks afterwards;
/// `None` where that is not allowed.
fn among_mounts(test: &str, before: &str, after: &str, arguments: &[&str]) -> Option<Program> {
    let allowed = Command::new("unshare").args(["-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        support::skip(test, "no mount namespace is to be had (unshare -Urm)");
        return None;
    }
    let mut command = Command::new("unshare");
    command
        .args([
            "-Urm",
            "sh",
            "-ec",
            &format!("{before}; code=0; \"$0\" \"$@\" || code=$?; {after}; exit $code"),
            program::PAGEFERRY,
        ])
        .args(arguments);
    Some(launch(command))
}

#[test]
fn a_full_disk_is_told_to_the_source_and_leaves_nothing() {
    let folder = Folder::new();
    let test = "a_full_disk_is_told_to_the_source_and_leaves_nothing";
    // Full in the midst of RAM; and with room for the RAM as it comes, and nothing else.
    for (size, expected) in [("1m", None), ("3584k", Some(ReturnMessage::Shut { error: 1 }))] {
        let disk = folder.file("disk");
        fs::create_dir_all(&disk).unwrap();
        let store = format!("{disk}/store");
        let (before, left) = (format!("mount -t tmpfs -o size={size} none {disk}"), folder.file("left"));
        let words = stores::receiver(&store, "127.0.0.1:0", "0");
        let Some(mut receiver) = among_mounts(test, &before, &format!("ls -A {disk} > {left}"), &words) else { return };
        let mut source = Source::new(TcpStream::connect(receiver.address()).unwrap());
        source.migrate();
        let answer = source.answer();
        let ended = receiver.end();
        let report = ended.expect(1, "failed");
        assert!(report["error"].as_str().unwrap().contains("disk"), "{size}: {report}");
        assert_eq!(answer, expected, "{size}");
        assert_eq!(fs::read_to_string(left).unwrap(), "", "{size}");
    }
}

#[test]
fn a_folder_that_is_mounted_is_refused_before_anything_comes() {
    let folder = Folder::new();
    let (inner, outer) = (folder.file("inner"), folder.file("outer"));
    fs::create_dir(&inner).unwrap();
    fs::create_dir(&outer).unwrap();
    let words = stores::receiver(&outer, "127.0.0.1:0", "0");
    let test = "a_folder_that_is_mounted_is_refused_before_anything_comes";
    // Of the same device: only the mount tells.
    let Some(receiver) = among_mounts(test, &format!("mount --bind {inner} {outer}"), ":", &words) else { return };
    let ended = receiver.end();
    let report = ended.expect(1, "failed");
    assert!(report["error"].as_str().unwrap().contains("is where a file system is mounted"), "{report}");
}
