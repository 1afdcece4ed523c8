//! Certificates for tests, made as they run.
#![allow(dead_code)]
#![forbid(unsafe_code)]

use std::path::Path;

use pageferry::net::Tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};

/// A CA, and what it signs.
pub struct Ca(CertifiedIssuer<'static, KeyPair>);

/// What a side shows.
pub struct Identity {
    pub cert: String,
    pub key: String,
}

impl Ca {
    pub fn new(name: &str) -> Ca {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for these names, changed as a test likes.
    pub fn issue_as(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        Identity { cert: params.signed_by(&key, &self.0).unwrap().pem(), key: key.serialize_pem() }
    }

    pub fn issue(&self, names: &[&str]) -> Identity {
        self.issue_as(names, |_| {})
    }

    /// What a side goes by that trusts this CA.
    pub fn tls(&self, own: &Identity) -> Tls {
        Tls::from_pem(self.pem().as_bytes(), own.cert.as_bytes(), own.key.as_bytes()).unwrap()
    }

    /// A side that trusts this CA, and has a certificate of it for these names.
    pub fn side(&self, names: &[&str]) -> Tls {
        self.tls(&self.issue(names))
    }

    /// The three files.
    pub fn write(&self, own: &Identity, folder: &Path) {
        for (name, pem) in [("ca.pem", &self.pem()), ("cert.pem", &own.cert), ("key.pem", &own.key)] {
            std::fs::write(folder.join(name), pem).unwrap();
        }
    }
}
