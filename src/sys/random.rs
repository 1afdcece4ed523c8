//! getrandom(2): the sixteen random bytes that name sessions and instances.

// UNSAFETY: one system call that fills a buffer.
#![expect(unsafe_code)]

use super::cvt_retry;
use std::io;

/// Sixteen bytes from the kernel's random number generator. Waits, early in boot, until it is seeded.
pub fn random_16() -> io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer is a local array and its own length is passed.
    let got = cvt_retry(|| unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) } as i64)?;
    // "reads of up to 256 bytes will always return as many bytes as requested": checked all the same, because a
    // session id with zero bytes at its end could be guessed.
    if got == bytes.len() as u64 { Ok(bytes) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof)) }
}

#[cfg(test)]
mod tests {
    use super::random_16;

    #[test]
    fn two_ids_differ_and_are_filled_to_the_end() {
        let ids: Vec<[u8; 16]> = (0..64).map(|_| random_16().unwrap()).collect();
        for (i, id) in ids.iter().enumerate() {
            assert!(!ids[..i].contains(id));
        }
        // A byte that is zero in all of 64 ids was never filled: 2^-512 otherwise.
        assert!((0..16).all(|byte| ids.iter().any(|id| id[byte] != 0)));
    }
}
