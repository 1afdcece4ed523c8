//! `qemu::relay` between made-up ends: what is refused does not reach the destination, and nobody who is stuck holds it up.
#![cfg(all(not(loom), feature = "qemu"))]
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::qemu::relay::{Relay, RelayReport};
use pageferry::qemu::wire::{
    Block, Command, Dialect, InitPacket, MainEncoder, Name, NewRamPacket, Record, ReturnMessage,
};
use pageferry::{CancelHandle, Outcome};

fn relay() -> (TcpListener, String, CancelHandle, JoinHandle<RelayReport>) {
    let destination = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = destination.local_addr().unwrap().to_string();
    let relay = Relay::builder().channels(1).listen("127.0.0.1:0").unwrap().to(&to).unwrap();
    let (at, cancel) = (relay.address().unwrap().to_string(), relay.cancel_handle());
    (destination, at, cancel, thread::spawn(move || relay.run()))
}

fn ram() -> Name {
    Name::new("ram").unwrap()
}

/// A main stream with a return path, up to the end of START, and to its end.
fn main_stream() -> (Vec<u8>, Vec<u8>) {
    let mut encoder = MainEncoder::new(Dialect::V10_0);
    let mut put = |records: &[Record<'_>]| {
        let mut out = Vec::new();
        records.iter().for_each(|record| encoder.encode(record, &mut out).unwrap());
        out
    };
    let start = put(&[
        Record::Header,
        Record::Machine(Name::new("pc").unwrap()),
        Record::Command(Command::OpenReturnPath),
        Record::RamStart { section: 1 },
        Record::Blocks(vec![Block::new(ram(), 1 << 20)]),
        Record::Flush,
        Record::EndOfSection,
        Record::Footer,
    ]);
    let tail = b"\x00\x06\x00\x00\x00\x1f{\"page_size\":4096,\"devices\":[]}";
    (start, put(&[Record::RamEnd, Record::Flush, Record::EndOfSection, Record::Footer, Record::Tail(tail)]))
}

fn init() -> [u8; 64] {
    InitPacket { uuid: [0; 16], channel: 0 }.encode()
}

fn packet(offset: u64) -> Vec<u8> {
    let name = ram();
    let header = NewRamPacket { normal: &[offset], ..NewRamPacket::pages(1, &name) }.encode(Dialect::V10_0).unwrap();
    [&header[..], &[7; 4096]].concat()
}

fn sync() -> Vec<u8> {
    NewRamPacket::sync(0).encode(Dialect::V10_0).unwrap().to_vec()
}

/// A source's main connection and channel, and what they became at the destination.
fn connected(destination: &TcpListener, at: &str) -> [TcpStream; 4] {
    let connect = |bytes: &[u8]| {
        let mut source = TcpStream::connect(at).unwrap();
        source.write_all(bytes).unwrap();
        (source, destination.accept().unwrap().0)
    };
    let (main, main_there) = connect(&main_stream().0);
    let (channel, channel_there) = connect(&init());
    [main, channel, main_there, channel_there]
}

#[test]
fn a_guest_arrives_as_it_was_sent_and_the_answer_comes_back_whoever_else_connects() {
    let (destination, at, _, relay) = relay();
    let strangers: Vec<_> = [0, 2, 40]
        .map(|n| {
            let mut stranger = TcpStream::connect(&at).unwrap();
            stranger.write_all(&init()[..n]).unwrap();
            stranger
        })
        .into();
    let [mut main, mut channel, mut main_there, mut channel_there] = connected(&destination, &at);
    let sent = [sync(), packet(0x3000), sync()].concat();
    channel.write_all(&sent).unwrap();
    let (start, end) = main_stream();
    main.write_all(&end).unwrap();
    let mut got = vec![0; start.len() + end.len()];
    main_there.read_exact(&mut got).unwrap();
    assert_eq!(got, [start, end].concat());
    let mut got = vec![0; 64 + sent.len()];
    channel_there.read_exact(&mut got).unwrap();
    assert_eq!(got, [&init()[..], &sent].concat());
    let mut shut = Vec::new();
    ReturnMessage::Shut { error: 0 }.encode(&mut shut);
    main_there.write_all(&shut).unwrap();
    let mut answer = [1; 8];
    main.read_exact(&mut answer).unwrap();
    drop((main, channel, strangers));
    let report = relay.join().unwrap();
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!(answer[..], shut);
    assert_eq!((report.counters.normal_pages, report.counters.sync_packets), (1, 2));
}

#[test]
fn a_packet_outside_its_block_does_not_reach_the_destination_and_the_source_is_told() {
    let (destination, at, _, relay) = relay();
    let [mut main, mut channel, _main_there, mut channel_there] = connected(&destination, &at);
    channel.write_all(&[sync(), packet(1 << 20)].concat()).unwrap();
    let mut got = Vec::new();
    let _ = channel_there.read_to_end(&mut got);
    assert_eq!(got.len(), 64 + sync().len());
    let mut answer = [0; 8];
    main.read_exact(&mut answer).unwrap();
    assert_eq!(answer, [0, 1, 0, 4, 0, 0, 0, 1], "SHUT with an error");
    drop((main, channel));
    let outcome = relay.join().unwrap().outcome;
    assert!(matches!(&outcome, Outcome::Failed(why) if why.to_string().contains("0x100000")), "{outcome}");
}

#[test]
fn a_destination_that_does_not_read_does_not_hold_up_a_cancel() {
    let (destination, at, cancel, relay) = relay();
    let [main, mut channel, _main_there, _channel_there] = connected(&destination, &at);
    channel.write_all(&sync()).unwrap();
    channel.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while channel.write_all(&packet(0)).is_ok() {}
    let asked = Instant::now();
    cancel.cancel();
    assert_eq!(relay.join().unwrap().outcome, Outcome::Cancelled);
    assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
    drop(main);
}
