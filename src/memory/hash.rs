//! The content hash of one page: 64 bits, the same on every machine, taken while others may be writing to the page.
//!
//! The shape is that of XXH3's inner loop, with keys of our own. Eight 64-bit accumulators eat a stripe of 64 bytes:
//! each word `d` of the stripe, xored with its key, adds the product of its two halves to its own accumulator, and `d`
//! as it is to the neighbour's. Each of the 16 stripes of a kilobyte has keys of its own; after each kilobyte the
//! accumulators are scrambled, so that kilobytes cannot change places. It is no cryptographic hash: it finds
//! accidents and bugs, and a guest that knows the keys can make two pages of its own collide.
//!
//! **The value is part of the wire protocol**: source and target compare what they make of it. Whoever changes it
//! changes the protocol's version. A page of zeros has the hash [`ZERO_HASH`], whatever its size.
//!
//! Measured by `benches/hash.rs` (4 KiB pages, 2 cores of an EPYC Zen 4, virtual): in cache 51 GB/s with AVX2, 25 with
//! SSE2, 13 by words; out of cache 21 GB/s, no slower than `memcpy`. Prefetching into the first-level cache, within the
//! page or into the next, gained nothing in either, in order or at random; into the second level see `look.rs`.

// UNSAFETY: guest RAM is read through raw pointers while others write to it. All such reads are those of `zero.rs`,
// whose UNSAFETY text says why they are sound and what a torn value means: here, a hash of a page that was never
// there, of a page that is dirty and will be sent and hashed again. Besides, vector code needs `unsafe` as such.
#![expect(unsafe_code)]

use super::zero::load_word;
#[cfg(target_arch = "x86_64")]
use super::zero::{load_16, load_32};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// The hash of a page of zeros, of any size.
///
/// That it is the same for all sizes is made so: each hash is xored with what its size's page of zeros would give.
/// So zero pages need not be read to be hashed, and who records them need not know how pages are hashed.
pub const ZERO_HASH: u64 = 0;

/// Lengths that can be hashed are multiples of this: the bytes between two scrambles.
pub const BLOCK_BYTES: usize = 1024;

/// The longest page that can be hashed.
pub const PAGE_BYTES_MAX: usize = 65536;

const STRIPE_BYTES: usize = 64;
const STRIPES: usize = BLOCK_BYTES / STRIPE_BYTES;
const PRIME_32: u64 = 0x9e37_79b1;
const LOW_32: u64 = 0xffff_ffff;

/// One word for each lane of a stripe.
type Lanes = [u64; 8];

/// Rows of keys: one a stripe, then the scramble's, the accumulators' first values, and the end's.
/// Aligned so that no vector of keys lies across two cache lines.
#[repr(align(64))]
struct Keys([Lanes; STRIPES + 3]);

const SCRAMBLE: usize = STRIPES;
const START: usize = STRIPES + 1;
const END: usize = STRIPES + 2;

/// The output of splitmix64 seeded with 0: nothing up the sleeve.
static KEYS: Keys = Keys(KEY_ROWS);
const KEY_ROWS: [Lanes; STRIPES + 3] = {
    let mut rows = [[0; 8]; STRIPES + 3];
    let mut state: u64 = 0;
    let mut at = 0;
    while at < rows.len() * 8 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        rows[at / 8][at % 8] = avalanche(state);
        at += 1;
    }
    rows
};

/// What a page of zeros of `n` blocks gives before the xor, at index `n`.
static ZEROS: [u64; PAGE_BYTES_MAX / BLOCK_BYTES + 1] = {
    let mut table = [0; PAGE_BYTES_MAX / BLOCK_BYTES + 1];
    let mut acc = KEY_ROWS[START];
    let mut blocks = 1;
    while blocks < table.len() {
        let mut stripe = 0;
        while stripe < STRIPES {
            acc = absorb(acc, [0; 8], &KEY_ROWS[stripe]);
            stripe += 1;
        }
        acc = scramble(acc);
        table[blocks] = merge(acc, blocks * BLOCK_BYTES);
        blocks += 1;
    }
    table
};

/// Hashes pages, in the fastest way that this CPU can. Chosen once, `Copy`, and the same value in every way.
///
/// ```
/// use pageferry::memory::hash::{PageHash, ZERO_HASH};
///
/// let hash = PageHash::detect();
/// let mut page = vec![0u8; 4096];
/// assert_eq!(hash.hash_bytes(&page), ZERO_HASH);
///
/// page[4095] = 1;
/// assert_ne!(hash.hash_bytes(&page), ZERO_HASH);
/// assert_eq!(hash.hash_bytes(&page), PageHash::portable().hash_bytes(&page));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHash(Path);

/// `Sse2` and `Avx2` exist only where the CPU has been seen to have them: [`PageHash::available`] is the only maker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Path {
    Words,
    #[cfg(target_arch = "x86_64")]
    Sse2,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl PageHash {
    /// The fastest way that this CPU can.
    pub fn detect() -> PageHash {
        PageHash::available().last().unwrap_or(PageHash::portable())
    }

    /// Word by word: the way that every CPU can.
    pub const fn portable() -> PageHash {
        PageHash(Path::Words)
    }

    /// All the ways that this CPU can, the slowest first: for tests and measurements.
    pub fn available() -> impl Iterator<Item = PageHash> {
        [
            Some(Path::Words),
            // Checkers like Miri cannot run the assembly that loads vectors.
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Some(Path::Sse2),
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            std::arch::is_x86_feature_detected!("avx2").then_some(Path::Avx2),
        ]
        .into_iter()
        .flatten()
        .map(PageHash)
    }

    /// The name of the way: `"words"`, `"sse2"` or `"avx2"`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Path::Words => "words",
            #[cfg(target_arch = "x86_64")]
            Path::Sse2 => "sse2",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => "avx2",
        }
    }

    /// The hash of the `len` bytes at `ptr`. If somebody writes to them meanwhile, any value may come out.
    ///
    /// ```
    /// use pageferry::memory::hash::PageHash;
    ///
    /// let mut page = vec![7u64; 512];
    /// let ptr: *mut u64 = page.as_mut_ptr();
    /// // SAFETY: 4096 bytes, mapped, aligned to words.
    /// let hash = unsafe { PageHash::detect().hash(ptr.cast(), 4096) };
    /// assert_eq!(hash, PageHash::portable().hash_bytes(&[7, 0, 0, 0, 0, 0, 0, 0].repeat(512)));
    /// ```
    ///
    /// # Safety
    ///
    /// - `ptr` is aligned to 8 bytes (64 is best); `len` is a multiple of [`BLOCK_BYTES`], not 0, and at most
    ///   [`PAGE_BYTES_MAX`].
    /// - All `len` bytes at `ptr` are mapped for reading until the call returns. Others may write to them.
    /// - If Rust code of this process made the memory, `ptr` comes from a `*mut`, not from a `&`.
    #[inline]
    pub unsafe fn hash(self, ptr: *const u8, len: usize) -> u64 {
        debug_assert!(ptr as usize % 8 == 0 && is_hashable(len));
        let acc = match self.0 {
            Path::Words => accumulate(len, |at| {
                // SAFETY: `at` is a multiple of 8 below `len`, so these 8 bytes are mapped and aligned.
                u64::from_le(unsafe { load_word(ptr.add(at)) })
            }),
            // SAFETY: every x86-64 has SSE2; `len` bytes are mapped, a multiple of BLOCK_BYTES: the caller's promise.
            #[cfg(target_arch = "x86_64")]
            Path::Sse2 => unsafe { accumulate_sse2(ptr, len) },
            // SAFETY: `Path::Avx2` is only made where AVX2 was detected; the rest is the caller's promise.
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => unsafe { accumulate_avx2(ptr, len) },
        };
        finish(acc, len)
    }

    /// As [`hash`](PageHash::hash), of a buffer that nobody else writes to.
    ///
    /// # Panics
    ///
    /// If the length is none that can be hashed: a multiple of [`BLOCK_BYTES`] from there to [`PAGE_BYTES_MAX`].
    pub fn hash_bytes(self, bytes: &[u8]) -> u64 {
        assert!(is_hashable(bytes.len()), "{} bytes is not the length of a page", bytes.len());
        let acc = match self.0 {
            Path::Words => accumulate(bytes.len(), |at| {
                bytes[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
            }),
            // SAFETY: every x86-64 has SSE2; the bytes are there to be read, and their length was checked above.
            #[cfg(target_arch = "x86_64")]
            Path::Sse2 => unsafe { accumulate_sse2(bytes.as_ptr(), bytes.len()) },
            // SAFETY: `Path::Avx2` is only made where AVX2 was detected; the rest as above.
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => unsafe { accumulate_avx2(bytes.as_ptr(), bytes.len()) },
        };
        finish(acc, bytes.len())
    }
}

const fn is_hashable(len: usize) -> bool {
    len % BLOCK_BYTES == 0 && len >= BLOCK_BYTES && len <= PAGE_BYTES_MAX
}

/// The accumulators after a page whose little-endian words `word` gives by offset.
#[inline(always)]
fn accumulate(len: usize, word: impl Fn(usize) -> u64) -> Lanes {
    let mut acc = KEYS.0[START];
    for block in (0..len).step_by(BLOCK_BYTES) {
        for stripe in 0..STRIPES {
            let data = std::array::from_fn(|lane| word(block + stripe * STRIPE_BYTES + lane * 8));
            acc = absorb(acc, data, &KEYS.0[stripe]);
        }
        acc = scramble(acc);
    }
    acc
}

#[inline(always)]
const fn absorb(mut acc: Lanes, data: Lanes, key: &Lanes) -> Lanes {
    let mut lane = 0;
    while lane < 8 {
        let mixed = data[lane] ^ key[lane];
        acc[lane] = acc[lane].wrapping_add((mixed & LOW_32) * (mixed >> 32));
        acc[lane ^ 1] = acc[lane ^ 1].wrapping_add(data[lane]);
        lane += 1;
    }
    acc
}

/// One to one for each accumulator: no difference that has come this far gets lost.
#[inline(always)]
const fn scramble(mut acc: Lanes) -> Lanes {
    let mut lane = 0;
    while lane < 8 {
        let value = acc[lane] ^ (acc[lane] >> 47) ^ KEY_ROWS[SCRAMBLE][lane];
        acc[lane] = value.wrapping_mul(PRIME_32);
        lane += 1;
    }
    acc
}

/// Eight accumulators into 64 bits: the folded products of pairs, and the length.
#[inline(always)]
const fn merge(acc: Lanes, len: usize) -> u64 {
    let mut sum = (len as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut pair = 0;
    while pair < 8 {
        let (a, b) = (acc[pair] ^ KEY_ROWS[END][pair], acc[pair + 1] ^ KEY_ROWS[END][pair + 1]);
        let product = a as u128 * b as u128;
        sum = sum.wrapping_add(product as u64 ^ (product >> 64) as u64);
        pair += 2;
    }
    avalanche(sum)
}

#[inline(always)]
fn finish(acc: Lanes, len: usize) -> u64 {
    // In bounds: every `len` that comes here is hashable.
    merge(acc, len) ^ ZEROS[len / BLOCK_BYTES]
}

/// The finalizer of splitmix64: one to one, and every bit in reaches every bit out.
const fn avalanche(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// As [`accumulate`], two lanes at a time.
///
/// # Safety
///
/// `len` bytes are mapped for reading at `ptr`; `len` is a multiple of BLOCK_BYTES.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
unsafe fn accumulate_sse2(ptr: *const u8, len: usize) -> Lanes {
    let mut out = [0; 8];
    // SAFETY: `block + stripe * 64 + 64 <= len` for whole blocks, and that much is mapped; KEYS, which is aligned,
    // and `out` have four vectors of 16 bytes to a row, and `part` is below 4.
    unsafe {
        // Key vectors in order, a row after the other: four to a row.
        let keys = KEYS.0.as_ptr().cast::<__m128i>();
        let prime = _mm_set1_epi64x(PRIME_32 as i64);
        let mut acc = [_mm_setzero_si128(); 4];
        for (part, acc) in acc.iter_mut().enumerate() {
            *acc = _mm_load_si128(keys.add(START * 4 + part));
        }
        let mut block = 0;
        while block < len {
            for stripe in 0..STRIPES {
                for (part, acc) in acc.iter_mut().enumerate() {
                    let data = load_16(ptr.add(block + stripe * STRIPE_BYTES + part * 16));
                    let mixed = _mm_xor_si128(data, _mm_load_si128(keys.add(stripe * 4 + part)));
                    let product = _mm_mul_epu32(mixed, _mm_srli_epi64::<32>(mixed));
                    // The shuffle swaps neighbours: lane i meets accumulator i ^ 1.
                    let swapped = _mm_shuffle_epi32::<0x4e>(data);
                    *acc = _mm_add_epi64(*acc, _mm_add_epi64(product, swapped));
                }
            }
            for (part, acc) in acc.iter_mut().enumerate() {
                let value = _mm_xor_si128(*acc, _mm_srli_epi64::<47>(*acc));
                let value = _mm_xor_si128(value, _mm_load_si128(keys.add(SCRAMBLE * 4 + part)));
                // A 64-bit product with a 32-bit prime, from two 32-bit ones.
                let high = _mm_mul_epu32(_mm_srli_epi64::<32>(value), prime);
                *acc = _mm_add_epi64(_mm_mul_epu32(value, prime), _mm_slli_epi64::<32>(high));
            }
            block += BLOCK_BYTES;
        }
        for (part, acc) in acc.into_iter().enumerate() {
            _mm_storeu_si128(out.as_mut_ptr().cast::<__m128i>().add(part), acc);
        }
    }
    out
}

/// As [`accumulate`], four lanes at a time.
///
/// # Safety
///
/// As [`accumulate_sse2`], and the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn accumulate_avx2(ptr: *const u8, len: usize) -> Lanes {
    let mut out = [0; 8];
    // SAFETY: as in `accumulate_sse2`, with two vectors of 32 bytes to a row.
    unsafe {
        let keys = KEYS.0.as_ptr().cast::<__m256i>();
        let prime = _mm256_set1_epi64x(PRIME_32 as i64);
        let mut acc = [_mm256_load_si256(keys.add(START * 2)), _mm256_load_si256(keys.add(START * 2 + 1))];
        let mut block = 0;
        while block < len {
            for stripe in 0..STRIPES {
                for (half, acc) in acc.iter_mut().enumerate() {
                    let data = load_32(ptr.add(block + stripe * STRIPE_BYTES + half * 32));
                    let mixed = _mm256_xor_si256(data, _mm256_load_si256(keys.add(stripe * 2 + half)));
                    let product = _mm256_mul_epu32(mixed, _mm256_srli_epi64::<32>(mixed));
                    let swapped = _mm256_shuffle_epi32::<0x4e>(data);
                    *acc = _mm256_add_epi64(*acc, _mm256_add_epi64(product, swapped));
                }
            }
            for (half, acc) in acc.iter_mut().enumerate() {
                let value = _mm256_xor_si256(*acc, _mm256_srli_epi64::<47>(*acc));
                let value = _mm256_xor_si256(value, _mm256_load_si256(keys.add(SCRAMBLE * 2 + half)));
                let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(value), prime);
                *acc = _mm256_add_epi64(_mm256_mul_epu32(value, prime), _mm256_slli_epi64::<32>(high));
            }
            block += BLOCK_BYTES;
        }
        for (half, acc) in acc.into_iter().enumerate() {
            _mm256_storeu_si256(out.as_mut_ptr().cast::<__m256i>().add(half), acc);
        }
    }
    out
}
