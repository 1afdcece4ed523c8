//! Pages by reference where the kernel will not have it: a limit on locked memory, and a network that copies.
#![cfg(all(not(loom), feature = "cli"))]
#![forbid(unsafe_code)]

#[path = "support/program.rs"]
mod program;
#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use program::{Folder, number};
use serde_json::Value;

const PAGEFERRY: &str = env!("CARGO_BIN_EXE_pageferry");

/// Runs a command to its end; its last line of JSON.
fn report(command: &mut Command) -> Value {
    let done = command.stdin(Stdio::null()).output().unwrap();
    let (said, complaint) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let last = said.lines().last().unwrap_or_else(|| panic!("{command:?} said nothing: {complaint}"));
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {said}{complaint}"))
}

/// Whether a command is there and works here; why not.
fn try_out(command: &[&str]) -> Result<(), String> {
    match Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).output() {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(format!("{}: {}", command.join(" "), String::from_utf8_lossy(&done.stderr))),
        Err(e) => Err(format!("{}: {e}", command[0])),
    }
}

/// Whether this process may lock as much memory as it likes.
fn may_lock_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> CAP_IPC_LOCK & 1 == 1
}

#[test]
fn what_the_limit_on_locked_memory_refuses_is_copied_and_arrives() {
    let without: &[&str] = if may_lock_all() { &["setpriv", "--bounding-set", "-ipc_lock"] } else { &[] };
    let limited = |limit: &str| [without, &["prlimit", &format!("--memlock={limit}:{limit}")]].concat().join(" ");
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    if let Err(why) =
        try_out(&[&words(&limited("0")).iter().map(String::as_str).collect::<Vec<_>>()[..], &["true"]].concat())
    {
        return support::skip("what_the_limit_on_locked_memory_refuses_is_copied_and_arrives", &why);
    }
    let demo =
        ["demo", "--ram", "48M", "--channels", "1", "--dirty-rate", "0", "--zero-copy", "on", "--verify", "full"];
    // Nothing at all; the usual limit of old, less than a batch; a few batches.
    for (limit, gives_up) in [("0", true), ("65536", true), ("8388608", false)] {
        let limited = words(&limited(limit));
        let report = report(Command::new(&limited[0]).args(&limited[1..]).arg(PAGEFERRY).args(demo).arg("--json"));
        assert_eq!((&report["outcome"], &report["verified"]), (&"completed".into(), &true.into()), "{report}");
        let bytes = number(&report, "zero_copy_bytes");
        if gives_up {
            assert_eq!(report["zero_copy_why_copied"], serde_json::json!(["no-memory"]), "{report}");
            assert!(bytes < number(&report, "payload_bytes") / 2, "{report}");
        } else {
            assert!(bytes > 0, "{report}");
        }
    }
}

/// A network namespace that is linked to this one, and gone when it is dropped.
struct Namespace(String);

const OURS: &str = "198.18.77.1/30";
const THEIRS: &str = "198.18.77.2";

impl Namespace {
    fn new() -> Result<Namespace, String> {
        let name = format!("pf-{}", std::process::id());
        let (near, far) = (format!("{name}n"), format!("{name}f"));
        try_out(&["ip", "netns", "add", &name])?;
        let namespace = Namespace(name.clone());
        try_out(&["ip", "link", "add", &near, "type", "veth", "peer", "name", &far, "netns", &name])?;
        try_out(&["ip", "address", "add", OURS, "dev", &near])?;
        try_out(&["ip", "link", "set", &near, "up"])?;
        try_out(&["ip", "-n", &name, "address", "add", &format!("{THEIRS}/30"), "dev", &far])?;
        try_out(&["ip", "-n", &name, "link", "set", &far, "up"])?;
        Ok(namespace)
    }

    /// A receiver in it, and where it listens.
    fn receive(&self, file: &str) -> (Receiver, String) {
        let listen = format!("{THEIRS}:0");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, PAGEFERRY, "receive", "--json", "--listen", &listen, "--ram", file]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        // Whatever else it says is read, so that it need not wait for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        (Receiver(child), line["addr"].as_str().unwrap().to_owned())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The link goes with it.
        let _ = try_out(&["ip", "netns", "delete", &self.0]);
    }
}

/// A receiver, which does not outlive a test that fails.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn between_namespaces_the_kernel_copies_after_all_and_by_itself_it_is_given_up() {
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(why) => {
            return support::skip("between_namespaces_the_kernel_copies_after_all_and_by_itself_it_is_given_up", &why);
        }
    };
    let folder = Folder::new();
    let image: Vec<u8> =
        (0..48u64 << 17).flat_map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes()).collect();
    fs::write(folder.file("a.img"), &image).unwrap();
    for (how, gives_up) in [("auto", true), ("on", false), ("off", false)] {
        let copy = folder.file(how);
        let (mut receiver, to) = namespace.receive(&copy);
        let send =
            ["send", "--json", "--to", &to, "--ram", &folder.file("a.img"), "--zero-copy", how, "--channels", "2"];
        let report = report(Command::new(PAGEFERRY).args(send));
        assert_eq!(report["outcome"], "completed", "{report}");
        assert!(receiver.0.wait().unwrap().success());
        assert!(fs::read(&copy).unwrap() == image, "{how}: the copy differs");
        let [bytes, copied] = ["zero_copy_bytes", "zero_copy_copied_bytes"].map(|field| number(&report, field));
        let why = &report["zero_copy_why_copied"];
        assert_eq!(copied, bytes, "{report}");
        match how {
            "auto" => {
                assert!(bytes > 0 && bytes < image.len() as u64, "{report}");
                assert!(why.as_array().unwrap().contains(&"after-all".into()), "{report}");
            }
            "on" => assert_eq!((bytes, why), (image.len() as u64, &serde_json::json!([null, null])), "{report}"),
            _ => assert_eq!((bytes, why), (0, &serde_json::json!(["asked", "asked"])), "{report}"),
        }
        assert_eq!(gives_up, why.to_string().contains("after-all"));
    }
}
