//! Damage, drawn from a seed.

use pageferry::qemu::wire::RAM_PACKET_BYTES;

use crate::capture::Capture;

/// A generator of numbers, the same for the same seed.
pub struct Draw(pub u64);

impl Draw {
    pub fn below(&mut self, end: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) % end.max(1) as u64) as usize
    }
}

/// Numbers that somebody may have forgotten to check.
const EXTREME: [u32; 8] = [0, 1, 0x7f, 0x81, 0xff, 0x8000_0000, 0xffff_f000, u32::MAX];

/// The flags of a packet that say how it is compressed.
const COMPRESSION: u8 = 0x06;

/// Changes one thing; what, in words.
pub fn mutate(capture: &mut Capture, draw: &mut Draw) -> String {
    let stream = draw.below(capture.streams.len());
    let count = capture.streams[stream].len();
    let index = draw.below(count);
    let records = &mut capture.streams[stream];
    let length = records[index].len();
    // Most of a packet is pages: headers are what is of interest, and what a decompressor reads.
    let packed = length > RAM_PACKET_BYTES && records[index][11] & COMPRESSION != 0;
    let at = match draw.below(4) {
        0 => draw.below(length),
        1 if packed => RAM_PACKET_BYTES + draw.below(length - RAM_PACKET_BYTES),
        _ => draw.below(length.min(400)),
    };
    let here = format!("stream {stream}, record {index} of {count}, byte {at} of {length}");
    match draw.below(10) {
        0 | 1 if length > 0 => {
            let bit = draw.below(8);
            records[index][at] ^= 1 << bit;
            format!("bit {bit} flipped: {here}")
        }
        2 if length > 4 => {
            let (at, number) = (at.min(length - 4) & !3, EXTREME[draw.below(EXTREME.len())]);
            records[index][at..at + 4].copy_from_slice(&number.to_be_bytes());
            format!("{number:#x} at {at}: {here}")
        }
        3 => {
            records[index].truncate(at);
            records.truncate(index + 1);
            format!("nothing more: {here}")
        }
        4 => {
            records.remove(index);
            format!("record left out: {here}")
        }
        5 => {
            let again = records[index].clone();
            records.insert(index, again);
            format!("record twice: {here}")
        }
        6 => {
            let other = draw.below(records.len());
            records.swap(index, other);
            format!("record swapped with {other}: {here}")
        }
        7 => {
            let to = draw.below(capture.streams.len());
            let moved = capture.streams[stream].remove(index);
            let place = draw.below(capture.streams[to].len() + 1);
            capture.streams[to].insert(place, moved);
            format!("record moved to stream {to}, place {place}: {here}")
        }
        8 if length > 0 => {
            let end = at + draw.below((length - at).min(64));
            records[index].drain(at..end);
            format!("{} bytes left out: {here}", end - at)
        }
        _ => {
            let more: Vec<u8> = (0..draw.below(64)).map(|_| draw.below(256) as u8).collect();
            let told = format!("{} bytes put in: {here}", more.len());
            records[index].splice(at..at, more);
            told
        }
    }
}
