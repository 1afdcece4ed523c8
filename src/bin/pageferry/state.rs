//! The demo guest's device state: what each writer did last, and a checksum over it.

use pageferry::RamBlock;
use pageferry::memory::words;
use pageferry::wire::crc::Crc32c;

/// Comes first in the opaque bytes of Setup.
pub const TAG: &[u8; 16] = b"pageferry demo 1";

/// What one writer has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Pages it has written, one after the other.
    pub count: u64,
    /// The last of them.
    pub page: u64,
}

/// Words that a write changes: one cache line, at the front of the page.
const LINE_WORDS: u64 = 8;

/// The word that a writer's `count`-th write puts at `index`.
fn line_word(writer: usize, count: u64, index: u64) -> u64 {
    mix((writer as u64) << 56 ^ count << 3 ^ index)
}

/// Does a write: of page `page`, as the `count`-th of this writer.
pub fn write_line(block: &RamBlock, writer: usize, count: u64, page: u64) {
    for index in 0..LINE_WORDS {
        words::store(block, page, index, line_word(writer, count, index));
    }
}

/// Mixes all bits of a number into all others.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The device state as bytes: 16 a writer, then the CRC of them.
pub fn encode(written: &[Written]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(written.len() * 16 + 4);
    for w in written {
        bytes.extend_from_slice(&w.count.to_le_bytes());
        bytes.extend_from_slice(&w.page.to_le_bytes());
    }
    let mut crc = Crc32c::new();
    crc.update(&bytes);
    bytes.extend_from_slice(&crc.finish().to_le_bytes());
    bytes
}

/// Reads it back.
pub fn decode(bytes: &[u8]) -> Result<Vec<Written>, String> {
    let Some((body, sum)) = bytes.split_last_chunk::<4>() else {
        return Err(format!("the device state is {} bytes long, too few for its checksum", bytes.len()));
    };
    let mut crc = Crc32c::new();
    crc.update(body);
    if crc.finish() != u32::from_le_bytes(*sum) || body.len() % 16 != 0 {
        return Err("the device state's checksum is wrong".to_owned());
    }
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    Ok(body.chunks_exact(16).map(|w| Written { count: number(&w[..8]), page: number(&w[8..]) }).collect())
}

/// Looks in RAM for what the device state says was written last. How many writers had written.
pub fn check(block: &RamBlock, written: &[Written]) -> Result<usize, String> {
    for (writer, w) in written.iter().enumerate().filter(|(_, w)| w.count > 0) {
        for index in 0..LINE_WORDS {
            if words::load(block, w.page, index) != Some(line_word(writer, w.count, index)) {
                return Err(format!(
                    "the device state says that writer {writer} wrote page {} last, and RAM holds something else",
                    w.page
                ));
            }
        }
    }
    Ok(written.iter().filter(|w| w.count > 0).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::memory::Backing;
    use pageferry::units::PageSize;

    #[test]
    fn a_changed_byte_of_the_state_is_noticed() {
        let written = [Written { count: 3, page: 9 }, Written::default()];
        let good = encode(&written);
        assert_eq!(decode(&good).as_deref(), Ok(&written[..]));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
        assert!(decode(&good[..3]).is_err());
    }

    #[test]
    fn a_write_that_is_missing_from_ram_is_noticed() {
        let block = RamBlock::anonymous("ram", 0, 1 << 20, PageSize::SIZE_64K, Backing::Base).unwrap();
        write_line(&block, 1, 5, 7);
        let state = |count, page| [Written::default(), Written { count, page }];
        assert_eq!(check(&block, &state(5, 7)), Ok(1));
        assert!(check(&block, &state(6, 7)).is_err());
        assert!(check(&block, &state(5, 8)).is_err());
        assert!(check(&block, &state(5, 1 << 40)).is_err());
    }
}
