//! What a process holds: threads, descriptors, mappings, memory; and tests that hold it to leaving none of it behind.
#![allow(dead_code)]

use std::fmt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Which test the child process is for.
const CHILD: &str = "PAGEFERRY_LIFECYCLE_CHILD";

/// Runs `body` in a child process that runs this one test and nothing else. What it leaves behind fails the test.
///
/// `test` is the test's full name: the child is this test binary, told to run exactly that.
#[track_caller]
pub fn alone(test: &str, body: impl FnOnce()) {
    in_a_child(test, || {
        // Whatever a first use sets up for the rest of the process is no leak.
        drop(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let before = Census::take();
        body();
        Census::take().assert_nobody_stayed(&before);
    });
}

/// Runs `body` alone in a child process, and fails as it does.
#[track_caller]
pub fn in_a_child(test: &str, body: impl FnOnce()) {
    if is_child(test) {
        return body();
    }
    let output = child(test, &[]);
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}\n{complaint}", output.status);
    // A name that fits no test is a child that ran nothing.
    assert!(said.contains("1 passed"), "no test is called {test}: {said}");
    // What a test that passes says is for whoever asks for it.
    print!("{said}");
}

/// Whether this process is the child of that test.
pub fn is_child(test: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|name| name == test)
}

/// What became of the child of that test, with these variables in its environment.
pub fn child(test: &str, variables: &[(&str, &str)]) -> Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    // One heap for all threads, and large pieces never in it: else what is mapped depends on who met whom.
    child.envs([("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "131072"), ("MALLOC_TRIM_THRESHOLD_", "131072")]);
    let child = child.env(CHILD, test).envs(variables.iter().copied());
    child.args([test, "--exact", "--nocapture", "--test-threads=1"]).output().unwrap()
}

/// What this process holds.
#[derive(Clone, Debug)]
pub struct Census {
    /// The names of its threads.
    pub threads: Vec<String>,
    /// What its descriptors lead to.
    pub descriptors: Vec<String>,
    pub mappings: usize,
    pub mapped_bytes: u64,
    pub resident_bytes: u64,
}

/// Mappings that come and go: the C library keeps the stacks of some threads that have ended, two mappings each.
const MAPPINGS_SLACK: usize = 8;
/// Memory that comes and goes: stacks, which are mapped whole and used little, and the heap.
const MAPPED_SLACK_BYTES: u64 = 24 << 20;
const RESIDENT_SLACK_BYTES: u64 = 4 << 20;

impl Census {
    pub fn take() -> Census {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let bytes = |field: &str| {
            let text = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            text.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
        };
        Census {
            threads: threads(),
            descriptors: descriptors(),
            mappings: maps.lines().count(),
            mapped_bytes: bytes("VmSize:"),
            resident_bytes: bytes("VmRSS:"),
        }
    }

    /// No thread and no descriptor more or less than before.
    #[track_caller]
    pub fn assert_nobody_stayed(&self, before: &Census) {
        assert_eq!(before.threads.len(), self.threads.len(), "threads: {:?}, then {:?}", before.threads, self.threads);
        assert_eq!(before.descriptors, self.descriptors, "descriptors before and after");
    }

    /// That, and no more mappings and memory than come and go.
    #[track_caller]
    pub fn assert_no_growth(&self, before: &Census) {
        self.assert_nobody_stayed(before);
        let (then, now) = (before.mappings, self.mappings);
        assert!(now <= then + MAPPINGS_SLACK, "mappings grew from {then} to {now}");
        let grew = |what: &str, then: u64, now: u64, slack: u64| {
            assert!(now <= then + slack, "{what} memory grew from {} to {} KiB", then >> 10, now >> 10);
        };
        grew("mapped", before.mapped_bytes, self.mapped_bytes, MAPPED_SLACK_BYTES);
        grew("resident", before.resident_bytes, self.resident_bytes, RESIDENT_SLACK_BYTES);
    }
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Census { threads, descriptors, mappings, mapped_bytes, resident_bytes } = self;
        write!(f, "{} threads, {} descriptors, {mappings} mappings ", threads.len(), descriptors.len())?;
        write!(f, "of {} KiB, {} KiB resident", mapped_bytes >> 10, resident_bytes >> 10)
    }
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
