//! Archives to images, client side: for daemons without the transfer service.
//!
//! One pass over the archive writes every file as content; what is what is decided afterwards, by
//! `oci-layout` and `index.json`, or else by `manifest.json`.

mod docker;
mod files;
mod layout;

use std::collections::HashMap;
use std::io::Read;

use lighter_proto::containerd::services::images::v1::Image;
use lighter_proto::containerd::types;

use super::archive;
use super::model::{self, Descriptor, Manifest};
use super::platform::Platform;
use super::{resolve, unpack};
use crate::advice;
use crate::client::Client;
use crate::content;

/// How imported images are named, and which.
#[derive(Debug, Clone, Default)]
pub(crate) struct Naming {
    /// Prefix for images that have only a tag.
    pub(crate) prefix: String,
    /// Full names must start with the prefix; others are left out.
    pub(crate) only_prefix: bool,
    /// Also make an image named by digest.
    pub(crate) digests: bool,
    /// … but not of those that have a name.
    pub(crate) skip_named_digests: bool,
    /// Name under which the archive's index itself is kept.
    pub(crate) index_name: Option<String>,
    /// Labels of the images.
    pub(crate) labels: HashMap<String, String>,
}

impl Naming {
    /// The name for an image that the archive calls `name`; `None` to leave it out.
    fn name(&self, name: &str) -> Option<String> {
        if name.contains(['/', ':', '@']) {
            let rest = name.strip_prefix(&self.prefix);
            let prefixed = rest.is_some_and(|r| r.is_empty() || r.starts_with(['/', ':', '@']));
            return (!self.only_prefix || prefixed).then(|| name.to_owned());
        }
        Some(format!("{}:{name}", self.prefix))
    }
}

/// Imports an archive; the images made.
pub(crate) async fn import<R: Read + Send + 'static>(
    client: &Client,
    source: R,
    naming: &Naming,
) -> anyhow::Result<Vec<Image>> {
    let found = files::ingest(client, archive::read(source)).await?;
    let (index_digest, entries) = if found.documents.contains_key("oci-layout") {
        layout::read(client, &found).await?
    } else if let Some(manifest) = found.documents.get("manifest.json") {
        docker::read(client, &found, manifest).await?
    } else {
        return advice::fail(
            "unrecognized image format: neither oci-layout nor manifest.json in the archive",
            "make it with `ctr images export`, `docker save` or `skopeo copy … oci-archive:`",
        );
    };
    let mut images = Vec::new();
    for (name, descriptor) in &entries {
        let target = Some(
            Descriptor {
                platform: None,
                ..descriptor.clone()
            }
            .to_wire(),
        );
        let mut add = |name: String| {
            let labels = naming.labels.clone();
            images.push(Image {
                name,
                labels,
                target: target.clone(),
                ..Default::default()
            });
        };
        let given = name.as_deref().and_then(|name| naming.name(name));
        let by_digest = naming.digests && !(naming.skip_named_digests && given.is_some());
        if by_digest {
            add(format!("{}@{}", naming.prefix, descriptor.digest));
        }
        if let Some(name) = given {
            add(name);
        }
    }
    if let Some(name) = &naming.index_name {
        images.push(Image {
            name: name.clone(),
            target: Some(index_digest),
            ..Default::default()
        });
    }
    if images.is_empty() {
        return advice::fail(
            "no image was imported: none has a name, or the image might be filtered out",
            "give names with --base-name PREFIX, or keep unnamed ones with --digests",
        );
    }
    for image in &images {
        super::store(client, image.clone()).await?;
    }
    Ok(images)
}

/// Unpacks an imported image for the first platform that it has.
pub(crate) async fn unpack_image(
    client: &Client,
    image: &Image,
    platform: &Platform,
    snapshotter: &str,
    sync_fs: bool,
) -> anyhow::Result<String> {
    let resolved = resolve(client, &super::target(image)?, platform).await?;
    unpack::unpack(client, &resolved, snapshotter, sync_fs).await
}

/// The index kept, and each image with the name the archive gives it.
type Entries = (types::Descriptor, Vec<(Option<String>, Descriptor)>);

async fn store_index(
    client: &Client,
    bytes: Vec<u8>,
    labels: HashMap<String, String>,
) -> anyhow::Result<types::Descriptor> {
    let size = i64::try_from(bytes.len())?;
    let digest = content::write(client, bytes, labels).await?;
    let media_type = model::INDEX_TYPES[0].to_owned();
    Ok(types::Descriptor {
        media_type,
        digest,
        size,
        ..Default::default()
    })
}

/// Labels by which a manifest keeps its configuration and layers.
pub(crate) fn manifest_labels(manifest: &Manifest) -> HashMap<String, String> {
    let layers = manifest.layers.iter().enumerate();
    layers
        .map(|(at, layer)| {
            (
                format!("containerd.io/gc.ref.content.l.{at}"),
                layer.digest.clone(),
            )
        })
        .chain([(
            "containerd.io/gc.ref.content.config".to_owned(),
            manifest.config.digest.clone(),
        )])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_get_the_prefix_and_full_names_stay() {
        let naming = Naming {
            prefix: "import-2020-01-01".to_owned(),
            ..Default::default()
        };
        assert_eq!(naming.name("v1"), Some("import-2020-01-01:v1".to_owned()));
        assert_eq!(naming.name("r.io/a:v1"), Some("r.io/a:v1".to_owned()));
    }

    #[test]
    fn a_given_prefix_filters_full_names() {
        let naming = Naming {
            prefix: "r.io/a".to_owned(),
            only_prefix: true,
            ..Default::default()
        };
        assert_eq!(naming.name("r.io/a:v1"), Some("r.io/a:v1".to_owned()));
        assert_eq!(naming.name("r.io/ab:v1"), None);
        assert_eq!(naming.name("v1"), Some("r.io/a:v1".to_owned()));
    }
}
