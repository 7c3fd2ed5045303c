//! An archive to the store: OCI layouts and what `docker save` writes, compressed or not.
//!
//! The archive is read once, from front to end: files that can be blobs go into the content store
//! as they come, the few JSON files that say what they are stay in memory. Names in the archive
//! never become paths.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::filter::Filter;
use lighter_store::metadata::Content;
use lighter_store::{Digest, Labels, Scope, labels};
use tracing::info;

use super::archive::{
    self, Compression, DockerManifest, INDEX_FILE, LAYOUT_FILE, Layout, MANIFEST_FILE,
    MAX_JSON_BYTES, WireIndex, WireManifest,
};
use super::kinds::{ImportOptions, StoreEnd};
use super::names::{IMAGE_NAME, REF_NAME};
use super::tar::{self, Entry, Kind};
use super::{Error, Transfer};
use crate::image::children::{Layers, gc_labels};
use crate::image::manifest::{self, Document};
use crate::image::{self, Descriptor, FetchOptions, Fetcher, Origin, Tracker, media};
use crate::registry::reference::Named;
use crate::streaming::bytes::Reader as StreamReader;

/// Links followed from one name in a Docker archive.
const MAX_LINKS: usize = 32;
/// Images and tags in one archive, at most.
const MAX_IMAGES: usize = 10_000;
/// Bytes compressed at a time.
const PIECE_BYTES: usize = 256 << 10;

type Pieces = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

/// A file of the archive that is in the content store now.
#[derive(Debug, Clone)]
struct Stored {
    digest: Digest,
    size_bytes: u64,
    compression: Compression,
}

/// What an archive holds.
#[derive(Debug, Default)]
struct Contents {
    json: HashMap<String, Vec<u8>>,
    files: HashMap<String, Stored>,
    links: HashMap<String, String>,
}

/// One import under way.
struct Import<'a> {
    content: Content,
    scope: &'a Scope,
    fetcher: Fetcher,
    /// Prefix of its ingest refs: imports do not share them.
    refs: String,
}

impl Transfer {
    pub(super) async fn import(
        &self,
        scope: &Scope,
        from: ImportOptions,
        to: &StoreEnd,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        tracker.say("Importing");
        let import = Import {
            content: self.inner.db.content(),
            scope,
            fetcher: self.fetcher(FetchOptions {
                scope: scope.clone(),
                origin: Origin::Store,
                tracker: tracker.clone(),
                layers: Layers::Keep,
            }),
            refs: format!("import-{:016x}", rand::random::<u64>()),
        };
        let read = |source| Error::Io {
            operation: "read archive",
            source,
        };
        let raw: Pieces = Box::pin(StreamReader::new(from.stream).into_stream());
        let plain = archive::decompressed(raw).await.map_err(read)?;
        let mut reader = tar::Reader::new(plain);
        let contents = import.unpack(&mut reader).await?;
        let (index, manifests) = if contents.json.contains_key(LAYOUT_FILE) {
            import.oci(&contents).await?
        } else if contents.json.contains_key(MANIFEST_FILE) {
            import.docker(&contents, from.force_compress).await?
        } else {
            return Err(Error::archive("unrecognized image format"));
        };
        self.import_images(&import, to, (&index, manifests), tracker)
            .await?;
        tracker.say("Completed import");
        Ok(())
    }

    /// Labels, unpacks and records what was imported.
    async fn import_images(
        &self,
        import: &Import<'_>,
        to: &StoreEnd,
        (index, manifests): (&Descriptor, Vec<Descriptor>),
        tracker: &Tracker,
    ) -> Result<(), Error> {
        let mut wanted = image::wanted(manifests.clone(), &to.select.matcher);
        if to.select.limit > 0 {
            wanted.truncate(to.select.limit);
        }
        if wanted.is_empty() {
            return Err(Error::Nothing {
                reason: "image might be filtered out".to_owned(),
            });
        }
        for descriptor in &wanted {
            import.adopt(descriptor.clone(), 0).await?;
        }
        let mut recorded = self
            .record_all(import.scope, to, index, true, tracker)
            .await?;
        // In the archive's order, so that of two images under one name the last one stays.
        for descriptor in manifests.iter().filter(|d| wanted.contains(d)) {
            if descriptor
                .annotations
                .contains_key(image::children::SUBJECT)
            {
                continue;
            }
            recorded += self
                .record_all(import.scope, to, descriptor, false, tracker)
                .await?;
            self.unpack_stored(import.scope, descriptor, to, tracker)
                .await?;
        }
        if recorded == 0 {
            // No failure, as in the reference: a client may have imported for the blobs alone.
            info!(digest = %index.digest, "no name for any image of the archive");
        }
        Ok(())
    }
}

impl Import<'_> {
    async fn unpack<S>(&self, reader: &mut tar::Reader<S>) -> Result<Contents, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Unpin,
    {
        let mut contents = Contents::default();
        let mut json_bytes = 0;
        while let Some(entry) = reader.next().await? {
            match &entry.kind {
                Kind::Other => {}
                Kind::Symlink(target) => {
                    let base = entry.name.rsplit_once('/').map_or("", |(dir, _)| dir);
                    if let Some(target) = join(base, target) {
                        contents.links.insert(entry.name, target);
                    }
                }
                Kind::Hardlink(target) => {
                    if let Some(target) = tar::clean(target) {
                        contents.links.insert(entry.name, target);
                    }
                }
                Kind::File if is_json(&entry.name) => {
                    json_bytes += entry.size_bytes;
                    if json_bytes > MAX_JSON_BYTES {
                        return Err(Error::archive(format!(
                            "{} makes the archive's JSON larger than {MAX_JSON_BYTES} bytes",
                            entry.name
                        )));
                    }
                    let bytes = reader.all(MAX_JSON_BYTES).await?;
                    contents.json.insert(entry.name, bytes);
                }
                Kind::File if entry.name == "repositories" || entry.size_bytes == 0 => {}
                Kind::File => {
                    let stored = self.store(reader, &entry, contents.files.len()).await?;
                    contents.files.insert(entry.name, stored);
                }
            }
        }
        Ok(contents)
    }

    /// One file into the content store.
    async fn store<S>(
        &self,
        reader: &mut tar::Reader<S>,
        entry: &Entry,
        number: usize,
    ) -> Result<Stored, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Unpin,
    {
        let expected = digest_of_path(&entry.name);
        let reference = format!("{}-{number}", self.refs);
        let size_bytes = entry.size_bytes;
        let opened = self
            .content
            .writer(self.scope, &reference, size_bytes, expected.as_ref())
            .await;
        let mut writer = match (opened, &expected) {
            (Ok(writer), _) => writer,
            (Err(error), Some(digest)) if error.kind() == ErrorKind::AlreadyExists => {
                let mut start = Vec::new();
                if let Some(piece) = reader.data().await? {
                    start.extend_from_slice(&piece[..piece.len().min(8)]);
                }
                return Ok(Stored {
                    digest: digest.clone(),
                    size_bytes,
                    compression: Compression::of(&start),
                });
            }
            (Err(error), _) => return Err(error.into()),
        };
        let shared = writer.status().offset_bytes == size_bytes;
        let mut start = Vec::new();
        while let Some(piece) = reader.data().await? {
            if start.len() < 8 {
                start.extend_from_slice(&piece[..piece.len().min(8)]);
            }
            if !shared {
                writer.write(piece).await?;
            }
        }
        let committed = writer
            .commit(size_bytes, expected.as_ref(), Labels::new())
            .await;
        let digest = match (committed, expected) {
            (Ok(digest), _) => digest,
            (Err(error), Some(digest)) if error.kind() == ErrorKind::AlreadyExists => digest,
            (Err(error), _) => {
                if let Err(error) = self.content.abort(self.scope, &reference).await {
                    tracing::debug!(%error, "ingest not aborted");
                }
                return Err(error.into());
            }
        };
        Ok(Stored {
            digest,
            size_bytes,
            compression: Compression::of(&start),
        })
    }

    /// An OCI layout: its index as it is.
    async fn oci(&self, contents: &Contents) -> Result<(Descriptor, Vec<Descriptor>), Error> {
        let layout: Layout = serde_json::from_slice(&contents.json[LAYOUT_FILE])
            .map_err(|error| Error::archive(format!("{LAYOUT_FILE}: {error}")))?;
        if layout.image_layout_version != "1.0.0" {
            return Err(Error::archive(format!(
                "unsupported OCI version {:?}",
                layout.image_layout_version
            )));
        }
        let bytes = contents
            .json
            .get(INDEX_FILE)
            .ok_or_else(|| Error::archive("missing index.json in OCI layout"))?;
        let descriptor = Descriptor::of(media::OCI_INDEX, bytes);
        let index = match manifest::parse(media::OCI_INDEX, &descriptor.digest, bytes)? {
            Document::Index(index) => index,
            Document::Manifest(_) => unreachable!("parsed as an index"),
        };
        let mut manifests = index.manifests;
        for manifest in &mut manifests {
            self.complete(manifest).await?;
        }
        self.keep(&descriptor, &manifests, bytes.clone().into())
            .await?;
        Ok((descriptor, manifests))
    }

    /// Fills in the platform where the archive leaves it to the configuration.
    async fn complete(&self, descriptor: &mut Descriptor) -> Result<(), Error> {
        if descriptor.platform.is_some() || !media::is_manifest(&descriptor.media_type) {
            return Ok(());
        }
        let document = image::document(&self.content, self.scope, descriptor).await;
        // What is not in the archive is not judged here.
        let Ok(Document::Manifest(manifest)) = document else {
            return Ok(());
        };
        if media::is_config(&manifest.config.media_type) {
            let digest = &manifest.config.digest;
            let limit = manifest::MAX_DOCUMENT_BYTES;
            if let Ok(bytes) = self.content.read(self.scope, digest, limit).await {
                descriptor.platform = Some(manifest::parse_config(digest, &bytes)?.platform);
            }
        }
        Ok(())
    }

    async fn keep(
        &self,
        descriptor: &Descriptor,
        children: &[Descriptor],
        bytes: Bytes,
    ) -> Result<(), Error> {
        let labels = gc_labels(children, Layers::Keep);
        Ok(self.fetcher.keep(descriptor, &labels, bytes).await?)
    }

    /// Labels everything below a manifest or index; what is missing is an error.
    fn adopt(
        &self,
        descriptor: Descriptor,
        depth: usize,
    ) -> futures::future::BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if depth > manifest::MAX_DEPTH {
                return Err(image::Error::TooDeep {
                    digest: descriptor.digest,
                    limit: manifest::MAX_DEPTH,
                }
                .into());
            }
            let media_type = descriptor.media_type.as_str();
            if !media::is_manifest(media_type) && !media::is_index(media_type) {
                return Ok(());
            }
            match self.fetcher.document(&descriptor).await? {
                Document::Index(index) => {
                    for child in index.manifests {
                        // Archives of one platform keep the whole index.
                        if self.content.info(self.scope, &child.digest).is_ok() {
                            self.adopt(child, depth + 1).await?;
                        }
                    }
                }
                Document::Manifest(manifest) => {
                    self.refer(&descriptor, manifest.subject.as_ref()).await?;
                    let missing = |child: &&Descriptor| {
                        !media::is_non_distributable(&child.media_type)
                            && self.content.info(self.scope, &child.digest).is_err()
                    };
                    let all = [&manifest.config].into_iter().chain(&manifest.layers);
                    if let Some(child) = all.clone().find(missing) {
                        return Err(Error::archive(format!(
                            "content {} of manifest {} is not in the archive",
                            child.digest, descriptor.digest
                        )));
                    }
                }
            }
            Ok(())
        })
    }

    /// Has what `referrer` says something about keep it: it gets no image of its own.
    async fn refer(
        &self,
        referrer: &Descriptor,
        subject: Option<&Descriptor>,
    ) -> Result<(), Error> {
        let noted = referrer.annotations.get(image::children::SUBJECT);
        let noted = noted.and_then(|digest| Digest::parse(digest).ok());
        let Some(subject) = subject.map(|subject| subject.digest.clone()).or(noted) else {
            return Ok(());
        };
        // The subject may have stayed where the archive was made.
        if self.content.info(self.scope, &subject).is_err() {
            return Ok(());
        }
        let (key, value) = image::children::referrer_label(&referrer.digest);
        let mask = [format!("labels.{key}")];
        let labels = Labels::from([(key, value)]);
        let content = &self.content;
        content.update(self.scope, &subject, labels, &mask).await?;
        Ok(())
    }

    /// What `docker save` writes: manifests are made from its list.
    async fn docker(
        &self,
        contents: &Contents,
        force_compress: bool,
    ) -> Result<(Descriptor, Vec<Descriptor>), Error> {
        let list: Vec<DockerManifest> = serde_json::from_slice(&contents.json[MANIFEST_FILE])
            .map_err(|error| Error::archive(format!("{MANIFEST_FILE}: {error}")))?;
        if list.len() > MAX_IMAGES {
            return Err(Error::archive(format!("more than {MAX_IMAGES} images")));
        }
        let compressed = self.compressed_by_diff_id()?;
        let mut manifests = Vec::new();
        for entry in list {
            let made = self
                .docker_image(contents, &entry, force_compress, &compressed)
                .await?;
            let tags = entry.repo_tags.unwrap_or_default();
            if tags.len() > MAX_IMAGES {
                return Err(Error::archive(format!("more than {MAX_IMAGES} tags")));
            }
            if tags.is_empty() {
                manifests.push(made);
                continue;
            }
            for tag in tags {
                let named = Named::parse(&tag)?;
                let mut descriptor = made.clone();
                let mut note =
                    |key: &str, value: String| descriptor.annotations.insert(key.to_owned(), value);
                note(IMAGE_NAME, named.canonical());
                note(REF_NAME, named.tag().unwrap_or("latest").to_owned());
                manifests.push(descriptor);
            }
        }
        let index = WireIndex {
            schema_version: 2,
            media_type: media::OCI_INDEX,
            manifests: manifests.iter().map(Descriptor::to_wire).collect(),
        };
        let bytes = serde_json::to_vec(&index).expect("plain data");
        let descriptor = Descriptor::of(media::OCI_INDEX, &bytes);
        self.keep(&descriptor, &manifests, bytes.into()).await?;
        Ok((descriptor, manifests))
    }

    /// Compressed layers of the namespace, by what they hold.
    fn compressed_by_diff_id(&self) -> Result<HashMap<String, (Digest, u64)>, Error> {
        let filter = Filter::parse(&[format!("labels.\"{}\"", labels::UNCOMPRESSED)])?;
        let infos = self.content.list(self.scope, &filter)?;
        Ok(infos
            .into_iter()
            .filter(|info| info.labels[labels::UNCOMPRESSED] != info.digest.as_str())
            .map(|info| {
                let diff_id = info.labels[labels::UNCOMPRESSED].clone();
                (diff_id, (info.digest, info.size_bytes))
            })
            .collect())
    }

    async fn docker_image(
        &self,
        contents: &Contents,
        entry: &DockerManifest,
        force_compress: bool,
        compressed: &HashMap<String, (Digest, u64)>,
    ) -> Result<Descriptor, Error> {
        let config = self.docker_config(contents, &entry.config).await?;
        let limit = manifest::MAX_DOCUMENT_BYTES;
        let bytes = self.content.read(self.scope, &config.digest, limit).await?;
        let parsed = manifest::parse_config(&config.digest, &bytes)?;
        let paths = entry.layers.as_deref().unwrap_or_default();
        if paths.len() != parsed.diff_ids.len() {
            return Err(image::Error::LayerCount {
                layers: paths.len(),
                diff_ids: parsed.diff_ids.len(),
            }
            .into());
        }
        let mut layers = Vec::new();
        for (path, diff_id) in paths.iter().zip(&parsed.diff_ids) {
            let stored = contents.file(path)?;
            let mut layer = Descriptor::new(
                stored.compression.docker_layer(),
                stored.digest.clone(),
                stored.size_bytes,
            );
            if stored.compression == Compression::None {
                if let Some((digest, size)) = compressed.get(diff_id.as_str()) {
                    let start = self
                        .content
                        .reader(self.scope, digest)
                        .await?
                        .read_at(0, 8)
                        .await?;
                    let media_type = Compression::of(&start).docker_layer();
                    layer = Descriptor::new(media_type, digest.clone(), *size);
                } else if force_compress {
                    layer = self.compress(&layer, diff_id).await?;
                }
            }
            layers.push(layer);
        }
        let wire = WireManifest {
            schema_version: 2,
            media_type: media::DOCKER_MANIFEST,
            config: config.to_wire(),
            layers: layers.iter().map(Descriptor::to_wire).collect(),
            annotations: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&wire).expect("plain data");
        let mut descriptor = Descriptor::of(media::DOCKER_MANIFEST, &bytes);
        let mut children = vec![config];
        children.extend(layers);
        self.keep(&descriptor, &children, bytes.into()).await?;
        descriptor.platform = Some(parsed.platform);
        Ok(descriptor)
    }

    /// The configuration; a small `.json` file of it was kept in memory.
    async fn docker_config(&self, contents: &Contents, path: &str) -> Result<Descriptor, Error> {
        let name = tar::clean(path).unwrap_or_default();
        if let Some(bytes) = contents.json.get(&name) {
            let descriptor = Descriptor::of(media::DOCKER_CONFIG, bytes);
            self.keep(&descriptor, &[], bytes.clone().into()).await?;
            return Ok(descriptor);
        }
        let stored = contents.file(path)?;
        Ok(Descriptor::new(
            media::DOCKER_CONFIG,
            stored.digest,
            stored.size_bytes,
        ))
    }

    /// A plain layer as a gzip one.
    async fn compress(&self, layer: &Descriptor, diff_id: &Digest) -> Result<Descriptor, Error> {
        use std::io::Write as _;
        let reference = format!("{}-gzip-{}", self.refs, layer.digest);
        let reader = self.content.reader(self.scope, &layer.digest).await?;
        let mut writer = self.content.writer(self.scope, &reference, 0, None).await?;
        let io = |source| Error::Io {
            operation: "compress layer",
            source,
        };
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        let mut offset = 0;
        let mut size_bytes = 0;
        loop {
            let piece = reader.read_at(offset, PIECE_BYTES).await?;
            offset += piece.len() as u64;
            let ended = piece.is_empty();
            // Compressing is what takes the time.
            let step = tokio::task::spawn_blocking(move || {
                encoder.write_all(&piece)?;
                let mut out = std::mem::take(encoder.get_mut());
                if ended {
                    out.extend(encoder.finish()?);
                    return Ok::<_, std::io::Error>((None, out));
                }
                Ok((Some(encoder), out))
            });
            let (next, out) = step
                .await
                .map_err(|_| image::Error::Abandoned)?
                .map_err(io)?;
            size_bytes += out.len() as u64;
            if !out.is_empty() {
                writer.write(out.into()).await?;
            }
            match next {
                Some(next) => encoder = next,
                None => break,
            }
        }
        let digest = writer.digest().await?;
        let labels = Labels::from([(labels::UNCOMPRESSED.to_owned(), diff_id.to_string())]);
        match writer.commit(size_bytes, Some(&digest), labels).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Descriptor::new(
            media::DOCKER_LAYER_GZIP,
            digest,
            size_bytes,
        ))
    }
}

impl Contents {
    /// A stored file by its name in `manifest.json`, through links.
    fn file(&self, path: &str) -> Result<Stored, Error> {
        let missing = || Error::archive(format!("{path:?} is not in the archive"));
        let mut name = tar::clean(path).ok_or_else(missing)?;
        for _ in 0..MAX_LINKS {
            if let Some(stored) = self.files.get(&name) {
                return Ok(stored.clone());
            }
            name = self.links.get(&name).ok_or_else(missing)?.clone();
        }
        Err(missing())
    }
}

fn is_json(name: &str) -> bool {
    matches!(name, LAYOUT_FILE | INDEX_FILE | MANIFEST_FILE)
        || (!name.contains('/') && name.ends_with(".json"))
}

/// `blobs/<algorithm>/<hex>`.
fn digest_of_path(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name.strip_prefix("blobs/")?.split_once('/')?;
    Digest::parse(&format!("{algorithm}:{hex}")).ok()
}

/// A link's target: relative to `base`, never above the archive's root.
fn join(base: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    if target.starts_with('/') {
        parts.clear();
    }
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_inside() {
        assert_eq!(
            join("a/b", "../c/layer.tar").as_deref(),
            Some("a/c/layer.tar")
        );
        assert_eq!(join("a", "../../etc"), None);
        assert_eq!(join("a", "/x").as_deref(), Some("x"));
    }

    #[test]
    fn circles_of_links_end() {
        let mut contents = Contents::default();
        contents.links.insert("a".into(), "b".into());
        contents.links.insert("b".into(), "a".into());
        assert!(contents.file("a").is_err());
    }
}
