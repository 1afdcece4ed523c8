//! MSG_ZEROCOPY: bytes that the kernel sends from where they lie, and its word on when it no longer needs them there.
//! After Documentation/networking/msg_zerocopy.rst; IPv4 and IPv6 differ in nothing but the level of the control message.
// UNSAFETY: recvmsg(2) and poll(2) are C calls, and control messages are read through the pointers that CMSG_* compute.
#![expect(unsafe_code)]

use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsFd, AsRawFd};

use super::cvt_retry;
use super::socket::{Socket, get_option, set_option};

/// What `ee_origin` says of a completion, and `ee_code` of one whose bytes were copied (linux/errqueue.h).
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

/// The kernel no longer needs the bytes of these sends. It numbers them itself: every sendmsg with MSG_ZEROCOPY that has
/// sent something is one, from 0 on, in 32 bits that wrap around.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The first send.
    pub first: u32,
    /// The last send.
    pub last: u32,
    /// Whether the kernel copied the bytes after all.
    pub copied: bool,
}

impl Socket {
    /// Whether it is a TCP socket, IPv4 or IPv6.
    ///
    /// # Errors
    /// What getsockopt(2) says.
    pub fn is_tcp(&self) -> io::Result<bool> {
        let family = get_option(self.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        let protocol = get_option(self.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        Ok(matches!(family, libc::AF_INET | libc::AF_INET6) && protocol == libc::IPPROTO_TCP)
    }

    /// Lets bytes be sent by reference from now on. Without this the kernel ignores the wish and copies.
    ///
    /// # Errors
    /// What setsockopt(2) says: ENOPROTOOPT before Linux 4.14, EOPNOTSUPP for a kind of socket that cannot.
    pub fn allow_zero_copy(&self) -> io::Result<()> {
        set_option(self.as_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1)
    }

    /// The next completion that waits to be read; `None` if none does. Never blocks.
    ///
    /// # Errors
    /// What recvmsg(2) says.
    pub fn completion(&self) -> io::Result<Option<Completion>> {
        // Aligned as control messages are; an IPv6 one takes 64 bytes.
        let mut control = [0u64; 16];
        loop {
            // SAFETY: msghdr is plain integers and pointers, for which all zeros is a valid value.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control) as _;
            let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
            // SAFETY: the message names no buffer but `control`, by its length, which nobody else uses meanwhile.
            match cvt_retry(|| unsafe { libc::recvmsg(self.as_fd().as_raw_fd(), &raw mut message, flags) as i64 }) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
            // Anything else that is reported there is no completion, and is dropped.
            if let Some(completion) = extended_error(&message).and_then(completion_of) {
                return Ok(Some(completion));
            }
        }
    }

    /// Waits until something is to be read by [`Socket::completion`], or the socket has failed or was shut down. True if
    /// no byte can go either way any more.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn wait_for_completion(&self) -> io::Result<bool> {
        // POLLERR, which says that there is something, and POLLHUP come unasked.
        let mut poll = libc::pollfd { fd: self.as_fd().as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: the pointer and the count describe one local.
        cvt_retry(|| unsafe { libc::poll(&raw mut poll, 1, -1) }.into())?;
        Ok(poll.revents & libc::POLLHUP != 0)
    }
}

/// The extended error among the control messages that recvmsg has left, where there is one.
fn extended_error(message: &libc::msghdr) -> Option<libc::sock_extended_err> {
    // SAFETY: `message` was filled in by recvmsg and its control buffer is alive: that is what CMSG_FIRSTHDR,
    // CMSG_NXTHDR and CMSG_DATA are for. The kernel writes a whole sock_extended_err behind these two headers.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(message);
        while !at.is_null() {
            let kind = ((*at).cmsg_level, (*at).cmsg_type);
            if matches!(kind, (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)) {
                return Some(libc::CMSG_DATA(at).cast::<libc::sock_extended_err>().read_unaligned());
            }
            at = libc::CMSG_NXTHDR(message, at);
        }
    }
    None
}

fn completion_of(error: libc::sock_extended_err) -> Option<Completion> {
    let copied = error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0;
    (error.ee_errno == 0 && error.ee_origin == SO_EE_ORIGIN_ZEROCOPY)
        .then_some(Completion { first: error.ee_info, last: error.ee_data, copied })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::Handing;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    /// A socket and the stream at its other end, over this address of this host.
    fn pair(address: &str) -> io::Result<(Socket, TcpStream)> {
        let listener = TcpListener::bind(address)?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        Ok((Socket::from_fd(near.into())?, listener.accept()?.0))
    }

    fn send(socket: &Socket, bytes: &[u8]) -> usize {
        let iovec = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the slice outlives the call, and the kernel holds its pages itself from then on.
        unsafe { socket.send_iovecs(&[iovec], Handing::ByReference) }.unwrap()
    }

    #[test]
    fn sends_complete_in_their_number_over_both_versions_of_ip_and_loopback_copies() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            // A machine without IPv6 shows the same over IPv4.
            let Ok((socket, mut peer)) = pair(address) else { continue };
            assert!(socket.is_tcp().unwrap());
            socket.allow_zero_copy().unwrap();
            assert_eq!(socket.completion().unwrap(), None);
            let bytes = vec![7; 3 * 8192];
            bytes.chunks(8192).for_each(|part| assert_eq!(send(&socket, part), 8192));
            let mut landed = vec![0; bytes.len()];
            peer.read_exact(&mut landed).unwrap();
            assert!(landed == bytes);
            let mut next = 0;
            while next < 3 {
                assert!(!socket.wait_for_completion().unwrap());
                while let Some(Completion { first, last, copied }) = socket.completion().unwrap() {
                    assert_eq!((first, copied), (next, true), "{address}");
                    next = last + 1;
                }
            }
            assert_eq!(next, 3);
        }
    }

    #[test]
    fn a_wait_ends_with_the_socket() {
        let (socket, _peer) = pair("127.0.0.1:0").unwrap();
        socket.allow_zero_copy().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| socket.wait_for_completion().unwrap());
            socket.shutdown();
            assert!(waiting.join().unwrap());
        });
    }

    #[test]
    fn unix_sockets_know_nothing_of_it() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        let socket = Socket::from_fd(socket.into()).unwrap();
        assert!(!socket.is_tcp().unwrap());
        assert!(socket.allow_zero_copy().is_err());
    }

    #[test]
    fn what_is_no_completion_is_told_apart() {
        let mut error = libc::sock_extended_err {
            ee_errno: 0, ee_origin: SO_EE_ORIGIN_ZEROCOPY, ee_type: 0, ee_code: 0, ee_pad: 0, ee_info: 7, ee_data: 9,
        };
        assert_eq!(completion_of(error), Some(Completion { first: 7, last: 9, copied: false }));
        error.ee_code = SO_EE_CODE_ZEROCOPY_COPIED;
        assert_eq!(completion_of(error), Some(Completion { first: 7, last: 9, copied: true }));
        error.ee_origin = libc::SO_EE_ORIGIN_ICMP;
        assert_eq!(completion_of(error), None);
    }
}
