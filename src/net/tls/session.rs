#![forbid(unsafe_code)]
//! One connection's encryption: rustls between a socket and what is sent and received on it.
//!
//! # Copies
//! A page that is sent is copied out of guest RAM once (into `chunk`, as no slice of guest RAM may exist), by rustls into
//! the record in which it is encrypted in place, and with that into `out`, from which the kernel copies it. A page that is
//! received is decrypted where recv(2) has put it (`inbox`), copied by rustls into a piece of its own, and from there into
//! guest RAM. rustls' other interface would spare the copy into `out`, and take two more at the target.

use std::fmt;
use std::io;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus};
use rustls::{CommonState, Error, HandshakeKind};

use super::words::{self, Peer};
use crate::memory::gather::Sent;
use crate::net::Encryption;
use crate::sys::socket::Socket;

/// Bytes of one record, at the most: TLS allows no more.
const RECORD_BYTES: usize = 16 << 10;
/// What a record takes beside its bytes, and what rustls may send before it: a new key, an alert.
const RECORD_ROOM: usize = RECORD_BYTES + 1024;
/// Bytes received at once while hands are shaken, to begin with and at the most: a stranger is given no more. A
/// handshake message that is longer (chains of certificates) ends the connection.
const HANDSHAKE_BYTES: usize = 4 << 10;
const HANDSHAKE_BYTES_MAX: usize = 32 << 10;
/// The same on a control connection.
const CONTROL_BYTES: usize = 64 << 10;
/// The same on a data channel: what has been encrypted and not yet sent, or received and not yet decrypted, is still in
/// the second-level cache.
const PAGES_BYTES: usize = 128 << 10;

/// Which end this is.
pub(crate) enum Side {
    Source(UnbufferedClientConnection),
    Target(UnbufferedServerConnection),
}

/// A connection's encryption.
pub(crate) struct Session {
    side: Side,
    nonblocking: bool,
    /// What was received and not yet decrypted: from `inbox_at` to `inbox_end`.
    inbox: Vec<u8>,
    inbox_at: usize,
    inbox_end: usize,
    /// What was decrypted and not yet taken.
    plain: Vec<u8>,
    plain_at: usize,
    /// What was encrypted and not yet sent: from `out_at` to `out_end`.
    out: Vec<u8>,
    out_at: usize,
    out_end: usize,
    /// Where bytes of guest RAM are copied to, to be encrypted.
    chunk: Vec<u8>,
    received_bytes: u64,
    said_goodbye: bool,
    /// Why nothing more can be sent or received.
    failed: Option<String>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("to", &self.peer()).field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// What became of the bytes that were received so far.
enum Turn {
    /// So many decrypted bytes were taken.
    Took(usize),
    /// Something else happened.
    Again,
    /// More bytes are needed.
    Blocked,
    /// The other end sends nothing more.
    Ended,
}

impl Session {
    pub fn new(side: Side) -> Session {
        Session {
            side,
            nonblocking: true,
            inbox: vec![0; HANDSHAKE_BYTES],
            inbox_at: 0,
            inbox_end: 0,
            plain: Vec::new(),
            plain_at: 0,
            out: Vec::new(),
            out_at: 0,
            out_end: 0,
            chunk: Vec::new(),
            received_bytes: 0,
            said_goodbye: false,
            failed: None,
        }
    }

    pub fn set_nonblocking(&mut self, nonblocking: bool) {
        self.nonblocking = nonblocking;
    }

    pub fn make_room_for_pages(&mut self) {
        self.inbox.resize(PAGES_BYTES, 0);
        self.out.resize(PAGES_BYTES, 0);
        self.chunk.resize(RECORD_BYTES, 0);
        self.plain.reserve(RECORD_BYTES);
    }

    fn common(&self) -> &CommonState {
        match &self.side {
            Side::Source(conn) => conn,
            Side::Target(conn) => conn,
        }
    }

    fn peer(&self) -> Peer {
        match self.side {
            Side::Source(_) => Peer::Target,
            Side::Target(_) => Peer::Source,
        }
    }

    pub fn encryption(&self) -> Option<Encryption> {
        let common = self.common();
        let suite = common.negotiated_cipher_suite()?.suite().as_str()?;
        let resumed = common.handshake_kind()? == HandshakeKind::Resumed;
        (!common.is_handshaking()).then_some(Encryption { suite, resumed })
    }

    pub fn unsent_bytes(&self) -> usize {
        self.out_end - self.out_at
    }

    pub fn shake_hands(&mut self, socket: &Socket) -> io::Result<bool> {
        let mut asked = false;
        while self.common().is_handshaking() {
            match self.turn(socket, &mut |_: &[u8]| 0)? {
                Turn::Took(_) | Turn::Again => {}
                Turn::Blocked => {
                    self.flush_before_receiving(socket);
                    if asked {
                        return Ok(false);
                    }
                    asked = true;
                    match self.fill(socket) {
                        Ok(0) => return Err(self.hung_up()),
                        Ok(_) => {}
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                        Err(e) => return Err(e),
                    }
                }
                Turn::Ended => return Err(self.hung_up()),
            }
        }
        self.catch_up(socket)?;
        self.flush(socket)?;
        Ok(self.unsent_bytes() == 0)
    }

    /// Takes bytes as far as there is room for what becomes of them.
    pub fn send(&mut self, socket: &Socket, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        self.flush(socket)?;
        if self.unsent_bytes() > 0 || self.common().is_handshaking() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = bytes.len().min(RECORD_BYTES);
        self.seal(socket, &bytes[..n])?;
        self.flush(socket)?;
        Ok(n)
    }

    /// Sends whatever `fill` puts into the room it is given, until it puts nothing there. Counted is what it put there, as
    /// the other end counts: what is on its way is the difference between the two.
    pub fn send_from(&mut self, socket: &Socket, fill: impl FnMut(&mut [u8]) -> usize) -> io::Result<Sent> {
        let mut chunk = std::mem::take(&mut self.chunk);
        let sent = self.send_through(&mut chunk, socket, fill);
        self.chunk = chunk;
        sent
    }

    fn send_through(
        &mut self,
        chunk: &mut [u8],
        socket: &Socket,
        mut fill: impl FnMut(&mut [u8]) -> usize,
    ) -> io::Result<Sent> {
        let mut sent = Sent::default();
        loop {
            let n = fill(chunk);
            if n > 0 {
                self.seal(socket, &chunk[..n])?;
                sent.bytes += n;
            }
            if n == 0 || self.out.len() - self.out_end < RECORD_ROOM {
                while self.unsent_bytes() > 0 {
                    self.send_out(socket)?;
                    sent.calls += 1;
                }
            }
            if n == 0 {
                return Ok(sent);
            }
        }
    }

    /// Encrypts these bytes, one record's, into `out`.
    fn seal(&mut self, socket: &Socket, bytes: &[u8]) -> io::Result<()> {
        self.catch_up(socket)?;
        self.make_room(RECORD_ROOM);
        let Session { side, inbox, inbox_at, inbox_end, out, out_end, .. } = self;
        let (inbox, room) = (&mut inbox[*inbox_at..*inbox_end], &mut out[*out_end..]);
        *out_end += match side {
            Side::Source(conn) => seal(conn.process_tls_records(inbox), bytes, room),
            Side::Target(conn) => seal(conn.process_tls_records(inbox), bytes, room),
        }?;
        Ok(())
    }

    /// Does what is left to be done: rustls gives leave to send only after that.
    fn catch_up(&mut self, socket: &Socket) -> io::Result<()> {
        loop {
            match self.turn(socket, &mut |_: &[u8]| 0)? {
                Turn::Took(_) | Turn::Again => {}
                Turn::Blocked | Turn::Ended => return Ok(()),
            }
        }
    }

    /// Has so many bytes free at the end of `out`.
    fn make_room(&mut self, bytes: usize) {
        if self.out_at == self.out_end {
            (self.out_at, self.out_end) = (0, 0);
        }
        if self.out.len() - self.out_end < bytes {
            self.out.resize(self.out_end + bytes, 0);
        }
    }

    pub fn flush(&mut self, socket: &Socket) -> io::Result<()> {
        while self.unsent_bytes() > 0 {
            match self.send_out(socket) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// What the socket does not take is found again when it is received from, after all that the other end had to say
    /// before it left: that says more than a broken pipe.
    fn flush_before_receiving(&mut self, socket: &Socket) {
        let _ = self.flush(socket);
    }

    fn send_out(&mut self, socket: &Socket) -> io::Result<()> {
        let n = socket.send(&self.out[self.out_at..self.out_end])?;
        self.out_at += n;
        if self.out_at == self.out_end {
            (self.out_at, self.out_end) = (0, 0);
        }
        Ok(())
    }

    pub fn has_received(&self) -> bool {
        self.plain_at < self.plain.len() || has_record(&self.inbox[self.inbox_at..self.inbox_end])
    }

    /// Gives decrypted bytes to `take`, which says how many it took; 0 is the end of the stream. On a non-blocking
    /// connection it asks the socket once at the most: a peer that sends much that is nothing to us keeps nobody.
    pub fn recv_with(&mut self, socket: &Socket, mut take: impl FnMut(&[u8]) -> usize) -> io::Result<usize> {
        let mut asked = false;
        loop {
            if self.plain_at < self.plain.len() {
                let n = take(&self.plain[self.plain_at..]);
                self.plain_at += n;
                return Ok(n);
            }
            match self.turn(socket, &mut take)? {
                Turn::Took(0) | Turn::Again => {}
                Turn::Took(n) => return Ok(n),
                Turn::Ended => return Ok(0),
                Turn::Blocked => {
                    self.flush_before_receiving(socket);
                    if asked && self.nonblocking {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    asked = true;
                    if self.fill(socket)? == 0 {
                        return if self.common().is_handshaking() { Err(self.hung_up()) } else { Ok(0) };
                    }
                }
            }
        }
    }

    /// One recv(2) into `inbox`; 0 is the end of the stream.
    fn fill(&mut self, socket: &Socket) -> io::Result<usize> {
        if self.inbox.len() - self.inbox_end < RECORD_ROOM.min(self.inbox.len() / 2) {
            self.inbox.copy_within(self.inbox_at..self.inbox_end, 0);
            (self.inbox_at, self.inbox_end) = (0, self.inbox_end - self.inbox_at);
        }
        if self.inbox_end == self.inbox.len() {
            let limit = if self.common().is_handshaking() { HANDSHAKE_BYTES_MAX } else { CONTROL_BYTES };
            if self.inbox.len() >= limit {
                return Err(self.fail(format!("a message of TLS is longer than {limit} bytes")));
            }
            self.inbox.resize((2 * self.inbox.len()).min(limit), 0);
        }
        let n = match socket.recv(&mut self.inbox[self.inbox_end..]) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset && self.common().is_handshaking() => {
                return Err(self.hung_up());
            }
            received => received?,
        };
        self.inbox_end += n;
        self.received_bytes += n as u64;
        Ok(n)
    }

    /// Says that nothing more will be sent. True once that has been handed to the kernel, or cannot be.
    pub fn say_goodbye(&mut self, socket: &Socket) -> bool {
        if !self.said_goodbye && self.failed.is_none() && !self.common().is_handshaking() {
            self.said_goodbye = true;
            self.make_room(RECORD_ROOM);
            let Session { side, inbox, inbox_at, inbox_end, out, out_end, .. } = self;
            let inbox = &mut inbox[*inbox_at..*inbox_end];
            *out_end += match side {
                Side::Source(conn) => goodbye(conn.process_tls_records(inbox), &mut out[*out_end..]),
                Side::Target(conn) => goodbye(conn.process_tls_records(inbox), &mut out[*out_end..]),
            };
        }
        self.flush(socket).is_err() || self.unsent_bytes() == 0
    }

    /// Has rustls deal with what was received, up to the first thing that comes of it.
    fn turn(&mut self, socket: &Socket, take: &mut impl FnMut(&[u8]) -> usize) -> io::Result<Turn> {
        self.check()?;
        if self.plain_at == self.plain.len() {
            self.plain.clear();
            self.plain_at = 0;
        }
        let Session { side, inbox, inbox_at, inbox_end, plain, out, out_end, .. } = self;
        let filled = &mut inbox[*inbox_at..*inbox_end];
        let (discard, turn) = match side {
            Side::Source(conn) => handle(conn.process_tls_records(filled), take, plain, out, out_end),
            Side::Target(conn) => handle(conn.process_tls_records(filled), take, plain, out, out_end),
        };
        *inbox_at += discard;
        if inbox_at == inbox_end {
            (*inbox_at, *inbox_end) = (0, 0);
        }
        turn.map_err(|e| {
            self.encode_alert();
            let _ = self.flush(socket);
            self.fail(words::words(&e, self.peer()))
        })
    }

    /// What tells the other end why nothing will come of it. rustls has it ready, and is not to look at received bytes
    /// again: after an error it may have lost count of them.
    fn encode_alert(&mut self) {
        while self.common().wants_write() {
            let Session { side, plain, out, out_end, .. } = self;
            let mut none = |_: &[u8]| 0;
            let (_, encoded) = match side {
                Side::Source(conn) => handle(conn.process_tls_records(&mut []), &mut none, plain, out, out_end),
                Side::Target(conn) => handle(conn.process_tls_records(&mut []), &mut none, plain, out, out_end),
            };
            if encoded.is_err() {
                break;
            }
        }
    }

    fn check(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(io::Error::new(io::ErrorKind::InvalidData, why.clone())),
        }
    }

    fn fail(&mut self, why: String) -> io::Error {
        self.failed = Some(why.clone());
        io::Error::new(io::ErrorKind::InvalidData, why)
    }

    fn hung_up(&mut self) -> io::Error {
        let why = words::hung_up(self.peer(), self.received_bytes);
        self.failed = Some(why.clone());
        io::Error::new(io::ErrorKind::UnexpectedEof, why)
    }
}

/// Whether a record begins here and is all there.
fn has_record(bytes: &[u8]) -> bool {
    match bytes {
        [_, _, _, high, low, rest @ ..] => rest.len() >= usize::from(u16::from_be_bytes([*high, *low])),
        _ => false,
    }
}

/// Does what rustls asks for; how many received bytes it is done with, and what came of it.
fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    take: &mut impl FnMut(&[u8]) -> usize,
    plain: &mut Vec<u8>,
    out: &mut Vec<u8>,
    out_end: &mut usize,
) -> (usize, Result<Turn, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let turn = state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            let mut taken = 0;
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                let n = if plain.is_empty() { take(record.payload) } else { 0 };
                plain.extend_from_slice(&record.payload[n..]);
                taken += n;
            }
            Ok(Turn::Took(taken))
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let mut encoded = data.encode(&mut out[*out_end..]);
            if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = encoded {
                out.resize(*out_end + required_size, 0);
                encoded = data.encode(&mut out[*out_end..]);
            }
            *out_end += encoded.map_err(|e| Error::General(e.to_string()))?;
            Ok(Turn::Again)
        }
        // It goes out from where it is now, in order.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Turn::Again)
        }
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Turn::Ended),
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Ok(Turn::Blocked),
        _ => Err(Error::General("early data, which was not asked for".to_owned())),
    });
    (discard, turn)
}

/// Encrypts these bytes; rustls has nothing else to be done, and no more than there is room for.
fn seal<Data>(status: UnbufferedStatus<'_, '_, Data>, bytes: &[u8], room: &mut [u8]) -> io::Result<usize> {
    match status.state {
        Ok(ConnectionState::WriteTraffic(mut traffic)) => traffic.encrypt(bytes, room).map_err(|e| match e {
            EncryptError::InsufficientSize(_) => io::Error::other("internal error: no room for a record"),
            EncryptError::EncryptExhausted => io::Error::other("the keys of this connection are used up"),
        }),
        Ok(_) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the other end has closed the connection")),
        Err(e) => Err(io::Error::new(io::ErrorKind::InvalidData, e.to_string())),
    }
}

fn goodbye<Data>(status: UnbufferedStatus<'_, '_, Data>, room: &mut [u8]) -> usize {
    match status.state {
        Ok(ConnectionState::WriteTraffic(mut traffic)) => traffic.queue_close_notify(room).unwrap_or(0),
        _ => 0,
    }
}
