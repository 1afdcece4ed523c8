//! Runs a test's body in a process of its own, and holds it to leaving no thread and no descriptor behind.

// Two test binaries share this file, and one of them uses only a part of it.
#![allow(dead_code)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Which test the child process is for.
const CHILD: &str = "PAGEFERRY_LIFECYCLE_CHILD";

/// Runs `body` in a child process that runs this one test and nothing else. What it leaves behind fails the test.
///
/// `test` is the test's full name: the child is this test binary, told to run exactly that.
#[track_caller]
pub fn alone(test: &str, body: impl FnOnce()) {
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        // Whatever a first use sets up for the rest of the process is no leak.
        drop(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let before = (threads(), descriptors());
        body();
        let after = (threads(), descriptors());
        assert_eq!(before.0.len(), after.0.len(), "threads before {:?}, after {:?}", before.0, after.0);
        assert_eq!(before.1, after.1, "descriptors before and after");
        return;
    }
    let own = std::env::current_exe().unwrap();
    let mut child = Command::new(own);
    let child = child.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, test);
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}\n{complaint}", output.status);
    // A name that fits no test is a child that ran nothing.
    assert!(said.contains("1 passed"), "no test is called {test}: {said}");
}

/// What this process holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holdings {
    threads: usize,
    descriptors: Vec<String>,
}

/// What this process holds now.
pub fn holdings() -> Holdings {
    Holdings { threads: threads().len(), descriptors: descriptors() }
}

/// Mappings that a userfaultfd is registered for.
pub fn registrations() -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.filter(|flags| flags.split_whitespace().any(|flag| ["um", "uw", "ui"].contains(&flag))).count()
}

/// Demands that this process holds what it held before. A thread that was joined is listed for a moment longer.
#[track_caller]
pub fn assert_holds(before: &Holdings, what: &str) {
    let until = Instant::now() + Duration::from_secs(1);
    while holdings() != *before {
        assert!(Instant::now() < until, "{what}: before {before:#?}, after {:#?}: {:?}", holdings(), threads());
        std::thread::yield_now();
    }
}

/// Bytes of this process's writable mappings: guest RAM among them, and not what allocators reserve and never touch.
pub fn mapped_bytes() -> u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let bytes = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        rest.starts_with("rw").then(|| Some(number(end)? - number(start)?))?
    };
    maps.lines().filter_map(bytes).sum()
}

/// The names of all threads of this process.
pub fn threads() -> Vec<String> {
    let mut names = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // A thread may end between the listing and the look.
        if let Ok(name) = std::fs::read_to_string(task.unwrap().path().join("comm")) {
            names.push(name.trim().to_owned());
        }
    }
    names.sort();
    names
}

/// What all descriptors of this process lead to, that of the listing apart.
fn descriptors() -> Vec<String> {
    let mut targets = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        if let Ok(target) = std::fs::read_link(entry.unwrap().path()) {
            if !target.starts_with(Path::new("/proc")) {
                targets.push(target.display().to_string());
            }
        }
    }
    targets.sort();
    targets
}
