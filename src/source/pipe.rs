#![forbid(unsafe_code)]
//! Pages on the control connection, where there are no data channels: one worker puts them into bytes as ever, into a
//! socket whose other end is here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::net::Stream;
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::sys::socket::Socket;
use crate::units::Round;

/// Bytes taken from the worker at once.
const PIECE_BYTES: usize = 256 << 10;
/// Bytes that may wait for the control connection: beyond them the worker waits, as it would for a connection of its own.
const UNSENT_BYTES_MAX: usize = 2 << 20;

/// The end of the worker's connection.
pub(super) struct Pipe {
    stream: Stream,
    piece: Box<[u8]>,
    /// Whether nothing was in it when it was last looked at.
    dry: bool,
}

impl Pipe {
    /// And the worker's end.
    pub fn new() -> io::Result<(Pipe, Stream)> {
        let (here, there) = UnixStream::pair()?;
        let stream = |end: UnixStream| Socket::from_fd(OwnedFd::from(end)).map(Stream::from);
        let (mut here, there) = (stream(here)?, stream(there)?);
        here.set_nonblocking(true)?;
        Ok((Pipe { stream: here, piece: vec![0; PIECE_BYTES].into_boxed_slice(), dry: true }, there))
    }

    /// To be waited for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Driver<'_> {
    /// Takes what the worker has for the control connection, as far as that has room.
    pub fn carry(&mut self) -> Result<(), Over> {
        let (Some(pipe), Some(control)) = (&mut self.pipe, &mut self.control) else { return Ok(()) };
        // Asked anew: while there is no room, nobody knows.
        pipe.dry = false;
        if self.begins == Some(Round(0)) {
            return Ok(()); // what comes before all pages is not out
        }
        while control.unsent_bytes() < UNSENT_BYTES_MAX {
            // Its end is the worker's end, of which the crew knows why.
            let Ok(bytes @ 1..) = pipe.stream.recv(&mut pipe.piece) else {
                pipe.dry = true;
                break;
            };
            control.send_raw(&pipe.piece[..bytes]);
            // What the socket refuses is found again, by `receive`.
            if control.flush().is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Whether nothing was left when the worker was last asked.
    pub fn has_carried_all(&self) -> bool {
        self.pipe.as_ref().is_none_or(|pipe| pipe.dry)
    }

    /// Bytes of rounds that the control connection has not taken: pages, or what a target is told of a round. Nobody counts
    /// them among what is left, and a paused guest would wait for them. At least one, if nobody knows. Where a target says
    /// what has landed, they are next to nothing, and Pings are waited for.
    pub fn owed_on_control(&self) -> u64 {
        let unsent = self.control.as_ref().map_or(0, |control| control.unsent_bytes() as u64);
        if self.settings.framing.mends() { 0 } else { unsent + u64::from(!self.has_carried_all()) }
    }

    /// Whether what the worker has may be waited for: not while there is no room for it.
    pub fn has_room(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.unsent_bytes() < UNSENT_BYTES_MAX)
    }
}
