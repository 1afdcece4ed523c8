//! Finds the end of the tail.
//!
//! The sections of devices have no lengths, and with a return path the connection stays open behind them. What can be
//! found is the last thing in the tail: the bytes 00 and 06, a length, and so many bytes of JSON that describe the
//! devices. Such bytes may stand in the state of a device too, so every place is tried, without holding any of it.

#![forbid(unsafe_code)]

use super::json::{Object, Step};
use crate::qemu::wire::Dialect;

/// Most bytes of a description. A PC has 45 KiB.
pub const VMDESC_BYTES_MAX: u32 = 16 << 20;

/// Bytes of the end mark, the type, the length, and the opening brace.
const WINDOW: usize = 7;

/// Most descriptions that can be open at once. There is a zero byte six before each one's brace, and none between the
/// brace of the oldest, if that is open still, and the brace of the youngest: these are less than six bytes apart.
const OPEN_MAX: usize = WINDOW - 1;

/// A description that may be one.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Bytes that it must still have.
    left: u32,
    object: Object,
}

/// Looks at every byte of the tail.
#[derive(Clone, Debug)]
pub struct Vmdesc {
    /// The last bytes, the newest last.
    window: [u8; WINDOW],
    open: [Option<Candidate>; OPEN_MAX],
    whole: bool,
    /// Of the last description that was whole.
    dialect: Option<Dialect>,
}

impl Vmdesc {
    /// Before the first byte of the tail.
    pub const fn new() -> Vmdesc {
        // Not zero: the end mark must come from the tail.
        Vmdesc { window: [0xFF; WINDOW], open: [None; OPEN_MAX], whole: false, dialect: None }
    }

    /// Whether the last byte was the last one of a description.
    pub const fn is_whole(&self) -> bool {
        self.whole
    }

    /// Which QEMU wrote the last description that was whole: 10.0 describes the configuration in it, 7.2 does not.
    pub const fn dialect(&self) -> Option<Dialect> {
        self.dialect
    }

    /// Looks at `bytes` up to the end of a description, or all of them, and returns how many that are.
    pub fn scan(&mut self, bytes: &[u8]) -> usize {
        for (index, byte) in bytes.iter().enumerate() {
            self.step(*byte);
            if self.whole {
                return index + 1;
            }
        }
        bytes.len()
    }

    fn step(&mut self, byte: u8) {
        self.whole = false;
        for slot in &mut self.open {
            let Some(candidate) = slot else { continue };
            candidate.left -= 1;
            match candidate.object.step(byte) {
                Step::Open if candidate.left > 0 => {}
                Step::Whole if candidate.left == 0 => {
                    self.whole = true;
                    let new = candidate.object.has_configuration();
                    self.dialect = Some(if new { Dialect::V10_0 } else { Dialect::V7_2 });
                    *slot = None;
                }
                _ => *slot = None,
            }
        }
        self.window.rotate_left(1);
        self.window[WINDOW - 1] = byte;
        let [0x00, 0x06, a, b, c, d, b'{'] = self.window else { return };
        let length = u32::from_be_bytes([a, b, c, d]);
        if (2..=VMDESC_BYTES_MAX).contains(&length) {
            let candidate = Candidate { left: length - 1, object: Object::opened() };
            // There is always a free one: see `OPEN_MAX`.
            if let Some(free) = self.open.iter_mut().find(|slot| slot.is_none()) {
                *free = Some(candidate);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"page_size":4096,"devices":[]}"#;

    fn described(json: &str) -> Vec<u8> {
        let mut bytes = vec![0, 6];
        bytes.extend((json.len() as u32).to_be_bytes());
        bytes.extend(json.as_bytes());
        bytes
    }

    /// The places where a description ends.
    fn ends(bytes: &[u8]) -> Vec<usize> {
        let (mut vmdesc, mut ends, mut at) = (Vmdesc::new(), Vec::new(), 0);
        while at < bytes.len() {
            at += vmdesc.scan(&bytes[at..]);
            if vmdesc.is_whole() {
                ends.push(at);
            }
        }
        ends
    }

    #[test]
    fn the_end_is_found_behind_any_bytes() {
        let described = described(JSON);
        let mut stumbling = vec![0, 6, 0, 6];
        stumbling.extend(&described);
        for before in [&[][..], &[4, 0, 0], &[0, 6], &[0, 6, 0, 0, 0], &[0, 6, 0, 0, 0, 40, b'{'], &stumbling[..4]] {
            let bytes = [before, &described].concat();
            assert_eq!(ends(&bytes), [bytes.len()], "{before:?}");
        }
    }

    #[test]
    fn the_last_description_tells_whose_it_is() {
        let mut vmdesc = Vmdesc::new();
        assert_eq!(vmdesc.dialect(), None);
        vmdesc.scan(&described(r#"{"configuration": {}, "page_size": 4096, "devices": []}"#));
        assert_eq!(vmdesc.dialect(), Some(Dialect::V10_0));
        vmdesc.scan(&described(JSON));
        assert_eq!(vmdesc.dialect(), Some(Dialect::V7_2));
    }

    #[test]
    fn a_length_that_is_not_that_of_the_text_is_none() {
        for by in [-1_i32, 1] {
            let mut bytes = described(JSON);
            bytes[5] = (i32::from(bytes[5]) + by) as u8;
            assert_eq!(ends(&bytes), [0; 0]);
        }
    }

    #[test]
    fn a_description_inside_the_state_of_a_device_is_an_end_that_more_bytes_undo() {
        let bytes = [described(JSON), vec![1, 2, 3], described(JSON)].concat();
        assert_eq!(ends(&bytes), [37, bytes.len()]);
        let mut vmdesc = Vmdesc::new();
        assert_eq!(vmdesc.scan(&bytes), 37);
        assert!(vmdesc.is_whole());
        vmdesc.scan(&bytes[37..38]);
        assert!(!vmdesc.is_whole());
    }

    #[test]
    fn a_description_that_another_ones_length_hides_in_is_found() {
        // 00 06 00 06 00 00 '{': an open text of 393216 bytes, whose length holds the beginning of another.
        let mut bytes = vec![0, 6, 0, 6, 0, 0];
        let json = format!("{}{JSON}", "{");
        bytes.extend(json.as_bytes());
        assert_eq!(ends(&bytes), [0; 0], "the braces do not match");
        bytes.extend(described(JSON));
        assert_eq!(ends(&bytes), [bytes.len()]);
    }
}
