//! Where all threads of this process stand, for a run that does not end.

use std::fs;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Mutex;

/// Prints each thread's name, state and place in the kernel; and, where there is a debugger, where it stands in the
/// program.
pub fn print_where_all_stand() {
    // One at a time: a second debugger would be turned away.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap();
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or("gone").trim();
        let (name, call) = (read("comm"), read("syscall"));
        let (name, call) = (name.trim(), call.split(' ').next().unwrap_or_default());
        eprintln!("thread {:?} {name}: {state}, in {}, system call {}", task.file_name(), read("wchan"), call.trim());
    }
    let pid = std::process::id().to_string();
    let mut debugger = Command::new("timeout");
    debugger.args(["20", "gdb", "-p", &pid, "-batch", "-ex", "thread apply all backtrace 16"]);
    // Not through a pipe of ours: it stops this process while it speaks.
    let out = std::io::stderr().as_fd().try_clone_to_owned().unwrap();
    let _ = debugger.stdin(Stdio::null()).stdout(out).stderr(Stdio::null()).status();
}
