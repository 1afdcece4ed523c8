//! A VMM for tests: guest RAM that any thread may write, a dirty bitmap it marks, and hooks that record what happened.
// UNSAFETY: stands in for a guest, which writes its RAM whenever it likes.
#![allow(dead_code)]
#![expect(unsafe_code)]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

#[path = "sockets.rs"]
mod sockets;

pub use sockets::*;

use pageferry::memory::{Backing, Initial, Presence, RawRange};
use pageferry::net::Fds;
use pageferry::source::SourceBuilder;
use pageferry::target::TargetBuilder;
use pageferry::units::{BlockId, PageSize};
use pageferry::wire::control::Setup;
use pageferry::{
    DirtyBitmap, DirtyError, DirtySource, Guest, HookError, Incoming, Outcome, Ram, RamBlock, Source, SourceReport,
    StateWriter, Target, TargetReport,
};

/// Guest RAM of blocks of these many pages each.
pub fn ram(page_size: PageSize, pages: &[u64]) -> Ram {
    let blocks = pages.iter().enumerate().map(|(i, pages)| {
        let name = format!("ram{i}");
        let bytes = pages * page_size.bytes();
        RamBlock::anonymous(&name, (i as u64) << 40, bytes, page_size, Backing::Base).unwrap()
    });
    Ram::new(blocks).unwrap()
}

/// Writes a pattern of its own into a page.
pub fn write_page(ram: &Ram, block: BlockId, page: u64, version: u64) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    for (i, at) in (0..range.len).step_by(8).enumerate() {
        let value = mix(version ^ (page << 20) ^ (u64::from(block.0) << 52) ^ i as u64);
        // SAFETY: inside the page, aligned; races with readers of guest RAM are what guest RAM is for.
        unsafe { AtomicU64::from_ptr(range.ptr.add(at).cast()).store(value, Ordering::Relaxed) };
    }
}

/// Writes one word of a page: the cheapest way to have many.
pub fn touch_page(ram: &Ram, block: BlockId, page: u64) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    // SAFETY: as in `write_page`.
    unsafe { AtomicU64::from_ptr(range.ptr.cast()).store(mix(page + 1), Ordering::Relaxed) };
}

/// Writes one word of a page and leaves the others: what most writes of a guest are.
pub fn poke_page(ram: &Ram, block: BlockId, page: u64, value: u64) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    let word = mix(value) as usize % (range.len / 8);
    // SAFETY: inside the page, aligned; as in `write_page`.
    unsafe { AtomicU64::from_ptr(range.ptr.add(8 * word).cast()).store(value, Ordering::Relaxed) };
}

/// Copies memory that lies still into memory of the same shape.
pub fn copy_ram(from: &Ram, to: &Ram) {
    assert_eq!(from.blocks().len(), to.blocks().len());
    for (id, block) in from.iter() {
        let from = block.range(0, block.pages()).unwrap();
        let to = to.block(id).unwrap().range(0, block.pages()).unwrap();
        assert_eq!(from.len, to.len);
        // SAFETY: both ranges lie in blocks that `from` and `to` keep mapped, of the same length, and are two mappings.
        unsafe { std::ptr::copy_nonoverlapping(from.ptr, to.ptr, from.len) };
    }
}

/// Zeroes a page.
pub fn zero_page(ram: &Ram, block: BlockId, page: u64) {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    for at in (0..range.len).step_by(8) {
        // SAFETY: as in `write_page`.
        unsafe { AtomicU64::from_ptr(range.ptr.add(at).cast()).store(0, Ordering::Relaxed) };
    }
}

/// The bytes of a page.
pub fn read_page(ram: &Ram, block: BlockId, page: u64) -> Vec<u8> {
    let range = ram.block(block).unwrap().range(page, 1).unwrap();
    let mut bytes = Vec::with_capacity(range.len);
    for at in (0..range.len).step_by(8) {
        // SAFETY: as in `write_page`.
        let word = unsafe { AtomicU64::from_ptr(range.ptr.add(at).cast()).load(Ordering::Relaxed) };
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// The first page in which two memories differ.
pub fn first_difference(a: &Ram, b: &Ram) -> Option<(BlockId, u64)> {
    assert_eq!(a.blocks().len(), b.blocks().len());
    a.iter().flat_map(|(id, block)| (0..block.pages()).map(move |page| (id, page))).find(|&(id, page)| {
        let (a, b) = (a.block(id).unwrap().range(page, 1).unwrap(), b.block(id).unwrap().range(page, 1).unwrap());
        // SAFETY: both ranges lie in blocks that `a` and `b` keep mapped, and nobody writes either of them any more.
        a.len != b.len || unsafe { libc::memcmp(a.ptr.cast(), b.ptr.cast(), a.len) } != 0
    })
}

/// Fills every page of every block with something.
pub fn fill(ram: &Ram, version: u64) {
    for (id, block) in ram.iter() {
        (0..block.pages()).for_each(|page| write_page(ram, id, page, version));
    }
}

/// A block over memory that another `Ram` owns, and that this one holds: memory with a past.
pub fn same_memory(
    name: &str,
    guest_address: u64,
    range: RawRange,
    page_size: PageSize,
    initial: Initial,
    owner: Ram,
) -> RamBlock {
    let fd = owner.block(BlockId(0)).unwrap().fd().map(|fd| fd.try_clone_to_owned().unwrap());
    // SAFETY: the range is a block of `owner`, which the new block keeps alive.
    let block = unsafe { RamBlock::new(name, guest_address, range.ptr, range.len as u64, page_size) }.unwrap();
    let block = match fd {
        Some(fd) => block.with_shared_file(fd.as_fd(), 0).unwrap(),
        None => block.with_presence(Presence::Anonymous),
    };
    block.with_initial(initial).with_keep_alive(owner)
}

pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Gets the guest's RAM and its dirty bitmap.
pub type OnSave = dyn FnMut(&Ram, &DirtyBitmap);

/// Makes a block of this name, guest address, length and page size.
pub type Make = dyn FnMut(&str, u64, u64, PageSize) -> RamBlock + Send;

/// A guest that writes pages until it is paused, and marks them.
pub struct TestGuest {
    pub ram: Ram,
    pub dirty: DirtyBitmap,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<()>>,
    pub state: Vec<u8>,
    pub setup: Vec<u8>,
    pub resumed: u32,
    pub paused: u32,
    /// Called first in `pause`.
    pub on_pause: Option<Box<dyn FnMut()>>,
    /// Called in `save_state`, before the state is written.
    pub on_save: Option<Box<OnSave>>,
    /// What `pause` fails with; the guest goes on.
    pub fail_pause: Option<String>,
    /// What `save_state` fails with, after the state was written.
    pub fail_save: Option<String>,
    /// What it was throttled to, one after the other; `None` if it cannot be.
    pub throttles: Option<Arc<Mutex<Vec<u8>>>>,
}

impl TestGuest {
    pub fn new(ram: &Ram, dirty: &DirtyBitmap) -> TestGuest {
        TestGuest {
            ram: ram.clone(),
            dirty: dirty.clone(),
            stop: Arc::new(AtomicBool::new(false)),
            writer: None,
            state: b"device state".to_vec(),
            setup: b"machine".to_vec(),
            resumed: 0,
            paused: 0,
            on_pause: None,
            on_save: None,
            fail_pause: None,
            fail_save: None,
            throttles: None,
        }
    }

    /// Starts a vCPU that writes the first `hot` pages of block 0 over and over, and marks what it wrote.
    pub fn start(&mut self, hot: u64) {
        self.start_writer(hot, true);
    }

    /// As [`TestGuest::start`], and marks nothing: only something like write protection can know.
    pub fn start_unmarked(&mut self, hot: u64) {
        self.start_writer(hot, false);
    }

    fn start_writer(&mut self, hot: u64, marks: bool) {
        self.stop.store(false, Ordering::Relaxed);
        let (ram, dirty, stop) = (self.ram.clone(), self.dirty.clone(), self.stop.clone());
        self.writer = Some(std::thread::spawn(move || {
            let mut version = 1u64;
            while !stop.load(Ordering::Relaxed) {
                let page = mix(version) % hot;
                if version % 5 == 0 {
                    zero_page(&ram, BlockId(0), page)
                } else {
                    write_page(&ram, BlockId(0), page, version)
                }
                // After the write: that is the contract.
                if marks {
                    dirty.mark(BlockId(0), page);
                }
                version += 1;
            }
        }));
    }

    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap();
        }
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            // It panics only if the test does.
            let _ = writer.join();
        }
    }
}

impl Guest for TestGuest {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(self.setup.clone())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        if let Some(on_pause) = &mut self.on_pause {
            on_pause();
        }
        if let Some(why) = &self.fail_pause {
            return Err(why.clone().into());
        }
        self.paused += 1;
        self.stop();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.resumed += 1;
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), HookError> {
        let throttles = self.throttles.as_ref().ok_or("no throttle here")?;
        throttles.lock().unwrap().push(percent);
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        if let Some(on_save) = &mut self.on_save {
            on_save(&self.ram, &self.dirty);
        }
        out.write_all(&self.state)?;
        match &self.fail_save {
            Some(why) => Err(why.clone().into()),
            None => Ok(()),
        }
    }
}

/// Gets the number of the round that is to come, from 0 on.
pub type Between<'a> = dyn FnMut(u64, &DirtyBitmap) + Send + 'a;

/// Changes pages when it is asked how much is dirty: between two rounds, that is, and at a known place.
pub struct Script<'a> {
    pub bitmap: DirtyBitmap,
    pub rounds: u64,
    pub between: Box<Between<'a>>,
}

impl DirtySource for Script<'_> {
    fn arm(&mut self, ram: &Ram) -> Result<(), DirtyError> {
        self.bitmap.arm(ram)
    }
    fn begin_round(&mut self) -> Result<u64, DirtyError> {
        (self.between)(self.rounds, &self.bitmap);
        self.rounds += 1;
        self.bitmap.begin_round()
    }
    fn harvest(&mut self, block: BlockId, first_page: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        self.bitmap.harvest(block, first_page, words)
    }
    fn give_back(&mut self, block: BlockId, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.bitmap.give_back(block, first_page, words)
    }
    fn disarm(&mut self) {
        self.bitmap.disarm();
    }
}

/// The VMM at the target.
pub struct TestIncoming {
    pub ram: Option<Ram>,
    /// Makes the memory for a block.
    pub make: Box<Make>,
    pub state: Vec<u8>,
    pub setup: Vec<u8>,
    pub loads: u32,
    pub runs: u32,
    pub discards: u32,
    /// Called first in `prepare`, `load_state` and `run`.
    pub on_prepare: Option<Box<dyn FnMut() + Send>>,
    pub on_load: Option<Box<dyn FnMut() + Send>>,
    pub on_run: Option<Box<dyn FnMut() + Send>>,
    pub refuse: Option<String>,
    pub fail_load: Option<String>,
    pub fail_run: Option<String>,
}

impl TestIncoming {
    /// A VMM whose hooks all succeed.
    pub fn new() -> TestIncoming {
        TestIncoming {
            ram: None,
            make: Box::new(|name, gpa, bytes, page_size| {
                RamBlock::anonymous(name, gpa, bytes, page_size, Backing::Base).unwrap().with_initial(Initial::Zeroed)
            }),
            state: Vec::new(),
            setup: Vec::new(),
            loads: 0,
            runs: 0,
            discards: 0,
            on_prepare: None,
            on_load: None,
            on_run: None,
            refuse: None,
            fail_load: None,
            fail_run: None,
        }
    }
}

impl Incoming for TestIncoming {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        self.setup = setup.opaque.clone();
        if let Some(on_prepare) = &mut self.on_prepare {
            on_prepare();
        }
        if let Some(why) = &self.refuse {
            return Err(why.clone().into());
        }
        let blocks: Vec<_> =
            setup.blocks.iter().map(|b| (self.make)(&b.name, b.guest_address, b.bytes, b.page_size)).collect();
        let ram = Ram::new(blocks)?;
        self.ram = Some(ram.clone());
        Ok(ram)
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        if let Some(on_load) = &mut self.on_load {
            on_load();
        }
        self.state.clear();
        state.read_to_end(&mut self.state)?;
        self.loads += 1;
        match &self.fail_load {
            Some(why) => Err(why.clone().into()),
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), HookError> {
        if let Some(on_run) = &mut self.on_run {
            on_run();
        }
        self.runs += 1;
        match &self.fail_run {
            Some(why) => Err(why.clone().into()),
            None => Ok(()),
        }
    }

    fn discard(&mut self) {
        self.discards += 1;
    }
}

/// What source and target are connected by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    Tcp4,
    Tcp6,
    Unix,
    Fds,
}

impl Transport {
    /// Every transport that this machine has.
    pub fn all() -> Vec<Transport> {
        let mut all = vec![Transport::Tcp4, Transport::Unix, Transport::Fds];
        if std::net::TcpListener::bind("[::1]:0").is_ok() {
            all.push(Transport::Tcp6);
        }
        all
    }

    /// A source and the target it will reach.
    pub fn connect(self, source: SourceBuilder, target: TargetBuilder, channels: u8) -> (Source, Target) {
        let source = source.channels(channels);
        match self {
            Transport::Tcp4 => over_address("127.0.0.1:0", source, target),
            Transport::Tcp6 => over_address("[::1]:0", source, target),
            Transport::Unix => over_address(&unix_address(), source, target),
            Transport::Fds => {
                let (near, far) = pairs(1 + usize::from(channels));
                let mut near = near.into_iter();
                let fds = Fds::new(near.next().unwrap(), near);
                (source.connector(fds).unwrap(), target.connections(far).unwrap())
            }
        }
    }
}

fn over_address(address: &str, source: SourceBuilder, target: TargetBuilder) -> (Source, Target) {
    let target = target.listen(address).unwrap();
    let to = target.address().unwrap().to_string();
    (source.connect(&to).unwrap(), target)
}

/// An address that nobody else has.
pub fn unix_address() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let file = format!("pageferry-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    format!("unix:{}", std::env::temp_dir().join(file).display())
}

/// Lets time pass in a hook that is to take long: what is under test is that nobody else waits for it.
pub fn wait(time: Duration) {
    let (_sender, nobody) = std::sync::mpsc::channel::<()>();
    assert!(nobody.recv_timeout(time).is_err());
}

/// Everything a migration leaves behind.
#[derive(Debug)]
pub struct Trip {
    pub sent: SourceReport,
    pub received: TargetReport,
    pub incoming: TestIncoming,
}

impl std::fmt::Debug for TestIncoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TestIncoming {{ runs: {}, discards: {} }}", self.runs, self.discards)
    }
}

/// Runs a migration to its end, the target on a thread of its own.
pub fn travel(
    source: Source,
    dirty: &mut dyn DirtySource,
    guest: &mut TestGuest,
    target: Target,
    incoming: TestIncoming,
) -> Trip {
    let receiving = std::thread::spawn({
        let mut incoming = incoming;
        move || (target.receive(&mut incoming), incoming)
    });
    let sent = source.migrate(dirty, guest);
    let (received, incoming) = receiving.join().unwrap();
    Trip { sent, received, incoming }
}

/// The guest runs at the target, with every byte that it had, and only there.
#[track_caller]
pub fn assert_arrived(guest: &TestGuest, trip: &Trip) {
    let Trip { sent, received, incoming } = trip;
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}; target: {}", sent.remarks, received.outcome);
    assert_eq!(received.outcome, Outcome::Completed, "{:?}", received.remarks);
    assert!(incoming.state == guest.state, "the device state differs");
    assert_eq!(incoming.setup, guest.setup);
    assert_eq!((incoming.runs, incoming.discards), (1, 0));
    assert_eq!((guest.paused, guest.resumed), (1 + sent.overruns, sent.overruns));
    assert_eq!(first_difference(&guest.ram, incoming.ram.as_ref().unwrap()), None);
    assert_eq!(sent.state_bytes, guest.state.len() as u64);
}

/// The guest stayed where it was: the source resumed it if it had paused it, and the target never ran it.
#[track_caller]
pub fn assert_stayed(guest: &TestGuest, trip: &Trip) {
    let Trip { sent, received, incoming } = trip;
    assert!(matches!(sent.outcome, Outcome::Failed(_) | Outcome::Cancelled), "{}", sent.outcome);
    assert!(matches!(received.outcome, Outcome::Failed(_) | Outcome::Cancelled), "{}", received.outcome);
    assert_eq!(guest.resumed, guest.paused, "resumed if and only if it was paused");
    assert_eq!(incoming.runs, 0, "it ran at the target");
    let prepared = incoming.ram.is_some();
    assert_eq!(incoming.discards, u32::from(prepared), "discarded if and only if it was prepared");
}
