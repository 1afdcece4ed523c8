//! CRC-32C by the CPU's instruction for it, where there is one.

// UNSAFETY: intrinsics of a CPU that must have them, and reads of eight bytes at a time through a pointer into a slice.
#![expect(unsafe_code)]

/// Bytes of each of three stretches that are summed side by side: the instruction takes three cycles, and a new one can
/// begin in each of them.
#[cfg(target_arch = "x86_64")]
const STRETCH: usize = 256;

/// Adds `bytes` to a running remainder (inverted, as the algorithm has it between its first step and its last).
/// `None`, and nothing done, if this CPU has no instruction for it.
///
/// ```
/// if let Some(remainder) = pageferry::sys::crc::add(!0, b"123456789") {
///     assert_eq!(!remainder, 0xE306_9283);
/// }
/// ```
#[inline]
pub fn add(remainder: u32, bytes: &[u8]) -> Option<u32> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // The macro keeps its answer in a static of std: after the first call it costs a load and a bit test.
    if std::arch::is_x86_feature_detected!("sse4.2") && std::arch::is_x86_feature_detected!("pclmulqdq") {
        // SAFETY: both were found just now.
        return Some(unsafe { add_sse42(remainder, bytes) });
    }
    let _ = (remainder, bytes);
    None
}

/// # Safety
///
/// The CPU has SSE4.2 and PCLMULQDQ.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2,pclmulqdq")]
unsafe fn add_sse42(remainder: u32, mut bytes: &[u8]) -> u32 {
    use std::arch::x86_64::*;
    let mut crc = u64::from(remainder);
    // SAFETY: the CPU has the instructions, as the caller promised. Each read takes eight bytes of a chunk that the
    // slice was split into: at `at`, `at + STRETCH` and `at + 2 * STRETCH` of `3 * STRETCH`, or exactly eight.
    unsafe {
        while let Some((three, rest)) = bytes.split_first_chunk::<{ 3 * STRETCH }>() {
            let word = |at: usize| three.as_ptr().add(at).cast::<u64>().read_unaligned();
            let (mut second, mut third) = (0, 0);
            let mut at = 0;
            while at < STRETCH {
                crc = _mm_crc32_u64(crc, word(at));
                second = _mm_crc32_u64(second, word(at + STRETCH));
                third = _mm_crc32_u64(third, word(at + 2 * STRETCH));
                at += 8;
            }
            let (by_two, by_one) = const { (zero_bytes(2 * STRETCH), zero_bytes(STRETCH)) };
            let first = _mm_clmulepi64_si128::<0>(_mm_cvtsi64_si128(crc as i64), _mm_cvtsi64_si128(by_two));
            let second = _mm_clmulepi64_si128::<0>(_mm_cvtsi64_si128(second as i64), _mm_cvtsi64_si128(by_one));
            crc = _mm_crc32_u64(0, _mm_cvtsi128_si64(_mm_xor_si128(first, second)) as u64) ^ third;
            bytes = rest;
        }
        while let Some((eight, rest)) = bytes.split_first_chunk::<8>() {
            crc = _mm_crc32_u64(crc, eight.as_ptr().cast::<u64>().read_unaligned());
            bytes = rest;
        }
        bytes.iter().fold(crc as u32, |crc, byte| _mm_crc32_u8(crc, *byte))
    }
}

/// What a remainder is to be multiplied by, without carry, to become that of so many zero bytes later: that is how what
/// came before a stretch is brought behind it. The product is still to be reduced, which the instruction does as it
/// takes it for eight bytes. That multiplies by x^32 as well, and the product of two numbers whose bits are reversed has
/// an x too many: so the factor is 33 powers short.
#[cfg(target_arch = "x86_64")]
const fn zero_bytes(count: usize) -> i64 {
    power_of_x(8 * count - 33) as i64
}

/// The remainder of x to this power by the polynomial of CRC-32C, bits reversed: the highest stands for 1.
#[cfg(target_arch = "x86_64")]
const fn power_of_x(power: usize) -> u32 {
    let (mut remainder, mut at) = (1u32 << 31, 0);
    while at < power {
        remainder = if remainder & 1 == 1 { (remainder >> 1) ^ 0x82F6_3B78 } else { remainder >> 1 };
        at += 1;
    }
    remainder
}
