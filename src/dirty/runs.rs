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
}

impl Iterator for Runs<'_> {
    type Item = (u64, u32);

    /// The next run: its first page and its number of pages.
    // Always: called, it would keep its state in memory, and cost half as much again.
    #[inline(always)]
    fn next(&mut self) -> Option<(u64, u32)> {
        if self.word == 0 {
            self.index = next_not_clear(self.words, self.index + 1);
            self.word = *self.words.get(self.index)?;
        }
        let first = self.first_page + self.index as u64 * 64 + u64::from(self.word.trailing_zeros());
        // The lowest bit, added, carries through the run that it begins, into the bit behind. So the next run waits for
        // four steps of one cycle each, and for none of those that count bits.
        let behind = self.word.wrapping_add(self.word & self.word.wrapping_neg());
        let pages = behind.trailing_zeros() - self.word.trailing_zeros();
        if behind != 0 && pages as usize <= self.pages_max {
            self.word &= behind;
            return Some((first, pages));
        }
        let pages;
        (pages, self.index, self.word) = long_run(self.words, self.index, self.word, self.pages_max);
        // No truncation: a run is no longer than `pages_max`, which came from a u32.
        Some((first, pages as u32))
    }
}

/// The first word from `index` on that has a bit set; the number of words if none has.
#[inline(always)]
fn next_not_clear(words: &[u64], index: usize) -> usize {
    // Where much is dirty, this is the next one.
    if words.get(index).is_some_and(|word| *word != 0) { index } else { skip_clear(words, index) }
}

#[inline(never)]
fn skip_clear(words: &[u64], index: usize) -> usize {
    let mut index = words.len().min(index);
    // Eight words OR-ed at a time: the compiler turns this into vector loads and one branch per 512 pages.
    while let Some(eight) = words[index..].first_chunk::<8>() {
        if eight.iter().fold(0, |all, word| all | word) != 0 {
            break;
        }
        index += 8;
    }
    index + words[index..].iter().take_while(|word| **word == 0).count()
}

/// The run that begins with the lowest bit of `word`, if it goes on in the next word or is cut: its pages, and the word
/// behind it, without its bits. It takes and gives values, not the iterator, which else could not live in registers.
#[inline(never)]
fn long_run(words: &[u64], mut index: usize, mut word: u64, pages_max: usize) -> (usize, usize, u64) {
    let mut at = word.trailing_zeros() as usize;
    let mut pages = 0;
    loop {
        let ones = (word >> at).trailing_ones() as usize;
        let taken = ones.min(pages_max - pages);
        pages += taken;
        at += taken;
        if at < 64 {
            return (pages, index, word & (u64::MAX << at));
        }
        // Words that are all ones, eight AND-ed at a time, then one by one. Only runs longer than a word come this way.
        index += 1;
        while let Some(eight) = words[index.min(words.len())..].first_chunk::<8>() {
            if pages + 512 > pages_max || eight.iter().fold(u64::MAX, |all, word| all & word) != u64::MAX {
                break;
            }
            pages += 512;
            index += 8;
        }
        while pages + 64 <= pages_max && words.get(index) == Some(&u64::MAX) {
            pages += 64;
            index += 1;
        }
        word = words.get(index).copied().unwrap_or(0);
        at = 0;
        if pages == pages_max || word & 1 == 0 {
            return (pages, index, word);
        }
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
