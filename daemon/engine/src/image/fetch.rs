//! Blobs into the content store: one download a digest, however many ask.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::metadata::Content;
use lighter_store::metadata::content::Writer;
use lighter_store::{Digest, Labels, Scope};
use tokio::sync::Semaphore;
use tracing::debug;

use super::children::{Layers, gc_labels, ingest_ref, source_label};
use super::manifest::{self, Document, MAX_DOCUMENT_BYTES};
use super::{Descriptor, Error, Locks, Tracker};
use crate::registry::{self, Session, Sink, SinkError};

/// First pause while somebody else writes the same ref; doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(16);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How long a ref may be held by another without our seeing it done.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// Where blobs come from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// A registry.
    Registry(Arc<Session>),
    /// They must be in the content store.
    Store,
}

/// What goes with fetching one image.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Namespace and lease.
    pub scope: Scope,
    /// Where blobs come from.
    pub origin: Origin,
    /// Who watches.
    pub tracker: Tracker,
    /// Whether manifests keep their layers.
    pub layers: Layers,
}

/// Fetches the blobs of one image; clones share everything.
#[derive(Debug, Clone)]
pub struct Fetcher {
    content: Content,
    locks: Locks,
    /// Downloads at once.
    downloads: Arc<Semaphore>,
    options: Arc<FetchOptions>,
}

impl Fetcher {
    /// A fetcher over `content`. `locks` are those of the daemon.
    #[must_use]
    pub fn new(
        content: Content,
        locks: Locks,
        downloads: Arc<Semaphore>,
        options: FetchOptions,
    ) -> Self {
        Self {
            content,
            locks,
            downloads,
            options: Arc::new(options),
        }
    }

    /// Namespace and lease.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.options.scope
    }

    /// Who watches.
    #[must_use]
    pub fn tracker(&self) -> &Tracker {
        &self.options.tracker
    }

    /// The store blobs go to.
    #[must_use]
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Brings a manifest or index into the store, labelled with its children, and reads it.
    ///
    /// # Errors
    /// [`Error::Malformed`] before anything is stored; else as the registry and the store say.
    pub async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        let options = &self.options;
        let held = self.lock(descriptor).await;
        let known = match self.content.info(&options.scope, &descriptor.digest) {
            Ok(info) => Some(info),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        let bytes = match (&known, descriptor.embedded()) {
            (Some(_), _) => {
                let digest = &descriptor.digest;
                self.content
                    .read(&options.scope, digest, MAX_DOCUMENT_BYTES)
                    .await?
            }
            (None, Some(data)) => Bytes::copy_from_slice(data),
            (None, None) => {
                options.tracker.set(descriptor, "downloading", 0);
                self.download_small(descriptor).await?
            }
        };
        let document = manifest::parse(&descriptor.media_type, &descriptor.digest, &bytes)?;
        let labels = gc_labels(&document.children(), options.layers);
        self.keep(descriptor, &labels, bytes).await?;
        drop(held);
        let event = if known.is_some() {
            "already exists"
        } else {
            "complete"
        };
        options.tracker.done(descriptor, event);
        Ok(document)
    }

    async fn lock(&self, descriptor: &Descriptor) -> super::locks::Held {
        let key = format!("blob://{}", descriptor.digest);
        let tracker = &self.options.tracker;
        self.locks
            .lock(&key, |bytes| tracker.set(descriptor, "downloading", bytes))
            .await
    }

    async fn download_small(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        let session = self.session(descriptor)?;
        let limit = registry::MAX_MANIFEST_BYTES;
        if descriptor.size_bytes > limit {
            return Err(Error::Malformed {
                digest: descriptor.digest.clone(),
                reason: format!("rejecting {} byte manifest", descriptor.size_bytes),
            });
        }
        let mut sink = Vec::<u8>::new();
        session
            .fetch(&descriptor.target(), &mut sink, &|_| {})
            .await?;
        Ok(sink.into())
    }

    fn session(&self, descriptor: &Descriptor) -> Result<&Arc<Session>, Error> {
        match &self.options.origin {
            Origin::Registry(session) => Ok(session),
            Origin::Store => Err(lighter_store::Error::NotFound {
                what: format!("content {}", descriptor.digest),
            }
            .into()),
        }
    }

    /// Stores a small blob that is in memory, or adds the labels it lacks.
    ///
    /// # Errors
    /// As the store says.
    pub async fn keep(
        &self,
        descriptor: &Descriptor,
        labels: &Labels,
        bytes: Bytes,
    ) -> Result<(), Error> {
        let mut labels = labels.clone();
        self.add_source(&mut labels, None);
        if let Some(mut writer) = self.writer(descriptor).await? {
            if writer.status().offset_bytes != descriptor.size_bytes
                || writer.status().expected.is_none()
            {
                writer.truncate(0).await?;
                writer.write(bytes).await?;
            }
            let size = descriptor.size_bytes;
            match writer
                .commit(size, Some(&descriptor.digest), labels.clone())
                .await
            {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.label(&descriptor.digest, labels).await
    }

    /// Adds labels that the blob lacks; its source too.
    async fn label(&self, digest: &Digest, mut labels: Labels) -> Result<(), Error> {
        let scope = &self.options.scope;
        let known = self.content.info(scope, digest)?;
        self.add_source(&mut labels, Some(&known.labels));
        labels.retain(|key, value| known.labels.get(key) != Some(value));
        if labels.is_empty() {
            return Ok(());
        }
        let mask: Vec<String> = labels.keys().map(|key| format!("labels.{key}")).collect();
        self.content.update(scope, digest, labels, &mask).await?;
        Ok(())
    }

    /// Labels a blob that is in the store.
    ///
    /// # Errors
    /// `NotFound`; as the store says.
    pub async fn set_labels(&self, digest: &Digest, labels: Labels) -> Result<(), Error> {
        let known = self.content.info(&self.options.scope, digest)?;
        let changed = labels
            .iter()
            .any(|(key, value)| known.labels.get(key) != Some(value));
        if changed {
            let mask: Vec<String> = labels.keys().map(|key| format!("labels.{key}")).collect();
            self.content
                .update(&self.options.scope, digest, labels, &mask)
                .await?;
        }
        Ok(())
    }

    fn add_source(&self, labels: &mut Labels, known: Option<&Labels>) {
        let Origin::Registry(session) = &self.options.origin else {
            return;
        };
        let reference = session.reference();
        let (host, repository) = (reference.host(), reference.repository());
        let key = format!("{}.{host}", lighter_store::labels::DISTRIBUTION_SOURCE);
        let current = known
            .and_then(|labels| labels.get(&key))
            .map(String::as_str);
        match source_label(host, repository, current) {
            Some((key, value)) => labels.insert(key, value),
            // Without this, the value that was made for a new blob would replace the list.
            None => labels.remove(&key),
        };
    }

    /// An open ingest for the blob; `None` when the namespace has it (and the lease holds it).
    async fn writer(&self, descriptor: &Descriptor) -> Result<Option<Writer>, Error> {
        let reference = ingest_ref(descriptor);
        let scope = &self.options.scope;
        let mut pause = MIN_PAUSE;
        let began = std::time::Instant::now();
        loop {
            let digest = Some(&descriptor.digest);
            let opened = self
                .content
                .writer(scope, &reference, descriptor.size_bytes, digest)
                .await;
            match opened {
                Ok(writer) => return Ok(Some(writer)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
                // A client of ours may be writing the same blob: it will be done or gone.
                Err(error)
                    if error.kind() == ErrorKind::Unavailable && began.elapsed() < MAX_WAIT =>
                {
                    debug!(r#ref = %reference, %error, "waiting for another writer");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Brings a blob into the store.
    ///
    /// # Errors
    /// As the registry and the store say.
    ///
    /// # Cancellation
    /// Safe: the next fetch goes on where this one stopped.
    pub async fn blob(&self, descriptor: &Descriptor) -> Result<(), Error> {
        let options = &self.options;
        let held = self.lock(descriptor).await;
        let Some(mut writer) = self.writer(descriptor).await? else {
            self.label(&descriptor.digest, Labels::new()).await?;
            options.tracker.done(descriptor, "already exists");
            return Ok(());
        };
        let fetched = if let Some(data) = descriptor.embedded() {
            writer.truncate(0).await?;
            writer
                .write(Bytes::copy_from_slice(data))
                .await
                .map_err(Error::from)
        } else if writer.status().offset_bytes == descriptor.size_bytes && descriptor.size_bytes > 0
        {
            // Another namespace has it, or the last attempt ended just before its commit.
            Ok(())
        } else {
            let session = self.session(descriptor)?;
            let _permit = self
                .downloads
                .acquire()
                .await
                .map_err(|_| Error::Abandoned)?;
            options
                .tracker
                .set(descriptor, "downloading", writer.status().offset_bytes);
            let progress = |bytes| {
                held.progress(bytes);
                options.tracker.set(descriptor, "downloading", bytes);
            };
            session
                .fetch(&descriptor.target(), &mut Ingest(&mut writer), &progress)
                .await
                .map_err(Error::from)
        };
        fetched?;
        let mut labels = Labels::new();
        self.add_source(&mut labels, None);
        let size = descriptor.size_bytes;
        let committed = writer.commit(size, Some(&descriptor.digest), labels).await;
        match committed {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                self.label(&descriptor.digest, Labels::new()).await?;
            }
            Err(error) => {
                if error.kind() == ErrorKind::FailedPrecondition {
                    // Wrong bytes are of no use to the next attempt.
                    let aborted = self
                        .content
                        .abort(&options.scope, &ingest_ref(descriptor))
                        .await;
                    if let Err(error) = aborted {
                        debug!(digest = %descriptor.digest, %error, "ingest not aborted");
                    }
                }
                return Err(error.into());
            }
        }
        drop(held);
        options.tracker.done(descriptor, "complete");
        Ok(())
    }

    /// Brings a small blob into the store and reads it.
    ///
    /// # Errors
    /// As [`Fetcher::blob`]; `ResourceExhausted` when it is larger than `limit_bytes`.
    pub async fn read(&self, descriptor: &Descriptor, limit_bytes: u64) -> Result<Bytes, Error> {
        self.blob(descriptor).await?;
        Ok(self
            .content
            .read(&self.options.scope, &descriptor.digest, limit_bytes)
            .await?)
    }
}

/// An ingest of the content store as what a registry fetches into.
struct Ingest<'a>(&'a mut Writer);

#[async_trait]
impl Sink for Ingest<'_> {
    fn offset(&self) -> u64 {
        self.0.status().offset_bytes
    }
    async fn digest(&mut self) -> Result<Digest, SinkError> {
        Ok(self.0.digest().await?)
    }
    async fn write(&mut self, data: Bytes) -> Result<(), SinkError> {
        Ok(self.0.write(data).await?)
    }
    async fn reset(&mut self) -> Result<(), SinkError> {
        Ok(self.0.truncate(0).await?)
    }
}
