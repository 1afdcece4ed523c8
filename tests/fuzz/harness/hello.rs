//! A Hello: any 64 bytes, with the checksum made right or left as it is.

use pageferry::wire::VERSION;
use pageferry::wire::crc::crc32c;
use pageferry::wire::hello::{HELLO_BYTES, HELLO_MAGIC, Hello};

use super::script::Script;
use super::wire_checks::an_accepted_hello_is_canonical;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let sealed = script.flag();
    let mut bytes = [0; HELLO_BYTES];
    let rest = script.rest();
    let length = rest.len().min(HELLO_BYTES);
    bytes[..length].copy_from_slice(&rest[..length]);
    if sealed {
        bytes[..8].copy_from_slice(&HELLO_MAGIC);
        let crc = crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
    }
    an_accepted_hello_is_canonical(&bytes);
    assert_eq!(Hello::decode(&bytes).is_ok(), is_good(&bytes), "{bytes:?}");
    if is_good(&bytes) { "accepted" } else { "refused" }
}

/// The layout of a Hello, once more, by another hand.
fn is_good(bytes: &[u8; HELLO_BYTES]) -> bool {
    let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|byte| *byte == 0);
    let control = bytes[10] == 1 && bytes[12] == 0;
    let data = bytes[10] == 2 && bytes[12] < 255;
    bytes[..8] == HELLO_MAGIC
        && bytes[8..10] == VERSION.to_le_bytes()
        && bytes[60..] == crc32c(&bytes[..60]).to_le_bytes()
        && (control || data)
        && matches!(bytes[11], 1 | 2)
        && zero(13..16)
        && zero(20..24)
        && zero(48..60)
}
