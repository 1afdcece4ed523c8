//! Peers that speak the protocol and mean harm: whatever they say, the other side ends in time, whole and truthfully.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId};
use pageferry::wire::control::{
    BlockInfo, Frame, FrameDecoder, FrameEncoder, LanePong, Setup, SourceFrame, TargetFrame,
};
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};
use pageferry::wire::packet::{PacketHeader, PacketKind, RunEntry, RunKind};
use pageferry::{DirtyBitmap, Failure, Outcome, Source, Target, Verify};
use vmm::{TestGuest, TestIncoming};

/// One end of a control connection, in a test's hands.
struct Peer<Out, In> {
    stream: TcpStream,
    encoder: FrameEncoder<Out>,
    decoder: FrameDecoder<In>,
    heard: std::collections::VecDeque<In>,
}

impl<Out: Frame, In: Frame> Peer<Out, In> {
    fn new(stream: TcpStream) -> Self {
        let (encoder, decoder) = (FrameEncoder::new(), FrameDecoder::new());
        Peer { stream, encoder, decoder, heard: Default::default() }
    }

    fn say(&mut self, frame: &Out) {
        let mut bytes = Vec::new();
        self.encoder.encode(frame, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next frame; `None` at the end of the stream.
    fn hear(&mut self) -> Option<In> {
        let mut bytes = vec![0; 1 << 16];
        while self.heard.is_empty() {
            let n = self.stream.read(&mut bytes).ok().filter(|n| *n > 0)?;
            let mut input = &bytes[..n];
            while let Some(frame) = self.decoder.pull(&mut input).unwrap() {
                self.heard.push_back(frame);
            }
        }
        self.heard.pop_front()
    }
}

fn hello(role: HelloRole, side: Side, session: SessionId) -> [u8; HELLO_BYTES] {
    Hello { role, side, generation: Generation(1), session, features: 0 }.encode()
}

/// A lane that has read whatever was sent, and more.
fn has_read_all(channel: u8) -> LanePong {
    LanePong {
        channel: ChannelId(channel),
        generation: Generation(1),
        rounds_passed: 9,
        at_barrier: false,
        bytes: u64::MAX,
    }
}

/// A target with one channel, up to the moment where the source waits for Loaded: it takes pages and looks at nothing.
fn fake_target_until_final(listener: &TcpListener) -> Peer<TargetFrame, SourceFrame> {
    let (mut control, _) = listener.accept().unwrap();
    let mut said = [0; HELLO_BYTES];
    control.read_exact(&mut said).unwrap();
    let session = Hello::decode(&said).unwrap().session;
    control.write_all(&hello(HelloRole::Control, Side::Target, session)).unwrap();
    let mut peer = Peer::new(control);
    assert!(matches!(peer.hear(), Some(SourceFrame::Setup(_))));
    peer.say(&TargetFrame::Ready { instance: InstanceId([1; 16]), features: 0 });
    let (mut data, _) = listener.accept().unwrap();
    std::thread::spawn(move || while data.read(&mut [0; 1 << 16]).is_ok_and(|n| n > 0) {});
    peer.say(&TargetFrame::ChannelJoined { channel: ChannelId(0), generation: Generation(1) });
    loop {
        match peer.hear() {
            Some(SourceFrame::Ping { nonce }) => peer.say(&TargetFrame::Pong { nonce, lanes: vec![has_read_all(0)] }),
            Some(SourceFrame::Final(_)) => return peer,
            _ => {}
        }
    }
}

#[test]
fn numbers_that_a_target_made_up_cost_the_migration_and_not_the_source() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let target = std::thread::spawn(move || {
        let mut peer = fake_target_until_final(&listener);
        let round = Round(2);
        peer.say(&TargetFrame::Pong { nonce: 1, lanes: vec![has_read_all(0), has_read_all(1)] });
        // The source has looked at the Pong once it has come round to its second heartbeat after it.
        for _ in 0..2 {
            while !matches!(peer.hear(), Some(SourceFrame::Ping { .. })) {}
        }
        peer.say(&TargetFrame::DigestMismatch { round, block: BlockId(1000), chunk_digests: vec![1] });
        while peer.hear().is_some() {}
    });
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let source = Source::builder(ram).channels(1).connect(&to).unwrap();
    let mut dirty = guest.dirty.clone();
    let report = source.migrate(&mut dirty, &mut guest);
    assert!(matches!(report.outcome, Outcome::Failed(Failure::Protocol(_))), "{}", report.outcome);
    assert_eq!((guest.paused, guest.resumed), (1, 1), "the guest runs on here");
    target.join().unwrap();
}

#[test]
fn a_source_that_asks_for_ever_and_does_not_read_neither_holds_the_target_nor_fills_it() {
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let cancel = target.cancel_handle();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()).outcome);
    let mut control = TcpStream::connect(&to).unwrap();
    control.write_all(&hello(HelloRole::Control, Side::Source, SessionId([3; 16]))).unwrap();
    let (mut encoder, mut pings) = (FrameEncoder::<SourceFrame>::new(), Vec::new());
    let (flooded, deep) = std::sync::mpsc::channel();
    let flood = std::thread::spawn(move || {
        for nonce in 0.. {
            encoder.encode(&SourceFrame::Ping { nonce }, &mut pings).unwrap();
            if pings.len() > 1 << 16 {
                if control.write_all(&pings).is_err() {
                    break;
                }
                pings.clear();
                if nonce > 1_000_000 {
                    let _ = flooded.send(());
                }
            }
        }
    });
    // More than the sockets hold: the target is in the middle of it, unless it has turned the flood away before.
    let _ = deep.recv();
    let begun = Instant::now();
    cancel.cancel();
    let outcome = receiving.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "the cancel was heard after {:?}", begun.elapsed());
    // It may have been found to read nothing before the cancel came.
    assert!(matches!(outcome, Outcome::Cancelled | Outcome::Failed(Failure::Control { .. })), "{outcome}");
    flood.join().unwrap();
}

/// A source with one channel and one block, which has joined.
fn fake_source_with_its_channel(to: &str, pages: u64) -> (Peer<SourceFrame, TargetFrame>, TcpStream) {
    let session = SessionId([3; 16]);
    let mut control = TcpStream::connect(to).unwrap();
    control.write_all(&hello(HelloRole::Control, Side::Source, session)).unwrap();
    control.read_exact(&mut [0; HELLO_BYTES]).unwrap();
    let mut peer = Peer::<SourceFrame, TargetFrame>::new(control);
    let block = BlockInfo {
        id: BlockId(0),
        name: "ram".to_owned(),
        guest_address: 0,
        bytes: pages * 4096,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: 4096,
    };
    let setup = Setup {
        verify: Verify::Wire,
        channels: 1,
        features: 0,
        state_bytes_max: 0,
        blocks: vec![block],
        opaque: vec![],
    };
    peer.say(&SourceFrame::Setup(setup));
    assert!(matches!(peer.hear(), Some(TargetFrame::Ready { .. })));
    let mut data = TcpStream::connect(to).unwrap();
    data.write_all(&hello(HelloRole::Data(ChannelId(0)), Side::Source, session)).unwrap();
    assert!(matches!(peer.hear(), Some(TargetFrame::ChannelJoined { .. })));
    (peer, data)
}

#[test]
fn lanes_that_have_much_to_do_for_few_bytes_end_at_once_when_aborted() {
    const PAGES: u64 = 1 << 20;
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let cancel = target.cancel_handle();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()).outcome);
    let (_peer, mut data) = fake_source_with_its_channel(&to, PAGES);
    // Eighty bytes each, and a million pages to make zero.
    let table = [RunEntry { first: 0, pages: PAGES as u32, kind: RunKind::Zero }];
    for sequence in 0..500 {
        let header = PacketHeader {
            kind: PacketKind::Pages,
            block: BlockId(0),
            run_count: 1,
            round: Round(0),
            epoch: Epoch(0),
            sequence,
            payload_bytes: 0,
        };
        let mut packet = [0; 80];
        header.encode_into(&table, &mut packet).unwrap();
        data.write_all(&packet).unwrap();
    }
    let begun = Instant::now();
    cancel.cancel();
    // The target says farewell for no longer than 50 ms after its lanes have ended.
    assert_eq!(receiving.join().unwrap(), Outcome::Cancelled);
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
}

#[test]
fn a_bye_before_the_hand_over_counts_as_a_loss_instead_of_leaving_the_others_at_the_barrier() {
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()).outcome);
    let (mut peer, mut data) = fake_source_with_its_channel(&to, 16);
    let mut packet = [0; 64];
    PacketHeader::bye(Round(0), Epoch(0), 0).encode_into(&[], &mut packet).unwrap();
    data.write_all(&packet).unwrap();
    assert!(matches!(peer.hear(), Some(TargetFrame::ChannelFailed { .. })));
    drop(peer);
    assert!(matches!(receiving.join().unwrap(), Outcome::Failed(Failure::Control { .. })));
}
