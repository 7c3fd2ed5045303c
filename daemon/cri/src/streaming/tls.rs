//! TLS for the streaming listener: the operator's key pair, or one made at start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no {what}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// A certificate could not be made.
    #[error("make a self-signed certificate")]
    Generate(#[from] rcgen::Error),
    /// Key and certificate do not work.
    #[error("key pair for streaming")]
    Tls(#[from] rustls::Error),
}

/// Where the key pair comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPair {
    /// Made at start for this host's name and addresses, and kept in memory.
    SelfSigned,
    /// The operator's PEM files.
    Files {
        /// Certificate chain.
        certificate: PathBuf,
        /// Private key.
        key: PathBuf,
    },
}

/// An acceptor for `pair`. `names` go into a certificate made here.
///
/// # Errors
/// Whatever keeps the key pair from being used, by file.
pub(super) fn acceptor(pair: &KeyPair, names: Vec<String>) -> Result<TlsAcceptor, TlsError> {
    let (chain, key) = match pair {
        KeyPair::SelfSigned => self_signed(names)?,
        KeyPair::Files { certificate, key } => load(certificate, key)?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn self_signed(names: Vec<String>) -> Result<Pair, TlsError> {
    let made = rcgen::generate_simple_self_signed(names)?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    Ok((vec![made.cert.der().clone()], key.into()))
}

fn load(certificate: &Path, key: &Path) -> Result<Pair, TlsError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| TlsError::Read {
            path: path.to_owned(),
            source,
        })
    };
    let missing = |path: &Path, what| TlsError::Missing {
        path: path.to_owned(),
        what,
    };
    let chain: Result<Vec<_>, _> =
        rustls_pemfile::certs(&mut read(certificate)?.as_slice()).collect();
    let chain = chain
        .ok()
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| missing(certificate, "certificate"))?;
    let private = rustls_pemfile::private_key(&mut read(key)?.as_slice());
    let private = private
        .ok()
        .flatten()
        .ok_or_else(|| missing(key, "private key"))?;
    Ok((chain, private))
}
