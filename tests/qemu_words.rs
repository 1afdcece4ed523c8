//! What `pageferry qemu` says when something is wrong, or right: what came, what was expected, and where to look.
#![cfg(all(not(loom), feature = "cli", feature = "qemu"))]
#![forbid(unsafe_code)]

#[path = "support/program.rs"]
mod program;
#[path = "qemu_store/source.rs"]
mod source;
#[path = "support/stores.rs"]
mod stores;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use pageferry::qemu::wire::{InitPacket, ReturnMessage};
use program::{Folder, Program, start};
use source::{Source, stored};
use stores::receive;

/// A connection that says that it is this channel, of a machine with this uuid.
fn channel(address: &str, channel: u8, uuid: u8) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&InitPacket { uuid: [uuid; 16], channel }.encode()).unwrap();
    stream
}

/// A main connection that has begun and is being read, as its ping was answered: whoever spoke before it was heard, too.
fn begun(address: &str) -> Source {
    let mut source = Source::new(TcpStream::connect(address).unwrap());
    source.head(&[]);
    let mut pong = [0; 8];
    source.stream.read_exact(&mut pong).unwrap();
    assert_eq!(pong, *b"\0\x02\0\x04\0\0\0\x01");
    source
}

/// What it says in the end of a source that leaves.
fn left(program: Program) -> String {
    let ended = program.end();
    let error = ended.expect(1, "failed")["error"].as_str().unwrap().to_owned();
    assert!(error.contains("the source gave up or died in the middle of the stream ("), "{error}");
    error
}

#[test]
fn a_source_that_leaves_has_given_up_and_where_is_said_too() {
    let folder = Folder::new();
    let (program, address) = receive(&folder.file("store"), "0", &[]);
    drop(begun(&address));
    let error = left(program);
    // A reset, where it has not read all that it was told.
    assert!(error.contains("main stream, byte ") || error.contains("(os error 104)"), "{error}");
    assert!(!error.contains("multifd-channels") && !error.contains("broke the protocol"), "{error}");
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn of_channels_that_are_missing_it_is_said_how_many_came() {
    let folder = Folder::new();
    let (program, address) = receive(&folder.file("store"), "3", &[]);
    let first = channel(&address, 1, 0);
    drop(begun(&address));
    let error = left(program);
    assert!(error.contains("of channels, 3 were expected and 1 came: --channels must be"), "{error}");
    assert!(error.contains("multifd-channels"), "{error}");
    drop(first);
}

#[test]
fn of_channels_that_are_too_many_it_is_said_how_many_came() {
    let folder = Folder::new();
    let (program, address) = receive(&folder.file("store"), "1", &[]);
    let channels = [channel(&address, 0, 0), channel(&address, 2, 0)];
    // It is turned away.
    let _ = (&channels[1]).read(&mut [0]);
    drop(begun(&address));
    let error = left(program);
    assert!(error.contains("of channels, 1 were expected and 3 or more came"), "{error}");
    assert!(error.contains("multifd-channels"), "{error}");
}

#[test]
fn channels_of_different_uuids_are_of_no_one_source() {
    let folder = Folder::new();
    let (program, address) = receive(&folder.file("store"), "2", &[]);
    let channels = [channel(&address, 0, 1), channel(&address, 1, 2)];
    drop(begun(&address));
    let error = left(program);
    assert!(error.contains("channels came with different uuids"), "{error}");
    drop(channels);
}

#[test]
fn nobody_is_told_to_use_an_option_that_is_not_there() {
    let folder = Folder::new();
    let store = folder.file("store");
    let mut program = start(&stores::receiver(&store, "0.0.0.0:0", "0"));
    let address = program.address().replace("0.0.0.0", "127.0.0.1");
    let mut stranger = TcpStream::connect(&address).unwrap();
    stranger.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
    let _ = stranger.read(&mut [0]);
    let mut source = Source::new(TcpStream::connect(&address).unwrap());
    source.migrate();
    assert_eq!(source.answer(), Some(ReturnMessage::Shut { error: 0 }));
    drop(source);
    let ended = program.end();
    let report = ended.expect(0, "completed").to_string();
    assert!(report.contains("it speaks TLS, and this side does not; turn QEMU's parameter tls-creds off"), "{report}");
    assert!(ended.stderr.contains("use a network that you trust"), "{}", ended.stderr);
    assert!(!report.contains("--tls-dir") && !ended.stderr.contains("--tls-dir"), "{report} {}", ended.stderr);
}

#[test]
fn who_gives_up_waiting_hears_of_a_source_that_was_turned_away() {
    let folder = Folder::new();
    let relay = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:1", "--json"];
    let store = folder.file("store");
    let receive = ["qemu", "receive", "--listen", "127.0.0.1:0", "--channels", "0", "--out", &store, "--json"];
    for command in [&relay[..], &receive] {
        let mut program = start(command);
        let address = program.address();
        let mut source = TcpStream::connect(&address).unwrap();
        source.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
        let _ = source.read(&mut [0]);
        program.signal("INT");
        let ended = program.end();
        ended.expect(130, "cancelled");
        assert!(ended.stderr.contains("turned away: it speaks TLS"), "{}", ended.stderr);
    }
}

#[test]
fn of_a_destination_that_closes_the_connection_its_log_says_why() {
    let folder = Folder::new();
    let store = stored(&folder);
    for channels in ["0", "2"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let sender = stores::send(&store, &to, channels, &[]);
        // As a QEMU does that has another machine: it reads the beginning, and exits.
        let (mut main, _) = listener.accept().unwrap();
        let channels = (0..channels.parse().unwrap()).map(|_| listener.accept().unwrap().0).collect::<Vec<_>>();
        main.read_exact(&mut [0; 8]).unwrap();
        drop((main, channels, listener));
        let ended = sender.end();
        let error = ended.expect(1, "failed")["error"].as_str().unwrap();
        assert!(error.contains(": the destination closed the connection, and its own log says why"), "{error}");
    }
}

#[test]
fn people_are_told_what_was_checked_of_a_store_that_was_sent() {
    let folder = Folder::new();
    let store = stored(&folder);
    let (program, address) = receive(&folder.file("again"), "2", &[]);
    let mut sender = std::process::Command::new(program::PAGEFERRY);
    let output = sender.args(["qemu", "send", "--to", &address, "--in", &store]).output().unwrap();
    program.end().expect(0, "completed");
    let words = String::from_utf8(output.stdout).unwrap();
    let checked = "completed; RAM is what was stored, by its digests, and the destination has taken the machine\n";
    assert!(words.contains(checked), "{words}");
}
