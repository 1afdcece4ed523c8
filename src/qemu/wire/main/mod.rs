//! The main stream: records of the source, from the header to the last byte of the description of its devices.
//!
//! ```text
//! header           "QEVM", u32 3
//! configuration    07, u32 length, machine; then 05 subsections, as many as there are
//! command          08, u16 command, u16 length, its bytes
//! START ram        01, u32 section, name "ram", u32 instance 0, u32 version 4, word total | 4, blocks, words, footer
//! PART, END ram    02 or 03, u32 section, words, footer
//! word             u64: an offset, and in its low 12 bits what it is: 02 zero page, 08 page, 20 of the same block as
//!                  the one before, 10 end of the section, 200 flush
//! footer           7e, u32 section
//! tail             04 sections of devices, 00, 06, u32 length, JSON
//! ```

#![forbid(unsafe_code)]

mod decoder;
mod encoder;
mod json;
mod order;
mod read;
mod record;
mod vmdesc;

pub use decoder::MainDecoder;
pub use encoder::MainEncoder;
pub use order::BLOCKS_MAX;
pub use record::{Block, Command, PACKAGED_BYTES_MAX, Record, Subsection};
pub use vmdesc::VMDESC_BYTES_MAX;

/// First bytes of records.
const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7E;
const EOF: u8 = 0x00;

/// The only section whose pages are understood.
const RAM: &str = "ram";
const RAM_VERSION: u32 = 4;

/// Low bits of a word.
const WORD_ZERO: u64 = 0x002;
const WORD_MEM_SIZE: u64 = 0x004;
const WORD_PAGE: u64 = 0x008;
const WORD_EOS: u64 = 0x010;
const WORD_CONTINUE: u64 = 0x020;
const WORD_FLUSH: u64 = 0x200;

/// Names of the subsections of the configuration.
const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";

/// The capabilities that change the stream.
const IGNORE_SHARED: &str = "x-ignore-shared";
const MAPPED_RAM: &str = "mapped-ram";
