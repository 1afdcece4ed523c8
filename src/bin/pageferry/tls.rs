//! TLS, as options.

use std::path::PathBuf;

use pageferry::net::{Address, Tls};

use crate::output::complain;

/// Encryption, and who is trusted.
#[derive(Clone, Debug, clap::Args)]
pub struct TlsArgs {
    /// Encrypt, and let in nobody else: a folder with ca.pem (who signs the other side's certificate), cert.pem and key.pem
    /// (this side's own); both sides need one
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
}

/// The same, for those who connect.
#[derive(Clone, Debug, clap::Args)]
pub struct TlsToArgs {
    #[command(flatten)]
    pub own: TlsArgs,
    /// The name or IP address that the other side's certificate must be for [default: the host that is connected to]
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    tls_name: Option<String>,
}

impl TlsArgs {
    pub fn load(&self) -> Result<Option<Tls>, String> {
        self.tls_dir.as_ref().map(Tls::from_dir).transpose().map_err(|e| e.to_string())
    }
}

impl TlsToArgs {
    pub fn load(&self) -> Result<Option<Tls>, String> {
        match (self.own.load()?, &self.tls_name) {
            (Some(tls), Some(name)) => tls.name(name).map(Some).map_err(|e| e.to_string()),
            (tls, _) => Ok(tls),
        }
    }
}

/// One warning, where what is sent can be read on its way.
pub fn warn_if_open(address: &Address, tls: Option<&Tls>) {
    if tls.is_none() {
        warn_if_far(address, "use --tls-dir");
    }
}

/// The same, where nothing is ever encrypted, with what to do about it.
pub fn warn_if_far(address: &Address, advice: &str) {
    if !address.is_local() {
        complain(format_args!(
            "warning: {address} may leave this machine, and nothing is encrypted: anybody on the way can read and change \
             RAM; {advice}"
        ));
    }
}
