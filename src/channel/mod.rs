#![forbid(unsafe_code)]
//! The two roles a channel's worker can have: [`send::SendRole`] at the source, [`recv::RecvRole`] (a *lane*) at the
//! target. What they share with every other worker is in [`crate::crew`].

pub mod records;
pub mod recv;
pub mod send;
pub mod zero_copy;

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::crew::Interrupt;
use crate::sys::socket::Socket;
use crate::wire::WireError;

/// Why a channel's worker ended early.
#[derive(Debug)]
#[non_exhaustive]
pub enum ChannelError {
    /// It was told to.
    Aborted,
    /// A system call failed.
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The stream ended before its end mark.
    Closed {
        /// What was expected next.
        expected: &'static str,
    },
    /// The peer's bytes make no sense.
    Wire(WireError),
    /// The peer's packet does not belong here.
    Order(String),
    /// What is to be sent cannot be put into bytes.
    Unsendable(String),
    /// A run that is not inside its block, or a journal that is full: a mistake of our own.
    Internal(&'static str),
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChannelError::Aborted => f.write_str("stopped on request"),
            ChannelError::Io { doing, source } => write!(f, "{doing}: {source}"),
            ChannelError::Closed { expected } => {
                write!(f, "the peer closed the connection where {expected} was expected")
            }
            ChannelError::Wire(e) => write!(f, "{e}"),
            ChannelError::Order(what) => f.write_str(what),
            ChannelError::Unsendable(what) => write!(f, "this cannot be sent: {what}"),
            ChannelError::Internal(what) => write!(f, "internal error: {what}"),
        }
    }
}

impl std::error::Error for ChannelError {}

impl ChannelError {
    /// Whether it is not the connection that failed, so that another one would not help: guest RAM has no page where the
    /// kernel wants to read or write one (a full disk, a file that was cut short), or the mistake is our own.
    pub fn is_ours(&self) -> bool {
        match self {
            ChannelError::Io { source, .. } => source.raw_os_error() == Some(libc::EFAULT),
            ChannelError::Unsendable(_) | ChannelError::Internal(_) => true,
            ChannelError::Aborted | ChannelError::Closed { .. } | ChannelError::Wire(_) | ChannelError::Order(_) => false,
        }
    }
}

impl From<WireError> for ChannelError {
    fn from(e: WireError) -> ChannelError {
        ChannelError::Wire(e)
    }
}

/// Shuts a worker's socket down: a bell cannot wake a thread inside sendmsg or recvmsg.
#[derive(Debug)]
pub struct ShutDown(pub Arc<Socket>);

impl Interrupt for ShutDown {
    fn interrupt(&self) {
        self.0.shutdown();
    }
}
