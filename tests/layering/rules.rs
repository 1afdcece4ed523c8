//! The rules of the source tree, each a pure function from a file to its findings.

use super::lexer::{CodePath, code_of, paths, tokens};
use super::{LAYERS, MAX_LINES, MAY_BE_UNSAFE, MAY_NAME_LOOM, MAY_NAME_RUSTLS, PAGE_PATH};

/// What is wrong, and where: `path:line: what`.
pub type Finding = String;

/// One source file.
pub struct Source {
    /// Its path in the package, with `/`.
    pub path: String,
    /// Its path in `src`, without the extension; for a file elsewhere, all of its path.
    name: String,
    text: String,
    /// Its text without comments and literals.
    pub code: String,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Source {
        let name = path.strip_prefix("src/").unwrap_or(path).trim_end_matches(".rs").to_owned();
        Source { path: path.to_owned(), name, text: text.to_owned(), code: code_of(text) }
    }

    fn finding(&self, line: usize, what: &str) -> Finding {
        format!("{}:{line}: {what}", self.path)
    }

    /// A finding for each token that `bad` wants, given that token and the one after it.
    fn bad_tokens(&self, what: &str, bad: impl Fn(&str, &str) -> bool) -> Vec<Finding> {
        let tokens = tokens(&self.code);
        let after = |i: usize| tokens.get(i + 1).map_or("", |(_, word)| word.as_str());
        let found = tokens.iter().enumerate().filter(|(i, (_, word))| bad(word, after(*i)));
        found.map(|(_, (line, word))| self.finding(*line, &format!("`{word}`: {what}"))).collect()
    }

    /// A finding for each path that `bad` wants.
    fn bad_paths(&self, what: &str, bad: impl Fn(&[&str]) -> bool) -> Vec<Finding> {
        let spelled = |path: &CodePath| {
            let segments: Vec<_> = path.segments.iter().map(String::as_str).collect();
            bad(&segments).then(|| self.finding(path.line, &format!("`{}`: {what}", segments.join("::"))))
        };
        paths(&self.code).iter().filter_map(spelled).collect()
    }

    /// The line where `run`, a row of tokens, stands first.
    fn line_of(&self, run: &[&str]) -> Option<usize> {
        let tokens = tokens(&self.code);
        let found = tokens.windows(run.len()).find(|row| row.iter().map(|(_, word)| word).eq(run.iter()));
        found.map(|row| row[0].0)
    }

    /// Whether it is one of `names`, or under one of them.
    fn is_under(&self, names: &[&str]) -> bool {
        names.iter().any(|name| covers(name, &self.name))
    }
}

/// Whether the table's `entry` stands for the file or module `name`.
fn covers(entry: &str, name: &str) -> bool {
    name.strip_prefix(entry).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A place in the table.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    layer: u8,
    entry: &'static str,
}

/// The place of `name`; the longest entry counts.
fn place_of(name: &str) -> Option<Place> {
    let places = LAYERS
        .iter()
        .enumerate()
        .flat_map(|(row, (layer, entries))| entries.iter().map(move |entry| Place { row, layer: *layer, entry }));
    places.filter(|place| covers(place.entry, name)).max_by_key(|place| place.entry.len())
}

/// The place of what an import names, relative to the crate's root.
fn place_of_import(segments: &[String]) -> Place {
    let prefixes = (1..=segments.len()).rev().map(|length| segments[..length].join("/"));
    let found =
        prefixes.map(|name| place_of(&name).or_else(|| place_of(&format!("{name}/mod")))).find_map(|found| found);
    // No module of ours: then it is something that the crate's root re-exports, and the root is on top.
    found.unwrap_or_else(|| place_of("lib").expect("the table has the crate's root"))
}

/// The file is in the table of layers.
pub fn has_a_layer(file: &Source) -> Vec<Finding> {
    if place_of(&file.name).is_some() {
        return Vec::new();
    }
    let what = format!("in no layer: add \"{}\" to LAYERS in tests/layering.rs, above all that it imports", file.name);
    vec![file.finding(1, &what)]
}

/// The file imports only from the rows above its own, or from its own folder.
pub fn imports_downward(file: &Source) -> Vec<Finding> {
    let Some(place) = place_of(&file.name) else { return Vec::new() };
    let folder = file.name.split_once('/').map(|(folder, _)| folder);
    let own_module: Vec<_> = file.name.trim_end_matches("/mod").split('/').map(str::to_owned).collect();
    let mut findings = Vec::new();
    if file.is_under(&["bin"]) {
        // In the program `crate` is the program. It could only get at our files by including them.
        return file
            .bad_tokens("the program uses the library by its public name", |word, next| word == "[" && next == "path");
    }
    for path in paths(&file.code) {
        let Some(import) = from_the_root(&path, &own_module) else { continue };
        let target = place_of_import(&import);
        let own_folder = folder.is_some_and(|folder| import.first().is_some_and(|first| first == folder));
        let allowed = if own_folder {
            // A `mod.rs` gathers its folder; the other files of a folder do not look up.
            target.row <= place.row || file.name.ends_with("/mod")
        } else {
            target.row < place.row || target.entry == file.name
        };
        if !allowed {
            let (spelled, Place { layer, entry, .. }) = (path.segments.join("::"), target);
            let what =
                format!("`{spelled}` is {entry}, layer {layer}: not above this file (layer {}) in LAYERS", place.layer);
            findings.push(file.finding(path.line, &what));
        }
    }
    findings
}

/// What `path` names, relative to the crate's root; nothing if it does not leave the file, or the crate is another.
fn from_the_root(path: &CodePath, own_module: &[String]) -> Option<Vec<String>> {
    let segments = &path.segments;
    if segments[0] == "crate" {
        return Some(segments[1..].to_vec());
    }
    let ups = segments.iter().take_while(|segment| *segment == "super").count();
    let out = ups.checked_sub(path.depth).filter(|out| *out > 0)?;
    let base = &own_module[..own_module.len().saturating_sub(out)];
    Some(base.iter().chain(&segments[ups..]).cloned().collect())
}

/// `unsafe` stands only in the files that may have it, and these say why.
pub fn unsafe_by_permission(file: &Source) -> Vec<Finding> {
    let allowed = file.line_of(&["#", "!", "[", "expect", "(", "unsafe_code", ")", "]"]);
    let explained =
        file.text.lines().any(|line| line.strip_prefix("// UNSAFETY:").is_some_and(|why| !why.trim().is_empty()));
    let Some(line) = file.line_of(&["unsafe"]).or(file.line_of(&["allow", "(", "unsafe_code"])).or(allowed) else {
        return Vec::new();
    };
    if !file.is_under(MAY_BE_UNSAFE) {
        return vec![file.finding(line, "no place for `unsafe`: see MAY_BE_UNSAFE in tests/layering.rs")];
    }
    if !explained || allowed.is_none() {
        return vec![file.finding(line, "`unsafe` needs `// UNSAFETY: <why at all>` and `#![expect(unsafe_code)]`")];
    }
    Vec::new()
}

/// Only the facade, and the lists of modules, know loom.
pub fn loom_behind_the_facade(file: &Source) -> Vec<Finding> {
    if MAY_NAME_LOOM.contains(&file.path.as_str()) {
        return Vec::new();
    }
    file.bad_tokens("only src/sync.rs and the module lists know it", |word, _| word == "loom")
}

/// Only the folder that is left out without its feature knows rustls.
pub fn rustls_in_its_folder(file: &Source) -> Vec<Finding> {
    if file.is_under(MAY_NAME_RUSTLS) {
        return Vec::new();
    }
    file.bad_tokens("only src/net/tls knows it: without its feature it is not there", |word, _| word == "rustls")
}

/// Atomics come from the facade, and so does every ordering that is stronger than Relaxed.
pub fn orderings_by_name(file: &Source) -> Vec<Finding> {
    if file.path == "src/sync.rs" {
        return Vec::new();
    }
    file.bad_paths("take it from crate::sync: atomics, acquire(\"site\"), release(\"site\")", |segments| {
        let pair = |a: &str, b: &[&str]| segments.windows(2).any(|two| two[0] == a && b.contains(&two[1]));
        pair("Ordering", &["Acquire", "Release", "AcqRel", "*"]) || pair("sync", &["atomic"])
    })
}

/// Nothing is SeqCst.
pub fn no_seq_cst(file: &Source) -> Vec<Finding> {
    file.bad_tokens("a design that needs it has two words where it wants one", |word, _| word == "SeqCst")
}

/// No lock and no channel where pages pass.
pub fn no_lock_on_the_page_path(file: &Source) -> Vec<Finding> {
    if !file.is_under(PAGE_PATH) {
        return Vec::new();
    }
    let blocking = ["Mutex", "RwLock", "Condvar", "mpsc", "mpmc", "ShardedLock"];
    file.bad_tokens("nothing on the page path blocks on a lock or a channel", |word, _| blocking.contains(&word))
}

/// Nobody waits for time to pass.
pub fn no_sleep(file: &Source) -> Vec<Finding> {
    let sleeps = ["sleep", "sleep_ms", "sleep_until", "usleep", "nanosleep", "clock_nanosleep"];
    file.bad_paths("wait for the thing, not for the time", |segments| {
        segments.windows(2).any(|two| ["thread", "libc"].contains(&two[0]) && sleeps.contains(&two[1]))
    })
}

/// A file that is longer than a reader's patience is two files.
pub fn short_enough(file: &Source) -> Vec<Finding> {
    let lines = file.text.lines().count();
    if lines <= MAX_LINES {
        return Vec::new();
    }
    vec![file.finding(lines, &format!("{lines} lines: split it by idea, not by size"))]
}

/// No stub, no leftover of debugging, no test that is not run.
pub fn nothing_undone(file: &Source) -> Vec<Finding> {
    let unfinished = ["todo", "unimplemented", "dbg"];
    let mut findings = file.bad_tokens("finish it", |word, next| unfinished.contains(&word) && next == "!");
    let ignored = file.line_of(&["#", "[", "ignore"]);
    findings.extend(ignored.map(|line| file.finding(line, "a test runs, or says why it cannot")));
    findings
}
