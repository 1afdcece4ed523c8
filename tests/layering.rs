//! Checks the shape of the source tree: who may import whom, who may be unsafe, and what nobody may write.
//!
//! These rules are what makes the tree readable file by file: a file can be understood with nothing but the layers
//! under it. Each rule has a second test, that feeds it a bad snippet and sees it complain.
#![cfg(not(loom))]
#![forbid(unsafe_code)]

#[path = "layering/lexer.rs"]
mod lexer;
#[path = "layering/rules.rs"]
mod rules;

use rules::{Finding, Source};
use std::path::{Path, PathBuf};

/// The layers, from the ground up; a layer with an order of its own has several rows. A file imports from the rows
/// above its own row, or from its own top-level folder: never from below, never sideways.
/// A name stands for `src/<name>.rs`, or for everything under `src/<name>/`. The longest name that fits counts.
const LAYERS: &[(u8, &[&str])] = &[
    (0, &["units"]),
    (0, &["error"]),
    (0, &["sync"]),
    (0, &["sys"]),
    (1, &["ring", "bell", "gate", "digest", "wire", "dirty/runs", "precopy", "progress"]),
    (1, &["barrier", "journal", "memory", "qemu/mod", "qemu/wire"]),
    (1, &["dirty/mod", "dirty/bitmap", "qemu/compress"]),
    (2, &["dirty/write_protect", "dirty/combined", "dirty/kvm", "dirty/vm_memory", "session", "poll", "framing"]),
    (3, &["qemu/framing", "qemu/seen", "qemu/source", "qemu/target"]),
    (3, &["crew", "cancel"]),
    (3, &["net", "config"]),
    (4, &["scanner", "channel"]),
    (5, &["settle", "source", "target", "qemu/relay"]),
    (6, &["guide"]),
    (6, &["lib"]),
    // The program is a crate of its own, on top of the library's public face.
    (7, &["bin"]),
];

/// The only places where `unsafe` may stand, in files that begin by saying why.
const MAY_BE_UNSAFE: &[&str] = &["ring", "memory", "sys"];

/// The only files that may know of loom.
const MAY_NAME_LOOM: &[&str] = &["src/sync.rs", "src/lib.rs"];

/// The only folder that may name rustls.
const MAY_NAME_RUSTLS: &[&str] = &["net/tls"];

/// Where pages pass: nothing here may block on a lock or a channel of std.
const PAGE_PATH: &[&str] = &["ring", "bell", "barrier", "scanner", "channel", "dirty", "memory"];

/// Longer files are two ideas.
const MAX_LINES: usize = 599;

/// Every Rust file under `folder`, with paths relative to the package. A folder that is not there has no files.
fn tree(folder: &str) -> Vec<Source> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    walk(&package.join(folder), &mut paths);
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(package).expect("a path inside the package").to_str().expect("a UTF-8 path");
        Source::new(name, &std::fs::read_to_string(path).expect("a readable source file"))
    };
    paths.iter().map(read).collect()
}

/// The library and the program.
fn product() -> Vec<Source> {
    let files = tree("src");
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "found no src/lib.rs: the walk is broken");
    files
}

/// Everything that we compile.
fn everything() -> Vec<Source> {
    ["src", "tests", "benches", "examples"].into_iter().flat_map(tree).collect()
}

/// Fails with all findings of `rule` in `files`.
fn demand(files: Vec<Source>, rule: fn(&Source) -> Vec<Finding>) {
    let findings: Vec<_> = files.iter().flat_map(rule).collect();
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

/// The findings of `rule` in a file of this path and text.
fn findings(rule: fn(&Source) -> Vec<Finding>, path: &str, text: &str) -> Vec<Finding> {
    rule(&Source::new(path, text))
}

/// `rule` complains exactly once about each of `bad`, and never about any of `good`.
fn proves_itself(rule: fn(&Source) -> Vec<Finding>, bad: &[(&str, &str)], good: &[(&str, &str)]) {
    for (path, text) in bad {
        let found = findings(rule, path, text);
        assert_eq!(found.len(), 1, "{path} with {text:?} gave {found:?}");
    }
    for (path, text) in good {
        let found = findings(rule, path, text);
        assert!(found.is_empty(), "{path} with {text:?} gave {found:?}");
    }
}

#[test]
fn every_file_has_a_layer() {
    demand(product(), rules::has_a_layer);
}

#[test]
fn a_file_without_a_layer_is_caught() {
    proves_itself(
        rules::has_a_layer,
        &[("src/novel.rs", ""), ("src/dirty/novel.rs", ""), ("src/ringlet.rs", "")],
        &[("src/ring.rs", ""), ("src/sys/novel.rs", ""), ("src/dirty/mod.rs", ""), ("src/bin/pageferry/main.rs", "")],
    );
    let found = findings(rules::has_a_layer, "src/novel.rs", "");
    assert!(found[0].contains("LAYERS in tests/layering.rs"), "the message does not say what to do: {found:?}");
}

#[test]
fn imports_go_downward_only() {
    demand(product(), rules::imports_downward);
}

#[test]
fn an_upward_or_sideways_import_is_caught() {
    proves_itself(
        rules::imports_downward,
        &[
            ("src/ring.rs", "use crate::crew::Crew;"),
            ("src/ring.rs", "use crate::bell::Bell;"),
            ("src/ring.rs", "fn f() { crate::source::go() }"),
            ("src/ring.rs", "use crate::{units::ByteLen, source::Source};"),
            ("src/ring.rs", "use crate::{\n    units::{ByteLen, PageSize},\n    scanner::Scanner,\n};"),
            ("src/ring.rs", "use super::target::Target;"),
            ("src/ring.rs", "#[cfg(test)] mod tests { use super::super::net::Net; }"),
            ("src/ring.rs", "pub use crate::Source;"),
            ("src/ring.rs", "use crate::*;"),
            ("src/units.rs", "use crate::sync::Arc;"),
            ("src/error.rs", "use crate::sys::retry;"),
            ("src/units.rs", "use crate::error::Error;"),
            ("src/memory/block.rs", "use crate::dirty::DirtySource;"),
            ("src/bell.rs", "use crate::barrier::Barrier;"),
            ("src/barrier.rs", "use crate::memory::Ram;"),
            ("src/dirty/bitmap.rs", "use crate::dirty::combined::Combined;"),
            ("src/dirty/bitmap.rs", "use super::write_protect::WriteProtect;"),
            ("src/channel/send.rs", "use super::super::source::Source;"),
            ("src/sys/socket.rs", "use crate::memory::block::RamBlock;"),
            ("src/bin/pageferry/main.rs", "#[path = \"../../ring.rs\"] mod ring;"),
        ],
        &[
            ("src/ring.rs", "// use crate::crew::Crew;"),
            ("src/ring.rs", "const TEXT: &str = \"crate::crew::Crew\";"),
            ("src/ring.rs", "use crate::sync::{Arc, acquire};\nuse crate::units::ByteLen;"),
            ("src/ring.rs", "mod tests { use super::*; mod deep { use super::super::Ring; } }"),
            ("src/error.rs", "use crate::units::ChannelId;"),
            ("src/barrier.rs", "use crate::bell::Bell;"),
            ("src/memory/block.rs", "use crate::dirty::runs::Runs;"),
            ("src/sys/socket.rs", "use crate::error::Error;\nuse super::retry;"),
            (
                "src/dirty/mod.rs",
                "pub mod combined;\npub use self::combined::Combined;\npub use crate::dirty::runs::Runs;",
            ),
            ("src/dirty/write_protect.rs", "use crate::dirty::DirtySource;\nuse crate::memory::RamBlock;"),
            ("src/channel/send.rs", "use super::packet::Packet;\nuse crate::ring::Consumer;"),
            ("src/lib.rs", "pub use crate::source::Source;\npub use target::Target;"),
            ("src/bin/pageferry/main.rs", "use crate::options::Options;\nuse pageferry::Source;"),
        ],
    );
}

#[test]
fn unsafe_stands_only_where_it_may() {
    demand(product(), rules::unsafe_by_permission);
}

#[test]
fn unsafe_out_of_place_is_caught() {
    const LEGAL: &str = "//! Doc.\n// UNSAFETY: why.\n#![expect(unsafe_code)]\nfn f() { unsafe { g() } }";
    proves_itself(
        rules::unsafe_by_permission,
        &[
            ("src/crew.rs", LEGAL),
            ("src/ring.rs", "#![expect(unsafe_code)]\nfn f() { unsafe { g() } }"),
            ("src/ring.rs", "// UNSAFETY: why.\nfn f() { unsafe { g() } }"),
            ("src/ring.rs", "// UNSAFETY:\n#![expect(unsafe_code)]\nfn f() { unsafe { g() } }"),
            ("src/sys/socket.rs", "unsafe impl Send for Socket {}"),
            ("src/crew.rs", "#![allow(unsafe_code)]\nfn f() {}"),
        ],
        &[
            ("src/ring.rs", LEGAL),
            ("src/memory/block.rs", LEGAL),
            ("src/crew.rs", "#![forbid(unsafe_code)]\n// nothing unsafe here\nfn f(s: &str) { g(\"unsafe\") }"),
        ],
    );
}

#[test]
fn only_the_facade_knows_loom() {
    demand(product(), rules::loom_behind_the_facade);
}

#[test]
fn loom_outside_the_facade_is_caught() {
    proves_itself(
        rules::loom_behind_the_facade,
        &[
            ("src/ring.rs", "#[cfg(loom)]\nmod tests {}"),
            ("src/ring.rs", "#[cfg(all(test, not(loom)))]\nmod tests {}"),
            ("src/ring.rs", "const SLOTS: usize = if cfg!(loom) { 2 } else { 64 };"),
            ("src/dirty/bitmap.rs", "use loom::sync::Arc;"),
        ],
        &[("src/sync.rs", "#[cfg(loom)]\nmod inner {}"), ("src/ring.rs", "/* loom */ fn bloom() {} // loom")],
    );
}

#[test]
fn only_the_folder_of_tls_knows_rustls() {
    demand(product(), rules::rustls_in_its_folder);
}

#[test]
fn rustls_elsewhere_is_caught() {
    proves_itself(
        rules::rustls_in_its_folder,
        &[
            ("src/net/stream.rs", "use rustls::ClientConfig;"),
            ("src/channel/send.rs", "fn f(_: rustls::Error) {}"),
            ("src/net/no_tls.rs", "use rustls as _;"),
        ],
        &[
            ("src/net/tls/session.rs", "use rustls::Error;"),
            ("src/net/stream.rs", "// rustls\nuse crate::net::tls::Session;"),
        ],
    );
}

#[test]
fn orderings_come_from_the_facade() {
    demand(product(), rules::orderings_by_name);
}

#[test]
fn a_nameless_ordering_is_caught() {
    proves_itself(
        rules::orderings_by_name,
        &[
            ("src/ring.rs", "self.tail.store(1, Ordering::Release);"),
            ("src/ring.rs", "self.tail.load(Ordering::Acquire);"),
            ("src/ring.rs", "use crate::sync::Ordering::{Relaxed, AcqRel};"),
            ("src/ring.rs", "use crate::sync::Ordering::*;"),
            ("src/ring.rs", "use std::sync::atomic::AtomicU32;"),
            ("src/ring.rs", "use std::sync::{Arc, atomic::AtomicU32};"),
            ("src/ring.rs", "use core::sync::atomic::fence;"),
            ("src/bin/pageferry/main.rs", "static QUIT: std::sync::atomic::AtomicBool = no();"),
        ],
        &[
            ("src/sync.rs", "pub use std::sync::atomic::Ordering; const A: Ordering = Ordering::Acquire;"),
            ("src/ring.rs", "self.tail.store(1, release(\"ring/tail\"));\nself.head.load(Ordering::Relaxed);"),
            ("src/ring.rs", "//! Pairs with the Ordering::Acquire in refresh.\nenum Phase { Release }"),
        ],
    );
}

#[test]
fn nothing_is_sequentially_consistent() {
    demand(everything(), rules::no_seq_cst);
}

#[test]
fn a_seq_cst_is_caught() {
    proves_itself(
        rules::no_seq_cst,
        &[("src/bell.rs", "word.swap(0, SeqCst);"), ("tests/stress.rs", "x.load(Ordering::SeqCst);")],
        &[("src/bell.rs", "// No SeqCst here.\nconst WHY: &str = r#\"SeqCst\"#;")],
    );
}

#[test]
fn the_page_path_takes_no_lock() {
    demand(product(), rules::no_lock_on_the_page_path);
}

#[test]
fn a_lock_on_the_page_path_is_caught() {
    proves_itself(
        rules::no_lock_on_the_page_path,
        &[
            ("src/ring.rs", "use std::sync::Mutex;"),
            ("src/bell.rs", "use std::sync::{Arc, Condvar};"),
            ("src/channel/send.rs", "let (a, b) = std::sync::mpsc::channel();"),
            ("src/dirty/bitmap.rs", "struct Map { words: std::sync::RwLock<u64> }"),
            ("src/memory/block.rs", "use crossbeam_utils::sync::ShardedLock;"),
        ],
        &[("src/source.rs", "use std::sync::Mutex;"), ("src/ring.rs", "/// No Mutex, no Condvar.\nfn f() {}")],
    );
}

#[test]
fn nobody_sleeps() {
    demand(everything(), rules::no_sleep);
}

#[test]
fn a_sleep_is_caught() {
    // Text for the rule to find in files that do not exist: nothing below is code of this project.
    proves_itself(
        rules::no_sleep,
        &[
            ("src/crew.rs", "std::thread::sleep(d);"),
            ("tests/stress.rs", "use std::thread::{self, sleep};"),
            ("tests/stress.rs", "thread::sleep_until(t);"),
            ("tests/stress.rs", "unsafe { libc::usleep(1) };"),
        ],
        &[("src/bell.rs", "while asleep() { self.sleeper.sleep() } // not thread::sleep")],
    );
}

#[test]
fn no_file_is_too_long() {
    demand(everything(), rules::short_enough);
}

#[test]
fn a_long_file_is_caught() {
    let (long, short) = ("// a line\n".repeat(MAX_LINES + 1), "// a line\n".repeat(MAX_LINES));
    proves_itself(rules::short_enough, &[("src/ring.rs", &long)], &[("src/ring.rs", &short)]);
}

#[test]
fn nothing_is_left_undone() {
    demand(everything(), rules::nothing_undone);
}

#[test]
fn something_undone_is_caught() {
    // Text for the rule to find in files that do not exist: nothing below is code of this project.
    proves_itself(
        rules::nothing_undone,
        &[
            ("src/ring.rs", "fn f() { todo!() }"),
            ("src/ring.rs", "fn f() { unimplemented! (\"later\") }"),
            ("tests/stress.rs", "dbg!(x);"),
            ("tests/stress.rs", "#[test]\n#[ignore = \"slow\"]\nfn f() {}"),
        ],
        &[("src/ring.rs", "// todo!()\nlet todo = \"dbg!()\"; let x = !todo;")],
    );
}

/// What the small VMM names the library in, and in what else only to make mistakes on purpose.
const LINKS: &str = "examples/minivmm/ferry.rs";
const SPOILS: &str = "examples/minivmm/with_mutants.rs";

#[test]
fn the_small_vmm_links_the_library_in_under_a_hundred_lines_which_the_readme_quotes() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(package.join(path)).expect("a readable file");
    let text = read(LINKS);
    assert!(text.lines().count() < 100, "{LINKS} has {} lines", text.lines().count());
    assert!(read("README.md").contains(&format!("```rust,ignore\n{text}```\n")), "the README quotes another {LINKS}");
    let naming = |file: &Source| file.code.contains("pageferry");
    let others: Vec<_> = tree("examples/minivmm").iter().filter(|f| naming(f)).map(|f| f.path.clone()).collect();
    assert_eq!(others, [LINKS, SPOILS]);
}
