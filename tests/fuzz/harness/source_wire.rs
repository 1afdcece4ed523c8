//! A real source over real sockets, against a target made of a script: it says whatever it likes, and when.

use std::io::Write;
use std::time::Instant;

use pageferry::net::Fds;
use pageferry::units::{ChannelId, Generation, InstanceId, Round, SessionId, Verify};
use pageferry::wire::control::{FrameDecoder, FrameEncoder, LanePong, SourceFrame, TargetFrame};
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};
use pageferry::wire::packet::{PACKET_HEADER_BYTES, PacketHeader, PacketKind};
use pageferry::{DirtyBitmap, Guest, HookError, Outcome, Source, StateWriter};

use super::frames::{sealed, target_frame};
use super::guarded::Guarded;
use super::peer::{IN_TIME, Pipe, Waiter, patience, timeouts};
use super::script::Script;

const BLOCKS: [usize; 2] = [16, 3];
const LANES: usize = 2;
/// Turns of one script, at the most.
const TURNS_MAX: usize = 200;
/// The first byte of a script whose target stays, and says no more.
const STAYS: u8 = 0xFF;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let stays = script.byte() == STAYS;
    let verify = [Verify::Off, Verify::Wire, Verify::Full][script.below(3)];
    let memory = Guarded::new(&BLOCKS);
    let content = |block: usize, page: usize| if page % 3 == 0 { 0 } else { (1 + block * 16 + page) as u8 };
    let pages = || (0..BLOCKS.len()).flat_map(|block| (0..BLOCKS[block]).map(move |page| (block, page)));
    pages().for_each(|(block, page)| memory.fill(block, page, content(block, page)));

    let (mut pipes, mut fds): (Vec<_>, Vec<_>) = (0..1 + LANES).map(|_| Pipe::pair()).unzip();
    let data = fds.split_off(1);
    let connector = Fds::new(fds.remove(0), data);
    let builder = Source::builder(memory.ram()).channels(LANES as u8).verify(verify).timeouts(timeouts());
    let source = builder.connector(connector).expect("a good configuration");
    let mut dirty = DirtyBitmap::for_ram(&memory.ram());
    let mut guest = Vmm { paused: 0, resumed: 0 };
    let (report, said, took) = std::thread::scope(|scope| {
        let peer = scope.spawn(move || {
            let mut peer = HostileTarget::new(std::mem::take(&mut pipes));
            peer.play(script, stays);
            (peer.said, Instant::now())
        });
        let report = source.migrate(&mut dirty, &mut guest);
        let ended = Instant::now();
        let (said, left) = peer.join().expect("the script's end does not panic");
        (report, said, ended.saturating_duration_since(left))
    });

    assert!(took < IN_TIME, "it went on for {took:?} after the target had left");
    let why = report.outcome.to_string();
    assert!(!why.contains("panicked") && !why.contains("Bad address") && !why.contains("internal error"), "{why}");
    assert!(memory.is_intact());
    let untouched = |(block, page)| memory.page(block, page) == [content(block, page); 4096];
    assert!(pages().all(untouched), "a source wrote guest RAM");
    match &report.outcome {
        // `Running` is the word of the peer: a target that lies about it has the guest on its conscience.
        Outcome::Completed => assert!(said.runs && guest.paused == guest.resumed + 1, "{why}"),
        Outcome::Uncertain(_) => assert_eq!(guest.paused, guest.resumed + 1, "{why}"),
        Outcome::Failed(_) | Outcome::Cancelled => {
            assert_eq!(guest.paused, guest.resumed, "the guest runs on: {why}");
            assert!(!said.committed || said.never_runs, "it was committed: {why}");
        }
    }
    report.outcome.word()
}

/// The VMM of the source.
struct Vmm {
    paused: u32,
    resumed: u32,
}

impl Guest for Vmm {
    fn pause(&mut self) -> Result<(), HookError> {
        self.paused += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        self.resumed += 1;
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        assert_eq!(self.paused, self.resumed + 1);
        Ok(out.write_all(b"the state of the devices")?)
    }
}

/// What has been said of who runs the guest.
#[derive(Clone, Copy, Default)]
struct Said {
    committed: bool,
    runs: bool,
    never_runs: bool,
}

/// How far one channel is.
#[derive(Default)]
struct Lane {
    /// Whether its Hello has come.
    greeted: bool,
    /// Bytes of a payload that are still to be skipped.
    skip: usize,
    rounds: u32,
    bytes: u64,
}

struct HostileTarget {
    pipes: Vec<Pipe>,
    waiter: Waiter,
    encoder: FrameEncoder<TargetFrame>,
    decoder: FrameDecoder<SourceFrame>,
    frames: u32,
    session: Option<SessionId>,
    greeted: bool,
    setup: bool,
    ready: bool,
    joined: usize,
    nonce: Option<u64>,
    last: Option<Round>,
    /// Whether a Final has not been answered yet.
    final_due: bool,
    lanes: [Lane; LANES],
    /// Whether it has done anything but what brings the migration on, and whether an answer has failed to come.
    lied: bool,
    given_up: bool,
    said: Said,
}

impl HostileTarget {
    fn new(pipes: Vec<Pipe>) -> HostileTarget {
        HostileTarget {
            pipes,
            waiter: Waiter::new(),
            encoder: FrameEncoder::new(),
            decoder: FrameDecoder::new(),
            frames: 0,
            session: None,
            greeted: false,
            setup: false,
            ready: false,
            joined: 0,
            nonce: None,
            last: None,
            final_due: false,
            lanes: Default::default(),
            lied: false,
            given_up: false,
            said: Said::default(),
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
        while stays && !self.pipes[0].ended && Instant::now() < until {
            self.receive();
        }
        assert!(!stays || Instant::now() < until, "it waits for a target that says no more");
        self.pipes.iter_mut().for_each(Pipe::close);
    }

    fn turn(&mut self, s: &mut Script<'_>) {
        let choice = s.below(16);
        self.lied |= choice > 6;
        match choice {
            0..=6 => self.honest(),
            7 => self.say(&target_frame(s)),
            8 => {
                let frame_type = 0x80 | u16::from(s.byte());
                let bytes = sealed(frame_type, self.frames, s.bytes());
                self.frames += 1;
                // The encoder's number follows.
                self.encoder.encode(&TargetFrame::Running, &mut Vec::new()).expect("a frame without fields");
                self.said_raw();
                self.pipes[0].write(&bytes);
            }
            9 => {
                let bytes = s.bytes().to_vec();
                self.said_raw();
                self.pipes[0].write(&bytes);
            }
            10 => {
                let pipe = s.below(self.pipes.len());
                self.pipes[pipe].close();
            }
            11 => {
                // A target says nothing on a data channel.
                let (pipe, bytes) = (1 + s.below(LANES), s.bytes().to_vec());
                self.pipes[pipe].write(&bytes);
            }
            12 => self.greet(s.byte(), s.byte()),
            13 => self.plausible(s),
            14 => self.pong(),
            _ => drop(self.receive()),
        }
    }

    /// Whatever brings the migration on; waits for what it answers.
    fn honest(&mut self) {
        if !self.greeted {
            self.greet(0, 0);
        } else if !self.ready {
            self.wait_for(|peer| peer.setup);
            self.say(&TargetFrame::Ready { instance: InstanceId([5; 16]), features: 0 });
        } else if self.joined < LANES {
            let channel = ChannelId(self.joined as u8);
            self.say(&TargetFrame::ChannelJoined { channel, generation: Generation(1) });
        } else if !self.said.committed {
            self.wait_for(|peer| peer.final_due || peer.nonce.is_some());
            if self.nonce.is_some() {
                self.pong();
            }
            if let (Some(round), true) = (self.last, self.final_due) {
                self.final_due = false;
                self.say(&TargetFrame::Loaded { round });
                self.wait_for(|peer| peer.said.committed);
            }
        } else {
            self.say(&TargetFrame::Running);
        }
    }

    fn greet(&mut self, lies: u8, number: u8) {
        self.greeted = true;
        self.wait_for(|peer| peer.session.is_some());
        let session = self.session.unwrap_or(SessionId([0; 16]));
        let role = if lies & 1 == 0 { HelloRole::Control } else { HelloRole::Data(ChannelId(number)) };
        let side = if lies & 2 == 0 { Side::Target } else { Side::Source };
        let session = if lies & 4 == 0 { session } else { SessionId([number; 16]) };
        let generation = Generation(if lies & 8 == 0 { 1 } else { number.into() });
        let mut bytes = Hello { role, side, generation, session, features: u64::from(lies >> 4 & 1) }.encode();
        if lies & 32 != 0 {
            bytes[usize::from(number) % HELLO_BYTES] ^= 1;
        }
        self.pipes[0].write(&bytes);
    }

    fn pong(&mut self) {
        let lane = |(index, lane): (usize, &Lane)| LanePong {
            channel: ChannelId(index as u8),
            generation: Generation(1),
            rounds_passed: lane.rounds,
            at_barrier: false,
            bytes: lane.bytes,
        };
        let lanes = self.lanes.iter().enumerate().map(lane).collect();
        let nonce = self.nonce.take().unwrap_or(0);
        self.say(&TargetFrame::Pong { nonce, lanes });
    }

    /// A frame with numbers that may mean something.
    fn plausible(&mut self, s: &mut Script<'_>) {
        let (channel, generation) = (ChannelId(s.below(3) as u8), Generation(1 + s.below(3) as u32));
        let (reason, round) = ("the target says so".to_owned(), self.last.unwrap_or(Round(0)));
        let frame = match s.below(9) {
            0 => TargetFrame::ChannelFailed { channel, generation, reason },
            1 => TargetFrame::ChannelRetired { channel, generation },
            2 => TargetFrame::ChannelJoined { channel, generation },
            3 => TargetFrame::DigestMismatch {
                round,
                block: pageferry::units::BlockId(s.below(3) as u16),
                chunk_digests: s.list(Script::number),
            },
            4 => TargetFrame::Discarded { reason },
            5 => TargetFrame::RunFailed { reason },
            6 => TargetFrame::QueryAnswer { running: s.flag() },
            7 => TargetFrame::Loaded { round },
            _ => TargetFrame::Running,
        };
        self.say(&frame);
    }

    fn say(&mut self, frame: &TargetFrame) {
        match frame {
            TargetFrame::Ready { .. } => self.ready = true,
            TargetFrame::ChannelJoined { .. } => self.joined += 1,
            TargetFrame::Running | TargetFrame::QueryAnswer { running: true } => self.said.runs = true,
            TargetFrame::RunFailed { .. }
            | TargetFrame::Discarded { .. }
            | TargetFrame::QueryAnswer { running: false } => self.said.never_runs = true,
            _ => {}
        }
        let mut bytes = Vec::new();
        if self.encoder.encode(frame, &mut bytes).is_ok() {
            self.frames += 1;
            self.pipes[0].write(&bytes);
        }
    }

    /// Bytes that may say anything.
    fn said_raw(&mut self) {
        (self.said.runs, self.said.never_runs) = (true, true);
    }

    /// Waits for what the source says, unless it has failed to come before.
    fn wait_for(&mut self, done: impl Fn(&Self) -> bool) {
        while !self.given_up && !done(self) && !self.pipes[0].ended {
            self.given_up |= !self.receive();
        }
    }

    /// Takes what comes; false if nothing does.
    fn receive(&mut self) -> bool {
        let came = self.waiter.turn(&mut self.pipes, patience(self.lied));
        for (pipe, lane) in self.pipes[1..].iter_mut().zip(&mut self.lanes) {
            lane.land(&mut pipe.inbox);
        }
        let inbox = std::mem::take(&mut self.pipes[0].inbox);
        let mut input = &inbox[..];
        if self.session.is_none() {
            let Some((hello, rest)) = input.split_first_chunk::<HELLO_BYTES>() else {
                self.pipes[0].inbox = inbox;
                return came;
            };
            let hello = Hello::decode(hello).expect("the source says a good Hello");
            assert_eq!((hello.role, hello.side), (HelloRole::Control, Side::Source));
            self.session = Some(hello.session);
            input = rest;
        }
        while let Some(frame) = self.decoder.pull(&mut input).expect("what the source says is understood") {
            match frame {
                SourceFrame::Setup(_) => self.setup = true,
                SourceFrame::Final(last) => (self.last, self.final_due) = (Some(last.round), true),
                SourceFrame::Commit => self.said.committed = true,
                SourceFrame::Ping { nonce } => self.nonce = Some(nonce),
                _ => {}
            }
        }
        came
    }
}

impl Lane {
    /// Goes over what came on a channel: every packet is a good one.
    fn land(&mut self, inbox: &mut Vec<u8>) {
        let mut at = 0;
        if !self.greeted {
            if inbox.len() < HELLO_BYTES {
                return;
            }
            (self.greeted, at) = (true, HELLO_BYTES);
        }
        loop {
            let skipped = self.skip.min(inbox.len() - at);
            self.skip -= skipped;
            at += skipped;
            self.bytes += skipped as u64;
            let Some(head) = inbox[at..].first_chunk::<PACKET_HEADER_BYTES>() else { break };
            let header = PacketHeader::decode(head).expect("a good header");
            self.rounds += u32::from(header.kind == PacketKind::RoundEnd);
            self.skip = PACKET_HEADER_BYTES + header.table_bytes() + header.payload_bytes as usize;
        }
        inbox.drain(..at);
    }
}
