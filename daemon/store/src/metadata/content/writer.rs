//! An open ingest: written, truncated, committed.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use lighter_proto::containerd::events::ContentCreate;

use super::{Content, forget_ingest, release_file, shared_status};
use crate::content::{Ingest, IngestStatus, Open, RefGuard, blob_exists, digest_mismatch};
use crate::events::topic;
use crate::metadata::db::{Change, Discarded, Inner};
use crate::metadata::keys::{self, table};
use crate::metadata::leases::{self, KIND_CONTENT, KIND_INGESTS};
use crate::metadata::records::{BlobRecord, IngestRecord, Stamps};
use crate::{Digest, Error, Labels, Scope, labels};

/// Bytes copied at a time when a shared ingest becomes a real one.
const COPY_BYTES: usize = 1 << 20;

/// An open ingest: holds the lock on its ref until dropped; dropping keeps the bytes for resume.
#[derive(Debug)]
pub struct Writer {
    pub(super) inner: Arc<Inner>,
    pub(super) scope: Scope,
    pub(super) reference: String,
    pub(super) record: IngestRecord,
    pub(super) bytes: Source,
    pub(super) lock: RefGuard,
}

/// An ingest that is removed unless it is committed, whatever becomes of who writes it.
#[derive(Debug)]
pub struct Unfinished(Option<Writer>);

impl Unfinished {
    /// The ingest.
    pub fn writer(&mut self) -> &mut Writer {
        self.0.as_mut().expect("it is not committed yet")
    }

    /// The ingest, which stays from now on.
    #[must_use]
    pub fn finish(mut self) -> Writer {
        self.0.take().expect("it is not committed yet")
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(writer) = self.0.take() {
            writer.abandon();
        }
    }
}

impl Content {
    /// Opens an ingest for whoever writes all of it at once and has nothing to resume.
    ///
    /// # Errors
    /// As [`Content::writer`].
    ///
    /// # Cancellation
    /// An ingest that nobody waited for is removed.
    pub async fn unfinished(&self, scope: &Scope, reference: &str) -> Result<Unfinished, Error> {
        let (content, scope, reference) = (self.clone(), scope.clone(), reference.to_owned());
        let opening = self.inner.tasks.spawn(async move {
            let opened = content.writer(&scope, &reference, 0, None).await;
            opened.map(|writer| Unfinished(Some(writer)))
        });
        opening.await.unwrap_or_else(|error| {
            Err(Error::Io {
                operation: "open an ingest in",
                path: PathBuf::new(),
                source: std::io::Error::other(error),
            })
        })
    }
}

/// Where an open ingest's bytes are.
#[derive(Debug)]
pub(super) enum Source {
    /// In a blob that is here already.
    Shared(Digest),
    Own(Box<dyn Ingest>),
}

impl Writer {
    /// Bytes so far, total, expected digest, times.
    #[must_use]
    pub fn status(&self) -> IngestStatus {
        match &self.bytes {
            Source::Shared(digest) => {
                shared_status(self.reference.clone(), digest.clone(), &self.record)
            }
            Source::Own(ingest) => IngestStatus {
                reference: self.reference.clone(),
                ..ingest.status()
            },
        }
    }

    /// Digest of the bytes so far.
    ///
    /// # Errors
    /// `DataLoss` after a write that was dropped midway.
    pub async fn digest(&mut self) -> Result<Digest, Error> {
        match &mut self.bytes {
            Source::Shared(digest) => Ok(digest.clone()),
            Source::Own(ingest) => ingest.digest().await,
        }
    }

    /// Appends.
    ///
    /// # Errors
    /// `Io`.
    ///
    /// # Cancellation
    /// How much was appended is unknown; the ingest must be opened again.
    pub async fn write(&mut self, data: Bytes) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        if let Source::Shared(digest) = &self.bytes {
            let shared = self.inner.content.reader(digest).await?;
            let own = self.unshare().await?;
            let mut at = 0;
            while let chunk = shared.read_at(at, COPY_BYTES).await?
                && !chunk.is_empty()
            {
                at += chunk.len() as u64;
                own.write(chunk).await?;
            }
            return own.write(data).await;
        }
        match &mut self.bytes {
            Source::Own(ingest) => ingest.write(data).await,
            Source::Shared(_) => Ok(()),
        }
    }

    /// Back to `size_bytes`; only 0 is supported.
    ///
    /// # Errors
    /// `Unimplemented` for another size.
    pub async fn truncate(&mut self, size_bytes: u64) -> Result<(), Error> {
        match &mut self.bytes {
            Source::Own(ingest) => ingest.truncate(size_bytes).await,
            Source::Shared(_) if size_bytes == 0 => self.unshare().await.map(|_| ()),
            Source::Shared(_) => Err(Error::Unimplemented {
                what: format!("truncation of an ingest to {size_bytes} bytes"),
            }),
        }
    }

    /// Makes the ingest a real, empty one.
    async fn unshare(&mut self) -> Result<&mut Box<dyn Ingest>, Error> {
        let open = Open {
            reference: self.record.backend.clone(),
            ..Open::default()
        };
        let mut own = self.inner.content.writer(open).await?;
        own.truncate(0).await?;
        let mut record = self.record.clone();
        record.expected.clear();
        record.size_bytes = 0;
        let namespace = &self.scope.namespace;
        let ((), _durable_with_the_commit) = self.inner.apply(|change| {
            let key = keys::object(table::INGESTS, namespace, &self.reference);
            change.put(key, &record);
            release_file(change, &self.record.expected, namespace, &self.reference)
        })?;
        self.record = record;
        self.bytes = Source::Own(own);
        match &mut self.bytes {
            Source::Own(own) => Ok(own),
            Source::Shared(_) => Err(Error::Precondition {
                reason: "the ingest is shared".to_owned(),
            }),
        }
    }

    /// Removes it in the background, for whoever is cut off while writing. The ref is free afterwards and
    /// not before, so that nobody's next attempt is removed.
    pub fn abandon(self) {
        let content = Content {
            inner: self.inner.clone(),
        };
        let tasks = self.inner.tasks.clone();
        tasks.spawn(async move {
            if let Err(error) = content.abort(&self.scope, &self.reference).await {
                tracing::debug!(%error, r#ref = self.reference, "an ingest was not removed");
            }
            drop(self);
        });
    }

    /// Makes it a blob: size (when not 0) and digest (when given) must match, bytes and record are
    /// durable afterwards. Event `/content/create`.
    ///
    /// # Errors
    /// `FailedPrecondition` on a mismatch, `AlreadyExists` when the namespace has it (the ingest is
    /// gone then too).
    ///
    /// # Cancellation
    /// The commit goes on.
    pub async fn commit(
        self,
        size_bytes: u64,
        expected: Option<&Digest>,
        labels: Labels,
    ) -> Result<Digest, Error> {
        let expected = expected.cloned();
        let tasks = self.inner.tasks.clone();
        let job = tasks.spawn(self.commit_now(size_bytes, expected, labels));
        job.await.unwrap_or_else(|error| {
            Err(Error::Io {
                operation: "commit",
                path: PathBuf::new(),
                source: std::io::Error::other(error),
            })
        })
    }

    async fn commit_now(
        self,
        size_bytes: u64,
        expected: Option<Digest>,
        mut labels: Labels,
    ) -> Result<Digest, Error> {
        labels::check(&labels)?;
        labels::drop_empty(&mut labels);
        let offset = self.status().offset_bytes;
        if size_bytes > 0 && size_bytes != offset {
            return Err(Error::Precondition {
                reason: format!(
                    "\"{}\" failed size validation: {offset} != {size_bytes}",
                    self.reference
                ),
            });
        }
        let Self {
            inner,
            scope,
            reference,
            bytes,
            lock: _lock,
            ..
        } = self;
        let (digest, _file) = match bytes {
            Source::Shared(digest) => {
                if let Some(expected) = &expected
                    && *expected != digest
                {
                    return Err(digest_mismatch(&digest, expected));
                }
                // The ingest's hold keeps the file until the record does.
                (digest, None)
            }
            Source::Own(mut ingest) => {
                let digest = match &expected {
                    Some(expected) => expected.clone(),
                    None => ingest.digest().await?,
                };
                let file = inner.digests.lock(digest.as_str()).await;
                match ingest.commit(size_bytes, expected.as_ref()).await {
                    Ok(digest) => (digest, Some(file)),
                    // Another namespace's; the bytes were shown, so it is this one's as well.
                    Err(Error::AlreadyExists { .. }) => (digest, Some(file)),
                    Err(error) => return Err(error),
                }
            }
        };
        let recorded = inner
            .update(|change| record_blob(change, &scope, &reference, &digest, offset, labels))
            .await;
        match recorded {
            Ok(false) => Ok(digest),
            Ok(true) => Err(blob_exists(&digest)),
            Err(error) => {
                inner.discard(Discarded::Blob(digest.as_str().to_owned()));
                Err(error)
            }
        }
    }
}

/// Turns an ingest's record into a blob's. Whether the blob's was there already.
fn record_blob(
    change: &mut Change<'_, '_>,
    scope: &Scope,
    reference: &str,
    digest: &Digest,
    size_bytes: u64,
    labels: Labels,
) -> Result<bool, Error> {
    let namespace = &scope.namespace;
    let key = keys::blob(namespace, digest);
    let existed = change.contains(&key)?;
    if !existed {
        change.ensure_namespace(namespace)?;
        let record = BlobRecord {
            stamps: Stamps::now(),
            labels,
            size_bytes,
        };
        change.put(key, &record);
        change.mark(keys::holder(digest.as_str(), namespace, ""));
        let event = ContentCreate {
            digest: digest.as_str().to_owned(),
            size: i64::try_from(size_bytes).unwrap_or(i64::MAX),
            ..ContentCreate::default()
        };
        change.publish(namespace, topic::CONTENT_CREATE, &event);
    }
    let ingest = keys::object(table::INGESTS, namespace, reference);
    if let Some(value) = change.tx.get(&ingest)? {
        forget_ingest(change, namespace, &ingest, &value)?;
    }
    leases::detach(change, scope, KIND_INGESTS, reference);
    leases::attach(change, scope, KIND_CONTENT, digest.as_str())?;
    Ok(existed)
}
