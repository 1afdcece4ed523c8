//! Compressed packets of one channel: pages that were compressed, whole or with a few bytes changed, or any bytes at all.
//!
//! The first byte chooses the method, the second what the packets are.

use pageferry::qemu::compress::{Deflate, Inflate};
use pageferry::qemu::wire::{COMPRESSED_BYTES_MAX, Compression, PACKET_PAGES_MAX, PAGE_BYTES};

use super::plans;
use super::script::Script;

/// Packets of one channel at most.
const PACKETS_MAX: usize = 4;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let method = if script.flag() { Compression::Zlib } else { Compression::Zstd };
    if script.flag() { any_bytes(&mut script, method) } else { packed(&mut script, method) }
}

/// What is no packet of anybody's fills its pages or is refused, and what was refused stays so.
fn any_bytes(script: &mut Script<'_>, method: Compression) -> &'static str {
    let mut inflate = Inflate::new(method).expect("a decompressor");
    for _ in 0..PACKETS_MAX {
        let mut pages = vec![0; script.below(PACKET_PAGES_MAX + 2) * PAGE_BYTES as usize];
        if let Err(error) = inflate.packet(script.bytes(), &mut pages) {
            assert_eq!(inflate.packet(&[0], &mut pages), Err(error), "an error is final");
            return "refused";
        }
        assert!(!pages.is_empty(), "no pages were taken for a packet");
    }
    "accepted"
}

/// What was compressed comes back, packet by packet; and with a few bytes changed it still has its length, or is refused.
fn packed(script: &mut Script<'_>, method: Compression) -> &'static str {
    let (mut deflate, mut inflate) =
        (Deflate::new(method).expect("a compressor"), Inflate::new(method).expect("a decompressor"));
    for _ in 0..=script.below(PACKETS_MAX) {
        let sent = pages(script);
        let data = deflate.packet(&sent).expect("data");
        assert!((1..=COMPRESSED_BYTES_MAX as usize).contains(&data.len()), "{} bytes of data", data.len());
        let (mut data, changes) = (data.to_vec(), plans::changes(script));
        plans::change(&mut data, &changes);
        let mut received = vec![0xa5; sent.len()];
        match inflate.packet(&data, &mut received) {
            Ok(()) => assert!(!changes.is_empty() || received == sent, "what came back is not what was sent"),
            Err(error) => {
                assert!(!changes.is_empty(), "a sound packet was refused: {error}");
                return "refused";
            }
        }
        if !changes.is_empty() {
            return "accepted";
        }
    }
    "accepted"
}

/// The pages of a packet: each of one value, of a few that repeat, or of noise.
fn pages(script: &mut Script<'_>) -> Vec<u8> {
    let (count, kind, mut state) = (1 + script.below(PACKET_PAGES_MAX), script.below(3), script.number());
    let repeated = script.bytes();
    let byte = |at: usize| match kind {
        0 => (at >> 12) as u8 ^ state as u8,
        1 => repeated.get(at % repeated.len().max(1)).copied().unwrap_or(0),
        _ => {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        }
    };
    (0..count * PAGE_BYTES as usize).map(byte).collect()
}
