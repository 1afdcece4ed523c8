//! The main connection at a source.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::opening::{Opening, words};
use super::zeros::{Unnamed, ZeroPages};
use super::{Sending, Shared};
use crate::framing::{Dialogue, Garbled, Heard};
use crate::qemu::framing::Qemu;
use crate::qemu::seen::{Counts, Seen};
use crate::qemu::wire::{Barrier, Dialect, MainEncoder, Record, ReturnDecoder, ReturnMessage};
use crate::units::{ChannelId, FIRST_GENERATION, InstanceId, Round};
use crate::wire::control::{ErrorCode, HEARD_THE_END, LanePong, PeerError, Setup, SourceFrame, TargetFrame};

/// Bytes of the end of a stream that are handed out at once.
const PIECE_BYTES: usize = 1 << 20;

/// A part of the section of RAM, with pages of zeros.
#[derive(Debug)]
struct Part {
    encoder: MainEncoder,
    zeros: Unnamed,
    begun: bool,
}

/// Puts a source's frames into a main stream, and answers those that QEMU's destination has no word for as it would.
///
/// The section of RAM is in parts, and each must be known to be the last or not when it is written. So that of a round is
/// written when the next one begins; that of the last one with the state, at Commit. Until then an attempt to hand over can
/// be taken back: nothing of it has left.
///
/// To QEMU 7.2 a part names the pages of zeros of its round, too. All of them stand before the barrier at its end: the next
/// round, in which any of them may be data, comes behind it; and in one round no page comes twice.
#[derive(Debug)]
pub(in crate::qemu) struct SourceDialogue {
    sending: Sending,
    shared: Arc<Shared>,
    seen: Seen,
    channels: u8,
    /// Stands behind the START section; there is none before Setup. Each part is written by a copy, and begins anew to name
    /// its blocks.
    encoder: Option<MainEncoder>,
    /// Rounds that have begun.
    rounds: u32,
    /// Parts of which all is known and not all is written.
    parts: VecDeque<Part>,
    decoder: ReturnDecoder,
    answers: VecDeque<TargetFrame>,
    /// The state of the devices, as it came so far.
    state: Vec<u8>,
    /// Everything behind the last round but one, once Final has said that this is all; and how much of it is out.
    ending: Vec<u8>,
    ending_out: usize,
    ending_zeros: u64,
    /// All of it is with the kernel.
    ended: bool,
    committed: bool,
    told: bool,
    /// The destination has asked for what nobody offered.
    asks_for_pages: bool,
}

impl SourceDialogue {
    pub(super) fn new(qemu: &Qemu) -> SourceDialogue {
        SourceDialogue {
            sending: qemu.sending.clone(),
            shared: qemu.sending.shared.clone(),
            seen: qemu.seen.clone(),
            channels: qemu.channels,
            encoder: None,
            rounds: 0,
            parts: VecDeque::new(),
            decoder: ReturnDecoder::new(),
            answers: VecDeque::new(),
            state: Vec::new(),
            ending: Vec::new(),
            ending_out: 0,
            ending_zeros: 0,
            ended: false,
            committed: false,
            told: false,
            asks_for_pages: false,
        }
    }

    /// The lanes that a session knows: one stands for the main connection where there are no channels.
    fn lanes(&self) -> impl Iterator<Item = ChannelId> + use<> {
        (0..self.channels.max(1)).map(ChannelId)
    }

    fn setup(&mut self, setup: &Setup, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let opening = Opening::new(setup, &self.sending, self.channels > 0)?;
        let (before, encoder) = (opening.before.clone(), opening.encoder.clone());
        let under_way = |_| Garbled("a Qemu is one migration, and this one is under way".to_owned());
        self.shared.opening.set(opening).map_err(under_way)?;
        out.extend_from_slice(&before);
        self.encoder = Some(encoder);
        if self.channels > 0 && self.sending.dialect == Dialect::V7_2 {
            let pages = setup.blocks.iter().map(|block| block.pages());
            self.shared.zeros.get_or_init(|| ZeroPages::new(pages));
        }
        self.answers.push_back(TargetFrame::Ready { instance: InstanceId([0; 16]), features: 0 });
        let joined = |channel| TargetFrame::ChannelJoined { channel, generation: FIRST_GENERATION };
        self.answers.extend(self.lanes().map(joined));
        Ok(())
    }

    /// The end of a part.
    fn close(&self, encoder: &mut MainEncoder, out: &mut Vec<u8>) -> Result<(), Garbled> {
        if self.channels > 0 && self.sending.barrier == Barrier::PerRound {
            encoder.encode(&Record::Flush, out).map_err(words)?;
        }
        encoder.encode(&Record::EndOfSection, out).map_err(words)?;
        encoder.encode(&Record::Footer, out).map_err(words)
    }

    /// Writes what is owed of parts, as far as `out` has room; the rest when that is out.
    fn write_parts(&mut self, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let before = out.len();
        let (mut named, mut barriers) = (0, 0);
        while let Some(mut part) = self.parts.pop_front() {
            if !std::mem::replace(&mut part.begun, true) {
                part.encoder.encode(&Record::RamPart, out).map_err(words)?;
            }
            let (more, all) = part.zeros.put(&mut part.encoder, out, PIECE_BYTES)?;
            named += more;
            if !all {
                self.parts.push_front(part);
                break;
            }
            self.close(&mut part.encoder, out)?;
            barriers += 1;
        }
        let main_bytes = (out.len() - before) as u64;
        self.seen.count(&Counts { main_bytes, zero_pages: named, barriers, ..Counts::default() });
        Ok(())
    }

    /// Everything that comes behind the rounds.
    fn end(&mut self) -> Result<(), Garbled> {
        let unready = || Garbled("Final came before Setup".to_owned());
        let mut encoder = self.encoder.clone().ok_or_else(unready)?;
        let mut ending = Vec::with_capacity(self.state.len() + 64);
        encoder.encode(&Record::RamEnd, &mut ending).map_err(words)?;
        if let (Some(zeros), Some(last)) = (self.shared.zeros.get(), self.rounds.checked_sub(1)) {
            // Not taken: should the attempt be, they belong to a part.
            (self.ending_zeros, _) = zeros.look(Round(last)).put(&mut encoder, &mut ending, usize::MAX)?;
        }
        self.close(&mut encoder, &mut ending)?;
        encoder.encode(&Record::Tail(&self.state), &mut ending).map_err(words)?;
        encoder.finish().map_err(words)?;
        (self.ending, self.ending_out) = (ending, 0);
        Ok(())
    }

    fn pong(&self, nonce: u64) -> TargetFrame {
        // Nobody says how far the destination is: what has left is taken to have landed.
        let lane = |channel| LanePong {
            channel,
            generation: FIRST_GENERATION,
            rounds_passed: u32::MAX,
            at_barrier: false,
            bytes: u64::MAX,
        };
        TargetFrame::Pong { nonce, lanes: self.lanes().map(lane).collect() }
    }

    fn shut(&mut self, error: u32) -> TargetFrame {
        self.told = true;
        let what = format!("the destination says that it failed (SHUT with error {error}): its own log says why");
        match (error, self.ended) {
            (0, true) => TargetFrame::Running,
            (0, false) => {
                let text = "the destination says that all is well before it has been sent everything".to_owned();
                TargetFrame::Error(PeerError { code: ErrorCode::Protocol, text })
            }
            (_, true) => TargetFrame::RunFailed { reason: what },
            // Not all of the state of the devices is out: no guest can run of it.
            (_, false) if self.committed => TargetFrame::RunFailed { reason: what },
            (_, false) => TargetFrame::Error(PeerError { code: ErrorCode::Guest, text: what }),
        }
    }
}

impl Dialogue<SourceFrame, TargetFrame> for SourceDialogue {
    fn say(&mut self, frame: &SourceFrame, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let before = out.len();
        match frame {
            SourceFrame::Setup(setup) => {
                self.setup(setup, out)?;
                let header = Opening::header().len();
                self.seen.count(&Counts { main_bytes: (out.len() - before + header) as u64, ..Counts::default() });
            }
            SourceFrame::State { offset, bytes } => {
                if *offset == 0 {
                    // Also how an attempt to hand over is taken back.
                    self.state.clear();
                    self.ending.clear();
                }
                self.state.extend_from_slice(bytes);
            }
            SourceFrame::Final(last) => {
                self.end()?;
                self.answers.push_back(TargetFrame::Loaded { round: last.round });
            }
            SourceFrame::Commit => {
                self.committed = true;
                self.seen.count(&Counts { zero_pages: self.ending_zeros, barriers: 1, ..Counts::default() });
            }
            SourceFrame::Ping { nonce: HEARD_THE_END } => {}
            SourceFrame::Ping { nonce } => self.answers.push_back(self.pong(*nonce)),
            // A stream that ends before its end says as much.
            SourceFrame::Cancel { .. } | SourceFrame::Error(_) => {}
            SourceFrame::ChannelLost { .. } | SourceFrame::ChannelJoin { .. } | SourceFrame::Repair { .. } => {}
            SourceFrame::Resume { .. } | SourceFrame::Query { .. } => {
                return Err(Garbled("QEMU has no word for it".to_owned()));
            }
        }
        Ok(())
    }

    fn round_begins(&mut self, round: Round, out: &mut Vec<u8>) -> Result<(), Garbled> {
        let encoder = self.encoder.clone().ok_or_else(|| Garbled("a round came before Setup".to_owned()))?;
        self.rounds = round.0 + 1;
        let Some(before) = round.0.checked_sub(1).map(Round) else {
            let start = self.shared.opening.get().map_or(&[][..], |opening| &opening.start);
            out.extend_from_slice(start);
            self.seen.count(&Counts { main_bytes: start.len() as u64, barriers: 1, ..Counts::default() });
            return Ok(());
        };
        // Without channels, what carries the pages has written it.
        if self.channels == 0 {
            return Ok(());
        }
        let zeros = self.shared.zeros.get().map(|zeros| zeros.take(before)).unwrap_or_default();
        self.parts.push_back(Part { encoder, zeros, begun: false });
        self.write_parts(out)
    }

    fn go_on(&mut self, out: &mut Vec<u8>) {
        if let Err(Garbled(text)) = self.write_parts(out) {
            self.answers.push_back(TargetFrame::Error(PeerError { code: ErrorCode::Protocol, text }));
        }
        if !self.committed || self.told || !out.is_empty() {
            return;
        }
        let left = &self.ending[self.ending_out..];
        let piece = &left[..left.len().min(PIECE_BYTES)];
        out.extend_from_slice(piece);
        self.ending_out += piece.len();
        self.seen.count(&Counts { main_bytes: piece.len() as u64, ..Counts::default() });
        self.ended = piece.is_empty();
        if self.ended && !self.sending.return_path {
            // Everything is with the kernel, and there is nobody to ask.
            self.told = true;
            self.answers.push_back(TargetFrame::Running);
        }
    }

    fn hear<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Heard<'i, TargetFrame>>, Garbled> {
        if let Some(answer) = self.answers.pop_front() {
            return Ok(Some(Heard::Frame(answer)));
        }
        while !self.asks_for_pages {
            let Some(message) = self.decoder.pull(input).map_err(words)? else { return Ok(None) };
            match message {
                ReturnMessage::Pong { .. } | ReturnMessage::SwitchoverAck => {}
                ReturnMessage::Shut { error } if !self.told => return Ok(Some(Heard::Frame(self.shut(error)))),
                ReturnMessage::Shut { .. } => {}
                ReturnMessage::RequestPages { .. } | ReturnMessage::ResumeAck { .. } => self.asks_for_pages = true,
            }
        }
        Err(Garbled("the destination asks for post-copy, which was not offered".to_owned()))
    }

    fn has_news(&self) -> bool {
        !self.answers.is_empty()
    }

    fn ended(&mut self) -> Result<bool, Garbled> {
        self.decoder.finish().map_err(words)?;
        Ok(false)
    }
}
