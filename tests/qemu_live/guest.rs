//! What runs in the machine: a boot sector that counts, or a real Linux that does.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::serial::Numbers;

/// What the script answers when the machine lacks something it needs.
const LACKING: i32 = 77;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guest {
    /// The boot sector, with so much noise that stays as it is, and so many pages that change with each number.
    Counter { cold_mib: u32, hot_pages: u32, blinking_pages: u32 },
    /// A kernel and busybox.
    Linux,
}

/// 16 MiB of noise, 4 MiB that change all the time.
pub const COUNTER: Guest = Guest::Counter { cold_mib: 16, hot_pages: 1024, blinking_pages: 16 };

const LISTING: &str = include_str!("boot_sector.lst");
const COLD_START: u32 = 2 << 20;
const PARAMETERS_AT: usize = 0x1f0;

/// The firmware does not boot from a disk of one sector.
const DISK_BYTES: usize = 1 << 20;

/// A disk with the boot sector: the bytes of the listing, where its three stretches of RAM end, and the mark that the firmware asks for.
fn boot_sector(cold_mib: u32, hot_pages: u32, blinking_pages: u32) -> Vec<u8> {
    let (mut sector, mut at) = (vec![0; DISK_BYTES], 0);
    for line in LISTING.lines().filter(|line| !line.starts_with('#') && !line.ends_with(':')) {
        let (offset, rest) = line.split_once("  ").expect("an offset");
        assert_eq!(usize::from_str_radix(offset, 16), Ok(at), "{line}");
        let bytes = rest.split_once("  ").map_or(rest, |(bytes, _)| bytes);
        for byte in bytes.split_whitespace() {
            sector[at] = u8::from_str_radix(byte, 16).unwrap_or_else(|error| panic!("{error}: {line}"));
            at += 1;
        }
    }
    assert!(at <= PARAMETERS_AT);
    let cold_end = COLD_START + (cold_mib << 20);
    let hot_end = cold_end + hot_pages * 4096;
    let ends = [cold_end, hot_end, hot_end + blinking_pages * 4096];
    let ends = ends.into_iter().flat_map(u32::to_le_bytes);
    sector[PARAMETERS_AT..].iter_mut().zip(ends).for_each(|(byte, end)| *byte = end);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}

impl Guest {
    pub fn numbers(self) -> Numbers {
        match self {
            Guest::Counter { .. } => Numbers::Hexadecimal,
            Guest::Linux => Numbers::Decimal,
        }
    }

    /// What QEMU is to boot, made in `folder`: its arguments, or why this machine cannot have it.
    pub fn arguments(self, folder: &Path) -> Result<Vec<String>, String> {
        let file = |name: &str| folder.join(name).to_str().expect("a UTF-8 path").to_owned();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        match self {
            Guest::Counter { cold_mib, hot_pages, blinking_pages } => {
                std::fs::write(file("boot"), boot_sector(cold_mib, hot_pages, blinking_pages)).unwrap();
                let drive = format!("id=boot,if=none,format=raw,readonly=on,file={}", file("boot"));
                Ok(words(&["-drive", &drive, "-device", "virtio-blk-pci,drive=boot,bootindex=0"]))
            }
            Guest::Linux => {
                let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu_live/linux");
                let made = Command::new(script).arg(folder).stdin(Stdio::null()).output().expect("the script starts");
                let said = String::from_utf8_lossy(&made.stderr).into_owned();
                if made.status.code() == Some(LACKING) {
                    return Err(said);
                }
                assert!(made.status.success(), "{said}");
                let append = "console=ttyS0 panic=-1 quiet";
                Ok(words(&["-kernel", &file("kernel"), "-initrd", &file("initrd"), "-append", append]))
            }
        }
    }
}
