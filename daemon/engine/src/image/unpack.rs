//! Layers into snapshots: each layer becomes a committed snapshot named by its chain ID.
//!
//! Where the snapshotter can put a parent under a layer afterwards, layers are applied beside each
//! other and committed in order (`beside.rs`); elsewhere one after the other:
//!
//! ```text
//! stat chain IDs from the top ──found──▶ nothing below it is fetched or applied
//!        │ missing
//!        ▼ from there, layer by layer, alone for each (namespace, snapshotter, chain ID)
//! Prepare(extract-… , parent, snapshot.ref) ──AlreadyExists──▶ somebody made it: next layer
//!        │ mounts                              (a lazy snapshotter has it: nothing is fetched)
//!        ▼
//! fetch (all layers from here on at once) → apply → compare diff ID → Commit(chain ID)
//! ```
//!
//! Spec: OCI image-spec, config.md, "Layer ChainID".

mod beside;
mod downloads;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::{CommitOptions, Kind, Mount};
use lighter_store::labels::{GC_REF_SNAPSHOT, SNAPSHOT_PREFIX, SNAPSHOT_REF};
use lighter_store::metadata::{Db, Resource, Snapshots};
use lighter_store::{Digest, Labels, Scope};
use tokio::sync::Semaphore;
use tracing::warn;

use self::downloads::Downloads;
use super::locks::Held;
use super::manifest::Config;
use super::{Applier, Descriptor, Error, Fetcher, Locks};
use crate::diff::LeansOn;

/// Times a Prepare is tried while snapshots come and go under it.
const MAX_PREPARES: u32 = 3;
/// Most bytes of the list of layers that lazy snapshotters get as a hint.
const MAX_HINT_BYTES: usize = 4000;

/// Which snapshotters take unpacked layers: name → who applies for it.
#[derive(Debug, Clone, Default)]
pub struct Snapshotters {
    /// By plugin id.
    pub appliers: BTreeMap<String, Arc<dyn Applier>>,
}

/// Where to unpack to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackTarget {
    /// Plugin id of the snapshotter.
    pub snapshotter: String,
    /// Reference of the image, given to lazy snapshotters as a hint.
    pub hint: Option<String>,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// Name of the topmost snapshot; `None` for an image without layers.
    pub chain_id: Option<Digest>,
    /// Layers that had to be applied.
    pub applied: usize,
}

/// Unpacks images; clones share its bounds.
#[derive(Debug, Clone)]
pub struct Unpacker {
    db: Db,
    snapshotters: Snapshotters,
    locks: Locks,
    /// Layers applied at once.
    unpacks: Arc<Semaphore>,
}

/// Names of the stacks of `diff_ids`, the base's first.
#[must_use]
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(parent) => Digest::of(format!("{parent} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

/// One image on its way into a snapshotter.
struct Job<'a> {
    fetcher: &'a Fetcher,
    snapshots: Snapshots,
    applier: Arc<dyn Applier>,
    target: &'a UnpackTarget,
    manifest: &'a Digest,
    layers: &'a [Descriptor],
    diff_ids: &'a [Digest],
    chain: Vec<Digest>,
}

impl Unpacker {
    /// An unpacker that applies at most `unpacks` layers at once.
    #[must_use]
    pub fn new(db: Db, snapshotters: Snapshotters, locks: Locks, unpacks: usize) -> Self {
        Self {
            db,
            snapshotters,
            locks,
            unpacks: Arc::new(Semaphore::new(unpacks.max(1))),
        }
    }

    /// Whether `snapshotter` is one to unpack to.
    #[must_use]
    pub fn knows(&self, snapshotter: &str) -> bool {
        self.snapshotters.appliers.contains_key(snapshotter)
    }

    /// Unpacks the image of `manifest` with `config` and `layers`; fetches the layers it needs.
    /// Afterwards the config blob keeps the snapshots.
    ///
    /// # Errors
    /// [`Error::LayerCount`], [`Error::WrongDiffId`], [`Error::Apply`]; as fetching says.
    ///
    /// # Cancellation
    /// Safe: finished layers stay for the next attempt, an unfinished one goes with the lease.
    pub async fn unpack(
        &self,
        fetcher: &Fetcher,
        target: &UnpackTarget,
        manifest: &Digest,
        (config_descriptor, config): (&Descriptor, &Config),
        layers: &[Descriptor],
    ) -> Result<Unpacked, Error> {
        if layers.len() != config.diff_ids.len() {
            return Err(Error::LayerCount {
                layers: layers.len(),
                diff_ids: config.diff_ids.len(),
            });
        }
        let snapshotter = target.snapshotter.as_str();
        let applier = self.snapshotters.appliers.get(snapshotter).ok_or_else(|| {
            lighter_store::Error::Invalid {
                reason: format!("snapshotter not loaded: {snapshotter}"),
            }
        })?;
        let job = Job {
            fetcher,
            snapshots: self.db.snapshots(snapshotter)?,
            applier: Arc::clone(applier),
            target,
            manifest,
            layers,
            diff_ids: &config.diff_ids,
            chain: chain_ids(&config.diff_ids),
        };
        let Some(top) = job.chain.last() else {
            return Ok(Unpacked {
                chain_id: None,
                applied: 0,
            });
        };
        let start = self.existing(&job).await?;
        for layer in &layers[..start] {
            fetcher.tracker().done(layer, "already exists");
        }
        let mut downloads = Downloads::default();
        let applied = if job.stands_alone() && layers.len() - start > 1 {
            self.beside(&job, start, &mut downloads).await?
        } else {
            let mut applied = 0;
            for index in start..layers.len() {
                applied += usize::from(self.layer(&job, index, &mut downloads).await?);
            }
            applied
        };
        downloads.noted().await?;
        let key = format!("{GC_REF_SNAPSHOT}.{snapshotter}");
        let labels = Labels::from([(key, top.to_string())]);
        fetcher
            .set_labels(&config_descriptor.digest, labels)
            .await?;
        Ok(Unpacked {
            chain_id: Some(top.clone()),
            applied,
        })
    }

    /// How many layers, from the base up, need nothing.
    async fn existing(&self, job: &Job<'_>) -> Result<usize, Error> {
        let scope = job.fetcher.scope();
        for (index, chain_id) in job.chain.iter().enumerate().rev() {
            if !is_committed(&job.snapshots, scope, chain_id).await? {
                continue;
            }
            let Some(lease) = &scope.lease else {
                return Ok(index + 1);
            };
            let resource = Resource {
                id: chain_id.to_string(),
                kind: format!("snapshots/{}", job.target.snapshotter),
            };
            self.db.leases().add(scope, lease, resource).await?;
            // A collection may have come between the look and the lease.
            if is_committed(&job.snapshots, scope, chain_id).await? {
                return Ok(index + 1);
            }
        }
        Ok(0)
    }

    /// Makes one layer's snapshot; `false` when somebody else has.
    async fn layer(
        &self,
        job: &Job<'_>,
        index: usize,
        downloads: &mut Downloads,
    ) -> Result<bool, Error> {
        let _alone = self.alone(job, index).await;
        let parent = index.checked_sub(1).map(|below| job.chain[below].as_str());
        self.on_parent(job, index, parent, downloads).await
    }

    /// The right to make the snapshot of one layer.
    async fn alone(&self, job: &Job<'_>, index: usize) -> Held {
        let key = format!(
            "sn://{}/{}/{}",
            job.fetcher.scope().namespace,
            job.target.snapshotter,
            job.chain[index]
        );
        let (tracker, layer) = (job.fetcher.tracker(), &job.layers[index]);
        self.locks
            .lock(&key, |_| tracker.set(layer, "extracting", 0))
            .await
    }

    /// Makes one layer's snapshot on its parent, with the right to it held.
    async fn on_parent(
        &self,
        job: &Job<'_>,
        index: usize,
        parent: Option<&str>,
        downloads: &mut Downloads,
    ) -> Result<bool, Error> {
        let scope = job.fetcher.scope();
        let (layer, chain_id) = (&job.layers[index], job.chain[index].as_str());
        let tracker = job.fetcher.tracker();
        let labels = job.labels(index);
        let Some((extract, mounts)) = prepare(job, chain_id, parent, &labels).await? else {
            tracker.done(layer, "already exists");
            return Ok(false);
        };
        let made = async {
            if !is_staged(&mounts) {
                downloads.ensure(job, index);
                downloads.wait(index).await?;
                self.apply(job, index, &mounts, &extract).await?;
                downloads.note(job, index);
            }
            let options = CommitOptions {
                labels,
                ..CommitOptions::default()
            };
            let committed = job
                .snapshots
                .commit(scope, chain_id, &extract, options)
                .await;
            committed.map_err(Error::from)
        };
        match made.await {
            Ok(()) => {}
            Err(error) => {
                discard(&job.snapshots, scope, &extract).await;
                if !exists(&error) {
                    return Err(error);
                }
            }
        }
        tracker.done(layer, "extracted");
        Ok(true)
    }

    /// Applies a layer that was fetched over `mounts`, and says what it leans on.
    async fn apply(
        &self,
        job: &Job<'_>,
        index: usize,
        mounts: &[Mount],
        extract: &str,
    ) -> Result<LeansOn, Error> {
        let layer = &job.layers[index];
        let _permit = self.unpacks.acquire().await.map_err(|_| Error::Abandoned)?;
        job.fetcher.tracker().set(layer, "extracting", 0);
        let applied = job.applier.apply(job.fetcher.scope(), layer, mounts).await;
        let applied = applied.map_err(|source| Error::Apply {
            what: format!(
                "({} {}) to {} as {extract:?}",
                layer.media_type, layer.digest, job.target.snapshotter
            ),
            source,
        })?;
        let want = &job.diff_ids[index];
        if applied.diff_id != *want {
            return Err(Error::WrongDiffId {
                got: applied.diff_id,
                want: want.clone(),
            });
        }
        Ok(applied.leans_on)
    }
}

/// Whether somebody else committed the snapshot meanwhile.
fn exists(error: &Error) -> bool {
    matches!(error, Error::Store(e) if e.kind() == ErrorKind::AlreadyExists)
}

async fn is_committed(
    snapshots: &Snapshots,
    scope: &Scope,
    chain_id: &Digest,
) -> Result<bool, Error> {
    match snapshots.stat(scope, chain_id.as_str()).await {
        Ok(info) => Ok(info.kind == Kind::Committed),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A writable snapshot to unpack into; `None` when the layer's snapshot is there already.
async fn prepare(
    job: &Job<'_>,
    chain_id: &str,
    parent: Option<&str>,
    labels: &Labels,
) -> Result<Option<(String, Vec<Mount>)>, Error> {
    let scope = job.fetcher.scope();
    let mut key = String::new();
    for _ in 0..MAX_PREPARES {
        key = extract_key(chain_id);
        match job
            .snapshots
            .prepare(scope, &key, parent, labels.clone())
            .await
        {
            Ok(mounts) => return Ok(Some((key, mounts))),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                match job.snapshots.stat(scope, chain_id).await {
                    Ok(_) => return Ok(None),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::Contended { key })
}

/// A snapshotter that has the layer's files already hands out read-only mounts.
fn is_staged(mounts: &[Mount]) -> bool {
    mounts
        .last()
        .is_some_and(|mount| mount.options.iter().any(|option| option == "ro"))
}

async fn discard(snapshots: &Snapshots, scope: &Scope, key: &str) {
    match snapshots.remove(scope, key).await {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => warn!(key, %error, "unfinished snapshot not removed"),
    }
}

fn extract_key(chain_id: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let random: [u8; 3] = rand::random();
    let suffix = URL_SAFE_NO_PAD.encode(random);
    format!("extract-{}-{suffix} {chain_id}", now.subsec_nanos())
}

impl Job<'_> {
    /// Whether layers may be applied without those below them.
    fn stands_alone(&self) -> bool {
        self.snapshots.driver().layers_stand_alone() && self.applier.tells_what_layers_lean_on()
    }

    fn labels(&self, index: usize) -> Labels {
        let layer = &self.layers[index];
        let mut labels: Labels = layer
            .annotations
            .iter()
            .filter(|(key, value)| key.starts_with(SNAPSHOT_PREFIX) && !value.is_empty())
            .filter(|(key, value)| key.len() + value.len() <= lighter_store::labels::MAX_BYTES)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let mut set = |key: &str, value: String| labels.insert(key.to_owned(), value);
        set(SNAPSHOT_REF, self.chain[index].to_string());
        set(
            "containerd.io/snapshot/diff-id",
            self.diff_ids[index].to_string(),
        );
        if let Some(below) = index.checked_sub(1) {
            set(
                "containerd.io/snapshot/parent-chain-id",
                self.chain[below].to_string(),
            );
        }
        if let Some(reference) = &self.target.hint {
            set("containerd.io/snapshot/cri.image-ref", reference.clone());
            set(
                "containerd.io/snapshot/cri.manifest-digest",
                self.manifest.to_string(),
            );
            set(
                "containerd.io/snapshot/cri.layer-digest",
                layer.digest.to_string(),
            );
            set(
                "containerd.io/snapshot/cri.image-layers",
                rest_of(&self.layers[index..]),
            );
        }
        labels
    }
}

/// Digests of `layers`, as many as fit a label.
fn rest_of(layers: &[Descriptor]) -> String {
    let mut list = String::new();
    for layer in layers {
        if list.len() + layer.digest.as_str().len() + 1 > MAX_HINT_BYTES {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(layer.digest.as_str());
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_hash_the_stack_below() {
        let ids = [Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c")];
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], ids[0]);
        assert_eq!(
            chain[1],
            Digest::of(format!("{} {}", ids[0], ids[1]).as_bytes())
        );
        assert_eq!(
            chain[2],
            Digest::of(format!("{} {}", chain[1], ids[2]).as_bytes())
        );
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn extraction_keys_name_the_chain() {
        let key = extract_key("sha256:x");
        let (prefix, chain) = key.split_once(' ').expect("a space");
        assert_eq!(
            (chain, prefix.split('-').next()),
            ("sha256:x", Some("extract"))
        );
        assert_ne!(key, extract_key("sha256:x"));
    }
}
