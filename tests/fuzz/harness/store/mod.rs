//! The manifest of a store: any text; or a sound one, with a few bytes changed.
//!
//! The store is the program's and no part of the library: the two files of it that need no other are compiled here.

#[path = "../../../../src/bin/pageferry/store/manifest.rs"]
mod manifest;
#[path = "../../../../src/bin/pageferry/store/names.rs"]
mod names;

use self::manifest::{BlockEntry, Counters, FORMAT, Manifest, TailEntry, VERSION};
use self::names::{block_path, stays_inside};
use super::plans;
use super::script::Script;

const MANIFEST: &str = "manifest.json";
const BLOCKS: &str = "blocks";
const PAGE_BYTES: u64 = 4096;

mod digest {
    pub const NAME: &str = "pf-page-hash-v1";
}

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    if script.flag() {
        return judged(&String::from_utf8_lossy(script.rest()));
    }
    let changes = plans::changes(&mut script);
    let manifest = sound(&mut script);
    let mut text = serde_json::to_vec(&manifest).expect("text");
    let whole = Manifest::parse(std::str::from_utf8(&text).expect("text is UTF-8"));
    assert_eq!(whole.as_ref(), Ok(&manifest), "a sound manifest survives as text");
    plans::change(&mut text, &changes);
    judged(&String::from_utf8_lossy(&text))
}

/// What is read of any text is sound, and is read again as the same.
fn judged(text: &str) -> &'static str {
    let Ok(manifest) = Manifest::parse(text) else { return "refused" };
    let files = manifest.blocks.iter().map(|block| &block.file).chain([&manifest.tail.file]);
    let mut paths: Vec<&String> = files.collect();
    assert!(paths.iter().all(|path| stays_inside(path)), "{paths:?}");
    let many = paths.len();
    paths.sort();
    paths.dedup();
    assert!(paths.len() == many && many > 1, "a file of two, or of none: {paths:?}");
    let bytes = manifest.blocks.iter().map(|block| u128::from(block.bytes)).sum::<u128>();
    assert_eq!(bytes, u128::from(manifest.ram_bytes()));
    assert!(manifest.blocks.iter().all(|block| block.bytes > 0 && block.bytes % PAGE_BYTES == 0));
    let again = serde_json::to_string(&manifest).expect("text");
    assert_eq!(Manifest::parse(&again).as_ref(), Ok(&manifest), "read again as the same");
    "accepted"
}

/// A manifest that must be read, with blocks of any names.
fn sound(script: &mut Script<'_>) -> Manifest {
    let one_of = |script: &mut Script<'_>, words: &[&str]| words[script.below(words.len())].to_owned();
    let mut blocks: Vec<BlockEntry> = Vec::new();
    for number in 0..=script.below(8) {
        let mut name: String = String::from_utf8_lossy(script.bytes()).chars().take(60).collect();
        if name.is_empty() || blocks.iter().any(|block| block.name == name) {
            name = format!("block {number}");
        }
        blocks.push(BlockEntry {
            file: block_path(number, &name),
            name,
            bytes: (1 + (script.number() >> 20)) << 12,
            digest: format!("{:016x}", script.number()),
            guest_address: script.flag().then(|| script.number() >> 20),
        });
    }
    // A name may be that which another one got for want of one.
    for number in 0..blocks.len() {
        if blocks[..number].iter().any(|block| block.name == blocks[number].name) {
            blocks[number].name = format!("other {number}");
        }
    }
    Manifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        pageferry: "0".to_owned(),
        written_unix_s: script.number(),
        machine: String::from_utf8_lossy(script.bytes()).into_owned(),
        configuration: script.bytes().to_vec(),
        dialect: one_of(script, &["10.0", "7.2"]),
        barrier: one_of(script, &["per-round", "per-section"]),
        section: script.u32(),
        channels: script.byte(),
        compression: one_of(script, &["none", "zlib", "zstd"]),
        digests: digest::NAME.to_owned(),
        blocks,
        tail: TailEntry { file: "device.state".to_owned(), bytes: script.number(), digest: "0".repeat(16) },
        counters: Counters { main_bytes: script.number(), rounds: script.number(), ..Counters::default() },
    }
}
