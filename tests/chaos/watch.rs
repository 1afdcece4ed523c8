//! Where all threads of this process stand, for a run that does not end.

use std::fs;
use std::process::{Command, Stdio};

/// Prints each thread's name, state and place in the kernel; and, where there is a debugger, where it stands in the
/// program.
pub fn print_where_all_stand() {
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or("gone").trim();
        let (name, call) = (read("comm"), read("syscall"));
        let (name, call) = (name.trim(), call.split(' ').next().unwrap_or_default());
        eprintln!("thread {:?} {name}: {state}, in {}, system call {}", task.file_name(), read("wchan"), call.trim());
    }
    let pid = std::process::id().to_string();
    let arguments = ["-p", &pid, "-batch", "-ex", "thread apply all backtrace 16"];
    let debugger = Command::new("gdb").args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output();
    if let Ok(output) = debugger {
        eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    }
}
