//! A source of QEMU's wire and destinations that misbehave: it ends in bounded time, and it never leaves one waiting for a
//! SYNC that does not come.
#![cfg(all(not(loom), feature = "qemu"))]

#[path = "support/qemu_tail.rs"]
mod qemu_tail;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::dirty::combined::Still;
use pageferry::framing::read::PacketReader;
use pageferry::framing::{Dialogue, Framing, Garbled, Heard, PacketWriter, Place, Room, Zeros};
use pageferry::memory::gather::Gather;
use pageferry::qemu::Qemu;
use pageferry::qemu::wire::{Barrier, ChannelDecoder, ChannelEvent, Dialect, MainDecoder, Record, ReturnMessage};
use pageferry::source::SourceBuilder;
use pageferry::units::{BlockId, ChannelId, Item, PageSize, Round};
use pageferry::wire::control::{BlockInfo, SourceFrame, TargetFrame};
use pageferry::wire::hello::Hello;
use pageferry::wire::packet::RunEntry;
use pageferry::{DirtyBitmap, DirtySource, Failure, Outcome, Ram, Source, SourceReport, Timeouts, Verify};
use qemu_tail::{DEVICES, tail};
use vmm::{Script, TestGuest};

/// Whatever happens, it is over by then.
const PATIENCE: Duration = Duration::from_secs(20);

fn guest(pages: u64) -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[pages]);
    vmm::fill(&ram, 1);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    guest.setup = b"\x07\0\0\0\x02pc".to_vec();
    guest.state = tail(&[], DEVICES);
    guest
}

/// A destination of its own make, on a socket with little room.
struct Destination {
    listener: UnixListener,
    path: std::path::PathBuf,
}

impl Destination {
    fn new() -> Destination {
        let path = std::path::PathBuf::from(vmm::unix_address().strip_prefix("unix:").unwrap());
        Destination { listener: UnixListener::bind(&path).unwrap(), path }
    }

    fn address(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// The main connection, and the channels in the order of their numbers, with nothing read from any of them.
    fn accept(&self, channels: usize) -> (UnixStream, Vec<UnixStream>) {
        let connections = (0..=channels).map(|_| self.listener.accept().unwrap().0);
        // A source connects its main connection first, and then the channels by their numbers.
        let mut connections: Vec<UnixStream> = connections.collect();
        (connections.remove(0), connections)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Runs a migration, which is cancelled if it does not end in time.
fn migrates(
    mut guest: TestGuest,
    dirty: &mut dyn DirtySource,
    builder: SourceBuilder,
    to: &str,
) -> (SourceReport, TestGuest) {
    let source = builder.verify(Verify::Off).connect(to).unwrap();
    let cancel = source.cancel_handle();
    let (done, ended) = channel::<()>();
    let watch = thread::spawn(move || {
        if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            cancel.cancel();
        }
    });
    let report = source.migrate(dirty, &mut guest);
    drop(done);
    watch.join().unwrap();
    assert_ne!(report.outcome, Outcome::Cancelled, "it would not have ended");
    (report, guest)
}

fn read_all(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

/// How many flush words a main stream has, as far as it goes.
fn flushes(bytes: &[u8]) -> usize {
    let (mut decoder, mut input, mut flushes) = (MainDecoder::new(Dialect::V10_0), bytes, 0);
    while let Ok(Some(record)) = decoder.pull(&mut input) {
        flushes += usize::from(record == Record::Flush);
    }
    flushes
}

/// How many SYNCs a channel has, as far as it goes.
fn syncs(bytes: &[u8]) -> usize {
    let (mut decoder, mut input, mut syncs) = (ChannelDecoder::new(Dialect::V10_0), bytes, 0);
    while let Ok(Some(event)) = decoder.pull(&mut input) {
        syncs += usize::from(matches!(event, ChannelEvent::Ram(packet) if packet.sync));
    }
    syncs
}

/// QEMU's wire, but one channel has nothing to say until the main connection is told that a round begins; or for a moment.
/// Then it fails.
#[derive(Debug)]
struct OneFails {
    qemu: Qemu,
    begun: Arc<Mutex<Receiver<()>>>,
    says: Sender<()>,
}

impl Framing for OneFails {
    fn hello_bytes(&self, said: &[u8]) -> usize {
        self.qemu.hello_bytes(said)
    }
    fn who(&self, said: &[u8]) -> Result<Hello, String> {
        self.qemu.who(said)
    }
    fn hello(&self, hello: &Hello) -> Vec<u8> {
        self.qemu.hello(hello)
    }
    fn answers_hello(&self) -> bool {
        self.qemu.answers_hello()
    }
    fn channels(&self) -> Option<u8> {
        self.qemu.channels()
    }
    fn mends(&self) -> bool {
        self.qemu.mends()
    }
    fn at_source(&self) -> Box<dyn Dialogue<SourceFrame, TargetFrame>> {
        Box::new(Telling(self.qemu.at_source(), self.says.clone()))
    }
    fn packets(&self, ram: &Ram, channel: ChannelId) -> Result<Box<dyn PacketWriter>, Garbled> {
        let writer = self.qemu.packets(ram, channel)?;
        Ok(if channel == ChannelId(1) { Box::new(Failing(writer, self.begun.clone())) } else { writer })
    }
    fn at_target(&self) -> Box<dyn Dialogue<TargetFrame, SourceFrame>> {
        self.qemu.at_target()
    }
    fn reader(&self, blocks: &[BlockInfo], joins_late: bool) -> Box<dyn PacketReader> {
        self.qemu.reader(blocks, joins_late)
    }
}

#[derive(Debug)]
struct Telling(Box<dyn Dialogue<SourceFrame, TargetFrame>>, Sender<()>);

impl Dialogue<SourceFrame, TargetFrame> for Telling {
    fn say(&mut self, frame: &SourceFrame, out: &mut Vec<u8>) -> Result<(), Garbled> {
        self.0.say(frame, out)
    }
    fn round_begins(&mut self, round: Round, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let begun = self.0.round_begins(round, out);
        // Nobody may be listening any more.
        let _ = self.1.send(());
        begun
    }
    fn go_on(&mut self, out: &mut Vec<u8>) {
        self.0.go_on(out);
    }
    fn hear<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, TargetFrame>>, Garbled> {
        self.0.hear(input)
    }
    fn has_news(&self) -> bool {
        self.0.has_news()
    }
    fn ended(&mut self) -> Result<bool, Garbled> {
        self.0.ended()
    }
}

#[derive(Debug)]
struct Failing(Box<dyn PacketWriter>, Arc<Mutex<Receiver<()>>>);

impl PacketWriter for Failing {
    fn room(&self) -> Room {
        self.0.room()
    }
    fn zeros(&self, block: BlockId, round: Round) -> Zeros {
        self.0.zeros(block, round)
    }
    fn begin(&mut self, _: &mut Gather) -> Result<usize, Garbled> {
        let _ = self.1.lock().unwrap().recv_timeout(Duration::from_millis(500));
        Err(Garbled("it was cut off".to_owned()))
    }
    fn pages(&mut self, at: Place, block: BlockId, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled> {
        self.0.pages(at, block, table, packet)
    }
    fn mark(&mut self, at: Place, mark: Item, packet: &mut Gather) -> Result<usize, Garbled> {
        self.0.mark(at, mark, packet)
    }
    fn bye(&mut self, at: Place, packet: &mut Gather) -> Result<usize, Garbled> {
        self.0.bye(at, packet)
    }
}

#[test]
fn no_flush_word_leaves_before_every_channel_has_sent_its_sync() {
    let destination = Destination::new();
    let to = destination.address();
    let received = thread::spawn(move || {
        let (main, channels) = destination.accept(2);
        let lanes: Vec<_> = channels.into_iter().map(read_all).collect();
        let main = read_all(main).join().unwrap();
        (main, lanes.into_iter().map(|lane| lane.join().unwrap()).collect::<Vec<_>>())
    });
    let guest = guest(2000);
    let (says, begun) = channel();
    let framing = OneFails { qemu: Qemu::new(2), begun: Arc::new(Mutex::new(begun)), says };
    let builder = Source::builder(guest.ram.clone()).framing(framing);
    let (report, _) = migrates(guest, &mut Still::new(), builder, &to);
    assert!(matches!(report.outcome, Outcome::Failed(Failure::Channel { .. })), "{}", report.outcome);
    let (main, channels) = received.join().unwrap();
    let fewest = channels.iter().map(|bytes| syncs(bytes)).min().unwrap();
    assert_eq!(fewest, 0, "the channel that was cut off has sent nothing");
    assert_eq!(flushes(&main), 0, "QEMU's main loop would wait for that SYNC for ever");
}

#[test]
fn a_main_connection_that_takes_no_more_pages_does_not_hold_up_a_paused_guest_for_ever() {
    // Of some of these sizes the last pages wait between the worker, which is done, and a connection that is full.
    for pages in (540..720).step_by(20) {
        let destination = Destination::new();
        let to = destination.address();
        let (over, ended) = channel::<()>();
        let stuck = thread::spawn(move || {
            let connections = destination.accept(0);
            let _ = ended.recv_timeout(2 * PATIENCE);
            drop(connections);
        });
        let guest = guest(pages);
        let times =
            Timeouts { stall: Duration::from_millis(300), hook: Duration::from_millis(300), ..Timeouts::default() };
        let builder = Source::builder(guest.ram.clone()).framing(Qemu::new(0)).timeouts(times);
        let (report, guest) = migrates(guest, &mut Still::new(), builder, &to);
        drop(over);
        stuck.join().unwrap();
        let failed = matches!(report.outcome, Outcome::Failed(Failure::Stalled { channel: None, .. }));
        let unsure = matches!(report.outcome, Outcome::Uncertain(Failure::Silent { .. }));
        assert!(failed || unsure, "{pages} pages: {}", report.outcome);
        assert_eq!(guest.resumed == guest.paused, failed, "{pages} pages: the guest stands still");
    }
}

#[test]
fn a_main_connection_that_nobody_reads_ends_it_before_the_guest_is_paused() {
    let destination = Destination::new();
    let to = destination.address();
    let (over, ended) = channel::<()>();
    let received = thread::spawn(move || {
        let (main, channels) = destination.accept(2);
        let lanes: Vec<_> = channels.into_iter().map(read_all).collect();
        let _ = ended.recv_timeout(2 * PATIENCE);
        drop(main);
        lanes.into_iter().for_each(|lane| drop(lane.join().unwrap()));
    });
    // Most of it was never touched: its names take more room than the main connection has.
    let mut guest = guest(1);
    guest.ram = vmm::ram(PageSize::SIZE_4K, &[(512 << 20) / 4096]);
    vmm::write_page(&guest.ram, BlockId(0), 3, 1);
    let times = Timeouts { stall: Duration::from_millis(500), ..Timeouts::default() };
    let qemu = Qemu::new(2).dialect(Dialect::V7_2, Barrier::PerSection);
    let builder = Source::builder(guest.ram.clone()).framing(qemu).timeouts(times);
    let (report, guest) = migrates(guest, &mut Still::new(), builder, &to);
    let blamed = matches!(report.outcome, Outcome::Failed(Failure::Stalled { channel: None, .. }));
    assert!(blamed && report.outcome.to_string().contains("control connection"), "{}", report.outcome);
    assert_eq!(guest.paused, 0);
    drop(over);
    received.join().unwrap();
}

/// Reads a channel as QEMU does: behind a SYNC it waits until all have read theirs. Beyond `slowly` a second it does not go.
fn as_qemu(mut stream: UnixStream, barrier: Arc<std::sync::Barrier>, slowly: Option<u32>) -> JoinHandle<usize> {
    thread::spawn(move || {
        let mut decoder = ChannelDecoder::new(Dialect::V10_0);
        let (mut buffer, mut syncs, mut owed) = (vec![0; 64 << 10], 0, 0);
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            owed += n as u32;
            let mut input = &buffer[..n];
            while let Some(event) = decoder.pull(&mut input).expect("a sound channel") {
                if matches!(event, ChannelEvent::Ram(packet) if packet.sync) {
                    syncs += 1;
                    barrier.wait();
                }
            }
            if let Some(per_second) = slowly.filter(|_| owed >= 64 << 10) {
                vmm::wait(Duration::from_secs(1) * std::mem::take(&mut owed) / per_second);
            }
        }
        syncs
    })
}

/// The main connection of such a destination.
fn main_as_qemu(mut stream: UnixStream, barrier: &std::sync::Barrier) {
    let mut decoder = MainDecoder::new(Dialect::V10_0);
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        let mut input = &buffer[..n];
        while let Some(record) = decoder.pull(&mut input).expect("a sound main stream") {
            match record {
                Record::Flush => {
                    barrier.wait();
                }
                Record::TailWhole => {
                    let mut answer = Vec::new();
                    ReturnMessage::Shut { error: 0 }.encode(&mut answer);
                    stream.write_all(&answer).unwrap();
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_channel_that_waits_at_the_barrier_for_a_slow_one_is_not_taken_to_be_stalled() {
    let destination = Destination::new();
    let to = destination.address();
    let received = thread::spawn(move || {
        let (main, channels) = destination.accept(2);
        let barrier = Arc::new(std::sync::Barrier::new(3));
        let paces = [None, Some(2 << 20)];
        let lanes: Vec<_> =
            channels.into_iter().zip(paces).map(|(lane, pace)| as_qemu(lane, barrier.clone(), pace)).collect();
        main_as_qemu(main, &barrier);
        lanes.into_iter().map(|lane| lane.join().unwrap()).collect::<Vec<_>>()
    });
    let guest = guest(6144);
    // So much is written after the first round that the second one begins before it has arrived.
    let ram = guest.ram.clone();
    let between = move |round: u64, dirty: &DirtyBitmap| {
        for page in (0..6144).filter(|_| round == 0) {
            vmm::write_page(&ram, BlockId(0), page, 7);
            dirty.mark(BlockId(0), page);
        }
    };
    let mut dirty = Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) };
    let times = Timeouts { stall: Duration::from_millis(2000), ..Timeouts::default() };
    let builder = Source::builder(guest.ram.clone()).framing(Qemu::new(2)).timeouts(times);
    let begun = Instant::now();
    let (report, _) = migrates(guest, &mut dirty, builder, &to);
    assert_eq!(report.outcome, Outcome::Completed, "after {:?}", begun.elapsed());
    let syncs = received.join().unwrap();
    assert_eq!(syncs[0], syncs[1]);
}

#[test]
fn a_channel_that_stalls_is_the_one_that_is_blamed() {
    let destination = Destination::new();
    let to = destination.address();
    let (over, ended) = channel::<()>();
    let received = thread::spawn(move || {
        let (main, mut channels) = destination.accept(2);
        let stuck = channels.pop();
        let lanes: Vec<_> = channels.into_iter().map(read_all).collect();
        let main = read_all(main);
        let _ = ended.recv_timeout(2 * PATIENCE);
        drop(stuck);
        main.join().unwrap();
        lanes.into_iter().for_each(|lane| drop(lane.join().unwrap()));
    });
    let guest = guest(4096);
    let times = Timeouts { stall: Duration::from_millis(500), ..Timeouts::default() };
    let builder = Source::builder(guest.ram.clone()).framing(Qemu::new(2)).timeouts(times);
    let (report, guest) = migrates(guest, &mut Still::new(), builder, &to);
    let blamed = matches!(&report.outcome, Outcome::Failed(Failure::Channel { channel: ChannelId(1), .. }));
    assert!(blamed, "{}", report.outcome);
    assert_eq!(guest.resumed, guest.paused);
    drop(over);
    received.join().unwrap();
}
