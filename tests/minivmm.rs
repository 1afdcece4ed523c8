//! The small VMM of `examples/minivmm`: its guest migrates between processes under real KVM, and checks itself.
//! The guest's program is for x86-64.
#![cfg(all(not(loom), target_arch = "x86_64", feature = "cli", feature = "kvm", feature = "vm-memory"))]
#![forbid(unsafe_code)]

#[path = "support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};

use serde_json::Value;

/// One at a time: each has several vCPUs that never rest.
static ALONE: Mutex<()> = Mutex::new(());

/// A guest that always gets across, however slow the machine is.
const EASY: [&str; 8] = ["--ram", "32M", "--hot", "4", "--dirty-rate", "100", "--at-limit", "switch-over"];

struct Ended {
    code: Option<i32>,
    report: Value,
}

/// Runs a demo to its end; `None` where there is no KVM, which is said loudly.
fn demo(test: &str, options: &[&str]) -> Option<Ended> {
    if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        support::skip(test, &format!("no /dev/kvm: {e}"));
        return None;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new(PROGRAM.as_path());
    command.arg("demo").arg("--json").args(options).stdin(Stdio::null());
    let output = command.output().unwrap_or_else(|e| panic!("{}: {e}", PROGRAM.display()));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if let Some(why) = stderr.lines().find(|line| line.contains("this kernel's KVM has no dirty ring")) {
        support::skip(test, why);
        return None;
    }
    let last = stdout.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {last:?}; {stderr}"));
    assert_eq!(report["event"], "report", "{report:#}");
    Some(Ended { code: output.status.code(), report })
}

/// The example, built as this test was. By itself cargo builds it only for a `cargo test` that names no targets, and one
/// that is there may be an old one.
static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
    // target/PROFILE/deps/minivmm-HASH; examples have a folder beside that of tests.
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    let profile = match folder.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        name => name,
    };
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--example", "minivmm", "--profile", profile]).arg("--target-dir");
    let built = build.arg(folder.parent().unwrap()).current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap();
    assert!(built.success(), "the example does not build");
    folder.join("examples/minivmm")
});

impl Ended {
    /// Every migration completed, and guest and device found all in order.
    fn expect_completed(&self) -> &Value {
        let report = &self.report;
        assert_eq!((self.code, report["outcome"].as_str()), (Some(0), Some("completed")), "{report:#}");
        self.expect_checks(report["vcpus"].as_u64().unwrap());
        report
    }

    /// Guest and device found all in order, wherever the guest is.
    fn expect_checks(&self, vcpus: u64) {
        let report = &self.report;
        assert_eq!(report["guest_check"], "ok", "{report:#}");
        assert_eq!(report["device_check"], "ok", "{report:#}");
        assert_eq!((&report["ticks_lost"], &report["ticks_doubled"]), (&0.into(), &0.into()), "{report:#}");
        // All RAM but the program, the vCPUs' stacks and what the device writes; nothing is lost by sharing it out.
        let pages = report["ram_bytes"].as_u64().unwrap() / 4096 - 64;
        assert_eq!(report["guest_pages"].as_u64(), Some(pages), "{vcpus} vCPUs: {report:#}");
    }

    fn outcomes(&self) -> Vec<&str> {
        let attempts = self.report["attempts"].as_array().unwrap();
        attempts.iter().map(|attempt| attempt["outcome"].as_str().unwrap()).collect()
    }
}

/// There and back again: the VM that a guest came to has to be able to send it, too.
fn there_and_back(test: &str, source: &str, vcpus: &str, channels: &str) {
    let options = ["--dirty-source", source, "--vcpus", vcpus, "--channels", channels, "--migrations", "2"];
    let Some(ended) = demo(test, &[&EASY[..], &options].concat()) else { return };
    let report = ended.expect_completed();
    assert_eq!(ended.outcomes(), ["completed", "completed"]);
    assert_eq!(
        (&report["dirty_source"], &report["channels"]),
        (&source.into(), &channels.parse::<u64>().unwrap().into())
    );
    for attempt in report["attempts"].as_array().unwrap() {
        assert!(attempt["gap_ms"].as_f64().unwrap() > 0.0, "{attempt:#}");
        assert!(attempt["downtime_outside_ms"].as_f64() >= attempt["gap_ms"].as_f64(), "{attempt:#}");
    }
}

#[test]
fn one_vcpu_over_one_channel_by_the_log() {
    there_and_back("one_vcpu_over_one_channel_by_the_log", "log", "1", "1");
}

#[test]
fn two_vcpus_over_two_channels_by_the_log() {
    there_and_back("two_vcpus_over_two_channels_by_the_log", "log", "2", "2");
}

#[test]
fn four_vcpus_over_eight_channels_by_the_log() {
    there_and_back("four_vcpus_over_eight_channels_by_the_log", "log", "4", "8");
}

#[test]
fn one_vcpu_over_eight_channels_by_the_ring() {
    there_and_back("one_vcpu_over_eight_channels_by_the_ring", "ring", "1", "8");
}

#[test]
fn two_vcpus_over_one_channel_by_the_ring() {
    there_and_back("two_vcpus_over_one_channel_by_the_ring", "ring", "2", "1");
}

#[test]
fn four_vcpus_over_two_channels_by_the_ring() {
    there_and_back("four_vcpus_over_two_channels_by_the_ring", "ring", "4", "2");
}

/// A guest that writes as fast as it can fills its ring many times over.
#[test]
fn a_full_ring_loses_nothing() {
    let options =
        ["--ram", "64M", "--hot", "32", "--dirty-source", "ring", "--at-limit", "switch-over", "--max-rounds", "6"];
    let Some(ended) = demo("a_full_ring_loses_nothing", &options) else { return };
    ended.expect_completed();
}

#[test]
fn an_idle_guest_sends_its_ram_once() {
    let Some(ended) = demo("an_idle_guest_sends_its_ram_once", &["--ram", "64M", "--hot", "0"]) else { return };
    let report = ended.expect_completed();
    let (ram, payload) = (report["ram_bytes"].as_u64().unwrap(), report["payload_bytes"].as_u64().unwrap());
    // The device writes 56 pages round and round.
    assert!((ram..ram + (2 << 20)).contains(&payload), "{payload} bytes sent: {report:#}");
}

#[test]
fn every_byte_is_the_same_where_all_ram_is_compared() {
    let options = ["--verify", "full", "--vcpus", "2"];
    let Some(ended) = demo("every_byte_is_the_same_where_all_ram_is_compared", &[&EASY[..], &options].concat()) else {
        return;
    };
    let report = ended.expect_completed();
    assert_eq!((&report["verify"], &report["verified"]), (&"full".into(), &true.into()));
}

/// Cancelled while rounds go on: so slowly that the first is far from over.
#[test]
fn cancelled_while_running_the_guest_runs_on_and_goes_at_the_second_attempt() {
    let test = "cancelled_while_running_the_guest_runs_on_and_goes_at_the_second_attempt";
    for source in ["log", "ring"] {
        let options = ["--dirty-source", source, "--bandwidth-max", "50M", "--cancel-after", "100000"];
        let Some(ended) = demo(test, &[&EASY[..], &options].concat()) else { return };
        let report = ended.expect_completed();
        assert_eq!(ended.outcomes(), ["cancelled", "completed"]);
        let cancelled = &report["attempts"][0];
        assert_eq!(cancelled["downtime_ms"].as_f64(), Some(0.0), "it was never paused: {cancelled:#}");
        assert_eq!(cancelled["check"]["guest"], "ok", "{cancelled:#}");
    }
}

#[test]
fn cancelled_while_paused_the_guest_runs_on_and_goes_at_the_second_attempt() {
    let test = "cancelled_while_paused_the_guest_runs_on_and_goes_at_the_second_attempt";
    for source in ["log", "ring"] {
        let options = ["--dirty-source", source, "--vcpus", "2", "--cancel-while-paused", "--migrations", "2"];
        let Some(ended) = demo(test, &[&EASY[..], &options].concat()) else { return };
        let report = ended.expect_completed();
        assert_eq!(ended.outcomes(), ["cancelled", "completed", "cancelled", "completed"]);
        let cancelled = &report["attempts"][0];
        assert!(cancelled["downtime_ms"].as_f64().unwrap() > 0.0, "it was paused: {cancelled:#}");
        assert_eq!(cancelled["check"]["guest"], "ok", "{cancelled:#}");
    }
}

#[test]
fn the_guest_runs_on_when_the_target_is_killed() {
    let options = ["--bandwidth-max", "50M", "--kill-target-after", "100"];
    let Some(ended) = demo("the_guest_runs_on_when_the_target_is_killed", &[&EASY[..], &options].concat()) else {
        return;
    };
    assert_eq!((ended.code, ended.report["outcome"].as_str()), (Some(1), Some("failed")), "{:#}", ended.report);
    ended.expect_checks(1);
}

/// The proof that a check which finds nothing means something.
fn is_found(test: &str, mutant: &str) {
    for source in ["log", "ring"] {
        let options = [
            ["--ram", "64M", "--hot", "16", "--at-limit", "switch-over", "--max-rounds", "3"],
            ["--verify", "off", "--bandwidth-max", "500M", "--dirty-source", source, "--mutant", mutant],
        ];
        let Some(ended) = demo(test, &options.concat()) else { return };
        let report = &ended.report;
        assert_eq!((ended.code, report["outcome"].as_str()), (Some(4), Some("damaged")), "{report:#}");
        assert!(report["guest_check"].as_str().unwrap().contains("holds"), "{report:#}");
    }
}

#[test]
fn a_dirty_bit_cleared_after_the_page_was_read_is_found() {
    is_found("a_dirty_bit_cleared_after_the_page_was_read_is_found", "late-clear");
}

#[test]
fn a_lost_word_of_dirty_bits_is_found() {
    is_found("a_lost_word_of_dirty_bits_is_found", "drop-word");
}

/// 200 MiB/s of a hot set through a link of 100: it cannot get across by itself.
#[test]
fn a_guest_that_outruns_the_link_is_held_back() {
    let options = [
        // Five milliseconds carry no 40 MiB.
        ["--ram", "64M", "--hot", "40", "--dirty-rate", "200"],
        ["--bandwidth-max", "100M", "--downtime-limit", "5", "--throttle-max", "99"],
    ];
    let options = [&options.concat()[..], &["--at-limit", "switch-over"]].concat();
    let Some(ended) = demo("a_guest_that_outruns_the_link_is_held_back", &options) else { return };
    let report = ended.expect_completed();
    assert!(report["throttle_percent"].as_u64().unwrap() > 0, "{report:#}");
}
