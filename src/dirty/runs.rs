//! Turns bitmap words into runs of adjacent dirty pages. Pure: no atomics, no clock, no system call.
#![forbid(unsafe_code)]

/// The runs of set bits in `words`, in order, none longer than the limit.
///
/// Runs are joined across words. They are not joined across two calls: whoever harvests in chunks gets a run cut at
/// the chunk's end, which costs one 16-byte table entry per chunk; carrying it over would cost state in the scanner.
///
/// ```
/// use pageferry::dirty::runs::Runs;
///
/// let words = [0b0110, 0, u64::MAX, 1];
/// let runs: Vec<(u64, u32)> = Runs::new(&words, 640, 60).collect();
/// assert_eq!(runs, [(641, 2), (768, 60), (828, 5)]);
/// ```
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    first_page: u64,
    pages_max: usize,
    /// The word that we are in; the number of words at the end.
    index: usize,
    /// Its bits that have not been handed out.
    word: u64,
}

impl<'a> Runs<'a> {
    /// The runs of `words`, whose bit 0 is `first_page`. A limit of 0 counts as 1.
    pub fn new(words: &'a [u64], first_page: u64, pages_max_per_run: u32) -> Self {
        let word = words.first().copied().unwrap_or(0);
        Runs { words, first_page, pages_max: pages_max_per_run.max(1) as usize, index: 0, word }
    }

    /// Goes on to the next word that has a bit set; false if there is none.
    #[inline]
    fn skip_clear(&mut self) -> bool {
        let mut index = self.words.len().min(self.index + 1);
        // Eight words OR-ed at a time: the compiler turns this into vector loads and one branch per 512 pages.
        while let Some(eight) = self.words[index..].first_chunk::<8>() {
            if eight.iter().fold(0, |all, word| all | word) != 0 {
                break;
            }
            index += 8;
        }
        let clear = self.words[index..].iter().take_while(|word| **word == 0).count();
        self.go_to(index + clear);
        self.word != 0
    }

    #[inline]
    fn go_to(&mut self, index: usize) {
        self.index = index;
        self.word = self.words.get(index).copied().unwrap_or(0);
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u32);

    /// The next run: its first page and its number of pages.
    #[inline]
    fn next(&mut self) -> Option<(u64, u32)> {
        if self.word == 0 && !self.skip_clear() {
            return None;
        }
        let mut at = self.word.trailing_zeros() as usize;
        let start = self.index * 64 + at;
        let mut pages = 0;
        loop {
            let ones = (self.word >> at).trailing_ones() as usize;
            let taken = ones.min(self.pages_max - pages);
            pages += taken;
            at += taken;
            if at < 64 {
                self.word &= u64::MAX << at;
                break;
            }
            // Words that are all ones, eight AND-ed at a time, then one by one. Only runs longer than a word come this way.
            let mut index = self.index + 1;
            while let Some(eight) = self.words[index.min(self.words.len())..].first_chunk::<8>() {
                if pages + 512 > self.pages_max || eight.iter().fold(u64::MAX, |all, word| all & word) != u64::MAX {
                    break;
                }
                pages += 512;
                index += 8;
            }
            while pages + 64 <= self.pages_max && self.words.get(index) == Some(&u64::MAX) {
                pages += 64;
                index += 1;
            }
            self.go_to(index);
            at = 0;
            if pages == self.pages_max || self.word & 1 == 0 {
                break;
            }
        }
        // No truncation: a run is no longer than `pages_max`, which came from a u32.
        Some((self.first_page + start as u64, pages as u32))
    }
}

impl std::iter::FusedIterator for Runs<'_> {}

/// How many bits are set in `words`.
///
/// ```
/// assert_eq!(pageferry::dirty::runs::count(&[0b101, u64::MAX]), 66);
/// ```
pub fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The bits of word `index` that stand for the pages `first .. end`, where bit 0 of word 0 is page 0.
#[inline]
pub(crate) fn mask_in_word(index: u64, first: u64, end: u64) -> u64 {
    let start = index * 64;
    let from = first.clamp(start, start + 64) - start;
    let to = end.clamp(start, start + 64) - start;
    if from >= to { 0 } else { (u64::MAX >> (64 - (to - from))) << from }
}

/// Sets the bits `first .. end` of `words`, whole words at a time. Bits past the last word are left out.
#[inline]
pub fn set_range(words: &mut [u64], first: u64, end: u64) {
    let end = end.min(words.len() as u64 * 64);
    if first >= end {
        return;
    }
    for index in first / 64..end.div_ceil(64) {
        words[index as usize] |= mask_in_word(index, first, end);
    }
}

/// Clears the bits `first .. end` of `words`, whole words at a time. Bits past the last word are left out.
#[inline]
pub fn clear_range(words: &mut [u64], first: u64, end: u64) {
    let end = end.min(words.len() as u64 * 64);
    if first >= end {
        return;
    }
    for index in first / 64..end.div_ceil(64) {
        words[index as usize] &= !mask_in_word(index, first, end);
    }
}

#[cfg(test)]
mod tests {
    use super::{clear_range, set_range};

    #[test]
    fn a_range_of_bits_is_set_and_cleared_and_no_other() {
        for first in [0u64, 1, 63, 64, 65, 127, 128, 190] {
            for end in [0u64, 1, 63, 64, 65, 127, 128, 191, 192, 500] {
                let oracle = |bit: u64| bit >= first && bit < end;
                let (mut set, mut cleared) = ([0u64; 3], [u64::MAX; 3]);
                set_range(&mut set, first, end);
                clear_range(&mut cleared, first, end);
                for bit in 0..192u64 {
                    assert_eq!(set[bit as usize / 64] >> (bit % 64) & 1 == 1, oracle(bit), "{first}..{end} {bit}");
                }
                assert_eq!(set.map(|word| !word), cleared);
            }
        }
    }
}
