//! Ctrl-C ends the program at once, wherever it waits.
#![cfg(all(feature = "cli", not(loom)))]

#[path = "support/program.rs"]
mod program;
mod support;

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use program::{Folder, Program, StallingLink, start};

/// From the signal to the report of what became of it, with the end of the process, which is the system's.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Starts a program and interrupts it, until it ended in time: a machine that is busy can hold up one or two.
#[track_caller]
fn ends_at_once(what: &str, mut waiting: impl FnMut() -> Program) {
    let mut times = Vec::new();
    for _ in 0..5 {
        let program = waiting();
        let at = Instant::now();
        program.signal("INT");
        let ended = program.end();
        let time = at.elapsed();
        ended.expect(130, "cancelled");
        times.push(time);
        if time < AT_ONCE {
            eprintln!("{what}: {time:?}");
            return;
        }
    }
    panic!("{what}: from the signal to the end it took {times:?}");
}

/// An image to send.
fn image(folder: &Folder, bytes: usize) -> String {
    let path = folder.file("from");
    std::fs::write(&path, vec![1; bytes]).unwrap();
    path
}

/// Looks at a process until it is where it is to be.
#[track_caller]
fn until(what: &str, is_there: impl Fn() -> bool) {
    let limit = Instant::now() + program::PATIENCE;
    while !is_there() {
        assert!(Instant::now() < limit, "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn an_interrupt_ends_a_sender_that_nobody_answers_and_one_in_the_middle_of_a_round() {
    let folder = Folder::new();
    let from = image(&folder, 16 << 20);
    ends_at_once("waiting for Hello", || {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = start(&["send", "--to", &silent.local_addr().unwrap().to_string(), "--ram", &from, "--json"]);
        let (connection, _) = silent.accept().unwrap();
        // It stays for as long as this process, and says nothing.
        std::mem::forget(connection);
        sender
    });
    ends_at_once("a round, over a link that stalls", || {
        let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &folder.file("to"), "--json"]);
        let link = StallingLink::to(&receiver.address());
        let mut sender = start(&["send", "--to", &link.address.to_string(), "--ram", &from, "--json"]);
        sender.wait_for_pages();
        std::mem::forget(link);
        std::mem::forget(receiver);
        sender
    });
}

#[test]
fn an_interrupt_ends_a_receiver_that_nobody_came_to_and_one_whose_sender_stalls() {
    let folder = Folder::new();
    let receiver = || {
        let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "--ram", &folder.file("to"), "--json"]);
        let address = receiver.address();
        (receiver, address)
    };
    ends_at_once("a receiver alone", || receiver().0);
    ends_at_once("a receiver of half a Hello", || {
        let (receiver, address) = receiver();
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut stream, b"PGFERRY\n").unwrap();
        std::mem::forget(stream);
        receiver
    });
}

/// In a network of its own, where a name server and a target at 192.0.2.1 never answer, as whatever is sent there is lost.
fn in_a_void(folder: &Folder, to: &str) -> Option<Program> {
    let resolv = folder.file("resolv.conf");
    std::fs::write(&resolv, "nameserver 192.0.2.1\n").unwrap();
    let script = format!(
        "ip link add v0 type veth peer name v1 && ip addr add 192.0.2.2/24 dev v0 && ip link set v0 up && \
         ip link set v1 up && ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev v0 && \
         mount --bind {resolv} /etc/resolv.conf"
    );
    let unshare = |script: String| {
        let mut command = Command::new("unshare");
        command.args(["-rmn", "sh", "-c", &script]);
        command
    };
    let tried = unshare(script.clone()).output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        return None;
    }
    let (program, from) = (env!("CARGO_BIN_EXE_pageferry"), image(folder, 4096));
    Some(program::launch(unshare(format!("{script} && exec {program} send --to {to} --ram {from} --json"))))
}

#[test]
fn an_interrupt_ends_a_name_that_is_not_resolved_and_a_connect_that_is_not_answered() {
    let folder = Folder::new();
    let name = "an_interrupt_ends_a_name_that_is_not_resolved_and_a_connect_that_is_not_answered";
    if in_a_void(&folder, "192.0.2.1:1").is_none() {
        return support::skip(name, "no namespaces of users, mounts and networks, or no veth");
    }
    ends_at_once("resolving", || {
        let sender = in_a_void(&folder, "nobody.example:1").unwrap();
        let tasks = format!("/proc/{}/task", sender.pid());
        until("it resolves", || {
            let tasks = std::fs::read_dir(&tasks).into_iter().flatten().map_while(Result::ok);
            let mut names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
            names.any(|name| name.trim() == "pf-resolve")
        });
        sender
    });
    ends_at_once("connecting", || {
        let sender = in_a_void(&folder, "192.0.2.1:1").unwrap();
        let sockets = format!("/proc/{}/net/tcp", sender.pid());
        // The fourth field is the state, and 02 is SYN_SENT.
        let waits = |table: String| table.lines().any(|line| line.split_whitespace().nth(3) == Some("02"));
        until("it connects", || std::fs::read_to_string(&sockets).is_ok_and(waits));
        sender
    });
}
