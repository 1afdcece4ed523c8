//! Shows text from the peer without letting it steer the terminal or the log it ends up in.

#![forbid(unsafe_code)]

use std::fmt::{self, Write};

/// Shows `text` with everything replaced that would not be seen as a character of its own: control characters (an
/// escape sequence can rewrite what the user reads), line breaks (a forged log line), and the marks that change the
/// direction of the text around them.
///
/// ```
/// use pageferry::wire::printable;
///
/// assert_eq!(printable("disk full\n\x1b[2Jall is well").to_string(), "disk full\u{FFFD}\u{FFFD}[2Jall is well");
/// ```
pub fn printable(text: &str) -> Printable<'_> {
    Printable(text)
}

/// What [`printable`] returns: text that shows itself harmlessly.
///
/// ```
/// let shown = pageferry::wire::printable("no memory");
/// assert_eq!(format!("{shown}"), "no memory");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| f.write_char(if steers(c) { char::REPLACEMENT_CHARACTER } else { c }))
    }
}

/// Whether `c` acts on the text around it instead of standing for itself.
fn steers(c: char) -> bool {
    let breaks_line = matches!(c, '\u{2028}' | '\u{2029}');
    let turns_direction =
        matches!(c, '\u{061C}' | '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
    c.is_control() || breaks_line || turns_direction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_is_shown_as_it_is() {
        let text = "channel 3: verbunden, größer, 接続, \u{1F6A2}";
        assert_eq!(printable(text).to_string(), text);
    }

    #[test]
    fn what_steers_a_terminal_is_replaced() {
        let text = "a\0b\x07c\x1bd\x7fe\u{9B}f\r\n\tg\u{2028}h\u{202E}i\u{2066}j\u{200F}k";
        let shown = printable(text).to_string();
        assert!(!shown.chars().any(steers), "{shown:?}");
        assert_eq!(shown.chars().count(), text.chars().count());
        assert_eq!(shown.replace(char::REPLACEMENT_CHARACTER, ""), "abcdefghijk");
    }
}
