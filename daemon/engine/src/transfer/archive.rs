//! What is common to archives of images: their fixed names and JSON forms, and compression by
//! magic.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde::{Deserialize, Serialize};

use crate::image::media;
use crate::registry::Decoder;

/// Marks an OCI layout.
pub(super) const LAYOUT_FILE: &str = "oci-layout";
/// The layout's version file.
pub(super) const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// The layout's index.
pub(super) const INDEX_FILE: &str = "index.json";
/// What `docker load` reads.
pub(super) const MANIFEST_FILE: &str = "manifest.json";
/// Most bytes of any JSON file of an archive.
pub(super) const MAX_JSON_BYTES: u64 = 20 << 20;

/// The layout file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Layout {
    #[serde(default)]
    pub(super) image_layout_version: String,
}

/// One image in `manifest.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DockerManifest {
    #[serde(rename = "Config")]
    pub(super) config: String,
    #[serde(rename = "RepoTags", default)]
    pub(super) repo_tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    pub(super) layers: Option<Vec<String>>,
}

/// An OCI index or manifest list as it is written.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WireIndex<D> {
    pub(super) schema_version: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) media_type: &'static str,
    pub(super) manifests: Vec<D>,
}

/// A manifest as it is written.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WireManifest<D> {
    pub(super) schema_version: u32,
    pub(super) media_type: &'static str,
    pub(super) config: D,
    pub(super) layers: Vec<D>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<String, String>,
}

/// How bytes are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By the first bytes of the data.
    pub(super) fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [skippable, 0x2a, 0x4d, 0x18, ..] if skippable & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::None,
        }
    }

    /// Type of a Docker layer compressed like this.
    pub(super) fn docker_layer(self) -> &'static str {
        match self {
            Self::None => media::DOCKER_LAYER,
            Self::Gzip => media::DOCKER_LAYER_GZIP,
            Self::Zstd => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        }
    }
}

/// The bytes of `source` without their compression, if they have one.
pub(super) async fn decompressed<S>(
    source: S,
) -> io::Result<impl Stream<Item = io::Result<Bytes>> + Unpin>
where
    S: Stream<Item = io::Result<Bytes>> + Unpin,
{
    let mut source = source.fuse();
    // Enough for every magic.
    let mut start = Vec::new();
    while start.len() < 8 {
        match source.next().await {
            Some(piece) => start.extend_from_slice(&piece?),
            None => break,
        }
    }
    let decoder = match Compression::of(&start) {
        Compression::None => Decoder::Identity,
        Compression::Gzip => Decoder::gzip(),
        Compression::Zstd => Decoder::zstd()?,
    };
    let source = futures::stream::iter([Ok(Bytes::from(start))]).chain(source);
    let state = (Box::pin(source), Some(decoder), Vec::new().into_iter());
    Ok(Box::pin(futures::stream::unfold(
        state,
        |state| async move {
            let (mut source, mut decoder, mut ready) = state;
            loop {
                if let Some(piece) = ready.next() {
                    return Some((Ok(piece), (source, decoder, ready)));
                }
                let mut open = decoder.take()?;
                let decoded = match source.next().await {
                    Some(Ok(piece)) => {
                        let decoded = open.decode(piece);
                        decoder = Some(open);
                        decoded
                    }
                    Some(Err(error)) => Err(error),
                    None => open.finish().map(|last| vec![last]),
                };
                match decoded {
                    Ok(pieces) => ready = pieces.into_iter(),
                    Err(error) => {
                        return Some((Err(error), (source, None, Vec::new().into_iter())));
                    }
                }
            }
        },
    )))
}
