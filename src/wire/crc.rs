//! CRC-32C (Castagnoli): the checksum of hellos, packet headers and control frames.
//!
//! By the CPU's instruction where it has one (found out at run time), else by tables.

#![forbid(unsafe_code)]

use crate::sys::crc;

/// The polynomial 0x1EDC6F41, bits reversed.
const POLYNOMIAL: u32 = 0x82F6_3B78;

/// Slice-by-8: `TABLES[k][b]` is the CRC of byte `b` followed by `k` zero bytes, so that eight bytes cost eight
/// independent look-ups instead of a chain of eight. 8 KiB in all: a quarter of an L1 cache, which the instruction spares.
static TABLES: [[u32; 256]; 8] = make_tables();

const fn make_tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut slice = 1;
    while slice < 8 {
        let mut byte = 0;
        while byte < 256 {
            let shorter = tables[slice - 1][byte];
            tables[slice][byte] = (shorter >> 8) ^ tables[0][(shorter & 0xFF) as usize];
            byte += 1;
        }
        slice += 1;
    }
    tables
}

/// The CRC-32C of `bytes`.
///
/// ```
/// assert_eq!(pageferry::wire::crc::crc32c(b"123456789"), 0xE306_9283);
/// ```
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = Crc32c::new();
    crc.update(bytes);
    crc.finish()
}

/// A CRC-32C that is fed piece by piece. Not for content an attacker chooses: it finds damage, it proves no origin.
///
/// ```
/// use pageferry::wire::crc::{Crc32c, crc32c};
///
/// let mut crc = Crc32c::new();
/// crc.update(b"1234");
/// crc.update(b"56789");
/// assert_eq!(crc.finish(), crc32c(b"123456789"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Crc32c {
    /// The running remainder, inverted, so that leading zero bytes count.
    inverted: u32,
}

impl Crc32c {
    /// The CRC of nothing yet.
    pub const fn new() -> Crc32c {
        Crc32c { inverted: !0 }
    }

    /// Adds `bytes` to what came before.
    pub fn update(&mut self, bytes: &[u8]) {
        self.inverted = crc::add(self.inverted, bytes).unwrap_or_else(|| add_by_tables(self.inverted, bytes));
    }

    /// The CRC of all that was added. More may follow.
    pub const fn finish(&self) -> u32 {
        !self.inverted
    }
}

impl Default for Crc32c {
    fn default() -> Crc32c {
        Crc32c::new()
    }
}

/// As [`crc::add`], on every CPU.
fn add_by_tables(mut crc: u32, bytes: &[u8]) -> u32 {
    let mut eights = bytes.chunks_exact(8);
    for eight in &mut eights {
        let low = crc ^ u32::from_le_bytes([eight[0], eight[1], eight[2], eight[3]]);
        crc = look_up(7, low)
            ^ look_up(6, low >> 8)
            ^ look_up(5, low >> 16)
            ^ look_up(4, low >> 24)
            ^ look_up(3, u32::from(eight[4]))
            ^ look_up(2, u32::from(eight[5]))
            ^ look_up(1, u32::from(eight[6]))
            ^ look_up(0, u32::from(eight[7]));
    }
    for &byte in eights.remainder() {
        crc = (crc >> 8) ^ look_up(0, crc ^ u32::from(byte));
    }
    crc
}

/// The entry of one table for the lowest byte of `value`.
#[inline(always)]
fn look_up(slice: usize, value: u32) -> u32 {
    TABLES[slice][(value & 0xFF) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, a bit at a time: what the tables must agree with.
    fn bit_by_bit(bytes: &[u8]) -> u32 {
        let mut crc = !0u32;
        for &byte in bytes {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            }
        }
        !crc
    }

    #[test]
    fn the_vectors_of_rfc_3720_hold() {
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(&rising), 0x46DD_794E);
        assert_eq!(crc32c(&falling), 0x113F_DB5C);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    fn noise(bytes: u32) -> Vec<u8> {
        (0..bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn every_length_agrees_with_the_definition() {
        let bytes = noise(100);
        for start in 0..9 {
            for end in start..bytes.len() {
                let (bytes, defined) = (&bytes[start..end], bit_by_bit(&bytes[start..end]));
                assert_eq!(crc32c(bytes), defined, "{start}..{end}");
                assert_eq!(!add_by_tables(!0, bytes), defined, "{start}..{end} by tables");
            }
        }
    }

    #[test]
    fn instruction_and_tables_agree_at_every_length_and_alignment() {
        if crc::add(0, &[]).is_none() {
            eprintln!("SKIPPED wire::crc (instruction): this CPU has none that is known here");
            return;
        }
        let bytes = noise(if cfg!(miri) { 100 } else { 5016 });
        for start in 0..16 {
            // A remainder to begin with that differs each time, and one byte more at a time.
            let begin = 0x1234_5678u32.wrapping_mul(start as u32);
            let mut by_tables = begin;
            for end in start..bytes.len() {
                assert_eq!(crc::add(begin, &bytes[start..end]), Some(by_tables), "{start}..{end}");
                by_tables = add_by_tables(by_tables, &bytes[end..=end]);
            }
        }
    }

    #[test]
    fn pieces_give_the_crc_of_the_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        for cut in 0..=bytes.len() {
            let mut crc = Crc32c::new();
            crc.update(&bytes[..cut]);
            crc.update(&bytes[cut..]);
            assert_eq!(crc.finish(), crc32c(&bytes), "cut at {cut}");
        }
    }
}
