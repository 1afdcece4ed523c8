//! Damaged streams: the relay ends, whatever they are, and what reaches the destination is what was sent, or less.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::qemu::relay::Relay;
use pageferry::qemu::wire::Dialect;
use pageferry::{Outcome, Timeouts};

use crate::world::{Main, SEVEN, TAIL, TEN, World, init, packet, shut, sync};

/// How long a source waits for an answer before it goes away.
const ANSWER: Duration = Duration::from_millis(300);
/// How long anything may take after that.
const END: Duration = Duration::from_secs(10);

/// Numbers that look random, the same each time (xorshift).
struct Draw(u64);

impl Draw {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// A sound main stream and two channels.
fn sound(dialect: Dialect) -> [Vec<u8>; 3] {
    let tongue = if dialect == Dialect::V10_0 { TEN } else { SEVEN };
    let round = [packet(dialect, 0x3000), packet(dialect, 0), sync(dialect)].concat();
    let channel = |id: u8| [&init(id)[..], &sync(dialect), &round.repeat(2)].concat();
    [Main::usual(tongue).whole(), channel(0), channel(1)]
}

fn damage(draw: &mut Draw, streams: &mut [Vec<u8>; 3]) {
    let stream = &mut streams[draw.below(3)];
    // Headers are where it hurts: pages are most of a channel.
    let places = if draw.below(2) == 0 { stream.len() } else { stream.len().min(400) };
    let at = draw.below(places);
    match draw.below(5) {
        0 => stream.truncate(at),
        1 => stream[at] = draw.below(256) as u8,
        2 => stream[at] ^= 1 << draw.below(8),
        3 => drop(stream.drain(at..(at + 1 + draw.below(16)).min(stream.len()))),
        _ => {
            let more: Vec<_> = (0..=draw.below(8)).map(|_| draw.below(256) as u8).collect();
            stream.splice(at..at, more);
        }
    }
}

/// Reads everything, and says that all is well once the end of the guest is there.
fn destination(mut stream: TcpStream) -> Vec<u8> {
    let (mut got, mut piece) = (Vec::new(), [0; 8192]);
    while let Ok(n @ 1..) = stream.read(&mut piece) {
        got.extend_from_slice(&piece[..n]);
        if got.starts_with(b"QEVM") && got.ends_with(TAIL) {
            let _ = stream.write_all(&shut(0));
        }
    }
    got
}

fn play(streams: &[Vec<u8>; 3]) {
    let timeouts = Timeouts { stall: ANSWER / 2, silence: ANSWER, hello: ANSWER, ..Timeouts::default() };
    let world = World::with(Relay::builder().channels(2).timeouts(timeouts));
    let sources = streams.clone().map(|bytes| {
        let stream = TcpStream::connect(&world.at);
        thread::spawn(move || {
            // Damage in another one may have ended it all by now.
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(&bytes);
            stream.set_read_timeout(Some(ANSWER)).unwrap();
            let _ = stream.read(&mut [0; 8]);
        })
    });
    let listener = world.destination.try_clone().unwrap();
    let there = thread::spawn(move || {
        let accepted: Vec<_> =
            listener.incoming().map_while(Result::ok).map(|s| thread::spawn(|| destination(s))).collect();
        accepted.into_iter().map(|there| there.join().unwrap()).collect::<Vec<_>>()
    });
    sources.into_iter().for_each(|source| source.join().unwrap());
    let gone = Instant::now();
    let (cancel, listener) = (world.cancel.clone(), world.destination.try_clone().unwrap());
    // Without a main connection there is no source: then it waits for one.
    let begins = streams[0].starts_with(b"QEVM\0\0\0\x03\x07\0\0\0\x02pc");
    if !begins {
        cancel.cancel();
    }
    let report = world.end();
    assert!(gone.elapsed() < END, "{:?}: {report:?}", gone.elapsed());
    crate::world::close(&listener);
    let there = there.join().unwrap();
    for got in &there {
        assert!(streams.iter().any(|sent| sent.starts_with(got)), "something else arrived: {report:?}");
    }
    if report.outcome == Outcome::Completed {
        assert!(there[0].ends_with(TAIL) && there.len() == 3, "{report:?}");
    }
    let is_sound = [Dialect::V10_0, Dialect::V7_2].into_iter().any(|dialect| *streams == sound(dialect));
    assert!(!is_sound || report.outcome == Outcome::Completed, "{report:?}");
}

#[test]
fn damaged_streams_end_in_bounded_time_and_nothing_is_made_up() {
    let count = std::env::var("PAGEFERRY_RELAY_MUTANTS").ok().and_then(|n| n.parse().ok()).unwrap_or(15);
    let workers: Vec<_> = (0..4_u64)
        .map(|worker| {
            thread::spawn(move || {
                let mut draw = Draw(0x9E37_79B9_7F4A_7C15 ^ (worker << 32));
                for index in 0..count {
                    let dialect = if index % 2 == 0 { Dialect::V10_0 } else { Dialect::V7_2 };
                    let mut streams = sound(dialect);
                    if index > 1 {
                        damage(&mut draw, &mut streams);
                    }
                    play(&streams);
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}
