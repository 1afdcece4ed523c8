#![forbid(unsafe_code)]
//! The target's worker, a *lane*: checks each packet, and lets the kernel write its pages where they belong.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use crate::barrier::Barrier;
use crate::bell::{Park, Ringer, Wake};
use crate::channel::records::{Recording, Records};
use crate::channel::{ChannelError, ShutDown};
use crate::crew::{Cx, Interrupt, Role};
use crate::dirty::bitmap::DirtyBitmap;
use crate::framing::Garbled;
use crate::framing::read::{Mark, Packet, PacketReader, Payload};
use crate::memory::look::Look;
use crate::memory::prefault::Prefault;
use crate::memory::scatter::{Scatter, write_zeros};
use crate::memory::{Ram, RamBlock};
use crate::poll::PollSleeper;
use crate::progress::{ChannelCells, Progress, add};
use crate::net::Stream;
use crate::sys::event::{EventFd, PollSet};
use crate::units::{BlockId, ChannelId, Round, Run};
use crate::wire::packet::{RUN_ENTRY_BYTES, RUNS_PER_PACKET_MAX, RunEntry, RunKind};

/// What a lane is given. Everything it needs is allocated before it starts.
#[derive(Debug)]
pub struct RecvRole {
    gear: RecvGear,
    peers: Vec<Ringer<Park>>,
    scatter: Scatter,
    prefault: Prefault,
    head: Box<[u8]>,
    table: Vec<u8>,
    runs: Vec<RunEntry>,
    /// Where the end of the channel may have to be told, and whether it has been.
    lull: Option<PollSet>,
    called: bool,
    /// Compressed pages as they came, and what they are. Empty until some come.
    packed: Vec<u8>,
    unpacked: Vec<u8>,
}

/// What [`RecvRole::new`] takes.
#[derive(Debug)]
pub struct RecvGear {
    /// The channel.
    pub channel: ChannelId,
    /// Its connection, blocking.
    pub stream: Stream,
    /// Guest RAM, which reads as zeros before the first lane starts.
    pub ram: Ram,
    /// Pages that something has landed in, or is about to.
    pub landed: DirtyBitmap,
    /// Pages that the source has spoken of, as data or as zeros: for the report.
    pub named: DirtyBitmap,
    /// How pages are hashed, where digests are kept.
    pub look: Look,
    /// Where the hashes of what lands go.
    pub records: Records,
    /// Where the lanes meet between rounds.
    pub barrier: Arc<Barrier>,
    /// Whom to tell of marks.
    pub controller: Ringer<PollSleeper>,
    /// Counters.
    pub progress: Progress,
    /// What the connection's bytes mean.
    pub reader: Box<dyn PacketReader>,
    /// Where channels have no end mark: signalled when all that is to come has come. The lane then ends, where the channel
    /// may, once it has read what is there.
    pub last_call: Option<Arc<EventFd>>,
}

impl RecvRole {
    /// A lane that is ready to start; `peers` are the bells of the other lanes.
    pub fn new(mut gear: RecvGear, peers: Vec<Ringer<Park>>) -> RecvRole {
        gear.stream.make_room_for_pages();
        RecvRole {
            scatter: Scatter::new(gear.ram.clone(), gear.reader.header_bytes()),
            prefault: Prefault::new(&gear.ram),
            head: vec![0; gear.reader.header_bytes()].into_boxed_slice(),
            lull: gear.last_call.clone().map(PollSet::new),
            called: false,
            gear,
            peers,
            table: vec![0; RUNS_PER_PACKET_MAX * RUN_ENTRY_BYTES],
            runs: Vec::with_capacity(RUNS_PER_PACKET_MAX),
            packed: Vec::new(),
            unpacked: Vec::new(),
        }
    }

    fn work(&mut self, cx: &mut Cx) -> Result<(), ChannelError> {
        let mut has_header = self.read_header()?;
        while has_header {
            // An abort shuts the socket down, but what had come by then can still be read: megabytes of packets.
            if cx.aborted() {
                return Err(ChannelError::Aborted);
            }
            let table_bytes = self.gear.reader.table_bytes(&self.head).map_err(garbled)?;
            self.fill_table(table_bytes)?;
            self.runs.clear();
            let packet = self.gear.reader.packet(&self.head, &self.table[..table_bytes], &mut self.runs);
            let packet = packet.map_err(garbled)?;
            add(&self.cells().packets, 1);
            if packet.payload != Payload::None {
                self.pages(&packet, cx)?;
            }
            match packet.mark {
                // QEMU 7.2 sends packets of nothing.
                None if packet.payload == Payload::None => {}
                // The header behind the pages has come with them.
                None => continue,
                Some(Mark::Flush(epoch)) => {
                    self.gear.barrier.flush(self.gear.channel.0.into(), epoch);
                    self.ring_controller();
                }
                Some(Mark::RoundEnd(round)) => self.meet(round, cx)?,
                Some(Mark::Bye) => return Ok(()),
            }
            has_header = self.is_more_to_come() && self.read_header()?;
        }
        Ok(())
    }

    /// Lands a packet of pages, and receives the header behind it. Behind a mark none is waited for: the source may wait
    /// for the mark to be taken note of.
    fn pages(&mut self, packet: &Packet, cx: &Cx) -> Result<(), ChannelError> {
        let ram = self.gear.ram.clone();
        let block = ram.block(packet.block).ok_or(ChannelError::Internal("a packet of no block"))?;
        self.scatter.clear();
        let mut zero_pages = 0;
        for entry in &self.runs {
            self.gear.named.mark_range(packet.block, entry.first, entry.pages.into());
            if entry.kind == RunKind::Zero {
                zero_pages += u64::from(entry.pages);
                continue;
            }
            // Before the first byte: a page that is torn when its channel dies is no longer known to be zero.
            self.gear.landed.mark_range(packet.block, entry.first, entry.pages.into());
            let run = Run { block: packet.block, first: entry.first, pages: entry.pages };
            if !self.scatter.push(&run) {
                return Err(ChannelError::Order("a packet has more data runs than one call can take".to_owned()));
            }
        }
        self.zeros(packet, block, cx)?;
        let prefaulted = self.prefault.before(packet.block, block, &self.scatter);
        add(&self.cells().prefaulted_bytes, prefaulted.bytes);
        add(&self.cells().syscalls, prefaulted.calls);
        let payload_bytes = self.scatter.payload_bytes() as u64;
        match packet.payload {
            Payload::None => {}
            Payload::Plain(_) => {
                if packet.mark.is_none() {
                    self.scatter.expect_header();
                }
                self.land(packet, block)?;
                let header = self.scatter.header();
                self.head[..header.len()].copy_from_slice(header);
            }
            Payload::Packed(bytes) => {
                self.unpack(bytes)?;
                if self.gear.records.want_hashes() {
                    let records = self.gear.records.of(packet.block, packet.round);
                    Hashing { pages: data_pages(&self.runs), look: self.gear.look, records }.next(block, usize::MAX)?;
                }
                if packet.mark.is_none() && !self.read_header()? {
                    return Err(ChannelError::Closed { expected: "a packet" });
                }
            }
        }
        self.prefault.after(packet.block);
        add(&self.cells().payload_bytes, payload_bytes);
        add(&self.cells().zero_bytes, zero_pages * block.page_size().bytes());
        Ok(())
    }

    /// Receives compressed pages, and puts them where they belong.
    fn unpack(&mut self, bytes: usize) -> Result<(), ChannelError> {
        let (mut packed, mut unpacked) = (std::mem::take(&mut self.packed), std::mem::take(&mut self.unpacked));
        packed.resize(bytes, 0);
        unpacked.resize(self.scatter.payload_bytes(), 0);
        self.read_exact(&mut packed, "the rest of a packet")?;
        self.gear.reader.unpack(&packed, &mut unpacked).map_err(garbled)?;
        let filled = self.scatter.fill(&unpacked);
        (self.packed, self.unpacked) = (packed, unpacked);
        // What recvmsg(2) says of memory that it may not write.
        if filled < self.scatter.payload_bytes() { Err(receiving(unwritable())) } else { Ok(()) }
    }

    /// Makes the zero runs true. Memory in which nothing has landed reads as zeros since Setup.
    fn zeros(&self, packet: &Packet, block: &RamBlock, cx: &Cx) -> Result<(), ChannelError> {
        let id: BlockId = packet.block;
        let mut records = self.gear.records.of(id, packet.round);
        for run in self.runs.iter().filter(|run| run.kind == RunKind::Zero) {
            for page in run.first..run.first + u64::from(run.pages) {
                // One entry of the table may stand for a whole block: no lane outlives its abort by that.
                if cx.aborted() {
                    return Err(ChannelError::Aborted);
                }
                if self.gear.landed.is_marked(id, page) && !write_zeros(block, page, 1) {
                    return Err(ChannelError::Internal("a run leaves its block"));
                }
                records.zeros(page, 1);
            }
        }
        Ok(())
    }

    /// Receives the payload, and the next header if it is expected; hashes pages as they become whole, while they are in cache.
    fn land(&mut self, packet: &Packet, block: &RamBlock) -> Result<(), ChannelError> {
        let page_bytes = block.page_size().bytes() as usize;
        let records = self.gear.records.clone();
        let mut hashing = Hashing { pages: data_pages(&self.runs), look: self.gear.look, records: records.of(packet.block, packet.round) };
        let mut hashed = 0;
        while !self.scatter.is_complete() {
            let n = self.gear.stream.receive(&mut self.scatter).map_err(receiving)?;
            if n == 0 {
                return Err(ChannelError::Closed { expected: "the rest of a packet, or the next one" });
            }
            add(&self.gear.progress.cells(self.gear.channel.0.into()).wire_bytes, n as u64);
            add(&self.gear.progress.cells(self.gear.channel.0.into()).syscalls, 1);
            let whole = self.scatter.landed() / page_bytes;
            if records.want_hashes() {
                hashing.next(block, whole - hashed)?;
            }
            hashed = whole;
            if !self.scatter.is_complete() && !self.scatter.header().is_empty() {
                self.gear.reader.glance(self.scatter.header()).map_err(garbled)?;
            }
        }
        Ok(())
    }

    /// Meets the other lanes at the end of a round: nothing of the next one lands before all have landed this one.
    fn meet(&mut self, round: Round, cx: &mut Cx) -> Result<(), ChannelError> {
        let lane = self.gear.channel.0.into();
        // The controller is told first: it waits for the last lane to pass, which may be this one.
        self.gear.barrier.pass(lane, round);
        self.ring_controller();
        match self.gear.barrier.wait_for_all(lane, round, cx.bell(), &self.peers) {
            Wake::Rung | Wake::Elsewhere => Ok(()),
            Wake::Drain | Wake::Abort => Err(ChannelError::Aborted),
        }
    }

    /// Waits for the first byte of a header where the channel may end. False once the last call has come, and no such byte.
    fn is_more_to_come(&mut self) -> bool {
        let Some(lull) = self.lull.as_mut().filter(|_| self.gear.reader.may_end()) else { return true };
        if self.gear.stream.has_received() {
            return true;
        }
        loop {
            lull.clear();
            let socket = lull.watch(self.gear.stream.as_fd(), true, false);
            if self.called {
                lull.until(Instant::now());
            }
            lull.wait();
            add(&self.gear.progress.cells(self.gear.channel.0.into()).syscalls, 1);
            self.called |= lull.is_signalled();
            // A signal ends a wait as well.
            if lull.ready(socket).readable || self.called {
                return lull.ready(socket).readable;
            }
        }
    }

    /// Receives a header. False if the channel has ended instead, where it may.
    fn read_header(&mut self) -> Result<bool, ChannelError> {
        let mut head = std::mem::take(&mut self.head);
        let mut got = 0;
        while got < head.len() {
            let n = self.gear.stream.recv(&mut head[got..]).map_err(receiving)?;
            if n == 0 && got == 0 && self.gear.reader.may_end() {
                return Ok(false);
            }
            if n == 0 {
                return Err(ChannelError::Closed { expected: "a packet" });
            }
            got += n;
            add(&self.cells().wire_bytes, n as u64);
            add(&self.cells().syscalls, 1);
            if got < head.len() {
                self.gear.reader.glance(&head[..got]).map_err(garbled)?;
            }
        }
        self.head = head;
        Ok(true)
    }

    fn fill_table(&mut self, bytes: usize) -> Result<(), ChannelError> {
        let mut table = std::mem::take(&mut self.table);
        let result = self.read_exact(&mut table[..bytes], "the table of a packet");
        self.table = table;
        result
    }

    fn read_exact(&mut self, mut into: &mut [u8], expected: &'static str) -> Result<(), ChannelError> {
        while !into.is_empty() {
            match self.gear.stream.recv(into).map_err(receiving)? {
                0 => return Err(ChannelError::Closed { expected }),
                n => {
                    add(&self.cells().wire_bytes, n as u64);
                    into = &mut into[n..];
                }
            }
            add(&self.cells().syscalls, 1);
        }
        Ok(())
    }

    fn cells(&self) -> &ChannelCells {
        self.gear.progress.cells(self.gear.channel.0.into())
    }

    fn ring_controller(&self) {
        if self.gear.controller.ring() {
            add(&self.cells().syscalls, 1);
        }
    }
}

/// Hashes the pages of a packet in the order in which they come.
struct Hashing<'a, P> {
    pages: P,
    look: Look,
    records: Recording<'a>,
}

impl<P: Iterator<Item = u64>> Hashing<'_, P> {
    /// The next ones, which are whole.
    fn next(&mut self, block: &RamBlock, pages: usize) -> Result<(), ChannelError> {
        for page in self.pages.by_ref().take(pages) {
            let hash = self.look.hash_at(block, page).ok_or(ChannelError::Internal("a run leaves its block"))?;
            self.records.data(page, hash);
        }
        Ok(())
    }
}

/// The pages of a packet that come as data.
fn data_pages(runs: &[RunEntry]) -> impl Iterator<Item = u64> {
    let is_data = |run: &&RunEntry| run.kind == RunKind::Data;
    runs.iter().filter(is_data).flat_map(|run| run.first..run.first + u64::from(run.pages))
}

fn receiving(source: std::io::Error) -> ChannelError {
    ChannelError::Io { doing: "receiving pages", source }
}

fn unwritable() -> std::io::Error {
    std::io::Error::from_raw_os_error(libc::EFAULT)
}

fn garbled(why: Garbled) -> ChannelError {
    ChannelError::Order(why.0)
}

/// What a lane hands back.
#[derive(Debug)]
pub struct RecvEnd {
    /// How it ended: `Ok` after the source's end mark.
    pub result: Result<(), ChannelError>,
}

impl Role for RecvRole {
    const KIND: &'static str = "recv";
    type Output = RecvEnd;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(ShutDown(self.gear.stream.socket().clone()))
    }

    fn run(mut self, cx: &mut Cx) -> RecvEnd {
        let result = self.work(cx);
        // An abort shuts the socket down under a receive: that is the abort, not a failure of the network.
        RecvEnd { result: if cx.bell().aborted() { result.map_err(|_| ChannelError::Aborted) } else { result } }
    }
}
