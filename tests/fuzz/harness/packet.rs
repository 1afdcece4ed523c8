//! A data packet: any header and table, in a block of any length, with the checksum made right or left as it is.
//!
//! The first byte chooses: bit 0 the checksum, bit 1 the magic with it, bits 2 to 4 the page size; the length of the
//! block in pages follows.

use pageferry::units::PageSize;
use pageferry::wire::crc::crc32c;
use pageferry::wire::packet::{PACKET_HEADER_BYTES, PACKET_MAGIC, PacketHeader, check_crc};

use super::script::Script;
use super::wire_checks::{an_accepted_packet_is_canonical_and_fits, judge_packet};

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let choice = script.byte();
    let page_size = PageSize::new(1 << (12 + u32::from(choice >> 2 & 7) % 5)).expect("a page size");
    let block_pages = script.number();
    let mut bytes = script.rest().to_vec();
    if bytes.len() >= PACKET_HEADER_BYTES {
        if choice & 2 != 0 {
            bytes[..4].copy_from_slice(&PACKET_MAGIC.to_le_bytes());
        }
        if choice & 1 != 0 {
            // The checksum covers what the header says, not what follows it.
            let end = (PACKET_HEADER_BYTES + 16 * run_count(&bytes)).min(bytes.len());
            bytes[60..64].fill(0);
            let crc = crc32c(&bytes[..end]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        }
    }
    an_accepted_packet_is_canonical_and_fits(&bytes, page_size, block_pages);
    let judged = judge_packet(&bytes, page_size, block_pages);
    assert_eq!(judged.is_ok(), is_good(&bytes, page_size, block_pages), "{judged:?}");

    // A lane reads a header before its table: what it makes of a damaged one is bounded all the same.
    if let Some((head, _)) = bytes.split_first_chunk::<PACKET_HEADER_BYTES>() {
        if let Ok(header) = PacketHeader::decode(head) {
            assert!(header.table_bytes() <= 16 * 1024 && header.payload_bytes <= 4 << 20);
            assert!(header.table_bytes() > 0 || check_crc(head, &[]).is_ok() == crc_is_right(head));
        }
    }
    if judged.is_ok() { "accepted" } else { "refused" }
}

fn number(bytes: &[u8]) -> u128 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

fn run_count(bytes: &[u8]) -> usize {
    number(&bytes[8..12]) as usize
}

fn crc_is_right(covered: &[u8]) -> bool {
    let zeroed: Vec<u8> =
        covered.iter().enumerate().map(|(at, byte)| if (60..64).contains(&at) { 0 } else { *byte }).collect();
    covered[60..64] == crc32c(&zeroed).to_le_bytes()
}

/// The layout of a packet and the rules of its table, once more, by another hand and in 128 bits.
fn is_good(bytes: &[u8], page_size: PageSize, block_pages: u64) -> bool {
    if bytes.len() < PACKET_HEADER_BYTES {
        return false;
    }
    let (kind, runs) = (bytes[4], run_count(bytes));
    let (block, round, payload) = (number(&bytes[6..8]), number(&bytes[12..16]), number(&bytes[32..40]));
    let end = PACKET_HEADER_BYTES + 16 * runs;
    let empty = block == 0 && runs == 0 && payload == 0;
    let good_counts = match kind {
        1 => block < 1024 && (1..=1024).contains(&runs) && payload <= 4 << 20,
        _ => (2..=4).contains(&kind) && empty,
    };
    let fixed = number(&bytes[..4]) == u128::from(PACKET_MAGIC) && bytes[5] == 0 && bytes[40..60] == [0; 20];
    if !fixed || !good_counts || round > 65_534 || bytes.len() < end || !crc_is_right(&bytes[..end]) {
        return false;
    }
    let (mut next, mut data_pages) = (0, 0);
    for row in bytes[PACKET_HEADER_BYTES..end].chunks(16) {
        let (first, pages, kind) = (number(&row[..8]), number(&row[8..12]), number(&row[12..]));
        if pages == 0 || first < next || first + pages > u128::from(block_pages) || !(1..=2).contains(&kind) {
            return false;
        }
        next = first + pages;
        data_pages += if kind == 1 { pages } else { 0 };
    }
    data_pages * u128::from(page_size.bytes()) == payload
}
