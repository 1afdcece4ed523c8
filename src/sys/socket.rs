//! Stream sockets: connect without blocking, send and receive whole iovec lists, shut down.
// UNSAFETY: socket(2), connect(2), sendmsg(2), recvmsg(2), setsockopt(2), ioctl(2) and shutdown(2) are C calls.
#![expect(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{cvt, cvt_retry};

/// How bytes are handed to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Handing {
    /// It copies them before the call returns.
    Copy,
    /// The same; as more follows at once, it need not send a small packet now.
    CopyMoreFollows,
    /// It notes where they are and reads them when it sends them, once or again, and says so in the end: see
    /// [`Completion`](super::zerocopy::Completion). Only on a socket that allows it; any other copies.
    ByReference,
}

/// getsockname(2) or getpeername(2).
type AskAddress = unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

/// What a Unix socket within a host may hold on its way, where the system allows so much (`net.core.wmem_max`).
const UNIX_QUEUE_BYTES: libc::c_int = 1 << 20;
/// What it holds where nobody has asked for anything (`net.core.wmem_default`).
const UNIX_QUEUE_USUAL_BYTES: libc::c_int = 208 << 10;

/// What is at an end of a connection.
#[derive(PartialEq, Eq, Debug)]
enum Address {
    Unix,
    Ip(IpAddr),
    Other,
}

/// A connected stream socket: TCP, Unix, or any other that knows sendmsg and shutdown.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Takes a descriptor that must be a stream socket.
    ///
    /// # Errors
    /// `InvalidInput` for a pipe, a file or a datagram socket: those cannot be shut down, so an abort would not
    /// reach a thread that is blocked in them.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Socket> {
        match get_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE) {
            Ok(libc::SOCK_STREAM) => Ok(Socket(fd)),
            Ok(_) | Err(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a stream socket")),
        }
    }

    /// Starts connecting to a TCP address; the socket is non-blocking and becomes writable when it is done.
    ///
    /// # Errors
    /// What socket(2) or connect(2) say, `EINPROGRESS` apart.
    pub fn start_tcp(address: &SocketAddr) -> io::Result<Socket> {
        match address {
            SocketAddr::V4(a) => {
                let raw = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: a.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                    sin_zero: [0; 8],
                };
                start_connect(libc::AF_INET, (&raw const raw).cast(), size_of::<libc::sockaddr_in>())
            }
            SocketAddr::V6(a) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: a.port().to_be(),
                    sin6_flowinfo: a.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                    sin6_scope_id: a.scope_id(),
                };
                start_connect(libc::AF_INET6, (&raw const raw).cast(), size_of::<libc::sockaddr_in6>())
            }
        }
    }

    /// Starts connecting to a Unix socket; as [`Socket::start_tcp`].
    ///
    /// # Errors
    /// `InvalidInput` for a path too long for `sun_path`; else what socket(2) or connect(2) say.
    pub fn start_unix(path: &Path) -> io::Result<Socket> {
        let bytes = path.as_os_str().as_bytes();
        let mut raw = libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; 108] };
        if bytes.len() >= raw.sun_path.len() || bytes.contains(&0) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is too long for a Unix socket (107 bytes)"));
        }
        for (to, from) in raw.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        start_connect(libc::AF_UNIX, (&raw const raw).cast(), size_of::<libc::sockaddr_un>())
    }

    /// What became of a connect or of the connection: takes the pending error.
    ///
    /// # Errors
    /// The pending error, where there is one.
    pub fn take_error(&self) -> io::Result<()> {
        match get_option(self.0.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR)? {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Bytes that the system holds because the peer's system has not acknowledged them; over a Unix socket, because the
    /// peer has not read them.
    ///
    /// # Errors
    /// What ioctl(2) says.
    pub fn unacknowledged_bytes(&self) -> io::Result<usize> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: SIOCOUTQ, which has the number of TIOCOUTQ, writes one int, to a local.
        cvt(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCOUTQ as _, &raw mut bytes) }.into())?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Turns Nagle's algorithm off on a TCP socket; on others this does nothing. Few, whole writes need no help from
    /// it, and against a delayed ACK it costs 40 ms.
    pub fn set_no_delay(&self) {
        let _ = set_option(self.0.as_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    }

    /// Lets a TCP socket's send queue hold about this many bytes that have not been sent yet; what has been sent and
    /// waits for its acknowledgement does not count, so a long link stays full. On others this does nothing.
    pub fn set_unsent_max(&self, bytes: u32) {
        let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        let _ = set_option(self.0.as_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes);
    }

    /// Whether what is sent here arrives on this very host: a Unix socket, or a TCP connection between addresses of the
    /// loopback, or from an address to itself.
    pub fn is_within_host(&self) -> bool {
        match (self.address(libc::getsockname), self.address(libc::getpeername)) {
            (Ok(own), Ok(peer)) => match (own, peer) {
                (Address::Unix, _) => true,
                (Address::Ip(own), Address::Ip(peer)) => own == peer || (own.is_loopback() && peer.is_loopback()),
                _ => false,
            },
            _ => false,
        }
    }

    /// Prepares the sending end of a connection within a host, where there is no link to be spared; what the system does
    /// not allow is left as it is.
    ///
    /// TCP: sends whenever the window allows it. Some congestion controls (BBR) pace all the same, with a timer for every
    /// few packets; Reno is in every kernel, and allowed to everybody (tcp(7), `tcp_allowed_congestion_control`).
    /// Unix: lets more be on its way than the 208 KiB that are usual, so that fewer batches are cut into pieces.
    pub fn tune_within_host(&self) {
        let name = b"reno";
        // SAFETY: the pointer and the length are those of a live slice; the call copies it.
        let tcp = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_CONGESTION,
                name.as_ptr().cast(),
                name.len() as libc::socklen_t,
            ) == 0
        };
        let unix = !tcp && self.address(libc::getsockname).is_ok_and(|own| own == Address::Unix);
        // One that somebody made small stays small.
        let queue = get_option(self.0.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap_or(0);
        if unix && (UNIX_QUEUE_USUAL_BYTES..UNIX_QUEUE_BYTES).contains(&queue) {
            let _ = set_option(self.0.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, UNIX_QUEUE_BYTES);
        }
    }

    /// The address of the machine at the other end; `None` for a Unix socket, and for one that has no peer any more.
    pub fn peer_ip(&self) -> Option<IpAddr> {
        match self.address(libc::getpeername) {
            Ok(Address::Ip(ip)) => Some(ip),
            _ => None,
        }
    }

    /// One end's address.
    fn address(&self, ask: AskAddress) -> io::Result<Address> {
        // SAFETY: sockaddr_storage is plain integers, for which all zeros is a valid value.
        let mut raw: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        // SAFETY: both pointers are to locals, and `len` is the size of the storage.
        cvt(unsafe { ask(self.0.as_raw_fd(), (&raw mut raw).cast(), &raw mut len) }.into())?;
        let storage = &raw const raw;
        match libc::c_int::from(raw.ss_family) {
            libc::AF_UNIX => Ok(Address::Unix),
            libc::AF_INET => {
                // SAFETY: of that family the kernel has written a sockaddr_in; the storage is larger and aligned for it.
                let v4 = unsafe { *storage.cast::<libc::sockaddr_in>() };
                Ok(Address::Ip(IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes())))
            }
            libc::AF_INET6 => {
                // SAFETY: of that family the kernel has written a sockaddr_in6; the storage is as above.
                let v6 = unsafe { *storage.cast::<libc::sockaddr_in6>() };
                Ok(Address::Ip(IpAddr::from(v6.sin6_addr.s6_addr).to_canonical()))
            }
            _ => Ok(Address::Other),
        }
    }

    /// Makes calls on this socket block, or not.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        // SAFETY: F_GETFL takes no pointer; the descriptor is open.
        let flags = cvt(unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETFL) }.into())? as libc::c_int;
        let flags = if nonblocking { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
        // SAFETY: F_SETFL takes no pointer; the descriptor is open.
        cvt(unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_SETFL, flags) }.into()).map(drop)
    }

    /// Ends both directions: every thread that is blocked in a call on this socket comes back at once.
    pub fn shutdown(&self) {
        // SAFETY: takes no pointer. ENOTCONN is no error to us: there is nobody to wake.
        let _ = unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// Ends the sending direction: the peer reads the end of the stream once it has read everything before it.
    pub fn shutdown_write(&self) {
        // SAFETY: takes no pointer. ENOTCONN is no error to us: there is nobody to tell.
        let _ = unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) };
    }

    /// Sends bytes of our own; may send fewer.
    ///
    /// # Errors
    /// What send(2) says. There is no SIGPIPE.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the pointer and the length are those of a live slice.
        cvt_retry(|| unsafe {
            libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) as i64
        })
        .map(|n| n as usize)
    }

    /// Receives into a buffer of our own; 0 is the end of the stream.
    ///
    /// # Errors
    /// What recv(2) says.
    pub fn recv(&self, bytes: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the pointer and the length are those of a live slice that we hold alone.
        cvt_retry(|| unsafe { libc::recv(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) as i64 })
            .map(|n| n as usize)
    }

    /// Whether nothing can be read from it any more: the peer has ended the connection, and all that it said before has
    /// been read. Waits for nothing.
    pub fn is_spent(&self) -> bool {
        let mut byte = 0_u8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the pointer is to a local of the length given.
        let got = cvt_retry(|| unsafe { libc::recv(self.0.as_raw_fd(), (&raw mut byte).cast(), 1, flags) as i64 });
        got.map_or_else(|e| e.kind() != io::ErrorKind::WouldBlock, |n| n == 0)
    }

    /// Whether the peer has ended the connection, or its direction of it, whatever it said before that can still be read.
    /// Waits for nothing.
    pub fn has_left(&self) -> bool {
        self.polls(libc::POLLRDHUP)
    }

    /// Whether there is something to be read, if only the end. Waits for nothing, not even for a thread that reads.
    pub fn has_unread(&self) -> bool {
        self.polls(libc::POLLIN)
    }

    fn polls(&self, events: libc::c_short) -> bool {
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events, revents: 0 };
        // SAFETY: the pointer is to one local pollfd, and one is what the count says; the descriptor is open.
        let got = cvt_retry(|| unsafe { libc::poll(&raw mut fd, 1, 0) }.into());
        got.is_ok_and(|n| n > 0)
    }

    /// Has the system ask after a TCP peer that says nothing for half a minute, six times, ten seconds apart: then a receive
    /// fails instead of waiting for a machine that is gone. On others this does nothing.
    pub fn set_keep_alive(&self) {
        let tcp = [(libc::TCP_KEEPIDLE, 30), (libc::TCP_KEEPINTVL, 10), (libc::TCP_KEEPCNT, 6)];
        for (name, value) in tcp {
            let _ = set_option(self.0.as_fd(), libc::IPPROTO_TCP, name, value);
        }
        let _ = set_option(self.0.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    }

    /// One sendmsg(2) over an iovec list; may send fewer bytes than the list holds.
    ///
    /// # Safety
    /// Every iovec must be readable memory for as long as the call runs. By reference, too: after the call the kernel
    /// holds the pages themselves, whatever becomes of the mapping.
    ///
    /// # Errors
    /// What sendmsg(2) says; by reference also ENOBUFS, where it may hold no more. There is no SIGPIPE.
    pub unsafe fn send_iovecs(&self, iovecs: &[libc::iovec], how: Handing) -> io::Result<usize> {
        let message = message_of(iovecs.as_ptr().cast_mut(), iovecs.len());
        let flags = match how {
            Handing::Copy => libc::MSG_NOSIGNAL,
            Handing::CopyMoreFollows => libc::MSG_NOSIGNAL | libc::MSG_MORE,
            Handing::ByReference => libc::MSG_NOSIGNAL | libc::MSG_ZEROCOPY,
        };
        // SAFETY: the header describes the caller's iovecs, which it promised are readable; sendmsg does not write
        // through msg_iov.
        cvt_retry(|| unsafe { libc::sendmsg(self.0.as_raw_fd(), &raw const message, flags) as i64 }).map(|n| n as usize)
    }

    /// One recvmsg(2) over an iovec list; may receive fewer bytes than the list holds; 0 is the end of the stream.
    ///
    /// # Safety
    /// Every iovec must be writable memory, to which no Rust reference exists, for as long as the call runs.
    ///
    /// # Errors
    /// What recvmsg(2) says.
    pub unsafe fn recv_iovecs(&self, iovecs: &mut [libc::iovec]) -> io::Result<usize> {
        let mut message = message_of(iovecs.as_mut_ptr(), iovecs.len());
        // SAFETY: the header describes the caller's iovecs, which it promised are writable.
        cvt_retry(|| unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) as i64 }).map(|n| n as usize)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lets this many connections wait to be accepted on a socket that listens already.
///
/// # Errors
/// What listen(2) says.
pub fn set_backlog(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: takes no pointer; on a socket that listens already it only changes the length of the queue.
    cvt(unsafe { libc::listen(fd.as_raw_fd(), backlog) }.into()).map(drop)
}

fn message_of(iovecs: *mut libc::iovec, count: usize) -> libc::msghdr {
    // SAFETY: msghdr is plain integers and pointers, for which all zeros is a valid value (musl pads it, so that it
    // cannot be written as a literal everywhere).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs;
    message.msg_iovlen = count as _;
    message
}

fn start_connect(family: libc::c_int, address: *const libc::sockaddr, len: usize) -> io::Result<Socket> {
    // SAFETY: takes no pointers; the descriptor is new and ours alone.
    let fd = cvt(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) }.into())?;
    // SAFETY: `fd` was just returned by socket and has no other owner.
    let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
    // SAFETY: both callers pass a pointer to a complete local address of that length.
    match cvt(unsafe { libc::connect(socket.0.as_raw_fd(), address, len as libc::socklen_t) }.into()) {
        Ok(_) => Ok(socket),
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        Err(e) => Err(e),
    }
}

pub(super) fn get_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and len are locals, and len is the size of value.
    cvt(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) }.into())?;
    Ok(value)
}

pub(super) fn set_option(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value is a local of the length given.
    cvt(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) }.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_stream_sockets_are_taken() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Socket::from_fd(file.into()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(Socket::from_fd(datagram.into()).is_err());
        let (stream, _peer) = UnixStream::pair().unwrap();
        assert!(Socket::from_fd(stream.into()).is_ok());
    }

    #[test]
    fn shutdown_wakes_a_blocked_receiver() {
        let (a, _b) = UnixStream::pair().unwrap();
        let socket = std::sync::Arc::new(Socket::from_fd(a.into()).unwrap());
        let blocked = std::thread::spawn({
            let socket = socket.clone();
            move || socket.recv(&mut [0u8; 1]).unwrap()
        });
        socket.shutdown();
        assert_eq!(blocked.join().unwrap(), 0);
    }

    #[test]
    fn a_send_to_a_closed_peer_is_an_error_and_no_signal() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        let socket = Socket::from_fd(a.into()).unwrap();
        assert_eq!(socket.send(b"x").unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }

    fn tcp_pair(listen_at: &str, connect_to: &str) -> Option<(Socket, Socket)> {
        let listener = std::net::TcpListener::bind((listen_at, 0)).ok()?;
        let to = std::net::TcpStream::connect((connect_to, listener.local_addr().ok()?.port())).ok()?;
        let from = listener.accept().ok()?.0;
        Some((Socket::from_fd(to.into()).ok()?, Socket::from_fd(from.into()).ok()?))
    }

    #[test]
    fn connections_within_the_host_are_told_apart() {
        let (unix, _peer) = UnixStream::pair().unwrap();
        assert!(Socket::from_fd(unix.into()).unwrap().is_within_host());
        let (a, b) = tcp_pair("127.0.0.1", "127.0.0.1").unwrap();
        assert!(a.is_within_host() && b.is_within_host());
        // Two addresses of the loopback, and an IPv4 peer of an IPv6 socket.
        let (a, b) = tcp_pair("127.0.0.2", "127.0.0.2").unwrap();
        assert!(a.is_within_host() && b.is_within_host());
        if let Some((a, b)) = tcp_pair("::", "127.0.0.1") {
            assert!(a.is_within_host() && b.is_within_host());
        }
        b.shutdown();
        let unconnected = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!Socket::from_fd(unconnected.into()).unwrap().is_within_host(), "it has no peer");
    }

    #[test]
    fn a_connection_is_spent_once_it_was_read_to_its_end() {
        let unix = UnixStream::pair().unwrap();
        let unix = (Socket::from_fd(unix.0.into()).unwrap(), Socket::from_fd(unix.1.into()).unwrap());
        for (from, to) in [unix, tcp_pair("127.0.0.1", "127.0.0.1").unwrap()] {
            assert!(!to.is_spent());
            assert!(!to.has_left() && !to.has_unread());
            from.send(b"x").unwrap();
            assert!(!to.has_left() && to.has_unread());
            drop(from);
            assert!(!to.is_spent() && to.has_left());
            assert_eq!(to.recv(&mut [0; 2]).unwrap(), 1);
            assert_eq!(to.recv(&mut [0; 2]).unwrap(), 0);
            assert!(to.is_spent() && to.has_left());
        }
    }

    #[test]
    fn the_system_asks_after_a_silent_peer() {
        let (a, _b) = tcp_pair("127.0.0.1", "127.0.0.1").unwrap();
        a.set_keep_alive();
        let option = |level, name| get_option(a.0.as_fd(), level, name).unwrap();
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
        let tcp = [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL, libc::TCP_KEEPCNT];
        assert_eq!(tcp.map(|name| option(libc::IPPROTO_TCP, name)), [30, 10, 6]);
    }

    #[test]
    fn a_connection_within_the_host_is_not_paced() {
        let (a, _b) = tcp_pair("127.0.0.1", "127.0.0.1").unwrap();
        a.tune_within_host();
        let mut name = [0u8; 16];
        let mut len = name.len() as libc::socklen_t;
        // SAFETY: both pointers are to locals, and `len` is the size of the first.
        let got = unsafe {
            let (at, len) = (name.as_mut_ptr().cast(), &raw mut len);
            libc::getsockopt(a.0.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, at, len)
        };
        assert_eq!(got, 0);
        assert!(name.starts_with(b"reno\0"), "{name:?}");
    }

    #[test]
    fn an_overlong_unix_path_is_refused() {
        let path = "/".repeat(200);
        assert_eq!(Socket::start_unix(Path::new(&path)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
