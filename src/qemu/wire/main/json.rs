//! Follows JSON text byte by byte, without keeping it.

#![forbid(unsafe_code)]

/// Deepest nesting. QEMU's descriptions nest as deep as its devices' structures.
const DEPTH_MAX: u32 = 64;

/// Keys of the outermost object that are looked for, a bit each.
const KEYS: [&[u8]; 3] = [b"page_size", b"devices", b"configuration"];

/// Those that must be there.
const NEEDED: u32 = 0b011;

/// That of the configuration.
const CONFIGURATION: u32 = 0b100;

/// What may come next.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Next {
    /// A value; or, right after `[`, its end.
    Value { may_close: bool },
    /// A key; or, right after `{`, its end.
    Key { may_close: bool },
    Colon,
    /// A comma, or the end of the object or list.
    AfterValue,
    /// More of a string.
    Text { key: bool },
    /// What follows a backslash.
    Escape { key: bool },
    /// So many more hex digits.
    Hex { key: bool, left: u8 },
    /// More of a word.
    Word(&'static [u8]),
    /// More of a number, in this part of it.
    Number(Digits),
    /// Nothing: the text is whole.
    Nothing,
}

/// Parts of a number.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Digits {
    /// After the sign.
    First,
    /// After a leading zero.
    Zero,
    Integer,
    /// After the point.
    Point,
    Fraction,
    /// After the `e`.
    Exponent,
    /// After its sign.
    ExponentSign,
    Power,
}

/// What a byte made of the text.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Step {
    /// It may go on.
    Open,
    /// It is one whole object with the keys that are looked for.
    Whole,
    /// It is not JSON.
    Broken,
}

/// One object of JSON in ASCII, which is how QEMU writes it.
#[derive(Clone, Copy, Debug)]
pub struct Object {
    next: Next,
    depth: u32,
    /// A bit each level, the innermost lowest: 1 in an object, 0 in a list.
    objects: u64,
    /// How far the key at hand fits each of [`KEYS`]; `None` where it does not.
    fits: [Option<usize>; KEYS.len()],
    found: u32,
}

impl Object {
    /// After the opening brace.
    pub const fn opened() -> Object {
        let next = Next::Key { may_close: true };
        Object { next, depth: 1, objects: 1, fits: [None; KEYS.len()], found: 0 }
    }

    /// Takes the next byte.
    pub fn step(&mut self, byte: u8) -> Step {
        match self.after(byte) {
            Some(next) => self.next = next,
            None => return Step::Broken,
        }
        match self.next {
            Next::Nothing if self.found & NEEDED == NEEDED => Step::Whole,
            Next::Nothing => Step::Broken,
            _ => Step::Open,
        }
    }

    /// Whether it describes the configuration, too, as far as it has come.
    pub const fn has_configuration(&self) -> bool {
        self.found & CONFIGURATION != 0
    }

    fn after(&mut self, byte: u8) -> Option<Next> {
        let blank = matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        match self.next {
            Next::Value { .. } | Next::Key { .. } | Next::Colon | Next::AfterValue if blank => Some(self.next),
            Next::Value { may_close: true } if byte == b']' => self.close(false),
            Next::Key { may_close: true } if byte == b'}' => self.close(true),
            Next::Value { .. } => self.value(byte),
            Next::Key { .. } => {
                self.fits = [if self.depth == 1 { Some(0) } else { None }; KEYS.len()];
                (byte == b'"').then_some(Next::Text { key: true })
            }
            Next::Colon => (byte == b':').then_some(Next::Value { may_close: false }),
            Next::AfterValue => self.after_value(byte),
            Next::Text { key } => match byte {
                b'"' if key => {
                    self.key_ended();
                    Some(Next::Colon)
                }
                b'"' => Some(Next::AfterValue),
                b'\\' => {
                    self.fits = [None; KEYS.len()];
                    Some(Next::Escape { key })
                }
                b' '..=b'~' => {
                    if key {
                        self.key_byte(byte);
                    }
                    Some(self.next)
                }
                _ => None,
            },
            Next::Escape { key } => match byte {
                b'u' => Some(Next::Hex { key, left: 4 }),
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(Next::Text { key }),
                _ => None,
            },
            Next::Hex { .. } if !byte.is_ascii_hexdigit() => None,
            Next::Hex { key, left: 1 } => Some(Next::Text { key }),
            Next::Hex { key, left } => Some(Next::Hex { key, left: left.saturating_sub(1) }),
            Next::Word(rest) => match rest.split_first() {
                Some((first, [])) if *first == byte => Some(Next::AfterValue),
                Some((first, rest)) if *first == byte => Some(Next::Word(rest)),
                _ => None,
            },
            Next::Number(part) => self.number(part, byte),
            Next::Nothing => None,
        }
    }

    /// The first byte of a value.
    fn value(&mut self, byte: u8) -> Option<Next> {
        match byte {
            b'{' => self.open(true),
            b'[' => self.open(false),
            b'"' => Some(Next::Text { key: false }),
            b't' => Some(Next::Word(b"rue")),
            b'f' => Some(Next::Word(b"alse")),
            b'n' => Some(Next::Word(b"ull")),
            b'-' => Some(Next::Number(Digits::First)),
            b'0' => Some(Next::Number(Digits::Zero)),
            b'1'..=b'9' => Some(Next::Number(Digits::Integer)),
            _ => None,
        }
    }

    fn number(&mut self, part: Digits, byte: u8) -> Option<Next> {
        use Digits::*;
        let more = match (part, byte) {
            (First, b'0') => Zero,
            (First, b'1'..=b'9') | (Integer, b'0'..=b'9') => Integer,
            (Zero | Integer, b'.') => Point,
            (Point | Fraction, b'0'..=b'9') => Fraction,
            (Zero | Integer | Fraction, b'e' | b'E') => Exponent,
            (Exponent, b'+' | b'-') => ExponentSign,
            (Exponent | ExponentSign | Power, b'0'..=b'9') => Power,
            (Zero | Integer | Fraction | Power, _) => return self.after_value(byte),
            _ => return None,
        };
        Some(Next::Number(more))
    }

    fn after_value(&mut self, byte: u8) -> Option<Next> {
        let in_object = self.objects & 1 == 1;
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' => Some(Next::AfterValue),
            b',' if in_object => Some(Next::Key { may_close: false }),
            b',' => Some(Next::Value { may_close: false }),
            b'}' => self.close(true),
            b']' => self.close(false),
            _ => None,
        }
    }

    fn open(&mut self, object: bool) -> Option<Next> {
        if self.depth == DEPTH_MAX {
            return None;
        }
        self.depth += 1;
        self.objects = self.objects << 1 | u64::from(object);
        Some(if object { Next::Key { may_close: true } } else { Next::Value { may_close: true } })
    }

    fn close(&mut self, object: bool) -> Option<Next> {
        if (self.objects & 1 == 1) != object {
            return None;
        }
        self.objects >>= 1;
        self.depth = self.depth.checked_sub(1)?;
        Some(if self.depth == 0 { Next::Nothing } else { Next::AfterValue })
    }

    fn key_byte(&mut self, byte: u8) {
        for (fit, key) in self.fits.iter_mut().zip(KEYS) {
            *fit = fit.filter(|length| key.get(*length) == Some(&byte)).map(|length| length + 1);
        }
    }

    fn key_ended(&mut self) {
        for (index, (fit, key)) in self.fits.iter().zip(KEYS).enumerate() {
            self.found |= u32::from(*fit == Some(key.len())) << index;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the last byte of `text` made of it, and how many bytes that took.
    fn judge(text: &str) -> (Step, usize) {
        let mut object = Object::opened();
        assert_eq!(text.as_bytes()[0], b'{');
        for (index, byte) in text.bytes().enumerate().skip(1) {
            let step = object.step(byte);
            if step != Step::Open {
                return (step, index + 1);
            }
        }
        (Step::Open, text.len())
    }

    #[test]
    fn an_object_with_both_keys_is_whole_at_its_last_brace() {
        for text in [
            r#"{"page_size":4096,"devices":[]}"#,
            r#"{ "devices" : [ {"name": "a\"\\\u00e9}", "n": [1, -2.5e+3, 0.1E9, 0, true, false, null, {}]} ],
                "configuration": {"page_size": 1}, "page_size": "x" }"#,
        ] {
            assert_eq!(judge(text), (Step::Whole, text.len()), "{text}");
            assert_eq!(judge(&text[..text.len() - 1]).0, Step::Open);
        }
    }

    #[test]
    fn an_object_without_the_keys_is_no_description() {
        for text in [
            "{}",
            r#"{"page_size":1}"#,
            r#"{"devices":1}"#,
            r#"{"a":{"page_size":1,"devices":[]}}"#,
            r#"{"page_size":1,"device":1}"#,
            r#"{"page_size":1,"devicess":1}"#,
            r#"{"page_size":1,"\u0064evices":1}"#,
        ] {
            assert_eq!(judge(text), (Step::Broken, text.len()), "{text}");
        }
    }

    #[test]
    fn the_configuration_is_a_key_of_the_outermost_object() {
        for (text, has) in [
            (r#"{"configuration":{},"page_size":1,"devices":[]}"#, true),
            (r#"{"page_size":1,"devices":[],"configuration":{}}"#, true),
            (r#"{"page_size":1,"devices":[{"configuration":{}}]}"#, false),
            (r#"{"page_size":1,"devices":"configuration"}"#, false),
        ] {
            let mut object = Object::opened();
            for byte in text.bytes().skip(1) {
                let _ = object.step(byte);
            }
            assert_eq!(object.has_configuration(), has, "{text}");
        }
    }

    #[test]
    fn what_is_not_json_breaks_where_it_goes_wrong() {
        for (text, at) in [
            ("{,", 2),
            (r#"{"a" 1"#, 6),
            (r#"{"a":]"#, 6),
            (r#"{"a":[1,]"#, 9),
            (r#"{"a":1,}"#, 8),
            (r#"{"a":[1}"#, 8),
            (r#"{"a":01"#, 7),
            (r#"{"a":-a"#, 7),
            (r#"{"a":1.e"#, 8),
            (r#"{"a":1e,"#, 8),
            (r#"{"a":trux"#, 9),
            (r#"{"a":"\x"#, 8),
            (r#"{"a":"\u00g"#, 11),
            ("{\"a\":\"\n", 7),
            ("{\"a\0", 4),
        ] {
            assert_eq!(judge(text), (Step::Broken, at), "{text}");
        }
        let deep = format!(r#"{{"a":{}"#, "[".repeat(70));
        assert_eq!(judge(&deep), (Step::Broken, 5 + 64));
    }
}
