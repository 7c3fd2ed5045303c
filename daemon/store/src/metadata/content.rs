//! Blobs as a namespace sees them, and the ingests that become blobs.
//!
//! A file is shared by all namespaces that hold it; a namespace holds it by its record or by an
//! ingest that waits to become one. Opening an ingest for a digest whose bytes are here already
//! opens no file: such a *shared* writer reports the whole size, so that a client commits at once;
//! bytes that it sends anyway go to a real ingest.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lighter_proto::containerd::events::{ContentCreate, ContentDelete};
use lighter_proto::time::to_nanos;

use super::SharingPolicy;
use super::db::{Change, Discarded, Inner};
use super::keys::{self, Parts, table};
use super::leases::{self, KIND_CONTENT, KIND_INGESTS};
use super::namespaces::is_shareable;
use super::records::{BlobRecord, IngestRecord, Stamps, decode};
use crate::content::{
    BlobReader, Ingest, IngestStatus, Open, RefGuard, blob_exists, blob_not_found, digest_mismatch,
    ingest_not_found,
};
use crate::events::topic;
use crate::filter::{self, Fields, Filter};
use crate::{Digest, Error, Labels, Namespace, Scope, labels};

/// Life of an ingest that no lease holds, from when it was last opened.
const INGEST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes copied at a time when a shared ingest becomes a real one.
const COPY_BYTES: usize = 1 << 20;

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

/// An open ingest: holds the lock on its ref until dropped; dropping keeps the bytes for resume.
#[derive(Debug)]
pub struct Writer {
    inner: Arc<Inner>,
    scope: Scope,
    reference: String,
    record: IngestRecord,
    bytes: Source,
    _lock: RefGuard,
}

/// Where an open ingest's bytes are.
#[derive(Debug)]
enum Source {
    /// In a blob that is here already.
    Shared(Digest),
    Own(Box<dyn Ingest>),
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

    /// Opens (or resumes) the ingest `reference`. `size_bytes` 0 and `expected` `None` mean unknown.
    ///
    /// # Errors
    /// `AlreadyExists` when the namespace has `expected`; `Unavailable` when the ref is locked.
    pub async fn writer(
        &self,
        scope: &Scope,
        reference: &str,
        size_bytes: u64,
        expected: Option<&Digest>,
    ) -> Result<Writer, Error> {
        if reference.is_empty() {
            return Err(Error::Invalid {
                reason: "ref must not be empty".to_owned(),
            });
        }
        if let Some(expected) = expected
            && self.found_existing(scope, expected).await?
        {
            return Err(blob_exists(expected));
        }
        let holder = scope
            .lease
            .as_deref()
            .map_or_else(String::new, |l| format!("lease {l}"));
        let lock = self
            .inner
            .refs
            .take(&format!("{}/{reference}", scope.namespace), &holder)?;
        let sequence = self.inner.next_sequence().await?;
        let request = Ask {
            scope,
            reference,
            fresh: format!("{}/{sequence}/{reference}", scope.namespace),
            size_bytes,
        };
        let sharable = self.sharable(expected, size_bytes).await?;
        let (record, ticket) = self
            .inner
            .apply(|change| request.record(change, &self.inner, sharable.as_ref()))?;
        if scope.lease.is_some() {
            ticket.wait().await?;
        }
        let bytes = match shared_digest(&record) {
            Some(digest) => Source::Shared(digest),
            None => Source::Own(self.open(&request, &record, holder).await?),
        };
        Ok(Writer {
            inner: self.inner.clone(),
            scope: scope.clone(),
            reference: reference.to_owned(),
            record,
            bytes,
            _lock: lock,
        })
    }

    async fn open(
        &self,
        request: &Ask<'_>,
        record: &IngestRecord,
        holder: String,
    ) -> Result<Box<dyn Ingest>, Error> {
        let open = Open {
            reference: record.backend.clone(),
            total_bytes: request.size_bytes,
            expected: None,
            holder,
        };
        let opened = self.inner.content.writer(open).await;
        if opened.is_err() && record.backend == request.fresh {
            // Nothing was begun, so nothing stays.
            let key = keys::object(table::INGESTS, &request.scope.namespace, request.reference);
            let _ = self.inner.apply(|change| {
                leases::detach(change, request.scope, KIND_INGESTS, request.reference);
                change.delete(key);
                Ok(())
            });
        }
        opened
    }

    /// Whether the namespace has the blob; the request's lease holds it then.
    async fn found_existing(&self, scope: &Scope, digest: &Digest) -> Result<bool, Error> {
        let key = keys::blob(&scope.namespace, digest);
        if self.inner.kv.get(&key)?.is_none() {
            return Ok(false);
        }
        self.inner
            .update(|change| {
                let found = change.contains(&key)?;
                if found {
                    leases::attach(change, scope, KIND_CONTENT, digest.as_str())?;
                }
                Ok(found)
            })
            .await
    }

    /// The digest and size of the file that an ingest could share.
    async fn sharable(
        &self,
        expected: Option<&Digest>,
        size_bytes: u64,
    ) -> Result<Option<(Digest, u64)>, Error> {
        let Some(expected) = expected else {
            return Ok(None);
        };
        match self.inner.content.size(expected).await {
            Ok(size) if size_bytes == 0 || size == size_bytes => Ok(Some((expected.clone(), size))),
            Ok(_) | Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What an opener asks for.
struct Ask<'a> {
    scope: &'a Scope,
    reference: &'a str,
    /// Ref below, should the ingest be new.
    fresh: String,
    size_bytes: u64,
}

impl Ask<'_> {
    /// Finds or makes the record.
    fn record(
        &self,
        change: &mut Change<'_, '_>,
        inner: &Inner,
        sharable: Option<&(Digest, u64)>,
    ) -> Result<IngestRecord, Error> {
        let namespace = &self.scope.namespace;
        let key = keys::object(table::INGESTS, namespace, self.reference);
        let known: Option<IngestRecord> =
            change.get(&key, || format!("ingest {:?}", self.reference))?;
        let mut record = known.unwrap_or_else(|| IngestRecord {
            backend: self.fresh.clone(),
            stamps: Stamps::now(),
            ..IngestRecord::default()
        });
        record.stamps.touch();
        if !record.expected.is_empty() {
            let before = std::mem::take(&mut record.expected);
            release_file(change, &before, namespace, self.reference)?;
        }
        if let Some((digest, size)) = sharable
            && may_share(change, inner.policy, digest)?
        {
            digest.as_str().clone_into(&mut record.expected);
            record.size_bytes = *size;
            change.mark(keys::holder(digest.as_str(), namespace, self.reference));
        }
        if self.scope.lease.is_some() {
            leases::attach(change, self.scope, KIND_INGESTS, self.reference)?;
            record.expires = 0;
        } else {
            record.expires = to_nanos(SystemTime::now() + INGEST_LIFE);
        }
        change.ensure_namespace(namespace)?;
        change.put(key, &record);
        Ok(record)
    }
}

/// Whether the file of `digest` may be had for its name.
fn may_share(
    change: &Change<'_, '_>,
    policy: SharingPolicy,
    digest: &Digest,
) -> Result<bool, Error> {
    let holders = keys::holders(digest.as_str()).prefix();
    if policy == SharingPolicy::Shared {
        return Ok(change.tx.any(&holders)?);
    }
    for (key, _) in change.tx.scan(&holders)? {
        let holder = Parts::of(&key).and_then(|(_, mut parts)| {
            parts.name()?;
            Some((parts.name()?, parts.last()?))
        });
        // A namespace gives away what it has (no ref), not what it waits for.
        if let Some((namespace, "")) = holder
            && is_shareable(change, &Namespace::new(&namespace)?)?
        {
            return Ok(true);
        }
    }
    Ok(false)
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
            _lock,
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
