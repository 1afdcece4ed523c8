//! Damaged migrations, over real sockets: `pageferry qemu receive` refuses each in words, or stores what it means.
//!
//! A page whose bytes are damaged is another page, and nothing on the wire says so. What counts is what the streams mean
//! to the plainest receiver there can be: a store that claims to be complete holds that to the byte, and where that
//! receiver finds no meaning there must be no store. PAGEFERRY_MUTANTS says how many, PAGEFERRY_MUTANT which one.
#![cfg(all(not(loom), feature = "cli", feature = "qemu"))]
#![forbid(unsafe_code)]

#[path = "qemu_mutants/capture.rs"]
mod capture;
#[path = "qemu_mutants/mutate.rs"]
mod mutate;
#[path = "support/program.rs"]
mod program;
#[path = "qemu_mutants/reference.rs"]
mod reference;

use std::collections::BTreeMap;
use std::io::{Read, Result, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::qemu::wire::Dialect;
use serde_json::Value;

use capture::{CHANNELS, Capture, PAGE, capture};
use mutate::{Draw, mutate};
use program::{Ended, Folder};
use reference::{Meaning, meaning};

/// How long a receiver may go on after its source has closed everything.
const END_TIME_MAX: Duration = Duration::from_secs(15);
/// How long the end of the main stream waits for channels that nobody reads.
const CHANNELS_TIME_MAX: Duration = Duration::from_secs(1);

/// A connection to a receiver.
trait Way: Read + Write {
    fn bound(&self) -> Result<()>;
    fn say_no_more(&self) -> Result<()>;
}

macro_rules! way {
    ($socket:ty) => {
        impl Way for $socket {
            fn bound(&self) -> Result<()> {
                self.set_read_timeout(Some(END_TIME_MAX))?;
                self.set_write_timeout(Some(END_TIME_MAX))
            }

            fn say_no_more(&self) -> Result<()> {
                self.shutdown(Shutdown::Write)
            }
        }
    };
}

way!(TcpStream);
way!(UnixStream);

fn connect(address: &str) -> Result<Box<dyn Way>> {
    let socket: Box<dyn Way> = match address.strip_prefix("unix:") {
        Some(path) => Box::new(UnixStream::connect(path)?),
        None => Box::new(TcpStream::connect(address)?),
    };
    socket.bound().map(|()| socket)
}

/// Says a stream, and that no more comes; reads what is answered, so that nobody waits for a reader. A channel tells
/// `said` when its stream is out.
fn feed_channel(address: &str, stream: &[u8], said: Sender<()>) {
    // A receiver that has seen enough may be gone, at any byte.
    let Ok(mut socket) = connect(address) else { return };
    let _ = socket.write_all(stream).and_then(|()| socket.say_no_more());
    drop(said);
    let _ = socket.read_to_end(&mut Vec::new());
}

/// The same for the main stream. As with any source, all channels have said all before its last words.
fn feed_main(address: &str, first: &[u8], last: &[u8], channels_said: &Receiver<()>) {
    let Ok(mut socket) = connect(address) else { return };
    let _ = socket.write_all(first);
    // It ends when all senders are gone.
    let _ = channels_said.recv_timeout(CHANNELS_TIME_MAX);
    let _ = socket.write_all(last).and_then(|()| socket.say_no_more());
    let _ = socket.read_to_end(&mut Vec::new());
}

/// What came of it, and whether it had to be told that nothing more comes.
fn receive(capture: &Capture, store: &str) -> (Ended, bool) {
    let folder = Folder::new();
    // What was written to a Unix socket has arrived.
    let listen = if capture.return_path { format!("unix:{}", folder.file("s")) } else { "127.0.0.1:0".to_owned() };
    let channels = CHANNELS.to_string();
    let words = ["qemu", "receive", "--listen", &listen, "--channels", &channels, "--out", store, "--json"];
    let mut receiver = program::start(&words);
    let (address, pid) = (receiver.address(), receiver.pid());
    let streams: Vec<Vec<u8>> = capture.streams.iter().map(|records| records.concat()).collect();
    let last_bytes = capture.streams[0].last().map_or(0, Vec::len);
    let (first, last) = streams[0].split_at(streams[0].len() - last_bytes);
    let (said, channels_said) = channel();
    thread::scope(|scope| {
        let address = &address;
        let mut feeders = vec![scope.spawn(move || feed_main(address, first, last, &channels_said))];
        feeders.extend(streams[1..].iter().map(|stream| {
            let said = said.clone();
            scope.spawn(move || feed_channel(address, stream, said))
        }));
        drop(said);
        let ender = scope.spawn(|| {
            // One that takes its source for a stranger waits for its source: only its user knows that none will come.
            let until = Instant::now() + Duration::from_secs(3);
            while program::runs(pid) && Instant::now() < until {
                thread::park_timeout(Duration::from_millis(2));
            }
            let waits = program::runs(pid);
            if waits {
                program::signal("INT", pid);
            }
            waits
        });
        let ended = receiver.end();
        feeders.into_iter().for_each(|feeder| feeder.join().unwrap());
        (ended, ender.join().unwrap())
    })
}

/// The store holds what the streams mean.
fn compare(store: &Path, meaning: &Meaning) {
    let manifest = std::fs::read_to_string(store.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let blocks = manifest["blocks"].as_array().unwrap();
    let names: Vec<_> = blocks.iter().map(|block| block["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), meaning.blocks.len(), "{names:?}");
    for block in blocks {
        let name = block["name"].as_str().unwrap();
        let found = std::fs::read(store.join(block["file"].as_str().unwrap())).unwrap();
        let expected = &meaning.blocks[name];
        assert_eq!(found.len(), expected.len(), "block {name}");
        for (page, (found, expected)) in found.chunks(PAGE).zip(expected.chunks(PAGE)).enumerate() {
            let torn = meaning.torn.contains(&(name.to_owned(), (page * PAGE) as u64));
            assert!(torn || found == expected, "block {name}: page {page} is not what was sent");
        }
    }
    assert!(std::fs::read(store.join("device.state")).unwrap() == meaning.tail, "the state of the devices");
}

/// Feeds it and judges what comes; how it ended.
fn judge(capture: &Capture) -> &'static str {
    let folder = Folder::new();
    let store = folder.file("store");
    let (ended, waited) = receive(capture, &store);
    let streams: Vec<Vec<u8>> = capture.streams.iter().map(|records| records.concat()).collect();
    let meaning = meaning(&streams, capture.dialect);
    if ended.code == Some(0) {
        ended.expect(0, "completed");
        let meaning = meaning.unwrap_or_else(|error| panic!("stored, though it is damaged: {error}: {ended:#?}"));
        compare(Path::new(&store), &meaning);
        return "stored";
    }
    assert_eq!(folder.names(), [""; 0], "what is left of a store that failed: {ended:#?}");
    // On a busy machine it may have come to its own end just before it was told to.
    if waited && ended.code != Some(1) {
        ended.expect(130, "cancelled");
        return "waited for its source";
    }
    let report = ended.expect(1, "failed");
    assert!(!ended.stderr.contains("panicked"), "{ended:#?}");
    assert!(report["error"].as_str().is_some_and(|error| error.len() > 10), "{report}");
    if meaning.is_err() {
        return "refused";
    }
    eprintln!("    {}", report["error"]);
    "refused, though it has a meaning"
}

#[test]
fn migrations_without_damage_are_stored() {
    for dialect in [Dialect::V10_0, Dialect::V7_2] {
        for return_path in [true, false] {
            assert_eq!(judge(&capture(dialect, return_path)), "stored", "{dialect:?}, return path: {return_path}");
        }
    }
}

/// The damaged migration of a seed, and what was done to it.
fn mutant(seed: u64) -> (Capture, Vec<String>) {
    let mut draw = Draw(seed);
    let dialect = if seed % 3 == 0 { Dialect::V7_2 } else { Dialect::V10_0 };
    let mut mutant = capture(dialect, seed % 2 == 0);
    let changes = (0..=draw.below(3)).map(|_| mutate(&mut mutant, &mut draw)).collect();
    (mutant, changes)
}

#[test]
fn damaged_migrations_are_refused_or_stored_as_what_they_mean() {
    let setting = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a whole number"));
    let seeds = match setting("PAGEFERRY_MUTANT") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("PAGEFERRY_MUTANTS").unwrap_or(100),
    };
    let mut ends = BTreeMap::<_, u32>::new();
    let many = seeds.end - seeds.start;
    for seed in seeds {
        let (mutant, changes) = mutant(seed);
        eprintln!("PAGEFERRY_MUTANT={seed}: {changes:?}");
        let end = judge(&mutant);
        eprintln!("    {end}");
        *ends.entry(end).or_default() += 1;
    }
    println!("{ends:?}");
    let got = |end: &str| u64::from(ends.get(end).copied().unwrap_or(0));
    // Not even one in four leaves a meaning; a receiver that refuses or stores everything is not one.
    assert!(many < 100 || (got("refused") > many / 4 && got("stored") > many / 50), "{ends:?}");
    assert!(got("refused, though it has a meaning") <= many / 10, "{ends:?}");
}

#[test]
fn the_plainest_receiver_finds_the_meaning_of_a_migration_and_none_in_a_cut_one() {
    for dialect in [Dialect::V10_0, Dialect::V7_2] {
        let capture = capture(dialect, true);
        let mut streams: Vec<Vec<u8>> = capture.streams.iter().map(|records| records.concat()).collect();
        let meant = meaning(&streams, dialect).unwrap_or_else(|error| panic!("{dialect:?}: {error}"));
        assert!(
            meant.torn.is_empty() && meant.blocks["ram0"].chunks(PAGE).filter(|page| page != &[0; PAGE]).count() > 30
        );
        let last = streams.last_mut().unwrap();
        last.truncate(last.len() - 1344);
        assert!(meaning(&streams, dialect).is_err());
    }
}

#[test]
fn some_damage_leaves_a_meaning_and_some_does_not() {
    let mut meant = 0;
    for seed in 0..200 {
        let (mutant, _) = mutant(seed);
        let streams: Vec<Vec<u8>> = mutant.streams.iter().map(|records| records.concat()).collect();
        meant += u32::from(meaning(&streams, mutant.dialect).is_ok());
    }
    assert!((10..100).contains(&meant), "{meant} of 200");
}
