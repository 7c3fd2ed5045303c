//! Registries reached from here instead of by the daemon: `--local`, and single objects of a
//! repository.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use lighter_floor::Digest;
use lighter_floor::digest::Algorithm;
use lighter_proto::containerd::types::transfer::AuthType;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_registry::{
    Access, Anonymous, Blob, Config, Credential, Credentials, HostsConfig, Limits, OneHost, Pushed,
    Reference, Registry, Secret, Session, SessionOptions, Sink, SinkError, Target, Tls,
};
use sha2::{Digest as _, Sha256};

use crate::advice;
use crate::client::Client;
use crate::content::{self, MAX_JSON, Writer};
use crate::flags::RegistryFlags;
use crate::image::model::Descriptor;
use crate::transfer;

/// A repository of a registry.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    session: Arc<Session>,
}

impl Remote {
    /// Reads the configuration of the host that `name` begins with; connects to nothing yet.
    pub(crate) async fn open(
        name: &str,
        flags: &RegistryFlags,
        access: Access,
    ) -> anyhow::Result<Self> {
        if flags.http_dump || flags.http_trace {
            return advice::fail(
                "--http-dump and --http-trace show what the daemon's client does",
                "leave out --local",
            );
        }
        let reference =
            Reference::parse(name).with_context(|| format!("{name:?} is no reference"))?;
        let default_scheme = if flags.plain_http { "http" } else { "" };
        let pair = flags.tlscert.clone().map(|cert| {
            let key = flags.tlskey.clone().unwrap_or_else(|| cert.clone());
            (cert, key)
        });
        let hosts = HostsConfig {
            roots: flags.hosts_dir.iter().cloned().collect(),
            default_scheme: default_scheme.to_owned(),
            tls: Tls {
                ca: flags.tlscacert.iter().cloned().collect(),
                client: pair.into_iter().collect(),
                skip_verify: flags.skip_verify,
            },
        };
        let registry = Registry::new(Config {
            hosts,
            limits: Limits::default(),
        });
        let options = SessionOptions {
            access,
            credentials: credentials(flags)?,
            ..SessionOptions::default()
        };
        let session = Arc::new(registry.session(reference, options).await?);
        Ok(Self { session })
    }

    /// The reference it was opened by.
    pub(crate) fn reference(&self) -> &Reference {
        self.session.reference()
    }

    /// What the reference means.
    pub(crate) async fn resolve(&self) -> anyhow::Result<Target> {
        Ok(self.session.resolve().await?)
    }

    /// A manifest or configuration, whole.
    pub(crate) async fn document(&self, target: &Target) -> anyhow::Result<Vec<u8>> {
        anyhow::ensure!(
            usize::try_from(target.size_bytes).is_ok_and(|size| size <= MAX_JSON),
            "{} is larger than {MAX_JSON} bytes, too large for a manifest or config",
            target.digest
        );
        let mut sink = Vec::<u8>::new();
        self.session.fetch(target, &mut sink, &|_| {}).await?;
        Ok(sink)
    }

    /// Fetches a blob into an ingest that was just opened; `progress` hears how far it is.
    pub(crate) async fn fetch(
        &self,
        target: &Target,
        writer: &mut Writer,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> anyhow::Result<()> {
        writer.restart();
        let mut sink = Ingest {
            writer,
            hash: Sha256::new(),
            written: 0,
        };
        Ok(self.session.fetch(target, &mut sink, progress).await?)
    }

    /// Writes an object to standard output, checking it on the way.
    pub(crate) async fn print(&self, target: &Target) -> anyhow::Result<()> {
        let mut sink = Printed {
            hash: Sha256::new(),
            written: 0,
        };
        Ok(self.session.fetch(target, &mut sink, &|_| {}).await?)
    }

    /// Uploads a blob of the daemon's content, unless the repository has it.
    pub(crate) async fn push_blob(
        &self,
        client: &Client,
        target: Target,
        mount_from: Option<String>,
        sent: Arc<AtomicU64>,
    ) -> anyhow::Result<Pushed> {
        let (client, digest) = (client.clone(), target.digest.to_string());
        let open = move || {
            let (client, digest) = (client.clone(), digest.clone());
            async move {
                let parts = content::stream(&client, &digest)
                    .await
                    .map_err(std::io::Error::other)?;
                Ok(parts
                    .map_ok(|part| part.data)
                    .map_err(std::io::Error::other))
            }
            .into_stream_of()
        };
        let blob = Blob {
            target,
            mount_from,
            open: Arc::new(open),
            sent,
        };
        Ok(self.session.push_blob(&blob).await?)
    }

    /// Uploads a manifest under `tag`, or by its digest.
    pub(crate) async fn push_manifest(
        &self,
        target: &Target,
        bytes: Vec<u8>,
        tag: Option<&str>,
    ) -> anyhow::Result<Pushed> {
        Ok(self
            .session
            .push_manifest(target, bytes.into(), tag)
            .await?)
    }
}

/// A future of a stream as the stream itself.
trait IntoStreamOf<T> {
    fn into_stream_of(self) -> futures::stream::BoxStream<'static, std::io::Result<T>>;
}

impl<T: 'static, F, S> IntoStreamOf<T> for F
where
    F: Future<Output = std::io::Result<S>> + Send + 'static,
    S: futures::Stream<Item = std::io::Result<T>> + Send + 'static,
{
    fn into_stream_of(self) -> futures::stream::BoxStream<'static, std::io::Result<T>> {
        futures::stream::once(self).try_flatten().boxed()
    }
}

/// What a descriptor asks a registry for.
///
/// # Errors
/// For a malformed digest or a negative size.
pub(crate) fn target(descriptor: &Descriptor) -> anyhow::Result<Target> {
    let urls = descriptor.rest.get("urls").and_then(|urls| urls.as_array());
    Ok(Target {
        media_type: descriptor.media_type.clone(),
        digest: Digest::parse(&descriptor.digest)?,
        size_bytes: u64::try_from(descriptor.size)
            .with_context(|| format!("{} has a negative size", descriptor.digest))?,
        urls: urls
            .into_iter()
            .flatten()
            .filter_map(|url| url.as_str().map(str::to_owned))
            .collect(),
        annotations: descriptor.annotations.clone(),
    })
}

fn credentials(flags: &RegistryFlags) -> anyhow::Result<Arc<dyn Credentials>> {
    let Some(answer) = transfer::credentials(flags)? else {
        return Ok(Arc::new(Anonymous));
    };
    let secret = Secret::new(answer.secret.clone());
    let credential = if answer.auth_type() == AuthType::Refresh {
        Credential::Refresh(secret)
    } else {
        Credential::Basic {
            username: answer.username,
            password: secret,
        }
    };
    Ok(Arc::new(OneHost {
        host: None,
        credential,
    }))
}

fn sum(hash: &Sha256) -> Digest {
    Digest::from_raw(Algorithm::Sha256, &hash.clone().finalize())
}

fn refused(message: impl Into<String>) -> SinkError {
    WireError::new(ErrorKind::Unknown, message).into()
}

/// An ingest of the daemon's content store.
#[derive(Debug)]
struct Ingest<'a> {
    writer: &'a mut Writer,
    hash: Sha256,
    written: u64,
}

#[async_trait]
impl Sink for Ingest<'_> {
    fn offset(&self) -> u64 {
        self.written
    }
    async fn digest(&mut self) -> Result<Digest, SinkError> {
        Ok(sum(&self.hash))
    }
    async fn write(&mut self, data: Bytes) -> Result<(), SinkError> {
        self.hash.update(&data);
        self.written += data.len() as u64;
        let written = self.writer.write(data).await;
        written.map_err(|status| refused(status.message()))
    }
    async fn reset(&mut self) -> Result<(), SinkError> {
        self.writer.restart();
        self.hash = Sha256::new();
        self.written = 0;
        Ok(())
    }
}

/// Standard output.
#[derive(Debug)]
struct Printed {
    hash: Sha256,
    written: u64,
}

#[async_trait]
impl Sink for Printed {
    fn offset(&self) -> u64 {
        self.written
    }
    async fn digest(&mut self) -> Result<Digest, SinkError> {
        Ok(sum(&self.hash))
    }
    async fn write(&mut self, data: Bytes) -> Result<(), SinkError> {
        self.hash.update(&data);
        self.written += data.len() as u64;
        crate::table::raw(&data).map_err(|error| refused(error.to_string()))
    }
    async fn reset(&mut self) -> Result<(), SinkError> {
        if self.written == 0 {
            return Ok(());
        }
        Err(refused(
            "the registry's answer broke off and cannot be resumed: what was printed is no use",
        ))
    }
}
