//! One outgoing packet: a header of our own and iovecs that point straight into guest RAM.
// UNSAFETY: iovecs are raw pointers into guest RAM, and sendmsg(2) is told to read through them.
#![expect(unsafe_code)]

use std::io;

use crate::memory::Ram;
use crate::memory::copy::copy_out;
use crate::sys::socket::{Handing, Socket};
use crate::units::Run;

/// The most iovecs one sendmsg(2) or recvmsg(2) takes on Linux (`UIO_MAXIOV`).
pub const IOVECS_MAX: usize = 1024;

/// A packet that is being built. Everything its iovecs point to is owned by it: the header buffer, and the RAM blocks
/// through its [`Ram`]. All storage is allocated when it is made.
#[derive(Debug)]
pub struct Gather {
    ram: Ram,
    head: Box<[u8]>,
    /// The first is kept for the header.
    iovecs: Vec<libc::iovec>,
    payload_bytes: usize,
    /// How far it has been sent: iovecs before this one are used up, and so many bytes are left.
    at: usize,
    left_bytes: usize,
}

// SAFETY: the pointers lead into `head` and into the blocks of `ram`, both of which move with it; the buffer behind a
// Box and the mappings behind `ram` stay where they are.
unsafe impl Send for Gather {}

/// What sending took, and of what has been sent in part, what it took so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sent {
    /// Bytes handed to the kernel, header and table included.
    pub bytes: usize,
    /// System calls it took.
    pub calls: u64,
}

impl Gather {
    /// An empty packet with room for a header and table of this many bytes.
    pub fn new(ram: Ram, head_bytes_max: usize) -> Gather {
        let head = vec![0; head_bytes_max].into_boxed_slice();
        let mut gather = Gather { ram, head, iovecs: Vec::with_capacity(IOVECS_MAX), payload_bytes: 0, at: 0, left_bytes: 0 };
        gather.clear();
        gather
    }

    /// Forgets what was pushed.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.iovecs.push(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });
        self.payload_bytes = 0;
        (self.at, self.left_bytes) = (0, 0);
    }

    /// Bytes of guest RAM pushed so far.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Whether one more run would still find an iovec.
    pub fn has_room(&self) -> bool {
        self.iovecs.len() < IOVECS_MAX
    }

    /// Appends a run's bytes. False if the run is not inside its block or no iovec is left; nothing is appended then.
    pub fn push(&mut self, run: &Run) -> bool {
        let range = self.ram.block(run.block).and_then(|b| b.range(run.first, u64::from(run.pages)));
        let Some(range) = range else { return false };
        // Neighbours in guest RAM share an iovec.
        if self.iovecs.len() > 1 {
            if let Some(last) = self.iovecs.last_mut() {
                if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == range.ptr {
                    last.iov_len += range.len;
                    self.payload_bytes += range.len;
                    return true;
                }
            }
        }
        if !self.has_room() {
            return false;
        }
        self.iovecs.push(libc::iovec { iov_base: range.ptr.cast(), iov_len: range.len });
        self.payload_bytes += range.len;
        true
    }

    /// The header buffer, to be filled in before [`Gather::send`].
    pub fn head_mut(&mut self) -> &mut [u8] {
        &mut self.head
    }

    /// Sends the first `head_len` bytes of the header buffer and then the payload, whole.
    ///
    /// # Errors
    /// What sendmsg(2) says; how much had gone out by then is not told, as the stream is lost anyway.
    pub fn send(&mut self, head_len: usize, socket: &Socket) -> io::Result<Sent> {
        self.begin(head_len);
        let mut sent = Sent::default();
        while self.left_bytes > 0 {
            sent.bytes += self.send_some(Handing::Copy, socket)?;
            sent.calls += 1;
        }
        Ok(sent)
    }

    /// Sends the first `head_len` bytes of the header buffer, which may be filled in anew after this, and nothing else:
    /// the payload must follow at once, by [`Gather::send_some`] until nothing is left.
    ///
    /// # Errors
    /// As [`Gather::send`].
    pub fn send_head(&mut self, head_len: usize, socket: &Socket) -> io::Result<Sent> {
        self.begin(head_len);
        let mut sent = Sent::default();
        while sent.bytes < head_len {
            // SAFETY: the first iovec is the header buffer, as `begin` has it; `advance` only shrinks it.
            let n = unsafe { socket.send_iovecs(&self.iovecs[..1], Handing::CopyMoreFollows) }?;
            sent.bytes += n;
            sent.calls += 1;
            self.advance_by(n);
        }
        Ok(sent)
    }

    /// Bytes that are left to be sent.
    pub fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    /// Sends some of what is left with one sendmsg(2), and says how much; after [`Gather::send_head`] that is payload.
    ///
    /// # Errors
    /// What sendmsg(2) says. Nothing has been sent by this call then: it may be tried in another way.
    pub fn send_some(&mut self, how: Handing, socket: &Socket) -> io::Result<usize> {
        // SAFETY: the first iovec is the header buffer, as `begin` has it; every other was made by `push` from a range that
        // RamBlock::range proved to be inside a block, which self.ram keeps mapped; `advance` only shrinks.
        let n = unsafe { socket.send_iovecs(&self.iovecs[self.at..], how) }?;
        self.advance_by(n);
        Ok(n)
    }

    /// Copies some of what is left, header first, into a buffer of our own, to be sent from there: after
    /// [`Gather::begin`], until it gives 0.
    pub(crate) fn copy_some(&mut self, into: &mut [u8]) -> usize {
        let mut copied = 0;
        while let Some(iovec) = self.iovecs.get(self.at).filter(|_| copied < into.len()) {
            let n = iovec.iov_len.min(into.len() - copied);
            // SAFETY: as in `send_some`: the header buffer, of which no borrow lives now, or guest RAM inside a block that
            // self.ram keeps mapped; `advance` only shrinks.
            unsafe { copy_out(iovec.iov_base.cast(), &mut into[copied..copied + n]) };
            copied += n;
            self.advance_by(n);
        }
        copied
    }

    /// Copies the payload, and forgets it: for a wire that sends something else in its place, from the header buffer. Guest
    /// RAM does not lie still meanwhile: what is torn is dirty, and travels again.
    ///
    /// # Panics
    /// If `into` has not the length of the payload.
    pub fn take_payload(&mut self, into: &mut [u8]) {
        assert_eq!(into.len(), self.payload_bytes);
        self.begin(0);
        self.copy_some(into);
        self.clear();
    }

    /// Copies the next bytes of the payload into this range of the header buffer: after [`Gather::begin`] with nothing of
    /// it, which may be filled in anew meanwhile.
    #[cfg(feature = "qemu")]
    pub(crate) fn copy_to_head(&mut self, range: std::ops::Range<usize>) {
        assert_eq!(self.iovecs[0].iov_len, 0, "the header is not to be read while it is written");
        let mut head = std::mem::take(&mut self.head);
        self.copy_some(&mut head[range]);
        self.head = head;
    }

    /// Begins to send the first `head_len` bytes of the header buffer, and then the payload.
    pub(crate) fn begin(&mut self, head_len: usize) {
        assert!(head_len <= self.head.len());
        self.iovecs[0] = libc::iovec { iov_base: self.head.as_mut_ptr().cast(), iov_len: head_len };
        (self.at, self.left_bytes) = (0, head_len + self.payload_bytes);
    }

    fn advance_by(&mut self, n: usize) {
        self.at += advance(&mut self.iovecs[self.at..], n);
        self.left_bytes -= n;
    }
}

/// Takes `n` bytes off the front of the list: shortens the iovec they end in, and tells how many are used up.
pub(super) fn advance(iovecs: &mut [libc::iovec], mut n: usize) -> usize {
    let mut used = 0;
    for iovec in iovecs.iter_mut() {
        if n < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(n).cast();
            iovec.iov_len -= n;
            break;
        }
        n -= iovec.iov_len;
        used += 1;
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovecs(lens: &[usize]) -> Vec<libc::iovec> {
        lens.iter().map(|&len| libc::iovec { iov_base: std::ptr::without_provenance_mut(4096), iov_len: len }).collect()
    }

    #[test]
    fn advance_stops_inside_and_between_iovecs() {
        let mut list = iovecs(&[64, 4096, 4096]);
        assert_eq!(advance(&mut list, 64 + 100), 1);
        assert_eq!((list[1].iov_len, list[1].iov_base.addr()), (3996, 4196));
        assert_eq!(advance(&mut list[1..], 3996), 1);
        assert_eq!(advance(&mut list[2..], 4096), 1);
    }

    #[test]
    fn advance_skips_empty_iovecs() {
        let mut list = iovecs(&[0, 16]);
        assert_eq!(advance(&mut list, 16), 2);
    }
}
