//! What a store promises: it is whole or not there, and no lie in it is believed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use pageferry::digest::Contents;
use pageferry::memory::Backing;
use pageferry::memory::hash::PageHash;
use pageferry::sys::random::random_16;
use pageferry::units::{BlockId, PageSize, Round};
use pageferry::{Ram, RamBlock};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::leftovers::leftovers;
use super::manifest::{BlockEntry, TailEntry};
use super::names::{block_path, stays_inside};
use super::{Counters, Facts, Manifest, Reader, Stored, Writer, contents, digest};

/// A folder of the test's own, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let name = format!("pageferry-store-{:032x}", u128::from_le_bytes(random_16().unwrap()));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const RAM_BYTES: u64 = 40 << 20;
const TAIL_BYTES: &[u8] = b"\x04state of devices\0\x06{}";

fn facts() -> Facts {
    Facts {
        machine: "pc-q35-10.0".to_owned(),
        configuration: b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec(),
        dialect: "10.0",
        barrier: "per-round",
        section: 1,
        channels: 3,
        compression: "zstd",
        counters: Counters {
            main_bytes: 1,
            channel_bytes: 2,
            normal_pages: 3,
            zero_pages: 4,
            sync_packets: 5,
            rounds: 6,
        },
    }
}

/// What `write` puts into the RAM: page 3, a page in the middle, and the last one.
const PAGES: [(u64, u8); 3] = [(3, 7), (5000, 8), ((RAM_BYTES >> 12) - 1, 9)];

fn fill(writer: &mut Writer) -> Ram {
    let ram = writer.add_block("pc.ram", None, RAM_BYTES).unwrap();
    let rom = writer.add_block("/rom@etc/acpi/tables", Some(0xfffc_0000), 0x20000).unwrap();
    assert_eq!((ram.name(), rom.name(), rom.guest_address()), ("pc.ram", "/rom@etc/acpi/tables", 0xfffc_0000));
    assert!(ram.is_writable() && ram.bytes() == RAM_BYTES);
    // As who maps the block does, only without the map.
    let file = fs::File::from(ram.fd().unwrap().try_clone_to_owned().unwrap());
    for (page, value) in PAGES {
        file.write_all_at(&[value; 4096], page << 12).unwrap();
    }
    Ram::new([ram, rom]).unwrap()
}

/// What is noted by who has written what these blocks hold: every page that is not zeros.
fn noted(ram: &Ram) -> Contents {
    let contents = contents(ram).unwrap();
    for (id, block) in ram.iter() {
        let file = fs::File::from(block.fd().unwrap().try_clone_to_owned().unwrap());
        let (mut notes, mut bytes) = (contents.notes(id, Round(0)), [0; 4096]);
        for page in 0..block.pages() {
            file.read_exact_at(&mut bytes, page << 12).unwrap();
            if bytes != [0; 4096] {
                notes.data(page, PageHash::detect().hash_bytes(&bytes));
            }
        }
    }
    contents
}

fn finish(writer: Writer, ram: &Ram, facts: &Facts) -> Result<Stored, String> {
    writer.finish(ram, &noted(ram), TAIL_BYTES, facts)
}

fn write(dir: &Path, force: bool) -> Result<Stored, String> {
    let mut writer = Writer::create(dir, force)?;
    let ram = fill(&mut writer);
    finish(writer, &ram, &facts())
}

/// A store in a folder of its own.
fn store() -> (Folder, PathBuf) {
    let folder = Folder::new();
    let dir = folder.0.join("vm");
    write(&dir, false).unwrap();
    (folder, dir)
}

/// Reads all of its RAM.
fn verify(reader: &Reader) -> Result<(), String> {
    let ram = reader.ram()?;
    reader.check(&ram, &noted(&ram))
}

/// The error of what has to fail, which must speak of `word`.
fn refused<T>(result: Result<T, String>, word: &str) {
    match result {
        Ok(_) => panic!("it was taken, expected an error with {word:?}"),
        Err(error) => assert!(error.contains(word), "{error:?} does not speak of {word:?}"),
    }
}

#[test]
fn what_is_written_is_read_again() {
    let (folder, dir) = store();
    assert_eq!(folder.names(), ["vm"]);
    let reader = Reader::open(&dir).unwrap();
    verify(&reader).unwrap();
    assert_eq!(reader.tail().unwrap(), TAIL_BYTES);
    let manifest = reader.manifest();
    let facts = facts();
    assert_eq!((&manifest.machine, &manifest.configuration), (&facts.machine, &facts.configuration));
    assert_eq!((manifest.dialect.as_str(), manifest.barrier.as_str()), (facts.dialect, facts.barrier));
    assert_eq!((manifest.section, manifest.channels, manifest.counters), (1, 3, facts.counters));
    assert_eq!((manifest.compression.as_str(), manifest.ram_bytes()), ("zstd", RAM_BYTES + 0x20000));

    let ram = reader.ram().unwrap();
    let names: Vec<_> = ram.blocks().iter().map(|block| (block.name(), block.guest_address(), block.bytes())).collect();
    assert_eq!(names, [("pc.ram", 0, RAM_BYTES), ("/rom@etc/acpi/tables", 0xfffc_0000, 0x20000)]);
    assert!(ram.blocks().iter().all(|block| !block.is_writable()));
    let bytes = fs::read(dir.join("blocks/00-pc.ram.ram")).unwrap();
    for (page, bytes) in bytes.chunks(4096).enumerate() {
        let expected = PAGES.iter().find(|(at, _)| *at == page as u64).map_or(0, |(_, value)| *value);
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}");
    }
}

#[test]
fn holes_stay_holes_and_nobody_else_may_read() {
    let (_folder, dir) = store();
    for (path, mode) in [("", 0o700), ("blocks", 0o700), ("blocks/00-pc.ram.ram", 0o600), ("device.state", 0o600)] {
        let metadata = fs::metadata(dir.join(path)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{path}");
    }
    let spent = fs::metadata(dir.join("blocks/00-pc.ram.ram")).unwrap().blocks() * 512;
    assert!(spent <= 1 << 20, "{spent} bytes on the disk for three pages");
}

#[test]
fn a_store_that_is_not_finished_leaves_nothing_behind() {
    let folder = Folder::new();
    let mut writer = Writer::create(&folder.0.join("vm"), false).unwrap();
    fill(&mut writer);
    assert_eq!(folder.names().len(), 1);
    assert!(folder.names()[0].starts_with("vm.partial-"), "{:?}", folder.names());
    drop(writer);
    assert_eq!(folder.names(), [""; 0]);

    let mut writer = Writer::create(&folder.0.join("vm"), false).unwrap();
    let ram = fill(&mut writer);
    let facts = Facts { dialect: "11.0", ..facts() };
    refused(finish(writer, &ram, &facts), "its dialect is \"11.0\"");
    let writer = Writer::create(&folder.0.join("vm"), false).unwrap();
    refused(finish(writer, &ram, &self::facts()), "0 RAM blocks");
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn blocks_that_cannot_be_are_refused() {
    let folder = Folder::new();
    let mut writer = Writer::create(&folder.0.join("vm"), false).unwrap();
    refused(writer.add_block("", None, 4096), "name");
    refused(writer.add_block("odd", None, 4097), "4097 bytes");
    refused(writer.add_block("none", None, 0), "0 bytes");
    refused(writer.add_block(&"x".repeat(256), None, 4096), "name");
    refused(writer.add_block("high", Some(u64::MAX - 4095), 8192), "fit");
    refused(writer.add_block("huge", None, 1 << 63), "bytes");
    let ram = writer.add_block("ram", None, 4096).unwrap();
    refused(writer.add_block("ram", None, 4096), "twice");
    // One name of a file for both, but for the number.
    let slash = writer.add_block("a/b", None, 4096).unwrap();
    let line = writer.add_block("a_b", None, 4096).unwrap();
    finish(writer, &Ram::new([ram, slash, line]).unwrap(), &facts()).unwrap();
    let reader = Reader::open(&folder.0.join("vm")).unwrap();
    assert_eq!(reader.manifest().blocks[1].name, "a/b");
    assert_ne!(reader.manifest().blocks[1].file, reader.manifest().blocks[2].file);
}

#[test]
fn only_a_store_is_replaced_and_only_by_force() {
    let (folder, dir) = store();
    refused(Writer::create(&dir, false), "--force");
    let before = fs::metadata(dir.join("manifest.json")).unwrap().ino();
    // As long as the new one is not whole, the old one stands.
    let mut writer = Writer::create(&dir, true).unwrap();
    let ram = fill(&mut writer);
    verify(&Reader::open(&dir).unwrap()).unwrap();
    finish(writer, &ram, &facts()).unwrap();
    assert_ne!(fs::metadata(dir.join("manifest.json")).unwrap().ino(), before);
    assert_eq!(folder.names(), ["vm"]);

    // Something of somebody else's in it: it is not ours to remove.
    fs::write(dir.join("notes"), "mine").unwrap();
    refused(Writer::create(&dir, true), "no store");
    let other = folder.0.join("other");
    fs::create_dir(&other).unwrap();
    write(&other, false).unwrap();
    fs::write(other.join("blocks/notes"), "mine").unwrap();
    refused(Writer::create(&other, true), "no store");
    fs::remove_file(other.join("blocks/notes")).unwrap();
    fs::write(other.join("manifest.json"), "{}").unwrap();
    refused(Writer::create(&other, true), "no store");
    let file = folder.0.join("file");
    fs::write(&file, "").unwrap();
    refused(Writer::create(&file, true), "no folder");
    refused(Writer::create(&folder.0.join("not/there"), true), "check the path");
    refused(Writer::create(&folder.0.join("x".repeat(250)), true), "name too long");
    assert_eq!(folder.names(), ["file", "other", "vm"]);
}

#[test]
fn what_comes_to_stand_there_meanwhile_is_not_replaced() {
    let folder = Folder::new();
    let dir = folder.0.join("vm");
    for force in [false, true] {
        let mut writer = Writer::create(&dir, force).unwrap();
        let ram = fill(&mut writer);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("notes"), "mine").unwrap();
        refused(finish(writer, &ram, &facts()), "not empty");
        assert_eq!(folder.names(), ["vm"]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_file(dir.join("notes")).unwrap();
    }
}

#[test]
fn a_link_to_a_folder_stays_one() {
    let folder = Folder::new();
    let (real, link) = (folder.0.join("real"), folder.0.join("link"));
    fs::create_dir(&real).unwrap();
    symlink("real", &link).unwrap();
    write(&link, false).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    Reader::open(&real).unwrap();
    symlink("nowhere", folder.0.join("dangling")).unwrap();
    refused(Writer::create(&folder.0.join("dangling"), false), "check the path");
    assert_eq!(folder.names(), ["dangling", "link", "real"]);
}

/// Changes the manifest as text; the store is read with that.
fn with_text(dir: &Path, change: impl FnOnce(String) -> String) -> Result<Reader, String> {
    let path = dir.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, change(text.clone())).unwrap();
    let result = Reader::open(dir);
    fs::write(&path, text).unwrap();
    result
}

fn with(dir: &Path, change: impl FnOnce(&mut Value)) -> Result<Reader, String> {
    with_text(dir, |text| {
        let mut value: Value = serde_json::from_str(&text).unwrap();
        change(&mut value);
        value.to_string()
    })
}

#[test]
fn no_lie_of_a_manifest_is_believed() {
    let (_folder, dir) = store();
    let set = |field: &str, to: Value| with(&dir, |value| *value.pointer_mut(field).unwrap() = to);
    refused(set("/format", json!("tar")), "no store");
    refused(set("/version", json!(2)), "version 2");
    refused(set("/version", json!("1")), "version");
    refused(set("/dialect", json!("9.0")), "dialect");
    refused(set("/barrier", json!("never")), "barrier");
    refused(set("/compression", json!("lzo")), "compression");
    refused(set("/digests", json!("sha256")), "digests");
    refused(set("/channels", json!(256)), "256");
    refused(set("/configuration", json!("514")), "hexadecimal");
    refused(set("/configuration", json!("5x")), "hexadecimal");
    refused(set("/blocks", json!([])), "0 RAM blocks");
    refused(set("/blocks/0/name", json!("")), "name");
    refused(set("/blocks/0/name", json!("x".repeat(256))), "256 bytes");
    refused(set("/blocks/0/name", json!("/rom@etc/acpi/tables")), "twice");
    for path in
        ["/etc/passwd", "../vm/device.state", "blocks/../../x", "", "blocks//x", "./device.state", "a\0b", "blocks/"]
    {
        refused(set("/blocks/0/file", json!(path)), "would not be in the store");
        refused(set("/tail/file", json!(path)), "would not be in the store");
    }
    refused(set("/blocks/0/file", json!("blocks/07-pc.ram.ram")), "check the path");
    refused(set("/blocks/0/file", json!("blocks/01-_rom@etc_acpi_tables.ram")), "something else");
    refused(set("/blocks/0/file", json!("device.state")), "something else");
    refused(set("/blocks/0/file", json!("manifest.json")), "something else");
    refused(set("/tail/file", json!("manifest.json")), "in the manifest");
    refused(set("/blocks/0/file", json!("blocks")), "regular file");
    refused(set("/blocks/0/file", json!("device.state/x")), "no folder");
    refused(set("/blocks/0/bytes", json!(RAM_BYTES + 4096)), "damaged");
    refused(set("/blocks/0/bytes", json!(RAM_BYTES - 4096)), "damaged");
    refused(set("/blocks/0/bytes", json!(0)), "0 bytes");
    refused(set("/blocks/0/bytes", json!(4097)), "4097 bytes");
    refused(set("/blocks/0/bytes", json!(1_u64 << 63)), "address space");
    refused(set("/blocks/0/bytes", json!(-4096)), "invalid value");
    refused(set("/blocks/1/guest_address", json!(u64::MAX)), "guest's addresses");
    refused(set("/blocks/0/digest", json!("0123")), "16 hexadecimal digits");
    refused(set("/tail/digest", json!("0123456789ABCDEF")), "16 hexadecimal digits");
    refused(set("/tail/digest", json!("0123456789abcdef")), "damaged");
    refused(set("/tail/bytes", json!(TAIL_BYTES.len() - 1)), "damaged");
    let many = |value: &mut Value| value["blocks"] = json!(vec![value["blocks"][0].clone(); 1025]);
    refused(with(&dir, many), "1025 RAM blocks");
    for field in ["machine", "blocks", "tail", "counters", "section", "configuration", "digests"] {
        let remove = |value: &mut Value| drop(value.as_object_mut().unwrap().remove(field));
        refused(with(&dir, remove), field);
    }
    refused(with_text(&dir, |text| text[..text.len() / 2].to_owned()), "cannot be read");
    refused(with_text(&dir, |_| "[]".to_owned()), "no store");
    refused(with_text(&dir, |_| String::new()), "cannot be read");
    // What a later version may add.
    with(&dir, |value| value["blocks"][0]["colour"] = json!("red")).unwrap();
    with(&dir, |value| value["more"] = json!({"a": [1]})).unwrap();
}

#[test]
fn what_is_not_in_the_store_or_damaged_is_found() {
    let (folder, dir) = store();
    let block = dir.join("blocks/00-pc.ram.ram");
    let file = fs::OpenOptions::new().write(true).open(&block).unwrap();
    // A bit of a page, a page in a hole, and two pages that change places.
    for (at, bytes, undo) in [(3 << 12, vec![6], vec![7]), (1 << 20, vec![1], vec![0])] {
        file.write_all_at(&bytes, at).unwrap();
        refused(verify(&Reader::open(&dir).unwrap()), "damaged");
        file.write_all_at(&undo, at).unwrap();
        verify(&Reader::open(&dir).unwrap()).unwrap();
    }
    for (page, value) in [(3, 8), (5000, 7)] {
        file.write_all_at(&[value; 4096], page << 12).unwrap();
    }
    refused(verify(&Reader::open(&dir).unwrap()), "damaged");
    for (page, value) in PAGES {
        file.write_all_at(&[value; 4096], page << 12).unwrap();
    }
    file.set_len(RAM_BYTES - 4096).unwrap();
    refused(Reader::open(&dir), "damaged");
    file.set_len(RAM_BYTES + 1).unwrap();
    refused(Reader::open(&dir), "damaged");

    let elsewhere = folder.0.join("elsewhere");
    fs::rename(&block, &elsewhere).unwrap();
    refused(Reader::open(&dir), "check the path");
    symlink(&elsewhere, &block).unwrap();
    refused(Reader::open(&dir), "regular file");
    fs::remove_file(&block).unwrap();
    fs::rename(&elsewhere, &block).unwrap();
    file.set_len(RAM_BYTES).unwrap();
    fs::rename(dir.join("blocks"), &elsewhere).unwrap();
    symlink(&elsewhere, dir.join("blocks")).unwrap();
    refused(Reader::open(&dir), "no folder");
    fs::remove_file(dir.join("blocks")).unwrap();
    fs::rename(&elsewhere, dir.join("blocks")).unwrap();
    fs::write(dir.join("device.state"), [TAIL_BYTES, b"x"].concat()).unwrap();
    refused(Reader::open(&dir), "damaged");
    fs::remove_file(dir.join("device.state")).unwrap();
    refused(Reader::open(&dir), "check the path");
    refused(Reader::open(&folder.0.join("nowhere")), "check the path");
}

#[test]
fn a_block_that_is_written_after_it_was_opened_is_noticed() {
    let (_folder, dir) = store();
    let reader = Reader::open(&dir).unwrap();
    reader.check_still().unwrap();
    let rom = dir.join("blocks/01-_rom@etc_acpi_tables.ram");
    // As a write does, a second from now.
    let later = SystemTime::now() + Duration::from_secs(1);
    fs::OpenOptions::new().write(true).open(rom).unwrap().set_modified(later).unwrap();
    refused(reader.check_still(), "let it lie still");
}

#[test]
fn only_what_nobody_builds_any_more_is_left_over() {
    let folder = Folder::new();
    let dir = folder.0.join("vm");
    let left = || leftovers(&folder.0, OsStr::new("vm"));
    let mut writer = Writer::create(&dir, false).unwrap();
    let ram = fill(&mut writer);
    assert_eq!(left(), [""; 0], "one that is being built");
    finish(writer, &ram, &facts()).unwrap();
    // As a power cut would leave them: without a store, with one, and one that stepped aside.
    let partial = |name: &str| folder.0.join(format!("vm.partial-{name}"));
    fs::create_dir_all(partial("0123456789abcdef/blocks")).unwrap();
    fs::rename(&dir, partial("00000000000000aa-replaced")).unwrap();
    // Nothing of ours: another store's, a file, one that was made a moment ago, and names that are alike.
    fs::create_dir_all(folder.0.join("vm2.partial-0123456789abcdef/blocks")).unwrap();
    fs::write(partial("0123456789abcdee"), "").unwrap();
    fs::create_dir(partial("0123456789abcded")).unwrap();
    fs::create_dir_all(partial("notes/blocks")).unwrap();
    let mut said = left();
    said.sort();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("00000000000000aa-replaced") && said[0].contains("holds a store"), "{said:?}");
    assert!(said[1].contains("0123456789abcdef") && said[1].contains("remove it"), "{said:?}");
}

/// The digest of a block of this many bytes, of which these pages were noted.
fn digest_of(bytes: u64, pages: &[(u64, u8)]) -> String {
    let block = RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap();
    let ram = Ram::new([block]).unwrap();
    let contents = contents(&ram).unwrap();
    let mut notes = contents.notes(BlockId(0), Round(0));
    for (page, value) in pages {
        notes.data(*page, PageHash::detect().hash_bytes(&[*value; 4096]));
    }
    digest::of_noted(&contents, BlockId(0), &ram.blocks()[0]).unwrap()
}

#[test]
fn a_digest_is_the_same_for_ever() {
    // Whoever has to change a value here has made all stores unreadable: that is `pf-page-hash-v2`.
    let digests = [
        digest::of_bytes(b""),
        digest::of_bytes(&[0; 4096]),
        digest::of_bytes(b"pageferry"),
        digest_of(RAM_BYTES, &PAGES),
    ];
    assert_eq!(digests, ["0000000000000000", "832934ce4ad06baf", "8ac5f40b563129b5", "c8d3ae7219d4b9eb"]);
}

#[test]
fn holes_and_written_zeros_have_one_digest_and_places_count() {
    let bytes = 33 << 20;
    let hole = digest_of(bytes, &[]);
    assert_eq!(hole, digest_of(bytes, &[(0, 0), (100, 0), (8000, 0)]));
    assert_eq!(hole, digest::of_bytes(&vec![0; bytes as usize]));
    let one = digest_of(bytes, &[(4095, 1), (4096, 2)]);
    assert_eq!(one, digest_of(bytes, &[(0, 0), (4095, 1), (4096, 2)]));
    assert_ne!(one, digest_of(bytes, &[(4095, 2), (4096, 1)]));
    assert_ne!(one, digest_of(bytes + 4096, &[(4095, 1), (4096, 2)]));
}

#[test]
fn pages_of_zeros_that_came_as_data_become_holes_and_nothing_else_does() {
    let folder = Folder::new();
    let mut writer = Writer::create(&folder.0.join("vm"), false).unwrap();
    let ram = writer.add_block("ram", None, 1 << 20).unwrap();
    let file = fs::File::from(ram.fd().unwrap().try_clone_to_owned().unwrap());
    let ram = Ram::new([ram]).unwrap();
    file.write_all_at(&[0; 256 << 12], 0).unwrap();
    file.write_all_at(&[7; 4096], 10 << 12).unwrap();
    file.write_all_at(&[8; 4096], 20 << 12).unwrap();
    let contents = contents(&ram).unwrap();
    let mut notes = contents.notes(BlockId(0), Round(0));
    // Page 20 has the hash of zeros, and is none.
    (0..256).for_each(|page| notes.data(page, if page == 10 { PageHash::detect().hash_bytes(&[7; 4096]) } else { 0 }));
    writer.finish(&ram, &contents, TAIL_BYTES, &facts()).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 << 12);
    let bytes = fs::read(folder.0.join("vm/blocks/00-ram.ram")).unwrap();
    let expected = |page| [(10, 7), (20, 8)].into_iter().find(|(at, _)| *at == page).map_or(0, |(_, value)| value);
    assert!(bytes.chunks(4096).enumerate().all(|(page, bytes)| bytes.iter().all(|byte| *byte == expected(page))));
}

/// A manifest without a store.
fn sample() -> Manifest {
    let block = |(number, name): (usize, &str)| BlockEntry {
        name: name.to_owned(),
        bytes: 4096 << number,
        file: block_path(number, name),
        digest: "0123456789abcdef".to_owned(),
        guest_address: (number == 1).then_some(1 << 32),
    };
    let facts = facts();
    Manifest {
        format: "pageferry-qemu-store".to_owned(),
        version: 1,
        pageferry: "0.1.0".to_owned(),
        written_unix_s: 1_700_000_000,
        machine: facts.machine,
        configuration: facts.configuration,
        dialect: facts.dialect.to_owned(),
        barrier: facts.barrier.to_owned(),
        section: facts.section,
        channels: facts.channels,
        compression: facts.compression.to_owned(),
        digests: digest::NAME.to_owned(),
        blocks: ["pc.ram", "pc.bios"].into_iter().enumerate().map(block).collect(),
        tail: TailEntry { file: "device.state".to_owned(), bytes: 3, digest: digest::of_bytes(b"abc") },
        counters: facts.counters,
    }
}

proptest! {
    #[test]
    fn every_name_becomes_a_file_of_its_own_in_the_store(
        names in prop::collection::vec("(\\PC|[./\u{0}-\u{1f}]){0,255}", 1..20)
    ) {
        let paths: Vec<_> = names.iter().enumerate().map(|(number, name)| block_path(number, name)).collect();
        for (at, path) in paths.iter().enumerate() {
            prop_assert!(stays_inside(path) && path.starts_with("blocks/"), "{path:?}");
            let file = path.strip_prefix("blocks/").unwrap();
            prop_assert!(!file.contains('/') && !file.starts_with('.') && file.len() <= 255, "{file:?}");
            prop_assert!(file.bytes().all(|b| b.is_ascii_graphic()), "{file:?}");
            prop_assert!(!paths[..at].contains(path), "{path:?} twice");
        }
    }

    #[test]
    fn a_manifest_survives_as_text(
        machine in "\\PC{0,40}",
        configuration in prop::collection::vec(any::<u8>(), 0..300),
        names in prop::collection::hash_set("(\\PC|[\\\\\"\u{0}-\u{1f}]){1,60}", 1..10),
        pages in 1..1_u64 << 30,
        address in prop::option::of(0..1_u64 << 40),
        counted in any::<[u64; 6]>(),
    ) {
        let [main_bytes, channel_bytes, normal_pages, zero_pages, sync_packets, rounds] = counted;
        let names: Vec<String> = names.into_iter().collect();
        let block = |(number, name): (usize, &String)| BlockEntry {
            name: name.clone(),
            bytes: pages << 12,
            file: block_path(number, name),
            digest: format!("{main_bytes:016x}"),
            guest_address: address,
        };
        let manifest = Manifest {
            machine,
            configuration,
            blocks: names.iter().enumerate().map(block).collect(),
            counters: Counters { main_bytes, channel_bytes, normal_pages, zero_pages, sync_packets, rounds },
            ..sample()
        };
        let text = serde_json::to_string(&manifest).unwrap();
        prop_assert_eq!(Manifest::parse(&text).unwrap(), manifest);
    }

    #[test]
    fn a_manifest_of_damaged_text_is_read_or_refused(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = serde_json::to_vec(&sample()).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(text) = String::from_utf8(bytes) {
            // What is read is sound whatever the text says.
            if let Ok(manifest) = Manifest::parse(&text) {
                prop_assert_eq!(manifest.check(), Ok(()));
            }
        }
    }
}
