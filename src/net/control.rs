#![forbid(unsafe_code)]
//! The control connection: frames in and out of a non-blocking socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use crate::sys::socket::Socket;
use crate::wire::WireError;
use crate::wire::control::{Frame, FrameDecoder, FrameEncoder};
use crate::wire::hello::{HELLO_BYTES, Hello};

/// A control connection that sends frames of type `Out` and receives frames of type `In`.
#[derive(Debug)]
pub struct Control<Out, In> {
    socket: Socket,
    encoder: FrameEncoder<Out>,
    decoder: FrameDecoder<In>,
    hello: [u8; HELLO_BYTES],
    hello_got: usize,
    outbox: Vec<u8>,
    sent: usize,
    /// What was received last: allocated once.
    inbox: Box<[u8]>,
    heard: Instant,
    wire_bytes: u64,
}

/// Bytes read from the socket at once.
const READ_BYTES: usize = 64 << 10;
/// Bytes received in one call at the most: a peer that talks faster than we listen must not keep us from everything
/// else, a cancel and the time limits above all.
const RECEIVE_BYTES_MAX: usize = 16 * READ_BYTES;
/// Bytes that may wait for a peer to read them: a few times the device state that a source lets wait.
const OUTBOX_BYTES_MAX: usize = 16 << 20;

impl<Out: Frame, In: Frame> Control<Out, In> {
    /// Takes a connection whose Hellos have been exchanged.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (encoder, decoder) = (FrameEncoder::new(), FrameDecoder::new());
        let (outbox, sent, heard, wire_bytes) = (Vec::new(), 0, Instant::now(), 0);
        let (hello, hello_got) = ([0; HELLO_BYTES], 0);
        let inbox = vec![0; READ_BYTES].into_boxed_slice();
        Ok(Control { socket, encoder, decoder, hello, hello_got, outbox, sent, inbox, heard, wire_bytes })
    }

    /// The socket, to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// When the peer was last heard of.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// Counts the time until now as if the peer had been heard: for time that this side spent elsewhere.
    pub fn excuse_silence(&mut self) {
        self.heard = Instant::now();
    }

    /// Bytes sent and received.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Bytes that wait to be sent.
    pub fn unsent_bytes(&self) -> usize {
        self.outbox.len() - self.sent
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
        self.encoder.encode(frame, &mut self.outbox)?;
        self.flush().map_err(ControlError::Io)
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// What send(2) says; `QuotaExceeded` for a peer that has left so much unread that no more may wait for it.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.outbox.len() {
            match self.socket.send(&self.outbox[self.sent..]) {
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
                    if self.unsent_bytes() > OUTBOX_BYTES_MAX {
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
            match self.socket.recv(&mut self.hello[self.hello_got..]) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(n) => {
                    self.hello_got += n;
                    self.wire_bytes += n as u64;
                    self.heard = Instant::now();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(ControlError::Io(e)),
            }
        }
        Ok(Some(Hello::decode(&self.hello)?))
    }

    /// Receives what is there, up to a bound, and gives the frames that are complete.
    ///
    /// # Errors
    /// The end of the stream, what recv(2) says, or what the peer's bytes are not. Frames that were complete before it
    /// are given first, through `frames`.
    pub fn receive(&mut self, frames: &mut Vec<In>) -> Result<(), ControlError> {
        for _ in 0..RECEIVE_BYTES_MAX / READ_BYTES {
            match self.socket.recv(&mut self.inbox) {
                Ok(0) => {
                    self.decoder.finish()?;
                    return Err(ControlError::Closed);
                }
                Ok(n) => {
                    self.heard = Instant::now();
                    self.wire_bytes += n as u64;
                    let mut input = &self.inbox[..n];
                    while let Some(frame) = self.decoder.pull(&mut input)? {
                        frames.push(frame);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(ControlError::Io(e)),
            }
        }
        // What is left makes the next wait return at once.
        Ok(())
    }
}

/// Why a control connection failed.
#[derive(Debug)]
pub enum ControlError {
    /// The peer closed it.
    Closed,
    /// A system call failed.
    Io(io::Error),
    /// The bytes make no sense.
    Wire(WireError),
}

impl From<WireError> for ControlError {
    fn from(e: WireError) -> ControlError {
        ControlError::Wire(e)
    }
}

impl ControlError {
    /// As the reason why a frame could not be sent, where the peer has no part in it.
    pub fn own_mistake(&self) -> Option<crate::error::Failure> {
        match self {
            ControlError::Wire(e) => Some(crate::error::Failure::Config(format!("this cannot be sent: {e}"))),
            ControlError::Closed | ControlError::Io(_) => None,
        }
    }

    /// As the reason of a migration's failure, where the peer's bytes were received.
    pub fn into_failure(self, doing: &'static str) -> crate::error::Failure {
        use crate::error::{Failure, OsReason};
        match self {
            ControlError::Closed => {
                Failure::Control { doing, reason: OsReason { errno: None, text: "the peer closed it".to_owned() } }
            }
            ControlError::Io(e) => Failure::Control { doing, reason: e.into() },
            ControlError::Wire(e) => Failure::Protocol(e.to_string()),
        }
    }
}
