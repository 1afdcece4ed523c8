#![forbid(unsafe_code)]
//! The main connection, in both directions: what has come, what of it may be passed on, and what it said.

use std::io;
use std::sync::Arc;

use crate::error::{Failure, OsReason};
use crate::gate::Gate;
use crate::qemu::wire::{
    Barrier, Block, Command, Dialect, MAIN_MAGIC, MainDecoder, Record, ReturnDecoder, ReturnMessage, StreamError,
};
use crate::sys::socket::Socket;

/// Bytes on their way from one socket to the other; none is sent before it was approved.
#[derive(Debug)]
struct Passage {
    bytes: Vec<u8>,
    sent: usize,
    approved: usize,
    filled: usize,
    /// Where in the stream the first of `bytes` stands.
    start: u64,
    ended: bool,
}

impl Passage {
    fn new(capacity: usize) -> Passage {
        Passage { bytes: vec![0; capacity], sent: 0, approved: 0, filled: 0, start: 0, ended: false }
    }

    fn has_pending(&self) -> bool {
        self.sent < self.approved
    }

    fn wants_more(&self) -> bool {
        !self.ended && !self.has_pending()
    }

    /// Receives what is there; the bytes that are new, none if none are.
    fn receive(&mut self, from: &Socket) -> io::Result<usize> {
        if !self.wants_more() {
            return Ok(0);
        }
        self.bytes.copy_within(self.approved..self.filled, 0);
        self.start += self.approved as u64;
        (self.sent, self.filled, self.approved) = (0, self.filled - self.approved, 0);
        match from.recv(&mut self.bytes[self.filled..]) {
            Ok(0) => self.ended = true,
            Ok(n) => {
                self.filled += n;
                return Ok(n);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        Ok(0)
    }

    /// Everything before this byte of the stream may be passed on.
    fn approve(&mut self, at: u64) {
        let upto = usize::try_from(at.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.approved = upto.clamp(self.approved, self.filled);
    }

    /// Sends what it may; how many bytes.
    fn send(&mut self, to: &Socket) -> io::Result<u64> {
        let before = self.sent;
        while self.has_pending() {
            match to.send(&self.bytes[self.sent..self.approved]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok((self.sent - before) as u64)
    }
}

/// Why it cannot go on.
#[derive(Debug)]
pub struct Broken {
    pub why: Failure,
    /// Whether the destination may have loaded the guest all the same.
    pub uncertain: bool,
}

impl From<Failure> for Broken {
    fn from(why: Failure) -> Broken {
        Broken { why, uncertain: false }
    }
}

impl From<StreamError> for Broken {
    fn from(e: StreamError) -> Broken {
        Broken::from(Failure::Protocol(e.to_string()))
    }
}

/// The main connection.
#[derive(Debug)]
pub struct Trunk {
    pub source: Arc<Socket>,
    pub destination: Arc<Socket>,
    there: Passage,
    back: Passage,
    decoder: MainDecoder,
    answers: ReturnDecoder,
    /// Bytes of the answers that have been looked at.
    answers_fed: u64,
    pub bytes: u64,
    pub normal_pages: u64,
    pub zero_pages: u64,
    /// Barriers that have come, for which each channel has one SYNC.
    pub barriers: u64,
    /// The last barrier has come.
    pub is_last: bool,
    /// The description of the devices has been seen whole.
    pub is_whole: bool,
    end_passed_on: bool,
    shut: Option<u32>,
    section_is_end: bool,
}

/// Room for the largest record, and for many pages.
const THERE_BYTES: usize = 512 << 10;
const BACK_BYTES: usize = 4096;

impl Trunk {
    /// From behind the magic, which is passed on at once.
    pub fn new(source: Arc<Socket>, destination: Arc<Socket>) -> Result<Trunk, Broken> {
        let mut there = Passage::new(THERE_BYTES);
        there.bytes[..MAIN_MAGIC.len()].copy_from_slice(&MAIN_MAGIC);
        (there.filled, there.approved) = (MAIN_MAGIC.len(), MAIN_MAGIC.len());
        // QEMU 7.2 says nothing on this connection that 10.0 may not say.
        let mut decoder = MainDecoder::new(Dialect::V10_0);
        decoder.pull(&mut &MAIN_MAGIC[..])?;
        Ok(Trunk {
            source,
            destination,
            there,
            back: Passage::new(BACK_BYTES),
            decoder,
            answers: ReturnDecoder::new(),
            answers_fed: 0,
            bytes: 0,
            normal_pages: 0,
            zero_pages: 0,
            barriers: 0,
            is_last: false,
            is_whole: false,
            end_passed_on: false,
            shut: None,
            section_is_end: false,
        })
    }

    /// The RAM blocks; none before they have come.
    pub fn blocks(&self) -> &[Block] {
        self.decoder.blocks()
    }

    /// What to wait for: whether to read from and write to the source, and to read from and write to the destination.
    pub fn wants(&self) -> [bool; 4] {
        [self.there.wants_more(), self.back.has_pending(), self.back.wants_more(), self.there.has_pending()]
    }

    /// Whether it is over: `Some(Ok)` if the destination has taken the guest.
    pub fn verdict(&self) -> Option<Result<(), Broken>> {
        match self.shut {
            Some(_) if self.back.has_pending() => None,
            Some(0) => Some(Ok(())),
            Some(error) => Some(Err(Failure::Peer(format!("the destination said SHUT with error {error}")).into())),
            None if self.end_passed_on && self.back.ended => Some(Ok(())),
            None => None,
        }
    }

    /// Moves what can be moved without waiting.
    pub fn pump(&mut self, gate: &Gate) -> Result<(), Broken> {
        let lost = |doing, e: io::Error, uncertain| Broken { why: Failure::Control { doing, reason: e.into() }, uncertain };
        loop {
            // A destination that goes away says why before, if it can.
            let answered = self.back.receive(&self.destination);
            self.hear_answers(gate)?;
            self.back.send(&self.source).map_err(|e| lost("answering the source", e, self.is_whole))?;
            if self.shut.is_some() {
                return Ok(());
            }
            let gone = |e: &io::Error| matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
            let back = answered.map_err(|e| {
                let uncertain = self.is_whole && !gone(&e);
                lost("waiting for the destination", e, uncertain)
            })?;
            if self.back.ended && !self.end_passed_on {
                let text = match self.is_whole {
                    true => "the destination closed the main connection without an answer",
                    false => "the destination closed the main connection before the source's stream has ended",
                };
                let reason = OsReason { errno: None, text: text.to_owned() };
                return Err(Failure::Control { doing: "relaying", reason }.into());
            }
            let sent = self.there.send(&self.destination).map_err(|e| {
                let uncertain = self.is_whole && !gone(&e);
                lost("passing the main stream on", e, uncertain)
            })?;
            self.bytes += sent;
            let got = self.there.receive(&self.source).map_err(|e| lost("reading the main stream", e, self.is_whole))?;
            self.read(got, gate)?;
            if self.there.ended && !self.end_passed_on && !self.there.has_pending() {
                self.decoder.finish()?;
                if self.decoder.return_path_is_open() {
                    let text = "the source closed the main connection before the destination has answered".to_owned();
                    let reason = OsReason { errno: None, text };
                    return Err(Broken { why: Failure::Control { doing: "relaying", reason }, uncertain: true });
                }
                self.destination.shutdown_write();
                self.end_passed_on = true;
            }
            if back == 0 && sent == 0 && got == 0 {
                return Ok(());
            }
        }
    }

    /// Looks at the last `got` bytes from the source.
    fn read(&mut self, got: usize, gate: &Gate) -> Result<(), Broken> {
        let mut input = &self.there.bytes[self.there.filled - got..self.there.filled];
        while let Some(record) = self.decoder.pull(&mut input)? {
            match record {
                Record::Flush => self.barriers += 1,
                Record::EndOfSection => {
                    self.barriers += u64::from(self.decoder.barrier() == Some(Barrier::PerSection));
                    self.is_last |= self.section_is_end;
                }
                Record::RamEnd => self.section_is_end = true,
                Record::ZeroPage { .. } => self.zero_pages += 1,
                Record::Page { .. } => self.normal_pages += 1,
                Record::TailWhole => {
                    // From here on the destination may run the guest.
                    if !gate.commit() {
                        return Ok(());
                    }
                    self.is_whole = true;
                }
                Record::Packaged(_)
                | Record::Command(
                    Command::Packaged { .. }
                    | Command::PostcopyListen
                    | Command::PostcopyRun
                    | Command::PostcopyRamDiscard(_)
                    | Command::PostcopyResume
                    | Command::RecvBitmap(_)
                    | Command::EnableColo,
                ) => return Err(Failure::Protocol("the source goes over to post-copy, which is not relayed".into()).into()),
                _ => {}
            }
        }
        self.there.approve(self.decoder.at());
        Ok(())
    }

    fn hear_answers(&mut self, gate: &Gate) -> Result<(), Broken> {
        let known = usize::try_from(self.answers_fed - self.back.start).unwrap_or_default();
        let mut input = &self.back.bytes[known.min(self.back.filled)..self.back.filled];
        self.answers_fed = self.back.start + self.back.filled as u64;
        if !input.is_empty() && !self.decoder.return_path_is_open() {
            return Err(Failure::Protocol("the destination speaks, and nobody has opened the return path".into()).into());
        }
        while let Some(message) = self.answers.pull(&mut input)? {
            if let ReturnMessage::Shut { error } = message {
                if error == 0 && !(self.is_whole && gate.commit()) {
                    let text = "the destination said SHUT(0) before the source's stream has ended";
                    return Err(Failure::Protocol(text.to_owned()).into());
                }
                self.shut = Some(error);
                break;
            }
        }
        self.back.approve(self.answers.at());
        Ok(())
    }

    /// Tells the source that it is over, where it can be told and has not been.
    pub fn refuse(&mut self) {
        if !self.decoder.return_path_is_open() || self.shut.is_some() {
            return;
        }
        let mut bytes = self.back.bytes[self.back.sent..self.back.approved].to_vec();
        ReturnMessage::Shut { error: 1 }.encode(&mut bytes);
        self.back.sent = 0;
        self.back.approved = bytes.len();
        self.back.filled = bytes.len();
        self.back.bytes = bytes;
        // A source that does not read does not learn it.
        let _ = self.back.send(&self.source);
    }
}
