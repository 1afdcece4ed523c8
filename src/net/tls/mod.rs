#![forbid(unsafe_code)]
//! TLS 1.3 with certificates on both sides, by rustls: what a side trusts, and what it shows.

mod session;
mod tickets;
mod words;

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ServerSessionMemoryCache, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::{CipherSuite, ClientConfig, Error, InconsistentKeys, RootCertStore, ServerConfig};

use crate::error::Failure;
use crate::net::{Address, Endpoint, Stream};
use crate::sys::socket::Socket;
use session::Side;
pub(crate) use session::Session;

/// Encrypts every connection of a migration, and lets in nobody but who shows a certificate of the CA that both sides
/// trust: TLS 1.3, certificates on both sides. The target listens with its own, the source checks the name in it.
///
/// A clone shares the sessions: data channels and later connections go on from the first one's (session resumption) and
/// take neither certificates nor signatures.
///
/// ```no_run
/// use pageferry::net::Tls;
/// use pageferry::{Ram, Source};
/// # fn of(ram: Ram) -> Result<(), pageferry::Failure> {
/// let tls = Tls::from_dir("/etc/pageferry")?; // ca.pem, cert.pem, key.pem
/// let source = Source::builder(ram).tls(tls).connect("target.example:4444")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    /// For whoever comes first, who is given tickets for all connections that follow.
    first: Arc<ServerConfig>,
    later: Arc<ServerConfig>,
    name: Option<ServerName<'static>>,
}

/// Tickets that the target gives to its source: each data channel, and each connection made again, uses one up, and does
/// the whole handshake where none is left. So many fit the first flight of a fresh TCP connection.
const TICKETS: usize = 128;
/// Sessions that a target remembers.
const SESSIONS_MAX: usize = 1024;

impl Tls {
    /// Reads `ca.pem` (the CAs that sign the other side's certificates), `cert.pem` (this side's certificate, and those
    /// between it and the CA) and `key.pem` (its private key: PKCS #8, PKCS #1 or SEC 1, not encrypted).
    ///
    /// # Errors
    /// [`Failure::Config`] names the file and what is wrong with it.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Tls, Failure> {
        let file = |name: &str| {
            let path = dir.as_ref().join(name);
            match fs::read(&path) {
                Ok(bytes) => Ok((path.display().to_string(), bytes)),
                Err(e) => Err(Failure::Config(format!("cannot read {}: {e}", path.display()))),
            }
        };
        let ((ca, ca_pem), (cert, cert_pem), (key, key_pem)) = (file("ca.pem")?, file("cert.pem")?, file("key.pem")?);
        Tls::build([(&ca, &ca_pem), (&cert, &cert_pem), (&key, &key_pem)])
    }

    /// As [`Tls::from_dir`], of what the three files hold.
    ///
    /// # Errors
    /// [`Failure::Config`] says what is wrong with which.
    pub fn from_pem(ca: &[u8], cert: &[u8], key: &[u8]) -> Result<Tls, Failure> {
        Tls::build([("the CA's PEM", ca), ("the certificate's PEM", cert), ("the key's PEM", key)])
    }

    /// The name, or IP address, that the source demands of the target's certificate: needed where the target has no
    /// host to be called by (a Unix socket, a connector), and in the place of the host elsewhere.
    ///
    /// # Errors
    /// [`Failure::Config`] for what is neither a DNS name nor an IP address.
    pub fn name(mut self, name: &str) -> Result<Tls, Failure> {
        self.name = Some(name_of(name)?);
        Ok(self)
    }

    fn build([ca, cert, key]: [(&str, &[u8]); 3]) -> Result<Tls, Failure> {
        let failed = |name: &str, what: &str| Failure::Config(format!("{name}: {what}"));
        let mut roots = RootCertStore::empty();
        for root in certificates(ca)? {
            roots.add(root).map_err(|e| failed(ca.0, &format!("a certificate that cannot be a CA's: {e}")))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(cert)?;
        let private = PrivateKeyDer::from_pem_slice(key.1).map_err(|e| match e {
            pem::Error::NoItemsFound => failed(key.0, "there is no private key in it (or it is encrypted)"),
            e => failed(key.0, &format!("no PEM: {e}")),
        })?;
        let unusable = |e: Error| match e {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                failed(key.0, &format!("this is not the key of the certificate in {}", cert.0))
            }
            Error::InvalidCertificate(e) => failed(cert.0, &format!("the certificate cannot be used: {e}")),
            e => failed(key.0, &format!("the key cannot be used: {e}")),
        };
        let internal = |e: &dyn fmt::Display| Failure::Config(format!("TLS cannot be set up: {e}"));

        let provider = Arc::new(provider());
        let server_verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| internal(&e))?
            .with_webpki_verifier(server_verifier.build().map_err(|e| internal(&e))?)
            .with_client_auth_cert(chain.clone(), private.clone_key())
            .map_err(unusable)?;
        client.resumption = Resumption::store(Arc::new(tickets::Tickets::default()));

        let client_verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let mut first = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| internal(&e))?
            .with_client_cert_verifier(client_verifier.build().map_err(|e| internal(&e))?)
            .with_single_cert(chain, private)
            .map_err(unusable)?;
        first.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
        first.send_tls13_tickets = TICKETS;
        let mut later = first.clone();
        later.send_tls13_tickets = 0;
        Ok(Tls { client: Arc::new(client), first: Arc::new(first), later: Arc::new(later), name: None })
    }

    /// Whether there is a name to look for wherever this endpoint leads.
    pub(crate) fn check(&self, endpoint: &Endpoint) -> Result<(), Failure> {
        match endpoint {
            Endpoint::Addresses(addresses) => addresses.iter().try_for_each(|a| self.name_at(Some(a)).map(drop)),
            Endpoint::Connector(_) => self.name_at(None).map(drop),
        }
    }

    /// The name that a target must show there.
    fn name_at(&self, address: Option<&Address>) -> Result<ServerName<'static>, Failure> {
        match (&self.name, address) {
            (Some(name), _) => Ok(name.clone()),
            (None, Some(Address::Tcp { host, .. })) => name_of(host),
            (None, Some(Address::Unix(_)) | None) => {
                let to = address.map_or("a connector's sockets".to_owned(), Address::to_string);
                Err(Failure::Config(format!(
                    "TLS to {to} needs a name to look for in the target's certificate: give one (--tls-name, Tls::name)"
                )))
            }
        }
    }

    /// The source's end of a connection to this address.
    pub(crate) fn connect(&self, socket: Socket, address: Option<&Address>) -> io::Result<Stream> {
        let name = self.name_at(address).map_err(io::Error::other)?;
        let made = UnbufferedClientConnection::new(self.client.clone(), name).map_err(io::Error::other)?;
        Ok(Stream::new(socket, Some(Session::new(Side::Source(made)))))
    }

    /// The target's end of a connection; the `first` ones are given tickets. Later ones are data channels, on which the
    /// source never reads: bytes left unread would reset the connection when it is closed.
    pub(crate) fn accept(&self, socket: Socket, first: bool) -> io::Result<Stream> {
        let config = if first { &self.first } else { &self.later };
        let made = UnbufferedServerConnection::new(config.clone()).map_err(io::Error::other)?;
        Ok(Stream::new(socket, Some(Session::new(Side::Target(made)))))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).finish_non_exhaustive()
    }
}

fn name_of(host: &str) -> Result<ServerName<'static>, Failure> {
    let bad = |_| Failure::Config(format!("{host:?} cannot stand in a certificate: it is no DNS name, nor an IP address"));
    ServerName::try_from(host.to_owned()).map_err(bad)
}

/// The certificates of a PEM file: one at least.
fn certificates((name, pem): (&str, &[u8])) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Failure::Config(format!("{name}: there is no certificate in it"))),
        Err(e) => Err(Failure::Config(format!("{name}: no PEM: {e}"))),
    }
}

/// The ring provider, with the cipher first that costs least where the CPU has AES.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}
