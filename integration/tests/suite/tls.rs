//! The TCP port over TLS: who is let in, and what is served there.

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use hyper_util::rt::TokioIo;
use lighter_integration::{Daemon, Options, Result, Subject};
use lighter_proto::containerd::services::version::v1::version_client::VersionClient;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// A certificate and its key.
struct Pair {
    cert: CertificateDer<'static>,
    key: Vec<u8>,
}

/// Signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new(vec!["an authority".to_owned()])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self(issuer))
    }

    fn sign(&self, name: &str) -> Result<Pair> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![name.to_owned()])?;
        let cert = params.signed_by(&key, &self.0)?;
        Ok(Pair {
            cert: cert.der().clone(),
            key: key.serialize_der(),
        })
    }

    fn cert(&self) -> CertificateDer<'static> {
        self.0.as_ref().der().clone()
    }
}

fn write(path: &Path, what: &str, der: &[u8]) -> Result {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(String::from_utf8_lossy);
    let lines: Vec<_> = lines.collect();
    let pem = format!(
        "-----BEGIN {what}-----\n{}\n-----END {what}-----\n",
        lines.join("\n")
    );
    Ok(std::fs::write(path, pem)?)
}

/// A client that trusts `authority` and shows `own`.
fn connector(authority: &Authority, own: Option<&Pair>) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.cert())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.key.clone()));
            builder.with_client_auth_cert(vec![pair.cert.clone()], key)?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn dial(port: u16, tls: Option<TlsConnector>) -> Result<Channel> {
    let connect = tower::service_fn(move |_: Uri| {
        let tls = tls.clone();
        async move {
            let stream = TcpStream::connect(("127.0.0.1", port)).await?;
            let Some(tls) = tls else {
                return Ok::<_, std::io::Error>(TokioIo::new(Either::Left(stream)));
            };
            let name = ServerName::try_from("localhost").expect("a name");
            let stream = tls.connect(name, stream).await?;
            Ok(TokioIo::new(Either::Right(Box::new(stream))))
        }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    Ok(endpoint.connect_with_connector(connect).await?)
}

/// What a call over the connection is answered, if it comes to one.
async fn ask(port: u16, tls: Option<TlsConnector>) -> Result<Status> {
    let channel = dial(port, tls).await?;
    let answer = VersionClient::new(channel).version(()).await;
    // Nothing but CRI is served over TCP, and CRI is off here.
    Ok(answer.expect_err("only for the socket"))
}

type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;
type Either = tokio_util::either::Either<TcpStream, Box<TlsStream>>;

#[tokio::test]
async fn only_clients_with_a_certificate_of_the_ca_are_served() -> Result {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let (authority, stranger) = (Authority::new()?, Authority::new()?);
    let server = authority.sign("localhost")?;
    write(&path("ca"), "CERTIFICATE", &authority.cert())?;
    write(&path("cert"), "CERTIFICATE", &server.cert)?;
    write(&path("key"), "PRIVATE KEY", &server.key)?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let text = format!(
        "version = 2\n[grpc]\ntcp_address = '127.0.0.1:{port}'\ntcp_tls_cert = {:?}\n\
         tcp_tls_key = {:?}\ntcp_tls_ca = {:?}\n",
        path("cert"),
        path("key"),
        path("ca")
    );
    std::fs::write(path("tls.toml"), text)?;
    let options = Options {
        // Keys of a table that the file has already come by import.
        head: format!("imports = [{:?}]\n", path("tls.toml")),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;

    let own = authority.sign("a client")?;
    let answer = ask(port, Some(connector(&authority, Some(&own))?)).await?;
    assert_eq!(answer.code(), Code::Unimplemented, "{answer}");

    let foreign = stranger.sign("a client")?;
    for (who, tls) in [
        ("nobody", Some(connector(&authority, None)?)),
        ("a stranger", Some(connector(&authority, Some(&foreign))?)),
        ("in the clear", None),
    ] {
        // Refused while connecting or at the first call, by who is quicker.
        if let Ok(status) = ask(port, tls).await {
            assert_ne!(status.code(), Code::Unimplemented, "{who}: {status}");
        }
    }
    // One that says nothing holds up nobody.
    let _silent = TcpStream::connect(("127.0.0.1", port)).await?;
    let answer = ask(port, Some(connector(&authority, Some(&own))?)).await?;
    assert_eq!(answer.code(), Code::Unimplemented, "{answer}");
    daemon.client().await?.version().await?;
    daemon.finish().await
}
