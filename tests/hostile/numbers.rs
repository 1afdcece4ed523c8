//! Lengths, counts and ids that a source makes up: each is refused by name, and not a byte lands outside a block.

use pageferry::memory::{Initial, RawRange};
use pageferry::units::{BlockId, ChannelId, Epoch, PageSize, Round};
use pageferry::wire::control::{Final, SourceFrame, TargetFrame};
use pageferry::wire::packet::{PacketHeader, PacketKind, RunEntry, RunKind};
use pageferry::{Outcome, Target};

use super::at_target::{against, against_target, fails};
use super::peer::*;
use super::timeouts;
use super::vmm::{self, TestIncoming};

/// Pages around each block, and what is in every page, around it and in it, before a byte has come.
const AROUND: u64 = 16;
const BEFORE: u64 = 77;

/// A target whose blocks lie between pages that are writable and not theirs: a write that is off by one shows.
fn between_canaries() -> TestIncoming {
    let mut incoming = TestIncoming::new();
    incoming.make = Box::new(|name, guest_address, bytes, page_size| {
        let around = AROUND * page_size.bytes();
        let pages = (bytes + 2 * around) / page_size.bytes();
        let owner = vmm::ram(page_size, &[pages]);
        vmm::fill(&owner, BEFORE);
        let all = owner.block(BlockId(0)).unwrap().range(0, pages).unwrap();
        let range = RawRange { ptr: all.ptr.wrapping_add(around as usize), len: bytes as usize };
        let block = vmm::same_memory(name, guest_address, range, page_size, Initial::Zeroed, owner.clone());
        OWNERS.with_borrow_mut(|owners| owners.push(owner));
        block
    });
    incoming
}

thread_local! {
    /// The memory around the blocks of this test: hooks run on the thread that receives, which is the test's.
    static OWNERS: std::cell::RefCell<Vec<pageferry::Ram>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// How many blocks there are, with nothing changed around any.
#[track_caller]
fn assert_nothing_around_was_written(what: &str) -> usize {
    let owners = OWNERS.take();
    for owner in &owners {
        let untouched = vmm::ram(PageSize::SIZE_4K, &[1 + AROUND]);
        let pages = owner.block(BlockId(0)).unwrap().pages();
        for page in (0..AROUND).chain(pages - AROUND..pages) {
            vmm::write_page(&untouched, BlockId(0), 0, BEFORE ^ (page << 20));
            assert!(
                vmm::read_page(owner, BlockId(0), page) == vmm::read_page(&untouched, BlockId(0), 0),
                "{what}: page {page} of {pages} was written"
            );
        }
    }
    owners.len()
}

fn header(run_count: u32, payload_bytes: u64) -> PacketHeader {
    pages_header(0, Round(0), run_count, payload_bytes)
}

const fn run(first: u64, pages: u32, kind: RunKind) -> RunEntry {
    RunEntry { first, pages, kind }
}

/// A packet's bytes with a field of its header overwritten, and its CRC right all the same.
fn forged(at: usize, field: &[u8], run_count: u32) -> Vec<u8> {
    let table = vec![run(0, 1, RunKind::Data); run_count as usize];
    let mut bytes = packet(header(run_count, 4096 * u64::from(run_count)), &table, &[]);
    bytes[at..at + field.len()].copy_from_slice(field);
    bytes[CRC_AT..CRC_AT + 4].fill(0);
    let crc = pageferry::wire::crc::crc32c(&bytes);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&[1; 8192]);
    bytes
}

/// Where a packet's header has its fields.
const BLOCK_AT: usize = 6;
const RUNS_AT: usize = 8;
const ROUND_AT: usize = 12;
const PAYLOAD_AT: usize = 32;
const CRC_AT: usize = 60;

#[test]
fn packets_whose_numbers_are_made_up_write_nothing_outside_their_blocks() {
    let (data, zero) = (RunKind::Data, RunKind::Zero);
    let with = |kind, epoch, sequence| PacketHeader {
        kind,
        block: BlockId(0),
        run_count: 0,
        round: Round(0),
        epoch: Epoch(epoch),
        sequence,
        payload_bytes: 0,
    };
    let two = |runs: [RunEntry; 2], payload: usize| packet(header(2, payload as u64), &runs, &vec![1; payload]);
    let after = |first: Vec<u8>, second: Vec<u8>| [first, second].concat();
    let replayed = page_packet(0, Round(0), &[1; 4096]);
    let last_page = packet(header(1, 4096), &[run(15, 1, data)], &[1; 4096]);
    let past_the_end = packet(pages_header(1, Round(0), 1, 4096), &[run(16, 1, data)], &[1; 4096]);
    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("the page behind the last", "reaches past the end of block 0", after(last_page, past_the_end)),
        ("zeros from within to outside", "past the end", packet(header(1, 0), &[run(10, 7, zero)], &[])),
        ("a first page that wraps", "past the end", packet(header(1, 8192), &[run(u64::MAX, 2, data)], &[1; 8192])),
        (
            "the first page times 4096 wraps",
            "past the end",
            packet(header(1, 4096), &[run(1 << 52, 1, data)], &[1; 4096]),
        ),
        ("runs that overlap", "run 1", two([run(3, 2, data), run(4, 1, data)], 12288)),
        ("the same run twice", "run 1", two([run(3, 1, data), run(3, 1, data)], 8192)),
        ("zeros over data", "run 1", two([run(3, 2, data), run(4, 1, zero)], 8192)),
        ("runs in the wrong order", "run 1", two([run(5, 1, data), run(3, 1, data)], 8192)),
        ("a run of no pages", "run 0", packet(header(1, 0), &[run(3, 0, data)], &[])),
        ("the payload of a run that is zero", "payload bytes", packet(header(1, 4096), &[run(3, 1, zero)], &[1; 4096])),
        ("less payload than pages", "payload bytes", packet(header(1, 4095), &[run(3, 1, data)], &[1; 4095])),
        ("a payload of 2^64 - 1", "limit", forged(PAYLOAD_AT, &u64::MAX.to_le_bytes(), 1)),
        ("2^32 - 1 runs", "limit", forged(RUNS_AT, &u32::MAX.to_le_bytes(), 1)),
        ("block 65535", "block", forged(BLOCK_AT, &u16::MAX.to_le_bytes(), 1)),
        ("round 2^32 - 1", "round", forged(ROUND_AT, &u32::MAX.to_le_bytes(), 1)),
        ("a packet that comes twice", "sequence, round and epoch 0, 0, 0 where 1", after(replayed.clone(), replayed)),
        ("an epoch left out", "0, 0, 1 where 0, 0, 0", mark(with(PacketKind::Flush, 1, 0))),
        (
            "an epoch that ends twice",
            "1, 0, 0 where 1, 0, 1",
            after(mark(with(PacketKind::Flush, 0, 0)), mark(with(PacketKind::Flush, 0, 1))),
        ),
        ("the last of all epochs", "where 0, 0, 0", mark(with(PacketKind::Flush, u64::MAX, 0))),
        (
            "a round that ends twice",
            "1, 0, 0 where 1, 1, 0",
            after(
                mark(PacketHeader::round_end(Round(0), Epoch(0), 0)),
                mark(PacketHeader::round_end(Round(0), Epoch(0), 1)),
            ),
        ),
        ("the last of all rounds", "where 0, 0, 0", mark(PacketHeader::round_end(Round::MAX, Epoch(0), 0))),
    ];
    for (what, says, bytes) in cases {
        let (report, incoming) = against(between_canaries(), |to| {
            let mut source = FakeSource::live(to, 1);
            source.send_data(0, &bytes);
            let heard = source.until_closed();
            let named = |frame: &TargetFrame| match frame {
                TargetFrame::ChannelFailed { channel: ChannelId(0), reason, .. } => reason.contains(says),
                _ => false,
            };
            assert!(heard.iter().any(named), "{what}: the source heard {heard:?}, not {says:?}");
        });
        assert!(matches!(report.outcome, Outcome::Failed(_)), "{what}: {}", report.outcome);
        assert_eq!((incoming.runs, incoming.discards), (0, 1), "{what}");
        assert_eq!(assert_nothing_around_was_written(what), 2);
    }
    // And the canaries would tell: what does fit lands, and shows in its block.
    let (_, incoming) = against(between_canaries(), |to| {
        let mut source = FakeSource::live(to, 1);
        source.send_data(0, &packet(header(2, 8192), &[run(0, 1, data), run(15, 1, data)], &[1; 8192]));
        source.send_data(0, &mark(PacketHeader::round_end(Round(0), Epoch(0), 1)));
        source.control.send(&SourceFrame::Final(last(1)));
        assert_eq!(source.next(), Some(TargetFrame::Loaded { round: Round(0) }));
    });
    let ram = incoming.ram.unwrap();
    assert_eq!(
        (vmm::read_page(&ram, BlockId(0), 0), vmm::read_page(&ram, BlockId(0), 15)),
        (vec![1; 4096], vec![1; 4096])
    );
    assert_nothing_around_was_written("a good packet");
}

#[test]
fn frames_whose_numbers_are_made_up_are_refused_by_name() {
    /// The fields of a Setup up to its blocks.
    fn setup_head(channels: u8, blocks: u16) -> Vec<u8> {
        let mut body = vec![0, channels];
        body.extend_from_slice(&[0; 16]);
        body.extend_from_slice(&blocks.to_le_bytes());
        body
    }
    /// A Setup of one block.
    fn of_block(id: u16, guest_address: u64, bytes: u64, page_bytes: u32, backing: u64) -> Vec<u8> {
        let mut body = setup_head(1, 1);
        body.extend_from_slice(&id.to_le_bytes());
        body.push(0);
        body.extend_from_slice(&guest_address.to_le_bytes());
        body.extend_from_slice(&bytes.to_le_bytes());
        body.extend_from_slice(&page_bytes.to_le_bytes());
        body.extend_from_slice(&backing.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body
    }
    let opaque_of_4_gib = [setup_head(1, 0), u32::MAX.to_le_bytes().to_vec()].concat();
    let setups = [
        ("no channels", "number of channels", setup_head(0, 0)),
        ("65535 blocks", "number of blocks is 65535, the limit is 1024", setup_head(1, u16::MAX)),
        ("1024 blocks that did not come", "the Setup ends early: 31744 bytes are needed", setup_head(1, 1024)),
        ("4 GiB for the VMM", "the limit is 524288", opaque_of_4_gib),
        ("a block that is not the first", "block", of_block(7, 0, 4096, 4096, 4096)),
        ("a block of no bytes", "block", of_block(0, 0, 0, 4096, 4096)),
        ("a block of half a page", "block", of_block(0, 0, 2048, 4096, 4096)),
        ("a block to the end of numbers and beyond", "block", of_block(0, !4095, 8192, 4096, 4096)),
        ("pages of 2^32 - 1 bytes", "page", of_block(0, 0, 4096, u32::MAX, 4096)),
        ("pages of no bytes", "page", of_block(0, 0, 4096, 0, 4096)),
        ("backing pages that are none", "back", of_block(0, 0, 4096, 4096, 4097)),
    ];
    for (what, says, body) in setups {
        fails(what, says, |to| {
            let mut source = FakeSource::greet(to);
            source.control.raw(&raw_frame(1, 0, &body));
            let heard = source.until_closed();
            assert!(heard.iter().any(|frame| matches!(frame, TargetFrame::Error(_))), "{what}: {heard:?}");
        });
    }
    let state = |offset: u64, len: u32| [&offset.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let lane = |channel: u8| [&[channel][..], &1u32.to_le_bytes()].concat();
    let final_of = |count: u8, lanes: &[u8]| {
        let lanes: Vec<u8> = lanes.iter().flat_map(|channel| lane(*channel)).collect();
        [&[0; 12][..], &[count], &lanes, &[0; 24]].concat()
    };
    let frames = [
        ("a frame that nobody knows", "control frame", 65535, vec![]),
        ("4 GiB of state", "the limit is 262144", 4, state(0, u32::MAX)),
        ("state at the end of numbers", "state", 4, [state(u64::MAX, 1), vec![1]].concat()),
        ("state that did not come", "State", 4, state(0, 1000)),
        ("a Final of 255 lanes that did not come", "Final", 5, final_of(255, &[0])),
        ("a Final of one lane twice", "names channel 0 twice", 5, final_of(2, &[0, 0])),
        ("a Final of channel 255", "the limit is 254", 5, final_of(1, &[255])),
        ("a Commit with something behind it", "Commit", 7, vec![1]),
        ("a reason that is no text", "reason", 8, vec![1, 0, 0xff]),
    ];
    for (what, says, frame_type, body) in frames {
        fails(what, says, |to| {
            let mut source = FakeSource::live(to, 1);
            source.control.raw(&raw_frame(frame_type, 1, &body));
            let heard = source.until_closed();
            assert!(heard.iter().any(|frame| matches!(frame, TargetFrame::Error(_))), "{what}: {heard:?}");
        });
    }
}

#[test]
fn device_state_beyond_the_limit_is_refused_before_it_is_kept() {
    let target = || Target::builder().timeouts(timeouts()).state_bytes_max(10_000);
    let piece = |offset: u64, len| SourceFrame::State { offset, bytes: vec![1; len] };
    let (report, incoming) = against_target(target(), TestIncoming::new(), |to| {
        let mut source = FakeSource::live(to, 1);
        source.control.send(&piece(0, 10_000));
        source.control.send(&piece(10_000, 1));
        let heard = source.until_closed();
        assert!(heard.iter().any(|frame| matches!(frame, TargetFrame::Error(_))), "{heard:?}");
    });
    assert!(report.outcome.to_string().contains("exceeds the limit of 10000 bytes"), "{}", report.outcome);
    assert_eq!((report.state_bytes, incoming.loads, incoming.discards), (10_000, 0, 1));
    // Attempt after attempt, each withdrawn: what is kept is the last one's.
    let (report, incoming) = against_target(target(), TestIncoming::new(), |to| {
        let mut source = FakeSource::live(to, 1);
        for _ in 0..1000 {
            source.control.send(&piece(0, 10_000));
        }
        source.send_data(0, &mark(PacketHeader::round_end(Round(0), Epoch(0), 0)));
        let state_crc = pageferry::wire::crc::crc32c(&[1; 10_000]);
        source.control.send(&SourceFrame::Final(Final { state_bytes: 10_000, state_crc, ..last(1) }));
        assert_eq!(source.next(), Some(TargetFrame::Loaded { round: Round(0) }));
        source.control.send(&SourceFrame::Commit);
        assert_eq!(source.next(), Some(TargetFrame::Running));
    });
    assert_eq!((report.outcome, incoming.state.len()), (Outcome::Completed, 10_000));
}
