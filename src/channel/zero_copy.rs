#![forbid(unsafe_code)]
//! A channel's payload by reference: when it is worth it, what the kernel has not let go of yet, and when to stop.
//!
//! Header and table are copied, as ever, with MSG_MORE; the payload follows with MSG_ZEROCOPY. So nothing of ours has to
//! lie still until a completion comes. Guest RAM need not lie still either: a page that changes before the kernel reads
//! it is dirty, and travels again (INV-3: it is read after its bit was cleared, only later).

use std::io;

use crate::config::{WhyCopied, ZeroCopy};
use crate::memory::gather::{Gather, Sent};
use crate::net::Stream;
use crate::sys::socket::{Handing, Socket};
use crate::sys::zerocopy::Completion;

/// Smaller payloads are copied: to find and hold pages, and to read a completion, costs as much as to copy some 10 KiB,
/// says Documentation/networking/msg_zerocopy.rst; here another call comes on top, for the header.
const BYTES_MIN: usize = 32 << 10;
/// Sends that may be outstanding: the ledger has a bit for each. Each takes less than 1 KiB of the socket's option
/// memory, of which `net.core.optmem_max` allows 128 KiB today and allowed 20 KiB before Linux 6.8.
const SENDS_MAX: u32 = 64;
/// Bytes that may be outstanding. More than one connection has in flight with the usual `net.ipv4.tcp_wmem`, so that a
/// link is not kept waiting for completions; where that is set higher, this bounds what is pinned.
const BYTES_MAX: u64 = 32 << 20;
/// Completions are read when so many sends are outstanding, not one by one: the kernel joins neighbours.
const READ_AT: u32 = 4;
/// Sends running that the kernel copied after all, until they are no longer tried.
const COPIED_MAX: u32 = 2;
/// Refusals running until it is no longer tried.
const REFUSED_MAX: u32 = 8;

/// How a channel hands over its payload.
#[derive(Debug)]
pub struct ByReference {
    ledger: Ledger,
}

impl ByReference {
    /// Decides for a connected socket, and prepares it.
    ///
    /// # Errors
    /// With [`ZeroCopy::On`], why this socket cannot.
    pub fn new(asked: ZeroCopy, stream: &Stream) -> Result<ByReference, WhyCopied> {
        let why = match asked {
            ZeroCopy::Off => Some(WhyCopied::Asked),
            ZeroCopy::Auto => obstacle(stream, true),
            ZeroCopy::On => match obstacle(stream, false) {
                None => None,
                Some(why) => return Err(why),
            },
        };
        Ok(ByReference { ledger: Ledger::new(asked == ZeroCopy::On, why) })
    }

    /// Sends a packet whole, its payload by reference if that is worth it and can be had. It may wait for completions
    /// where too much is outstanding.
    ///
    /// # Errors
    /// As [`Gather::send`]; also where the connection ends while completions are waited for.
    pub fn send(&mut self, packet: &mut Gather, head_len: usize, stream: &mut Stream) -> io::Result<Sent> {
        if let Some(sent) = stream.send_encrypted(packet, head_len) {
            return sent;
        }
        let socket = &**stream.socket();
        let mut waiting_calls = 0;
        if self.ledger.wants(packet.payload_bytes()) {
            waiting_calls = self.make_room(socket)?;
        }
        // Asked again: what was just read may have settled it.
        if !self.ledger.wants(packet.payload_bytes()) {
            let sent = packet.send(head_len, socket)?;
            return Ok(Sent { calls: sent.calls + waiting_calls, ..sent });
        }
        let mut sent = packet.send_head(head_len, socket)?;
        sent.calls += waiting_calls;
        let mut refused = false;
        while packet.left_bytes() > 0 {
            let by_reference = !refused && !self.ledger.is_full();
            sent.calls += 1;
            match packet.send_some(if by_reference { Handing::ByReference } else { Handing::Copy }, socket) {
                Ok(n) => {
                    sent.bytes += n;
                    if by_reference {
                        self.ledger.sent(n);
                    }
                }
                Err(e) if by_reference && is_refusal(&e) => {
                    refused = true;
                    self.ledger.refused(&e);
                    sent.calls += self.read(socket)?.calls;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(sent)
    }

    /// Whether the kernel may still read guest RAM for sends that were made.
    pub fn is_outstanding(&self) -> bool {
        self.ledger.outstanding() > 0
    }

    /// Waits until the kernel has let go of everything. Gives the system calls it took.
    ///
    /// # Errors
    /// If the connection ends before that: then nobody will say.
    pub fn settle(&mut self, socket: &Socket) -> io::Result<u64> {
        let mut calls = 0;
        while self.is_outstanding() {
            calls += self.read_or_wait(socket)?;
        }
        Ok(calls)
    }

    /// Bytes sent by reference so far, and those of them that the kernel is known to have copied after all.
    pub fn counts(&self) -> (u64, u64) {
        (self.ledger.sent_bytes, self.ledger.copied_bytes)
    }

    /// Why payload is copied from now on, if it is.
    pub fn why_copied(&self) -> Option<WhyCopied> {
        self.ledger.why_copied
    }

    fn make_room(&mut self, socket: &Socket) -> io::Result<u64> {
        let mut calls = 0;
        if self.ledger.outstanding() >= READ_AT {
            calls += self.read(socket)?.calls;
        }
        while self.ledger.is_full() {
            calls += self.read_or_wait(socket)?;
        }
        Ok(calls)
    }

    fn read_or_wait(&mut self, socket: &Socket) -> io::Result<u64> {
        let mut read = self.read(socket)?;
        if read.completions == 0 {
            let hung_up = socket.wait_for_completion()?;
            let then = self.read(socket)?;
            read.calls += then.calls + 1;
            if then.completions == 0 {
                // It was something else that ended the wait: an error, or a shutdown, which is how an abort gets here.
                socket.take_error()?;
                if hung_up {
                    let what = "the connection ended before everything had been sent";
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, what));
                }
            }
        }
        Ok(read.calls)
    }

    /// Reads the completions that are there.
    fn read(&mut self, socket: &Socket) -> io::Result<Read> {
        let mut read = Read { completions: 0, calls: 1 };
        while let Some(completion) = socket.completion()? {
            self.ledger.completed(completion);
            read.completions += 1;
            read.calls += 1;
        }
        Ok(read)
    }
}

struct Read {
    completions: u64,
    calls: u64,
}

/// What stands against sending by reference on this socket; if nothing does, it has been allowed.
fn obstacle(stream: &Stream, only_where_it_pays: bool) -> Option<WhyCopied> {
    let socket = stream.socket();
    if stream.is_encrypted() {
        return Some(WhyCopied::Encrypted);
    }
    if !socket.is_tcp().unwrap_or(false) {
        return Some(WhyCopied::NotTcp);
    }
    if only_where_it_pays && socket.is_within_host() {
        return Some(WhyCopied::PeerIsHere);
    }
    socket.allow_zero_copy().err().map(|_| WhyCopied::Kernel)
}

/// Whether the kernel did not take these bytes by reference, and may by copy: ENOBUFS where it may hold no more, EFAULT
/// where it has no pages to hold (memory of a device), which a copy finds out again if nobody can read it; EOPNOTSUPP
/// where something was put on top of TCP that wants to see the bytes (kTLS, on a socket that the VMM has handed out).
fn is_refusal(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::EFAULT | libc::EOPNOTSUPP))
}

/// What one channel has outstanding, and what is to be learned from completions and refusals. It makes no calls.
#[derive(Debug)]
struct Ledger {
    /// Goes on although the kernel copies after all.
    insists: bool,
    why_copied: Option<WhyCopied>,
    /// The number of the oldest outstanding send, and that of the next one.
    first: u32,
    next: u32,
    /// Bit `i`: `first + i` is complete. Bit 0 is never set.
    done: u64,
    /// By number modulo its length.
    bytes: [u32; SENDS_MAX as usize],
    outstanding_bytes: u64,
    copied_running: u32,
    refused_running: u32,
    sent_bytes: u64,
    copied_bytes: u64,
}

impl Ledger {
    fn new(insists: bool, why_copied: Option<WhyCopied>) -> Ledger {
        Ledger {
            insists,
            why_copied,
            first: 0,
            next: 0,
            done: 0,
            bytes: [0; SENDS_MAX as usize],
            outstanding_bytes: 0,
            copied_running: 0,
            refused_running: 0,
            sent_bytes: 0,
            copied_bytes: 0,
        }
    }

    fn wants(&self, bytes: usize) -> bool {
        self.why_copied.is_none() && bytes >= BYTES_MIN
    }

    /// Sends from the oldest one that is not complete on.
    fn outstanding(&self) -> u32 {
        self.next.wrapping_sub(self.first)
    }

    fn is_full(&self) -> bool {
        self.outstanding() >= SENDS_MAX || self.outstanding_bytes >= BYTES_MAX
    }

    /// Only if it is not full.
    fn sent(&mut self, bytes: usize) {
        debug_assert!(!self.is_full());
        // One sendmsg sends less than 2 GiB.
        self.bytes[(self.next % SENDS_MAX) as usize] = bytes as u32;
        self.next = self.next.wrapping_add(1);
        self.outstanding_bytes += bytes as u64;
        self.sent_bytes += bytes as u64;
        self.refused_running = 0;
    }

    fn completed(&mut self, completion: Completion) {
        for ahead in 0..self.outstanding() {
            let number = self.first.wrapping_add(ahead);
            let in_range = number.wrapping_sub(completion.first) <= completion.last.wrapping_sub(completion.first);
            if !in_range || self.done >> ahead & 1 == 1 {
                continue;
            }
            self.done |= 1 << ahead;
            let bytes = u64::from(self.bytes[(number % SENDS_MAX) as usize]);
            self.outstanding_bytes -= bytes;
            if completion.copied {
                self.copied_bytes += bytes;
                self.copied_running += 1;
            } else {
                self.copied_running = 0;
            }
        }
        let complete = self.done.trailing_ones();
        self.done = self.done.checked_shr(complete).unwrap_or(0);
        self.first = self.first.wrapping_add(complete);
        if self.copied_running >= COPIED_MAX && !self.insists {
            self.why_copied.get_or_insert(WhyCopied::AfterAll);
        }
    }

    fn refused(&mut self, e: &io::Error) {
        let (why, refusals_max) = match e.raw_os_error() {
            Some(libc::EOPNOTSUPP) => (WhyCopied::Kernel, 1),
            Some(libc::EFAULT) => (WhyCopied::NoPages, REFUSED_MAX),
            _ => (WhyCopied::NoMemory, REFUSED_MAX),
        };
        self.refused_running += 1;
        if self.refused_running >= refusals_max {
            self.why_copied.get_or_insert(why);
        }
    }
}

#[cfg(test)]
mod tests;
