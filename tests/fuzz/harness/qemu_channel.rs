//! A channel of QEMU's, its return path, or one RAM packet.
//!
//! The first byte chooses the dialect, the second what the bytes are; three bytes follow that say how they are cut.

use pageferry::qemu::wire::{Dialect, RAM_PACKET_BYTES, RamPacket};

use super::checks::{any_channel_is_judged_well, any_return_path_is_judged_well};
use super::plans::{self, Packet};
use super::script::Script;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let dialect = plans::dialect(&mut script);
    let choice = script.below(5);
    let pieces = [0; 3].map(|_| usize::from(script.byte()) * 8 + 1);
    match choice {
        0 => any_channel_is_judged_well(script.rest(), dialect, &pieces),
        1 => any_return_path_is_judged_well(script.rest(), &pieces),
        2 => {
            let changes = plans::changes(&mut script);
            let mut stream = Vec::new();
            (0..script.below(4)).for_each(|_| plans::message(&mut script).encode(&mut stream));
            plans::change(&mut stream, &changes);
            any_return_path_is_judged_well(&stream, &pieces)
        }
        3 => {
            let changes = plans::changes(&mut script);
            let (mut stream, _) = plans::channel(&mut script, dialect);
            if changes.is_empty() {
                assert_eq!(any_channel_is_judged_well(&stream, dialect, &pieces), "accepted");
            }
            plans::change(&mut stream, &changes);
            any_channel_is_judged_well(&stream, dialect, &pieces)
        }
        _ => packet(&mut script, dialect),
    }
}

fn packet(script: &mut Script<'_>, dialect: Dialect) -> &'static str {
    // What the other dialect writes is among what this one may meet.
    let (writer, changes) = (plans::dialect(script), plans::changes(script));
    let mut bytes = Packet::any(script, writer).new_packet().encode(writer).expect("a sound packet");
    plans::change(&mut bytes, &changes);
    let judged = RamPacket::decode(&bytes, dialect, 0);
    assert_eq!(judged.is_ok(), is_good(&bytes, dialect), "{judged:?}");
    if judged.is_ok() { "accepted" } else { "refused" }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The layout of a RAM packet and its rules, once more, by another hand.
fn is_good(bytes: &[u8; RAM_PACKET_BYTES], dialect: Dialect) -> bool {
    let word = |at: usize| number(&bytes[at..at + 4]);
    let (flags, alloc, normal, size, zero) = (word(8), word(12), word(16), word(20), word(32));
    let (old, sync, method) = (dialect == Dialect::V7_2, flags & 1 == 1, flags & !1);
    let pages = normal + zero;
    if word(0) != 0x1122_3344 || word(4) != 1 || ![0, 2, 4].contains(&method) || alloc > 128 || pages > alloc {
        return false;
    }
    if number(&bytes[36..44]) != 0 || bytes[44..64] != [0; 20] {
        return false;
    }
    let sizes = match (method, normal) {
        (0, _) => old || size == normal * 4096,
        (_, 0) => old || size == 0,
        _ => (1..=1 << 20).contains(&size),
    };
    let kind = if old { zero == 0 } else { sync == (pages == 0) && (!sync || alloc == 0) };
    if !sizes || !kind {
        return false;
    }
    let used = 320 + 8 * pages as usize;
    let offsets: Vec<_> = bytes[320..used].chunks(8).map(number).collect();
    let distinct: std::collections::BTreeSet<_> = offsets.iter().collect();
    if distinct.len() < offsets.len() || offsets.iter().any(|offset| offset % 4096 != 0) {
        return false;
    }
    if !old && bytes[used..].iter().any(|byte| *byte != 0) {
        return false;
    }
    let mut parts = bytes[64..320].splitn(2, |byte| *byte == 0);
    let (name, Some(padding)) = (parts.next().unwrap_or_default(), parts.next()) else { return pages == 0 && old };
    let padded = old || padding.iter().all(|byte| *byte == 0);
    let text = std::str::from_utf8(name).is_ok_and(|text| !text.is_empty() && !text.chars().any(char::is_control));
    if pages == 0 { old || (name.is_empty() && padded) } else { text && padded }
}
