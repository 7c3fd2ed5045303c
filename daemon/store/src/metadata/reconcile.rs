//! The stores below brought in line with the records, after a start: whatever a crash or a loss of
//! files left is finished, removed or reported.

use std::collections::{BTreeSet, HashSet};

use lighter_proto::errdefs::{Classify, ErrorKind};

use super::collect::Reclaimed;
use super::keys::{self, Parts, table};
use super::records::{IngestRecord, SnapshotRecord};
use super::snapshots::pin_name;
use super::{Db, Snapshots, content, leases};
use crate::{Digest, Error, Namespace};

impl Db {
    /// Brings the stores below in line with the records: removes what no record owns, finishes
    /// commits that a crash interrupted, drops records of blobs whose bytes are gone (so that a pull
    /// brings them back) and reports all of it. For the first collection after a start.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn reconcile(&self) -> Result<Reclaimed, Error> {
        let mut done = Reclaimed::default();
        let names: Vec<String> = self.inner.snapshotters.keys().cloned().collect();
        for name in names {
            if let Err(error) = self.reconcile_snapshots(&name, &mut done).await {
                tracing::warn!(%error, snapshotter = name, "snapshots are not reconciled");
            }
        }
        self.reconcile_leases().await?;
        self.reconcile_blobs(&mut done).await?;
        self.reconcile_ingests(&mut done).await?;
        if done != Reclaimed::default() {
            tracing::info!(
                blobs = done.blobs,
                ingests = done.ingests,
                snapshots = done.snapshots,
                broken = done.broken,
                "stores reconciled with the records"
            );
        }
        Ok(done)
    }

    /// Takes off what leases list that ended when the daemon did.
    async fn reconcile_leases(&self) -> Result<(), Error> {
        let mut listing = BTreeSet::new();
        self.pages(table::RESOURCES, &mut |key, _| {
            let of = Parts::of(key).and_then(|(_, mut parts)| {
                let namespace = Namespace::new(&parts.name()?).ok()?;
                Some((namespace, parts.name()?.to_string()))
            });
            listing.extend(of);
        })?;
        for (namespace, id) in listing {
            let lease = keys::object(table::LEASES, &namespace, &id);
            if self.inner.kv.get(&lease)?.is_none() {
                leases::forget_resources(&self.inner, &namespace, &id).await?;
            }
        }
        Ok(())
    }

    async fn reconcile_snapshots(&self, name: &str, done: &mut Reclaimed) -> Result<(), Error> {
        let snapshots = self.snapshots(name)?;
        let below = snapshots.driver().walk().await?;
        let mut orphans = Vec::new();
        for info in &below {
            let in_flight = self
                .inner
                .in_flight
                .contains(&format!("{name}/{}", info.name));
            if !in_flight
                && self
                    .inner
                    .kv
                    .get(&keys::backend(name, &info.name))?
                    .is_none()
            {
                orphans.push(info.name.clone());
            }
        }
        let present: HashSet<&str> = below.iter().map(|info| info.name.as_str()).collect();
        let (mut interrupted, mut lost) = (Vec::new(), Vec::new());
        self.pages(table::SNAPSHOTS, &mut |key, value| {
            let of = Parts::of(key).and_then(|(_, mut parts)| {
                let namespace = Namespace::new(&parts.name()?).ok()?;
                (parts.name()? == name).then_some((namespace, parts.last()?.to_owned()))
            });
            if let (Some((namespace, key)), Ok(record)) =
                (of, <SnapshotRecord as prost::Message>::decode(value))
            {
                match &record.committing {
                    Some(committing) if present.contains(committing.backend.as_str()) => {
                        orphans.retain(|orphan| *orphan != committing.backend);
                        interrupted.push((namespace, key));
                    }
                    _ if !present.contains(record.backend.as_str()) => {
                        done.broken += 1;
                        tracing::warn!(%namespace, key, snapshotter = name, "a snapshot's directory is missing");
                        lost.push((namespace, key, record.backend));
                    }
                    _ => {}
                }
            }
        })?;
        for (namespace, key) in interrupted {
            let pin = pin_name(&namespace, name, &key);
            // Its own call is still at it.
            if self.inner.pins.contains(&pin) {
                continue;
            }
            // And none begins until it is finished here.
            let _lock = self.inner.snapshots.lock(&pin).await;
            let finished = self
                .inner
                .update(|change| snapshots.finish_commit(change, &namespace, &key));
            match finished.await {
                Ok(()) => tracing::info!(%namespace, key, "an interrupted commit was finished"),
                Err(error) => tracing::warn!(%error, %namespace, key, "an interrupted commit"),
            }
        }
        if snapshots.driver().shares_records() {
            self.forget_lost_snapshots(&snapshots, lost).await;
        }
        orphans.reverse();
        self.reclaim_snapshots(name, orphans, done).await;
        Ok(())
    }

    /// Drops records of snapshots that their driver lost, children first, so that they can be made
    /// anew. One that something is built on stays, and is reported at every start.
    async fn forget_lost_snapshots(
        &self,
        snapshots: &Snapshots,
        mut lost: Vec<(Namespace, String, String)>,
    ) {
        let name = snapshots.name();
        loop {
            let before = lost.len();
            let mut left = Vec::new();
            for (namespace, key, backend) in lost {
                let found = snapshots.driver().stat(&backend).await;
                let gone = found.is_err_and(|error| error.kind() == ErrorKind::NotFound);
                let used = self.inner.in_flight.contains(&format!("{name}/{backend}"))
                    || self.inner.pins.contains(&pin_name(&namespace, name, &key));
                if !gone || used {
                    continue;
                }
                let dropped = self
                    .inner
                    .update(|change| snapshots.remove_in(change, &namespace, &key));
                match dropped.await {
                    Ok(()) => {
                        tracing::warn!(%namespace, key, snapshotter = name, "its record is dropped");
                    }
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(_) => left.push((namespace, key, backend)),
                }
            }
            lost = left;
            if lost.is_empty() || lost.len() == before {
                break;
            }
        }
        for (namespace, key, _) in lost {
            tracing::error!(%namespace, key, snapshotter = name,
                "a snapshot without directory has children; remove what is built on it");
        }
    }

    async fn reconcile_blobs(&self, done: &mut Reclaimed) -> Result<(), Error> {
        let mut present = HashSet::new();
        for stored in self.inner.content.walk().await? {
            let digest = stored.digest.as_str();
            if !self.inner.kv.any(&keys::holders(digest).prefix())? {
                self.reclaim_blob(digest, done).await;
            }
            present.insert(stored.digest);
        }
        let mut lost = Vec::new();
        self.pages(table::BLOBS, &mut |key, _| {
            let of = Parts::of(key).and_then(|(_, mut parts)| {
                let namespace = Namespace::new(&parts.name()?).ok()?;
                Some((namespace, Digest::parse(parts.last()?).ok()?))
            });
            if let Some((namespace, digest)) = of
                && !present.contains(&digest)
            {
                lost.push((namespace, digest));
            }
        })?;
        for (namespace, digest) in lost {
            // It may have come after the walk.
            let _file = self.inner.digests.lock(digest.as_str()).await;
            match self.inner.content.size(&digest).await {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                _ => continue,
            }
            done.broken += 1;
            tracing::warn!(%namespace, %digest, "a blob's bytes are missing; its record is dropped");
            self.inner
                .update(|change| content::remove_blob(change, &namespace, digest.as_str()))
                .await?;
        }
        Ok(())
    }

    async fn reconcile_ingests(&self, done: &mut Reclaimed) -> Result<(), Error> {
        done.ingests += self.inner.content.heal().await?;
        let mut present = HashSet::new();
        for status in self.inner.content.statuses().await? {
            let backend = status.reference;
            present.insert(backend.clone());
            let mut parts = backend.splitn(3, '/');
            let (Some(namespace), Some(_), Some(reference)) =
                (parts.next(), parts.next(), parts.next())
            else {
                continue;
            };
            let Ok(namespace) = Namespace::new(namespace) else {
                continue;
            };
            if self.inner.refs.is_held(&format!("{namespace}/{reference}"))
                || self.inner.has_ingest(&namespace, reference, &backend)?
            {
                continue;
            }
            match self.inner.content.abort(&backend).await {
                Ok(()) => done.ingests += 1,
                Err(error) => tracing::debug!(%error, reference, "removal of an ingest"),
            }
        }
        self.forget_lost_ingests(&present, done).await
    }

    /// Drops records of ingests whose bytes are gone, so that a client begins anew.
    async fn forget_lost_ingests(
        &self,
        present: &HashSet<String>,
        done: &mut Reclaimed,
    ) -> Result<(), Error> {
        let mut lost = Vec::new();
        self.pages(table::INGESTS, &mut |key, value| {
            let of = Parts::of(key).and_then(|(_, mut parts)| {
                let namespace = Namespace::new(&parts.name()?).ok()?;
                Some((namespace, parts.last()?.to_owned()))
            });
            if let (Some((namespace, reference)), Ok(record)) =
                (of, <IngestRecord as prost::Message>::decode(value))
                && record.expected.is_empty()
                && !present.contains(&record.backend)
            {
                lost.push((namespace, reference, key.to_vec(), value.to_vec()));
            }
        })?;
        for (namespace, reference, key, value) in lost {
            if self.inner.refs.is_held(&format!("{namespace}/{reference}")) {
                continue;
            }
            done.broken += 1;
            tracing::warn!(%namespace, reference, "an ingest's bytes are missing; its record is dropped");
            self.inner
                .update(|change| {
                    // It may have been opened anew meanwhile.
                    if change.tx.get(&key)?.is_some_and(|now| *now == *value) {
                        content::forget_ingest(change, &namespace, &key, &value)?;
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }
}
