//! One incoming packet: iovecs that point straight into guest RAM, and the next packet's header behind them.
// UNSAFETY: iovecs are raw pointers into guest RAM, and recvmsg(2) is told to write through them.
#![expect(unsafe_code)]

use std::io;

use crate::memory::{Ram, RamBlock, RawRange};
use crate::memory::gather::{IOVECS_MAX, advance};
use crate::sys::socket::Socket;
use crate::units::Run;

/// Makes pages zero. False if the block has no such pages, or may only be read.
pub fn write_zeros(block: &RamBlock, first: u64, pages: u64) -> bool {
    let range = if block.is_writable() { block.range(first, pages) } else { None };
    let Some(range) = range else { return false };
    // SAFETY: RamBlock::range proved that the range is inside the block, which its Ram keeps mapped, and for
    // writing, as checked above; no reference to guest RAM exists anywhere.
    unsafe { range.ptr.write_bytes(0, range.len) };
    true
}

/// Writes some bytes of a page, from byte `at` of the block on. False if they do not lie in one page of the block, or it
/// may only be read.
pub fn write_bytes(block: &RamBlock, at: u64, bytes: &[u8]) -> bool {
    let page_bytes = block.page_size().bytes();
    let within = at % page_bytes;
    let range = if block.is_writable() { block.range(at / page_bytes, 1) } else { None };
    let Some(range) = range.filter(|_| within + bytes.len() as u64 <= page_bytes) else { return false };
    // SAFETY: as in `write_zeros`, and the bytes end inside the page, as checked above. `bytes` is a buffer of our own.
    unsafe { range.ptr.add(within as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    true
}

/// A packet that is being received. The fixed header of the packet after it rides in the last iovec of the same call.
/// All storage is allocated when it is made.
#[derive(Debug)]
pub struct Scatter {
    ram: Ram,
    head: Box<[u8]>,
    /// Bytes of the header, if it is expected with this packet.
    head_bytes: usize,
    iovecs: Vec<libc::iovec>,
    at: usize,
    payload_bytes: usize,
    got: usize,
    /// Whether every run pushed so far is of memory that may be written.
    writable: bool,
}

// SAFETY: the pointers lead into `head` and into the blocks of `ram`, both of which move with it; the buffer behind a
// Box and the mappings behind `ram` stay where they are.
unsafe impl Send for Scatter {}

impl Scatter {
    /// An empty list, for packets with headers of this length.
    pub fn new(ram: Ram, header_bytes: usize) -> Self {
        let (head, iovecs) = (vec![0; header_bytes].into_boxed_slice(), Vec::with_capacity(IOVECS_MAX));
        Scatter { ram, head, head_bytes: 0, iovecs, at: 0, payload_bytes: 0, got: 0, writable: true }
    }

    /// Forgets what was pushed and received.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.at = 0;
        self.head_bytes = 0;
        self.payload_bytes = 0;
        self.got = 0;
        self.writable = true;
    }

    /// Appends a run that the next bytes of the stream belong in. False if it is not inside its block, or no iovec is
    /// left (one is kept for the header).
    pub fn push(&mut self, run: &Run) -> bool {
        let Some(block) = self.ram.block(run.block) else { return false };
        let Some(range) = block.range(run.first, u64::from(run.pages)) else { return false };
        self.writable &= block.is_writable();
        let has_room = self.iovecs.len() + 1 < IOVECS_MAX;
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == range.ptr => {
                last.iov_len += range.len;
            }
            _ if has_room => {
                self.iovecs.push(libc::iovec { iov_base: range.ptr.cast(), iov_len: range.len });
            }
            _ => return false,
        }
        self.payload_bytes += range.len;
        true
    }

    /// Where the bytes will go, neighbours joined. To be asked before the header is appended.
    pub(super) fn ranges(&self) -> impl Iterator<Item = RawRange> + '_ {
        self.iovecs.iter().map(|iovec| RawRange { ptr: iovec.iov_base.cast(), len: iovec.iov_len })
    }

    /// Appends the header buffer: call at most once, after the last run and before the first [`Scatter::receive`].
    pub fn expect_header(&mut self) {
        self.head_bytes = self.head.len();
        self.iovecs.push(libc::iovec { iov_base: self.head.as_mut_ptr().cast(), iov_len: self.head_bytes });
    }

    /// One recvmsg(2); how many bytes it brought, 0 at the end of the stream.
    ///
    /// # Errors
    /// What recvmsg(2) says.
    pub fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        // SAFETY: the last iovec may be the header buffer, which nobody borrows now; every other was made by `push` from
        // a range that RamBlock::range proved to be inside a block, which self.ram keeps mapped; no reference to guest
        // RAM exists anywhere; `advance` only shrinks.
        let n = unsafe { socket.recv_iovecs(&mut self.iovecs[self.at..]) }?;
        self.got += n;
        self.at += advance(&mut self.iovecs[self.at..], n);
        Ok(n)
    }

    /// Puts bytes where the next ones of the stream belong, as [`Scatter::receive`] does; how many found a place. None do
    /// where memory may only be read.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> usize {
        let mut put = 0;
        while let Some(iovec) = self.iovecs.get(self.at).filter(|_| self.writable && put < bytes.len()) {
            let n = iovec.iov_len.min(bytes.len() - put);
            // SAFETY: as in `receive`; and guest RAM is writable, as `push` saw. `bytes` is a buffer of our own, to which
            // no iovec points.
            unsafe { iovec.iov_base.cast::<u8>().copy_from_nonoverlapping(bytes[put..].as_ptr(), n) };
            put += n;
            self.got += n;
            self.at += advance(&mut self.iovecs[self.at..], n);
        }
        put
    }

    /// Whether memory that may only be read is among it: then nothing can be [filled](Scatter::fill) in.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Bytes of the runs that were pushed.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Bytes of the payload that have landed.
    pub fn landed(&self) -> usize {
        self.got.min(self.payload_bytes)
    }

    /// Whether the payload is all there, and the header, if it is expected.
    pub fn is_complete(&self) -> bool {
        self.got >= self.payload_bytes + self.head_bytes
    }

    /// As much of the header behind the payload as is there.
    pub fn header(&self) -> &[u8] {
        &self.head[..(self.got - self.landed()).min(self.head_bytes)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageSize;

    #[test]
    fn memory_that_may_only_be_read_is_not_zeroed() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let block = RamBlock::file("ro", 0, &file, 4096, PageSize::SIZE_4K, false).unwrap();
        assert!(!write_zeros(&block, 0, 1));
    }
}
