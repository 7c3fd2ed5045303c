//! Images to archives, client side: an OCI layout that `docker load` reads as well.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use anyhow::Context as _;
use bytes::Bytes;
use lighter_proto::containerd::services::images::v1::Image;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::archive::ArchiveWriter;
use super::model::{self, Descriptor, Index};
use super::platform::Platform;
use super::{Resolved, manifests_of, read, resolve, target};
use crate::advice;
use crate::client::Client;
use crate::content;

/// What goes into the archive.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selection {
    /// Only these platforms; empty with `all` or for the host's.
    pub(crate) platforms: Vec<Platform>,
    /// Every platform; all content must be here.
    pub(crate) all: bool,
    /// Without `manifest.json`.
    pub(crate) skip_manifest: bool,
    /// Without layers that must not be passed on.
    pub(crate) skip_foreign: bool,
}

/// Everything that an archive will hold.
#[derive(Debug, Default)]
struct Plan {
    /// Digest and size of each blob.
    blobs: BTreeMap<String, i64>,
    /// Entries of `index.json`.
    index: Vec<Descriptor>,
    /// Entries of `manifest.json` by config digest.
    saved: BTreeMap<String, Saved>,
}

#[derive(Debug, Default)]
struct Saved {
    tags: BTreeSet<String>,
    layers: Vec<String>,
}

/// Writes images to `sink`.
pub(crate) async fn export<W: Write + Send + 'static>(
    client: &Client,
    images: &[Image],
    selection: &Selection,
    sink: W,
) -> anyhow::Result<()> {
    let mut plan = Plan::default();
    for image in images {
        plan.add(client, image, selection)
            .await
            .with_context(|| format!("cannot export {}", image.name))?;
    }
    let archive = ArchiveWriter::new(sink);
    let written = plan.write(client, selection, &archive).await;
    // When ours failed the thread misses bytes, and says so; when the thread failed (a full disk)
    // ours has not noticed.
    let finished = archive.finish().await;
    written.and(finished)
}

impl Plan {
    async fn add(
        &mut self,
        client: &Client,
        image: &Image,
        selection: &Selection,
    ) -> anyhow::Result<()> {
        let top = target(image)?;
        let manifests = manifests_of(client, &top).await?;
        let mut kept = Vec::new();
        for descriptor in manifests {
            let resolved = match read(client, &descriptor).await {
                Ok(resolved) => resolved,
                // Of an index, what is not here can be left out.
                Err(error) if selection.all || top.is_manifest() => return Err(error),
                Err(_) => continue,
            };
            let declared = descriptor
                .platform
                .as_ref()
                .unwrap_or(&resolved.config.platform);
            if selection.wants(&Platform::from(declared))
                && self.has_layers(client, &resolved, selection).await?
            {
                kept.push(resolved);
            }
        }
        if kept.is_empty() {
            return advice::fail(
                "no manifest found for platform: not found",
                "name one that is here with --platform, or pull it first",
            );
        }
        for resolved in &kept {
            self.blob(&resolved.descriptor);
            self.blob(&resolved.manifest.config);
            for layer in resolved
                .manifest
                .layers
                .iter()
                .filter(|layer| selection.keeps(layer))
            {
                self.blob(layer);
            }
        }
        let best = match resolve(client, &top, &selection.best()).await {
            Ok(best) => best,
            Err(_) => kept[0].clone(),
        };
        let name = &image.name;
        if top.is_index() {
            self.indexes(client, &top).await?;
        }
        let mut entry = Descriptor {
            platform: None,
            ..top
        };
        entry
            .annotations
            .insert("io.containerd.image.name".to_owned(), name.clone());
        entry
            .annotations
            .insert("org.opencontainers.image.ref.name".to_owned(), tag(name));
        self.index.push(entry);
        let saved = self
            .saved
            .entry(best.manifest.config.digest.clone())
            .or_default();
        saved.tags.extend(familiar(name));
        saved.layers = best
            .manifest
            .layers
            .iter()
            .map(|layer| layer.digest.clone())
            .collect();
        Ok(())
    }

    async fn has_layers(
        &self,
        client: &Client,
        image: &Resolved,
        selection: &Selection,
    ) -> anyhow::Result<bool> {
        for layer in image
            .manifest
            .layers
            .iter()
            .filter(|layer| selection.keeps(layer))
        {
            if !content::exists(client, &layer.digest).await? {
                anyhow::ensure!(
                    !selection.all,
                    "content {} is not here: pull with --all-platforms first",
                    layer.digest
                );
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The index and indexes below it, which name what `manifests_of` found.
    async fn indexes(&mut self, client: &Client, top: &Descriptor) -> anyhow::Result<()> {
        let mut queue = vec![(top.clone(), 0)];
        while let Some((descriptor, depth)) = queue.pop() {
            if !descriptor.is_index() || depth > super::MAX_DEPTH {
                continue;
            }
            if depth > 0 && !content::exists(client, &descriptor.digest).await? {
                continue;
            }
            let bytes = content::read(client, &descriptor.digest).await?;
            let index = model::index(&descriptor.digest, &bytes)?;
            self.blob(&descriptor);
            queue.extend(index.manifests.into_iter().map(|child| (child, depth + 1)));
        }
        Ok(())
    }

    fn blob(&mut self, descriptor: &Descriptor) {
        self.blobs
            .insert(descriptor.digest.clone(), descriptor.size);
    }

    /// Writes the entries, sorted by name, directories before what is in them.
    async fn write(
        &self,
        client: &Client,
        selection: &Selection,
        archive: &ArchiveWriter,
    ) -> anyhow::Result<()> {
        archive.directory("blobs").await;
        let mut algorithm = "";
        for (digest, size) in &self.blobs {
            let (kind, hex) = digest
                .split_once(':')
                .context("a digest without algorithm")?;
            anyhow::ensure!(
                kind.chars()
                    .chain(hex.chars())
                    .all(|c| c.is_ascii_alphanumeric()),
                "digest {digest:?} is malformed"
            );
            if kind != algorithm {
                archive.directory(&format!("blobs/{kind}")).await;
                algorithm = kind;
            }
            copy(
                client,
                archive,
                digest,
                &format!("blobs/{kind}/{hex}"),
                *size,
            )
            .await?;
        }
        let index = Index {
            schema_version: 2,
            manifests: self.index.clone(),
            ..Default::default()
        };
        document(archive, "index.json", 0o644, serde_json::to_vec(&index)?).await?;
        if !selection.skip_manifest {
            let entries: Vec<_> = self
                .saved
                .iter()
                .map(|(config, saved)| {
                    let layers: Vec<_> = saved.layers.iter().map(|l| blob_path(l)).collect();
                    json!({ "Config": blob_path(config), "RepoTags": saved.tags, "Layers": layers })
                })
                .collect();
            document(
                archive,
                "manifest.json",
                0o644,
                serde_json::to_vec(&entries)?,
            )
            .await?;
        }
        let layout = br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec();
        document(archive, "oci-layout", 0o444, layout).await
    }
}

impl Selection {
    fn wants(&self, platform: &Platform) -> bool {
        self.all
            || if self.platforms.is_empty() {
                Platform::host().rank(platform).is_some()
            } else {
                self.platforms
                    .iter()
                    .any(|wanted| wanted.rank(platform).is_some())
            }
    }

    fn best(&self) -> Platform {
        self.platforms
            .first()
            .cloned()
            .unwrap_or_else(Platform::host)
    }

    fn keeps(&self, layer: &Descriptor) -> bool {
        !(self.skip_foreign && layer.is_foreign())
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

async fn document(
    archive: &ArchiveWriter,
    name: &str,
    mode: u32,
    bytes: Vec<u8>,
) -> anyhow::Result<()> {
    archive.file(name, mode, u64::try_from(bytes.len())?).await;
    archive.data(Bytes::from(bytes)).await;
    Ok(())
}

/// Copies a blob into the archive, checking its digest on the way.
async fn copy(
    client: &Client,
    archive: &ArchiveWriter,
    digest: &str,
    name: &str,
    size: i64,
) -> anyhow::Result<()> {
    let mut stream = content::stream(client, digest).await?;
    archive.file(name, 0o444, u64::try_from(size)?).await;
    let mut hash = Sha256::new();
    let mut left = size;
    while let Some(part) = stream.message().await? {
        hash.update(&part.data);
        left -= i64::try_from(part.data.len())?;
        anyhow::ensure!(
            left >= 0,
            "content {digest} is larger than the {size} bytes it should have"
        );
        archive.data(part.data).await;
    }
    anyhow::ensure!(
        left == 0,
        "content {digest} is shorter than the {size} bytes it should have"
    );
    if let Some(hex) = digest.strip_prefix("sha256:") {
        let actual = hex::encode(hash.finalize());
        anyhow::ensure!(
            actual == hex,
            "content {digest} is damaged: its bytes hash to {actual}"
        );
    }
    Ok(())
}

/// What follows the last `:` of a name, if that is a tag; else the whole name.
fn tag(name: &str) -> String {
    match name.rsplit_once(':') {
        Some((_, tag)) if !tag.contains('/') && !name.contains('@') => tag.to_owned(),
        _ => name.to_owned(),
    }
}

/// The name that Docker's users know; none for a name by digest.
fn familiar(name: &str) -> Option<String> {
    if name.contains('@') || !name.contains('/') {
        return None;
    }
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    Some(name.strip_prefix("library/").unwrap_or(name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_as_docker_shows_them() {
        assert_eq!(tag("docker.io/library/a:1"), "1");
        assert_eq!(tag("localhost:5000/a"), "localhost:5000/a");
        assert_eq!(familiar("docker.io/library/a:1"), Some("a:1".to_owned()));
        assert_eq!(familiar("docker.io/me/a:1"), Some("me/a:1".to_owned()));
        assert_eq!(familiar("r.io/a@sha256:x"), None);
    }

    #[test]
    fn only_wanted_platforms_are_taken() {
        let arm = Platform::parse("linux/arm64").unwrap();
        let selection = Selection {
            platforms: vec![arm.clone()],
            ..Default::default()
        };
        assert!(
            selection.wants(&arm) && !selection.wants(&Platform::parse("linux/riscv64").unwrap())
        );
        assert!(
            Selection {
                all: true,
                ..Default::default()
            }
            .wants(&arm)
        );
    }

    #[test]
    fn paths_of_blobs_follow_the_layout() {
        assert_eq!(blob_path("sha256:ab"), "blobs/sha256/ab");
    }
}
