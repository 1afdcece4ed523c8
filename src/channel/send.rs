#![forbid(unsafe_code)]
//! The source's worker: pops runs, looks at their pages, and sends them with one sendmsg a batch.

use std::sync::Arc;
use std::time::Instant;

use crate::barrier::Barrier;
use crate::bell::{Ringer, Wake};
use crate::channel::records::Records;
use crate::channel::zero_copy::ByReference;
use crate::channel::{ChannelError, ShutDown};
use crate::config::WhyCopied;
use crate::crew::{Cx, Interrupt, Role};
use crate::framing::{Garbled, PacketWriter, Place, Room, Zeros};
use crate::poll::PollSleeper;
use crate::memory::gather::Gather;
use crate::memory::look::{Look, Seen};
use crate::memory::Ram;
use crate::progress::{Progress, add};
use crate::ring::{Consumer, Producer};
use crate::sync::AtomicUsize;
use crate::sync::Ordering::Relaxed;
use crate::net::Stream;
use crate::units::{BlockId, ChannelId, Epoch, Item, Round, Run};
use crate::wire::packet::{RunEntry, RunKind};

/// What a send worker is given. Everything it needs is allocated before it starts.
#[derive(Debug)]
pub struct SendRole {
    channel: ChannelId,
    stream: Stream,
    ring: Consumer<Item>,
    journal: Option<Producer<Item>>,
    packets: Box<dyn PacketWriter>,
    eyes: Eyes,
    batch: Batch,
    by_reference: ByReference,
    /// The round whose end this worker has sent, and that is not yet published.
    ended: Option<Round>,
    /// Rounds whose end this worker has sent, and of whose pages the kernel needs none any more: how the controller learns that rings and hands are empty.
    sent: Arc<Barrier>,
    begun: Arc<AtomicUsize>,
    controller: Ringer<PollSleeper>,
    /// The controller is rung when no more than this is queued: often enough to keep the link busy, not once a batch.
    low_water_bytes: u64,
    takes_turns: bool,
    progress: Progress,
    round: Round,
    epoch: Epoch,
}

/// What a send worker hands back. Runs that it had popped stand in the journal; the ring holds the rest.
#[derive(Debug)]
pub struct SendEnd {
    /// The ring's other end: what is left in it is dirty again.
    pub ring: Consumer<Item>,
    /// Why it copied in the end, if it did.
    pub why_copied: Option<WhyCopied>,
    /// How it ended.
    pub result: Result<(), ChannelError>,
}

/// What [`SendRole::new`] takes.
#[derive(Debug)]
pub struct SendGear {
    /// The channel.
    pub channel: ChannelId,
    /// Its connection, blocking.
    pub stream: Stream,
    /// How it hands its payload over.
    pub by_reference: ByReference,
    /// Where runs and marks come from.
    pub ring: Consumer<Item>,
    /// Where they are noted as they are popped; `None` where nothing that is lost travels again.
    pub journal: Option<Producer<Item>>,
    /// Puts them into bytes.
    pub packets: Box<dyn PacketWriter>,
    /// Guest RAM.
    pub ram: Ram,
    /// How pages are looked at.
    pub look: Look,
    /// Where the hashes of what is sent go.
    pub records: Records,
    /// Where sent rounds are published.
    pub sent: Arc<Barrier>,
    /// How many workers have sent what comes first on their connections.
    pub begun: Arc<AtomicUsize>,
    /// Whom to ring when there is room again.
    pub controller: Ringer<PollSleeper>,
    /// Payload bytes after which a batch is sent.
    pub batch_bytes: usize,
    /// See [`SendRole`].
    pub low_water_bytes: u64,
    /// Whether the CPU is offered to other threads after each batch: where the peer is on this host, its lane may be
    /// waiting for this very CPU, with the batch still in its cache.
    pub takes_turns: bool,
    /// Counters.
    pub progress: Progress,
    /// The round that it is in when it starts.
    pub round: Round,
    /// The epoch that it is in when it starts.
    pub epoch: Epoch,
}

/// Bytes that may wait in a TCP socket before they are sent, where the link does not keep up: else megabytes do. Then
/// they would be out of the cache when their turn comes, and nobody would count them among what is queued. Half of it is
/// left when the kernel wakes the worker: 30 us of a link of 25 Gbit/s.
/// (Measured with `benches/ship.rs`, see `perf/README.md`: of 96 to 1024 KiB, this took the least CPU time.)
const UNSENT_BYTES_MAX: u32 = 192 << 10;

impl SendRole {
    /// A worker that is ready to start.
    pub fn new(gear: SendGear) -> SendRole {
        let SendGear { channel, mut stream, by_reference, ring, journal, packets, ram, look, records, .. } = gear;
        stream.make_room_for_pages();
        let socket = stream.socket();
        socket.set_unsent_max(UNSENT_BYTES_MAX);
        if socket.is_within_host() {
            socket.tune_within_host();
        }
        let room = packets.room();
        let batch = Batch {
            packet: Gather::new(ram.clone(), room.head_bytes),
            table: Vec::with_capacity(room.runs),
            block: BlockId(0),
            rest: None,
            bytes: 0,
            pages: 0,
            zero_pages: 0,
            zeros: Zeros::Named,
            room: Room { payload_bytes: gear.batch_bytes.min(room.payload_bytes), ..room },
        };
        let eyes = Eyes { ram, look, records };
        let (sent, begun, controller, takes_turns) = (gear.sent, gear.begun, gear.controller, gear.takes_turns);
        let (low_water_bytes, progress) = (gear.low_water_bytes, gear.progress);
        let (round, epoch) = (gear.round, gear.epoch);
        SendRole {
            channel,
            stream,
            ring,
            journal,
            packets,
            eyes,
            batch,
            by_reference,
            ended: None,
            sent,
            begun,
            controller,
            low_water_bytes,
            takes_turns,
            progress,
            round,
            epoch,
        }
    }

    fn work(&mut self, cx: &mut Cx) -> Result<(), ChannelError> {
        let head_len = self.packets.begin(&mut self.batch.packet);
        self.send(head_len)?;
        // Relaxed: it says that a call has been made, and no memory hangs on it.
        self.begun.fetch_add(1, Relaxed);
        if self.journal.is_none() {
            self.ring_controller();
        }
        loop {
            if cx.bell().aborted() {
                return Err(ChannelError::Aborted);
            }
            let begun = Instant::now();
            let end = self.fill()?;
            if self.batch.pages > 0 {
                // Only the time with something to send: what the link carries shows in nothing else. Pages of zeros take
                // time to look at and none of the link: counted, they would make it seem slow.
                let zero_part = self.batch.zero_part();
                let zeros = begun.elapsed().mul_f64(zero_part);
                self.ship_batch()?;
                // Nor do packets of nothing but zeros show more than how soon this thread got on.
                if zero_part < 1.0 {
                    let cells = self.progress.cells(self.channel.0.into());
                    add(&cells.busy_ns, (begun.elapsed() - zeros).as_nanos() as u64);
                }
            }
            match end {
                Filled::UpTo(mark) => self.ship_mark(mark)?,
                Filled::Full => {}
                Filled::RingEmpty => {
                    // Nothing else is to be done now: time to wait for the kernel.
                    self.settle_round()?;
                    match self.sleep(cx) {
                        Wake::Rung | Wake::Elsewhere => {}
                        Wake::Abort => return Err(ChannelError::Aborted),
                        // Drain is rung after the last push: one more look at the ring, then the end mark.
                        Wake::Drain => match self.ring.pop() {
                            Some(item) => self.take(item)?.map_or(Ok(()), |mark| self.ship_mark(mark))?,
                            None => return self.bye(),
                        },
                    }
                }
            }
        }
    }

    /// Fills the batch from the ring, and says why it stopped.
    fn fill(&mut self) -> Result<Filled, ChannelError> {
        self.batch.continue_rest(&self.eyes, &*self.packets)?;
        while self.batch.rest.is_none() && !self.batch.was_full() {
            let Some(item) = self.ring.pop() else { return Ok(Filled::RingEmpty) };
            if let Some(Item::Run(next)) = self.ring.peek() {
                self.eyes.expect(&next);
            }
            if let Some(mark) = self.take(item)? {
                return Ok(Filled::UpTo(mark));
            }
        }
        Ok(Filled::Full)
    }

    /// Journals an item as it is popped, and adds it to the batch if it is a run.
    fn take(&mut self, item: Item) -> Result<Option<Item>, ChannelError> {
        if let Some(journal) = &mut self.journal {
            journal.push(item).map_err(|_| ChannelError::Internal("the journal is full"))?;
        }
        match item {
            Item::Run(run) => self.batch.add(&self.eyes, &*self.packets, Piece::new(run, self.round)).map(|()| None),
            Item::Untouched(run) => {
                let piece = Piece { untouched: true, ..Piece::new(run, self.round) };
                self.batch.add(&self.eyes, &*self.packets, piece).map(|()| None)
            }
            mark => Ok(Some(mark)),
        }
    }

    fn ship_batch(&mut self) -> Result<(), ChannelError> {
        let (at, Batch { packet, table, block, .. }) = (self.place(), &mut self.batch);
        let payload_bytes = packet.payload_bytes() as u64;
        // Pages of zeros may all be left out.
        let head_len = if table.is_empty() { Ok(0) } else { self.packets.pages(at, *block, table, packet) };
        self.send(head_len)?;
        self.ring.take_bytes(self.batch.bytes);
        let cells = self.progress.cells(self.channel.0.into());
        add(&cells.payload_bytes, payload_bytes);
        add(&cells.zero_bytes, self.batch.bytes - payload_bytes);
        self.batch.clear();
        if self.ring.queued_bytes() <= self.low_water_bytes {
            self.ring_controller();
        }
        if self.takes_turns {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn ship_mark(&mut self, mark: Item) -> Result<(), ChannelError> {
        let head_len = self.packets.mark(self.place(), mark, &mut self.batch.packet);
        self.send(head_len)?;
        match mark {
            Item::RoundEnd(round) => {
                self.round = Round(round.0 + 1);
                self.ended = Some(round);
                // Where nothing is mended, the control connection waits for this before it lets the target go on.
                if !self.by_reference.is_outstanding() || self.journal.is_none() {
                    self.settle_round()?;
                }
            }
            Item::Flush(epoch) => self.epoch = Epoch(epoch.0 + 1),
            Item::Run(_) | Item::Untouched(_) => return Err(ChannelError::Internal("a run is no mark")),
        }
        Ok(())
    }

    /// Waits until the kernel has read all pages of the round that was ended last, and says that it has been sent.
    /// While the ring holds items of the next one nobody needs to know, and the link is not kept waiting.
    fn settle_round(&mut self) -> Result<(), ChannelError> {
        if let Some(round) = self.ended {
            self.settle()?;
            self.ended = None;
            self.sent.pass(self.channel.0.into(), round);
            self.ring_controller();
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), ChannelError> {
        let settled = self.by_reference.settle(self.stream.socket());
        self.count_references();
        let calls = settled.map_err(|source| ChannelError::Io { doing: "waiting for pages to be sent", source })?;
        add(&self.progress.cells(self.channel.0.into()).syscalls, calls);
        Ok(())
    }

    fn count_references(&self) {
        let (sent, copied) = self.by_reference.counts();
        let cells = self.progress.cells(self.channel.0.into());
        cells.by_reference_bytes.store(sent, Relaxed);
        cells.copied_after_all_bytes.store(copied, Relaxed);
    }

    fn bye(&mut self) -> Result<(), ChannelError> {
        self.settle()?;
        let head_len = self.packets.bye(self.place(), &mut self.batch.packet);
        self.send(head_len)
    }

    fn place(&self) -> Place {
        Place { round: self.round, epoch: self.epoch }
    }

    /// Sends the packet with so much of its head; nothing at all if that is nothing.
    fn send(&mut self, head_len: Result<usize, Garbled>) -> Result<(), ChannelError> {
        let head_len = head_len.map_err(|Garbled(why)| ChannelError::Unsendable(why))?;
        if head_len == 0 {
            return Ok(());
        }
        let sent = self.by_reference.send(&mut self.batch.packet, head_len, &mut self.stream);
        self.count_references();
        let sent = sent.map_err(|source| ChannelError::Io { doing: "sending pages", source })?;
        let cells = self.progress.cells(self.channel.0.into());
        add(&cells.wire_bytes, sent.bytes as u64);
        add(&cells.packets, 1);
        add(&cells.syscalls, sent.calls);
        Ok(())
    }

    fn ring_controller(&self) {
        if self.controller.ring() {
            add(&self.progress.cells(self.channel.0.into()).syscalls, 1);
        }
    }

    fn sleep(&self, cx: &mut Cx) -> Wake {
        add(&self.progress.cells(self.channel.0.into()).syscalls, 1);
        cx.bell().wait()
    }
}

impl Role for SendRole {
    const KIND: &'static str = "send";
    type Output = SendEnd;

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::new(ShutDown(self.stream.socket().clone()))
    }

    fn run(mut self, cx: &mut Cx) -> SendEnd {
        let result = self.work(cx);
        // An abort shuts the socket down under a send: that is the abort, not a failure of the network.
        let result = if cx.bell().aborted() { result.map_err(|_| ChannelError::Aborted) } else { result };
        SendEnd { ring: self.ring, why_copied: self.by_reference.why_copied(), result }
    }
}

/// Why a batch is not filled further.
enum Filled {
    /// The ring was empty: only after this may the worker sleep.
    RingEmpty,
    /// The batch has no room, or the next run is of another block.
    Full,
    /// This mark comes after the batch.
    UpTo(Item),
}

/// The packet that is being filled: runs of one block, split into data and zeros as their pages are looked at.
#[derive(Debug)]
struct Batch {
    packet: Gather,
    table: Vec<RunEntry>,
    block: BlockId,
    /// What did not fit: it opens the next batch.
    rest: Option<Piece>,
    /// Guest bytes in the batch, zeros included.
    bytes: u64,
    pages: u64,
    zero_pages: u64,
    /// What becomes of pages of zeros of its block.
    zeros: Zeros,
    room: Room,
}

/// What is to be added to a batch, or is left of it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    run: Run,
    round: Round,
    /// Its pages are known to be zeros.
    untouched: bool,
}

impl Piece {
    fn new(run: Run, round: Round) -> Piece {
        Piece { run, round, untouched: false }
    }
}

/// What a worker looks at pages with.
#[derive(Debug)]
struct Eyes {
    ram: Ram,
    look: Look,
    records: Records,
}

impl Eyes {
    /// Has the first page of a run fetched, while another one is looked at.
    fn expect(&self, run: &Run) {
        if let Some(block) = self.ram.block(run.block) {
            self.look.expect(block, run.first);
        }
    }
}

/// Zero pages cost a look each and no bytes: after this many the batch goes out, so that others are not kept waiting.
const ZERO_PAGES_PER_PACKET_MAX: u64 = 4096;

impl Batch {
    fn clear(&mut self) {
        self.packet.clear();
        self.table.clear();
        (self.bytes, self.pages, self.zero_pages) = (0, 0, 0);
    }

    /// How much of it is zeros, from 0 to 1.
    fn zero_part(&self) -> f64 {
        let zero_bytes = self.bytes - self.packet.payload_bytes() as u64;
        zero_bytes as f64 / self.bytes.max(1) as f64
    }

    fn was_full(&self) -> bool {
        self.packet.payload_bytes() >= self.room.payload_bytes
            || self.table.len() >= self.room.runs
            || self.pages >= self.room.pages
            || self.zero_pages >= ZERO_PAGES_PER_PACKET_MAX
            || !self.packet.has_room()
    }

    fn continue_rest(&mut self, eyes: &Eyes, packets: &dyn PacketWriter) -> Result<(), ChannelError> {
        match self.rest.take() {
            Some(piece) => self.add(eyes, packets, piece),
            None => Ok(()),
        }
    }

    /// Adds a piece, page by page, until the batch is full or belongs to another block; the rest waits.
    fn add(&mut self, eyes: &Eyes, packets: &dyn PacketWriter, piece: Piece) -> Result<(), ChannelError> {
        let Piece { run, round, untouched } = piece;
        if self.pages > 0 && self.block != run.block {
            self.rest = Some(piece);
            return Ok(());
        }
        self.block = run.block;
        self.zeros = packets.zeros(run.block, round);
        let taken = match untouched && self.zeros == Zeros::Named {
            true => self.add_untouched(eyes, &run, round)?,
            false => self.add_pages(eyes, &run, round)?,
        };
        if taken < run.pages {
            let left = Run { first: run.first + u64::from(taken), pages: run.pages - taken, ..run };
            self.rest = Some(Piece { run: left, ..piece });
        }
        Ok(())
    }

    /// How many pages found room that are zeros, and are named without a look.
    fn add_untouched(&mut self, eyes: &Eyes, run: &Run, round: Round) -> Result<u32, ChannelError> {
        if self.was_full() {
            return Ok(0);
        }
        let block = eyes.ram.block(run.block).ok_or(ChannelError::Internal("a run names no block"))?;
        let room = (self.room.pages - self.pages).min(ZERO_PAGES_PER_PACKET_MAX - self.zero_pages);
        let pages = u64::from(run.pages).min(room);
        eyes.records.of(run.block, round).zeros(run.first, pages as u32);
        self.bytes += pages * block.page_size().bytes();
        self.pages += pages;
        self.zero_pages += pages;
        self.table.push(RunEntry { first: run.first, pages: pages as u32, kind: RunKind::Zero });
        Ok(pages as u32)
    }

    /// How many pages of the run found room.
    fn add_pages(&mut self, eyes: &Eyes, run: &Run, round: Round) -> Result<u32, ChannelError> {
        let block = eyes.ram.block(run.block).ok_or(ChannelError::Internal("a run names no block"))?;
        let page_bytes = block.page_size().bytes();
        let mut records = eyes.records.of(run.block, round);
        for taken in 0..run.pages {
            if self.was_full() {
                return Ok(taken);
            }
            let page = run.first + u64::from(taken);
            let seen = eyes.look.at(block, page).ok_or(ChannelError::Internal("a run leaves its block"))?;
            match seen {
                Seen::Zero => records.zeros(page, 1),
                Seen::Data(hash) => records.data(page, hash),
            }
            self.bytes += page_bytes;
            self.pages += 1;
            let kind = match seen {
                Seen::Zero if self.zeros != Zeros::Data => {
                    self.zero_pages += 1;
                    if self.zeros == Zeros::LeftOut {
                        continue;
                    }
                    RunKind::Zero
                }
                _ if !self.packet.push(&Run { first: page, pages: 1, ..*run }) => {
                    return Err(ChannelError::Internal("no iovec is left"));
                }
                _ => RunKind::Data,
            };
            match self.table.last_mut() {
                Some(last) if last.kind == kind && last.first + u64::from(last.pages) == page => last.pages += 1,
                _ => self.table.push(RunEntry { first: page, pages: 1, kind }),
            }
        }
        Ok(run.pages)
    }
}
