//! All combinations, some of which are drawn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::{LINUX, Q35_10};
use crate::case::{Case, Way};
use crate::guest::Guest;
use crate::machine::{PLAIN, RICH, Setup, Version, Wire};
use crate::support;

/// One of each kind, by a number: the least significant digit first.
struct Digits(u64);

impl Digits {
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        let digit = self.0 % of.len() as u64;
        self.0 /= of.len() as u64;
        of[digit as usize]
    }
}

/// The case with this number, if that is one: QEMU 7.2 has less to choose from, and some things exclude each other.
fn case(number: u64) -> Option<Case> {
    let mut digits = Digits(number);
    let way = digits.pick(&[Way::Stored, Way::Relayed]);
    let channels = digits.pick(&[2, 1, 3, 8, 0]);
    let machine = digits.pick(&["pc-q35-10.0", "pc-q35-9.2", "pc-q35-8.0", "pc-q35-7.2"]);
    let guest = digits.pick(&["bare", "rich", "linux"]);
    let zero_pages = digits.pick(&[None, Some("multifd"), Some("legacy"), Some("none")]);
    let compression = digits.pick(&["none", "zlib", "zstd"]);
    let return_path = digits.pick(&[true, false]);
    let switchover_ack = digits.pick(&[false, true]);
    let zero_copy = digits.pick(&[false, true]);
    let send_channels = digits.pick(&[None, Some(1), Some(0), Some(8)]);
    let send_compression = digits.pick(&[None, Some("none"), Some("zlib"), Some("zstd")]);
    let paused = digits.pick(&[false, true]);
    if digits.0 > 0 {
        return None;
    }
    let version = if machine == "pc-q35-7.2" { Version::V7_2 } else { Version::V10_0 };
    let like = if guest == "linux" { LINUX } else { Q35_10 };
    let devices: &[&str] = if guest == "bare" { &[] } else { RICH };
    let vcpus = if guest == "bare" { 1 } else { 2 };
    let setup = Setup { version, machine, devices, vcpus, ..like };
    let wire = Wire { channels, compression, zero_pages, zero_copy, return_path, switchover_ack, ..PLAIN };
    let old = version == Version::V7_2 && (zero_pages.is_some() || switchover_ack || zero_copy);
    let alone = channels == 0 && (compression != "none" || zero_copy || zero_pages == Some("multifd"));
    let excluded = zero_copy && compression != "none" || switchover_ack && !return_path;
    let sent = send_channels.unwrap_or(channels) == 0 && send_compression.unwrap_or(compression) != "none";
    let other = way == Way::Relayed && (send_channels.is_some() || send_compression.is_some());
    // Nothing tells it from a 7.2, which does not know the answer that it waits for.
    let mistaken = way == Way::Stored && switchover_ack && channels == 0 && machine == "pc-q35-8.0";
    let impossible = old || alone || excluded || sent || other || mistaken;
    (!impossible).then_some(Case { setup, wire, way, send_channels, send_compression, send_dialect: None, paused })
}

/// How many numbers there are, those of no case included.
const NUMBERS: u64 = 2 * 5 * 4 * 3 * 4 * 3 * 2 * 2 * 2 * 4 * 4 * 2;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no whole number")))
}

/// Runs PAGEFERRY_QEMU_CASES cases, drawn by PAGEFERRY_QEMU_SEED, or the one that PAGEFERRY_QEMU_CASE names. With
/// PAGEFERRY_QEMU_REHEARSAL=1 QEMU plays all parts: what fails then is the rig or QEMU, not the program.
#[test]
fn cases_drawn_from_all_combinations() {
    let test = "cases_drawn_from_all_combinations";
    let rehearsal = setting("PAGEFERRY_QEMU_REHEARSAL") == Some(1);
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    let mut seed = setting("PAGEFERRY_QEMU_SEED").unwrap_or(1);
    let one = setting("PAGEFERRY_QEMU_CASE").map(|number| vec![number]);
    let drawn = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 20) % NUMBERS
    });
    let many = setting("PAGEFERRY_QEMU_CASES").unwrap_or(4) as usize;
    let numbers = one.unwrap_or_else(|| drawn.filter(|number| case(*number).is_some()).take(many).collect());
    for number in numbers {
        let mut case = case(number).unwrap_or_else(|| panic!("{number} is no case"));
        if rehearsal {
            case = Case { paused: case.paused, ..Case::new(case.setup, case.wire, Way::Forwarded) };
        }
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| case.run()));
        let seconds = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(Ok(())) => {
                passed += 1;
                println!("case {number}: passed, {seconds:.1} s: {case:?}");
            }
            Ok(Err(why)) => {
                skipped += 1;
                support::skip(test, &format!("case {number}: {why}"));
            }
            Err(_) => {
                println!("case {number}: FAILED, {seconds:.1} s: {case:?}");
                println!("    repeat it: PAGEFERRY_QEMU_CASE={number} tests/soak qemu");
                failed.push(number);
            }
        }
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed.len());
    assert!(failed.is_empty(), "failed: cases {failed:?}");
}

#[test]
fn the_combinations_have_every_kind_in_them() {
    let all: Vec<_> = (0..NUMBERS).filter_map(case).collect();
    assert!(case(NUMBERS).is_none() && all.len() > 1000, "{}", all.len());
    let any = |what: fn(&Case) -> bool| all.iter().any(what);
    assert!(any(|case| case.setup.version == Version::V7_2 && case.wire.channels == 0 && case.way == Way::Relayed));
    assert!(any(|case| case.setup.machine == "pc-q35-8.0" && case.wire.zero_pages == Some("multifd")));
    assert!(any(|case| case.setup.guest == Guest::Linux && case.wire.switchover_ack && case.wire.channels == 8));
    assert!(any(|case| case.wire.zero_copy && case.send_compression == Some("zlib")));
    assert!(any(|case| case.setup.version == Version::V7_2 && case.wire.compression == "zstd"));
}
