//! The script's end of a migration over real sockets: pipes that never block, and one wait for all of them.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::Timeouts;
use pageferry::sys::event::{EventFd, PollSet};
use pageferry::sys::socket::Socket;

/// How long either side may take to end once its peer has left. Far more than any limit that is set.
pub const IN_TIME: Duration = Duration::from_secs(8);

/// How long a script waits for an answer before it goes on without. One that has lied may well get none, and fuzzing is to
/// go on; an honest one gets it, however busy the machine is.
pub fn patience(lied: bool) -> Duration {
    Duration::from_millis(if lied { 4 } else { 280 })
}

/// Short limits: for the scripts that say nothing more and stay.
pub fn timeouts() -> Timeouts {
    let ms = Duration::from_millis;
    Timeouts { connect: ms(300), hello: ms(300), silence: ms(300), hook: ms(300), stall: ms(300) }
}

/// One end of a connection.
pub struct Pipe {
    socket: Option<Socket>,
    outbox: Vec<u8>,
    pub inbox: Vec<u8>,
    /// Whether the other side has left.
    pub ended: bool,
}

impl Pipe {
    /// A pipe, and the descriptor for its other end.
    pub fn pair() -> (Pipe, OwnedFd) {
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        let here = Socket::from_fd(here.into()).expect("a stream socket");
        here.set_nonblocking(true).expect("a socket that does not block");
        (Pipe { socket: Some(here), outbox: Vec::new(), inbox: Vec::new(), ended: false }, there.into())
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.outbox.extend_from_slice(bytes);
        self.flush();
    }

    fn flush(&mut self) {
        let Some(socket) = &self.socket else { return self.outbox.clear() };
        while !self.outbox.is_empty() {
            match socket.send(&self.outbox) {
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.outbox.clear(),
            }
        }
    }

    /// Takes what is there; true if there was something.
    fn read(&mut self) -> bool {
        let before = self.inbox.len();
        let mut bytes = [0; 16 << 10];
        while let (Some(socket), false) = (&self.socket, self.ended) {
            match socket.recv(&mut bytes) {
                Ok(0) => self.ended = true,
                Ok(n) => self.inbox.extend_from_slice(&bytes[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.ended = true,
            }
        }
        self.inbox.len() > before
    }

    /// Leaves.
    pub fn close(&mut self) {
        self.socket = None;
        self.ended = true;
    }
}

/// A wait for several pipes.
pub struct Waiter(PollSet);

impl Waiter {
    pub fn new() -> Waiter {
        Waiter(PollSet::new(Arc::new(EventFd::new().expect("an eventfd"))))
    }

    /// Waits for something to come, for so long at the most, and moves bytes both ways; true if something came.
    pub fn turn<'p>(&mut self, pipes: impl IntoIterator<Item = &'p mut Pipe>, patience: Duration) -> bool {
        let mut pipes: Vec<_> = pipes.into_iter().collect();
        self.0.clear();
        self.0.until(Instant::now() + patience);
        for pipe in pipes.iter().filter(|pipe| !pipe.ended) {
            if let Some(socket) = &pipe.socket {
                self.0.watch(socket.as_fd(), true, !pipe.outbox.is_empty());
            }
        }
        self.0.wait();
        let mut came = false;
        for pipe in &mut pipes {
            pipe.flush();
            let ended = pipe.ended;
            came |= pipe.read() || ended != pipe.ended;
        }
        came
    }
}
