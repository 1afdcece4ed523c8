#![forbid(unsafe_code)]
//! Why hands were not shaken, in words a person can act on.

use std::time::Duration;

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

/// Who the other end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peer {
    Source,
    Target,
}

impl Peer {
    fn word(self) -> &'static str {
        match self {
            Peer::Source => "the source",
            Peer::Target => "the target",
        }
    }
}

/// What to look at where the other end may speak no TLS at all.
const SPEAKS_NONE: &str = "does not speak TLS; was --tls-dir given there?";

/// The other end hung up before hands were shaken; `heard` is what it had said by then, in bytes.
pub(super) fn hung_up(peer: Peer, heard: u64) -> String {
    let peer = peer.word();
    if heard == 0 { format!("{peer} hung up at the first word of TLS: it {SPEAKS_NONE}") } else { format!("{peer} hung up during the handshake") }
}

/// What rustls says, for a person.
pub(super) fn words(error: &Error, peer: Peer) -> String {
    let who = peer.word();
    match error {
        Error::InvalidCertificate(e) => format!("{who}'s certificate {}", certificate(e, peer)),
        Error::NoCertificatesPresented => format!("{who} showed no certificate; was --tls-dir given there?"),
        Error::AlertReceived(alert) => match refusal(*alert) {
            Some(why) => format!("{who} does not accept this side's certificate: {why}"),
            None => format!("{who} ended the connection: {alert:?}"),
        },
        Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion) => {
            format!("{who} {SPEAKS_NONE}")
        }
        Error::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired | PeerIncompatible::Tls13RequiredForQuic) => {
            format!("{who} has no TLS 1.3")
        }
        Error::DecryptError => format!("what came from {who} was changed on its way: it cannot be decrypted"),
        e => format!("{who}: {e}"),
    }
}

fn certificate(error: &CertificateError, peer: Peer) -> String {
    let off = |time: &UnixTime, limit: &UnixTime| span(time.as_secs().abs_diff(limit.as_secs()));
    match error {
        CertificateError::Expired => "has expired".to_owned(),
        CertificateError::ExpiredContext { time, not_after } => {
            format!("expired {} ago, by this machine's clock", off(time, not_after))
        }
        CertificateError::NotValidYet => "is not valid yet".to_owned(),
        CertificateError::NotValidYetContext { time, not_before } => {
            format!("is not valid for another {}, by this machine's clock", off(time, not_before))
        }
        CertificateError::UnknownIssuer => "is signed by a CA that is unknown here: none of those in ca.pem".to_owned(),
        CertificateError::BadSignature => "is not signed by the CA it names: its signature is wrong".to_owned(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names = if presented.is_empty() { "none".to_owned() } else { presented.iter().map(|name| plain(name)).collect::<Vec<_>>().join(", ") };
            format!("is not for {}: the names in it are: {names}; use one of them as the address, or as --tls-name", expected.to_str())
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            let purpose = match peer {
                Peer::Source => "clientAuth",
                Peer::Target => "serverAuth",
            };
            format!("is for something else: its extended key usage lacks {purpose}")
        }
        e => format!("cannot be accepted: {e}"),
    }
}

/// A name as rustls shows it, `DnsName("a.example")` or `IpAddress(127.0.0.1)`, as a person writes it.
fn plain(shown: &str) -> String {
    let inner = shown.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(shown);
    inner.trim_matches('"').to_owned()
}

/// What an alert says against our certificate, if it is about that.
fn refusal(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::CertificateExpired => "it has expired, or is not valid yet, by the clock there",
        AlertDescription::UnknownCA => "its CA is unknown there; compare ca.pem there with what signed cert.pem here",
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => "there was none; give --tls-dir",
        AlertDescription::UnsupportedCertificate => "it is not made for this; see its extended key usage",
        AlertDescription::CertificateRevoked => "it was revoked",
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
            "it is not trusted there"
        }
        AlertDescription::DecryptError => "its key does not fit",
        _ => return None,
    })
}

/// A length of time, roughly.
fn span(seconds: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(24 * 3600, "days"), (3600, "hours"), (60, "minutes")];
    match UNITS.iter().find(|(unit, _)| seconds >= 2 * unit) {
        Some((unit, word)) => format!("{} {word}", seconds / unit),
        None => format!("{} s", Duration::from_secs(seconds).as_secs()),
    }
}
