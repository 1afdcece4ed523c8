//! Small pairs of the program's own two roles: that they still run, and that every page arrives.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

const RAM_BYTES: &str = "8388608";

/// Runs them; their figures mean nothing.
pub fn run() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("peers-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the memory");
    let (here, there) = (folder.join("source"), folder.join("target"));
    for file in [&here, &there] {
        done(program(&["--fill", text(file), "--with", "noise", "--bytes", RAM_BYTES]));
    }
    for more in [&["--by", "bare"][..], &["--by", "pageferry"], &["--by", "pageferry", "--again-every", "2"]] {
        done(program(&["--spoil", text(&there)]));
        assert_ne!(fs::read(&here).unwrap(), fs::read(&there).unwrap(), "a spoiled file is no copy");
        pair(&here, &there, more);
        assert!(fs::read(&here).unwrap() == fs::read(&there).unwrap(), "{more:?}: a page is not what was sent");
    }
    fs::remove_dir_all(&folder).expect("the folder can go");
    println!("smoke run: both sides work; perf/peers/run.sh takes the figures");
}

fn pair(here: &Path, there: &Path, more: &[&str]) {
    let side = |role: &str, file: &Path| {
        let mut side = program(&[&["--as", role, "--file", text(file), "--channels", "2"], more].concat());
        let output = BufReader::new(side.stdout.take().expect("its output is piped"));
        (side, output)
    };
    let (target, mut from_target) = side("target", there);
    let (mut source, mut from_source) = side("source", here);
    let to = line(&mut from_target);
    let to = to.strip_prefix("at ").unwrap_or_else(|| panic!("the target said {to:?}"));
    assert_eq!(line(&mut from_source), "ready");
    writeln!(source.stdin.as_mut().expect("its input is piped"), "go {to}").expect("it listens");
    let mut said = line(&mut from_source);
    if said == "mark" {
        said = line(&mut from_source);
    }
    assert!(said.starts_with("done seconds="), "the source said {said:?}");
    assert!(line(&mut from_target).starts_with("done "), "the target did not end well");
    done(source);
    done(target);
}

fn program(arguments: &[&str]) -> Child {
    let mut program = Command::new(std::env::current_exe().expect("the benchmark's own program"));
    program.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    program.spawn().expect("the benchmark's own program starts")
}

/// Closes its input, which ends it, and expects that it ends well.
fn done(mut program: Child) {
    drop(program.stdin.take());
    let status = program.wait().expect("it was started");
    assert!(status.success(), "a side of a run: {status}");
}

fn line(from: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    from.read_line(&mut line).expect("it speaks in text");
    line.trim_end().to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
