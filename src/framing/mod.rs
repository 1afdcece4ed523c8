#![forbid(unsafe_code)]
//! What is spoken on a migration's connections: a plug between the sessions, which know frames, rounds and runs, and the
//! bytes of one wire.
//!
//! A [`Framing`] says who a connection is that has just come in, what a source says first on one that it has made, and
//! makes a [`Dialogue`] for the control connection. It does no I/O, has no clock and no thread. Nothing else in this
//! library knows which wire it is: `Source` and `Target` take one, and speak [`Native`], version 1 of this library's
//! own, unless told otherwise.

mod native;
mod native_read;
pub mod read;
mod write;

use std::fmt;

use crate::memory::{Ram, RamBlock};
use crate::units::{BlockId, ChannelId, Round, SessionId};
use crate::wire::WireError;
use crate::wire::control::{BlockInfo, SourceFrame, TargetFrame};
use crate::wire::hello::Hello;

pub use native::{Native, NativeDialogue};
pub use native_read::NativeReader;
use read::PacketReader;
pub use write::{NativeWriter, PacketWriter, Place, Room, Zeros};

/// What is spoken on all connections of a migration.
///
/// Whoever writes one begins with [`Native`] or, where the wire is older than this library, with `qemu`, and looks at
/// `tests/framing_plug.rs`, which has one of its own: a session stands on the frames of [`crate::wire::control`], whatever
/// they look like on the wire.
///
/// # When not to use it
/// To change single messages: a framing is a whole language, and the peer must speak the same.
pub trait Framing: fmt::Debug + Send + Sync {
    /// How many bytes, in all, it takes to tell who is on a connection that has said this so far: no more than
    /// [`HELLO_BYTES`](crate::wire::hello::HELLO_BYTES), and as soon as it can be told no more than have been said.
    /// Nothing behind them is read before who it is has been told: what follows is for whoever gets the connection.
    fn hello_bytes(&self, said: &[u8]) -> usize;

    /// Who is on a connection that has said this much.
    ///
    /// # Errors
    /// Somebody who has no business here: why.
    fn who(&self, said: &[u8]) -> Result<Hello, String>;

    /// What a source says first on a connection that it has made.
    fn hello(&self, hello: &Hello) -> Vec<u8>;

    /// Whether a target answers the control connection's hello with one of its own.
    fn answers_hello(&self) -> bool;

    /// What to do about a peer that speaks TLS where this side does not.
    fn without_tls(&self) -> &'static str {
        "give --tls-dir here, too"
    }

    /// How many data channels there are, where both sides have agreed on that elsewhere, and data channels may come
    /// before the control connection; `None` where Setup says it. Where it is agreed on, nobody proves that a connection is
    /// of this migration: the source goes on behind the hello of every channel as soon as it has said Setup, without an
    /// answer, and is known by that.
    fn channels(&self) -> Option<u8>;

    /// Where it is agreed on: the channels of this session have been chosen. Others that claimed to be channels were
    /// strangers, and what they said of themselves counts for nothing.
    fn chosen(&self, session: SessionId) {
        let _ = session;
    }

    /// Whether the target says what has landed, and answers Pings: then digests can be compared, and a channel may be
    /// lost, and a session resumed.
    fn mends(&self) -> bool;

    /// What becomes of pages of this block that nobody has ever touched. [`Zeros::LeftOut`] if the target's are known to be
    /// zero before anything comes; [`Zeros::Named`] costs an entry of a table and no look at them, and [`Zeros::Data`] a
    /// look, which may bring them into being.
    fn untouched(&self, block: &RamBlock) -> Zeros {
        let _ = block;
        Zeros::LeftOut
    }

    /// The control connection at a source.
    fn at_source(&self) -> Box<dyn Dialogue<SourceFrame, TargetFrame>>;

    /// A data channel at a source, behind its hello.
    ///
    /// # Errors
    /// Why this memory cannot travel on this wire.
    fn packets(&self, ram: &Ram, channel: ChannelId) -> Result<Box<dyn PacketWriter>, Garbled>;

    /// The control connection at a target, from behind what [`Framing::who`] has seen.
    fn at_target(&self) -> Box<dyn Dialogue<TargetFrame, SourceFrame>>;

    /// A data channel at a target, from behind what [`Framing::who`] has seen. `joins_late` if the channel was connected
    /// before.
    fn reader(&self, blocks: &[BlockInfo], joins_late: bool) -> Box<dyn PacketReader>;

    /// Whether the control connection carries pages and round ends, too, so that the data channels wait for it, and it for
    /// them, at the end of each round: [`Heard::Barrier`].
    fn control_meets(&self) -> bool {
        false
    }

    /// Whether everything has come that must, once the last round has landed: `named` has, for each block, how many of its
    /// pages the source has spoken of.
    ///
    /// # Errors
    /// What is missing.
    fn is_complete(&self, _blocks: &[BlockInfo], _named: &[u64]) -> Result<(), String> {
        Ok(())
    }
}

/// One end of a control connection: puts this side's frames into bytes, and the peer's bytes into frames. A frame of
/// which the wire knows nothing is answered by the dialogue itself, as a peer would.
pub trait Dialogue<Out, In>: fmt::Debug + Send {
    /// Appends what this frame is on the wire to `out`: nothing, where the wire has no word for it.
    ///
    /// # Errors
    /// A frame that cannot be put into bytes. Then `out` is as it was.
    fn say(&mut self, frame: &Out, out: &mut Vec<u8>) -> Result<(), Garbled>;

    /// At a source: pages of this round are about to be sent. Every round is begun.
    ///
    /// # Errors
    /// What cannot be put into bytes.
    fn round_begins(&mut self, round: Round, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let _ = (round, out);
        Ok(())
    }

    /// Everything that was said so far is out: appends to `out` what comes next and had to wait for that, some of it.
    fn go_on(&mut self, out: &mut Vec<u8>) {
        let _ = out;
    }

    /// Takes bytes from the front of `input` until something is known; `None` once all of them are taken and nothing
    /// more is known.
    ///
    /// # Errors
    /// Bytes that make no sense: from then on, always the same.
    fn hear<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, In>>, Garbled>;

    /// Nothing more is here at present: all that was received has been heard.
    fn quiet(&mut self) {}

    /// Appends what this side must answer by itself to what was heard.
    fn reply(&mut self, _out: &mut Vec<u8>) {}

    /// Whether the peer has said so much that it is taken for the one that is waited for, should it leave now: where anybody
    /// can connect, others may come before.
    fn is_known(&self) -> bool {
        false
    }

    /// Whether something is known that [`Dialogue::hear`] would give without a single byte, if [`Dialogue::quiet`] has been
    /// said.
    fn has_news(&self) -> bool {
        false
    }

    /// The peer has ended the stream. `true` where that is how it is to end: what is known by now is asked for once more,
    /// and nothing else is waited for on this connection.
    ///
    /// # Errors
    /// A stream that ends in the middle of something.
    fn ended(&mut self) -> Result<bool, Garbled>;
}

/// What has come on a control connection.
#[derive(Debug)]
pub enum Heard<'i, In> {
    /// A frame.
    Frame(In),
    /// Some bytes of a page: they belong at this offset of the block, and lie within one page.
    Page {
        /// The block.
        block: BlockId,
        /// Where in the block, in bytes.
        offset: u64,
        /// The bytes.
        bytes: &'i [u8],
    },
    /// A page of zeros.
    Zero {
        /// The block.
        block: BlockId,
        /// The page.
        page: u64,
    },
    /// The end of a round on this connection: nothing behind it may land before everything of that round has landed, on
    /// all connections; and nothing of the next round may land elsewhere before this one has come.
    Barrier(Round),
}

/// Bytes that make no sense, or a frame that cannot be put into bytes: why, in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Garbled(pub String);

impl fmt::Display for Garbled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Garbled {}

impl From<WireError> for Garbled {
    fn from(e: WireError) -> Garbled {
        Garbled(e.to_string())
    }
}
