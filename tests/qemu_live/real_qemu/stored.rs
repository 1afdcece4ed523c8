//! Out of a QEMU into a store, and out of the store into another QEMU: one test a mechanism.

use super::{LINUX, Q35_7, Q35_10, run_case};
use crate::case::{Case, Way};
use crate::machine::{PLAIN, RICH, Setup, Wire};

fn stored(setup: Setup, wire: Wire) -> Case {
    Case::new(setup, wire, Way::Stored)
}

#[test]
fn a_guest_of_qemu_10_0_is_stored_and_goes_on() {
    run_case("a_guest_of_qemu_10_0_is_stored_and_goes_on", &stored(Q35_10, PLAIN));
}

#[test]
fn linux_that_stands_still_is_stored_to_the_byte() {
    let case = Case { paused: true, ..stored(LINUX, PLAIN) };
    run_case("linux_that_stands_still_is_stored_to_the_byte", &case);
}

#[test]
fn a_guest_of_qemu_7_2_is_stored_and_goes_on() {
    run_case("a_guest_of_qemu_7_2_is_stored_and_goes_on", &stored(Q35_7, Wire { channels: 3, ..PLAIN }));
}

#[test]
fn a_guest_that_came_without_channels_goes_on_through_three() {
    let case = Case { send_channels: Some(3), ..stored(Q35_10, Wire { channels: 0, ..PLAIN }) };
    run_case("a_guest_that_came_without_channels_goes_on_through_three", &case);
}

#[test]
fn a_guest_that_came_through_one_channel_goes_on_without_any() {
    let case = Case { send_channels: Some(0), ..stored(Q35_7, Wire { channels: 1, ..PLAIN }) };
    run_case("a_guest_that_came_through_one_channel_goes_on_without_any", &case);
}

#[test]
fn zlib_arrives_and_zstd_leaves() {
    let wire = Wire { channels: 3, compression: "zlib", ..PLAIN };
    run_case("zlib_arrives_and_zstd_leaves", &Case { send_compression: Some("zstd"), ..stored(Q35_10, wire) });
}

#[test]
fn zstd_arrives_and_zlib_leaves_for_qemu_7_2() {
    let wire = Wire { channels: 8, compression: "zstd", ..PLAIN };
    run_case(
        "zstd_arrives_and_zlib_leaves_for_qemu_7_2",
        &Case { send_compression: Some("zlib"), ..stored(Q35_7, wire) },
    );
}

#[test]
fn a_barrier_after_each_section_is_kept() {
    let setup = Setup { machine: "pc-q35-8.0", ..Q35_10 };
    run_case("a_barrier_after_each_section_is_kept", &stored(setup, Wire { channels: 3, ..PLAIN }));
}

/// As QEMU 8.1 to 9.1 has them.
#[test]
fn packets_of_7_2_with_the_barrier_of_10_0_go_on() {
    let setup = Setup { machine: "pc-q35-8.2", ..Q35_10 };
    let case = Case { send_dialect: Some("7.2"), ..stored(setup, Wire { channels: 3, ..PLAIN }) };
    run_case("packets_of_7_2_with_the_barrier_of_10_0_go_on", &case);
}

#[test]
fn zero_pages_on_the_main_stream_are_taken() {
    let setup = Setup { machine: "pc-q35-9.2", ..Q35_10 };
    let wire = Wire { zero_pages: Some("legacy"), ..PLAIN };
    run_case("zero_pages_on_the_main_stream_are_taken", &stored(setup, wire));
}

#[test]
fn zero_pages_that_come_as_data_stay_holes_and_nobody_needs_a_return_path() {
    let wire = Wire { zero_pages: Some("none"), return_path: false, ..PLAIN };
    run_case("zero_pages_that_come_as_data_stay_holes_and_nobody_needs_a_return_path", &stored(Q35_10, wire));
}

#[test]
fn the_switchover_is_acknowledged() {
    run_case("the_switchover_is_acknowledged", &stored(Q35_10, Wire { switchover_ack: true, ..PLAIN }));
}

#[test]
fn pages_that_are_sent_by_reference_arrive() {
    run_case("pages_that_are_sent_by_reference_arrive", &stored(Q35_10, Wire { zero_copy: true, ..PLAIN }));
}

#[test]
fn linux_with_devices_is_stored_and_goes_on() {
    run_case("linux_with_devices_is_stored_and_goes_on", &stored(LINUX, Wire { channels: 3, ..PLAIN }));
}

#[test]
fn devices_of_qemu_7_2_are_stored_and_go_on() {
    run_case("devices_of_qemu_7_2_are_stored_and_go_on", &stored(Setup { devices: RICH, vcpus: 2, ..Q35_7 }, PLAIN));
}
