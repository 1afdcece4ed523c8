//! Just enough of Rust's grammar to tell code from comments and strings, and to find every path in it.

/// A path as code spells it, with groups expanded: `a::{b, c::d}` is `a::b` and `a::c::d`.
#[derive(Debug)]
pub struct CodePath {
    /// The line it starts on, from 1.
    pub line: usize,
    /// How many inline modules it stands in.
    pub depth: usize,
    /// Its segments; a glob is the segment `*`.
    pub segments: Vec<String>,
}

/// `text` with every comment, string and character literal blanked out; lines stay where they are.
pub fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut code = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let in_word = i > 0 && is_word(at(i - 1));
        let end = match at(i) {
            '/' if at(i + 1) == '/' => (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len()),
            '/' if at(i + 1) == '*' => end_of_block_comment(&chars, i),
            '"' => end_of_string(&chars, i),
            'r' if !in_word || matches!(at(i - 1), 'b' | 'c') => end_of_raw_string(&chars, i),
            '\'' => end_of_char(&chars, i),
            _ => i,
        };
        if end == i {
            code.push(chars[i]);
            i += 1;
        } else {
            code.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The index after the block comment at `i`; comments nest.
fn end_of_block_comment(chars: &[char], mut i: usize) -> usize {
    let mut open = 0;
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => (open, i) = (open + 1, i + 2),
            ('*', '/') => (open, i) = (open - 1, i + 2),
            _ => i += 1,
        }
        if open == 0 {
            return i;
        }
    }
    chars.len()
}

/// The index after the string literal that opens at `i`.
fn end_of_string(chars: &[char], mut i: usize) -> usize {
    i += 1;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// The index after the raw string literal whose `r` is at `i`, or `i` if that `r` opens none.
fn end_of_raw_string(chars: &[char], i: usize) -> usize {
    let hashes = chars[i + 1..].iter().take_while(|&&c| c == '#').count();
    let open = i + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return i;
    }
    let closes = |j: usize| chars[j] == '"' && chars[j + 1..].iter().take_while(|&&c| c == '#').count() >= hashes;
    (open + 1..chars.len()).find(|&j| closes(j)).map_or(chars.len(), |j| j + 1 + hashes)
}

/// The index after the character literal that opens at `i`, or `i` if the quote begins a lifetime.
fn end_of_char(chars: &[char], i: usize) -> usize {
    if chars.get(i + 1) == Some(&'\\') {
        // The character after the backslash may be a quote itself.
        return (i + 3..chars.len()).find(|&j| chars[j] == '\'').map_or(chars.len(), |j| j + 1);
    }
    if chars.get(i + 2) == Some(&'\'') { i + 3 } else { i }
}

/// The words and the punctuation of `code`, each with its line; `::` is one token.
pub fn tokens(code: &str) -> Vec<(usize, String)> {
    let mut tokens = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let chars: Vec<char> = line.chars().collect();
        let mut i = 0;
        while i < chars.len() {
            let length = match chars[i] {
                c if is_word(c) => chars[i..].iter().take_while(|&&c| is_word(c)).count(),
                ':' if chars.get(i + 1) == Some(&':') => 2,
                _ => 1,
            };
            if !chars[i].is_whitespace() {
                tokens.push((number + 1, chars[i..i + length].iter().collect()));
            }
            i += length;
        }
    }
    tokens
}

/// Every path of two or more segments in `code`.
pub fn paths(code: &str) -> Vec<CodePath> {
    let tokens = tokens(code);
    let word = |i: usize| tokens.get(i).map_or("", |(_, word)| word.as_str());
    let mut found = Vec::new();
    // One entry per open brace: whether it opened an inline module.
    let mut braces = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        match word(i) {
            "{" => braces.push(i >= 2 && word(i - 2) == "mod"),
            "}" => drop(braces.pop()),
            _ => {}
        }
        if word(i).starts_with(is_word) && word(i + 1) == "::" {
            let depth = braces.iter().filter(|&&module| module).count();
            let mut leaves = Vec::new();
            let line = tokens[i].0;
            i = path_tree(&word, i, &[], &mut leaves);
            found.extend(leaves.into_iter().map(|segments| CodePath { line, depth, segments }));
        } else {
            i += 1;
        }
    }
    found
}

/// Reads the path or use tree at token `i`, adds its leaves, and returns the index of the token after it.
fn path_tree<'a>(
    word: &impl Fn(usize) -> &'a str,
    mut i: usize,
    prefix: &[String],
    leaves: &mut Vec<Vec<String>>,
) -> usize {
    let mut segments = prefix.to_vec();
    loop {
        if word(i) == "{" {
            i += 1;
            while !matches!(word(i), "}" | "") {
                let before = i;
                i = path_tree(word, i, &segments, leaves);
                // A comma, or a token that has no place in a use tree: in either case, get on.
                if word(i) == "," || i == before {
                    i += 1;
                }
            }
            return i + 1;
        }
        if word(i) != "*" && !word(i).starts_with(is_word) {
            break;
        }
        segments.push(word(i).to_owned());
        i += 1;
        // `Vec::<u8>` ends here: what is between the brackets is read as paths of its own.
        let goes_on = word(i + 1) == "{" || word(i + 1) == "*" || word(i + 1).starts_with(is_word);
        if word(i) != "::" || !goes_on {
            break;
        }
        i += 1;
    }
    // The new name in a use tree. After a cast there is a type, which may be a path of its own.
    if word(i) == "as" && word(i + 2) != "::" {
        i += 2;
    }
    if segments.len() > prefix.len() {
        leaves.push(segments);
    }
    i
}

#[test]
fn comments_and_literals_are_no_code() {
    let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" i r#\"j \" k\"# l 'm' '\\'' n 'o: p";
    let words: Vec<_> = code_of(text).split_whitespace().map(str::to_owned).collect();
    assert_eq!(words, ["a", "e", "i", "l", "n", "'o:", "p"]);
    assert_eq!(code_of(text).lines().count(), 2);
}

#[test]
fn use_trees_are_expanded() {
    let found = paths("use a::{b, c::{self, d as e}, f::*};\nmod m { fn g() { h::i::<j::k>(l::m as n::o) } }");
    let spelled: Vec<_> = found.iter().map(|path| (path.line, path.depth, path.segments.join("::"))).collect();
    let outside = [(1, 0, "a::b"), (1, 0, "a::c::self"), (1, 0, "a::c::d"), (1, 0, "a::f::*")];
    let inside = [(2, 1, "h::i"), (2, 1, "j::k"), (2, 1, "l::m"), (2, 1, "n::o")];
    let expected = outside.into_iter().chain(inside).map(|(line, depth, path)| (line, depth, path.to_owned()));
    assert_eq!(spelled, expected.collect::<Vec<_>>());
}
