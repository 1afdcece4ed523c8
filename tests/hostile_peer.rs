//! Peers that speak the protocol and mean harm: whatever they say, the other side ends in time, whole and truthfully.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use pageferry::units::{BlockId, ChannelId, Generation, InstanceId, PageSize, SessionId};
use pageferry::wire::control::{Frame, FrameDecoder, FrameEncoder, SourceFrame, TargetFrame};
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole, Side};
use pageferry::{DirtyBitmap, Failure, Outcome, Source};
use vmm::TestGuest;

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
    while !matches!(peer.hear(), Some(SourceFrame::Final(_))) {}
    peer
}

#[test]
fn a_mismatch_in_a_block_that_does_not_exist_costs_the_migration_and_not_the_source() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let target = std::thread::spawn(move || {
        let mut peer = fake_target_until_final(&listener);
        let round = pageferry::units::Round(2);
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
