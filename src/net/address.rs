#![forbid(unsafe_code)]
//! Where a target listens: `host:port` or `unix:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Failure;

/// An address as a user writes it.
///
/// ```
/// use pageferry::net::Address;
/// assert_eq!("[::1]:4444".parse::<Address>()?, Address::Tcp { host: "::1".into(), port: 4444 });
/// assert_eq!("unix:/run/ferry".parse::<Address>()?.to_string(), "unix:/run/ferry");
/// assert!("localhost".parse::<Address>().is_err());
/// # Ok::<(), pageferry::Failure>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Address {
    /// A TCP port of a host, by name or number.
    Tcp {
        /// The host, without brackets.
        host: String,
        /// The port; 0 lets the system choose where one listens.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Whether what is sent there stays on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp { host, .. } => {
                host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

impl FromStr for Address {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Address, Failure> {
        let bad = |what: &str| Failure::Config(format!("{text:?} is no address: {what}; use HOST:PORT or unix:PATH"));
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(bad("the path is empty"));
            }
            return Ok(Address::Unix(path.into()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| bad("there is no port"))?;
        let port = port.parse().map_err(|_| bad("the port is no number from 0 to 65535"))?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(|| bad("the bracket is not closed"))?,
            None if host.contains(':') => return Err(bad("an IPv6 address needs brackets")),
            None => host,
        };
        if host.is_empty() {
            return Err(bad("the host is empty"));
        }
        Ok(Address::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (bad, why) in [
            ("", "no port"),
            ("host", "no port"),
            (":1", "host is empty"),
            ("h:70000", "no number"),
            ("::1:80", "brackets"),
            ("[::1:80", "not closed"),
            ("unix:", "path is empty"),
        ] {
            let text = bad.parse::<Address>().unwrap_err().to_string();
            assert!(text.contains(why), "{bad}: {text}");
        }
    }

    #[test]
    fn addresses_survive_display_and_parse() {
        for text in ["127.0.0.1:0", "[fe80::1]:9", "a-host.example:4444", "unix:/tmp/x:y"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }
}
