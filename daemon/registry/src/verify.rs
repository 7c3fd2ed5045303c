//! TLS configurations: system authorities, configured ones, client pairs, and none at all.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tracing::{debug, warn};

use super::Error;
use super::hosts::{MAX_FILE_BYTES, Tls};

/// The system's authorities, read once: parsing the bundle takes longer than a pull's first request.
#[derive(Debug, Default)]
pub(super) struct SystemRoots(OnceLock<Arc<RootCertStore>>);

impl SystemRoots {
    fn get(&self) -> Arc<RootCertStore> {
        let load = || {
            let mut store = RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                warn!(%error, "system certificates");
            }
            let (added, ignored) = store.add_parsable_certificates(found.certs);
            debug!(added, ignored, "system certificates loaded");
            Arc::new(store)
        };
        Arc::clone(self.0.get_or_init(load))
    }
}

/// The TLS configuration for `tls`. Blocks: reads files.
pub(super) fn config(tls: &Tls, system: &SystemRoots) -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Invalid {
            reason: format!("TLS: {error}"),
        })?;
    let builder = if tls.skip_verify {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
    } else {
        builder.with_root_certificates(roots(tls, system)?)
    };
    // One pair is offered: the protocol lets the server ask for any, and upstream's choice among
    // several is its list's first that fits.
    match tls.client.first() {
        None => Ok(builder.with_no_client_auth()),
        Some((cert, key)) => {
            let chain = certificates(cert)?;
            let pem = read(key)?;
            let key_der = rustls_pemfile::private_key(&mut pem.as_slice())
                .ok()
                .flatten()
                .ok_or_else(|| bad(key, "no private key in it"))?;
            builder
                .with_client_auth_cert(chain, PrivateKeyDer::clone_key(&key_der))
                .map_err(|error| bad(cert, &error.to_string()))
        }
    }
}

fn roots(tls: &Tls, system: &SystemRoots) -> Result<Arc<RootCertStore>, Error> {
    let base = system.get();
    if tls.ca.is_empty() {
        return Ok(base);
    }
    let mut store = RootCertStore::clone(&base);
    for path in &tls.ca {
        let (added, _) = store.add_parsable_certificates(certificates(path)?);
        if added == 0 {
            return Err(bad(path, "no certificate in it"));
        }
    }
    Ok(Arc::new(store))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(path)?;
    rustls_pemfile::certs(&mut pem.as_slice())
        .collect::<Result<_, _>>()
        .map_err(|error| bad(path, &error.to_string()))
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| bad(path, &error.to_string()))?;
    file.take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| bad(path, &error.to_string()))?;
    Ok(bytes)
}

fn bad(path: &Path, reason: &str) -> Error {
    Error::Hosts {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

/// `skip_verify`: any certificate will do; signatures are still checked, so that a broken peer
/// fails early.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
