//! Runs a test's body in a process of its own, and holds it to leaving no thread and no descriptor behind.

use std::path::Path;
use std::process::Command;

/// Which test the child process is for.
const CHILD: &str = "PAGEFERRY_LIFECYCLE_CHILD";

/// Runs `body` in a child process that runs this one test and nothing else. What it leaves behind fails the test.
///
/// `test` is the test's full name: the child is this test binary, told to run exactly that.
#[track_caller]
pub fn alone(test: &str, body: impl FnOnce()) {
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        // Whatever a first use sets up for the rest of the process is no leak.
        drop(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let before = (threads(), descriptors());
        body();
        let after = (threads(), descriptors());
        assert_eq!(before.0.len(), after.0.len(), "threads before {:?}, after {:?}", before.0, after.0);
        assert_eq!(before.1, after.1, "descriptors before and after");
        return;
    }
    let own = std::env::current_exe().unwrap();
    let mut child = Command::new(own);
    let child = child.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, test);
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}\n{complaint}", output.status);
    // A name that fits no test is a child that ran nothing.
    assert!(said.contains("1 passed"), "no test is called {test}: {said}");
}

/// The names of all threads of this process.
pub fn threads() -> Vec<String> {
    let mut names = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // A thread may end between the listing and the look.
        if let Ok(name) = std::fs::read_to_string(task.unwrap().path().join("comm")) {
            names.push(name.trim().to_owned());
        }
    }
    names.sort();
    names
}

/// What all descriptors of this process lead to, that of the listing apart.
fn descriptors() -> Vec<String> {
    let mut targets = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        if let Ok(target) = std::fs::read_link(entry.unwrap().path()) {
            if !target.starts_with(Path::new("/proc")) {
                targets.push(target.display().to_string());
            }
        }
    }
    targets.sort();
    targets
}
