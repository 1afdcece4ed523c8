//! `pageferry qemu relay`: its lines, its words, its exit codes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use crate::program::{Ended, PAGEFERRY, Program, start};
use crate::world::{Main, Place, SHUT_ERROR, SHUT_OK, TAIL, TEN, Through, hang_up, read, rest, shut};

/// The program, on its way to a made-up destination.
fn relay(more: &[&str]) -> (Program, Place) {
    let destination = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = destination.local_addr().unwrap().to_string();
    let words = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &to, "--json"];
    let mut program = start(&[&words[..], more].concat());
    let at = program.address();
    (program, Place { at, destination })
}

/// A guest that has gone all the way, of which the destination has said nothing.
fn given_away(world: &Place) -> Through {
    let mut through = world.through(TEN, 2);
    through.say_ram(TEN);
    through.say_main(TAIL);
    through
}

#[test]
fn it_says_what_it_passes_on_while_it_does_and_in_the_end() {
    let (mut program, world) = relay(&[]);
    let mut through = world.through(TEN, 2);
    through.say_ram(TEN);
    let line = program.wait_for("RAM is complete", |line| line["event"] == "progress" && line["stage"] == "paused");
    assert_eq!((line["rounds"].as_u64(), line["ram_bytes"].as_u64()), (Some(3), Some(1 << 20)), "{line}");
    assert!(line["wire_bytes"].as_u64() > Some(16384) && line["rate_bytes_s"].is_u64(), "{line}");
    through.say_main(TAIL);
    program.wait_for("all is there", |line| line["stage"] == "handover");
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    let ended = program.end();
    let report = ended.expect(0, "completed");
    assert_eq!((report["command"].as_str(), report["channels"].as_u64()), (Some("qemu relay"), Some(2)));
    let counters = &report["counters"];
    assert_eq!(counters["main_bytes"].as_u64(), Some(Main::usual(TEN).whole().len() as u64), "{report}");
    for (name, number) in [("normal_pages", 4), ("zero_pages", 0), ("sync_packets", 6), ("rounds", 3)] {
        assert_eq!(counters[name].as_u64(), Some(number), "{name} in {report}");
    }
}

#[test]
fn its_exit_codes_tell_a_cancel_from_a_guest_that_may_be_there() {
    let (program, world) = relay(&["--channels", "2"]);
    program.signal("INT");
    assert_eq!(program.end().code, Some(130), "nobody had come");
    drop(world);

    let (program, world) = relay(&["--channels", "2"]);
    let mut through = world.through(TEN, 2);
    program.signal("INT");
    assert_eq!(read(&mut through.main, 8), SHUT_ERROR);
    drop((through.main, through.channels));
    let ended: Ended = program.end();
    ended.expect(130, "cancelled");

    let (program, world) = relay(&["--channels", "2"]);
    let mut through = given_away(&world);
    // Two of the same at once might be one.
    ["INT", "TERM"].iter().for_each(|name| program.signal(name));
    assert_eq!(rest(&mut through.main), [0; 0]);
    drop((through.main, through.channels));
    let ended = program.end();
    ended.expect(3, "uncertain");
    assert!(ended.stderr.contains("too late to cancel"), "{}", ended.stderr);

    let (program, world) = relay(&["--channels", "2"]);
    let mut through = given_away(&world);
    through.main_there.write_all(&shut(0)).unwrap();
    through.main.peek(&mut [0]).unwrap();
    drop((through.main, through.channels));
    program.end().expect(3, "uncertain");
}

#[test]
fn people_are_told_in_words() {
    let destination = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = destination.local_addr().unwrap().to_string();
    let words = ["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &to];
    let mut program =
        Command::new(PAGEFERRY).args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut out, mut first) = (BufReader::new(program.stdout.take().unwrap()), String::new());
    out.read_line(&mut first).unwrap();
    let at = first.strip_prefix("listening at ").and_then(|rest| rest.split_once(", for ")).unwrap().0.to_owned();
    let mut through = given_away(&Place { at, destination });
    through.main_there.write_all(&shut(0)).unwrap();
    assert_eq!(read(&mut through.main, 8), SHUT_OK);
    drop((through.main, through.channels));
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(program.wait().unwrap().success());
    for words in ["completed", "on 2 channels", "4 with data, 0 of zeros", "barriers    3, with 6 SYNCs"] {
        assert!(rest.contains(words), "{words}: {rest}");
    }
}

#[test]
fn a_source_that_leaves_as_the_answer_comes_is_not_told_that_its_guest_is_gone() {
    let (mut program, world) = relay(&["--channels", "2"]);
    let mut through = given_away(&world);
    program.wait_for("all is there", |line| line["stage"] == "handover");
    // The relay sees both at once, and the answer first.
    program.signal("STOP");
    hang_up(&through.main);
    through.main_there.write_all(&shut(0)).unwrap();
    program.signal("CONT");
    assert_eq!(rest(&mut through.main), [0; 0], "it has given up");
    drop((through.main, through.channels));
    let ended = program.end();
    let report = ended.expect(3, "uncertain");
    assert!(report["error"].as_str().unwrap().contains("before the destination has answered"), "{report}");
}
