//! Sockets that behave badly, and what else tests ask of the system.
// UNSAFETY: setsockopt(2), getrlimit(2), socket(2), bind(2), connect(2) and clock_gettime(2) are C calls.
#![allow(dead_code)]
#![expect(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Connected sockets: the near ends, and the far ends in the same order.
pub fn pairs(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    (0..count).map(|_| UnixStream::pair().map(|(a, b)| (OwnedFd::from(a), OwnedFd::from(b))).unwrap()).unzip()
}

/// Gives a socket the smallest send buffer that the system has.
pub fn set_smallest_send_buffer(socket: &impl AsRawFd) {
    set_smallest(socket, libc::SO_SNDBUF);
}

/// The same for its receive buffer.
pub fn set_smallest_receive_buffer(socket: &impl AsRawFd) {
    set_smallest(socket, libc::SO_RCVBUF);
}

fn set_smallest(socket: &impl AsRawFd, buffer: libc::c_int) {
    let bytes: libc::c_int = 1;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is a local of the length given.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, buffer, (&raw const bytes).cast(), len) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Lets the close of a TCP connection reset it, and drop what was not sent.
pub fn reset_on_close(socket: &impl AsRawFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the option's value is a local of the length given.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Lets this process open as many descriptors as it may: a crowd needs more than the usual 1024.
pub fn allow_many_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads into, and then from, a local of the type that the calls take.
    let done = unsafe {
        let got = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max.min(65536);
        got | libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Leaves room for one connection that nobody has accepted; more are not answered.
pub fn shrink_backlog(listener: &std::net::TcpListener) {
    // SAFETY: takes no pointer; the socket listens already, and this only changes the length of its queue.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
}

/// A connection from this address of the loopback: strangers have addresses of their own.
pub fn connect_from(from: std::net::Ipv4Addr, to: &str) -> std::io::Result<std::net::TcpStream> {
    let to: std::net::SocketAddrV4 = to.parse().unwrap();
    let raw = |ip: std::net::Ipv4Addr, port: u16| libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
        sin_zero: [0; 8],
    };
    let (own, peer) = (raw(from, 0), raw(*to.ip(), to.port()));
    let len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: takes no pointers; the descriptor is new and ours alone.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: as above.
    let stream = unsafe { std::net::TcpStream::from_raw_fd(socket) };
    // SAFETY: both addresses are locals of the length given.
    let failed = unsafe {
        libc::bind(socket, (&raw const own).cast(), len) | libc::connect(socket, (&raw const peer).cast(), len)
    };
    if failed == 0 { Ok(stream) } else { Err(std::io::Error::last_os_error()) }
}

/// Makes a socket drop whatever arrives for it, unanswered, as if its machine had gone: a listener no longer answers a
/// connect, and nothing sent on a connection is acknowledged, its end included.
pub fn vanish(socket: &impl AsRawFd) {
    // The program of a socket filter that keeps no byte of any segment.
    let mut code = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
    let len = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: the option's value is a local of the length given, and what it points to outlives the call.
    let done = unsafe {
        let value = (&raw const program).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, len)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// CPU time that the calling thread has used so far.
pub fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes into a local of the type that the call takes.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
