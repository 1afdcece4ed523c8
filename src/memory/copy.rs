//! Copies guest RAM into a buffer of our own, while the guest may be writing to it: for those who need a slice.
// UNSAFETY: guest RAM is read through raw pointers while others write to it. A plain Rust read of such memory would be a
// data race; so it is read by an instruction that the compiler does not look into, or by relaxed atomic loads. What comes
// of a race may be torn, and is dirty then (see `zero` for the whole argument).
#![expect(unsafe_code)]

use crate::memory::zero::load_word;
use crate::sync::{AtomicU8, Ordering};

/// Fills `into` from `from`.
///
/// # Safety
/// `into.len()` bytes are mapped for reading at `from` until the call returns, and no `&mut` to any of them exists. Others
/// may write to them.
#[inline]
pub(super) unsafe fn copy_out(from: *const u8, into: &mut [u8]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: reads as many mapped bytes, as the caller promised, and writes them into a slice that we hold alone; the
    // direction flag is clear on entry to assembly. Every x86-64 has the instruction, and for some 1 KiB and more there
    // is no faster copy.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") into.len() => _, inout("rdi") into.as_mut_ptr() => _,
            inout("rsi") from => _, options(nostack, preserves_flags));
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    // SAFETY: the caller's promise.
    unsafe {
        copy_words(from, into);
    }
}

/// By words, and bytes at both ends: for every CPU, and for checkers that cannot run assembly.
///
/// # Safety
/// As [`copy_out`].
#[cfg_attr(all(target_arch = "x86_64", not(miri), not(test)), expect(dead_code))]
unsafe fn copy_words(from: *const u8, into: &mut [u8]) {
    // SAFETY: only called for `at < into.len()`, all of which are mapped; a relaxed load never writes, and the reference,
    // to an UnsafeCell, lives for one load.
    let byte = |at: usize| unsafe { AtomicU8::from_ptr(from.wrapping_add(at).cast_mut()) }.load(Ordering::Relaxed);
    let head = from.align_offset(8).min(into.len());
    let tail = into.len() - (into.len() - head) % 8;
    (0..head).chain(tail..into.len()).for_each(|at| into[at] = byte(at));
    for (index, word) in into[head..tail].chunks_exact_mut(8).enumerate() {
        // SAFETY: inside the mapped bytes, as `head + 8 * index + 8 <= tail`, and aligned by the choice of `head`.
        word.copy_from_slice(&unsafe { load_word(from.wrapping_add(head + 8 * index)) }.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_is_copied_whole_and_nothing_beyond() {
        let mut from: Vec<u8> = (0..300u32).map(|i| i as u8 | 1).collect();
        for start in 0..9 {
            for len in [0, 1, 7, 8, 63, 64, 65, 200] {
                let mut into = vec![0; len + 1];
                let mut by_words = vec![0; len + 1];
                // SAFETY: `start + len` bytes are in the vector, which is not written to.
                unsafe {
                    copy_out(from.as_mut_ptr().wrapping_add(start), &mut into[..len]);
                    copy_words(from.as_mut_ptr().wrapping_add(start), &mut by_words[..len]);
                }
                assert_eq!(into[..len], from[start..start + len]);
                assert_eq!(into[len], 0);
                assert_eq!(into, by_words);
            }
        }
    }
}
