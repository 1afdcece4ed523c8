//! The rival of scattered pages, and of Unix sockets: the bare loop, over a list of pages that both sides know.
//!
//! As `bare.rs`: 4 KiB an iovec, 512 KiB a call, socket buffers as the system makes them, MSG_WAITALL straight into
//! place, a contiguous share of the list a channel, one thread a side and channel, one byte back when all has landed.
//! The receiver joins neighbours, so that a list of all pages is received as the bare loop receives them.
// UNSAFETY: sendmsg(2) and recvmsg(2) on memory of a RAM block, which is a pointer and a length.
#![expect(unsafe_code)]
// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::RamBlock;

/// Pages of one call: 512 KiB.
const CALL_PAGES: usize = 128;

/// What the pages travel over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    /// Loopback TCP.
    Tcp,
    /// Unix sockets.
    Unix,
}

impl Over {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Over::Tcp => "tcp",
            Over::Unix => "unix",
        }
    }

    /// By its name.
    ///
    /// # Panics
    /// If it is neither.
    pub fn named(name: &str) -> Over {
        [Over::Tcp, Over::Unix].into_iter().find(|over| over.name() == name).expect("it is tcp or unix")
    }

    /// Where a target may listen, in the library's words. No address is given twice.
    pub fn address(self) -> String {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        match self {
            Over::Tcp => "127.0.0.1:0".to_owned(),
            Over::Unix => {
                let name = format!("pageferry-bench-{}-{}", process::id(), COUNT.fetch_add(1, Relaxed));
                format!("unix:{}", std::env::temp_dir().join(name).display())
            }
        }
    }
}

/// One connection, of either sort.
pub trait Stream: Read + Write + AsRawFd + Send {}

impl<S: Read + Write + AsRawFd + Send> Stream for S {}

/// Where the receiving side waits.
pub enum Listener {
    /// On a port.
    Tcp(TcpListener),
    /// On a path, which goes with it.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens.
    pub fn bind(over: Over) -> io::Result<Listener> {
        let address = over.address();
        Ok(match address.strip_prefix("unix:") {
            Some(path) => Listener::Unix(UnixListener::bind(path)?, path.into()),
            None => Listener::Tcp(TcpListener::bind(address)?),
        })
    }

    /// Where to connect to.
    pub fn address(&self) -> io::Result<String> {
        match self {
            Listener::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Listener::Unix(_, path) => Ok(format!("unix:{}", path.display())),
        }
    }

    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Listener::Tcp(listener) => Ok(Box::new(listener.accept()?.0)),
            Listener::Unix(listener, _) => Ok(Box::new(listener.accept()?.0)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn connect(to: &str) -> io::Result<Box<dyn Stream>> {
    match to.strip_prefix("unix:") {
        Some(path) => Ok(Box::new(UnixStream::connect(path)?)),
        None => Ok(Box::new(TcpStream::connect(to)?)),
    }
}

/// A channel's share of a list.
fn share(pages: &[u64], channel: usize, channels: usize) -> &[u64] {
    &pages[pages.len() * channel / channels..pages.len() * (channel + 1) / channels]
}

/// Connects, and sends these pages. From the moment when everything was connected until the last acknowledgement, and
/// the system calls that moved pages.
///
/// # Errors
/// What the system says.
pub fn send(block: &RamBlock, pages: &[u64], to: &str, channels: usize) -> io::Result<(Duration, u64)> {
    let mut sockets = Vec::new();
    for channel in 0..channels {
        let mut socket = connect(to)?;
        socket.write_all(&[channel as u8])?;
        sockets.push(socket);
    }
    for socket in &mut sockets {
        socket.read_exact(&mut [0])?;
    }
    let start = Barrier::new(channels + 1);
    thread::scope(|scope| {
        let start = &start;
        let senders: Vec<_> = sockets
            .into_iter()
            .enumerate()
            .map(|(channel, mut socket)| {
                let pages = share(pages, channel, channels);
                scope.spawn(move || {
                    start.wait();
                    let begun = Instant::now();
                    let fd = socket.as_raw_fd();
                    // SAFETY: `in_calls` made every iovec of the message from a range of the block.
                    let calls = in_calls(block, pages, false, |message| unsafe {
                        libc::sendmsg(fd, message, libc::MSG_NOSIGNAL)
                    })?;
                    socket.read_exact(&mut [0])?;
                    Ok::<_, io::Error>((begun, Instant::now(), calls))
                })
            })
            .collect();
        start.wait();
        let mut syscalls = 0;
        let (mut first, mut last) = (None, None);
        for sender in senders {
            let (begun, ended, calls) = sender.join().expect("the loop does not panic")?;
            syscalls += calls;
            first = first.into_iter().chain([begun]).min();
            last = last.into_iter().chain([ended]).max();
        }
        let took = first.zip(last).map_or(Duration::ZERO, |(first, last)| last.duration_since(first));
        Ok((took, syscalls))
    })
}

/// Takes connections, and receives these pages; the system calls that moved them.
///
/// # Errors
/// What the system says.
pub fn receive(block: &RamBlock, pages: &[u64], listener: &Listener, channels: usize) -> io::Result<u64> {
    thread::scope(|scope| {
        let mut receivers = Vec::new();
        for _ in 0..channels {
            let mut socket = listener.accept()?;
            let mut channel = [0];
            socket.read_exact(&mut channel)?;
            let pages = share(pages, usize::from(channel[0]), channels);
            receivers.push(scope.spawn(move || {
                socket.write_all(&[0])?;
                let fd = socket.as_raw_fd();
                // SAFETY: as in `send`; the pages are this thread's alone.
                let calls =
                    in_calls(block, pages, true, |message| unsafe { libc::recvmsg(fd, message, libc::MSG_WAITALL) })?;
                socket.write_all(&[0])?;
                Ok::<u64, io::Error>(calls)
            }));
        }
        let mut syscalls = 0;
        for receiver in receivers {
            syscalls += receiver.join().expect("the loop does not panic")?;
        }
        Ok(syscalls)
    })
}

/// Makes `call` move all pages, 512 KiB of them at a time; how many calls that took.
fn in_calls(
    block: &RamBlock,
    pages: &[u64],
    join: bool,
    mut call: impl FnMut(&mut libc::msghdr) -> isize,
) -> io::Result<u64> {
    let mut calls = 0;
    let mut iovecs: Vec<libc::iovec> = Vec::with_capacity(CALL_PAGES);
    for pages in pages.chunks(CALL_PAGES) {
        iovecs.clear();
        for &page in pages {
            let range = block.range(page, 1).expect("a page of the block");
            match iovecs.last_mut() {
                Some(last) if join && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == range.ptr => {
                    last.iov_len += range.len;
                }
                _ => iovecs.push(libc::iovec { iov_base: range.ptr.cast(), iov_len: range.len }),
            }
        }
        let mut at = 0;
        while at < iovecs.len() {
            // SAFETY: msghdr is plain integers and pointers, for which all zeros is a valid value.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iovecs[at..].as_mut_ptr();
            message.msg_iovlen = (iovecs.len() - at) as _;
            let mut moved = match call(&mut message) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n if n < 0 => return Err(io::Error::last_os_error()),
                n => n as usize,
            };
            calls += 1;
            while at < iovecs.len() && moved >= iovecs[at].iov_len {
                moved -= iovecs[at].iov_len;
                at += 1;
            }
            if moved > 0 {
                iovecs[at].iov_base = iovecs[at].iov_base.cast::<u8>().wrapping_add(moved).cast();
                iovecs[at].iov_len -= moved;
            }
        }
    }
    Ok(calls)
}
