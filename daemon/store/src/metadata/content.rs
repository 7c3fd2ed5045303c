//! Blobs as a namespace sees them, and the ingests that become blobs.
//!
//! A file is shared by all namespaces that hold it; a namespace holds it by its record or by an
//! ingest that waits to become one. Opening an ingest for a digest whose bytes are here already
//! opens no file: such a *shared* writer reports the whole size, so that a client commits at once;
//! bytes that it sends anyway go to a real ingest.

mod open;
mod session;
mod writer;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use lighter_proto::containerd::events::ContentDelete;

pub use self::session::Scoped;
pub use self::writer::{Unfinished, Writer};
use super::db::{Change, Discarded, Inner};
use super::keys::{self, Parts, table};
use super::leases::{self, KIND_CONTENT, KIND_INGESTS};
use super::records::{BlobRecord, IngestRecord, decode};
use crate::content::{BlobReader, IngestStatus, blob_not_found, ingest_not_found};
use crate::events::topic;
use crate::filter::{self, Fields, Filter};
use crate::{Digest, Error, Labels, Namespace, Scope, labels};

/// The record of a blob in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Digest.
    pub digest: Digest,
    /// Bytes.
    pub size_bytes: u64,
    /// When it came into the namespace.
    pub created_at: SystemTime,
    /// When its labels changed.
    pub updated_at: SystemTime,
    /// Labels.
    pub labels: Labels,
}

impl BlobInfo {
    fn of(digest: Digest, record: BlobRecord) -> Self {
        Self {
            digest,
            size_bytes: record.size_bytes,
            created_at: record.stamps.created_at(),
            updated_at: record.stamps.updated_at(),
            labels: record.labels,
        }
    }
}

impl Fields for BlobInfo {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.split_first()? {
            (first, []) if first == "digest" => Some(Cow::Borrowed(self.digest.as_str())),
            (first, rest) if first == "labels" => filter::entry(&self.labels, rest),
            _ => None,
        }
    }
}

/// Blobs of all namespaces.
#[derive(Debug, Clone)]
pub struct Content {
    inner: Arc<Inner>,
}

impl Content {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// The record of a blob.
    ///
    /// # Errors
    /// `NotFound`, text `content sha256:…: not found`.
    pub fn info(&self, scope: &Scope, digest: &Digest) -> Result<BlobInfo, Error> {
        let key = keys::blob(&scope.namespace, digest);
        self.inner
            .get(&key, || format!("content {digest}"))?
            .map(|record| BlobInfo::of(digest.clone(), record))
            .ok_or_else(|| blob_not_found(digest))
    }

    /// Changes labels by field mask (`labels`, `labels.*`; empty: replace all).
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        scope: &Scope,
        digest: &Digest,
        labels: Labels,
        mask: &[String],
    ) -> Result<BlobInfo, Error> {
        self.inner
            .update(|change| {
                let key = keys::blob(&scope.namespace, digest);
                let mut record: BlobRecord = change
                    .get(&key, || format!("content {digest}"))?
                    .ok_or_else(|| blob_not_found(digest))?;
                let object = format!("content info \"{digest}\"");
                labels::apply_mask(&mut record.labels, &labels, mask, &object)?;
                labels::check(&record.labels)?;
                record.stamps.touch();
                change.put(key, &record);
                Ok(BlobInfo::of(digest.clone(), record))
            })
            .await
    }

    /// Matching blobs in byte order of digest.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<BlobInfo>, Error> {
        let mut found = Vec::new();
        for (digest, record) in self.inner.list(table::BLOBS, &scope.namespace)? {
            let info = BlobInfo::of(Digest::parse(&digest)?, record);
            if filter.matches(&info) {
                found.push(info);
            }
        }
        Ok(found)
    }

    /// Removes the record; the bytes go with a later collection. Event `/content/delete`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, scope: &Scope, digest: &Digest) -> Result<(), Error> {
        self.inner
            .update(|change| {
                if !change.contains(&keys::blob(&scope.namespace, digest))? {
                    return Err(blob_not_found(digest));
                }
                leases::detach(change, scope, KIND_CONTENT, digest.as_str());
                remove_blob(change, &scope.namespace, digest.as_str())?;
                let event = ContentDelete {
                    digest: digest.as_str().to_owned(),
                };
                change.publish(&scope.namespace, topic::CONTENT_DELETE, &event);
                Ok(())
            })
            .await
    }

    /// Opens a blob for reading at any offset.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn reader(&self, scope: &Scope, digest: &Digest) -> Result<BlobReader, Error> {
        self.info(scope, digest)?;
        self.inner.content.reader(digest).await
    }

    /// Reads a whole small blob (manifest, config), at most `limit_bytes`, and checks its digest.
    ///
    /// # Errors
    /// `NotFound`, `ResourceExhausted` when it is larger, `DataLoss` when it is not what it was.
    pub async fn read(
        &self,
        scope: &Scope,
        digest: &Digest,
        limit_bytes: u64,
    ) -> Result<Bytes, Error> {
        let reader = self.reader(scope, digest).await?;
        let size = reader.size_bytes();
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        if size > limit_bytes {
            return Err(Error::Exhausted {
                reason: format!(
                    "content {digest} has {size} bytes, at most {limit_bytes} are read"
                ),
            });
        }
        let bytes = reader.read_at(0, length).await?;
        if bytes.len() != length || Digest::compute(digest.algorithm(), &bytes) != *digest {
            return Err(Error::Damaged {
                what: format!("content {digest}"),
            });
        }
        Ok(bytes)
    }

    /// One ingest.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn status(&self, scope: &Scope, reference: &str) -> Result<IngestStatus, Error> {
        let key = keys::object(table::INGESTS, &scope.namespace, reference);
        let record = self
            .inner
            .get(&key, || format!("ingest {reference:?}"))?
            .ok_or_else(|| ingest_not_found(reference))?;
        match self.status_of(reference.to_owned(), record).await {
            Err(Error::NotFound { .. }) => Err(ingest_not_found(reference)),
            other => other,
        }
    }

    async fn status_of(
        &self,
        reference: String,
        record: IngestRecord,
    ) -> Result<IngestStatus, Error> {
        if let Some(expected) = shared_digest(&record) {
            return Ok(shared_status(reference, expected, &record));
        }
        let status = self.inner.content.status(&record.backend).await?;
        Ok(IngestStatus {
            reference,
            ..status
        })
    }

    /// Ingests of the namespace.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn statuses(
        &self,
        scope: &Scope,
        filter: &Filter,
    ) -> Result<Vec<IngestStatus>, Error> {
        let mut found = Vec::new();
        for (reference, record) in self.inner.list(table::INGESTS, &scope.namespace)? {
            match self.status_of(reference, record).await {
                Ok(status) if filter.matches(&status) => found.push(status),
                // One that was recorded and not begun yet, or just committed.
                Ok(_) | Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Throws an ingest away.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn abort(&self, scope: &Scope, reference: &str) -> Result<(), Error> {
        let backend = self
            .inner
            .update(|change| {
                let key = keys::object(table::INGESTS, &scope.namespace, reference);
                let Some(value) = change.tx.get(&key)? else {
                    return Err(ingest_not_found(reference));
                };
                leases::detach(change, scope, KIND_INGESTS, reference);
                forget_ingest(change, &scope.namespace, &key, &value)
            })
            .await?;
        match self.inner.content.abort(&backend).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }
}

fn shared_digest(record: &IngestRecord) -> Option<Digest> {
    Digest::parse(&record.expected).ok()
}

fn shared_status(reference: String, expected: Digest, record: &IngestRecord) -> IngestStatus {
    IngestStatus {
        reference,
        offset_bytes: record.size_bytes,
        total_bytes: record.size_bytes,
        expected: Some(expected),
        started_at: record.stamps.created_at(),
        updated_at: record.stamps.updated_at(),
    }
}

/// Removes a blob's record; the file goes when nobody holds it.
pub(crate) fn remove_blob(
    change: &mut Change<'_, '_>,
    namespace: &Namespace,
    digest: &str,
) -> Result<(), Error> {
    change.delete(keys::object(table::BLOBS, namespace, digest));
    release_file(change, digest, namespace, "")?;
    change.dirty();
    Ok(())
}

/// Ends a hold on a file, and discards the file with the last.
fn release_file(
    change: &mut Change<'_, '_>,
    digest: &str,
    namespace: &Namespace,
    reference: &str,
) -> Result<(), Error> {
    change.delete(keys::holder(digest, namespace, reference));
    if !change.tx.any(&keys::holders(digest).prefix())? {
        change.discard(Discarded::Blob(digest.to_owned()));
    }
    Ok(())
}

/// Removes an ingest's record, given as its key and value. Returns its ref below.
pub(crate) fn forget_ingest(
    change: &mut Change<'_, '_>,
    namespace: &Namespace,
    key: &[u8],
    value: &[u8],
) -> Result<String, Error> {
    let damaged = || "ingest record".to_owned();
    let record: IngestRecord = decode(value, damaged)?;
    let reference = Parts::of(key).and_then(|(_, mut parts)| {
        parts.name()?;
        parts.last()
    });
    let reference = reference.ok_or_else(|| Error::Damaged { what: damaged() })?;
    change.delete(key.to_vec());
    if !record.expected.is_empty() {
        release_file(change, &record.expected, namespace, reference)?;
    }
    change.discard(Discarded::Ingest(record.backend.clone()));
    Ok(record.backend)
}
