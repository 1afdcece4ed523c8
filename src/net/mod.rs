#![forbid(unsafe_code)]
//! Connections: addresses, connecting, listening, and the control connection's frames in and out.

mod address;
mod connect;
mod control;
mod listen;
mod lobby;
mod stream;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
mod tls;

pub use address::Address;
pub(crate) use connect::open;
pub use connect::{Connector, Endpoint, Fds, Opening, one_of};
pub use control::{Control, is_taken_in};
pub use listen::{Listener, passes};
pub(crate) use lobby::Origin;
pub use lobby::{CROWD_PAUSE, ENTRANTS_MAX, Greeting, Lobby};
pub use stream::{Encryption, Stream};
#[cfg(feature = "tls")]
pub use tls::Tls;
#[cfg(not(feature = "tls"))]
pub(crate) use tls::Tls;
