//! Opening an ingest: a shared one where the bytes are here already, else a real one.

use std::time::{Duration, SystemTime};

use lighter_proto::time::to_nanos;

use super::writer::{Source, Writer};
use super::{Content, release_file, shared_digest};
use crate::content::{Ingest, Open, blob_exists};
use crate::metadata::SharingPolicy;
use crate::metadata::db::{Change, Inner};
use crate::metadata::keys::{self, Parts, table};
use crate::metadata::leases::{self, KIND_CONTENT, KIND_INGESTS};
use crate::metadata::namespaces::is_shareable;
use crate::metadata::records::{IngestRecord, Stamps};
use crate::{Digest, Error, Namespace, Scope};

/// Life of an ingest that no lease holds, from when it was last opened.
const INGEST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

impl Content {
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
            lock,
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
