//! A made-up source and a made-up destination, with a relay between them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pageferry::qemu::relay::{Relay, RelayBuilder, RelayReport, StopHandle};
use pageferry::qemu::wire::{
    Block, Command, Dialect, InitPacket, MainEncoder, Name, NewRamPacket, Record, ReturnMessage,
};
use pageferry::{CancelHandle, Progress, Timeouts};

/// How long anything may take: far more than it does, so that only what hangs is caught.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to be let go: less than a source has to hear the last word.
pub const SOON: Duration = Duration::from_millis(800);
/// The relay's limits, so short that tests can wait for them.
pub const STALL: Duration = Duration::from_millis(600);
pub const SILENCE: Duration = Duration::from_millis(300);
pub const HELLO: Duration = Duration::from_millis(1500);

pub const BLOCK_BYTES: u64 = 1 << 20;
/// Devices, the end mark, and their description.
pub const TAIL: &[u8] = b"\x04some device\x01\x00\x06\x00\x00\x00\x1f{\"page_size\":4096,\"devices\":[]}";
pub const SHUT_OK: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
pub const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
pub const SHUT_ERROR: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 1];

/// Which stream a source speaks.
#[derive(Clone, Copy, Debug)]
pub struct Tongue {
    pub dialect: Dialect,
    pub return_path: bool,
    /// It asks the destination for a sign of life.
    pub pings: bool,
    /// Barriers are flush words; at the end of every section otherwise.
    pub flushes: bool,
}

pub const TEN: Tongue = Tongue { dialect: Dialect::V10_0, return_path: true, pings: false, flushes: true };
pub const SEVEN: Tongue = Tongue { dialect: Dialect::V7_2, return_path: true, pings: false, flushes: false };

pub fn ram() -> Name {
    Name::new("ram").unwrap()
}

/// The parts of a main stream.
pub struct Main {
    pub start: Vec<u8>,
    pub parts: Vec<Vec<u8>>,
    /// The section END, before the tail.
    pub end: Vec<u8>,
}

impl Main {
    /// With so many sections PART, each of which says this.
    pub fn new(tongue: Tongue, parts: usize, each: &[Record<'_>]) -> Main {
        // What 7.2 says on this connection, 10.0 may say.
        let mut encoder = MainEncoder::new(tongue.dialect);
        let mut put = |records: &[Record<'_>]| {
            let mut out = Vec::new();
            let spoken = records.iter().filter(|record| match record {
                Record::Flush => tongue.flushes,
                Record::Command(Command::OpenReturnPath) => tongue.return_path,
                Record::Command(Command::Ping { .. }) => tongue.pings,
                _ => true,
            });
            spoken.for_each(|record| encoder.encode(record, &mut out).unwrap());
            out
        };
        let start = put(&[
            Record::Header,
            Record::Machine(Name::new("pc").unwrap()),
            Record::Command(Command::OpenReturnPath),
            Record::Command(Command::Ping { value: 1 }),
            Record::RamStart { section: 1 },
            Record::Blocks(vec![Block::new(ram(), BLOCK_BYTES)]),
            Record::Flush,
            Record::EndOfSection,
            Record::Footer,
        ]);
        let section = [&[Record::RamPart], each, &[Record::EndOfSection, Record::Footer]].concat();
        let parts = (0..parts).map(|_| put(&section)).collect();
        let end = put(&[Record::RamEnd, Record::Flush, Record::EndOfSection, Record::Footer]);
        Main { start, parts, end }
    }

    /// START, one PART with a barrier, END.
    pub fn usual(tongue: Tongue) -> Main {
        Main::new(tongue, 1, &[Record::Flush])
    }

    pub fn whole(&self) -> Vec<u8> {
        [&self.start[..], &self.parts.concat(), &self.end, TAIL].concat()
    }
}

pub fn init(channel: u8) -> [u8; 64] {
    InitPacket { uuid: [0; 16], channel }.encode()
}

/// One page.
pub fn packet(dialect: Dialect, offset: u64) -> Vec<u8> {
    let name = ram();
    let header = NewRamPacket { normal: &[offset], ..NewRamPacket::pages(1, &name) }.encode(dialect).unwrap();
    [&header[..], &[7; 4096]].concat()
}

pub fn sync(dialect: Dialect) -> Vec<u8> {
    NewRamPacket::sync(0).encode(dialect).unwrap().to_vec()
}

/// Where a relay listens, and the listener behind it.
pub struct Place {
    pub at: String,
    pub destination: TcpListener,
}

/// A relay that runs.
pub struct World {
    place: Place,
    pub cancel: CancelHandle,
    pub stop: StopHandle,
    pub progress: Progress,
    relay: JoinHandle<RelayReport>,
}

impl Deref for World {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

/// A connection through the relay: the source's end, and the destination's.
pub struct Through {
    pub main: TcpStream,
    pub main_there: TcpStream,
    pub channels: Vec<TcpStream>,
    pub channels_there: Vec<TcpStream>,
}

pub fn timeouts() -> Timeouts {
    Timeouts { stall: STALL, silence: SILENCE, hello: HELLO, connect: HELLO, ..Timeouts::default() }
}

impl World {
    pub fn new(channels: impl Into<Option<u8>>) -> World {
        let builder = Relay::builder().timeouts(timeouts());
        World::with(match channels.into() {
            Some(channels) => builder.channels(channels),
            None => builder,
        })
    }

    pub fn with(builder: RelayBuilder) -> World {
        let destination = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = destination.local_addr().unwrap().to_string();
        let relay = builder.listen("127.0.0.1:0").unwrap().to(&to).unwrap();
        let (at, cancel, stop) = (relay.address().unwrap().to_string(), relay.cancel_handle(), relay.stop_handle());
        let progress = relay.progress();
        let place = Place { at, destination };
        World { place, cancel, stop, progress, relay: thread::spawn(move || relay.run()) }
    }

    pub fn end(self) -> RelayReport {
        self.relay.join().unwrap()
    }
}

impl Place {
    /// A connection that has said this.
    pub fn connect(&self, said: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.at).unwrap();
        patient(&stream);
        stream.write_all(said).unwrap();
        stream
    }

    /// The next connection of the relay, and its first bytes.
    pub fn accept(&self, bytes: usize) -> (TcpStream, Vec<u8>) {
        let mut stream = self.destination.accept().unwrap().0;
        patient(&stream);
        let said = read(&mut stream, bytes);
        (stream, said)
    }

    /// Waits until the relay has read everything that it was sent before. It turns strangers away in the order in which they
    /// come, and the first may be on its way out while it listens to the rest.
    pub fn settle(&self) {
        for _ in 0..2 {
            rest(&mut self.connect(b"GET / HTTP/1.1\r\n"));
        }
    }

    /// Whether the relay has not connected to the destination.
    pub fn is_untouched(&self) -> bool {
        self.destination.set_nonblocking(true).unwrap();
        let untouched = self.destination.accept().is_err();
        self.destination.set_nonblocking(false).unwrap();
        untouched
    }

    /// A source with so many channels that has said START, and each channel its first SYNC; the destination has read that.
    pub fn through(&self, tongue: Tongue, channels: u8) -> Through {
        let main = Main::usual(tongue);
        let source = self.connect(&main.start);
        let channels: Vec<_> =
            (0..channels).map(|id| self.connect(&[&init(id)[..], &sync(tongue.dialect)].concat())).collect();
        self.arrive(source, channels, &main.start, tongue)
    }

    /// What of it reaches the destination.
    pub fn arrive(&self, main: TcpStream, channels: Vec<TcpStream>, start: &[u8], tongue: Tongue) -> Through {
        let (mut main_there, said) = self.accept(4);
        assert_eq!(said, b"QEVM", "the main connection comes first");
        let mut channels_there = Vec::new();
        for id in 0..channels.len() {
            let (channel, said) = self.accept(64 + 1344);
            assert_eq!(said, [&init(id as u8)[..], &sync(tongue.dialect)].concat());
            channels_there.push(channel);
        }
        assert_eq!(read(&mut main_there, start.len() - 4), start[4..]);
        Through { main, main_there, channels, channels_there }
    }
}

impl Through {
    /// All channels say this, and the destination reads it.
    pub fn say(&mut self, bytes: &[u8]) {
        self.channels.iter_mut().for_each(|channel| channel.write_all(bytes).unwrap());
        for channel in &mut self.channels_there {
            assert_eq!(read(channel, bytes.len()), bytes);
        }
    }

    /// The main connection says this, and the destination reads it.
    pub fn say_main(&mut self, bytes: &[u8]) {
        self.main.write_all(bytes).unwrap();
        assert_eq!(read(&mut self.main_there, bytes.len()), bytes);
    }

    /// A round with a page on each channel, then END; all but the tail.
    pub fn say_ram(&mut self, tongue: Tongue) {
        let main = Main::usual(tongue);
        for section in main.parts.iter().chain([&main.end]) {
            self.say(&[packet(tongue.dialect, 0x3000), sync(tongue.dialect)].concat());
            self.say_main(section);
        }
    }
}

fn patient(stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
}

pub fn read(from: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let mut got = vec![0; bytes];
    from.read_exact(&mut got).unwrap_or_else(|e| panic!("{bytes} bytes were to come: {e}"));
    got
}

/// Everything up to the end, be it in order or not.
pub fn rest(from: &mut TcpStream) -> Vec<u8> {
    let mut got = Vec::new();
    if let Err(e) = from.read_to_end(&mut got) {
        assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock, "it was to end: {got:?}");
    }
    got
}

/// Closes a connection so that its peer reads the end of the stream, and no reset.
pub fn hang_up(stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Makes the system refuse whoever connects to this listener.
pub fn close(listener: &TcpListener) {
    let socket = TcpStream::from(OwnedFd::from(listener.try_clone().unwrap()));
    socket.shutdown(Shutdown::Both).unwrap();
}

pub fn shut(error: u32) -> Vec<u8> {
    let mut out = Vec::new();
    ReturnMessage::Shut { error }.encode(&mut out);
    out
}
