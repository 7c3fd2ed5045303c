//! Images as CRI sees them: by the digest of their config, with every name that leads there.
//!
//! Records live in the metadata store; [`Images`] keeps what lists need in memory and follows the
//! changes that others make.

pub mod pause;
mod pull;
mod service;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use lighter_engine::image::{self, Descriptor, Matcher, chain_ids};
use lighter_engine::registry::reference::Named;
use lighter_engine::transfer::{NewImage, Transfer, UnpackRequest};
use lighter_store::filter::Filter;
use lighter_store::metadata::{Db, Image as Record};
use lighter_store::{Digest, Scope};
use serde::Deserialize;

pub(crate) use pull::Counts as PullCounts;
pub use service::ImageEdge;

use crate::config;
use crate::error::{Error, Result};
use crate::spec::container::Process;

/// On every image record that CRI made or adopted.
pub const MANAGED_LABEL: (&str, &str) = ("io.cri-containerd.image", "managed");
/// On images that the kubelet must not collect.
pub const PINNED_LABEL: (&str, &str) = ("io.cri-containerd.pinned", "pinned");

/// The part of an image config that CRI reads.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ConfigFile {
    config: Option<Process>,
}

/// One image, whatever it is called.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of its config: `sha256:…`.
    pub id: String,
    /// Digest of what its names point at: index or manifest.
    pub target: Digest,
    /// Every record that leads to it.
    pub names: BTreeSet<String>,
    /// Name of its top snapshot; `None` for an image without layers.
    pub chain_id: Option<String>,
    /// Bytes of manifests, config and layers.
    pub size_bytes: u64,
    /// What it runs.
    pub process: Process,
    /// Whether the kubelet must keep it.
    pub pinned: bool,
}

impl Image {
    /// Names with a tag.
    #[must_use]
    pub fn tags(&self) -> Vec<String> {
        self.names
            .iter()
            .filter(|n| !is_id(n) && !n.contains('@'))
            .cloned()
            .collect()
    }

    /// Names with a digest.
    #[must_use]
    pub fn digests(&self) -> Vec<String> {
        self.names
            .iter()
            .filter(|n| n.contains('@'))
            .cloned()
            .collect()
    }

    /// What a container's status calls it: the first tag, else the first name.
    #[must_use]
    pub fn first_name(&self) -> String {
        let tags = self.tags();
        tags.first()
            .or_else(|| self.names.first())
            .cloned()
            .unwrap_or_else(|| self.id.clone())
    }
}

fn is_id(name: &str) -> bool {
    Digest::parse(name).is_ok()
}

/// Refuses an image that says it is for another machine. An index was searched for this one; a
/// manifest alone is whatever it is.
fn check_platform(resolved: &image::Resolved, matcher: &Matcher) -> Result<()> {
    let platform = &resolved.config.platform;
    let silent = platform.os.is_empty() || platform.architecture.is_empty();
    if silent || matcher.matches(platform) {
        return Ok(());
    }
    Err(Error::not_found(format!(
        "no match for platform in manifest {}: it is for {}/{}: not found",
        resolved.descriptor.digest, platform.os, platform.architecture
    )))
}

/// All images of the CRI namespace.
#[derive(Debug)]
pub struct Images {
    db: Db,
    scope: Scope,
    transfer: Transfer,
    config: config::Images,
    cache: RwLock<Cache>,
    /// Counts changes.
    generation: AtomicU64,
    /// Pulls under way, and what became of earlier ones.
    pub(crate) pulls: pull::Counts,
}

#[derive(Debug, Default)]
struct Cache {
    by_id: HashMap<String, Image>,
    by_name: BTreeMap<String, String>,
}

impl Cache {
    fn forget(&mut self, name: &str) {
        let Some(id) = self.by_name.remove(name) else {
            return;
        };
        if let Some(image) = self.by_id.get_mut(&id) {
            image.names.remove(name);
            if image.names.is_empty() {
                self.by_id.remove(&id);
            }
        }
    }

    fn learn(&mut self, name: &str, image: Image) {
        if self.by_name.get(name).is_some_and(|id| *id != image.id) {
            self.forget(name);
        }
        self.by_name.insert(name.to_owned(), image.id.clone());
        let pinned = image.pinned;
        let known = self.by_id.entry(image.id.clone()).or_insert(image);
        known.names.insert(name.to_owned());
        known.pinned |= pinned;
    }
}

impl Images {
    /// Images of `scope`; call [`Images::load`] before serving.
    #[must_use]
    pub fn new(db: Db, scope: Scope, transfer: Transfer, config: config::Images) -> Self {
        Self {
            db,
            scope,
            transfer,
            config,
            cache: RwLock::default(),
            generation: AtomicU64::default(),
            pulls: pull::Counts::default(),
        }
    }

    /// The images' configuration.
    #[must_use]
    pub fn config(&self) -> &config::Images {
        &self.config
    }

    /// Reads every record; ones whose blobs are missing are left out.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn load(&self) -> Result<()> {
        for record in self.db.images().list(&self.scope, &Filter::default())? {
            self.refresh_record(&record).await;
        }
        Ok(())
    }

    /// Reads one record again, after somebody changed it.
    pub async fn refresh(&self, name: &str) {
        match self.db.images().get(&self.scope, name) {
            Ok(record) => self.refresh_record(&record).await,
            Err(_) => self.write().forget(name),
        }
    }

    async fn refresh_record(&self, record: &Record) {
        match self.inspect(record).await {
            Ok(image) => {
                self.adopt(record, &image).await;
                self.write().learn(&record.name, image);
            }
            Err(error) => {
                tracing::debug!(image = %record.name, %error, "image is not usable");
                self.write().forget(&record.name);
            }
        }
    }

    /// Whether an image of this name is kept whatever a kubelet collects.
    fn is_pinned(&self, name: &str) -> bool {
        let pinned = &self.config.pinned_images;
        let own = pinned.get("sandbox").is_none_or(|kept| kept == pause::NAME);
        pinned.values().any(|kept| kept == name) || own && name == pause::CUSTOMARY
    }

    /// Marks an image that came another way than by CRI as CRI's own, and records it by its id: it
    /// outlives its name, as others do.
    async fn adopt(&self, record: &Record, image: &Image) {
        let mut labels = vec![MANAGED_LABEL];
        if self.is_pinned(&record.name) {
            labels.push(PINNED_LABEL);
        }
        let has = |(key, value): &(&str, &str)| record.labels.get(*key).is_some_and(|v| v == value);
        if is_id(&record.name) || labels.iter().all(has) {
            return;
        }
        let mut adopted = record.clone();
        let labels = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        adopted.labels.extend(labels);
        let by_id = NewImage {
            name: image.id.clone(),
            labels: adopted.labels.clone(),
        };
        let target = Descriptor::from(record.target.clone());
        if let Err(error) = self.transfer.record(&self.scope, by_id, &target).await {
            tracing::warn!(image = %record.name, %error, "image not recorded by its id");
            return;
        }
        // Not made anew: it may have been removed meanwhile.
        let mask = ["labels".to_owned()];
        match self
            .db
            .images()
            .update(&self.scope, adopted, &mask, None)
            .await
        {
            Ok(_) | Err(lighter_store::Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(image = %record.name, %error, "image not marked"),
        }
    }

    /// Unpacks an image that is here for `snapshotter`.
    ///
    /// # Errors
    /// When its layers are not here any more or cannot be unpacked.
    pub(crate) async fn unpack(&self, image: &Image, snapshotter: &str) -> Result<()> {
        let name = image.first_name();
        let failed = |e: lighter_engine::transfer::Error| {
            let cause = lighter_proto::errdefs::render(&e);
            Error::unknown(format!(
                "failed to unpack image {name:?} for snapshotter {snapshotter:?}: {cause}"
            ))
        };
        let record = self.db.images().get(&self.scope, &name)?;
        let target = Descriptor::from(record.target);
        let request = UnpackRequest {
            matcher: Matcher::host(),
            snapshotter: snapshotter.to_owned(),
        };
        let hint = (!self.config.disable_snapshot_annotations).then(|| name.clone());
        let lease = self.transfer.lease(&self.scope).await.map_err(failed)?;
        let unpack = self
            .transfer
            .unpack(lease.scope(), &name, &target, request, hint);
        let unpacked = unpack.await.map_err(failed);
        lease.release().await;
        unpacked
    }

    async fn inspect(&self, record: &Record) -> Result<Image> {
        let target = Descriptor::from(record.target.clone());
        let content = self.db.content();
        let matcher = Matcher::host();
        let unusable = |e: image::Error| Error::unknown(lighter_proto::errdefs::render(&e));
        let resolved = image::resolve(&content, &self.scope, &target, &matcher)
            .await
            .map_err(unusable)?;
        let size = image::sizes(&content, &self.scope, &target, &matcher)
            .await
            .map_err(unusable)?;
        check_platform(&resolved, &matcher)?;
        let file: ConfigFile = serde_json::from_slice(&resolved.config_bytes)?;
        let chain = chain_ids(&resolved.config.diff_ids)
            .last()
            .map(ToString::to_string);
        Ok(Image {
            id: resolved.manifest.config.digest.to_string(),
            target: target.digest,
            names: BTreeSet::from([record.name.clone()]),
            chain_id: chain,
            size_bytes: size,
            process: file.config.unwrap_or_default(),
            pinned: record
                .labels
                .get(PINNED_LABEL.0)
                .is_some_and(|v| v == PINNED_LABEL.1),
        })
    }

    /// All images, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Image> {
        let mut images: Vec<_> = self.read().by_id.values().cloned().collect();
        images.sort_by(|a, b| a.id.cmp(&b.id));
        images
    }

    /// The image of an id, a prefix of one, or any name. `None` when there is none.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<Image> {
        let cache = self.read();
        if let Some(image) = cache.by_id.get(text) {
            return Some(image.clone());
        }
        if let Ok(named) = Named::parse(text) {
            // A name with both tag and digest is known by its digest.
            for name in [named.canonical(), text.to_owned()] {
                if let Some(id) = cache.by_name.get(&name) {
                    return cache.by_id.get(id).cloned();
                }
            }
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let prefix = format!("sha256:{hex}");
        let mut found = cache.by_id.iter().filter(|(id, _)| id.starts_with(&prefix));
        match (found.next(), found.next()) {
            (Some((_, image)), None) => Some(image.clone()),
            _ => None,
        }
    }

    /// What a container's status calls the image with this id: its first name, and its first name
    /// with a digest, else the id.
    #[must_use]
    pub fn titles(&self, id: &str) -> Option<(String, String)> {
        let cache = self.read();
        let names = &cache.by_id.get(id)?.names;
        let tag = names.iter().find(|n| !is_id(n) && !n.contains('@'));
        let first = tag.or_else(|| names.first());
        let digest = names.iter().find(|n| n.contains('@'));
        Some((
            first.cloned().unwrap_or_else(|| id.to_owned()),
            digest.cloned().unwrap_or_else(|| id.to_owned()),
        ))
    }

    /// A number that is another one after images or snapshots changed.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Images or snapshots changed.
    pub(crate) fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Cache> {
        self.cache.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Cache> {
        self.changed();
        self.cache.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes every record of an image; bytes go with the next collection. Gone already is fine.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove(&self, text: &str) -> Result<()> {
        let Some(image) = self.find(text) else {
            return Ok(());
        };
        for name in &image.names {
            match self.db.images().delete(&self.scope, name, None).await {
                Ok(()) | Err(lighter_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            self.write().forget(name);
        }
        Ok(())
    }

    /// Follows `/images/*` events of the namespace until the exchange ends.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn follow(self: Arc<Self>) {
        loop {
            let filter = format!("namespace=={},topic~=|^/images/|", self.scope.namespace);
            let Ok(filter) = Filter::parse(&[filter]) else {
                return;
            };
            let mut events = self.db.events().subscribe(filter);
            // Whatever was missed before.
            if let Err(error) = self.load().await {
                tracing::warn!(%error, "cannot read the images");
            }
            while let Ok(envelope) = events.next().await {
                if let Some(name) = envelope.event.as_ref().and_then(event_name) {
                    self.refresh(&name).await;
                }
            }
        }
    }
}

/// Name in any of the three image events: it is the first field of all.
fn event_name(event: &prost_types::Any) -> Option<String> {
    use lighter_proto::containerd::services::images::v1::ImageDelete;
    use prost::Message as _;
    ImageDelete::decode(event.value.as_slice())
        .ok()
        .map(|e| e.name)
        .filter(|n| !n.is_empty())
}
