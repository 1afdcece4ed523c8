//! QEMU's main stream at a target: records in, frames out, and the few words of the return path.
//!
//! The stream is not a dialogue: the source goes on without an answer. What a source of this library would say only after
//! one is said here in its place: Final when the state of the devices is whole, and Commit when that was taken.

#![forbid(unsafe_code)]

use crate::framing::{Dialogue, Garbled, Heard};
use crate::qemu::seen::{Counts, Facts, Seen};
use crate::qemu::wire::{
    Barrier, Block, Command, Dialect, MAIN_MAGIC, MainDecoder, PAGE_BYTES, Record, ReturnMessage, StreamError,
};
use crate::units::{BlockId, ChannelId, Epoch, FIRST_GENERATION, PageSize, Round, Verify};
use crate::wire::control::{BlockInfo, Final, STATE_CHUNK_BYTES_MAX, Setup, SourceFrame, TargetFrame};
use crate::wire::crc::Crc32c;

/// Bytes of the magic and the version, which stand before the configuration.
const HEADER_BYTES: usize = 8;

/// What is said of a source that closed its main connection too early; why, it does not say.
const GAVE_UP: &str = "the source gave up or died in the middle of the stream";

/// The main connection of a target.
#[derive(Debug)]
pub struct TargetDialogue {
    decoder: MainDecoder,
    channels: u8,
    /// What this connection has said; until it has said Setup, nobody else sees it: it may be a stranger's.
    seen: Seen,
    public: Seen,
    /// Everything up to the end of the configuration, and how much of it is known to belong to that.
    head: Vec<u8>,
    head_bytes: usize,
    configured: bool,
    /// Barriers so far.
    barriers: u32,
    /// Where the next bytes of a page belong.
    page: (BlockId, u64),
    /// The last part of RAM has begun; nothing but the barrier has come since the last barrier.
    last_part: bool,
    flushed: bool,
    asked_to_switch: bool,
    state_bytes: u64,
    state_crc: Crc32c,
    /// The tail may end here.
    whole: bool,
    quiet: bool,
    ended: bool,
    final_said: bool,
    /// Commit is to be said.
    commit: bool,
    replies: Vec<u8>,
    shut: bool,
    failed: Option<Garbled>,
}

impl TargetDialogue {
    /// Behind the magic, which said whose connection it is.
    pub fn new(channels: u8, public: Seen) -> TargetDialogue {
        let seen = Seen::default();
        // What 7.2 does not say, 10.0 may: nothing else differs on this connection.
        let mut decoder = MainDecoder::new(Dialect::V10_0);
        // A part of a record: it gives nothing yet, and is not wrong.
        let _ = decoder.pull(&mut &MAIN_MAGIC[..]);
        seen.count(&Counts { main_bytes: MAIN_MAGIC.len() as u64, ..Counts::default() });
        TargetDialogue {
            decoder,
            channels,
            seen,
            public,
            head: MAIN_MAGIC.to_vec(),
            head_bytes: 0,
            configured: false,
            barriers: 0,
            page: (BlockId(0), 0),
            last_part: false,
            flushed: false,
            asked_to_switch: false,
            state_bytes: 0,
            state_crc: Crc32c::new(),
            whole: false,
            quiet: false,
            ended: false,
            final_said: false,
            commit: false,
            replies: Vec::new(),
            shut: false,
            failed: None,
        }
    }

    fn take<'i>(&mut self, record: Record<'i>) -> Result<Option<Heard<'i, SourceFrame>>, Garbled> {
        match record {
            Record::Header => {}
            Record::Machine(name) => {
                self.head_bytes = self.head.len();
                self.seen.learn(|facts| facts.machine = Some(name));
            }
            Record::Subsection(_) => self.head_bytes = self.head.len(),
            Record::Command(command) => {
                self.configured();
                self.command(&command)?;
            }
            Record::RamStart { section } => {
                self.configured();
                self.seen.learn(|facts| facts.section = section);
            }
            Record::Blocks(blocks) => return Ok(Some(Heard::Frame(SourceFrame::Setup(self.setup(blocks)?)))),
            Record::RamPart => self.flushed = false,
            Record::RamEnd => (self.last_part, self.flushed) = (true, false),
            Record::ZeroPage { block, offset } => {
                self.flushed = false;
                self.seen.count(&Counts { zero_pages: 1, ..Counts::default() });
                return Ok(Some(Heard::Zero { block: BlockId(block as u16), page: offset / PAGE_BYTES }));
            }
            Record::Page { block, offset } => {
                self.flushed = false;
                self.seen.count(&Counts { normal_pages: 1, ..Counts::default() });
                self.page = (BlockId(block as u16), offset);
            }
            Record::PageData(bytes) => {
                let (block, offset) = self.page;
                self.page.1 += bytes.len() as u64;
                return Ok(Some(Heard::Page { block, offset, bytes }));
            }
            Record::Flush if self.channels == 0 => {
                return Err(Garbled("the source sends its pages on channels, and none are taken here".to_owned()));
            }
            Record::Flush => return self.barrier().map(Some),
            Record::EndOfSection => {
                let barrier = self.decoder.barrier();
                self.seen.learn(|facts| facts.barrier = barrier);
                if barrier == Some(Barrier::PerSection) {
                    return self.barrier().map(Some);
                }
                if self.last_part && !self.flushed {
                    let at = self.decoder.at();
                    return Err(Garbled(format!("main stream, byte {at}: the END section of RAM ends without a flush word")));
                }
            }
            Record::Footer => {
                self.ask_to_switch();
                if self.last_part {
                    self.close()?;
                }
            }
            Record::Tail(bytes) => {
                (self.whole, self.quiet) = (false, false);
                let offset = self.state_bytes;
                self.state_bytes += bytes.len() as u64;
                self.state_crc.update(bytes);
                debug_assert!(bytes.len() <= STATE_CHUNK_BYTES_MAX, "no more is received at once");
                return Ok(Some(Heard::Frame(SourceFrame::State { offset, bytes: bytes.to_vec() })));
            }
            Record::TailWhole => self.whole = true,
            Record::Packaged(_) => return Err(post_copy("a package")),
        }
        Ok(None)
    }

    /// The last part of RAM has ended: every channel has come to its last SYNC.
    fn close(&self) -> Result<(), Garbled> {
        if !self.seen.close(u64::from(self.barriers) * u64::from(self.channels)) {
            return Err(Garbled("a packet came on a channel behind the last SYNC".to_owned()));
        }
        self.seen.numbers().check(self.channels).map_err(|why| Garbled(why.to_string()))
    }

    /// The configuration has ended, with the record before this one.
    fn configured(&mut self) {
        if !self.configured {
            self.configured = true;
            self.head.truncate(self.head_bytes);
            self.head.drain(..HEADER_BYTES.min(self.head_bytes));
            let configuration = self.head.clone();
            self.seen.learn(|facts| facts.configuration = configuration);
        }
    }

    fn command(&mut self, command: &Command) -> Result<(), Garbled> {
        match command {
            Command::OpenReturnPath => self.seen.learn(|facts| facts.return_path = true),
            Command::Ping { value } => self.answer(&ReturnMessage::Pong { value: *value }),
            // It may follow, and does not: a source that is not told to keeps to this way.
            Command::PostcopyAdvise { .. } | Command::SwitchoverStart => {}
            Command::PostcopyListen => return Err(post_copy("POSTCOPY_LISTEN")),
            Command::PostcopyRun => return Err(post_copy("POSTCOPY_RUN")),
            Command::PostcopyRamDiscard(_) => return Err(post_copy("POSTCOPY_RAM_DISCARD")),
            Command::Packaged { .. } => return Err(post_copy("PACKAGED")),
            Command::PostcopyResume => return Err(post_copy("POSTCOPY_RESUME")),
            Command::RecvBitmap(_) => return Err(post_copy("RECV_BITMAP")),
            Command::EnableColo => return Err(Garbled("the source wants COLO, in which both sides run".to_owned())),
        }
        Ok(())
    }

    fn setup(&mut self, blocks: Vec<Block>) -> Result<Setup, Garbled> {
        let info = |(index, block): (usize, &Block)| BlockInfo {
            id: BlockId(index as u16),
            name: block.name.as_str().to_owned(),
            guest_address: block.guest_address.unwrap_or(0),
            bytes: block.bytes,
            page_size: PageSize::SIZE_4K,
            backing_page_bytes: block.page_bytes.unwrap_or(PAGE_BYTES),
        };
        let infos = blocks.iter().enumerate().map(info).collect();
        let facts = self.seen.facts();
        let counts = self.seen.counts();
        self.seen = self.public.clone();
        // Of their callers and of the packets, the channels tell.
        self.seen.learn(|public| {
            let (dialect, compression, callers) = (public.dialect, public.compression, std::mem::take(&mut public.callers));
            *public = Facts { blocks, dialect, compression, callers, ..facts };
        });
        self.seen.count(&counts);
        Ok(Setup {
            verify: Verify::Off,
            channels: self.channels,
            features: 0,
            state_bytes_max: 0,
            blocks: infos,
            opaque: std::mem::take(&mut self.head),
        })
    }

    fn barrier(&mut self) -> Result<Heard<'static, SourceFrame>, Garbled> {
        self.flushed = true;
        let round = Round(self.barriers);
        self.barriers =
            self.barriers.checked_add(1).ok_or_else(|| Garbled("more rounds than can be counted".to_owned()))?;
        self.seen.count(&Counts { barriers: 1, ..Counts::default() });
        Ok(Heard::Barrier(round))
    }

    /// Lets the source stop its guest when it likes, as far as this side goes: it may have been told to wait for that. One
    /// from before QEMU 8.1 does not know the word, and gives up if it hears it. The first packets of the channels have been
    /// read by now; where there are none, the machine type says how old the source is at least, and no more can be known.
    fn ask_to_switch(&mut self) {
        if std::mem::replace(&mut self.asked_to_switch, true) {
            return;
        }
        let facts = self.seen.facts();
        let is_new = facts.machine.is_some_and(|machine| version(machine.as_str()) >= Some((8, 1)));
        if facts.barrier == Some(Barrier::PerRound) || facts.dialect == Some(Dialect::V10_0) || is_new {
            self.answer(&ReturnMessage::SwitchoverAck);
        }
    }

    /// Says something on the return path, if there is one.
    fn answer(&mut self, message: &ReturnMessage) {
        if self.decoder.return_path_is_open() {
            message.encode(&mut self.replies);
        }
    }

    fn shut(&mut self, error: u32) {
        if !std::mem::replace(&mut self.shut, true) {
            self.answer(&ReturnMessage::Shut { error });
        }
    }

    fn last(&mut self) -> SourceFrame {
        self.final_said = true;
        let described = self.decoder.dialect_of_description();
        self.seen.learn(|facts| facts.dialect = facts.dialect.or(described));
        let lanes = (0..self.channels).map(|id| (ChannelId(id), FIRST_GENERATION)).collect();
        SourceFrame::Final(Final {
            // There is one in the START section, in either mode.
            round: Round(self.barriers.saturating_sub(1)),
            epoch: Epoch(0),
            lanes,
            block_digests: Vec::new(),
            full_digests: Vec::new(),
            state_bytes: self.state_bytes,
            state_crc: std::mem::take(&mut self.state_crc).finish(),
        })
    }

    fn hear_next<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, SourceFrame>>, Garbled> {
        if !input.is_empty() {
            self.quiet = false;
        }
        if self.final_said && !input.is_empty() {
            return Err(self.behind_the_end());
        }
        loop {
            let before = *input;
            let record = self.decoder.pull(input).map_err(words)?;
            let taken = &before[..before.len() - input.len()];
            self.seen.count(&Counts { main_bytes: taken.len() as u64, ..Counts::default() });
            if !self.configured {
                self.head.extend_from_slice(taken);
            }
            let Some(record) = record else { break };
            if let Some(heard) = self.take(record)? {
                return Ok(Some(heard));
            }
        }
        // With a return path the connection stays open behind the end.
        let is_end = self.ended || (self.quiet && self.decoder.return_path_is_open());
        if is_end && std::mem::take(&mut self.commit) {
            return Ok(Some(Heard::Frame(SourceFrame::Commit)));
        }
        if self.whole && is_end && !self.final_said {
            return Ok(Some(Heard::Frame(self.last())));
        }
        Ok(None)
    }

    fn behind_the_end(&self) -> Garbled {
        Garbled(format!("main stream, byte {}: more bytes came behind the end", self.decoder.at()))
    }
}

impl Dialogue<TargetFrame, SourceFrame> for TargetDialogue {
    fn say(&mut self, frame: &TargetFrame, out: &mut Vec<u8>) -> Result<(), Garbled> {
        match frame {
            // Whatever came meanwhile is heard before it counts.
            TargetFrame::Loaded { .. } => (self.commit, self.quiet) = (true, false),
            TargetFrame::Running => self.shut(0),
            TargetFrame::Refused { .. }
            | TargetFrame::DigestMismatch { .. }
            | TargetFrame::RunFailed { .. }
            | TargetFrame::Discarded { .. }
            | TargetFrame::Error(_) => self.shut(1),
            // The source does not ask.
            TargetFrame::Ready { .. }
            | TargetFrame::EpochApplied { .. }
            | TargetFrame::ChannelFailed { .. }
            | TargetFrame::ChannelRetired { .. }
            | TargetFrame::ChannelJoined { .. }
            | TargetFrame::Pong { .. }
            | TargetFrame::QueryAnswer { .. } => {}
        }
        self.reply(out);
        Ok(())
    }

    fn hear<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, SourceFrame>>, Garbled> {
        match &self.failed {
            Some(why) => Err(why.clone()),
            None => self.hear_next(input).map_err(|why| self.failed.insert(why).clone()),
        }
    }

    fn quiet(&mut self) {
        self.quiet = true;
    }

    fn reply(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.replies);
    }

    fn is_known(&self) -> bool {
        self.configured
    }

    fn has_news(&self) -> bool {
        self.commit || (self.whole && !self.final_said && self.decoder.return_path_is_open())
    }

    fn ended(&mut self) -> Result<bool, Garbled> {
        self.decoder.finish().map_err(|e| Garbled(format!("{GAVE_UP} ({e})")))?;
        // With a return path the source should have waited; but it may have died while it did, and all of its guest is
        // here.
        self.ended = true;
        Ok(true)
    }
}

/// The version in the name of a machine type: that of the first QEMU that had it.
fn version(machine: &str) -> Option<(u32, u32)> {
    let (major, minor) = machine.rsplit('-').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn words(error: StreamError) -> Garbled {
    Garbled(error.to_string())
}

fn post_copy(what: &str) -> Garbled {
    Garbled(format!("{what} came: post-copy is not taken here; migrate without postcopy-ram"))
}

#[cfg(test)]
mod tests;
