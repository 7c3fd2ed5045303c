//! Archives with an OCI image layout.
//!
//! Spec: OCI image-spec, image-layout.md

use std::collections::HashMap;

use anyhow::Context as _;
use serde::Deserialize;

use super::files::Found;
use super::{Entries, manifest_labels, store_index};
use crate::client::Client;
use crate::content;
use crate::image::model::{self, Descriptor};
use crate::image::{MAX_DEPTH, unpack};

/// Annotation with an image's full name.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// Annotation with its tag, or its name.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

/// The images of an archive that has `oci-layout`.
pub(super) async fn read(client: &Client, found: &Found) -> anyhow::Result<Entries> {
    let layout: Layout = serde_json::from_slice(&found.documents["oci-layout"])
        .context("oci-layout of the archive is malformed")?;
    anyhow::ensure!(
        layout.image_layout_version == "1.0.0",
        "the archive has OCI layout version {:?}: only 1.0.0 is known",
        layout.image_layout_version
    );
    let bytes = found
        .documents
        .get("index.json")
        .context("the archive lacks index.json")?;
    let index = model::index("index.json", bytes)?;
    let mut labels = HashMap::new();
    let mut entries = Vec::new();
    for (at, descriptor) in index.manifests.iter().enumerate() {
        labels.insert(
            format!("containerd.io/gc.ref.content.m.{at}"),
            descriptor.digest.clone(),
        );
        label_children(client, descriptor).await?;
        let annotations = &descriptor.annotations;
        let name = annotations
            .get(IMAGE_NAME)
            .or_else(|| annotations.get(REF_NAME));
        entries.push((name.cloned(), descriptor.clone()));
    }
    Ok((store_index(client, bytes.clone(), labels).await?, entries))
}

/// Labels a manifest or index with what it refers to, so that collection keeps that. What the
/// archive does not hold is left out.
async fn label_children(client: &Client, top: &Descriptor) -> anyhow::Result<()> {
    let mut queue = vec![(top.clone(), 0_usize)];
    while let Some((descriptor, depth)) = queue.pop() {
        let known = descriptor.is_index() || descriptor.is_manifest();
        if !known || depth > MAX_DEPTH {
            continue;
        }
        if !content::exists(client, &descriptor.digest).await? {
            anyhow::ensure!(
                depth > 0,
                "the archive lacks {}, which its index names",
                descriptor.digest
            );
            continue;
        }
        let bytes = content::read(client, &descriptor.digest).await?;
        let mut labels = HashMap::new();
        if descriptor.is_index() {
            let index = model::index(&descriptor.digest, &bytes)?;
            for (at, child) in index.manifests.into_iter().enumerate() {
                labels.insert(
                    format!("containerd.io/gc.ref.content.m.{at}"),
                    child.digest.clone(),
                );
                queue.push((child, depth + 1));
            }
        } else {
            labels = manifest_labels(&model::manifest(&descriptor.digest, &bytes)?);
        }
        unpack::label(client, &descriptor.digest, labels).await?;
    }
    Ok(())
}
