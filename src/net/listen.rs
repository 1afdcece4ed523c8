#![forbid(unsafe_code)]
//! How the target gets its connections: a listener, or ready-made sockets.

use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::error::Failure;
use crate::net::Address;
use crate::sys::socket::{Socket, set_backlog};

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A Unix socket; its file goes with the listener.
    Unix(UnixListener, SocketFile),
    /// These, in any order: each says by its Hello what it is.
    Ready(Vec<Socket>),
}

/// Removes a Unix socket's file when it is no longer listened on.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Connections that may wait to be accepted. More than any migration opens at once: a short queue answers with resets.
const BACKLOG: i32 = 1024;

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// [`Failure::Listen`], with the address and what the system said.
    pub fn bind(address: &Address) -> Result<Listener, Failure> {
        Self::try_bind(address).map_err(|e| Failure::Listen { address: address.to_string(), reason: e.into() })
    }

    fn try_bind(address: &Address) -> io::Result<Listener> {
        let listener = match address {
            Address::Tcp { host, port } => {
                let found: Vec<_> = (host.as_str(), *port).to_socket_addrs()?.collect();
                let listener = TcpListener::bind(&found[..])?;
                listener.set_nonblocking(true)?;
                Listener::Tcp(listener)
            }
            Address::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                let file = SocketFile(path.clone());
                listener.set_nonblocking(true)?;
                Listener::Unix(listener, file)
            }
        };
        if let Some(fd) = listener.fd() {
            set_backlog(fd, BACKLOG)?;
        }
        Ok(listener)
    }

    /// Takes connections that are there already.
    ///
    /// # Errors
    /// [`Failure::Config`] if one of them is no stream socket.
    pub fn ready(fds: impl IntoIterator<Item = OwnedFd>) -> Result<Listener, Failure> {
        let sockets = fds.into_iter().map(Socket::from_fd).collect::<io::Result<Vec<_>>>();
        sockets.map(Listener::Ready).map_err(|e| Failure::Config(e.to_string()))
    }

    /// The address that is listened on, with the port that the system chose; `None` for ready-made connections.
    pub fn address(&self) -> Option<Address> {
        match self {
            Listener::Tcp(listener) => {
                let at = listener.local_addr().ok()?;
                Some(Address::Tcp { host: at.ip().to_string(), port: at.port() })
            }
            Listener::Unix(_, file) => Some(Address::Unix(file.0.clone())),
            Listener::Ready(_) => None,
        }
    }

    /// What to wait for; `None` for ready-made connections.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Listener::Tcp(listener) => Some(listener.as_fd()),
            Listener::Unix(listener, _) => Some(listener.as_fd()),
            Listener::Ready(_) => None,
        }
    }

    /// Whether no connection can come any more.
    pub fn is_exhausted(&self) -> bool {
        matches!(self, Listener::Ready(sockets) if sockets.is_empty())
    }

    /// The next connection, if there is one.
    ///
    /// # Errors
    /// What accept(2) says, apart from a connection that is gone again.
    pub fn accept(&mut self) -> io::Result<Option<Socket>> {
        let accepted = match self {
            Listener::Tcp(listener) => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
            Listener::Unix(listener, _) => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
            Listener::Ready(sockets) => return Ok(sockets.pop()),
        };
        match accepted {
            Ok(fd) => {
                let socket = Socket::from_fd(fd)?;
                socket.set_no_delay();
                Ok(Some(socket))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Whether an error of accept(2) passes: descriptors or memory have run out for now, or it was the connection's own.
pub fn passes(error: &io::Error) -> bool {
    // accept(2), "Error handling": a reliable server treats the network's errors as no connection.
    const PASSING: [i32; 12] = [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOBUFS,
        libc::ENOMEM,
        libc::ENETDOWN,
        libc::EPROTO,
        libc::ENOPROTOOPT,
        libc::EHOSTDOWN,
        libc::ENONET,
        libc::EHOSTUNREACH,
        libc::ENETUNREACH,
        libc::EPERM,
    ];
    error.raw_os_error().is_some_and(|errno| PASSING.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_out_of_descriptors_passes_and_a_listener_that_is_none_does_not() {
        assert!(passes(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(!passes(&io::Error::from_raw_os_error(libc::EBADF)));
        assert!(!passes(&io::Error::from(io::ErrorKind::InvalidInput)));
    }
}
