#![forbid(unsafe_code)]
//! A connection: a socket, and what encrypts it, if anything does.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::memory::gather::{Gather, Sent};
use crate::memory::scatter::Scatter;
use crate::net::tls::Session;
use crate::sys::socket::Socket;

/// A connection, as controllers and workers use it: by one thread at a time. Where it is encrypted, the first calls of
/// [`recv`](Self::recv) shake hands.
#[derive(Debug)]
pub struct Stream {
    socket: Arc<Socket>,
    tls: Option<Box<Session>>,
}

/// How a connection is encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Encryption {
    /// The cipher suite, by its name in RFC 8446.
    pub suite: &'static str,
    /// Whether it went on from an earlier connection, with neither certificates nor signatures.
    pub resumed: bool,
}

impl From<Socket> for Stream {
    fn from(socket: Socket) -> Stream {
        Stream::new(socket, None)
    }
}

impl Stream {
    /// A connection that this encrypts.
    pub(crate) fn new(socket: Socket, tls: Option<Session>) -> Stream {
        Stream { socket: Arc::new(socket), tls: tls.map(Box::new) }
    }

    /// The socket: to ask it, to wait for it, and to shut it down from another thread.
    pub fn socket(&self) -> &Arc<Socket> {
        &self.socket
    }

    /// Makes calls on it block, or not.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn set_nonblocking(&mut self, nonblocking: bool) -> io::Result<()> {
        self.socket.set_nonblocking(nonblocking)?;
        if let Some(tls) = &mut self.tls {
            tls.set_nonblocking(nonblocking);
        }
        Ok(())
    }

    /// Makes room for whole packets, where it needs any of its own: from then on nothing is allocated but what rustls
    /// allocates.
    pub fn make_room_for_pages(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.make_room_for_pages();
        }
    }

    /// Shakes hands on a non-blocking connection, as far as that goes without waiting. True once that is done, and all
    /// that it takes has been handed to the kernel.
    ///
    /// # Errors
    /// In words for a person: why the other end, or this one, is not trusted. Or what the system says.
    pub fn shake_hands(&mut self) -> io::Result<bool> {
        self.tls.as_mut().map_or(Ok(true), |tls| tls.shake_hands(&self.socket))
    }

    /// How it is encrypted, once hands have been shaken; `None` where it is not.
    pub fn encryption(&self) -> Option<Encryption> {
        self.tls.as_ref().and_then(|tls| tls.encryption())
    }

    /// Whether pages are encrypted by this process on their way: then they are copied.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Sends bytes of our own; may take fewer. Of what it took, some may wait: see [`unsent_bytes`](Self::unsent_bytes).
    ///
    /// # Errors
    /// What send(2) says. There is no SIGPIPE.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.send(bytes),
            Some(tls) => tls.send(&self.socket, bytes),
        }
    }

    /// Sends what was taken and waits, as far as the socket takes it.
    ///
    /// # Errors
    /// What send(2) says, `WouldBlock` apart.
    pub fn flush(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| tls.flush(&self.socket))
    }

    /// Bytes that were taken and wait for room in the socket.
    pub fn unsent_bytes(&self) -> usize {
        self.tls.as_ref().map_or(0, |tls| tls.unsent_bytes())
    }

    /// Receives into a buffer of our own; 0 is the end of the stream, however it came about: our own protocol says in
    /// each place whether the stream may end there.
    ///
    /// # Errors
    /// What recv(2) says; why hands were not shaken; bytes that somebody has changed on the way.
    pub fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.recv(bytes),
            Some(tls) => tls.recv_with(&self.socket, |plain| {
                let n = plain.len().min(bytes.len());
                bytes[..n].copy_from_slice(&plain[..n]);
                n
            }),
        }
    }

    /// Whether [`recv`](Self::recv) would give bytes that are here already: the socket is not readable for these.
    pub fn has_received(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_received())
    }

    /// Ends the sending direction, after what waits. True once that is done; to be called again until then.
    pub fn end_sending(&mut self) -> bool {
        if self.tls.as_mut().is_some_and(|tls| !tls.say_goodbye(&self.socket)) {
            return false;
        }
        self.socket.shutdown_write();
        true
    }

    /// Sends a packet whole on a blocking connection that is encrypted; `None` where it is not, as there is a choice then
    /// of how to hand it to the kernel.
    ///
    /// # Errors
    /// What send(2) says.
    pub fn send_encrypted(&mut self, packet: &mut Gather, head_len: usize) -> Option<io::Result<Sent>> {
        let tls = self.tls.as_mut()?;
        packet.begin(head_len);
        Some(tls.send_from(&self.socket, |room| packet.copy_some(room)))
    }

    /// Receives some of a packet, on a blocking connection; how many bytes, 0 at the end of the stream.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn receive(&mut self, packet: &mut Scatter) -> io::Result<usize> {
        match &mut self.tls {
            None => packet.receive(&self.socket),
            // What recvmsg(2) says of memory that it may not write.
            Some(_) if !packet.is_writable() => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Some(tls) => tls.recv_with(&self.socket, |plain| packet.fill(plain)),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The first byte of what a TLS server says to somebody who speaks none, and the version after it.
const TLS_ALERT: [u8; 2] = [21, 3];
/// The same, of what a TLS client says first.
const TLS_HANDSHAKE: [u8; 2] = [22, 3];

/// Whether these are the first bytes of a TLS connection: to tell a person what is wrong where none is expected.
pub(super) fn is_tls(first_bytes: &[u8]) -> bool {
    first_bytes.starts_with(&TLS_ALERT) || first_bytes.starts_with(&TLS_HANDSHAKE)
}
