#![forbid(unsafe_code)]
//! The target's worker, a *lane*: checks each packet, and lets the kernel write its pages where they belong.

use std::sync::Arc;

use crate::barrier::Barrier;
use crate::bell::{Park, Ringer, Wake};
use crate::channel::{ChannelError, ShutDown};
use crate::crew::{Cx, Interrupt, Role};
use crate::digest::DigestTable;
use crate::dirty::bitmap::DirtyBitmap;
use crate::memory::look::Look;
use crate::memory::prefault::Prefault;
use crate::memory::scatter::{Scatter, write_zeros};
use crate::memory::{Ram, RamBlock};
use crate::poll::PollSleeper;
use crate::progress::{ChannelCells, Progress, add};
use crate::net::Stream;
use crate::units::{BlockId, ChannelId, Epoch, Round, Run};
use crate::wire::packet::{
    PACKET_HEADER_BYTES, PacketHeader, PacketKind, RUN_ENTRY_BYTES, RUNS_PER_PACKET_MAX, RunEntry, RunKind, check_crc,
    entries, validate_table,
};

/// What a lane is given. Everything it needs is allocated before it starts.
#[derive(Debug)]
pub struct RecvRole {
    gear: RecvGear,
    peers: Vec<Ringer<Park>>,
    scatter: Scatter<PACKET_HEADER_BYTES>,
    prefault: Prefault,
    table: Vec<u8>,
    runs: Vec<RunEntry>,
    round: Round,
    epoch: Epoch,
    sequence: u64,
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
    /// Digests of what lands, where they are kept.
    pub digests: Option<Arc<DigestTable>>,
    /// Where the lanes meet between rounds.
    pub barrier: Arc<Barrier>,
    /// Whom to tell of marks.
    pub controller: Ringer<PollSleeper>,
    /// Counters.
    pub progress: Progress,
    /// Whether the channel was connected before. Then its first marks say how far it counts as having come: it carries
    /// nothing of before.
    pub joins_late: bool,
}

impl RecvRole {
    /// A lane that is ready to start; `peers` are the bells of the other lanes.
    pub fn new(mut gear: RecvGear, peers: Vec<Ringer<Park>>) -> RecvRole {
        gear.stream.make_room_for_pages();
        RecvRole {
            scatter: Scatter::new(gear.ram.clone()),
            prefault: Prefault::new(&gear.ram),
            gear,
            peers,
            table: vec![0; RUNS_PER_PACKET_MAX * RUN_ENTRY_BYTES],
            runs: Vec::with_capacity(RUNS_PER_PACKET_MAX),
            round: Round(0),
            epoch: Epoch(0),
            sequence: 0,
        }
    }

    fn work(&mut self, cx: &mut Cx) -> Result<(), ChannelError> {
        let mut head = self.read_header()?;
        loop {
            // An abort shuts the socket down, but what had come by then can still be read: megabytes of packets.
            if cx.aborted() {
                return Err(ChannelError::Aborted);
            }
            let header = PacketHeader::decode(&head)?;
            let table_bytes = header.table_bytes();
            self.fill_table(table_bytes)?;
            check_crc(&head, &self.table[..table_bytes])?;
            self.in_order(&header)?;
            self.sequence += 1;
            add(&self.cells().packets, 1);
            head = match header.kind {
                PacketKind::Pages => self.pages(&header, cx)?,
                PacketKind::Flush => {
                    self.gear.barrier.flush(self.gear.channel.0.into(), header.epoch);
                    self.epoch = Epoch(header.epoch.0.saturating_add(1));
                    self.round = header.round;
                    self.ring_controller();
                    self.read_header()?
                }
                PacketKind::RoundEnd => {
                    self.meet(header.round, cx)?;
                    self.round = Round(header.round.0 + 1);
                    self.epoch = header.epoch;
                    self.read_header()?
                }
                PacketKind::Bye => return Ok(()),
            };
        }
    }

    /// The packet must be the next one of this connection, of the round and epoch that the marks so far have led to.
    fn in_order(&self, header: &PacketHeader) -> Result<(), ChannelError> {
        let is = (header.sequence, header.round, header.epoch);
        let expected = (self.sequence, self.round, self.epoch);
        let bye = header.kind == PacketKind::Bye;
        if is == expected || (bye && header.sequence == self.sequence) || self.catches_up(header) {
            return Ok(());
        }
        Err(ChannelError::Order(format!(
            "a {} packet has sequence, round and epoch {}, {}, {} where {}, {}, {} were expected",
            header.kind, is.0, is.1, is.2, expected.0, expected.1, expected.2
        )))
    }

    /// Whether this is the mark with which a channel begins that was connected before: it counts as having passed that
    /// round, or epoch, and goes on from there.
    fn catches_up(&self, header: &PacketHeader) -> bool {
        let is_mark = matches!(header.kind, PacketKind::RoundEnd | PacketKind::Flush);
        self.gear.joins_late && is_mark && (self.sequence, header.sequence) == (0, 0)
    }

    /// Lands a packet of pages; gives the header behind it.
    fn pages(&mut self, header: &PacketHeader, cx: &Cx) -> Result<[u8; PACKET_HEADER_BYTES], ChannelError> {
        let ram = self.gear.ram.clone();
        let block = ram
            .block(header.block)
            .ok_or_else(|| ChannelError::Order(format!("a packet names block {}, which does not exist", header.block)))?;
        let table = &self.table[..header.table_bytes()];
        let sum = validate_table(header, table, block.page_size(), block.pages())?;
        self.runs.clear();
        self.scatter.clear();
        for entry in entries(table) {
            let entry = entry?;
            self.gear.named.mark_range(header.block, entry.first, entry.pages.into());
            if entry.kind == RunKind::Data {
                // Before the first byte: a page that is torn when its channel dies is no longer known to be zero.
                self.gear.landed.mark_range(header.block, entry.first, entry.pages.into());
                let run = Run { block: header.block, first: entry.first, pages: entry.pages };
                if !self.scatter.push(&run) {
                    return Err(ChannelError::Order("a packet has more data runs than one call can take".to_owned()));
                }
            }
            self.runs.push(entry);
        }
        self.zeros(header.block, block, cx)?;
        let prefaulted = self.prefault.before(header.block, block, &self.scatter);
        add(&self.cells().prefaulted_bytes, prefaulted.bytes);
        add(&self.cells().syscalls, prefaulted.calls);
        self.scatter.expect_header();
        self.land(header, block)?;
        self.prefault.after(header.block);
        add(&self.cells().payload_bytes, header.payload_bytes);
        add(&self.cells().zero_bytes, sum.zero_pages * block.page_size().bytes());
        Ok(*self.scatter.header())
    }

    /// Makes the zero runs true. Memory in which nothing has landed reads as zeros since Setup.
    fn zeros(&self, id: BlockId, block: &RamBlock, cx: &Cx) -> Result<(), ChannelError> {
        let mut recorder = self.gear.digests.as_ref().map(|table| table.recorder(id, self.round));
        for run in self.runs.iter().filter(|run| run.kind == RunKind::Zero) {
            for page in run.first..run.first + u64::from(run.pages) {
                // One entry of the table may stand for a whole block: no lane outlives its abort by that.
                if cx.aborted() {
                    return Err(ChannelError::Aborted);
                }
                if self.gear.landed.is_marked(id, page) && !write_zeros(block, page, 1) {
                    return Err(ChannelError::Internal("a run leaves its block"));
                }
                if let Some(recorder) = &mut recorder {
                    recorder.zero(page, 1);
                }
            }
        }
        Ok(())
    }

    /// Receives payload and next header; hashes pages as they become whole, while they are in cache.
    fn land(&mut self, header: &PacketHeader, block: &RamBlock) -> Result<(), ChannelError> {
        let page_bytes = block.page_size().bytes() as usize;
        let mut pages = self.runs.iter().filter(|run| run.kind == RunKind::Data).flat_map(|run| {
            let end = run.first + u64::from(run.pages);
            run.first..end
        });
        let digests = self.gear.digests.clone();
        let mut recorder = digests.as_ref().map(|table| table.recorder(header.block, self.round));
        let mut hashed = 0;
        while !self.scatter.is_complete() {
            let n = self.gear.stream.receive(&mut self.scatter).map_err(receiving)?;
            if n == 0 {
                return Err(ChannelError::Closed { expected: "the rest of a packet, or the next one" });
            }
            add(&self.gear.progress.cells(self.gear.channel.0.into()).wire_bytes, n as u64);
            add(&self.gear.progress.cells(self.gear.channel.0.into()).syscalls, 1);
            let whole = self.scatter.landed() / page_bytes;
            if let Some(recorder) = &mut recorder {
                for page in pages.by_ref().take(whole - hashed) {
                    let hash = self.gear.look.hash_at(block, page);
                    recorder.page(page, hash.ok_or(ChannelError::Internal("a run leaves its block"))?);
                }
            }
            hashed = whole;
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

    fn read_header(&mut self) -> Result<[u8; PACKET_HEADER_BYTES], ChannelError> {
        let mut head = [0; PACKET_HEADER_BYTES];
        self.read_exact(&mut head, "a packet")?;
        Ok(head)
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

fn receiving(source: std::io::Error) -> ChannelError {
    ChannelError::Io { doing: "receiving pages", source }
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
