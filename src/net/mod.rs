#![forbid(unsafe_code)]
//! Connections: addresses, connecting, listening, and the control connection's frames in and out.

mod address;
mod connect;
mod control;
mod listen;
mod lobby;

pub use address::Address;
pub use connect::{Connector, Endpoint, Fds, Opening, one_of, open};
pub use control::Control;
pub use listen::{Listener, passes};
pub use lobby::{CROWD_PAUSE, ENTRANTS_MAX, Greeting, Lobby};
