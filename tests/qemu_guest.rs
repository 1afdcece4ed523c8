//! Ships the RAM of a real Linux guest with the program, and compares every byte.
//!
//! The RAM comes from `tests/qemu_guest/ram_image`: a mix that no generator of ours would think of, with holes, zero
//! pages, text, random data and freed pages that still hold what they held.
#![cfg(all(not(loom), feature = "cli"))]
#![forbid(unsafe_code)]

#[path = "support/files.rs"]
mod files;
mod support;

use files::{bytes_on_disk, first_difference};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};

/// What the script answers when the machine lacks something it needs.
const LACKING: i32 = 77;

/// Begins each page of text in the guest's RAM, and each line of it.
const MARKER: &[u8] = b"PAGEFERRY-KNOWN-PAGE-";

/// What a file system may spend on the map of a file's extents, more for one file than for another.
const EXTENT_MAP_SLACK: u64 = 1 << 20;

/// A running `pageferry`, which does not outlive the test.
struct Program {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Program {
    fn start(arguments: &[&str]) -> Program {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pageferry"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stdout = BufReader::new(child.stdout.take().expect("its stdout is a pipe"));
        Program { child, stdout }
    }

    /// The next line that it prints, as JSON. Blocks until there is one.
    fn event(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("its stdout is UTF-8");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("not a JSON line ({error}): {line:?}"))
    }

    /// Waits for its end: how it ended, and its last line.
    fn finish(mut self) -> (ExitStatus, Value) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("its stdout is UTF-8");
        let status = self.child.wait().expect("it is ours to wait for");
        let last = rest.lines().last().unwrap_or_else(|| panic!("no report from a program that ended: {status}"));
        let report = serde_json::from_str(last).unwrap_or_else(|error| panic!("no JSON report ({error}): {last:?}"));
        (status, report)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail on a program that has ended already, and that is well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder of this test's own, on the same file system as the build.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("the build's folder is writable");
    folder
}

fn boot_guest(into: &Path) -> Output {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu_guest/ram_image");
    Command::new(script).arg(into).stdin(Stdio::null()).output().expect("the script starts: it needs bash")
}

/// How many pages of the file begin with a line of the guest's text.
fn marked_pages(path: &Path) -> u64 {
    let file = File::open(path).expect("the RAM file is there");
    let mut start = [0; MARKER.len()];
    let pages = file.metadata().expect("an open file has metadata").len() / 4096;
    let marked = |page: &u64| file.read_exact_at(&mut start, page * 4096).is_ok() && start == MARKER;
    (0..pages).filter(marked).count() as u64
}

fn demand_success(side: &str, (status, report): &(ExitStatus, Value)) {
    assert!(status.success(), "{side} ended with {status}, and reported {report}");
    assert_eq!(report["outcome"], "completed", "{side} reported {report}");
    assert_eq!(report["verified"], true, "{side} reported {report}");
}

#[test]
fn real_guest_ram_arrives_byte_for_byte_and_holes_stay_holes() {
    let folder = folder("qemu_guest");
    let (source, target) = (folder.join("ram"), folder.join("arrived"));
    let boot = boot_guest(&folder);
    let said = String::from_utf8_lossy(&boot.stderr);
    if boot.status.code() == Some(LACKING) {
        return support::skip("real_guest_ram_arrives_byte_for_byte_and_holes_stay_holes", &said);
    }
    assert!(boot.status.success(), "no guest ({}): {said}", boot.status);

    // The guest says how much text it wrote: 64 lines a page. Unless that is in the file, the file is not its RAM.
    let ready = String::from_utf8_lossy(&boot.stdout);
    let lines = ready.split_whitespace().find_map(|word| word.strip_prefix("known_lines="));
    let lines: u64 = lines.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no count in {ready:?}"));
    assert!(marked_pages(&source) >= lines / 64, "the guest's text is not in its RAM: {ready}");

    // What an earlier run may have left must not pass for what arrived now.
    if target.exists() {
        std::fs::remove_file(&target).expect("our own file");
    }

    let (from, to) = (source.to_str().expect("a UTF-8 path"), target.to_str().expect("a UTF-8 path"));
    let mut receive = Program::start(&["receive", "--listen", "127.0.0.1:0", "--ram", to, "--json"]);
    let listening = receive.event();
    assert_eq!(listening["event"], "listening", "{listening}");
    let address = listening["addr"].as_str().unwrap_or_else(|| panic!("no address: {listening}"));
    let send = Program::start(&["send", "--to", address, "--ram", from, "--json"]).finish();
    // If the source failed, the target may wait for another: its exit is only waited for when there was a success.
    demand_success("send", &send);
    demand_success("receive", &receive.finish());

    assert_eq!(first_difference(&source, &target), None, "the byte where the target differs");
    let (spent, allowed) = (bytes_on_disk(&target), bytes_on_disk(&source) + EXTENT_MAP_SLACK);
    assert!(spent <= allowed, "{spent} bytes on disk where {allowed} are enough: holes were filled");
    std::fs::remove_file(&target).expect("our own file");
    std::fs::remove_file(&source).expect("our own file");
}

#[test]
fn a_single_changed_byte_and_a_filled_hole_are_seen() {
    let folder = folder("qemu_guest_compare");
    let (left, right) = (folder.join("left"), folder.join("right"));
    let mut content = vec![7; 3 << 20];
    content[4096..4096 + MARKER.len()].copy_from_slice(MARKER);
    std::fs::write(&left, &content).expect("a writable folder");
    assert_eq!(marked_pages(&left), 1);
    assert_eq!(first_difference(&left, &left), None);
    content[(2 << 20) + 5] = 8;
    std::fs::write(&right, &content).expect("a writable folder");
    assert_eq!(first_difference(&left, &right), Some((2 << 20) + 5));
    std::fs::write(&right, &content[..4096]).expect("a writable folder");
    assert_eq!(first_difference(&left, &right), Some(4096));
    let sparse = File::create(&right).expect("a writable folder");
    sparse.set_len(3 << 20).expect("a resizable file");
    assert!(bytes_on_disk(&right) + EXTENT_MAP_SLACK < bytes_on_disk(&left), "this file system has no holes");
    std::fs::remove_dir_all(&folder).expect("our own folder");
}
