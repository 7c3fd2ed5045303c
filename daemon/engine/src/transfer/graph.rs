//! Walks an image from its target down, fetching and unpacking what is wanted.

use std::sync::Arc;

use futures::future::{BoxFuture, try_join_all};
use lighter_store::Digest;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::pull::{PulledManifest, UnpackRequest};
use super::{Error, Transfer};
use crate::image::manifest::{Document, MAX_DEPTH, Manifest};
use crate::image::{self, Descriptor, Fetcher, Matcher, UnpackTarget, children, manifest, media};

/// Which manifests of an index are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Select {
    /// Platforms, in order of preference.
    pub matcher: Matcher,
    /// At most so many, the best ones; 0: no limit.
    pub limit: usize,
    /// Manifests and configurations of the others as well.
    pub all_metadata: bool,
}

impl Select {
    /// The one manifest that suits this host best.
    #[must_use]
    pub fn host() -> Self {
        Self {
            matcher: Matcher::host(),
            limit: 1,
            all_metadata: false,
        }
    }
}

/// How much of a manifest is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    Whole,
    Metadata,
}

/// One walk.
pub(super) struct Walk<'a> {
    pub(super) transfer: &'a Transfer,
    pub(super) fetcher: &'a Fetcher,
    pub(super) select: &'a Select,
    pub(super) unpacks: &'a [UnpackRequest],
    /// Image reference for lazy snapshotters.
    pub(super) hint: Option<String>,
    /// Manifests that were taken whole.
    pub(super) found: Mutex<Vec<PulledManifest>>,
}

impl Walk<'_> {
    /// Fetches everything wanted below `target`.
    pub(super) async fn run(&self, target: &Descriptor, name: &str) -> Result<(), Error> {
        self.node(target.clone(), name.to_owned(), 0, Depth::Whole)
            .await
    }

    fn node(
        &self,
        descriptor: Descriptor,
        parent: String,
        level: usize,
        depth: Depth,
    ) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if level > MAX_DEPTH {
                return Err(image::Error::TooDeep {
                    digest: descriptor.digest,
                    limit: MAX_DEPTH,
                }
                .into());
            }
            let media_type = descriptor.media_type.as_str();
            self.fetcher.tracker().add(&descriptor, &parent);
            if media::is_schema1(media_type) {
                return Err(image::Error::Schema1.into());
            }
            if !media::is_manifest(media_type) && !media::is_index(media_type) {
                self.fetcher.blob(&descriptor).await?;
                return Ok(());
            }
            match self.fetcher.document(&descriptor).await? {
                Document::Index(index) => {
                    let name = children::ingest_ref(&descriptor);
                    let chosen = self.choose(&descriptor.digest, index.manifests, depth)?;
                    let nodes = chosen
                        .into_iter()
                        .map(|(child, depth)| self.node(child, name.clone(), level + 1, depth));
                    try_join_all(nodes).await?;
                    Ok(())
                }
                Document::Manifest(manifest) => self.manifest(descriptor, *manifest, depth).await,
            }
        })
    }

    fn choose(
        &self,
        digest: &Digest,
        manifests: Vec<Descriptor>,
        depth: Depth,
    ) -> Result<Vec<(Descriptor, Depth)>, Error> {
        let select = self.select;
        let some = !manifests.is_empty();
        let mut wanted = image::wanted(manifests.clone(), &select.matcher);
        if select.limit > 0 {
            wanted.truncate(select.limit);
        }
        if some && wanted.is_empty() {
            return Err(image::Error::NoPlatform {
                digest: digest.clone(),
            }
            .into());
        }
        let is_wanted = |child: &Descriptor| wanted.contains(child);
        let others: Vec<Descriptor> = if select.all_metadata {
            manifests
                .into_iter()
                .filter(|child| !is_wanted(child))
                .collect()
        } else {
            Vec::new()
        };
        let whole = wanted.into_iter().map(|child| (child, depth));
        Ok(whole
            .chain(others.into_iter().map(|child| (child, Depth::Metadata)))
            .collect())
    }

    async fn manifest(
        &self,
        descriptor: Descriptor,
        manifest: Manifest,
        depth: Depth,
    ) -> Result<(), Error> {
        let name = children::ingest_ref(&descriptor);
        let tracker = self.fetcher.tracker();
        tracker.add(&manifest.config, &name);
        if depth == Depth::Metadata {
            self.fetcher.blob(&manifest.config).await?;
            return Ok(());
        }
        for layer in &manifest.layers {
            tracker.add(layer, &name);
        }
        let mut pulled = PulledManifest {
            descriptor,
            config: manifest.config.clone(),
            config_bytes: bytes::Bytes::new(),
            unpacked: Vec::new(),
        };
        let mut parsed = None;
        if media::is_config(&manifest.config.media_type) {
            let limit = manifest::MAX_DOCUMENT_BYTES;
            pulled.config_bytes = self.fetcher.read(&manifest.config, limit).await?;
            let digest = &manifest.config.digest;
            parsed = Some(manifest::parse_config(digest, &pulled.config_bytes)?);
        } else {
            self.fetcher.blob(&manifest.config).await?;
        }
        let targets: Vec<&UnpackRequest> = match &parsed {
            // Layers that are no layers (charts, models) have nothing to unpack.
            Some(config)
                if manifest
                    .layers
                    .iter()
                    .all(|l| media::is_layer(&l.media_type)) =>
            {
                let fits = |unpack: &&UnpackRequest| unpack.matcher.matches(&config.platform);
                self.unpacks.iter().filter(fits).collect()
            }
            _ => Vec::new(),
        };
        if let (Some(config), false) = (&parsed, targets.is_empty()) {
            for unpack in targets {
                let target = UnpackTarget {
                    snapshotter: unpack.snapshotter.clone(),
                    hint: self.hint.clone(),
                };
                let unpacker = &self.transfer.inner.unpacker;
                let digest = &pulled.descriptor.digest;
                let config = (&manifest.config, config);
                let unpacked = unpacker
                    .unpack(self.fetcher, &target, digest, config, &manifest.layers)
                    .await?;
                pulled.unpacked.push((unpack.snapshotter.clone(), unpacked));
            }
        } else {
            self.blobs(manifest.layers).await?;
        }
        self.found.lock().await.push(pulled);
        Ok(())
    }

    /// Fetches blobs, each in a task of its own so that hashing uses every processor.
    async fn blobs(&self, blobs: Vec<Descriptor>) -> Result<(), Error> {
        let mut tasks = JoinSet::new();
        let fetcher = Arc::new(self.fetcher.clone());
        for blob in blobs {
            let fetcher = Arc::clone(&fetcher);
            tasks.spawn(async move { fetcher.blob(&blob).await });
        }
        while let Some(done) = tasks.join_next().await {
            done.map_err(|_| image::Error::Abandoned)??;
        }
        Ok(())
    }
}
