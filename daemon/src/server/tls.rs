//! TLS on the TCP port: the daemon's certificate, and where a CA is given, a check of the clients'.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::config::Tls;

/// What is spoken over TLS: HTTP/2 alone, as gRPC requires.
const ALPN: &[u8] = b"h2";

/// Takes connections with the certificate of `config`.
///
/// # Errors
/// When a file cannot be read or holds nothing usable; names the file.
pub(crate) fn acceptor(config: &Tls) -> anyhow::Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .context("TLS versions")?;
    let builder = match &config.ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots
                    .add(certificate)
                    .with_context(|| format!("{}: not a CA", path.display()))?;
            }
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.with_context(|| path.display().to_string())?)
        }
    };
    let mut server = builder
        .with_single_cert(certificates(&config.cert)?, key(&config.key)?)
        .with_context(|| {
            let (cert, key) = (config.cert.display(), config.key.display());
            format!("{cert} and {key} do not belong together")
        })?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let pem = read(path)?;
    let found: Vec<_> = rustls_pemfile::certs(&mut pem.as_slice())
        .collect::<Result<_, _>>()
        .with_context(|| format!("{}: damaged PEM", path.display()))?;
    anyhow::ensure!(
        !found.is_empty(),
        "{}: no certificate in it: want PEM, with lines BEGIN CERTIFICATE",
        path.display()
    );
    Ok(found)
}

fn key(path: &Path) -> anyhow::Result<PrivateKeyDer<'static>> {
    let pem = read(path)?;
    rustls_pemfile::private_key(&mut pem.as_slice())
        .with_context(|| format!("{}: damaged PEM", path.display()))?
        .with_context(|| {
            let path = path.display();
            format!("{path}: no private key in it: want PEM, with lines BEGIN PRIVATE KEY")
        })
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;

    #[test]
    fn files_that_do_not_do_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let names = || vec!["localhost".to_owned()];
        let made = rcgen::generate_simple_self_signed(names()).unwrap();
        let other = rcgen::generate_simple_self_signed(names()).unwrap();
        let pem = |what: &str, der: &[u8]| {
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            format!("-----BEGIN {what}-----\n{text}\n-----END {what}-----\n")
        };
        let (made_key, other_key) = (
            made.signing_key.serialize_der(),
            other.signing_key.serialize_der(),
        );
        std::fs::write(path("cert"), pem("CERTIFICATE", made.cert.der())).unwrap();
        std::fs::write(path("key"), pem("PRIVATE KEY", &made_key)).unwrap();
        std::fs::write(path("other"), pem("PRIVATE KEY", &other_key)).unwrap();
        std::fs::write(path("text"), "hello").unwrap();
        let tls = |cert: &str, key: &str, ca: Option<&str>| Tls {
            cert: path(cert),
            key: path(key),
            ca: ca.map(path),
        };
        assert!(acceptor(&tls("cert", "key", None)).is_ok());
        assert!(acceptor(&tls("cert", "key", Some("cert"))).is_ok());
        for (bad, says) in [
            (tls("nosuch", "key", None), "nosuch"),
            (tls("text", "key", None), "no certificate"),
            (tls("cert", "text", None), "no private key"),
            (tls("cert", "other", None), "do not belong together"),
            (tls("cert", "key", Some("text")), "no certificate"),
        ] {
            let error = format!("{:#}", acceptor(&bad).err().expect(says));
            assert!(error.contains(says), "{error}");
        }
    }
}
