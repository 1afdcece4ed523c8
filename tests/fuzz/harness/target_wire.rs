//! A real target over real sockets, against a source made of a script: control connection, two data channels, and two
//! strangers. Its memory is small and lies between sentries.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pageferry::digest::{BlockShape, DigestTable};
use pageferry::memory::hash::PageHash;
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{BlockInfo, Final, FrameDecoder, FrameEncoder, Setup, SourceFrame, TargetFrame};
use pageferry::wire::crc::{Crc32c, crc32c};
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};
use pageferry::wire::packet::PACKET_MAGIC;
use pageferry::{HookError, Incoming, Outcome, Ram, Target};

use super::frames::{sealed, source_frame};
use super::guarded::Guarded;
use super::peer::{IN_TIME, Pipe, Waiter, patience, timeouts};
use super::script::Script;

const SESSION: SessionId = SessionId([9; 16]);
const BLOCKS: [usize; 2] = [16, 3];
const LANES: usize = 2;
const STATE_BYTES_MAX: u64 = 1000;
/// Turns of one script, at the most.
const TURNS_MAX: usize = 200;
/// The first byte of a script whose source stays, and says no more.
const STAYS: u8 = 0xFF;

const PAGES: u8 = 1;
const FLUSH: u8 = 2;
const ROUND_END: u8 = 3;
const BYE: u8 = 4;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let stays = script.byte() == STAYS;
    let memory = Guarded::new(&BLOCKS);
    (0..BLOCKS[0]).for_each(|page| memory.fill(0, page, 0xEE));
    let (pipes, fds): (Vec<_>, Vec<_>) = (0..1 + LANES + 2).map(|_| Pipe::pair()).unzip();
    let builder = Target::builder().timeouts(timeouts()).state_bytes_max(STATE_BYTES_MAX);
    let target = builder.connections(fds).expect("stream sockets");
    let commit_said = AtomicBool::new(false);
    let mut vmm =
        Vmm { ram: memory.ram(), commit_said: &commit_said, prepared: 0, loaded: false, ran: 0, discarded: 0 };
    let (report, peer, took) = std::thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let mut peer = HostileSource::new(pipes, &commit_said);
            peer.play(script, stays);
            (peer.model, Instant::now())
        });
        let report = target.receive(&mut vmm);
        let ended = Instant::now();
        let (model, left) = peer.join().expect("the script's end does not panic");
        (report, model, ended.saturating_duration_since(left))
    });

    assert!(took < IN_TIME, "it went on for {took:?} after the source had left");
    let why = report.outcome.to_string();
    assert!(memory.is_intact(), "something outside the blocks was written: {why}");
    assert!(!why.contains("panicked") && !why.contains("Bad address") && !why.contains("internal error"), "{why}");
    let completed = report.outcome == Outcome::Completed;
    assert_eq!(completed, vmm.ran == 1, "{why}");
    assert!(!matches!(report.outcome, Outcome::Uncertain(_)), "the target always knows: {why}");
    assert_eq!(vmm.discarded, u32::from(vmm.prepared == 1 && !completed), "{why}");
    assert!(report.state_bytes <= STATE_BYTES_MAX, "{} bytes of state", report.state_bytes);
    if peer.ready {
        peer.judge(&memory, completed);
    }
    report.outcome.word()
}

/// The VMM of the target: it takes any machine, and leaves it to the library to see that its own memory fits.
struct Vmm<'a> {
    ram: Ram,
    commit_said: &'a AtomicBool,
    prepared: u32,
    loaded: bool,
    ran: u32,
    discarded: u32,
}

impl Incoming for Vmm<'_> {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        if setup.opaque.first() == Some(&1) {
            return Err("the VMM says no".into());
        }
        self.prepared += 1;
        assert_eq!(self.prepared, 1);
        Ok(self.ram.clone())
    }

    fn load_state(&mut self, state: &mut dyn std::io::Read) -> Result<(), HookError> {
        let mut bytes = Vec::new();
        state.read_to_end(&mut bytes)?;
        assert!(bytes.len() as u64 <= STATE_BYTES_MAX);
        if bytes.first() == Some(&0xFF) {
            return Err("the VMM says no".into());
        }
        self.loaded = true;
        Ok(())
    }

    fn run(&mut self) -> Result<(), HookError> {
        assert!(self.loaded && self.commit_said.load(Ordering::Relaxed) && self.ran == 0 && self.discarded == 0);
        self.ran += 1;
        Ok(())
    }

    fn discard(&mut self) {
        assert_eq!(self.ran, 0);
        self.discarded += 1;
    }
}

/// What is known of a page.
#[derive(Clone, Copy, Default)]
struct Page {
    /// How often a packet has named it.
    named: u32,
    /// The round and the content of the last packet that did, if that was a good one.
    holds: Option<(u32, u8)>,
}

/// What may be in the target's memory.
struct Model {
    /// Of each block.
    pages: Vec<Vec<Page>>,
    /// Whether bytes went out that may have named any page.
    anything: bool,
    last_round: u32,
    /// Whether the target has said Ready: before that, memory may hold what it held before.
    ready: bool,
}

impl Model {
    fn judge(&self, memory: &Guarded, completed: bool) {
        if self.anything {
            return;
        }
        for (block, pages) in self.pages.iter().enumerate() {
            for (page, Page { named, holds }) in pages.iter().enumerate() {
                let expected = match (named, holds) {
                    (0, _) => 0,
                    (1, Some((round, content))) if completed && *round <= self.last_round => *content,
                    _ => continue,
                };
                assert!(
                    memory.page(block, page) == [expected; 4096],
                    "page {page} of block {block} is not {expected:#x}"
                );
            }
        }
    }
}

/// Where one channel is: what its next packet must say.
#[derive(Clone, Copy, Default)]
struct Lane {
    round: u32,
    epoch: u64,
    sequence: u64,
}

/// A packet, in fields: any of them may be a lie.
struct Packet {
    kind: u8,
    block: u16,
    at: Lane,
    runs: Vec<(u64, u32, u32)>,
    payload_bytes: u64,
}

impl Packet {
    /// Header and table.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = PACKET_MAGIC.to_le_bytes().to_vec();
        bytes.extend([self.kind, 0]);
        bytes.extend(self.block.to_le_bytes());
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        bytes.extend(self.at.round.to_le_bytes());
        bytes.extend(self.at.epoch.to_le_bytes());
        bytes.extend(self.at.sequence.to_le_bytes());
        bytes.extend(self.payload_bytes.to_le_bytes());
        bytes.extend([0; 24]);
        for (first, pages, kind) in &self.runs {
            bytes.extend(first.to_le_bytes());
            bytes.extend(pages.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
        }
        bytes
    }
}

fn seal(packet: &mut [u8]) {
    packet[60..64].fill(0);
    let crc = crc32c(packet);
    packet[60..64].copy_from_slice(&crc.to_le_bytes());
}

struct HostileSource<'a> {
    /// The control connection, the data channels, the strangers.
    pipes: Vec<Pipe>,
    waiter: Waiter,
    encoder: FrameEncoder<SourceFrame>,
    decoder: FrameDecoder<TargetFrame>,
    frames: u32,
    commit_said: &'a AtomicBool,
    lanes: [Lane; LANES],
    digests: DigestTable,
    verify: Verify,
    state: Vec<u8>,
    greeted: bool,
    setup_said: bool,
    final_said: bool,
    data_greeted: usize,
    answer_hello: bool,
    joined: usize,
    loaded: bool,
    running: bool,
    /// Whether it has done anything but what brings the migration on, and whether an answer has failed to come.
    lied: bool,
    given_up: bool,
    model: Model,
}

impl<'a> HostileSource<'a> {
    fn new(pipes: Vec<Pipe>, commit_said: &'a AtomicBool) -> Self {
        let shape = |pages: &usize| BlockShape { pages: *pages as u64, page_size: PageSize::SIZE_4K };
        let digests = DigestTable::new(SESSION, &BLOCKS.map(|pages| shape(&pages))).expect("a little memory");
        let pages = BLOCKS.iter().map(|pages| vec![Page::default(); *pages]).collect();
        HostileSource {
            pipes,
            waiter: Waiter::new(),
            encoder: FrameEncoder::new(),
            decoder: FrameDecoder::new(),
            frames: 0,
            commit_said,
            lanes: [Lane::default(); LANES],
            digests,
            verify: Verify::Off,
            state: Vec::new(),
            greeted: false,
            setup_said: false,
            final_said: false,
            data_greeted: 0,
            answer_hello: false,
            joined: 0,
            loaded: false,
            running: false,
            lied: false,
            given_up: false,
            model: Model { pages, anything: false, last_round: 0, ready: false },
        }
    }

    fn play(&mut self, mut script: Script<'_>, stays: bool) {
        for _ in 0..TURNS_MAX {
            if script.is_over() || self.pipes[0].ended {
                break;
            }
            self.turn(&mut script);
        }
        while !self.pipes[0].ended && self.receive() {}
        let until = Instant::now() + IN_TIME;
        while stays && self.answer_hello && !self.pipes[0].ended && Instant::now() < until {
            self.waiter.turn(&mut self.pipes, IN_TIME);
        }
        assert!(Instant::now() < until, "it waits for a source that says no more");
        self.pipes.iter_mut().for_each(Pipe::close);
    }

    fn turn(&mut self, s: &mut Script<'_>) {
        let choice = s.below(20);
        self.lied |= choice > 4;
        match choice {
            0..=4 => self.honest(s),
            5 => self.say(&source_frame(s)),
            6 => {
                let frame_type = u16::from(s.byte());
                let bytes = sealed(frame_type, self.frames, s.bytes());
                self.frames += 1;
                // The encoder's number follows.
                self.encoder.encode(&SourceFrame::Commit, &mut Vec::new()).expect("a frame without fields");
                self.say_bytes(&bytes);
            }
            7 => {
                let bytes = s.bytes().to_vec();
                self.say_bytes(&bytes);
            }
            8 | 9 => self.pages(s, 0),
            10 => {
                let lies = s.byte();
                self.pages(s, lies);
            }
            11 | 12 => {
                let (lane, kind) = (s.below(LANES), [ROUND_END, FLUSH, BYE][s.below(3)]);
                self.mark(lane, kind);
            }
            13 => {
                self.model.anything = true;
                let (pipe, bytes) = (1 + s.below(LANES), s.bytes().to_vec());
                self.pipes[pipe].write(&bytes);
            }
            14 => self.stranger(s),
            15 => {
                let pipe = s.below(self.pipes.len());
                self.pipes[pipe].close();
            }
            16 => {
                let bytes = s.bytes().to_vec();
                self.say_state(&bytes);
            }
            17 => self.say_final(s.byte(), s.u32()),
            18 => self.plausible(s),
            _ => drop(self.receive()),
        }
    }

    /// Whatever brings the migration on; waits for the answer.
    fn honest(&mut self, s: &mut Script<'_>) {
        if !self.greeted {
            self.greeted = true;
            self.pipes[0].write(&hello(HelloRole::Control).encode());
        } else if !self.setup_said {
            self.verify = [Verify::Off, Verify::Wire, Verify::Full][s.below(3)];
            self.say(&SourceFrame::Setup(setup(self.verify)));
        } else if self.data_greeted < LANES {
            self.wait_for(|peer| peer.model.ready);
            let channel = ChannelId(self.data_greeted as u8);
            self.data_greeted += 1;
            self.pipes[self.data_greeted].write(&hello(HelloRole::Data(channel)).encode());
        } else if !self.final_said {
            self.wait_for(|peer| peer.joined == LANES);
            match (0..LANES).find(|lane| self.lanes[*lane].round == 0) {
                Some(lane) => self.mark(lane, ROUND_END),
                None => self.say_final(0, 0),
            }
        } else {
            self.wait_for(|peer| peer.loaded);
            self.say(&SourceFrame::Commit);
            self.wait_for(|peer| peer.running);
        }
    }

    fn plausible(&mut self, s: &mut Script<'_>) {
        let (channel, generation) = (ChannelId(s.below(4) as u8), Generation(1 + s.below(3) as u32));
        let (round, session) = (Round(s.below(4) as u32), SESSION);
        let frame = match s.below(6) {
            0 => SourceFrame::ChannelLost { channel, generation },
            1 => SourceFrame::ChannelJoin { channel, generation },
            2 => SourceFrame::Repair { round, chunks: vec![(BlockId(0), 0)] },
            3 => SourceFrame::Query { session },
            4 => SourceFrame::Commit,
            _ => SourceFrame::Ping { nonce: 1 },
        };
        self.say(&frame);
    }

    fn say(&mut self, frame: &SourceFrame) {
        self.setup_said |= matches!(frame, SourceFrame::Setup(_));
        let mut bytes = Vec::new();
        if self.encoder.encode(frame, &mut bytes).is_ok() {
            self.frames += 1;
            self.say_bytes(&bytes);
        }
    }

    fn say_bytes(&mut self, bytes: &[u8]) {
        const COMMIT: u8 = 7;
        // Its type is the number of no other frame, and it may come in pieces.
        if bytes.contains(&COMMIT) {
            self.commit_said.store(true, Ordering::Relaxed);
        }
        self.pipes[0].write(bytes);
    }

    fn say_state(&mut self, bytes: &[u8]) {
        self.say(&SourceFrame::State { offset: self.state.len() as u64, bytes: bytes.to_vec() });
        self.state.extend_from_slice(bytes);
    }

    fn say_final(&mut self, lies: u8, number: u32) {
        self.final_said = true;
        let rounds = self.lanes.iter().map(|lane| lane.round).min().unwrap_or(0);
        let lanes = if lies & 1 == 0 { LANES as u8 } else { number as u8 };
        let round = if lies & 2 == 0 { rounds.saturating_sub(1) } else { number };
        let digests = |known: bool| if known { self.block_digests() } else { vec![number.into(); BLOCKS.len()] };
        let mut crc = Crc32c::new();
        crc.update(&self.state);
        let last = Final {
            round: Round(round),
            epoch: Epoch(0),
            lanes: (0..lanes.min(200)).map(|channel| (ChannelId(channel), Generation(1))).collect(),
            block_digests: digests(lies & 4 == 0),
            full_digests: digests(false),
            state_bytes: self.state.len() as u64 + u64::from(lies >> 3 & 1),
            state_crc: crc.finish() ^ u32::from(lies >> 4 & 1),
        };
        self.model.last_round = round;
        self.say(&SourceFrame::Final(last));
    }

    fn block_digests(&self) -> Vec<u64> {
        (0..BLOCKS.len() as u16).map(|block| self.digests.block_digest(BlockId(block))).collect()
    }

    /// A packet of pages, with these lies in it.
    fn pages(&mut self, s: &mut Script<'_>, lies: u8) {
        let lane = s.below(LANES);
        let block = if lies == 0 { s.below(BLOCKS.len()) } else { s.byte().into() };
        let content = s.byte() | 1;
        let mut runs = Vec::new();
        let mut end = 0;
        for _ in 0..1 + s.below(3) {
            let run = if lies == 0 {
                let room = BLOCKS[block] - end;
                if room == 0 {
                    break;
                }
                let first = end + s.below(room);
                let pages = 1 + s.below(BLOCKS[block] - first);
                end = first + pages;
                (first as u64, pages as u32, 1 + s.below(2) as u32)
            } else {
                (s.number(), s.u32(), s.below(4) as u32)
            };
            runs.push(run);
        }
        let data: u64 = runs.iter().filter(|run| run.2 == 1).map(|run| u64::from(run.1)).sum();
        let mut at = self.lanes[lane];
        if lies & 1 != 0 {
            at.sequence = s.number();
        }
        if lies & 2 != 0 {
            at.round = s.u32();
        }
        if lies & 4 != 0 {
            at.epoch = s.number();
        }
        let payload_bytes = if lies & 8 == 0 { data * 4096 } else { s.number() };
        let packet = Packet { kind: PAGES, block: block as u16, at, runs, payload_bytes };
        let mut bytes = packet.bytes();
        if lies & 16 != 0 {
            self.model.anything = true;
            let at = usize::from(s.byte()) % bytes.len();
            bytes[at] = s.byte();
        }
        seal(&mut bytes);
        if lies & 32 != 0 {
            let at = usize::from(s.byte()) % bytes.len();
            bytes[at] ^= 1 << s.below(8);
        }
        let sent = if lies & 64 == 0 { data * 4096 } else { s.number() };
        bytes.resize(bytes.len() + sent.min(64 << 10) as usize, content);
        self.lanes[lane].sequence += 1;
        self.name(&packet, content, lies == 0);
        self.pipes[1 + lane].write(&bytes);
    }

    /// Notes which pages a packet names, and what they hold if it is a good one.
    fn name(&mut self, packet: &Packet, content: u8, good: bool) {
        let Some(pages) = self.model.pages.get_mut(usize::from(packet.block)) else { return };
        let hash = PageHash::detect().hash_bytes(&[content; 4096]);
        let mut recorder = good.then(|| self.digests.recorder(BlockId(packet.block), Round(packet.at.round)));
        for (first, count, kind) in &packet.runs {
            let end = first.saturating_add(u64::from(*count)).min(pages.len() as u64);
            for page in *first..end {
                let Page { named, holds } = &mut pages[page as usize];
                *named += 1;
                *holds = good.then_some((packet.at.round, if *kind == 1 { content } else { 0 }));
                if let Some(recorder) = &mut recorder {
                    if *kind == 1 { recorder.page(page, hash) } else { recorder.zero(page, 1) }
                }
            }
        }
    }

    fn mark(&mut self, lane: usize, kind: u8) {
        let at = self.lanes[lane];
        let mut bytes = Packet { kind, block: 0, at, runs: Vec::new(), payload_bytes: 0 }.bytes();
        seal(&mut bytes);
        let state = &mut self.lanes[lane];
        state.sequence += 1;
        match kind {
            FLUSH => state.epoch += 1,
            ROUND_END => state.round += 1,
            _ => {}
        }
        self.pipes[1 + lane].write(&bytes);
    }

    /// Says some Hello on some connection.
    fn stranger(&mut self, s: &mut Script<'_>) {
        let pipe = s.below(self.pipes.len());
        let role = if s.flag() { HelloRole::Control } else { HelloRole::Data(ChannelId(s.byte())) };
        let side = if s.flag() { Side::Target } else { Side::Source };
        let session = SessionId([s.byte(); 16]);
        let mut bytes = Hello { role, side, generation: Generation(s.u32()), session, features: s.number() }.encode();
        let at = s.byte();
        if let Some(byte) = bytes.get_mut(usize::from(at)) {
            *byte ^= 1;
        }
        let length = HELLO_BYTES - s.below(HELLO_BYTES);
        self.model.anything |= pipe <= LANES;
        self.pipes[pipe].write(&bytes[..length]);
    }

    /// Waits for an answer, unless one has failed to come before.
    fn wait_for(&mut self, done: impl Fn(&Self) -> bool) {
        while !self.given_up && !done(self) && !self.pipes[0].ended {
            self.given_up |= !self.receive();
        }
    }

    /// Takes what comes; false if nothing does.
    fn receive(&mut self) -> bool {
        let came = self.waiter.turn(&mut self.pipes, patience(self.lied));
        let mut inbox = std::mem::take(&mut self.pipes[0].inbox);
        let mut input = &inbox[..];
        if !self.answer_hello {
            let Some((hello, rest)) = input.split_first_chunk::<HELLO_BYTES>() else {
                self.pipes[0].inbox = inbox;
                return came;
            };
            let hello = Hello::decode(hello).expect("the target says a good Hello");
            assert_eq!((hello.role, hello.side), (HelloRole::Control, Side::Target));
            self.answer_hello = true;
            input = rest;
        }
        while let Some(frame) = self.decoder.pull(&mut input).expect("what the target says is understood") {
            match frame {
                TargetFrame::Ready { .. } => self.model.ready = true,
                TargetFrame::ChannelJoined { .. } => self.joined += 1,
                TargetFrame::Loaded { .. } => self.loaded = true,
                TargetFrame::Running => self.running = true,
                _ => {}
            }
        }
        inbox.clear();
        self.pipes[0].inbox = inbox;
        came
    }
}

fn hello(role: HelloRole) -> Hello {
    Hello { role, side: Side::Source, generation: Generation(1), session: SESSION, features: 0 }
}

fn setup(verify: Verify) -> Setup {
    let block = |(id, pages): (u16, usize)| BlockInfo {
        id: BlockId(id),
        name: format!("ram{id}"),
        guest_address: u64::from(id) << 30,
        bytes: (pages * 4096) as u64,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: 4096,
    };
    let blocks = (0..).zip(BLOCKS).map(block).collect();
    Setup { verify, channels: LANES as u8, features: 0, state_bytes_max: 0, blocks, opaque: Vec::new() }
}
