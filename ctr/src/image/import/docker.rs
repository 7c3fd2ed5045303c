//! Archives as `docker save` makes them: manifests are built of what they say.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use serde::Deserialize;

use super::files::{Found, Stored};
use super::{Entries, manifest_labels, store_index};
use crate::client::Client;
use crate::content;
use crate::image::archive::Compression;
use crate::image::full_name;
use crate::image::model::{self, Descriptor, Manifest};

/// One image of a docker-save archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// The images of an archive whose `manifest.json` is `manifest`.
pub(super) async fn read(
    client: &Client,
    found: &Found,
    manifest: &[u8],
) -> anyhow::Result<Entries> {
    let saved: Vec<Saved> =
        serde_json::from_slice(manifest).context("manifest.json of the archive is malformed")?;
    let mut entries = Vec::new();
    let mut labels = HashMap::new();
    let mut manifests = Vec::new();
    for (at, image) in saved.iter().enumerate() {
        let descriptor = docker_manifest(client, found, image).await?;
        labels.insert(
            format!("containerd.io/gc.ref.content.m.{at}"),
            descriptor.digest.clone(),
        );
        manifests.push(descriptor.clone());
        let tags = image.repo_tags.as_deref().unwrap_or_default();
        if tags.is_empty() {
            entries.push((None, descriptor.clone()));
        }
        entries.extend(
            tags.iter()
                .map(|tag| (Some(full_name(tag)), descriptor.clone())),
        );
    }
    let index = model::Index {
        schema_version: 2,
        media_type: model::INDEX_TYPES[0].to_owned(),
        manifests,
        ..Default::default()
    };
    Ok((
        store_index(client, serde_json::to_vec(&index)?, labels).await?,
        entries,
    ))
}

/// Builds and stores the manifest that a docker-save archive does not have.
async fn docker_manifest(
    client: &Client,
    found: &Found,
    image: &Saved,
) -> anyhow::Result<Descriptor> {
    let descriptor = |stored: &Stored, media_type: &str| Descriptor {
        media_type: media_type.to_owned(),
        digest: stored.digest.clone(),
        size: stored.size,
        ..Default::default()
    };
    let layer = |name: &String| {
        let stored = found.file(name)?;
        let media_type = match stored.compression {
            Compression::None => "application/vnd.docker.image.rootfs.diff.tar",
            Compression::Gzip => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Compression::Zstd => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        };
        anyhow::Ok(descriptor(stored, media_type))
    };
    let stored = found.file(&image.config)?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: model::MANIFEST_TYPES[1].to_owned(),
        config: descriptor(stored, "application/vnd.docker.container.image.v1+json"),
        layers: image
            .layers
            .iter()
            .map(layer)
            .collect::<anyhow::Result<_>>()?,
        ..Default::default()
    };
    let config = content::read(client, &stored.digest).await?;
    let config = model::config(&stored.digest, &config)?;
    let bytes = serde_json::to_vec(&manifest)?;
    let size = i64::try_from(bytes.len())?;
    let digest = content::write(client, bytes, manifest_labels(&manifest)).await?;
    Ok(Descriptor {
        media_type: manifest.media_type,
        digest,
        size,
        annotations: BTreeMap::new(),
        platform: Some(config.platform),
        ..Default::default()
    })
}
