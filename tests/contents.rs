//! The hashes that both ends keep of what moves, over real connections: they are those of what RAM holds.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pageferry::digest::{BlockShape, Contents};
use pageferry::framing::{Framing, Heard, Native};
use pageferry::memory::hash::PageHash;
use pageferry::source::SourceBuilder;
use pageferry::target::TargetBuilder;
use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::{Setup, TargetFrame};
use pageferry::wire::hello::HELLO_BYTES;
use pageferry::{DirtyBitmap, Failure, Guest, HookError, Incoming, Outcome, Ram, Source, StateWriter, Target, Verify};
use vmm::{TestGuest, TestIncoming, Transport};

/// A guest that looks at what was sent.
struct Looking {
    guest: TestGuest,
    contents: Arc<Contents>,
    object: bool,
    looks: u32,
}

impl Guest for Looking {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        self.guest.setup_bytes()
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.guest.pause()
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.guest.resume()
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        self.guest.save_state(out)
    }

    fn sent(&mut self) -> Result<(), HookError> {
        self.looks += 1;
        assert_told(&self.contents, &self.guest.ram);
        if self.object { Err("it is not what it should be".into()) } else { Ok(()) }
    }
}

/// A VMM that looks at what has landed, before it runs it.
struct Taking {
    incoming: TestIncoming,
    contents: Option<Arc<Contents>>,
}

impl Incoming for Taking {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        let ram = self.incoming.prepare(setup)?;
        self.contents = Some(contents(&ram));
        Ok(ram)
    }

    fn contents(&mut self) -> Option<Arc<Contents>> {
        self.contents.clone()
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        self.incoming.load_state(state)
    }

    fn run(&mut self) -> Result<(), HookError> {
        assert_told(self.contents.as_ref().unwrap(), self.incoming.ram.as_ref().unwrap());
        self.incoming.run()
    }

    fn discard(&mut self) {
        self.incoming.discard();
    }
}

fn contents(ram: &Ram) -> Arc<Contents> {
    Arc::new(Contents::new(&ram.shapes()).unwrap())
}

/// What was noted is what the memory holds, and no page had to be read.
#[track_caller]
fn assert_told(contents: &Contents, ram: &Ram) {
    for (id, block) in ram.iter() {
        let hashes = contents.hashes(id, |page| Err(format!("page {page} was noted twice in one round")));
        let noted: Vec<u64> = hashes.collect::<Result<_, _>>().unwrap();
        let held = (0..block.pages()).map(|page| PageHash::detect().hash_bytes(&vmm::read_page(ram, id, page)));
        assert!(held.eq(noted), "block {id}: what was noted is not what it holds");
    }
}

/// How both ends are made, and over how many channels.
struct Way {
    name: &'static str,
    channels: u8,
    verify: Verify,
    source: fn(SourceBuilder) -> SourceBuilder,
    target: fn(TargetBuilder) -> TargetBuilder,
}

fn ways() -> Vec<Way> {
    let native = |channels, verify| Way { name: "native", channels, verify, source: |b| b, target: |b| b };
    let mut ways = vec![native(1, Verify::Off), native(3, Verify::Wire), native(8, Verify::Off)];
    #[cfg(feature = "qemu")]
    {
        use pageferry::qemu::Qemu;
        use pageferry::qemu::wire::{Barrier, Dialect};
        ways.extend([
            Way {
                name: "QEMU 10.0",
                channels: 3,
                verify: Verify::Off,
                source: |b| b.framing(Qemu::new(3)),
                target: |b| b.framing(Qemu::new(3)),
            },
            Way {
                name: "QEMU 7.2",
                channels: 2,
                verify: Verify::Off,
                source: |b| b.framing(Qemu::new(2).dialect(Dialect::V7_2, Barrier::PerSection)),
                target: |b| b.framing(Qemu::new(2)),
            },
            Way {
                name: "QEMU without multifd",
                channels: 0,
                verify: Verify::Off,
                source: |b| b.framing(Qemu::new(0)),
                target: |b| b.framing(Qemu::new(0)),
            },
        ]);
    }
    #[cfg(feature = "qemu-compression")]
    {
        use pageferry::qemu::Qemu;
        use pageferry::qemu::wire::Compression;
        ways.push(Way {
            name: "QEMU with zlib",
            channels: 2,
            verify: Verify::Off,
            source: |b| b.framing(Qemu::new(2).compression(Compression::Zlib)),
            target: |b| b.framing(Qemu::new(2)),
        });
    }
    ways
}

/// What the target must know, and the state of no devices, in words that QEMU understands, too.
const SETUP: &[u8] = b"\x07\0\0\0\x0bpc-q35-10.0";
const STATE: &[u8] = b"\0\x06\0\0\0\x37{\"configuration\": {}, \"page_size\": 4096, \"devices\": []}";

/// A guest with pages that are full, zero, and untouched, which writes 20 of them again and again.
fn guest() -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, &[1100, 65]);
    for (id, block) in ram.iter() {
        for page in 0..block.pages() {
            match page % 7 {
                5 => vmm::zero_page(&ram, id, page),
                6 => {}
                _ => vmm::write_page(&ram, id, page, 1),
            }
        }
    }
    TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram))
}

fn travel(way: &Way, object: bool) -> (Looking, Taking, Outcome, Outcome) {
    let mut guest = guest();
    (guest.setup, guest.state) = (SETUP.to_vec(), STATE.to_vec());
    let (mut dirty, contents) = (guest.dirty.clone(), contents(&guest.ram));
    let source = Source::builder(guest.ram.clone()).verify(way.verify).contents(contents.clone());
    let (source, target) = Transport::Tcp4.connect((way.source)(source), (way.target)(Target::builder()), way.channels);
    guest.start(20);
    let mut looking = Looking { guest, contents, object, looks: 0 };
    let mut taking = Taking { incoming: TestIncoming::new(), contents: None };
    let (sent, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| target.receive(&mut taking));
        (source.migrate(&mut dirty, &mut looking), receiving.join().unwrap())
    });
    (looking, taking, sent.outcome, received.outcome)
}

#[test]
fn both_ends_know_what_ram_holds_without_reading_it() {
    for way in ways() {
        let (looking, taking, sent, received) = travel(&way, false);
        assert_eq!((&sent, &received), (&Outcome::Completed, &Outcome::Completed), "{}", way.name);
        assert_eq!((looking.looks, taking.incoming.runs), (1, 1), "{}", way.name);
        let (there, here) = (&looking.guest.ram, taking.incoming.ram.as_ref().unwrap());
        assert_eq!(vmm::first_difference(there, here), None, "{}", way.name);
    }
}

#[test]
fn an_objection_when_all_is_sent_keeps_the_guest() {
    for way in ways() {
        let (looking, taking, sent, received) = travel(&way, true);
        assert!(sent.to_string().contains("it is not what it should be"), "{}: {sent}", way.name);
        assert!(matches!(received, Outcome::Failed(_) | Outcome::Cancelled), "{}: {received}", way.name);
        assert_eq!((looking.guest.paused, looking.guest.resumed, taking.incoming.runs), (1, 1, 0), "{}", way.name);
    }
}

#[test]
fn hashes_of_other_blocks_are_refused() {
    let (guest, other) = (guest(), contents(&vmm::ram(PageSize::SIZE_4K, &[1100, 64])));
    let source = Source::builder(guest.ram.clone()).contents(other.clone()).connect("127.0.0.1:1");
    assert!(matches!(source, Err(Failure::Config(_))), "{source:?}");

    /// A VMM that gives the wrong ones.
    struct Wrong(TestIncoming, Arc<Contents>);
    impl Incoming for Wrong {
        fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
            self.0.prepare(setup)
        }
        fn contents(&mut self) -> Option<Arc<Contents>> {
            Some(self.1.clone())
        }
        fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
            self.0.load_state(state)
        }
        fn run(&mut self) -> Result<(), HookError> {
            self.0.run()
        }
        fn discard(&mut self) {
            self.0.discard();
        }
    }
    let (mut guest, mut wrong) = (guest, Wrong(TestIncoming::new(), other));
    let (source, target) = Transport::Tcp4.connect(Source::builder(guest.ram.clone()), Target::builder(), 2);
    let mut dirty = guest.dirty.clone();
    let (sent, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| target.receive(&mut wrong));
        (source.migrate(&mut dirty, &mut guest), receiving.join().unwrap())
    });
    for outcome in [sent.outcome, received.outcome] {
        assert!(outcome.to_string().contains("not of the prepared blocks"), "{outcome}");
    }
    assert_eq!((wrong.0.runs, wrong.0.discards), (0, 1));
}

/// Passes everything on between a source and a target, and swallows what the second data channel carries when it is told to.
struct Thief {
    address: String,
    swallows: Arc<AtomicBool>,
    victim: Receiver<TcpStream>,
    retired: Receiver<()>,
}

impl Thief {
    fn before(target: &str) -> Thief {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (to, swallows) = (target.to_owned(), Arc::new(AtomicBool::new(false)));
        let ((victims, victim), (tell, retired)) = (channel(), channel());
        let swallowing = swallows.clone();
        std::thread::spawn(move || {
            for number in 0..3 {
                let near = listener.accept().unwrap().0;
                let far = TcpStream::connect(&to).unwrap();
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let (mut dialogue, mut hello_bytes) = (Native.at_source(), HELLO_BYTES);
                let tell = tell.clone();
                let listen = move |mut said: &[u8]| {
                    let hello = said.len().min(hello_bytes);
                    (said, hello_bytes) = (&said[hello..], hello_bytes - hello);
                    while let Some(heard) = dialogue.hear(&mut said).unwrap() {
                        if matches!(heard, Heard::Frame(TargetFrame::ChannelRetired { .. })) {
                            let _ = tell.send(());
                        }
                    }
                    true
                };
                if number == 2 {
                    victims.send(near.try_clone().unwrap()).unwrap();
                    let swallowing = swallowing.clone();
                    std::thread::spawn(move || pump(near, far, move |_| !swallowing.load(Relaxed)));
                } else {
                    std::thread::spawn(move || pump(near, far, |_| true));
                }
                match number {
                    0 => drop(std::thread::spawn(move || pump(back_from, back_to, listen))),
                    _ => drop(std::thread::spawn(move || pump(back_from, back_to, |_| true))),
                }
            }
        });
        Thief { address, swallows, victim, retired }
    }
}

/// Passes on what `look` lets through, until one side closes.
fn pump(mut from: TcpStream, mut to: TcpStream, mut look: impl FnMut(&[u8]) -> bool) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if look(&buffer[..n]) && to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// A guest that loses a channel while it is asked, with pages of the last round on it.
struct Robbed {
    guest: TestGuest,
    thief: Thief,
    asked: u32,
}

impl Guest for Robbed {
    fn pause(&mut self) -> Result<(), HookError> {
        // From here on there is nothing but the last round: of these pages.
        self.thief.swallows.store(true, Relaxed);
        for page in 0..600 {
            vmm::write_page(&self.guest.ram, BlockId(0), page, 99);
            self.guest.dirty.mark(BlockId(0), page);
        }
        self.guest.pause()
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.guest.resume()
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        self.guest.save_state(out)
    }

    fn sent(&mut self) -> Result<(), HookError> {
        self.asked += 1;
        if self.asked == 1 {
            self.thief.victim.recv().unwrap().shutdown(Shutdown::Both).unwrap();
            self.thief.retired.recv_timeout(Duration::from_secs(30)).expect("the channel is given up");
        }
        Ok(())
    }
}

#[test]
fn a_channel_that_is_lost_while_the_guest_is_asked_costs_no_page() {
    let guest = guest();
    let (mut dirty, contents) = (guest.dirty.clone(), contents(&guest.ram));
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let thief = Thief::before(&target.address().unwrap().to_string());
    // Without digests nothing else would notice.
    let source = Source::builder(guest.ram.clone()).verify(Verify::Off).contents(contents).channels(2);
    let source = source.connect(&thief.address).unwrap();
    let (mut robbed, mut incoming) = (Robbed { guest, thief, asked: 0 }, TestIncoming::new());
    let (sent, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| target.receive(&mut incoming));
        (source.migrate(&mut dirty, &mut robbed), receiving.join().unwrap())
    });
    assert_eq!((&sent.outcome, &received.outcome), (&Outcome::Completed, &Outcome::Completed), "{:?}", sent.remarks);
    assert_eq!(vmm::first_difference(&robbed.guest.ram, incoming.ram.as_ref().unwrap()), None);
    assert_eq!((robbed.asked, sent.channels_lost), (2, 1));
}

#[test]
fn zeros_that_were_written_over_something_are_told_apart_from_holes() {
    let contents = Contents::new(&[BlockShape { pages: 8, page_size: PageSize::SIZE_4K }]).unwrap();
    let ram = BlockId(0);
    let mut notes = contents.notes(ram, pageferry::units::Round(0));
    (0..4).for_each(|page| notes.data(page, if page == 3 { 0 } else { 7 }));
    (4..6).for_each(|page| notes.zero(page));
    contents.notes(ram, pageferry::units::Round(1)).zero(1);
    assert_eq!(contents.written_zeros(ram).collect::<Vec<_>>(), [1, 3]);
}
