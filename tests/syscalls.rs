//! What threads of ours call is what the guide says, for those who write seccomp filters by it: strace is the witness.
#![cfg(all(not(loom), feature = "cli"))]
#![forbid(unsafe_code)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

const GUIDE: &str = include_str!("../src/guide/process.rs");

type Calls = BTreeSet<String>;

/// The words between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// `pf-send` of `pf-send-3` and `pf-send-i`.
fn kind(name: &str) -> String {
    let end = name.rfind('-').filter(|at| name[at + 1..].chars().all(|c| c.is_ascii_digit() || c == 'i'));
    name[..end.unwrap_or(name.len())].to_owned()
}

/// By kind of thread, what the guide's table allows it; what it allows all threads is in each.
fn allowed() -> BTreeMap<String, Calls> {
    let section = GUIDE.split_once("//! # System calls").unwrap().1.split("\n//! # ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("//! | ")?.split_once(" | "));
    let (mut all, mut own) = (Calls::new(), BTreeMap::new());
    for (threads, calls) in rows {
        let calls: Calls = quoted(calls).map(str::to_owned).collect();
        if threads.starts_with("all") {
            all.extend(calls);
        } else {
            quoted(threads).for_each(|thread| drop(own.insert(kind(thread), calls.clone())));
        }
    }
    own.values_mut().for_each(|calls: &mut Calls| calls.extend(all.iter().cloned()));
    own
}

/// By kind of thread, what it called. A thread has its name from its first call for itself on.
fn observed(trace: &str) -> BTreeMap<String, Calls> {
    let mut observed: BTreeMap<String, Calls> = BTreeMap::new();
    for line in trace.lines() {
        let Some((_, rest)) = line.split_once('<') else { continue };
        let Some((thread, call)) = rest.split_once('>') else { continue };
        let call: String = call.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        if thread.starts_with("pf-") && !call.is_empty() {
            observed.entry(kind(thread)).or_default().insert(call);
        }
    }
    observed
}

/// A demo under strace, which writes to `file`; or why there was none.
fn trace(file: &Path) -> Result<String, String> {
    let strace = |file: &Path, command: &[&str]| {
        let mut strace = Command::new("timeout");
        strace.args(["60", "strace", "-f", "-Y", "-qq", "-e", "signal=none", "-o"]).arg(file).args(command);
        strace.stdin(Stdio::null()).output()
    };
    // Whether there is one that may trace, and that knows the names of threads.
    match strace(Path::new("/dev/null"), &["true"]) {
        Ok(tried) if tried.status.success() => {}
        Ok(tried) => return Err(format!("strace: {}", String::from_utf8_lossy(&tried.stderr))),
        Err(e) => return Err(format!("timeout(1): {e}")),
    }
    let demo =
        ["demo", "--ram", "64M", "--dirty-rate", "5", "--cpus", "0", "--verify", "full", "--zero-copy", "on", "--json"];
    let done = strace(file, &[&[env!("CARGO_BIN_EXE_pageferry")], &demo[..]].concat()).unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(std::fs::read_to_string(file).unwrap())
}

#[test]
fn threads_make_no_system_call_that_the_guide_does_not_list() {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("syscalls-{}", std::process::id()));
    let trace = match trace(&file) {
        Ok(trace) => trace,
        Err(why) => return support::skip("threads_make_no_system_call_that_the_guide_does_not_list", &why),
    };
    std::fs::remove_file(&file).unwrap();
    let (allowed, observed) = (allowed(), observed(&trace));
    for (thread, typical) in
        [("send", "sendmsg"), ("send", "recvmsg"), ("recv", "recvmsg"), ("scan", "ioctl"), ("hash", "write")]
    {
        let calls = observed.get(&format!("pf-{thread}")).unwrap_or_else(|| panic!("no pf-{thread} in {observed:?}"));
        assert!(calls.contains(typical), "pf-{thread} never called {typical}: {calls:?}");
    }
    for (thread, calls) in &observed {
        let listed = allowed.get(thread).unwrap_or_else(|| panic!("the guide has no row for {thread}"));
        let missing: Vec<_> = calls.difference(listed).collect();
        assert!(missing.is_empty(), "{thread} calls what the guide does not list: {missing:?}");
    }
}

#[test]
fn the_guides_table_and_a_trace_are_read_as_they_are_meant() {
    let allowed = allowed();
    assert!(allowed["pf-send"].contains("poll") && !allowed["pf-send"].contains("recvfrom"));
    assert!(allowed["pf-recv"].contains("recvmsg") && allowed["pf-recv"].contains("munmap"));
    assert!(allowed["pf-hash"].contains("clone3") && !allowed["pf-hash"].contains("sendmsg"));
    let trace = "7<pf-send-1> sendmsg(5, x) = 3\n8<pf-hash> <... futex resumed>) = 0\n9<demo> read(0, \"<pf-send-0> open(\") = 9";
    let observed = observed(trace);
    assert_eq!(observed, BTreeMap::from([("pf-send".to_owned(), Calls::from(["sendmsg".to_owned()]))]));
}
