//! What the main stream is made of.

#![forbid(unsafe_code)]

use crate::qemu::wire::Name;

/// Most bytes of one package of records: QEMU's own limit.
pub const PACKAGED_BYTES_MAX: u32 = 32 << 20;

/// One step of the main stream. A [`super::MainDecoder`] gives them in the order of the bytes, and a
/// [`super::MainEncoder`] takes them in that order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record<'a> {
    /// The magic and the version, 3.
    Header,
    /// The configuration, with the name of the machine type.
    Machine(Name),
    /// More of the configuration. There is no end mark: the first record of another kind ends it.
    Subsection(Subsection),
    /// A command to the destination.
    Command(Command),
    /// The next bytes of the package that [`Command::Packaged`] announced: records of their own, for post-copy.
    Packaged(&'a [u8]),
    /// The section of RAM begins, under this number.
    RamStart {
        /// The number of the section. QEMU 10.0 uses 1, 7.2 uses 2.
        section: u32,
    },
    /// The RAM blocks, which the pages of all channels are in. It follows [`Record::RamStart`].
    Blocks(Vec<Block>),
    /// A part of the section of RAM begins.
    RamPart,
    /// The last part of the section of RAM begins.
    RamEnd,
    /// This page holds zeros only.
    ZeroPage {
        /// Its block: an index into the list.
        block: usize,
        /// Where in its block, in bytes.
        offset: u64,
    },
    /// The bytes of this page follow.
    Page {
        /// Its block: an index into the list.
        block: usize,
        /// Where in its block, in bytes.
        offset: u64,
    },
    /// The next of the 4096 bytes of the page before.
    PageData(&'a [u8]),
    /// The barrier, if it is [`crate::qemu::wire::Barrier::PerRound`].
    Flush,
    /// The pages of this part end; the barrier, if it is [`crate::qemu::wire::Barrier::PerSection`].
    EndOfSection,
    /// The end of the part itself: the next record begins something else.
    Footer,
    /// The next bytes of the tail: the sections of the devices, the end mark and the description. They are kept as they
    /// are.
    Tail(&'a [u8]),
    /// The tail may end here: see [`super::MainDecoder`].
    TailWhole,
}

impl Record<'_> {
    /// What errors call it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Record::Header => "the header",
            Record::Machine(_) => "the configuration",
            Record::Subsection(_) => "a subsection of the configuration",
            Record::Command(_) => "a command",
            Record::Packaged(_) => "bytes of a package",
            Record::RamStart { .. } => "the START section of RAM",
            Record::Blocks(_) => "the list of RAM blocks",
            Record::RamPart => "a PART section of RAM",
            Record::RamEnd => "the END section of RAM",
            Record::ZeroPage { .. } => "a zero page",
            Record::Page { .. } => "a page",
            Record::PageData(_) => "bytes of a page",
            Record::Flush => "a flush word",
            Record::EndOfSection => "the end word of a section",
            Record::Footer => "a footer",
            Record::Tail(_) => "state of devices",
            Record::TailWhole => "the end of the description of the devices",
        }
    }
}

/// More of the configuration.
///
/// ```
/// use pageferry::qemu::wire::Subsection;
///
/// assert_ne!(Subsection::Uuid([0; 16]), Subsection::TargetPageBits);
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Subsection {
    /// The size of guest pages: 12 bits, which is all that is followed here. QEMU says nothing for x86.
    TargetPageBits,
    /// Capabilities that the destination must have too: at most 16. Of those that QEMU names here, `x-ignore-shared`
    /// puts addresses into the list of blocks; `mapped-ram` is refused, it makes a file and not a stream.
    Capabilities(Vec<Name>),
    /// The uuid of the VM.
    Uuid([u8; 16]),
}

/// A command to the destination.
///
/// ```
/// use pageferry::qemu::wire::Command;
///
/// assert_ne!(Command::Ping { value: 1 }, Command::Ping { value: 2 });
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// Opens the return path: from now on the destination may speak, and must say
    /// [`crate::qemu::wire::ReturnMessage::Shut`] at the end.
    OpenReturnPath,
    /// Asks for a [`crate::qemu::wire::ReturnMessage::Pong`].
    Ping {
        /// What the answer must carry.
        value: u32,
    },
    /// Post-copy may follow.
    PostcopyAdvise {
        /// If RAM may come by post-copy: all page sizes of its blocks, a bit each, and the size of a guest page, which
        /// must be 4096. The list of blocks then names each page size that is another.
        page_sizes: Option<u64>,
    },
    /// Post-copy: the destination takes requests.
    PostcopyListen,
    /// Post-copy: the destination runs the guest.
    PostcopyRun,
    /// Post-copy: pages that are old by now, as they came.
    PostcopyRamDiscard(Vec<u8>),
    /// A package of records follows.
    Packaged {
        /// Its length: 1 to [`PACKAGED_BYTES_MAX`].
        bytes: u32,
    },
    /// Both sides are to run.
    EnableColo,
    /// Post-copy goes on after a break.
    PostcopyResume,
    /// Asks which pages of a block have come.
    RecvBitmap(Name),
    /// The guest is stopped, and the END section of RAM comes next. Not in QEMU 7.2.
    SwitchoverStart,
}

/// A RAM block, as the START section names it.
///
/// ```
/// use pageferry::qemu::wire::{Block, Name};
///
/// let block = Block::new(Name::new("pc.ram").unwrap(), 128 << 20);
/// assert_eq!(block.page_bytes, None);
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Block {
    /// Its name, which is its identity.
    pub name: Name,
    /// Its length in use, in bytes: a multiple of 4096, and not 0.
    pub bytes: u64,
    /// The size of its backing pages, in bytes; only where post-copy was advised and it is not 4096.
    pub page_bytes: Option<u64>,
    /// Its address in the guest; only with the capability `x-ignore-shared`.
    pub guest_address: Option<u64>,
}

impl Block {
    /// A block of which nothing more is said.
    pub const fn new(name: Name, bytes: u64) -> Block {
        Block { name, bytes, page_bytes: None, guest_address: None }
    }
}
