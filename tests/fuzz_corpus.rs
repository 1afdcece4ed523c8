//! Every input that fuzzing has kept, once more: what a fuzz target found stays found, without a fuzzer.
#![cfg(not(loom))]
#![cfg(feature = "qemu")]

#[path = "fuzz/harness/mod.rs"]
mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

/// How long one input may take: a script whose peer stays and says nothing takes a third of a second.
const INPUT_TIME_MAX: Duration = Duration::from_secs(60);

/// Runs a target with every input of its corpus. Inputs run on a thread, so that one that hangs is named. Together they
/// must lead to all of these ends: a corpus that has gone stale stops at the first step.
fn replays(target: &'static str, ends: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("no corpus in {}: {e}", folder.display()));
    let mut inputs: Vec<_> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "the corpus in {} is empty", folder.display());
    let (done, ended) = mpsc::channel();
    let paths = inputs.clone();
    let runner = std::thread::spawn(move || {
        for path in paths {
            let end = harness::run(target, &fs::read(&path).expect("a readable input"));
            done.send(end).expect("somebody who counts");
        }
    });
    let mut reached = BTreeSet::new();
    for input in &inputs {
        match ended.recv_timeout(INPUT_TIME_MAX) {
            Ok(end) => drop(reached.insert(end)),
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("{} hangs", input.display()),
            // The thread has said why.
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{} is a finding", input.display()),
        }
    }
    runner.join().expect("a runner that has run all inputs");
    let missing: Vec<_> = ends.iter().filter(|end| !reached.contains(*end)).collect();
    assert!(missing.is_empty(), "no input leads to {missing:?}: the corpus no longer fits the code");
}

#[test]
fn no_packet_of_the_corpus_is_a_finding() {
    replays("packet", &["accepted", "refused"]);
}

#[test]
fn no_control_frames_of_the_corpus_are_a_finding() {
    replays("control", &["accepted", "refused"]);
}

#[test]
fn no_hello_of_the_corpus_is_a_finding() {
    replays("hello", &["accepted", "refused"]);
}

#[test]
fn no_script_of_the_corpus_makes_the_targets_session_break_its_promises() {
    replays("target_session", &[harness::OPEN, "completed", "failed", "cancelled"]);
}

#[test]
fn no_script_of_the_corpus_makes_the_sources_session_break_its_promises() {
    replays("source_session", &[harness::OPEN, "completed", "failed", "cancelled", "uncertain"]);
}

#[test]
fn no_source_of_the_corpus_makes_a_target_break_its_promises() {
    replays("target_wire", &["completed", "failed"]);
}

#[test]
fn no_target_of_the_corpus_makes_a_source_break_its_promises() {
    replays("source_wire", &["completed", "failed", "uncertain"]);
}

#[test]
fn no_main_stream_of_qemus_in_the_corpus_is_a_finding() {
    replays("qemu_main", &["accepted", "refused"]);
}

#[test]
fn no_channel_of_qemus_in_the_corpus_is_a_finding() {
    replays("qemu_channel", &["accepted", "refused"]);
}

#[cfg(feature = "cli")]
#[test]
fn no_compressed_packets_of_the_corpus_are_a_finding() {
    replays("qemu_pack", &["accepted", "refused"]);
}

#[cfg(feature = "cli")]
#[test]
fn no_manifest_of_the_corpus_is_a_finding() {
    replays("qemu_store", &["accepted", "refused"]);
}

#[cfg(feature = "cli")]
#[test]
fn every_fuzz_target_is_replayed_and_every_corpus_has_its_target() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let mut folders: Vec<_> = fs::read_dir(corpus)
        .expect("a corpus")
        .map(|e| e.expect("a folder").file_name().into_string().unwrap())
        .collect();
    let mut targets: Vec<_> = harness::TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    folders.sort();
    targets.sort();
    assert_eq!(folders, targets);
}
