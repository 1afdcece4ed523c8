//! The plug for other wires, from outside: a wire that only this test knows, and QEMU's, between both ends of this library,
//! while the guest writes.
#![cfg(not(loom))]

#[cfg(feature = "qemu")]
#[path = "support/qemu_tail.rs"]
mod qemu_tail;
#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use pageferry::dirty::combined::Still;
use pageferry::framing::read::{Packet, PacketReader, Payload};
use pageferry::framing::{
    Dialogue, Framing, Garbled, Heard, Native, NativeDialogue, NativeReader, NativeWriter, PacketWriter, Place, Room,
    Zeros,
};
use pageferry::memory::gather::Gather;
use pageferry::units::{BlockId, ChannelId, Item, PageSize, Round};
use pageferry::wire::control::{BlockInfo, Frame, SourceFrame, TargetFrame};
use pageferry::wire::hello::{HELLO_BYTES, HELLO_MAGIC, Hello};
use pageferry::wire::packet::RunEntry;
use pageferry::{Failure, Outcome, Ram, Source, Target, Verify};
use vmm::{Script, TestGuest, TestIncoming, Transport, assert_arrived, travel};

/// Rounds at the least, before the guest is paused.
const ROUNDS: u64 = 4;

/// Pages that the guest itself writes all the time, and how long it may stand still: nobody is in a hurry here.
const HOT_PAGES: u64 = 150;
const PATIENCE: Duration = Duration::from_secs(3);

/// This library's own wire behind a mask: no byte of it, of a frame or of a page, is as it was.
#[derive(Debug)]
struct Masked;

const MASK: u8 = 0xA5;
/// Bytes of pages in one packet.
const PAYLOAD_BYTES_MAX: usize = 256 << 10;

fn masked(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| byte ^ MASK).collect()
}

fn mask(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte ^= MASK);
}

impl Framing for Masked {
    fn hello_bytes(&self, said: &[u8]) -> usize {
        let foreign = said.len() >= HELLO_MAGIC.len() && !masked(said).starts_with(&HELLO_MAGIC);
        if foreign { said.len() } else { HELLO_BYTES }
    }

    fn who(&self, said: &[u8]) -> Result<Hello, String> {
        let bytes = masked(said);
        let bytes = bytes.first_chunk().ok_or("it wears no mask")?;
        Hello::decode(bytes).map_err(|e| e.to_string())
    }

    fn hello(&self, hello: &Hello) -> Vec<u8> {
        masked(&hello.encode())
    }

    fn answers_hello(&self) -> bool {
        false
    }

    fn channels(&self) -> Option<u8> {
        None
    }

    fn mends(&self) -> bool {
        true
    }

    fn at_source(&self) -> Box<dyn Dialogue<SourceFrame, TargetFrame>> {
        Box::new(MaskedDialogue::default())
    }

    fn packets(&self, _: &Ram, _: ChannelId) -> Result<Box<dyn PacketWriter>, Garbled> {
        Ok(Box::new(MaskedWriter { native: NativeWriter::default(), pages: vec![0; PAYLOAD_BYTES_MAX] }))
    }

    fn at_target(&self) -> Box<dyn Dialogue<TargetFrame, SourceFrame>> {
        Box::new(MaskedDialogue::default())
    }

    fn reader(&self, blocks: &[BlockInfo], joins_late: bool) -> Box<dyn PacketReader> {
        Box::new(MaskedReader(NativeReader::new(blocks, joins_late)))
    }
}

#[derive(Debug)]
struct MaskedDialogue<Out, In> {
    native: NativeDialogue<Out, In>,
    /// What has come and was not heard yet, without its mask.
    bare: Vec<u8>,
}

impl<Out: Frame, In: Frame> Default for MaskedDialogue<Out, In> {
    fn default() -> Self {
        MaskedDialogue { native: NativeDialogue::new(), bare: Vec::new() }
    }
}

impl<Out: Frame, In: Frame> Dialogue<Out, In> for MaskedDialogue<Out, In> {
    fn say(&mut self, frame: &Out, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let before = out.len();
        self.native.say(frame, out)?;
        mask(&mut out[before..]);
        Ok(())
    }

    fn hear<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, In>>, Garbled> {
        self.bare.extend(masked(input));
        *input = &[];
        let mut bare = &self.bare[..];
        let heard = match self.native.hear(&mut bare)? {
            Some(Heard::Frame(frame)) => Some(frame),
            _ => None,
        };
        let left = bare.len();
        self.bare.drain(..self.bare.len() - left);
        Ok(heard.map(Heard::Frame))
    }

    fn has_news(&self) -> bool {
        !self.bare.is_empty()
    }

    fn ended(&mut self) -> Result<bool, Garbled> {
        self.native.ended()
    }
}

#[derive(Debug)]
struct MaskedWriter {
    native: NativeWriter,
    pages: Vec<u8>,
}

impl MaskedWriter {
    fn mask(&self, head_len: Result<usize, Garbled>, packet: &mut Gather) -> Result<usize, Garbled> {
        let head_len = head_len?;
        mask(&mut packet.head_mut()[..head_len]);
        Ok(head_len)
    }
}

impl PacketWriter for MaskedWriter {
    fn room(&self) -> Room {
        let native = self.native.room();
        Room { head_bytes: native.head_bytes + PAYLOAD_BYTES_MAX, payload_bytes: PAYLOAD_BYTES_MAX, ..native }
    }

    fn zeros(&self, block: BlockId, round: Round) -> Zeros {
        self.native.zeros(block, round)
    }

    fn begin(&mut self, packet: &mut Gather) -> Result<usize, Garbled> {
        self.native.begin(packet)
    }

    fn pages(&mut self, at: Place, block: BlockId, table: &[RunEntry], packet: &mut Gather) -> Result<usize, Garbled> {
        let head_len = self.native.pages(at, block, table, packet)?;
        let pages = &mut self.pages[..packet.payload_bytes()];
        packet.take_payload(pages);
        let end = head_len + pages.len();
        packet.head_mut()[head_len..end].copy_from_slice(pages);
        self.mask(Ok(end), packet)
    }

    fn mark(&mut self, at: Place, mark: Item, packet: &mut Gather) -> Result<usize, Garbled> {
        let head_len = self.native.mark(at, mark, packet);
        self.mask(head_len, packet)
    }

    fn bye(&mut self, at: Place, packet: &mut Gather) -> Result<usize, Garbled> {
        let head_len = self.native.bye(at, packet);
        self.mask(head_len, packet)
    }
}

#[derive(Debug)]
struct MaskedReader(NativeReader);

impl PacketReader for MaskedReader {
    fn header_bytes(&self) -> usize {
        self.0.header_bytes()
    }

    fn table_bytes(&self, header: &[u8]) -> Result<usize, Garbled> {
        self.0.table_bytes(&masked(header))
    }

    fn packet(&mut self, header: &[u8], table: &[u8], runs: &mut Vec<RunEntry>) -> Result<Packet, Garbled> {
        let packet = self.0.packet(&masked(header), &masked(table), runs)?;
        let payload = match packet.payload {
            Payload::Plain(bytes) if bytes > PAYLOAD_BYTES_MAX as u64 => return Err(Garbled("too much".to_owned())),
            Payload::Plain(bytes @ 1..) => Payload::Packed(bytes as usize),
            other => other,
        };
        Ok(Packet { payload, ..packet })
    }

    fn unpack(&mut self, packed: &[u8], pages: &mut [u8]) -> Result<(), Garbled> {
        pages.copy_from_slice(packed);
        mask(pages);
        Ok(())
    }
}

/// A guest that is full but for every fifth page, which is zero, and every seventh, which was never touched.
fn guest(pages: &[u64]) -> TestGuest {
    let ram = vmm::ram(PageSize::SIZE_4K, pages);
    for (id, block) in ram.iter() {
        for page in (0..block.pages()).filter(|page| page % 7 != 6) {
            match page % 5 {
                4 => vmm::zero_page(&ram, id, page),
                _ => vmm::write_page(&ram, id, page, 1),
            }
        }
    }
    TestGuest::new(&ram, &pageferry::DirtyBitmap::for_ram(&ram))
}

/// The guest's own writes, and so much more between the first rounds that they do not fit into the end.
fn busy(guest: &TestGuest) -> Script<'static> {
    let ram = guest.ram.clone();
    let between = move |round: u64, dirty: &pageferry::DirtyBitmap| {
        let pages = ram.blocks()[0].pages();
        for page in (0..pages).filter(|page| round < ROUNDS && page % 9 == round % 9) {
            match page % 2 {
                0 => vmm::write_page(&ram, BlockId(0), page, round + 2),
                _ => vmm::zero_page(&ram, BlockId(0), page),
            }
            dirty.mark(BlockId(0), page);
        }
    };
    Script { bitmap: guest.dirty.clone(), rounds: 0, between: Box::new(between) }
}

#[test]
fn a_wire_that_only_this_test_knows_carries_a_guest_that_writes() {
    for verify in [Verify::Off, Verify::Wire, Verify::Full] {
        let mut guest = guest(&[2048, 300, 1]);
        let (source, target) = Transport::Tcp4.connect(
            Source::builder(guest.ram.clone()).verify(verify).downtime_limit(PATIENCE).framing(Masked),
            Target::builder().framing(Masked),
            3,
        );
        let mut dirty = busy(&guest);
        guest.start(HOT_PAGES);
        let trip = travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_arrived(&guest, &trip);
        assert_eq!(trip.sent.verified, verify != Verify::Off);
        assert!(trip.sent.rounds >= 3, "{} rounds", trip.sent.rounds);
    }
}

#[test]
fn who_speaks_another_wire_is_not_let_in() {
    let target = Target::builder().framing(Masked).listen("127.0.0.1:0").unwrap();
    let (at, cancel) = (target.address().unwrap().to_string(), target.cancel_handle());
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()));
    let mut stranger = guest(&[64]);
    let source = Source::builder(stranger.ram.clone()).framing(Native).connect(&at).unwrap();
    let sent = source.migrate(&mut Still::new(), &mut stranger);
    assert!(matches!(sent.outcome, Outcome::Failed(Failure::Control { .. })), "{}", sent.outcome);
    cancel.cancel();
    assert_eq!(receiving.join().unwrap().outcome, Outcome::Cancelled);
}

#[cfg(feature = "qemu")]
mod qemu {
    use super::qemu_tail::{DEVICES, tail};
    use super::*;
    use pageferry::qemu::Qemu;
    use pageferry::qemu::wire::{Barrier, Compression, Dialect};

    /// A machine as QEMU would describe it, and the state of one device that QEMU does not have.
    fn machine() -> TestGuest {
        let mut guest = guest(&[1024 + 67, 300, 1]);
        guest.setup = b"\x07\0\0\0\x07my-vmm1".to_vec();
        guest.state = tail(b"\x04my own state", DEVICES);
        guest
    }

    fn carries(channels: u8, qemu: impl Fn(Qemu) -> Qemu) {
        let mut guest = machine();
        // One value is one migration, and one end of it.
        let (here, there) = (qemu(Qemu::new(channels)), Qemu::new(channels));
        let (sent, received) = (here.seen(), there.seen());
        let (source, target) = Transport::Tcp4.connect(
            Source::builder(guest.ram.clone()).verify(Verify::Off).downtime_limit(PATIENCE).framing(here),
            Target::builder().framing(there),
            channels.max(1),
        );
        let mut dirty = busy(&guest);
        guest.start(HOT_PAGES);
        let trip = travel(source, &mut dirty, &mut guest, target, TestIncoming::new());
        assert_arrived(&guest, &trip);
        assert!(trip.sent.rounds >= 3, "{} rounds", trip.sent.rounds);
        assert_eq!(trip.received.channels, channels);
        assert_eq!(sent.counts(), received.counts());
    }

    #[test]
    fn qemus_wire_carries_a_guest_of_another_vmm_that_writes() {
        for channels in [0, 1, 3] {
            carries(channels, |qemu| qemu);
        }
        carries(2, |qemu| qemu.dialect(Dialect::V10_0, Barrier::PerSection));
        carries(2, |qemu| qemu.dialect(Dialect::V7_2, Barrier::PerSection).section(2));
        carries(2, |qemu| qemu.dialect(Dialect::V7_2, Barrier::PerRound));
        carries(0, |qemu| qemu.dialect(Dialect::V7_2, Barrier::PerSection));
        carries(2, |qemu| qemu.return_path(false));
    }

    #[cfg(feature = "qemu-compression")]
    #[test]
    fn qemus_wire_carries_compressed_pages_that_are_written_meanwhile() {
        for method in [Compression::Zlib, Compression::Zstd] {
            carries(1, |qemu| qemu.compression(method));
            carries(3, |qemu| qemu.compression(method));
            carries(2, |qemu| qemu.compression(method).dialect(Dialect::V7_2, Barrier::PerSection));
        }
    }
}
