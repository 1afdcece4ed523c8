//! What the integration tests share: how a test says that this machine lacks what it needs.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;

/// Says loudly that `test` did not run, and why.
///
/// The line goes to stderr, and to the file that `PAGEFERRY_SKIP_LOG` names: cargo swallows what a passing test
/// prints, so that `tests/run` could not count skips otherwise. The caller returns right after it.
///
/// # Panics
///
/// When the log cannot be written: a skip that nobody sees would count as a pass.
pub fn skip(test: &str, why: &str) {
    // One line per skip, whatever the reason contains: `tests/run` counts lines.
    let line = format!("SKIPPED {test}: {}\n", why.split_whitespace().collect::<Vec<_>>().join(" "));
    eprint!("{line}");
    if let Some(path) = std::env::var_os("PAGEFERRY_SKIP_LOG") {
        // One write of one line, in append mode: lines of tests that skip at the same time do not mix.
        let log = OpenOptions::new().create(true).append(true).open(&path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap_or_else(|error| panic!("cannot write the skip log {path:?}: {error}"));
    }
}
