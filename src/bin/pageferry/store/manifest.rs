//! What a store says of itself, and every check on that which needs no file.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use pageferry::memory::{BLOCKS_MAX, NAME_BYTES_MAX};
use pageferry::qemu::Counts;
use serde::{Deserialize, Serialize};

use super::digest;
use super::names::stays_inside;
use super::{MANIFEST, PAGE_BYTES};

/// Says that a manifest is one.
pub const FORMAT: &str = "pageferry-qemu-store";

/// Readers refuse any other. Fields may be added without a new one: readers pass over what they do not know.
pub const VERSION: u32 = 1;

/// The contents of `manifest.json`.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    /// The version of pageferry that wrote it.
    pub pageferry: String,
    /// When it was written: seconds since 1970, by the clock of the machine that wrote it.
    pub written_unix_s: u64,
    /// QEMU's name of the machine type, such as `pc-q35-10.0`.
    pub machine: String,
    /// The beginning of the main stream as it came: in the manifest hexadecimal digits.
    #[serde(with = "hexadecimal")]
    pub configuration: Vec<u8>,
    /// "10.0" or "7.2": how the QEMU that it came from lays out its packets.
    pub dialect: String,
    /// "per-round" or "per-section": where its channels wait for each other.
    pub barrier: String,
    /// The number of the RAM's section in the main stream.
    pub section: u32,
    /// Over how many channels it came; 0 is without multifd.
    pub channels: u8,
    /// The machine's uuid, as the channels said it: none without channels, or where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// "none", "zlib" or "zstd": how its pages came.
    pub compression: String,
    /// How all digests here are made.
    pub digests: String,
    /// In the source's order.
    pub blocks: Vec<BlockEntry>,
    /// The state of the devices.
    pub tail: TailEntry,
    pub counters: Counters,
}

/// The uuid of a machine: in text 32 hexadecimal digits, with any hyphens among them, and never all of them 0.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(try_from = "String", into = "String")]
pub struct Uuid([u8; 16]);

/// One RAM block.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct BlockEntry {
    /// As QEMU calls it.
    pub name: String,
    /// The length of the block and of its file.
    pub bytes: u64,
    /// Its file, relative to the store.
    pub file: String,
    /// 16 hexadecimal digits.
    pub digest: String,
    /// Where the guest sees it, if the source said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_address: Option<u64>,
}

/// The device state.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct TailEntry {
    /// Its file, relative to the store.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// 16 hexadecimal digits.
    pub digest: String,
}

/// What came over the wire.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Bytes on the main connection.
    pub main_bytes: u64,
    /// Bytes on the channels.
    pub channel_bytes: u64,
    /// Pages that came with data; one that came again counts again.
    pub normal_pages: u64,
    /// Pages that came as zeros; one that came again counts again.
    pub zero_pages: u64,
    /// SYNC packets on all channels.
    pub sync_packets: u64,
    /// Barriers: the one before the first round, and one at the end of each.
    pub rounds: u64,
}

impl From<Counts> for Counters {
    fn from(counts: Counts) -> Counters {
        Counters {
            main_bytes: counts.main_bytes,
            channel_bytes: counts.channel_bytes,
            normal_pages: counts.normal_pages,
            zero_pages: counts.zero_pages,
            sync_packets: counts.sync_packets,
            rounds: counts.barriers,
        }
    }
}

impl Uuid {
    /// `None` of zeros, which stand for a machine without one.
    pub fn new(bytes: [u8; 16]) -> Option<Uuid> {
        (bytes != [0; 16]).then_some(Uuid(bytes))
    }

    /// Its bytes, in the order of the digits.
    pub fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl FromStr for Uuid {
    type Err = String;

    fn from_str(text: &str) -> Result<Uuid, String> {
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let sound = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u128::from_str_radix(&digits, 16).ok().filter(|_| sound);
        let uuid = number.and_then(|number| Uuid::new(number.to_be_bytes()));
        uuid.ok_or_else(|| format!("{text:?} is no uuid: 32 hexadecimal digits, not all of them 0"))
    }
}

impl TryFrom<String> for Uuid {
    type Error = String;

    fn try_from(text: String) -> Result<Uuid, String> {
        text.parse()
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> String {
        uuid.to_string()
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", u128::from_be_bytes(self.0));
        let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
        f.write_str(&parts.join("-"))
    }
}

impl Manifest {
    /// Reads one, and checks all that can be checked without the files.
    pub fn parse(text: &str) -> Result<Manifest, String> {
        let no_json = |e: serde_json::Error| format!("{MANIFEST} cannot be read: {e}");
        // Format and version first: of another version nothing else need be as here.
        let value: serde_json::Value = serde_json::from_str(text).map_err(no_json)?;
        if value["format"] != FORMAT {
            return Err(format!(
                "{MANIFEST} does not say that its format is {FORMAT:?}: this is no store of a QEMU guest"
            ));
        }
        if value["version"] != VERSION {
            let version = &value["version"];
            return Err(format!("{MANIFEST} is of version {version}; this program reads version {VERSION}"));
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(no_json)?;
        manifest.check().map_err(|what| format!("{MANIFEST}: {what}"))?;
        Ok(manifest)
    }

    /// Why it cannot be true, if it cannot.
    pub fn check(&self) -> Result<(), String> {
        one_of("dialect", &self.dialect, &["10.0", "7.2"])?;
        one_of("barrier", &self.barrier, &["per-round", "per-section"])?;
        one_of("compression", &self.compression, &["none", "zlib", "zstd"])?;
        one_of("digests", &self.digests, &[digest::NAME])?;
        if !(1..=BLOCKS_MAX).contains(&self.blocks.len()) {
            return Err(format!("it has {} RAM blocks, expected 1 to {BLOCKS_MAX}", self.blocks.len()));
        }
        check_file("the device state", &self.tail.file, &self.tail.digest)?;
        let mut names = HashSet::new();
        let mut files = HashSet::from([MANIFEST, self.tail.file.as_str()]);
        if files.len() != 2 {
            return Err("the device state is said to be in the manifest".to_owned());
        }
        let mut bytes: u64 = 0;
        for block in &self.blocks {
            let what = format!("RAM block {:?}", block.name);
            check_file(&what, &block.file, &block.digest)?;
            if !(1..=NAME_BYTES_MAX).contains(&block.name.len()) {
                return Err(format!("{what}: its name has {} bytes, expected 1 to {NAME_BYTES_MAX}", block.name.len()));
            }
            if !names.insert(block.name.as_str()) {
                return Err(format!("{what} is there twice"));
            }
            if !files.insert(block.file.as_str()) {
                return Err(format!("{what}: its file {:?} is that of something else, too", block.file));
            }
            if block.bytes == 0 || block.bytes % PAGE_BYTES != 0 {
                return Err(format!("{what} has {} bytes, expected whole pages of {PAGE_BYTES}", block.bytes));
            }
            if block.guest_address.is_some_and(|address| address.checked_add(block.bytes).is_none()) {
                return Err(format!("{what} does not fit the guest's addresses"));
            }
            let sum = bytes.checked_add(block.bytes).filter(|sum| isize::try_from(*sum).is_ok());
            bytes = sum.ok_or_else(|| format!("{what}: with it there is more RAM than fits the address space"))?;
        }
        Ok(())
    }

    /// Bytes of all RAM blocks together.
    pub fn ram_bytes(&self) -> u64 {
        // No overflow: `check` has seen the sum.
        self.blocks.iter().map(|block| block.bytes).sum()
    }
}

fn one_of(field: &str, value: &str, allowed: &[&str]) -> Result<(), String> {
    if allowed.contains(&value) {
        return Ok(());
    }
    let allowed: Vec<_> = allowed.iter().map(|value| format!("{value:?}")).collect();
    Err(format!("its {field} is {value:?}, expected {}", allowed.join(" or ")))
}

fn check_file(what: &str, file: &str, digest: &str) -> Result<(), String> {
    if !stays_inside(file) {
        return Err(format!("{what}: its file {file:?} would not be in the store"));
    }
    if digest.len() != 16 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(format!("{what}: its digest {digest:?} is not 16 hexadecimal digits"));
    }
    Ok(())
}

/// Bytes as two digits each.
mod hexadecimal {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pair = |pair: &[u8]| match *pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.ok_or_else(|| D::Error::custom("expected two hexadecimal digits a byte"))
    }
}
