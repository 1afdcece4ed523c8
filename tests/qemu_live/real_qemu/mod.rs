//! All that starts a QEMU: `tests/run` has a stage for it.

use crate::case::{Case, Unsaid};
use crate::guest::{COUNTER, Guest};
use crate::machine::{RICH, Setup, Version};
use crate::support;

mod direct;
mod matrix;
mod relayed;
mod stored;
mod trouble;

const Q35_10: Setup =
    Setup { version: Version::V10_0, machine: "pc-q35-10.0", ram_mib: 64, vcpus: 1, devices: &[], guest: COUNTER };
const Q35_7: Setup = Setup { version: Version::V7_2, machine: "pc-q35-7.2", ..Q35_10 };
const LINUX: Setup = Setup { guest: Guest::Linux, ram_mib: 128, vcpus: 2, devices: RICH, ..Q35_10 };

/// Runs what may find that this machine lacks something.
fn run(test: &str, body: impl FnOnce() -> Result<(), String>) {
    if let Err(why) = body() {
        support::skip(test, &why);
    }
}

/// Runs a case.
fn run_case(test: &str, case: &Case) {
    run(test, || case.run());
}

/// Of one run that is not repeated, a page that was lost is a failure; the guest of these tests has one CPU.
fn judged(outcome: Result<(), Unsaid>) -> Result<(), String> {
    match outcome {
        Err(Unsaid::Lost(what)) => panic!("{what}"),
        Err(Unsaid::Lacking(why)) => Err(why),
        Ok(()) => Ok(()),
    }
}
