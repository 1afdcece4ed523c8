#![forbid(unsafe_code)]
//! The control connection: frames in and out of a non-blocking socket.

use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::error::{Failure, OsReason};
use crate::framing::{Dialogue, Garbled, Heard, NativeDialogue};
use crate::net::stream::{Stream, is_tls};
use crate::sys::event::PollSet;
use crate::sys::socket::Socket;
use crate::units::Round;
use crate::wire::control::Frame;
use crate::wire::hello::{HELLO_BYTES, Hello, Side};

/// A control connection that sends frames of type `Out` and receives frames of type `In`.
#[derive(Debug)]
pub struct Control<Out, In> {
    stream: Stream,
    dialogue: Box<dyn Dialogue<Out, In>>,
    hello: [u8; HELLO_BYTES],
    hello_got: usize,
    outbox: Vec<u8>,
    sent: usize,
    /// What was received last: allocated once.
    inbox: Box<[u8]>,
    /// The part of it that has not been heard yet.
    unheard: Range<usize>,
    /// The peer has ended the stream, and nothing more is to come.
    over: bool,
    heard: Instant,
    wire_bytes: u64,
}

/// Bytes received at once. No more, however much is there: a peer that talks faster than we listen must not keep us from
/// everything else, a cancel and the time limits above all; and tiny frames take several times their bytes in memory
/// until they are dealt with.
const RECEIVE_BYTES_MAX: usize = 64 << 10;
/// Bytes that may wait for a peer to read them. At a source, a few times the device state that it lets wait; at a target,
/// whose peer may be anybody, answers that no honest source leaves unread.
const fn outbox_bytes_max(sender: Side) -> usize {
    match sender {
        Side::Source => 16 << 20,
        Side::Target => 2 << 20,
    }
}

impl<Out: Frame, In: Frame> Control<Out, In> {
    /// Takes a connection that speaks this library's own wire, and whose Hellos have been exchanged.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn new(stream: impl Into<Stream>) -> io::Result<Self> {
        Control::speaking(stream, Box::new(NativeDialogue::new()))
    }
}

impl<Out: Frame, In: Frame> Control<Out, In> {
    /// Takes a connection that speaks this.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn speaking(stream: impl Into<Stream>, dialogue: Box<dyn Dialogue<Out, In>>) -> io::Result<Self> {
        let mut stream = stream.into();
        stream.set_nonblocking(true)?;
        let (outbox, sent, heard, wire_bytes) = (Vec::new(), 0, Instant::now(), 0);
        let (hello, hello_got) = ([0; HELLO_BYTES], 0);
        let inbox = vec![0; RECEIVE_BYTES_MAX].into_boxed_slice();
        let (unheard, over) = (0..0, false);
        Ok(Control { stream, dialogue, hello, hello_got, outbox, sent, inbox, unheard, over, heard, wire_bytes })
    }

    /// The socket, to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// When the peer was last heard of.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// Counts the time until now as if the peer had been heard: for time that this side spent elsewhere.
    pub fn excuse_silence(&mut self) {
        self.heard = Instant::now();
    }

    /// Whether the peer has ended the connection, whatever of it has not been heard yet.
    pub fn has_left(&self) -> bool {
        self.stream.socket().has_left()
    }

    /// Bytes sent and received.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Bytes that wait to be sent.
    pub fn unsent_bytes(&self) -> usize {
        self.outbox.len() - self.sent + self.stream.unsent_bytes()
    }

    /// Queues bytes that go before every frame: the Hello.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.outbox.extend_from_slice(bytes);
    }

    /// Queues a frame and sends what the socket takes.
    ///
    /// # Errors
    /// A frame that version 1 cannot carry, or what send(2) says.
    pub fn send(&mut self, frame: &Out) -> Result<(), ControlError> {
        self.dialogue.say(frame, &mut self.outbox)?;
        self.flush().map_err(ControlError::Io)
    }

    /// Says that pages of this round are about to be sent, and sends what the socket takes.
    ///
    /// # Errors
    /// As [`Control::send`].
    pub fn round_begins(&mut self, round: Round) -> Result<(), ControlError> {
        self.dialogue.round_begins(round, &mut self.outbox)?;
        self.flush().map_err(ControlError::Io)
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// What send(2) says; `QuotaExceeded` for a peer that has left so much unread that no more may wait for it.
    pub fn flush(&mut self) -> io::Result<()> {
        loop {
            self.flush_outbox()?;
            if self.unsent_bytes() > 0 {
                return Ok(());
            }
            self.dialogue.go_on(&mut self.outbox);
            if self.outbox.is_empty() {
                return Ok(());
            }
        }
    }

    fn flush_outbox(&mut self) -> io::Result<()> {
        self.stream.flush()?;
        while self.sent < self.outbox.len() {
            match self.stream.send(&self.outbox[self.sent..]) {
                Ok(n) => {
                    self.sent += n;
                    self.wire_bytes += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // Sent bytes are moved out of the way once they are the greater part, so that the cost stays linear.
                    if self.sent > self.outbox.len() / 2 {
                        self.outbox.drain(..self.sent);
                        self.sent = 0;
                    }
                    if self.unsent_bytes() > outbox_bytes_max(Out::SENDER) {
                        let what = format!("the peer does not read it: {} bytes wait", self.unsent_bytes());
                        return Err(io::Error::new(io::ErrorKind::QuotaExceeded, what));
                    }
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        self.outbox.clear();
        self.sent = 0;
        Ok(())
    }

    /// Receives the peer's Hello, which comes before its first frame; `None` while it is not all there.
    ///
    /// # Errors
    /// As [`Control::receive`].
    pub fn receive_hello(&mut self) -> Result<Option<Hello>, ControlError> {
        while self.hello_got < HELLO_BYTES {
            match self.stream.recv(&mut self.hello[self.hello_got..]) {
                Ok(0) if self.speaks_tls() => return Err(ControlError::SpeaksTls),
                Ok(0) => return Err(ControlError::Closed),
                Ok(n) => {
                    self.hello_got += n;
                    self.wire_bytes += n as u64;
                    self.heard = Instant::now();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(_) if self.speaks_tls() => return Err(ControlError::SpeaksTls),
                Err(e) => return Err(ControlError::Io(e)),
            }
        }
        Ok(Some(Hello::decode(&self.hello).map_err(Garbled::from)?))
    }

    /// Whether the peer has begun to speak TLS on a connection that has none.
    fn speaks_tls(&self) -> bool {
        !self.stream.is_encrypted() && is_tls(&self.hello[..self.hello_got])
    }

    /// Receives what is there, up to a bound, and gives the frames that are complete.
    ///
    /// # Errors
    /// The end of the stream, what recv(2) says, or what the peer's bytes are not. Frames that were complete before it
    /// are given first, through `frames`.
    pub fn receive(&mut self, frames: &mut Vec<In>) -> Result<(), ControlError> {
        self.hear(|heard| {
            if let Heard::Frame(frame) = heard {
                frames.push(frame);
            }
            ControlFlow::Continue(())
        })
    }

    /// Receives what is there, up to a bound, and hands over what it says, one by one, until `take` breaks off: what comes
    /// after that waits for the next call.
    ///
    /// # Errors
    /// As [`Control::receive`]. What was known before it has been handed over.
    pub fn hear(&mut self, mut take: impl FnMut(Heard<'_, In>) -> ControlFlow<()>) -> Result<(), ControlError> {
        let heard = self.hear_some(&mut take);
        self.dialogue.reply(&mut self.outbox);
        heard
    }

    fn hear_some(&mut self, mut take: &mut impl FnMut(Heard<'_, In>) -> ControlFlow<()>) -> Result<(), ControlError> {
        loop {
            if self.hear_inbox(&mut take)?.is_break() || self.over {
                return Ok(());
            }
            match self.stream.recv(&mut self.inbox) {
                Ok(0) => {
                    self.over = self.dialogue.ended().map_err(ControlError::CutOff)?;
                    if !self.over {
                        return Err(ControlError::Closed);
                    }
                }
                Ok(n) => {
                    self.heard = Instant::now();
                    self.wire_bytes += n as u64;
                    self.unheard = 0..n;
                    if self.hear_inbox(&mut take)?.is_break() {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.dialogue.quiet();
                    let _ = self.hear_inbox(&mut take)?;
                    break;
                }
                Err(e) => return Err(ControlError::Io(e)),
            }
            // What is here and not in the socket would be waited for in vain. It is no more than was received at once.
            if !self.stream.has_received() && !self.over {
                break;
            }
        }
        // What is left makes the next wait return at once.
        Ok(())
    }

    /// Hands over what the inbox says, and what is known without it.
    fn hear_inbox(
        &mut self,
        take: &mut impl FnMut(Heard<'_, In>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ControlError> {
        loop {
            let mut input = &self.inbox[self.unheard.clone()];
            let heard = self.dialogue.hear(&mut input);
            self.unheard.start = self.unheard.end - input.len();
            let Some(heard) = heard? else { return Ok(ControlFlow::Continue(())) };
            if take(heard).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    /// Whether the peer is taken for the one that is waited for: see [`Dialogue::is_known`].
    pub fn is_known(&self) -> bool {
        self.dialogue.is_known()
    }

    /// Whether the next call of [`Control::hear`] has something to hand over, whatever the socket says.
    pub fn has_news(&self) -> bool {
        !self.unheard.is_empty() || self.dialogue.has_news()
    }

    /// Whether the peer has said all that it had to say, and has ended its direction: nothing more is to be waited for.
    pub fn is_over(&self) -> bool {
        self.over
    }
}

impl<Out: Frame, In: Frame> Control<Out, In> {
    /// Says the last words and leaves: sends what is queued, closes this direction, and reads until the peer has closed
    /// the other, as closing with unread bytes would reset the connection and could take our last frames with it. Gives
    /// up after `limit`. Returns the bytes sent and received in all.
    pub fn farewell(mut self, set: &mut PollSet, limit: Duration) -> u64 {
        self.part(set, limit);
        self.wire_bytes
    }

    /// As [`Control::farewell`], for a side that stays to listen. Gives the last frame that the peer said meanwhile, and
    /// whether the connection went to its end without an error.
    pub fn part(&mut self, set: &mut PollSet, limit: Duration) -> (Option<In>, bool) {
        let until = Instant::now() + limit;
        let mut last = None;
        let mut closed = false;
        // The time is looked at after each read, too: a peer that never stops talking must not keep us.
        loop {
            if self.flush().is_err() {
                return (last, false);
            }
            if Instant::now() >= until {
                return (last, true);
            }
            if self.unsent_bytes() == 0 && !closed {
                closed = self.stream.end_sending();
            }
            match self.stream.recv(&mut self.inbox) {
                Ok(0) => return (last, true),
                Ok(n) => {
                    self.wire_bytes += n as u64;
                    // What makes no sense is no last word, and nobody is left to complain to.
                    let mut input = &self.inbox[..n];
                    while let Ok(Some(heard)) = self.dialogue.hear(&mut input) {
                        if let Heard::Frame(frame) = heard {
                            last = Some(frame);
                        }
                    }
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return (last, false),
            }
            set.clear();
            set.until(until);
            set.watch(self.stream.as_fd(), true, !closed);
            set.wait();
        }
    }

    /// After the last words: whether the peer takes them in, as [`is_taken_in`] has it.
    pub fn is_taken_in(&mut self, set: &mut PollSet, limit: Duration) -> bool {
        self.unsent_bytes() == 0 && is_taken_in(self.stream.socket(), set, limit)
    }
}

/// Waits until the peer's system has acknowledged all that it was sent, or `limit` is over. False if it has not, or has said
/// that nobody is there to read it.
///
/// What a system has taken in, a program that has just died does not read: there is no more to be known.
pub fn is_taken_in(socket: &Socket, set: &mut PollSet, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = socket.unacknowledged_bytes().unwrap_or(usize::MAX);
        if socket.take_error().is_err() {
            return false;
        }
        let now = Instant::now();
        if left == 0 || now >= until {
            return left == 0;
        }
        // Nothing can be waited for: no event says that bytes were acknowledged.
        set.clear();
        set.until(until.min(now + ACKNOWLEDGED_EVERY));
        set.wait();
    }
}

/// How often it is looked whether bytes were acknowledged.
const ACKNOWLEDGED_EVERY: Duration = Duration::from_millis(1);

/// Why a control connection failed.
#[derive(Debug)]
pub enum ControlError {
    /// The peer closed it.
    Closed,
    /// The peer began to speak TLS where nobody else does.
    SpeaksTls,
    /// A system call failed.
    Io(io::Error),
    /// The bytes make no sense.
    Garbled(Garbled),
    /// The peer closed it in the middle of something.
    CutOff(Garbled),
}

impl From<Garbled> for ControlError {
    fn from(e: Garbled) -> ControlError {
        ControlError::Garbled(e)
    }
}

impl ControlError {
    /// As the reason why a frame could not be sent, where the peer has no part in it.
    pub fn own_mistake(&self) -> Option<Failure> {
        match self {
            ControlError::Garbled(e) => Some(Failure::Config(format!("this cannot be sent: {e}"))),
            ControlError::Closed | ControlError::SpeaksTls | ControlError::Io(_) | ControlError::CutOff(_) => None,
        }
    }

    /// Whether the peer says what makes no sense; and not only that it has left.
    pub fn is_nonsense(&self) -> bool {
        matches!(self, ControlError::SpeaksTls | ControlError::Garbled(_))
    }

    /// As the reason of a migration's failure, where the peer's bytes were received.
    pub fn into_failure(self, doing: &'static str) -> Failure {
        match self {
            ControlError::Closed => {
                Failure::Control { doing, reason: OsReason { errno: None, text: "the peer closed it".to_owned() } }
            }
            ControlError::SpeaksTls => {
                let text = "the peer speaks TLS, and this side does not; give --tls-dir here, too".to_owned();
                Failure::Control { doing, reason: OsReason { errno: None, text } }
            }
            ControlError::Io(e) => Failure::Control { doing, reason: e.into() },
            ControlError::Garbled(e) | ControlError::CutOff(e) => Failure::Protocol(e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event::EventFd;
    use crate::wire::control::{FrameEncoder, SourceFrame, TargetFrame};
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    /// A control connection and a peer that says these bytes over and over, until the connection ends.
    fn beside_a_talker(words: Vec<u8>) -> (Control<TargetFrame, SourceFrame>, std::thread::JoinHandle<()>) {
        let (here, mut there) = UnixStream::pair().unwrap();
        let talker = std::thread::spawn(move || while there.write_all(&words).is_ok() {});
        (Control::new(Socket::from_fd(here.into()).unwrap()).unwrap(), talker)
    }

    #[test]
    fn what_one_look_receives_is_bounded_and_nothing_of_it_is_lost() {
        const PINGS: u64 = 100_000;
        let (here, mut there) = UnixStream::pair().unwrap();
        let (mut encoder, mut bytes) = (FrameEncoder::new(), Vec::new());
        (0..PINGS).for_each(|nonce| encoder.encode(&SourceFrame::Ping { nonce }, &mut bytes).unwrap());
        let talker = std::thread::spawn(move || there.write_all(&bytes));
        let socket = Socket::from_fd(here.into()).unwrap();
        let mut control = Control::<TargetFrame, SourceFrame>::new(socket).unwrap();
        let mut all = 0;
        while all < PINGS {
            let mut frames = Vec::new();
            // The end of the stream may come together with the last frames.
            let ended = control.receive(&mut frames).is_err();
            assert!(frames.len() * 24 <= RECEIVE_BYTES_MAX + 24, "{} frames at once", frames.len());
            all += frames.len() as u64;
            assert!(!ended || all == PINGS, "{all} of {PINGS} frames came");
        }
        talker.join().unwrap().unwrap();
    }

    #[test]
    fn a_peer_that_asks_and_does_not_read_ends_its_own_connection() {
        let (here, _there) = UnixStream::pair().unwrap();
        let mut control = Control::<TargetFrame, SourceFrame>::new(Socket::from_fd(here.into()).unwrap()).unwrap();
        let answer = TargetFrame::Discarded { reason: "x".repeat(1000) };
        let refused = (0..2 * outbox_bytes_max(Side::Target) / 1000).any(|_| control.send(&answer).is_err());
        assert!(refused && control.flush().is_err());
    }

    #[test]
    fn a_peer_that_never_stops_talking_does_not_hold_up_the_farewell() {
        let (control, talker) = beside_a_talker(vec![7; 1 << 20]);
        let begun = Instant::now();
        let mut set = PollSet::new(Arc::new(EventFd::new().unwrap()));
        control.farewell(&mut set, Duration::from_millis(50));
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        talker.join().unwrap();
    }
}
