//! Archives to images, client side: for daemons without the transfer service.
//!
//! One pass over the archive writes every file as content; what is what is decided afterwards, by
//! `oci-layout` and `index.json`, or else by `manifest.json`.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

use anyhow::Context as _;
use lighter_proto::containerd::services::images::v1::Image;
use lighter_proto::containerd::types;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::archive::{self, Compression, Piece};
use super::model::{self, Descriptor, Manifest};
use super::platform::Platform;
use super::{full_name, resolve, unpack};
use crate::advice;
use crate::client::Client;
use crate::content::{self, MAX_JSON, Opened, Writer};

/// Annotation with an image's full name.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// Annotation with its tag, or its name.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Documents kept in memory while reading.
const DOCUMENTS: [&str; 3] = ["oci-layout", "index.json", "manifest.json"];
/// Links followed from one to the next.
const MAX_LINKS: usize = 8;

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

/// A file of the archive, by now content.
#[derive(Debug, Clone)]
struct Stored {
    digest: String,
    size: i64,
    compression: Compression,
}

/// What one pass over an archive found.
#[derive(Debug, Default)]
struct Found {
    documents: HashMap<String, Vec<u8>>,
    files: HashMap<String, Stored>,
    links: HashMap<String, String>,
}

impl Found {
    fn file(&self, name: &str) -> anyhow::Result<&Stored> {
        let mut name = name.trim_start_matches("./");
        for _ in 0..MAX_LINKS {
            if let Some(stored) = self.files.get(name) {
                return Ok(stored);
            }
            match self.links.get(name) {
                Some(target) => name = target,
                None => break,
            }
        }
        anyhow::bail!("the archive lacks {name}, which its manifest names")
    }
}

/// Imports an archive; the images made.
pub(crate) async fn import<R: Read + Send + 'static>(
    client: &Client,
    source: R,
    naming: &Naming,
) -> anyhow::Result<Vec<Image>> {
    let found = ingest(client, archive::read(source)).await?;
    let (index_digest, entries) = if found.documents.contains_key("oci-layout") {
        oci(client, &found).await?
    } else if let Some(manifest) = found.documents.get("manifest.json") {
        docker(client, &found, manifest).await?
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

/// Writes all files of an archive as content.
async fn ingest(
    client: &Client,
    mut pieces: mpsc::Receiver<anyhow::Result<Piece>>,
) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let mut current: Option<Ingest> = None;
    while let Some(piece) = pieces.recv().await {
        match piece? {
            Piece::Data(bytes) => {
                if let Some(ingest) = &mut current {
                    ingest.write(bytes).await?;
                }
            }
            Piece::File { name, size } => {
                finish(&mut found, current.take()).await?;
                current = Some(Ingest::begin(client, name, size).await?);
            }
            Piece::Link { name, target } => {
                finish(&mut found, current.take()).await?;
                found.links.insert(name, target);
            }
        }
    }
    finish(&mut found, current).await?;
    Ok(found)
}

async fn finish(found: &mut Found, ingest: Option<Ingest>) -> anyhow::Result<()> {
    let Some(ingest) = ingest else { return Ok(()) };
    match ingest.target {
        Destination::Memory(bytes) => drop(found.documents.insert(ingest.name, bytes)),
        target => {
            let digest = format!("sha256:{}", hex::encode(ingest.hash.finalize()));
            if let Some(named) = named_digest(&ingest.name) {
                anyhow::ensure!(
                    digest == named,
                    "{} of the archive is damaged: its bytes hash to {digest}",
                    ingest.name
                );
            }
            let size = i64::try_from(ingest.size)?;
            if let Destination::Content(writer) = target {
                writer.commit(size, &digest, HashMap::new()).await?;
            }
            let stored = Stored {
                digest,
                size,
                compression: ingest.compression,
            };
            found.files.insert(ingest.name, stored);
        }
    }
    Ok(())
}

/// The digest that a file of an OCI layout is named by.
fn named_digest(name: &str) -> Option<String> {
    let hex = name.strip_prefix("blobs/sha256/")?;
    Some(format!("sha256:{hex}"))
}

/// One file on its way.
#[derive(Debug)]
struct Ingest {
    name: String,
    size: u64,
    hash: Sha256,
    compression: Compression,
    started: bool,
    target: Destination,
}

#[derive(Debug)]
enum Destination {
    /// A document that decides what the archive is.
    Memory(Vec<u8>),
    /// New content.
    Content(Box<Writer>),
    /// Content that is there already.
    Known,
}

impl Ingest {
    async fn begin(client: &Client, name: String, size: u64) -> anyhow::Result<Self> {
        let target = if DOCUMENTS.contains(&name.as_str()) {
            anyhow::ensure!(
                usize::try_from(size).is_ok_and(|size| size <= MAX_JSON),
                "{name} of the archive is larger than {MAX_JSON} bytes"
            );
            Destination::Memory(Vec::new())
        } else {
            let expected = named_digest(&name).unwrap_or_default();
            let reference = match expected.as_str() {
                "" => format!("import-{:016x}", rand::random::<u64>()),
                digest => format!("import-{digest}"),
            };
            let total = i64::try_from(size)?;
            match Writer::open(client, &reference, total, &expected).await? {
                Opened::Exists => Destination::Known,
                Opened::Writer(mut writer) => {
                    writer.restart();
                    Destination::Content(writer)
                }
            }
        };
        let compression = Compression::None;
        Ok(Self {
            name,
            size,
            hash: Sha256::new(),
            compression,
            started: false,
            target,
        })
    }

    async fn write(&mut self, bytes: bytes::Bytes) -> anyhow::Result<()> {
        if !self.started {
            self.compression = archive::compression(&bytes);
            self.started = true;
        }
        self.hash.update(&bytes);
        match &mut self.target {
            Destination::Memory(kept) => kept.extend_from_slice(&bytes),
            Destination::Content(writer) => writer
                .write(bytes)
                .await
                .with_context(|| format!("cannot store {} of the archive", self.name))?,
            Destination::Known => {}
        }
        Ok(())
    }
}

/// The index kept, and each image with the name the archive gives it.
type Entries = (types::Descriptor, Vec<(Option<String>, Descriptor)>);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

async fn oci(client: &Client, found: &Found) -> anyhow::Result<Entries> {
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

/// Labels a manifest or index with what it refers to, so that collection keeps that. What the
/// archive does not hold is left out.
async fn label_children(client: &Client, top: &Descriptor) -> anyhow::Result<()> {
    let mut queue = vec![(top.clone(), 0_usize)];
    while let Some((descriptor, depth)) = queue.pop() {
        let known = descriptor.is_index() || descriptor.is_manifest();
        if !known || depth > super::MAX_DEPTH {
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

async fn docker(client: &Client, found: &Found, manifest: &[u8]) -> anyhow::Result<Entries> {
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

    #[test]
    fn links_are_followed_but_not_in_a_ring() {
        let stored = Stored {
            digest: "d".to_owned(),
            size: 1,
            compression: Compression::None,
        };
        let mut found = Found::default();
        found.files.insert("b/layer.tar".to_owned(), stored);
        found
            .links
            .insert("a/layer.tar".to_owned(), "b/layer.tar".to_owned());
        found.links.insert("x".to_owned(), "y".to_owned());
        found.links.insert("y".to_owned(), "x".to_owned());
        assert_eq!(found.file("./a/layer.tar").unwrap().digest, "d");
        assert!(found.file("x").is_err() && found.file("missing").is_err());
    }
}
