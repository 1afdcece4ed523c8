//! The page hash and the zero test: the same answer in every way a CPU can, and no change that goes unseen.
#![cfg(not(loom))]
// Unsafe because both read through raw pointers; the buffers here are the tests' own.
#![expect(unsafe_code)]

#[path = "support/mod.rs"]
mod support;

use pageferry::memory::hash::{BLOCK_BYTES, PAGE_BYTES_MAX, PageHash, ZERO_HASH};
use pageferry::memory::zero::is_zero;
use proptest::prelude::*;
use std::collections::HashSet;
use std::ptr;

#[derive(Clone)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The hash of a copy of `bytes`, aligned and reached through a `*mut` as guest RAM is.
fn hash_through_pointer(hash: PageHash, bytes: &[u8]) -> u64 {
    let mut lines = vec![Line([0; 64]); bytes.len() / 64];
    let ptr = lines.as_mut_ptr().cast::<u8>();
    // SAFETY: `lines` has room for `bytes`, whose length is a multiple of 1024; nobody else knows of it.
    unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr(), ptr, bytes.len());
        hash.hash(ptr, bytes.len())
    }
}

fn ramp(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * i / 7 + i) % 251) as u8).collect()
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let word = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 29)).to_le_bytes()
    };
    (0..len / 8).flat_map(word).collect()
}

/// Pages as guests have them: nothing, one byte, text, counters, all ones, noise.
fn samples() -> Vec<Vec<u8>> {
    let mut one = vec![0; 4096];
    one[2000] = 1;
    let text = b"the quick brown fox jumps over the lazy dog. ".iter().copied().cycle().take(4096).collect();
    let counters = (0..512u64).flat_map(u64::to_le_bytes).collect();
    vec![vec![0; 4096], one, text, counters, vec![0xff; 4096], ramp(4096), noise(4096, 1)]
}

#[test]
fn the_value_is_that_of_the_definition() {
    // From a second implementation, written in another language from the description at the top of hash.rs.
    let golden = [
        (1024, 0xa11c_34ea_c599_1bc6, 0x56ff_aeb9_ae08_83a3),
        (4096, 0x8110_70b5_a449_e484, 0x2866_c6d3_efbd_bd6f),
        (16384, 0x09cf_a1ab_d080_1671, 0x41da_f77f_2357_bb94),
        (65536, 0xf9e2_bca5_0fed_7765, 0x187c_5dba_e84d_5846),
    ];
    for hash in PageHash::available() {
        for (len, ones, ramped) in golden {
            assert_eq!(hash.hash_bytes(&vec![0xff; len]), ones, "{} of {len}", hash.name());
            assert_eq!(hash.hash_bytes(&ramp(len)), ramped, "{} of {len}", hash.name());
        }
    }
}

#[test]
fn zeros_have_the_zero_hash_in_every_size_and_way() {
    for hash in PageHash::available() {
        for len in (BLOCK_BYTES..=PAGE_BYTES_MAX).step_by(BLOCK_BYTES) {
            assert_eq!(hash.hash_bytes(&vec![0; len]), ZERO_HASH, "{} of {len}", hash.name());
        }
    }
}

#[test]
fn the_way_that_is_detected_is_one_of_those_available() {
    let names: Vec<_> = PageHash::available().map(PageHash::name).collect();
    assert_eq!(names.first(), Some(&"words"));
    assert_eq!(names.last(), Some(&PageHash::detect().name()));
    if !names.contains(&"avx2") {
        support::skip("hash (avx2)", "this CPU has no AVX2, or a checker runs the test");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_way_gives_the_same_hash(
        blocks in 1..=PAGE_BYTES_MAX / BLOCK_BYTES, seed: u64, zeroed in 0..=64usize, misaligned in 0..64usize,
    ) {
        let len = blocks * BLOCK_BYTES;
        let mut buffer = noise(len + 64, seed);
        buffer[..len * zeroed / 64].fill(0);
        let bytes = &buffer[misaligned..misaligned + len];
        let expected = PageHash::portable().hash_bytes(bytes);
        for hash in PageHash::available() {
            prop_assert_eq!(hash.hash_bytes(bytes), expected, "{} of a slice", hash.name());
            prop_assert_eq!(hash_through_pointer(hash, bytes), expected, "{} through a pointer", hash.name());
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_changes_the_hash() {
    // Stronger: no two of the 32,768 neighbours of a page share a hash, nor even 48 bits of one.
    let hash = PageHash::detect();
    for (sample, mut page) in samples().into_iter().enumerate() {
        let low_48 = |page: &[u8]| hash.hash_bytes(page) << 16;
        let mut seen = HashSet::from([low_48(&page)]);
        for bit in 0..page.len() * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(seen.insert(low_48(&page)), "sample {sample}, bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn a_flipped_bit_flips_half_of_the_hash() {
    let hash = PageHash::detect();
    for (sample, mut page) in samples().into_iter().enumerate() {
        let before = hash.hash_bytes(&page);
        let mut flips = [0u32; 64];
        let trials = page.len() * 8;
        for bit in 0..trials {
            page[bit / 8] ^= 1 << (bit % 8);
            let changed = before ^ hash.hash_bytes(&page);
            page[bit / 8] ^= 1 << (bit % 8);
            flips.iter_mut().enumerate().for_each(|(i, count)| *count += (changed >> i & 1) as u32);
        }
        for (bit, count) in flips.into_iter().enumerate() {
            // 32,768 fair coins stay within 5 % of the middle but for one time in 10^70.
            let share = f64::from(count) / trials as f64;
            assert!((0.45..0.55).contains(&share), "sample {sample}: bit {bit} of the hash flips {share} of the time");
        }
    }
}

#[test]
fn words_stripes_and_kilobytes_that_change_places_change_the_hash() {
    let hash = PageHash::detect();
    for page in samples() {
        let before = hash.hash_bytes(&page);
        for size in [1, 4, 8, 16, 32, 64, 256, 1024, 2048] {
            for distance in (1..=8).chain([16, 64, 128, 256]).map(|steps| steps * size) {
                for at in (0..(page.len() - size).saturating_sub(distance)).step_by(size.max(104)) {
                    let mut swapped = page.clone();
                    let (head, tail) = swapped.split_at_mut(at + distance);
                    head[at..at + size].swap_with_slice(&mut tail[..size]);
                    let moved = swapped != page;
                    assert_eq!(hash.hash_bytes(&swapped) != before, moved, "{size} bytes at {at} by {distance}");
                }
            }
        }
    }
}

#[test]
fn shifted_content_changes_the_hash() {
    let hash = PageHash::detect();
    for page in samples() {
        for by in 1..page.len() {
            let mut shifted = page.clone();
            shifted.rotate_right(by);
            assert_eq!(hash.hash_bytes(&shifted) != hash.hash_bytes(&page), shifted != page, "by {by}");
        }
    }
}

#[test]
fn the_length_is_part_of_the_hash() {
    let hash = PageHash::detect();
    let hashes: HashSet<_> = (1..=64).map(|blocks| hash.hash_bytes(&vec![1; blocks * 1024])).collect();
    assert_eq!(hashes.len(), 64);
}

#[test]
fn a_length_that_no_page_has_is_refused() {
    for len in [0, 1, 512, 1023, 1025, 4095, PAGE_BYTES_MAX + BLOCK_BYTES] {
        let refused = std::panic::catch_unwind(|| PageHash::detect().hash_bytes(&vec![0; len]));
        assert!(refused.is_err(), "{len}");
    }
}

#[test]
fn not_a_byte_past_the_page_is_read() {
    if cfg!(miri) {
        support::skip("not_a_byte_past_the_page_is_read", "Miri knows no mprotect");
        return;
    }
    // A page that ends where the mapping ends: the next byte would be a SIGSEGV.
    // SAFETY: a fresh mapping of our own, its second half made unreadable; written to and read in its first half.
    unsafe {
        let host = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap().max(PAGE_BYTES_MAX);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let map = libc::mmap(ptr::null_mut(), 2 * host, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(map, libc::MAP_FAILED);
        let end = map.cast::<u8>().add(host);
        assert_eq!(libc::mprotect(end.cast(), host, libc::PROT_NONE), 0);
        for len in [4096, 16384, 65536] {
            assert!(is_zero(end.sub(len), len));
            for hash in PageHash::available() {
                assert_eq!(hash.hash(end.sub(len), len), ZERO_HASH, "{}", hash.name());
            }
            end.sub(1).write(1);
            assert!(!is_zero(end.sub(len), len));
            end.sub(1).write(0);
        }
        assert_eq!(libc::munmap(map, 2 * host), 0);
    }
}
