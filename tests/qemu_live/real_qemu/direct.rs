//! The rig itself: between two QEMUs of one kind the guest must go on without a break, or it judges nobody.

use super::{LINUX, Q35_7, Q35_10, run};
use crate::case::{Case, Way};
use crate::machine::{PLAIN, Wire};

#[test]
fn a_guest_goes_from_qemu_10_0_to_qemu_10_0_without_a_break() {
    let case = Case::new(Q35_10, PLAIN, Way::Direct);
    run("a_guest_goes_from_qemu_10_0_to_qemu_10_0_without_a_break", || case.run());
}

#[test]
fn a_guest_goes_from_qemu_7_2_to_qemu_7_2_without_a_break() {
    let case = Case::new(Q35_7, PLAIN, Way::Direct);
    run("a_guest_goes_from_qemu_7_2_to_qemu_7_2_without_a_break", || case.run());
}

#[test]
fn linux_goes_from_qemu_to_qemu_without_a_break() {
    run("linux_goes_from_qemu_to_qemu_without_a_break", || Case::new(LINUX, PLAIN, Way::Direct).run());
}

#[test]
fn what_qemu_counts_is_what_passes_by() {
    for setup in [Q35_10, Q35_7] {
        for wire in [PLAIN, Wire { channels: 0, ..PLAIN }] {
            run("what_qemu_counts_is_what_passes_by", || Case::new(setup, wire, Way::Forwarded).run());
        }
    }
}
