#![forbid(unsafe_code)]
//! What the source keeps of its sessions: tickets, each good for one connection.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;

/// Tickets kept at once; older ones go.
const TICKETS_MAX: usize = 2 * super::TICKETS;

/// Tickets, by the name in the target's certificate. rustls' own store keeps eight a name, and there are more channels
/// than that. It is asked once a connection.
#[derive(Debug, Default)]
pub(super) struct Tickets(Mutex<VecDeque<(ServerName<'static>, Tls13ClientSessionValue)>>);

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, name: ServerName<'static>, value: Tls13ClientSessionValue) {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tickets.len() >= TICKETS_MAX {
            tickets.pop_front();
        }
        tickets.push_back((name, value));
    }

    /// The newest first: of a target that was started anew, only its own are of use.
    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = tickets.iter().rposition(|(of, _)| of == name)?;
        tickets.remove(newest).map(|(_, value)| value)
    }
}
