//! Stores of QEMU's machines, from one `pageferry qemu` to the next: what was received and is sent again arrives as the
//! same store, and needs no word from whoever does it.
#![cfg(all(not(loom), feature = "cli"))]

#[path = "support/files.rs"]
mod files;
#[path = "support/program.rs"]
mod program;
#[path = "support/qemu_tail.rs"]
mod qemu_tail;
#[path = "support/stores.rs"]
mod stores;
#[path = "support/vmm.rs"]
mod vmm;

use std::path::Path;

use files::{bytes_on_disk, demand_same};
use pageferry::dirty::combined::Still;
use pageferry::memory::{Backing, Ram, RamBlock};
use pageferry::qemu::Qemu;
use pageferry::qemu::wire::{Barrier, Dialect};
use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyBitmap, Outcome, Source, Verify};
use program::{Folder, number, start};
use qemu_tail::{DEVICES, tail};
use serde_json::Value;
use stores::{manifest, receive};
use vmm::TestGuest;

/// Of this guest's RAM most was never touched.
const RAM_BYTES: u64 = (40 << 20) + 67 * 4096;

fn guest() -> TestGuest {
    let block = |name: &str, bytes| RamBlock::anonymous(name, 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap();
    let long = "x".repeat(255);
    let ram = Ram::new([block("pc.ram", RAM_BYTES), block("pc.rom", 65 * 4096), block(&long, 5 << 20)]).unwrap();
    (0..300).for_each(|n| vmm::write_page(&ram, BlockId(0), n * 31, n + 1));
    (0..300).for_each(|n| vmm::zero_page(&ram, BlockId(0), n * 31 + 1));
    vmm::write_page(&ram, BlockId(1), 64, 7);
    vmm::write_page(&ram, BlockId(2), (5 << 8) - 1, 8);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    guest.setup = b"\x07\0\0\0\x0bpc-q35-10.0".to_vec();
    guest.state = tail(&[], DEVICES);
    guest
}

/// Sends a store; the report.
fn send(store: &str, to: &str, channels: &str, more: &[&str]) -> Value {
    stores::send(store, to, channels, more).end().expect(0, "completed").clone()
}

/// Both stores have the same blocks and devices; and holes are no data.
fn demand_same_stores(left: &str, right: &str) {
    let (ours, theirs) = (manifest(left), manifest(right));
    assert_eq!(ours["blocks"], theirs["blocks"]);
    assert_eq!(ours["machine"], theirs["machine"]);
    let files: Vec<String> =
        ours["blocks"].as_array().unwrap().iter().map(|b| b["file"].as_str().unwrap().to_owned()).collect();
    assert_eq!(files.len(), 3);
    for file in files.iter().map(String::as_str).chain(["device.state"]) {
        let [left, right] = [left, right].map(|store| Path::new(store).join(file));
        demand_same(file, &left, &right);
        assert!(bytes_on_disk(&right) <= bytes_on_disk(&left) + (1 << 20), "{file}: holes were filled");
    }
}

/// Stores the guest, by a source that speaks this.
fn first_store(folder: &Folder, name: &str, qemu: Qemu) -> String {
    let store = folder.file(name);
    let (program, address) = receive(&store, "2", &[]);
    let mut guest = guest();
    let source = Source::builder(guest.ram.clone()).verify(Verify::Off).framing(qemu);
    let report = source.connect(&address).unwrap().migrate(&mut Still::new(), &mut guest);
    assert_eq!(report.outcome, Outcome::Completed);
    program.end().expect(0, "completed");
    let arrived = Path::new(&store).join("blocks");
    assert!(bytes_on_disk(&arrived.join(first_file(&arrived))) < 16 << 20, "untouched pages are holes");
    store
}

fn first_file(blocks: &Path) -> String {
    let names = std::fs::read_dir(blocks).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.min().unwrap()
}

#[test]
fn a_store_that_is_sent_to_receive_is_the_same_store() {
    let folder = Folder::new();
    let store = first_store(&folder, "first", Qemu::new(2));
    let all_pages = RAM_BYTES / 4096 + 65 + (5 << 8);
    let ways: [(&str, &[&str]); 5] = [
        ("2", &[]),
        ("0", &[]),
        ("3", &["--compress", "zlib"]),
        ("1", &["--compress", "zstd", "--return-path", "off"]),
        ("2", &["--dialect", "7.2"]),
    ];
    for (index, (channels, more)) in ways.into_iter().enumerate() {
        let again = folder.file(&format!("again-{index}"));
        let (program, address) = receive(&again, channels, &[]);
        let report = send(&store, &address, channels, more);
        program.end().expect(0, "completed");
        demand_same_stores(&store, &again);
        let named = number(&report["counters"], "normal_pages") + number(&report["counters"], "zero_pages");
        assert_eq!(named, all_pages, "{channels} channels, {more:?}: every page is named once");
        std::fs::remove_dir_all(&again).unwrap();
    }
}

#[test]
fn a_store_keeps_the_uuid_that_the_channels_said_and_send_says_it_again() {
    let folder = Folder::new();
    let (uuid, other) = ("00112233-4455-6677-8899-aabbccddeeff", "ffffffff-4455-6677-8899-aabbccddeeff");
    let bytes = u128::from_str_radix(&uuid.replace('-', ""), 16).unwrap().to_be_bytes();
    let store = first_store(&folder, "first", Qemu::new(2).uuid(bytes));
    assert_eq!(manifest(&store)["uuid"], uuid);
    let none = Value::Null;
    let ways: [(&str, &[&str], &Value); 4] = [
        ("3", &[], &uuid.into()),
        ("1", &["--uuid", other], &other.into()),
        ("2", &["--uuid", "00000000-0000-0000-0000-000000000000"], &none),
        ("0", &[], &none),
    ];
    for (index, (channels, more, expected)) in ways.into_iter().enumerate() {
        let again = folder.file(&format!("again-{index}"));
        let (program, address) = receive(&again, channels, &[]);
        send(&store, &address, channels, more);
        program.end().expect(0, "completed");
        assert_eq!(&manifest(&again)["uuid"], expected, "{channels} channels, {more:?}");
        std::fs::remove_dir_all(&again).unwrap();
    }
}

#[test]
fn both_sides_count_the_same_and_all_bytes() {
    let folder = Folder::new();
    let store = first_store(&folder, "first", Qemu::new(2));
    for channels in ["3", "0"] {
        let again = folder.file(&format!("again-{channels}"));
        let (program, address) = receive(&again, channels, &[]);
        let sent = send(&store, &address, channels, &[]);
        let ended = program.end();
        let received = ended.expect(0, "completed");
        assert_eq!(sent["counters"], received["counters"], "{channels} channels");
        let bytes = |report: &Value| ["main_bytes", "channel_bytes"].map(|name| number(&report["counters"], name));
        for report in [&sent, received] {
            assert_eq!(number(report, "wire_bytes"), bytes(report).iter().sum::<u64>(), "{channels} channels");
        }
    }
}

#[test]
fn a_store_of_an_older_qemu_goes_on_as_one() {
    let folder = Folder::new();
    // 7.2, and 8.1 to 9.1.
    for (name, barrier) in [("per-section", Barrier::PerSection), ("per-round", Barrier::PerRound)] {
        let store = first_store(&folder, name, Qemu::new(2).dialect(Dialect::V7_2, barrier).section(2));
        let again = folder.file("again");
        let (program, address) = receive(&again, "2", &[]);
        send(&store, &address, "2", &[]);
        program.end().expect(0, "completed");
        demand_same_stores(&store, &again);
        for store in [&store, &again] {
            assert_eq!((&manifest(store)["dialect"], &manifest(store)["barrier"]), (&"7.2".into(), &name.into()));
            std::fs::remove_dir_all(store).unwrap();
        }
    }
}

#[test]
fn a_store_that_is_sent_through_a_relay_is_the_same_store() {
    let folder = Folder::new();
    let (store, again) = (first_store(&folder, "first", Qemu::new(2)), folder.file("again"));
    let (program, address) = receive(&again, "2", &[]);
    let mut relay = start(&["qemu", "relay", "--listen", "127.0.0.1:0", "--to", &address, "--json"]);
    let between = relay.address();
    send(&store, &between, "2", &[]);
    relay.end().expect(0, "completed");
    program.end().expect(0, "completed");
    demand_same_stores(&store, &again);
}
