//! The rig itself: between two QEMUs of one kind the guest must go on without a break, or it judges nobody.

use crate::case::{Case, Way};
use crate::guest::{COUNTER, Guest};
use crate::machine::{PLAIN, RICH, Setup, Version, Wire};
use crate::support;

pub const Q35_10: Setup =
    Setup { version: Version::V10_0, machine: "pc-q35-10.0", ram_mib: 64, vcpus: 1, devices: &[], guest: COUNTER };
pub const Q35_7: Setup = Setup { version: Version::V7_2, machine: "pc-q35-7.2", ..Q35_10 };
pub const LINUX: Setup = Setup { guest: Guest::Linux, ram_mib: 128, vcpus: 2, devices: RICH, ..Q35_10 };

pub fn run(test: &str, case: &Case) {
    if let Err(why) = case.run() {
        support::skip(test, &why);
    }
}

#[test]
fn a_guest_goes_from_qemu_10_0_to_qemu_10_0_without_a_break() {
    run("a_guest_goes_from_qemu_10_0_to_qemu_10_0_without_a_break", &Case::new(Q35_10, PLAIN, Way::Direct));
}

#[test]
fn a_guest_goes_from_qemu_7_2_to_qemu_7_2_without_a_break() {
    run("a_guest_goes_from_qemu_7_2_to_qemu_7_2_without_a_break", &Case::new(Q35_7, PLAIN, Way::Direct));
}

#[test]
fn linux_goes_from_qemu_to_qemu_without_a_break() {
    run("linux_goes_from_qemu_to_qemu_without_a_break", &Case::new(LINUX, PLAIN, Way::Direct));
}

#[test]
fn what_qemu_counts_is_what_passes_by() {
    for setup in [Q35_10, Q35_7] {
        for wire in [PLAIN, Wire { channels: 0, ..PLAIN }] {
            run("what_qemu_counts_is_what_passes_by", &Case::new(setup, wire, Way::Forwarded));
        }
    }
}
