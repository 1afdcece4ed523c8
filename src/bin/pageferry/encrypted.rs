//! What became of TLS, in the report.

use std::fmt;

use pageferry::source::TlsReport;
use serde::Serialize;

/// What became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Encrypted {
    /// The cipher suite; nothing where nothing was encrypted.
    tls_suite: Option<&'static str>,
    /// Data channels that went on from the control connection's session.
    tls_channels_resumed: u8,
}

impl From<Option<TlsReport>> for Encrypted {
    fn from(report: Option<TlsReport>) -> Encrypted {
        Encrypted {
            tls_suite: report.map(|tls| tls.suite),
            tls_channels_resumed: report.map_or(0, |tls| tls.channels_resumed),
        }
    }
}

impl fmt::Display for Encrypted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tls_suite {
            Some(suite) => {
                writeln!(f, "  TLS         {suite}; {} channels resumed its session", self.tls_channels_resumed)
            }
            None => Ok(()),
        }
    }
}
