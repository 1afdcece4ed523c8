//! Reads the records of the main stream, each from its first byte.

#![forbid(unsafe_code)]

use super::order::{CAPABILITIES_MAX, Order, Phase};
use super::record::{Block, Command, Record, Subsection};
use super::*;
use crate::qemu::wire::codec::{Reader, Stop};
use crate::qemu::wire::{Fault, NAME_BYTES_MAX, Name, PAGE_BYTES};

/// Reads the record that begins here, if `order` has a place for one of fixed form: not the list of blocks, not bytes
/// that are handed through. Whether it may stand here is for [`Order::accept`].
pub fn record(from: &mut Reader<'_>, order: &Order) -> Result<Record<'static>, Stop> {
    match order.phase {
        Phase::Header => {
            from.expect_u32("magic", u32::from_be_bytes(crate::qemu::wire::MAIN_MAGIC), "0x5145564d, \"QEVM\"")?;
            from.expect_u32("version of the stream", 3, "3")?;
            Ok(Record::Header)
        }
        Phase::Words(_) => word(from, order),
        Phase::Footer(_) => {
            kind(from, &[FOOTER], "0x7e, a footer")?;
            section(from, order)?;
            Ok(Record::Footer)
        }
        Phase::Machine => {
            kind(from, &[CONFIGURATION], "0x07, the configuration")?;
            let length = from.u32()?;
            if length > NAME_BYTES_MAX as u32 {
                let (field, found, limit) = ("length of the machine's name", length.into(), NAME_BYTES_MAX as u64);
                return Err(from.bad(4, Fault::TooLarge { field, found, limit }));
            }
            let bytes = from.bytes(length as usize)?;
            let name = Name::read("machine's name", bytes).map_err(|fault| from.bad(bytes.len(), fault))?;
            Ok(Record::Machine(name))
        }
        _ => section_or_command(from, order),
    }
}

/// The byte that a record begins with.
fn kind(from: &mut Reader<'_>, known: &[u8], expected: &'static str) -> Result<u8, Stop> {
    let found = from.u8()?;
    if known.contains(&found) {
        return Ok(found);
    }
    Err(from.bad(1, Fault::Value { field: "type of a record", found: found.into(), expected }))
}

fn section_or_command(from: &mut Reader<'_>, order: &Order) -> Result<Record<'static>, Stop> {
    let known: &[u8] = match order.phase {
        Phase::Configuration => &[SUBSECTION, COMMAND, START],
        Phase::Before => &[COMMAND, START],
        Phase::Between => &[COMMAND, PART, END, FULL],
        _ => &[COMMAND],
    };
    let found = kind(from, known, order.expected())?;
    match found {
        SUBSECTION => subsection(from).map(Record::Subsection),
        COMMAND => command(from).map(Record::Command),
        // It has no length, and RAM follows it.
        FULL => {
            let what = "the state of a device before the end of RAM, as virtio-mem and background-snapshot send it,";
            Err(from.bad(1, Fault::Unsupported { what, expected: order.expected() }))
        }
        START => {
            let section = from.u32()?;
            let name = from.name("name of a section")?;
            if name.as_str() != RAM {
                let (what, expected) = ("a section", "ram, the only one whose pages are understood");
                let fault = Fault::Unknown { what, name: name.as_str().to_owned(), expected };
                return Err(from.bad(usize::from(name.length()) + 1, fault));
            }
            from.expect_u32("instance of the section of RAM", 0, "0")?;
            from.expect_u32("version of the section of RAM", RAM_VERSION, "4")?;
            Ok(Record::RamStart { section })
        }
        _ => {
            section(from, order)?;
            Ok(if found == PART { Record::RamPart } else { Record::RamEnd })
        }
    }
}

/// The number of the section of RAM.
fn section(from: &mut Reader<'_>, order: &Order) -> Result<(), Stop> {
    let (field, found, expected) = ("number of a section", from.u32()?.into(), order.section.into());
    if found == expected {
        return Ok(());
    }
    Err(from.bad(4, Fault::Length { field, found, expected }))
}

fn subsection(from: &mut Reader<'_>) -> Result<Subsection, Stop> {
    let name = from.name("name of a subsection")?;
    let back = usize::from(name.length()) + 1;
    if ![PAGE_BITS, CAPABILITIES, UUID].contains(&name.as_str()) {
        let (what, expected) = ("a subsection", "target-page-bits, capabilities or uuid of the configuration");
        return Err(from.bad(back, Fault::Unknown { what, name: name.as_str().to_owned(), expected }));
    }
    from.expect_u32("version of a subsection", 1, "1")?;
    match name.as_str() {
        UUID => Ok(Subsection::Uuid(from.array()?)),
        PAGE_BITS => {
            from.expect_u32("target page bits", 12, "12: pages of 4096 bytes")?;
            Ok(Subsection::TargetPageBits)
        }
        _ => {
            let count = from.u32()?;
            if count > CAPABILITIES_MAX as u32 {
                let (field, found, limit) = ("number of capabilities", count.into(), CAPABILITIES_MAX as u64);
                return Err(from.bad(4, Fault::TooLarge { field, found, limit }));
            }
            let names = (0..count).map(|_| from.name("capability"));
            Ok(Subsection::Capabilities(names.collect::<Result<_, _>>()?))
        }
    }
}

fn command(from: &mut Reader<'_>) -> Result<Command, Stop> {
    let number = from.u16()?;
    if !(1..=11).contains(&number) {
        let (field, found, expected) = ("command", number.into(), "1 (OPEN_RETURN_PATH) to 11 (SWITCHOVER_START)");
        return Err(from.bad(2, Fault::Value { field, found, expected }));
    }
    let length = from.u16()?;
    let fixed = match number {
        1 | 4 | 5 | 8 | 9 | 11 => Some(0),
        2 | 7 => Some(4),
        3 if length > 0 => Some(16),
        3 => Some(0),
        _ => None,
    };
    if let Some(expected) = fixed.filter(|expected| *expected != u64::from(length)) {
        return Err(from.bad(2, Fault::Length { field: "length of a command", found: length.into(), expected }));
    }
    Ok(match number {
        1 => Command::OpenReturnPath,
        2 => Command::Ping { value: from.u32()? },
        3 if length == 0 => Command::PostcopyAdvise { page_sizes: None },
        3 => {
            let page_sizes = from.u64()?;
            let found = from.u64()?;
            if found != PAGE_BYTES {
                return Err(from.bad(8, Fault::Value { field: "size of a guest page", found, expected: "4096" }));
            }
            Command::PostcopyAdvise { page_sizes: Some(page_sizes) }
        }
        4 => Command::PostcopyListen,
        5 => Command::PostcopyRun,
        6 => Command::PostcopyRamDiscard(from.bytes(length.into())?.to_vec()),
        7 => Command::Packaged { bytes: from.u32()? },
        8 => Command::EnableColo,
        9 => Command::PostcopyResume,
        10 => {
            // A length beyond any name is refused before so many bytes are waited for.
            if !(2..=NAME_BYTES_MAX as u16 + 1).contains(&length) {
                let (field, found, expected) = ("length of a command", length.into(), "that of a name, 2 to 256");
                return Err(from.bad(2, Fault::Value { field, found, expected }));
            }
            let name = from.name("RAM block of a command")?;
            let expected = u64::from(name.length()) + 1;
            if expected != u64::from(length) {
                let fault = Fault::Length { field: "length of a command", found: length.into(), expected };
                return Err(from.bad(expected as usize + 2, fault));
            }
            Command::RecvBitmap(name)
        }
        _ => Command::SwitchoverStart,
    })
}

fn word(from: &mut Reader<'_>, order: &Order) -> Result<Record<'static>, Stop> {
    let word = from.u64()?;
    let (offset, flags) = (word & !(PAGE_BYTES - 1), word & (PAGE_BYTES - 1));
    let unsupported = |what| Err(from.bad(8, Fault::Unsupported { what, expected: "zero pages and plain pages" }));
    match flags & !WORD_CONTINUE {
        WORD_EOS | WORD_FLUSH if word != flags & !WORD_CONTINUE => {
            let expected = "0x10 (end) or 0x200 (flush) and nothing else in the word";
            Err(from.bad(8, Fault::Value { field: "word", found: word, expected }))
        }
        WORD_EOS => Ok(Record::EndOfSection),
        WORD_FLUSH => Ok(Record::Flush),
        WORD_ZERO => {
            let block = page_block(from, order, flags)?;
            let fill = from.u8()?;
            if fill != 0 {
                let (field, found, expected) = ("byte that a zero page is filled with", fill.into(), "0");
                return Err(from.bad(1, Fault::Value { field, found, expected }));
            }
            Ok(Record::ZeroPage { block, offset })
        }
        WORD_PAGE => Ok(Record::Page { block: page_block(from, order, flags)?, offset }),
        0x040 => unsupported("an XBZRLE page"),
        0x080 => unsupported("a word for RDMA"),
        0x100 => unsupported("a compressed page on the main stream"),
        _ => {
            let (field, expected) = ("word", "0x02 (zero page), 0x08 (page), 0x10 (end) or 0x200 (flush) in its low bits");
            Err(from.bad(8, Fault::Value { field, found: word, expected }))
        }
    }
}

/// The block of a page: named after its word, or the one of the page before.
fn page_block(from: &mut Reader<'_>, order: &Order, flags: u64) -> Result<usize, Stop> {
    if flags & WORD_CONTINUE != 0 {
        let (found, expected) = ("a page of the same block as the one before", "a page that names its block");
        return order.last_block.ok_or_else(|| from.bad(8, Fault::OutOfPlace { found, expected }));
    }
    let name = from.name("RAM block of a page")?;
    order.blocks.iter().position(|block| block.name == name).ok_or_else(|| {
        let (what, expected) = ("the RAM block of a page", "one of the list in START");
        from.bad(usize::from(name.length()) + 1, Fault::Unknown { what, name: name.as_str().to_owned(), expected })
    })
}

/// The word before the list of blocks: the length of all of them together.
pub fn blocks_total(from: &mut Reader<'_>) -> Result<u64, Stop> {
    let word = from.u64()?;
    let total = word & !(PAGE_BYTES - 1);
    if word & (PAGE_BYTES - 1) == WORD_MEM_SIZE && total > 0 {
        return Ok(total);
    }
    let expected = "the length of all RAM blocks and, in its low bits, 0x04";
    Err(from.bad(8, Fault::Value { field: "first word of START", found: word, expected }))
}

/// The next of the blocks, of which `left` bytes are still to come.
pub fn block(from: &mut Reader<'_>, order: &Order, left: u64) -> Result<Block, Stop> {
    let name = from.name("name of a RAM block")?;
    let bytes = from.u64()?;
    if bytes > left {
        return Err(from.bad(8, Fault::TooLarge { field: "length of a RAM block", found: bytes, limit: left }));
    }
    let mut block = Block::new(name, bytes);
    if order.addresses {
        block.guest_address = Some(from.u64()?);
    } else if order.page_sizes != 0 {
        // Only the destination's own memory tells whether a page size follows; but nothing else that may follow, a name
        // or a word, begins with the byte that a page size begins with and is one.
        let mut ahead = from.clone();
        let found = ahead.u64()?;
        if order.is_page_size(found) {
            block.page_bytes = Some(found);
            *from = ahead;
        }
    }
    order.check_block(&block).map_err(|fault| from.bad(from.taken(), fault))?;
    Ok(block)
}
