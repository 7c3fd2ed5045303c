//! Leases: what keeps objects that nothing refers to yet.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use lighter_proto::time::{from_nanos, to_nanos};

use super::db::{Change, Inner};
use super::keys::{self, Parts, table};
use super::records::LeaseRecord;
use crate::filter::{self, Fields, Filter};
use crate::{Digest, Error, Labels, Namespace, Scope, labels};

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Any non-empty string.
    pub id: String,
    /// Set by the store.
    pub created_at: SystemTime,
    /// Labels; `containerd.io/gc.expire` and `containerd.io/gc.flat` have meaning.
    pub labels: Labels,
}

/// What a lease holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resource {
    /// Digest, ingest ref, image name or snapshot key.
    pub id: String,
    /// `content`, `ingests`, `images`, `snapshots/<snapshotter>`, …
    pub kind: String,
}

/// Kind of a blob in a lease.
pub const KIND_CONTENT: &str = "content";
/// Kind of an ingest in a lease.
pub const KIND_INGESTS: &str = "ingests";
/// Kind of an image in a lease.
pub const KIND_IMAGES: &str = "images";
/// Start of the kind of a snapshot in a lease; the snapshotter follows.
pub const KIND_SNAPSHOTS: &str = "snapshots/";

impl Fields for Lease {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.split_first()? {
            (first, []) if first == "id" => Some(Cow::Borrowed(&self.id)),
            (first, rest) if first == "labels" => filter::entry(&self.labels, rest),
            _ => None,
        }
    }
}

impl Resource {
    fn check(&self) -> Result<(), Error> {
        let kind = self.kind.as_str();
        let (first, rest) = match kind.split_once('/') {
            Some((first, rest)) => (first, Some(rest)),
            None => (kind, None),
        };
        match (first, rest) {
            (KIND_CONTENT, None) => {
                Digest::parse(&self.id)?;
            }
            (KIND_INGESTS | KIND_IMAGES, None) => {}
            (KIND_CONTENT | KIND_INGESTS | KIND_IMAGES, Some(_)) => {
                return Err(Error::Invalid {
                    reason: format!("invalid {first} resource type: {kind}"),
                });
            }
            ("snapshots", Some(snapshotter))
                if !snapshotter.is_empty() && !snapshotter.contains('/') => {}
            ("snapshots", _) => {
                return Err(Error::Invalid {
                    reason: format!("invalid snapshot resource type: {kind}"),
                });
            }
            _ => {
                return Err(Error::Unimplemented {
                    what: format!("resource type {kind} not supported yet"),
                });
            }
        }
        if self.id.is_empty() {
            return Err(Error::Invalid {
                reason: format!("resource of type {} needs an id", self.kind),
            });
        }
        Ok(())
    }
}

/// Adds what a request made or found to its lease.
pub(crate) fn attach(
    change: &mut Change<'_, '_>,
    scope: &Scope,
    kind: &str,
    id: &str,
) -> Result<(), Error> {
    let Some(lease) = &scope.lease else {
        return Ok(());
    };
    require(change, scope, lease).map_err(|_| Error::NotFound {
        what: "lease does not exist".to_owned(),
    })?;
    change.mark(keys::resources(&scope.namespace, lease).name(kind).last(id));
    Ok(())
}

/// Takes what a request removed off its lease.
pub(crate) fn detach(change: &mut Change<'_, '_>, scope: &Scope, kind: &str, id: &str) {
    if let Some(lease) = &scope.lease {
        change.delete(keys::resources(&scope.namespace, lease).name(kind).last(id));
    }
}

/// Fails when the request names a lease that does not exist.
pub(crate) fn check(change: &Change<'_, '_>, scope: &Scope) -> Result<(), Error> {
    match &scope.lease {
        Some(lease) => require(change, scope, lease).map_err(|_| Error::NotFound {
            what: "lease does not exist".to_owned(),
        }),
        None => Ok(()),
    }
}

fn require(change: &Change<'_, '_>, scope: &Scope, id: &str) -> Result<(), Error> {
    if change.contains(&keys::object(table::LEASES, &scope.namespace, id))? {
        Ok(())
    } else {
        Err(not_found(id))
    }
}

fn not_found(id: &str) -> Error {
    Error::NotFound {
        what: format!("lease \"{id}\""),
    }
}

fn lease_of(id: String, record: LeaseRecord) -> Lease {
    Lease {
        id,
        created_at: from_nanos(record.created),
        labels: record.labels,
    }
}

/// An id as upstream's clients make them: nanoseconds and four characters of base64url.
fn random_id(now: SystemTime) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let nanos = to_nanos(now) % 1_000_000_000;
    let tail: String = rand::random::<[u8; 4]>()
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte & 63)]))
        .collect();
    format!("{nanos}-{tail}")
}

/// Resources taken off in one change: a few milliseconds of work.
const FORGOTTEN_AT_ONCE: usize = 256;

/// Leases of all namespaces.
#[derive(Debug, Clone)]
pub struct Leases {
    inner: Arc<Inner>,
}

impl Leases {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Makes a lease; an empty id gets a random one.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`.
    pub async fn create(
        &self,
        scope: &Scope,
        id: &str,
        mut labels: Labels,
    ) -> Result<Lease, Error> {
        labels::check(&labels)?;
        labels::drop_empty(&mut labels);
        let now = SystemTime::now();
        let id = match id {
            "" => random_id(now),
            id => id.to_owned(),
        };
        let record = LeaseRecord {
            created: to_nanos(now),
            labels,
        };
        self.inner
            .update(|change| {
                let key = keys::object(table::LEASES, &scope.namespace, &id);
                if change.contains(&key)? {
                    return Err(Error::AlreadyExists {
                        what: format!("lease \"{id}\""),
                    });
                }
                change.ensure_namespace(&scope.namespace)?;
                // Of one of the same id, which ended a moment ago or with the daemon.
                let left = keys::resources(&scope.namespace, &id).prefix();
                for (key, _) in change.tx.scan(&left)? {
                    change.delete(key);
                }
                change.put(key, &record);
                Ok(lease_of(id, record))
            })
            .await
    }

    /// One lease.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, scope: &Scope, id: &str) -> Result<Lease, Error> {
        let key = keys::object(table::LEASES, &scope.namespace, id);
        let record = self.inner.get(&key, || format!("lease \"{id}\""))?;
        record
            .map(|record| lease_of(id.to_owned(), record))
            .ok_or_else(|| not_found(id))
    }

    /// Ends a lease. (A synchronous delete also runs a collection: the caller does that.)
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, scope: &Scope, id: &str) -> Result<(), Error> {
        self.inner
            .update(|change| {
                require(change, scope, id)?;
                remove(change, scope, id);
                Ok(())
            })
            .await?;
        forget_resources(&self.inner, &scope.namespace, id).await
    }

    /// Matching leases in byte order of id, expired ones included.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<Lease>, Error> {
        let all = self.inner.list(table::LEASES, &scope.namespace)?;
        Ok(all
            .into_iter()
            .map(|(id, record)| lease_of(id, record))
            .filter(|lease| filter.matches(lease))
            .collect())
    }

    /// Adds a resource; its existence is not checked.
    ///
    /// # Errors
    /// `NotFound` for the lease, `InvalidArgument`, `Unimplemented` for an unknown kind.
    pub async fn add(&self, scope: &Scope, id: &str, resource: Resource) -> Result<(), Error> {
        resource.check()?;
        self.inner
            .update(|change| {
                require(change, scope, id)?;
                change.mark(resource_key(scope, id, &resource));
                Ok(())
            })
            .await
    }

    /// Takes a resource off; absent is fine.
    ///
    /// # Errors
    /// `NotFound` for the lease, `InvalidArgument`, `Unimplemented` for an unknown kind.
    pub async fn remove(&self, scope: &Scope, id: &str, resource: &Resource) -> Result<(), Error> {
        resource.check()?;
        self.inner
            .update(|change| {
                require(change, scope, id)?;
                change.delete(resource_key(scope, id, resource));
                change.dirty();
                Ok(())
            })
            .await
    }

    /// What a lease holds: content, images, ingests, snapshots.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resources(&self, scope: &Scope, id: &str) -> Result<Vec<Resource>, Error> {
        self.get(scope, id)?;
        let prefix = keys::resources(&scope.namespace, id).prefix();
        let found = self.inner.kv.scan(&prefix)?;
        found
            .iter()
            .map(|(key, _)| {
                resource_of(key).ok_or_else(|| Error::Damaged {
                    what: format!("resource of lease \"{id}\""),
                })
            })
            .collect()
    }
}

fn resource_key(scope: &Scope, lease: &str, resource: &Resource) -> lighter_kv::Key {
    keys::resources(&scope.namespace, lease)
        .name(&resource.kind)
        .last(&resource.id)
}

fn resource_of(key: &[u8]) -> Option<Resource> {
    let (_, mut parts) = Parts::of(key)?;
    parts.name()?;
    parts.name()?;
    Some(Resource {
        kind: parts.name()?,
        id: parts.last()?.to_owned(),
    })
}

/// Ends a lease. What it lists protects nothing any more and is taken off by [`forget_resources`].
pub(crate) fn remove(change: &mut Change<'_, '_>, scope: &Scope, id: &str) {
    change.delete(keys::object(table::LEASES, &scope.namespace, id));
    change.dirty();
}

/// Takes off what a lease that ended lists, little by little: a change that is as long as the longest
/// list would hold up all others.
pub(crate) async fn forget_resources(
    inner: &Inner,
    namespace: &Namespace,
    id: &str,
) -> Result<(), Error> {
    let lease = keys::object(table::LEASES, namespace, id);
    let start = keys::resources(namespace, id).prefix();
    let mut end = start.clone();
    // A name ends with a byte that no other one of its place can have.
    *end.last_mut().expect("a prefix is never empty") += 1;
    loop {
        let page = inner.kv.range(&start, Some(&end), FORGOTTEN_AT_ONCE)?;
        let is_last = page.len() < FORGOTTEN_AT_ONCE;
        let (made_anew, ticket) = inner.apply(|change| {
            // Then these are the new one's: what was the old one's went when it was made.
            if change.contains(&lease)? {
                return Ok(true);
            }
            for (key, _) in page {
                change.delete(key);
            }
            Ok(false)
        })?;
        if is_last || made_anew {
            return Ok(ticket.wait().await?);
        }
        tokio::task::yield_now().await;
    }
}
