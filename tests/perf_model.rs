//! The model in `perf/model`, which says what measured costs come to on larger machines.
#![cfg(not(loom))]
#![forbid(unsafe_code)]

mod support;

use std::io::ErrorKind;
use std::process::Command;

#[test]
fn the_model_gives_the_answers_that_are_known_beforehand() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/perf/model/model.py");
    // -B: leaves no bytecode beside the script.
    match Command::new("python3").args(["-B", model, "--check"]).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
            assert!(
                said.lines().filter(|line| line.starts_with("ok ")).count() >= 10,
                "hardly anything was checked: {said}"
            );
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            support::skip("the_model_gives_the_answers_that_are_known_beforehand", "there is no python3 here");
        }
        Err(e) => panic!("python3: {e}"),
    }
}
