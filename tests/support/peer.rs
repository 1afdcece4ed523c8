//! Peers made by hand: a source and a target that say, and leave out, whatever a test wants.

// Several test binaries share this file, and none uses all of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::Progress;
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{
    BlockInfo, Final, Frame, FrameDecoder, FrameEncoder, LanePong, Setup, SourceFrame, TargetFrame,
};
use pageferry::wire::crc::crc32c;
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};
use pageferry::wire::packet::{HEADER_AND_TABLE_BYTES_MAX, PacketHeader, PacketKind, RunEntry, RunKind};

pub const SESSION: SessionId = SessionId([9; 16]);
pub const FIRST: Generation = Generation(1);

/// How long a hand-made peer waits before it says that the other side hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// One end of a control connection, that sends frames of type `Out`.
pub struct Line<Out, In> {
    pub stream: TcpStream,
    encoder: FrameEncoder<Out>,
    decoder: FrameDecoder<In>,
    waiting: Vec<u8>,
}

impl<Out: Frame, In: Frame> Line<Out, In> {
    fn over(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Line { stream, encoder: FrameEncoder::new(), decoder: FrameDecoder::new(), waiting: Vec::new() }
    }

    pub fn bytes_of(&mut self, frame: &Out) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.encoder.encode(frame, &mut bytes).unwrap();
        bytes
    }

    /// Sends a frame; false if the other side is gone.
    pub fn send(&mut self, frame: &Out) -> bool {
        let bytes = self.bytes_of(frame);
        self.raw(&bytes)
    }

    pub fn raw(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// The next frame; `None` at the end of the connection.
    pub fn next(&mut self) -> Option<In> {
        loop {
            let mut input = &self.waiting[..];
            let frame = self.decoder.pull(&mut input).unwrap();
            let left = input.len();
            self.waiting.drain(..self.waiting.len() - left);
            if frame.is_some() {
                return frame;
            }
            let mut more = [0; 4096];
            match self.stream.read(&mut more) {
                Ok(0) => return None,
                Ok(n) => self.waiting.extend_from_slice(&more[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("the other side hangs"),
                Err(_) => return None,
            }
        }
    }
}

pub fn hello(role: HelloRole, side: Side, session: SessionId) -> Hello {
    Hello { role, side, generation: FIRST, session, features: 0 }
}

/// A Setup for blocks of so many pages of 4 KiB, without digests.
pub fn setup(channels: u8, blocks: &[u64]) -> Setup {
    let block = |(id, pages): (u16, &u64)| BlockInfo {
        id: BlockId(id),
        name: format!("ram{id}"),
        guest_address: u64::from(id) << 30,
        bytes: pages << 12,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: 4096,
    };
    let blocks = (0..).zip(blocks).map(block).collect();
    Setup { verify: Verify::Off, channels, features: 0, state_bytes_max: 0, blocks, opaque: Vec::new() }
}

/// A source made by hand.
pub struct FakeSource {
    pub to: String,
    pub control: Line<SourceFrame, TargetFrame>,
    pub data: Vec<TcpStream>,
}

impl FakeSource {
    /// Connects, and says nothing yet.
    pub fn connect(to: &str) -> FakeSource {
        let control = Line::over(TcpStream::connect(to).unwrap());
        FakeSource { to: to.to_owned(), control, data: Vec::new() }
    }

    /// Connects and says Hello.
    pub fn greet(to: &str) -> FakeSource {
        let mut source = FakeSource::connect(to);
        source.control.raw(&hello(HelloRole::Control, Side::Source, SESSION).encode());
        let mut answer = [0; HELLO_BYTES];
        source.control.stream.read_exact(&mut answer).unwrap();
        let answer = Hello::decode(&answer).unwrap();
        assert_eq!((answer.role, answer.side, answer.session), (HelloRole::Control, Side::Target, SESSION));
        source
    }

    /// As far as Ready, for blocks of 16 pages.
    pub fn ready(to: &str, channels: u8) -> FakeSource {
        let mut source = FakeSource::greet(to);
        source.control.send(&SourceFrame::Setup(setup(channels, &[16, 16])));
        assert!(matches!(source.next(), Some(TargetFrame::Ready { .. })));
        source
    }

    /// As far as pages may travel.
    pub fn live(to: &str, channels: u8) -> FakeSource {
        let mut source = FakeSource::ready(to, channels);
        for channel in (0..channels).map(ChannelId) {
            source.join(channel);
            let joined = source.next();
            assert_eq!(joined, Some(TargetFrame::ChannelJoined { channel, generation: FIRST }));
        }
        source
    }

    /// As far as Loaded: one page of ones has travelled.
    pub fn loaded(to: &str) -> FakeSource {
        let mut source = FakeSource::live(to, 1);
        source.send_data(0, &page_packet(0, Round(0), &[1; 4096]));
        source.send_data(0, &mark(PacketHeader::round_end(Round(0), Epoch(0), 1)));
        source.control.send(&SourceFrame::Final(last(1)));
        assert_eq!(source.next(), Some(TargetFrame::Loaded { round: Round(0) }));
        source
    }

    pub fn join(&mut self, channel: ChannelId) {
        let stream = self.visit(&hello(HelloRole::Data(channel), Side::Source, SESSION).encode());
        self.data.push(stream);
    }

    /// A connection that begins with these bytes.
    pub fn visit(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.to).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    pub fn send_data(&mut self, channel: usize, bytes: &[u8]) {
        // A target that has seen enough may have left.
        let _ = self.data[channel].write_all(bytes);
    }

    /// The next frame that is no Pong.
    pub fn next(&mut self) -> Option<TargetFrame> {
        loop {
            match self.control.next() {
                Some(TargetFrame::Pong { .. }) => {}
                other => return other,
            }
        }
    }

    /// Reads until the target leaves.
    pub fn until_closed(&mut self) -> Vec<TargetFrame> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

/// A Final after round 0 over so many channels, without state and digests.
pub fn last(channels: u8) -> Final {
    Final {
        round: Round(0),
        epoch: Epoch(0),
        lanes: (0..channels).map(|channel| (ChannelId(channel), FIRST)).collect(),
        block_digests: Vec::new(),
        full_digests: Vec::new(),
        state_bytes: 0,
        state_crc: crc32c(&[]),
    }
}

/// A control frame of this type and body, right but for what the body says.
pub fn raw_frame(frame_type: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&frame_type.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(body);
    let crc = crc32c(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

pub fn mark(header: PacketHeader) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_AND_TABLE_BYTES_MAX];
    let len = header.encode_into(&[], &mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

/// A packet of these runs with these bytes behind it, whether they fit or not.
pub fn packet(header: PacketHeader, runs: &[RunEntry], payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_AND_TABLE_BYTES_MAX];
    let len = header.encode_into(runs, &mut bytes).unwrap();
    bytes.truncate(len);
    bytes.extend_from_slice(payload);
    bytes
}

pub fn pages_header(sequence: u64, round: Round, run_count: u32, payload_bytes: u64) -> PacketHeader {
    let (kind, block, epoch) = (PacketKind::Pages, BlockId(0), Epoch(0));
    PacketHeader { kind, block, run_count, round, epoch, sequence, payload_bytes }
}

/// Page 3 of block 0.
pub fn page_packet(sequence: u64, round: Round, page: &[u8; 4096]) -> Vec<u8> {
    let run = RunEntry { first: 3, pages: 1, kind: RunKind::Data };
    packet(pages_header(sequence, round, 1, 4096), &[run], page)
}

/// A target made by hand.
pub struct FakeTarget {
    pub listener: TcpListener,
    pub control: Line<TargetFrame, SourceFrame>,
    pub session: SessionId,
    pub setup: Option<Setup>,
    pub data: Vec<TcpStream>,
    /// Whether Pings are answered.
    pub pongs: bool,
    /// How far the answers say that the lanes are.
    pub lanes: Vec<LanePong>,
    sinks: Vec<JoinHandle<()>>,
}

impl FakeTarget {
    /// The control connection is there, and the source's Hello.
    pub fn accept(listener: TcpListener) -> FakeTarget {
        let (stream, _) = listener.accept().unwrap();
        let mut control = Line::over(stream);
        let mut hello = [0; HELLO_BYTES];
        control.stream.read_exact(&mut hello).unwrap();
        let session = Hello::decode(&hello).unwrap().session;
        let (data, lanes, sinks) = (Vec::new(), Vec::new(), Vec::new());
        FakeTarget { listener, control, session, setup: None, data, pongs: true, lanes, sinks }
    }

    /// As far as Setup.
    pub fn greet(listener: TcpListener) -> FakeTarget {
        let mut target = FakeTarget::accept(listener);
        target.control.raw(&hello(HelloRole::Control, Side::Target, target.session).encode());
        match target.next() {
            Some(SourceFrame::Setup(setup)) => target.setup = Some(setup),
            other => panic!("{other:?}"),
        }
        target
    }

    pub fn channels(&self) -> u8 {
        self.setup.as_ref().unwrap().channels
    }

    /// As far as all channels are connected; ChannelJoined is not yet said.
    pub fn connected(listener: TcpListener) -> FakeTarget {
        let mut target = FakeTarget::greet(listener);
        target.control.send(&TargetFrame::Ready { instance: InstanceId([1; 16]), features: 0 });
        for _ in 0..target.channels() {
            let (mut stream, _) = target.listener.accept().unwrap();
            let mut hello = [0; HELLO_BYTES];
            stream.read_exact(&mut hello).unwrap();
            assert_eq!(Hello::decode(&hello).unwrap().session, target.session);
            target.data.push(stream);
        }
        target
    }

    /// As far as pages may travel; nobody reads them yet.
    pub fn live(listener: TcpListener) -> FakeTarget {
        let mut target = FakeTarget::connected(listener);
        for channel in (0..target.channels()).map(ChannelId) {
            target.control.send(&TargetFrame::ChannelJoined { channel, generation: FIRST });
        }
        target
    }

    /// Reads all data channels to their end, on threads, and forgets what it reads.
    pub fn swallow(&mut self) {
        self.swallow_while(&Arc::new(AtomicBool::new(true)));
    }

    /// Answers Pings until nothing was sent between two of them although the rings are full: all workers are blocked in
    /// sendmsg, as nobody reads.
    pub fn until_stuck(&mut self, progress: &Progress) {
        let mut sent = None;
        while let Some(SourceFrame::Ping { nonce }) = self.control.next() {
            self.control.send(&TargetFrame::Pong { nonce, lanes: Vec::new() });
            let now = progress.now();
            let now = (now.pushed_bytes, now.channels.wire_bytes);
            if now.0 > 0 && sent == Some(now) {
                return;
            }
            sent = Some(now);
        }
    }

    /// As [`FakeTarget::swallow`], while this says so.
    pub fn swallow_while(&mut self, going: &Arc<AtomicBool>) {
        for stream in &self.data {
            let (mut stream, going) = (stream.try_clone().unwrap(), going.clone());
            self.sinks.push(std::thread::spawn(move || {
                let mut bytes = vec![0; 1 << 16];
                while going.load(Ordering::Relaxed) && matches!(stream.read(&mut bytes), Ok(1..)) {}
            }));
        }
    }

    /// From now on answers say that all lanes have read whatever was sent.
    pub fn claim_all(&mut self) {
        let lane = |channel| {
            let (channel, generation) = (ChannelId(channel), FIRST);
            LanePong { channel, generation, rounds_passed: 1000, at_barrier: false, bytes: u64::MAX }
        };
        self.lanes = (0..self.channels()).map(lane).collect();
    }

    /// As far as Final.
    pub fn until_final(listener: TcpListener) -> (FakeTarget, Final) {
        let mut target = FakeTarget::live(listener);
        target.swallow();
        loop {
            match target.next() {
                Some(SourceFrame::State { .. }) => {}
                Some(SourceFrame::Final(last)) => return (target, last),
                other => panic!("{other:?}"),
            }
        }
    }

    /// As far as Commit.
    pub fn until_commit(listener: TcpListener) -> FakeTarget {
        let (mut target, last) = FakeTarget::until_final(listener);
        target.control.send(&TargetFrame::Loaded { round: last.round });
        assert_eq!(target.next(), Some(SourceFrame::Commit));
        target
    }

    /// The next frame that is no Ping; those are answered if `pongs` says so.
    pub fn next(&mut self) -> Option<SourceFrame> {
        loop {
            match self.control.next() {
                Some(SourceFrame::Ping { nonce }) => {
                    if self.pongs {
                        self.control.send(&TargetFrame::Pong { nonce, lanes: self.lanes.clone() });
                    }
                }
                other => return other,
            }
        }
    }

    /// Reads until the source leaves.
    pub fn until_closed(&mut self) -> Vec<SourceFrame> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

impl Drop for FakeTarget {
    fn drop(&mut self) {
        for stream in &self.data {
            let _ = stream.shutdown(Shutdown::Both);
        }
        for sink in self.sinks.drain(..) {
            let _ = sink.join();
        }
    }
}
