//! The rival of `ship`: a bare loop of sendmsg(2) on one side and recv(2) on the other, and nothing else.
//!
//! **Frozen.** Figures are compared over time: whoever changes this loop changes what all of them mean.
//! 4 KiB an iovec, 512 KiB a call, socket buffers as the system makes them, MSG_WAITALL straight into place; each
//! channel ships a contiguous share of its own; one thread a side and channel; one byte back when all has landed.
// UNSAFETY: sendmsg(2) and recv(2) on memory of a RAM block, which is a pointer and a length.
#![expect(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::RamBlock;

/// Bytes of one iovec.
const PAGE: usize = 4096;
/// Bytes of one call.
const CALL: usize = 512 << 10;

/// What one side of a run took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// From the moment when everything was connected until the last channel's acknowledgement.
    pub time: Duration,
    /// System calls that moved pages.
    pub syscalls: u64,
}

/// A channel's share of a block: contiguous, as the loops need it.
#[derive(Clone, Copy)]
struct Share {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: a place in a block that outlives all threads of a run; what is done there says why it may be.
unsafe impl Send for Share {}

fn shares(block: &RamBlock, channels: usize) -> Vec<Share> {
    let pages = block.pages() / channels as u64;
    assert!(pages * channels as u64 == block.pages(), "the RAM does not divide by the channels");
    (0..channels as u64)
        .map(|channel| {
            let range = block.range(channel * pages, pages).expect("a share is inside the block");
            Share { ptr: range.ptr, len: range.len }
        })
        .collect()
}

/// Connects, and sends all of the block.
///
/// # Errors
/// What the system says.
pub fn send(block: &RamBlock, to: SocketAddr, channels: usize) -> io::Result<Taken> {
    let mut sockets = Vec::new();
    for channel in 0..channels {
        let mut socket = TcpStream::connect(to)?;
        socket.write_all(&[channel as u8])?;
        sockets.push(socket);
    }
    for socket in &mut sockets {
        socket.read_exact(&mut [0])?;
    }
    let start = Barrier::new(channels + 1);
    thread::scope(|scope| {
        let start = &start;
        let senders: Vec<_> = shares(block, channels)
            .into_iter()
            .zip(sockets)
            .map(|(share, socket)| {
                scope.spawn(move || {
                    start.wait();
                    send_share(share, socket)
                })
            })
            .collect();
        start.wait();
        let begun = Instant::now();
        let mut syscalls = 0;
        for sender in senders {
            syscalls += sender.join().expect("the loop does not panic")?;
        }
        Ok(Taken { time: begun.elapsed(), syscalls })
    })
}

fn send_share(share: Share, mut socket: TcpStream) -> io::Result<u64> {
    let (mut at, mut calls) = (0, 0);
    while at < share.len {
        let end = share.len.min(at + CALL);
        let mut iovecs = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; CALL / PAGE + 1];
        let (mut from, mut count) = (at, 0);
        while from < end {
            let to = end.min((from / PAGE + 1) * PAGE);
            // In bounds: from < end <= share.len.
            iovecs[count] = libc::iovec { iov_base: share.ptr.wrapping_add(from).cast(), iov_len: to - from };
            (from, count) = (to, count + 1);
        }
        // SAFETY: msghdr is plain integers and pointers, for which all zeros is a valid value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        message.msg_iovlen = count as _;
        // SAFETY: every iovec lies in the share, which is mapped; nobody writes to it meanwhile.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        at += sent as usize;
        calls += 1;
    }
    socket.read_exact(&mut [0])?;
    Ok(calls)
}

/// Takes connections, and receives all of the block.
///
/// # Errors
/// What the system says.
pub fn receive(block: &RamBlock, listener: &TcpListener, channels: usize) -> io::Result<Taken> {
    let shares = shares(block, channels);
    let begun = Instant::now();
    thread::scope(|scope| {
        let mut receivers = Vec::new();
        for _ in 0..channels {
            let (mut socket, _) = listener.accept()?;
            let mut channel = [0];
            socket.read_exact(&mut channel)?;
            let share = shares[usize::from(channel[0])];
            receivers.push(scope.spawn(move || receive_share(share, socket)));
        }
        let mut syscalls = 0;
        for receiver in receivers {
            syscalls += receiver.join().expect("the loop does not panic")?;
        }
        Ok(Taken { time: begun.elapsed(), syscalls })
    })
}

fn receive_share(share: Share, mut socket: TcpStream) -> io::Result<u64> {
    socket.write_all(&[0])?;
    let (mut at, mut calls) = (0, 0);
    while at < share.len {
        let len = CALL.min(share.len - at);
        // SAFETY: at + len <= share.len, all of which is mapped for writing and belongs to this thread alone.
        let got = unsafe { libc::recv(socket.as_raw_fd(), share.ptr.wrapping_add(at).cast(), len, libc::MSG_WAITALL) };
        match got {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if n < 0 => return Err(io::Error::last_os_error()),
            n => at += n as usize,
        }
        calls += 1;
    }
    socket.write_all(&[0])?;
    Ok(calls)
}
