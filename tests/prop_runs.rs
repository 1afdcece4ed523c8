//! Runs against an oracle that looks at one bit at a time.
#![cfg(not(loom))]
#![forbid(unsafe_code)]

use pageferry::dirty::runs::{Runs, count};
use proptest::prelude::*;

/// One bit at a time: what `Runs` has to yield.
fn oracle(words: &[u64], first_page: u64, pages_max: u64) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for bit in 0..words.len() as u64 * 64 {
        if words[bit as usize / 64] >> (bit % 64) & 1 == 0 {
            continue;
        }
        let page = first_page + bit;
        match runs.last_mut() {
            Some((first, pages)) if *first + u64::from(*pages) == page && u64::from(*pages) < pages_max => *pages += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// Words as they come: mostly clean, mostly full, or mixed.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![4 => Just(0), 3 => Just(u64::MAX), 1 => any::<u64>(), 1 => (0..64u32).prop_map(|s| 1 << s),
        1 => (0..64u32).prop_map(|s| u64::MAX << s), 1 => (0..64u32).prop_map(|s| u64::MAX >> s)];
    prop::collection::vec(word, 0..60)
}

proptest! {
    #[test]
    fn runs_are_what_the_bits_say(words in words(), first in 0..1u64 << 40, pages_max in prop_oneof![1..200u32, Just(u32::MAX)]) {
        let runs: Vec<_> = Runs::new(&words, first * 64, pages_max).collect();
        prop_assert_eq!(&runs, &oracle(&words, first * 64, u64::from(pages_max)));
        prop_assert_eq!(runs.iter().map(|run| u64::from(run.1)).sum::<u64>(), count(&words));
    }
}

#[test]
fn long_stretches_are_cut_at_the_limit_only() {
    for zeros in 0..20 {
        let mut words = vec![0; zeros];
        words.extend([u64::MAX; 33]);
        words.extend([0; 17]);
        let runs: Vec<_> = Runs::new(&words, 0, 1000).collect();
        let first = zeros as u64 * 64;
        assert_eq!(runs, [(first, 1000), (first + 1000, 1000), (first + 2000, 112)]);
    }
}

#[test]
fn a_limit_of_zero_counts_as_one_and_the_end_stays_the_end() {
    let mut runs = Runs::new(&[0b11], 0, 0);
    assert_eq!([runs.next(), runs.next(), runs.next(), runs.next()], [Some((0, 1)), Some((1, 1)), None, None]);
    assert_eq!(Runs::new(&[], 0, 5).next(), None);
}
