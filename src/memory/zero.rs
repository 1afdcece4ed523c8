//! Tells whether a page of guest RAM holds nothing but zeros, while the guest may be writing to it.

// UNSAFETY: guest RAM is read through raw pointers, because others write to it while we look: vCPUs, devices, other
// threads of this process. A plain Rust read of such memory would be a data race, which Rust calls undefined even
// where the hardware shrugs. So no plain read happens here: words are read by relaxed atomic loads, and vectors by a
// load instruction written as inline assembly, into which the compiler does not look: it can neither read twice nor
// assume that memory holds still. (Measured: the assembly costs nothing against the plain vector intrinsics.) What a
// racing load yields may be torn: part old, part new. No harm: whoever writes makes the page dirty again, so it
// travels again, and no bound, address or length is ever computed from what was read.
#![expect(unsafe_code)]

use crate::sync::{AtomicU64, Ordering};

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Bytes looked at first: one cache line.
const LINE: usize = 64;

/// Bytes looked at between two decisions after that.
const BLOCK: usize = 256;

/// True if all `len` bytes at `ptr` were zero when they were read.
///
/// The first cache line is looked at first: most pages that hold something show it there. If somebody writes
/// meanwhile, the answer may be wrong by the time it is given; the page is then dirty, and is asked about again.
///
/// Works a vector at a time where the CPU can (SSE2, AVX2: found out at run time), else by words.
///
/// ```
/// # use pageferry::memory::zero::is_zero;
/// let mut page = vec![0u64; 512];
/// let ptr: *mut u64 = page.as_mut_ptr();
/// // SAFETY: 4096 bytes, mapped, and aligned to words.
/// assert!(unsafe { is_zero(ptr.cast(), 4096) });
/// // SAFETY: the last word of the same page.
/// unsafe { ptr.add(511).write(1) };
/// // SAFETY: as above.
/// assert!(!unsafe { is_zero(ptr.cast(), 4096) });
/// ```
///
/// # Safety
///
/// - `ptr` is aligned to 8 bytes (64 is best), `len` is a multiple of 256 and not 0: any number of pages will do.
/// - All `len` bytes at `ptr` are mapped for reading until the call returns. Others may write to them.
/// - If Rust code of this process made the memory, `ptr` comes from a `*mut`, not from a `&`.
#[inline]
pub unsafe fn is_zero(ptr: *const u8, len: usize) -> bool {
    debug_assert!(ptr as usize % 8 == 0 && len % BLOCK == 0 && len > 0);
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        // The macro keeps its answer in a static of std: after the first call it costs a load and a bit test.
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was found just now; the rest is the caller's promise.
            return unsafe { is_zero_avx2(ptr, len) };
        }
        // SAFETY: every x86-64 has SSE2; the rest is the caller's promise.
        unsafe { is_zero_sse2(ptr, len) }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    // SAFETY: the caller's promise.
    unsafe {
        is_zero_words(ptr, len)
    }
}

/// One word of memory that others may be writing to, in this machine's byte order.
///
/// # Safety
///
/// `ptr` is aligned to 8 bytes, and 8 bytes are mapped for reading there.
#[inline(always)]
pub(super) unsafe fn load_word(ptr: *const u8) -> u64 {
    // SAFETY: aligned and mapped, as the caller promised. `from_ptr` asks for writable memory because its atomic may
    // be stored to; this one is only loaded from, and a relaxed 8-byte load never writes. It is a reference to an
    // UnsafeCell that lives for one load: it claims nothing about what the memory holds.
    unsafe { AtomicU64::from_ptr(ptr.cast_mut().cast()) }.load(Ordering::Relaxed)
}

/// Sixteen bytes of memory that others may be writing to; any alignment.
///
/// # Safety
///
/// 16 bytes are mapped for reading at `ptr`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
pub(super) unsafe fn load_16(ptr: *const u8) -> __m128i {
    let value: __m128i;
    // SAFETY: reads 16 mapped bytes, as the caller promised, touches neither stack nor flags.
    unsafe {
        std::arch::asm!("movdqu {}, xmmword ptr [{}]", out(xmm_reg) value, in(reg) ptr,
            options(pure, readonly, nostack, preserves_flags));
    }
    value
}

/// Thirty-two bytes of memory that others may be writing to; any alignment.
///
/// # Safety
///
/// The CPU has AVX2, and 32 bytes are mapped for reading at `ptr`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn load_32(ptr: *const u8) -> __m256i {
    let value: __m256i;
    // SAFETY: reads 32 mapped bytes, as the caller promised, touches neither stack nor flags.
    unsafe {
        std::arch::asm!("vmovdqu {}, ymmword ptr [{}]", out(ymm_reg) value, in(reg) ptr,
            options(pure, readonly, nostack, preserves_flags));
    }
    value
}

/// By words: for every CPU, and for checkers that cannot run assembly.
///
/// # Safety
///
/// As [`is_zero`].
#[cfg_attr(all(target_arch = "x86_64", not(miri), not(test)), expect(dead_code))]
unsafe fn is_zero_words(ptr: *const u8, len: usize) -> bool {
    let is_zero = |from: usize, bytes: usize| {
        // SAFETY: `from + bytes <= len`, and all `len` bytes are mapped; `from` is a multiple of 8, and so is `ptr`.
        (from..from + bytes).step_by(8).fold(0, |any, at| any | unsafe { load_word(ptr.add(at)) }) == 0
    };
    is_zero(0, LINE) && (0..len).step_by(BLOCK).all(|at| is_zero(at, BLOCK))
}

/// By vectors of 16 bytes.
///
/// # Safety
///
/// As [`is_zero`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
unsafe fn is_zero_sse2(ptr: *const u8, len: usize) -> bool {
    // SAFETY: the first line, and every block at a multiple of BLOCK below `len`, lie within the `len` mapped bytes,
    // because `len` is a multiple of BLOCK and not 0.
    unsafe {
        if !span_is_zero_sse2::<LINE>(ptr) {
            return false;
        }
        let mut at = 0;
        while at < len {
            if !span_is_zero_sse2::<BLOCK>(ptr.add(at)) {
                return false;
            }
            at += BLOCK;
        }
    }
    true
}

/// # Safety
///
/// `BYTES` are mapped for reading at `ptr`; it is a multiple of 16.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
unsafe fn span_is_zero_sse2<const BYTES: usize>(ptr: *const u8) -> bool {
    // SAFETY: `at + 16 <= BYTES`, which are mapped.
    unsafe {
        let mut any = load_16(ptr);
        let mut at = 16;
        while at < BYTES {
            any = _mm_or_si128(any, load_16(ptr.add(at)));
            at += 16;
        }
        _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff
    }
}

/// By vectors of 32 bytes.
///
/// # Safety
///
/// As [`is_zero`], and the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(ptr: *const u8, len: usize) -> bool {
    // SAFETY: as in `is_zero_sse2`.
    unsafe {
        if !span_is_zero_avx2::<LINE>(ptr) {
            return false;
        }
        let mut at = 0;
        while at < len {
            if !span_is_zero_avx2::<BLOCK>(ptr.add(at)) {
                return false;
            }
            at += BLOCK;
        }
    }
    true
}

/// # Safety
///
/// `BYTES` are mapped for reading at `ptr`; it is a multiple of 32. The CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn span_is_zero_avx2<const BYTES: usize>(ptr: *const u8) -> bool {
    // SAFETY: `at + 32 <= BYTES`, which are mapped.
    unsafe {
        let mut any = load_32(ptr);
        let mut at = 32;
        while at < BYTES {
            any = _mm256_or_si256(any, load_32(ptr.add(at)));
            at += 32;
        }
        _mm256_testz_si256(any, any) == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C, align(4096))]
    struct Pages([u8; 8192]);

    type IsZero = unsafe fn(*const u8, usize) -> bool;

    /// Every path this machine can run.
    fn paths() -> Vec<(&'static str, IsZero)> {
        let mut paths: Vec<(&'static str, IsZero)> = vec![("dispatched", is_zero), ("words", is_zero_words)];
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            paths.push(("sse2", is_zero_sse2));
            if std::arch::is_x86_feature_detected!("avx2") {
                paths.push(("avx2", is_zero_avx2));
            } else {
                eprintln!("SKIPPED memory::zero (avx2): this CPU has no AVX2");
            }
        }
        paths
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut pages = Box::new(Pages([0; 8192]));
        let ptr: *mut u8 = pages.0.as_mut_ptr();
        for (name, is_zero) in paths() {
            // SAFETY: 8192 bytes of our own, aligned to 4096, for all calls below.
            unsafe {
                assert!(is_zero(ptr, 4096) && is_zero(ptr, 8192), "{name}");
                let step = if cfg!(miri) { 61 } else { 1 };
                for at in (0..8192).step_by(step) {
                    ptr.add(at).write(1 << (at % 8));
                    assert_eq!(is_zero(ptr, 4096), at >= 4096, "{name}: byte {at} set");
                    assert!(!is_zero(ptr, 8192), "{name}: byte {at} set");
                    ptr.add(at).write(0);
                }
            }
        }
    }

    #[test]
    fn bits_that_cancel_out_in_a_sum_or_a_xor_are_not_zero() {
        let mut pages = Box::new(Pages([0; 8192]));
        let ptr: *mut u8 = pages.0.as_mut_ptr();
        for (name, is_zero) in paths() {
            // SAFETY: 8192 bytes of our own, aligned to 4096; words at multiples of 8.
            unsafe {
                for (a, b) in [(1u64, u64::MAX), (1 << 63, 1 << 63)] {
                    ptr.add(1024).cast::<u64>().write(a);
                    ptr.add(1056).cast::<u64>().write(b);
                    assert!(!is_zero(ptr, 4096), "{name}");
                }
                ptr.add(1024).write_bytes(0, 64);
            }
        }
    }
}
