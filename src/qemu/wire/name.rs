//! Names of RAM blocks, sections, capabilities and devices.

#![forbid(unsafe_code)]

use std::fmt;

use super::error::Fault;
use crate::wire::printable;

/// Most bytes of a name: its length is one byte.
pub const NAME_BYTES_MAX: usize = 255;

/// A name: 1 to 255 bytes of UTF-8 without control characters. So it can stand before a zero byte, in a log, and beside
/// other names in a list.
///
/// ```
/// use pageferry::qemu::wire::Name;
///
/// let name = Name::new("/rom@etc/acpi/tables").unwrap();
/// assert_eq!(name.as_str(), "/rom@etc/acpi/tables");
/// assert!(Name::new("").is_none() && Name::new("a\0b").is_none());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Name(String);

/// What a name must be, in errors.
const EXPECTED: &str = "1 to 255 bytes of UTF-8 without control characters";

impl Name {
    /// A name of this text, if it can be one.
    pub fn new(text: &str) -> Option<Name> {
        Name::read("name", text.as_bytes()).ok()
    }

    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its length, which is never 0.
    pub(super) fn length(&self) -> u8 {
        self.0.len() as u8 // At most 255, which `check` has seen to.
    }

    /// A name of these bytes.
    pub(super) fn read(field: &'static str, bytes: &[u8]) -> Result<Name, Fault> {
        Name::check(field, bytes).map(|text| Name(text.to_owned()))
    }

    /// `bytes` as the text of a name.
    pub(super) fn check<'a>(field: &'static str, bytes: &'a [u8]) -> Result<&'a str, Fault> {
        let text = std::str::from_utf8(bytes).ok();
        let sound = |text: &&str| (1..=NAME_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
        text.filter(sound).ok_or(Fault::Text { field, expected: EXPECTED })
    }

    /// The text before the first zero byte of a field that is filled up with them.
    pub(super) fn check_padded<'a>(field: &'static str, bytes: &'a [u8], stale: bool) -> Result<&'a str, Fault> {
        let end = bytes.iter().position(|byte| *byte == 0);
        let padding = end.filter(|end| stale || bytes[*end..].iter().fold(0, |any, byte| any | byte) == 0);
        let end = padding.ok_or(Fault::Text { field, expected: "a name and zero bytes to the end of the field" })?;
        Name::check(field, &bytes[..end])
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        printable(&self.0).fmt(f)
    }
}
