#![forbid(unsafe_code)]
//! The session on both sides as pure state machines: an event goes in, actions come out.
//!
//! No socket, no clock, no thread, no guest memory: those are the drivers' ([`crate::source`], [`crate::target`]).
//! So the code that ships is the code that the model checker explores (`tests/model.rs`).

mod channels;
mod epochs;
mod events;
mod lanes;
pub mod source;
pub mod target;
#[cfg(test)]
mod tests;

pub use epochs::{EPOCHS_OUTSTANDING_MAX, EpochLedger};

use crate::error::Failure;
use crate::wire::control::ErrorCode;

/// Asked for in Setup and granted in Ready: both sides keep the session for a while when all connections are lost.
pub const FEATURE_RESUME: u64 = 1;

/// How often chunks that disagree at Final may travel again. Damage on the way is rare: what is damaged this often has
/// another cause.
pub const REPAIRS_MAX: u32 = 8;

/// What kind of failure the peer is told of; the text goes with it.
fn code_of(why: &Failure) -> ErrorCode {
    match why {
        Failure::Protocol(_) => ErrorCode::Protocol,
        Failure::Silent { .. } | Failure::Stalled { .. } | Failure::NotResumed { .. } => ErrorCode::Timeout,
        Failure::Control { .. } | Failure::Channel { .. } | Failure::Connect { .. } => ErrorCode::Connection,
        Failure::Memory(_) => ErrorCode::Memory,
        Failure::Digest { .. } => ErrorCode::Digest,
        Failure::Hook { .. } => ErrorCode::Guest,
        Failure::Worker(_) => ErrorCode::Resources,
        _ => ErrorCode::Other(0),
    }
}
