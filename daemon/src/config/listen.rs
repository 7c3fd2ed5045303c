//! Where the daemon is reached, and by whom.

use std::path::PathBuf;

use super::{Error, raw};

/// A socket and who may open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Socket {
    /// Path of it; empty for none.
    pub(crate) address: PathBuf,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
}

/// A TCP listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tcp {
    /// `host:port`.
    pub(crate) address: String,
    /// How it is encrypted; in the clear without.
    pub(crate) tls: Option<Tls>,
}

/// Files of TLS, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tls {
    /// The daemon's certificate, and those between it and its CA.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
    /// CAs of clients: with them, a client needs a certificate.
    pub(crate) ca: Option<PathBuf>,
}

/// Limits of the messages of gRPC, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MessageLimits {
    /// Largest received.
    pub(crate) receive_bytes: usize,
    /// Largest sent.
    pub(crate) send_bytes: usize,
}

/// The listener that is wanted, if any.
///
/// # Errors
/// For half a setting of TLS.
pub(super) fn tcp(grpc: &raw::Grpc) -> Result<Option<Tcp>, Error> {
    if grpc.tcp_address.is_empty() {
        return Ok(None);
    }
    Ok(Some(Tcp {
        address: grpc.tcp_address.clone(),
        tls: tls(grpc)?,
    }))
}

/// Never served in the clear what was meant to be encrypted: half a setting is an error.
fn tls(grpc: &raw::Grpc) -> Result<Option<Tls>, Error> {
    if !grpc.tcp_tls_common_name.is_empty() {
        return Err(Error::invalid(
            "grpc.tcp_tls_common_name",
            "certificates by name are in Windows' store only: name files with tcp_tls_cert and \
             tcp_tls_key",
        ));
    }
    let path = |text: &str| Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty());
    let (cert, key) = (path(&grpc.tcp_tls_cert), path(&grpc.tcp_tls_key));
    match (cert, key, path(&grpc.tcp_tls_ca)) {
        (Some(cert), Some(key), ca) => Ok(Some(Tls { cert, key, ca })),
        (None, None, None) => Ok(None),
        (Some(_), None, _) => Err(Error::invalid(
            "grpc.tcp_tls_key",
            "missing, beside tcp_tls_cert: it names the key of that certificate",
        )),
        (None, ..) => Err(Error::invalid(
            "grpc.tcp_tls_cert",
            "missing, beside other tcp_tls_* keys: it names the certificate of the daemon",
        )),
    }
}
