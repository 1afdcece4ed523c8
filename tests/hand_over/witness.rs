//! After the end: the witness answers who may ask, nobody else disturbs it, and it leaves when it is not needed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::net::Endpoint;
use pageferry::settle::{SETTLER, Settled, settle};
use pageferry::target::Witness;
use pageferry::units::{BlockId, PageSize, SessionId};
use pageferry::wire::control::{FrameEncoder, SourceFrame};
use pageferry::wire::hello::{Hello, HelloRole, Side};
use pageferry::{CancelAnswer, DirtyBitmap, Failure, Outcome, Source, SourceReport, Target, TargetReport, Timeouts};

use crate::Kinds;
use crate::program::{self, Folder};
use crate::proxy::{HEARD, HELLO, Harm, Message, Place, Proxy, Way};
use crate::vmm::{self, TestGuest, TestIncoming};

/// Far longer than anything takes that works.
const LONG: Duration = Duration::from_secs(20);

fn timeouts() -> Timeouts {
    let seconds = Duration::from_secs;
    Timeouts { connect: seconds(5), hello: seconds(5), silence: seconds(5), hook: seconds(5), stall: seconds(5) }
}

pub fn ask(address: &str, session: SessionId) -> Result<Settled, Failure> {
    settle(Endpoint::Addresses(vec![address.parse().unwrap()]), session, &timeouts())
}

/// The first message of this kind, before its first byte.
pub fn before((way, kind): (Way, u16)) -> Place {
    Place { message: Message { way, kind, turn: 0 }, offset: 0 }
}

/// A migration between two threads, harmed at one place; and the target's address.
fn trip(place: Place, harm: Harm) -> (SourceReport, TargetReport, Witness, String, Proxy) {
    let ram = vmm::ram(PageSize::SIZE_4K, &[16]);
    vmm::fill(&ram, 1);
    let dirty = DirtyBitmap::for_ram(&ram);
    let mut guest = TestGuest::new(&ram, &dirty);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let proxy = Proxy::before(&address, Some((place, harm)), Box::new(|harm| panic!("{harm:?}")));
    let source = Source::builder(ram).channels(1).timeouts(timeouts()).connect(proxy.address()).unwrap();
    let receiving = thread::spawn(move || target.receive_and_witness(&mut TestIncoming::new()));
    let sent = source.migrate(&mut dirty.clone(), &mut guest);
    let (received, witness) = receiving.join().unwrap();
    (sent, received, witness, address, proxy)
}

/// The words of a settler: its Hello, and a Query.
fn words(session: SessionId) -> Vec<u8> {
    let own = Hello { role: HelloRole::Control, side: Side::Source, generation: SETTLER, session, features: 0 };
    let mut words = own.encode().to_vec();
    FrameEncoder::new().encode(&SourceFrame::Query { session }, &mut words).unwrap();
    words
}

#[test]
fn strangers_neither_learn_anything_nor_keep_the_witness_from_answering() {
    let (sent, received, mut witness, address, _proxy) = trip(before(Kinds::new().running), Harm::Reset);
    assert!(matches!(sent.outcome, Outcome::Uncertain(_)), "{}", sent.outcome);
    assert_eq!(received.outcome, Outcome::Completed);
    assert!(witness.is_needed());
    assert_eq!(witness.session(), Some(sent.session));
    let cancel = witness.cancel_handle();
    let answering = thread::spawn(move || witness.answer(LONG));

    let silent: Vec<_> = (0..600).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let mut rude: Vec<_> = (0..8).map(|_| TcpStream::connect(&address).unwrap()).collect();
    rude.iter_mut().for_each(|stranger| stranger.write_all(&[0x55; 200]).unwrap());
    // Of those who say a good Hello, too, more than are listened to.
    let mut other = sent.session;
    other.0[3] ^= 1;
    let mut curious: Vec<_> = (0..40).map(|_| TcpStream::connect(&address).unwrap()).collect();
    curious.iter_mut().for_each(|stranger| stranger.write_all(&words(other)[..70]).unwrap());

    assert_eq!(ask(&address, other), Err(Failure::UnknownSession));
    assert_eq!(ask(&address, sent.session), Ok(Settled::RunsThere));
    assert_eq!(ask(&address, sent.session), Ok(Settled::RunsThere), "as often as you like");
    let begun = Instant::now();
    assert_eq!(cancel.cancel(), CancelAnswer::Accepted);
    assert_eq!(answering.join().unwrap(), 2);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop((silent, rude, curious));
    // Somebody else may have got the port by now.
    assert!(ask(&address, sent.session).is_err(), "nobody listens any more");
}

#[test]
fn whoever_asks_and_goes_on_talking_is_sent_away() {
    let (sent, _, mut witness, address, _proxy) = trip(before(Kinds::new().commit), Harm::Close);
    let cancel = witness.cancel_handle();
    let answering = thread::spawn(move || witness.answer(LONG));
    let mut talker = TcpStream::connect(&address).unwrap();
    talker.write_all(&words(sent.session)).unwrap();
    let mut encoder = FrameEncoder::new();
    let mut more = Vec::new();
    (0..2).for_each(|_| encoder.encode(&SourceFrame::Query { session: sent.session }, &mut more).unwrap());
    talker.write_all(&more[more.len() / 2..]).unwrap(); // the second frame of this connection
    let mut heard = Vec::new();
    let _ = talker.read_to_end(&mut heard); // it is over, however it ends
    assert!(heard.len() <= 64 + 17, "a Hello and one answer: {} bytes", heard.len());
    assert_eq!(ask(&address, sent.session), Ok(Settled::NeverWillRunThere));
    cancel.cancel();
    answering.join().unwrap();
}

#[test]
fn a_witness_is_needed_only_where_the_source_may_be_in_doubt() {
    let kinds = Kinds::new();
    let at = |kind, offset| Place { offset, ..before(kind) };
    for (place, harm, needed) in [
        (at((Way::ToTarget, HELLO), 64), Harm::Close, false),
        (before(kinds.loaded), Harm::Reset, true),
        (before(kinds.commit), Harm::Reset, true),
        (before(kinds.running), Harm::Close, true),
        (before((Way::ToTarget, HEARD)), Harm::Reset, true),
        (at((Way::ToTarget, HEARD), 24), Harm::Close, false),
    ] {
        let (sent, received, mut witness, ..) = trip(place, harm);
        let begun = Instant::now();
        // Where it is not, the source's word of that may still be on its way.
        assert_eq!(witness.answer(if needed { Duration::ZERO } else { LONG }), 0);
        assert!(begun.elapsed() < LONG / 2, "it waits for nobody");
        assert_eq!(witness.is_needed(), needed, "{place:?}: {} and {}", sent.outcome, received.outcome);
    }
}

#[test]
fn a_source_that_says_late_that_it_knows_sends_the_witness_home() {
    let (sent, received, mut witness, _, proxy) = trip(before((Way::ToTarget, HEARD)), Harm::Stall);
    assert_eq!((sent.outcome, received.outcome), (Outcome::Completed, Outcome::Completed));
    assert!(witness.is_needed(), "its word is on its way");
    let answering = thread::spawn(move || {
        let begun = Instant::now();
        let answered = witness.answer(LONG);
        (answered, begun.elapsed(), witness.is_needed())
    });
    proxy.release();
    let (answered, took, needed) = answering.join().unwrap();
    assert_eq!((answered, needed), (0, false));
    assert!(took < LONG / 2, "{took:?}");
}

#[test]
fn a_target_that_waits_for_its_source_takes_no_settler_for_it() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[16]);
    vmm::write_page(&ram, BlockId(0), 3, 1);
    let dirty = DirtyBitmap::for_ram(&ram);
    let mut guest = TestGuest::new(&ram, &dirty);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let receiving = thread::spawn(move || target.receive(&mut TestIncoming::new()));
    assert!(ask(&address, SessionId([9; 16])).is_err());
    let source = Source::builder(ram).timeouts(timeouts()).connect(&address).unwrap();
    assert_eq!(source.migrate(&mut dirty.clone(), &mut guest).outcome, Outcome::Completed);
    assert_eq!(receiving.join().unwrap().outcome, Outcome::Completed);
}

/// Runs the program, for people, to its end.
fn pageferry(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pageferry")).args(words).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_sender_in_doubt_prints_the_command_that_settles_it() {
    for (kind, code, said) in
        [(Kinds::new().commit, 4, "does not run there, and never will"), (Kinds::new().running, 0, "runs there")]
    {
        let folder = Folder::new();
        let from = folder.file("from");
        std::fs::write(&from, [7; 5000]).unwrap();
        let to = folder.file("to");
        let mut receiver = program::start(&["receive", "--listen", "127.0.0.1:0", "--ram", &to, "--json"]);
        let harm = Some((before(kind), Harm::Reset));
        let proxy = Proxy::before(&receiver.address(), harm, Box::new(|harm| panic!("{harm:?}")));
        let sent = pageferry(&["send", "--to", proxy.address(), "--ram", &from]);
        assert_eq!(sent.status.code(), Some(3), "{sent:?}");
        let text = String::from_utf8(sent.stdout).unwrap();
        let command = text.lines().find_map(|line| line.split_once("pageferry settle ")).expect(&text).1;
        let settled = pageferry(&[&["settle"], &command.split(' ').collect::<Vec<_>>()[..]].concat());
        assert_eq!(settled.status.code(), Some(code), "{settled:?}");
        assert!(String::from_utf8(settled.stdout).unwrap().contains(said));
        // It stays for longer, should somebody else ask; Ctrl-C sends it home, and changes nothing else.
        receiver.signal("INT");
        let report = receiver.end();
        assert_eq!(report.code, Some(i32::from(code == 4)), "{report:?}");
        assert_eq!(report.lines.last().unwrap()["outcome"], if code == 4 { "failed" } else { "completed" });
        assert_eq!(std::fs::exists(&to).unwrap(), code == 0);
    }
}

#[test]
fn a_target_whose_load_failed_leaves_nobody_in_doubt() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[16]);
    let dirty = DirtyBitmap::for_ram(&ram);
    let mut guest = TestGuest::new(&ram, &dirty);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let source = Source::builder(ram).timeouts(timeouts()).connect(&target.address().unwrap().to_string()).unwrap();
    let receiving = thread::spawn(move || {
        let mut incoming = TestIncoming::new();
        incoming.fail_load = Some("no such device".to_owned());
        target.receive_and_witness(&mut incoming)
    });
    let sent = source.migrate(&mut dirty.clone(), &mut guest);
    let (received, witness) = receiving.join().unwrap();
    assert!(matches!(sent.outcome, Outcome::Failed(_)) && !witness.is_needed(), "{}", received.outcome);
}
