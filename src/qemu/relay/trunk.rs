#![forbid(unsafe_code)]
//! The main connection, in both directions: what has come, what of it may be passed on, and what it said.

use std::collections::VecDeque;
use std::{fmt, io};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use super::passage::Passage;
use crate::error::{Failure, OsReason, Outcome};
use crate::gate::Gate;
use crate::progress::{ChannelCells, add};
use crate::qemu::wire::{
    Barrier, Block, Command, Dialect, MAIN_MAGIC, MainDecoder, PAGE_BYTES, Record, ReturnDecoder, ReturnMessage,
};
use crate::sys::event::PollSet;
use crate::sys::socket::Socket;

/// A place in the main stream that waits for the channels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hold {
    /// The first byte that waits.
    at: u64,
    /// SYNCs that every channel has passed on before.
    pub syncs: u64,
    /// RAM is complete behind it.
    pub closes: bool,
}

/// How far the destination has been given the tail: the state of the devices, the end mark 00, and mostly a description.
#[derive(Debug)]
struct Tail {
    /// Its first byte in the stream.
    from: u64,
    /// The last bytes that were passed on.
    window: [u8; 7],
    /// The beginning of what may be a description has been passed on.
    described: bool,
}

/// Pieces that are moved at once, and sections: somebody may want to end it meanwhile.
pub const TURNS_MAX: usize = 8;

impl Tail {
    const fn new(from: u64) -> Tail {
        Tail { from, window: [0xFF; 7], described: false }
    }

    fn passed_on(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.window.rotate_left(1);
            self.window[6] = *byte;
            self.described |= matches!(self.window, [0, 6, _, _, _, _, b'{']);
        }
    }

    /// Whether the end mark may be among what was passed on, if `next` comes behind it. A destination that has it runs the
    /// guest, even if the connection breaks within the description.
    fn may_be_over(&self, next: Option<u8>) -> bool {
        let is_mark = self.window[6] == 0 && matches!(next, None | Some(6));
        self.described || is_mark || self.window[1..].windows(2).any(|pair| pair == [0, 6])
    }
}

/// The main connection of a source, and that to the destination once there is one.
#[derive(Debug)]
pub struct Trunk {
    /// When it came.
    pub since: Instant,
    pub source: Arc<Socket>,
    pub destination: Option<Arc<Socket>>,
    there: Passage,
    back: Passage,
    decoder: MainDecoder,
    answers: ReturnDecoder,
    /// The source has asked for a sign of life.
    pinged: bool,
    /// The machine has been named: it is more than four bytes that make a source.
    pub is_source: bool,
    /// The first barrier has come, in the section START, and where all of them are. What is behind it in START may come
    /// much later: QEMU keeps it back.
    pub barrier: Option<Barrier>,
    /// Barriers that have come, for each of which every channel has one SYNC.
    pub barriers: u64,
    holds: VecDeque<Hold>,
    in_end: bool,
    tail: Option<Tail>,
    /// The last byte that has come.
    last: u8,
    /// The stream may end here: a description of the devices has been seen whole, and nothing behind it.
    is_whole: bool,
    end_passed_on: bool,
    /// Why the source hears nothing any more, though the destination may have the guest.
    deaf: Option<Failure>,
    shut: Option<u32>,
}

/// Room for the section START with as many blocks as there may be, and for many pages.
const THERE_BYTES: usize = 512 << 10;
const BACK_BYTES: usize = 8192;
/// Bytes of a word in the section of RAM.
const WORD_BYTES: u64 = 8;

impl Trunk {
    /// From behind the magic.
    pub fn new(source: Arc<Socket>) -> Result<Trunk, Failure> {
        let mut there = Passage::new(THERE_BYTES);
        there.begin_with(&MAIN_MAGIC);
        // QEMU 7.2 says nothing on this connection that 10.0 may not say.
        let mut decoder = MainDecoder::new(Dialect::V10_0);
        decoder.pull(&mut &MAIN_MAGIC[..]).map_err(|e| Failure::Protocol(e.to_string()))?;
        Ok(Trunk {
            since: Instant::now(),
            source,
            destination: None,
            there,
            back: Passage::new(BACK_BYTES),
            decoder,
            answers: ReturnDecoder::new(),
            pinged: false,
            is_source: false,
            barrier: None,
            barriers: 0,
            holds: VecDeque::new(),
            in_end: false,
            tail: None,
            last: 0,
            is_whole: false,
            end_passed_on: false,
            deaf: None,
            shut: None,
        })
    }

    /// The RAM blocks; none before they have come.
    pub fn blocks(&self) -> &[Block] {
        self.decoder.blocks()
    }

    /// Adds both ends to a poll set.
    pub fn watch(&self, set: &mut PollSet) {
        let mut watch = |socket: &Socket, from: &Passage, write: bool| {
            if from.wants_more() || write {
                set.watch(socket.as_fd(), from.wants_more(), write);
            }
            // Whoever gives up must not wait until there is room.
            if !from.wants_more() && !from.ended {
                set.watch_end(socket.as_fd());
            }
        };
        watch(&self.source, &self.there, self.back.has_pending() && self.deaf.is_none());
        if let Some(destination) = &self.destination {
            watch(destination, &self.back, self.there.has_pending());
        }
    }

    /// Whether it has nothing to pass on, and waits for the source.
    pub fn is_idle(&self) -> bool {
        self.there.wants_more() && !self.there.has_pending()
    }

    /// Whether the source has closed it.
    pub fn has_ended(&self) -> bool {
        self.there.ended
    }

    /// Whether the destination may run the guest: it has had an end mark, as far as anybody can tell that does not know the
    /// devices. QEMU can be told to leave the description out; then nothing comes behind the mark.
    pub fn may_run(&self) -> bool {
        self.tail.as_ref().is_some_and(|tail| tail.may_be_over(self.there.next_unsent()))
    }

    /// The destination is waited for, and the source hears nothing any more: why.
    pub fn deaf(&self) -> Option<&Failure> {
        self.deaf.as_ref()
    }

    /// Whether nothing is left to do but to wait for the destination.
    pub fn awaits_answer(&self) -> bool {
        self.tail.is_some() && self.there.is_empty()
    }

    /// How it ended, once it has.
    pub fn verdict(&self) -> Option<Outcome> {
        match self.shut {
            Some(_) if self.deaf.is_none() && self.back.has_pending() => None,
            Some(0) => Some(match &self.deaf {
                Some(why) => untold(why),
                None => Outcome::Completed,
            }),
            // It may have run the guest, and have missed only what describes it.
            Some(_) if self.deaf.is_some() && !self.is_whole && self.may_run() => self.deaf.clone().map(Outcome::Uncertain),
            Some(error) => Some(Outcome::Failed(Failure::Peer(format!("the destination said SHUT with error {error}")))),
            None if self.back.ended && self.is_whole && self.there.is_empty() && !self.has_return_path() => {
                Some(Outcome::Completed)
            }
            None => None,
        }
    }

    /// Whether the source has asked for a sign of life, and the destination has given none.
    pub fn awaits_pong(&self) -> bool {
        self.pinged && self.answers.at() == 0
    }

    /// Bytes that the source has said.
    pub fn received(&self) -> u64 {
        self.decoder.at()
    }

    /// Whether the source wants to be told how it ended.
    pub fn has_return_path(&self) -> bool {
        self.decoder.return_path_is_open()
    }

    /// Moves what can be moved without waiting.
    pub fn pump(&mut self, gate: &Gate, counts: &ChannelCells) -> Result<(), Failure> {
        for _ in 0..TURNS_MAX {
            // A destination that goes away says why before, if it can.
            let answered = self.destination.as_ref().map_or(Ok(0), |destination| self.back.receive(destination));
            if let Ok(answered) = answered {
                self.hear_answers(answered)?;
            }
            if self.shut == Some(0) && self.has_return_path() && self.source.is_spent() {
                // What is said now it would not hear.
                self.source_lost(broken("the source closed the main connection before the destination has answered"))?;
            }
            if self.deaf.is_none() {
                if let Err(e) = self.back.send(&self.source) {
                    self.source_lost(lost("answering the source", e))?;
                }
            }
            if self.shut.is_some() {
                return Ok(());
            }
            let answered = answered.map_err(|e| lost("waiting for the destination", e))?;
            if self.back.ended && self.verdict().is_none() {
                let text = match self.may_run() {
                    true => "the destination closed the main connection without an answer",
                    false => "the destination closed the main connection before the source's stream has ended",
                };
                return Err(broken(text));
            }
            let sent = self.pass_on(gate)?;
            add(&counts.wire_bytes, sent as u64);
            let had_ended = self.there.ended;
            let got = match self.there.receive(&self.source) {
                Ok(got) => got,
                Err(e) => {
                    self.there.ended = true;
                    self.source_lost(lost("reading the main stream", e))?;
                    0
                }
            };
            self.read(got, counts)?;
            if self.there.ended && !had_ended {
                self.check_end()?;
            }
            if self.there.ended && !self.end_passed_on && self.there.is_empty() {
                if let Some(destination) = &self.destination {
                    destination.shutdown_write();
                    self.end_passed_on = true;
                }
            }
            if answered == 0 && sent == 0 && got == 0 {
                break;
            }
        }
        Ok(())
    }

    /// The source has closed the connection, in order or not.
    fn check_end(&mut self) -> Result<(), Failure> {
        let unfinished = self.decoder.finish().err().map(|e| Failure::Protocol(e.to_string()));
        match unfinished {
            // A stream without a description may be whole.
            Some(why) if self.tail.is_some() && self.last == 0 => self.source_lost(why),
            Some(why) => Err(why),
            None if self.has_return_path() => {
                self.source_lost(broken("the source closed the main connection before the destination has answered"))
            }
            None => Ok(()),
        }
    }

    /// The source hears nothing any more. If the destination may get the guest all the same, its word is worth waiting for.
    fn source_lost(&mut self, why: Failure) -> Result<(), Failure> {
        if self.tail.is_none() {
            return Err(why);
        }
        self.deaf.get_or_insert(why);
        Ok(())
    }

    fn pass_on(&mut self, gate: &Gate) -> Result<usize, Failure> {
        let Some(destination) = &self.destination else { return Ok(0) };
        let (at, bytes) = self.there.pending();
        let Some(tail) = &mut self.tail else {
            return self.there.send(destination).map_err(|e| lost("passing the main stream on", e));
        };
        // Somewhere in the tail there is a byte from which on the destination may run the guest.
        if at + bytes.len() as u64 > tail.from && !gate.commit() {
            return Ok(0);
        }
        let sent = self.there.send(destination).map_err(|e| lost("passing the main stream on", e))?;
        let before = usize::try_from(tail.from.saturating_sub(at)).unwrap_or(usize::MAX).min(sent);
        tail.passed_on(self.there.newest_sent(sent - before));
        Ok(sent)
    }

    /// Looks at the last `got` bytes from the source.
    fn read(&mut self, got: usize, counts: &ChannelCells) -> Result<(), Failure> {
        let mut input = self.there.newest(got);
        self.last = input.last().copied().unwrap_or(self.last);
        while let Some(record) = self.decoder.pull(&mut input).map_err(|e| Failure::Protocol(e.to_string()))? {
            let word = self.decoder.at().saturating_sub(WORD_BYTES);
            match record {
                Record::Machine(_) => self.is_source = true,
                Record::Command(Command::Ping { .. }) => self.pinged = true,
                Record::Flush => {
                    self.barrier.get_or_insert(Barrier::PerRound);
                    self.barriers += 1;
                    self.holds.push_back(Hold { at: word, syncs: self.barriers, closes: false });
                }
                Record::EndOfSection => {
                    let is_barrier = *self.barrier.get_or_insert(Barrier::PerSection) == Barrier::PerSection;
                    self.barriers += u64::from(is_barrier);
                    if is_barrier || self.in_end {
                        self.holds.push_back(Hold { at: word, syncs: self.barriers, closes: self.in_end });
                    }
                }
                Record::RamEnd => self.in_end = true,
                Record::ZeroPage { .. } => add(&counts.zero_bytes, PAGE_BYTES),
                Record::Page { .. } => add(&counts.payload_bytes, PAGE_BYTES),
                Record::Tail(bytes) => {
                    self.is_whole = false;
                    let from = self.decoder.at() - bytes.len() as u64;
                    self.tail.get_or_insert(Tail::new(from));
                }
                Record::TailWhole => self.is_whole = true,
                Record::Packaged(_)
                | Record::Command(
                    Command::Packaged { .. }
                    | Command::PostcopyListen
                    | Command::PostcopyRun
                    | Command::PostcopyRamDiscard(_)
                    | Command::PostcopyResume
                    | Command::RecvBitmap(_)
                    | Command::EnableColo,
                ) => return Err(Failure::Protocol("the source goes over to post-copy, which is not relayed".into())),
                _ => {}
            }
        }
        self.approve();
        if self.destination.is_none() && self.barrier.is_none() && !self.there.wants_more() && !self.there.ended {
            return Err(Failure::Protocol("too much came before the first barrier".into()));
        }
        Ok(())
    }

    fn approve(&mut self) {
        self.there.approve(self.holds.front().map_or(self.decoder.at(), |hold| hold.at));
    }

    /// Where the stream waits for the channels.
    pub fn hold(&self) -> Option<Hold> {
        self.holds.front().copied()
    }

    /// The channels are there: the stream goes on to the next hold.
    pub fn let_go(&mut self) {
        self.holds.pop_front();
        self.approve();
    }

    /// Whether all of RAM has been named, and what comes now is the state of devices.
    pub fn is_in_end(&self) -> bool {
        self.in_end
    }

    fn hear_answers(&mut self, got: usize) -> Result<(), Failure> {
        if got > 0 && !self.has_return_path() {
            return Err(Failure::Protocol("the destination speaks, and nobody has opened the return path".into()));
        }
        let may_run = self.may_run();
        let mut input = self.back.newest(got);
        while let Some(message) = self.answers.pull(&mut input).map_err(|e| Failure::Protocol(e.to_string()))? {
            if let ReturnMessage::Shut { error } = message {
                if error == 0 && !may_run {
                    let text = "the destination said SHUT(0) before the source's stream has ended";
                    return Err(Failure::Protocol(text.to_owned()));
                }
                self.shut = Some(error);
                break;
            }
        }
        self.back.approve(self.answers.at());
        Ok(())
    }

    /// Tells the source that it keeps the guest, where it can be told and has not been; whether it was told anything.
    pub fn refuse(&mut self) -> bool {
        if !self.has_return_path() || self.shut.is_some() || self.deaf.is_some() {
            return false;
        }
        let mut bytes = Vec::new();
        ReturnMessage::Shut { error: 1 }.encode(&mut bytes);
        // A source that does not read does not learn it.
        self.back.end_with(&bytes, &self.source).is_ok()
    }
}

/// The destination has the guest, and the source may think that it has it, too.
pub fn untold(why: impl fmt::Display) -> Outcome {
    let text = format!("the destination has taken the guest, and the source does not know: {why}");
    Outcome::Uncertain(Failure::Control { doing: "telling the source", reason: OsReason { errno: None, text } })
}

fn lost(doing: &'static str, e: io::Error) -> Failure {
    Failure::Control { doing, reason: e.into() }
}

/// The main connection cannot be relayed any further.
pub fn broken(text: &str) -> Failure {
    Failure::Control { doing: "relaying", reason: OsReason { errno: None, text: text.to_owned() } }
}
