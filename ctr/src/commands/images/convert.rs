//! `ctr images convert`: the same image under other media types, or with its layers unpacked.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use lighter_proto::containerd::services::images::v1::Image;
use sha2::{Digest as _, Sha256};

use crate::advice;
use crate::cli::Ctx;
use crate::client::Client;
use crate::content::{self, Opened, Writer};
use crate::image::archive::{Compression, compression};
use crate::image::import::manifest_labels;
use crate::image::model::{self, Descriptor, Index};
use crate::image::platform::Platform;
use crate::image::{self, Resolved};
use crate::lease;
use crate::table;

/// Bytes given to a decoder at once: what they may grow to is held in memory.
const SLICE: usize = 16 << 10;

/// Docker's media types and OCI's for the same thing.
const OCI_TYPES: [(&str, &str); 9] = [
    (model::INDEX_TYPES[1], model::INDEX_TYPES[0]),
    (model::MANIFEST_TYPES[1], model::MANIFEST_TYPES[0]),
    (
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.oci.image.config.v1+json",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.oci.image.layer.v1.tar",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.oci.image.layer.v1.tar+zstd",
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    ),
];

/// Convert an image
#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// Unpack compressed layers
    #[arg(long)]
    uncompress: bool,
    /// Use OCI's media types instead of Docker's
    #[arg(long)]
    oci: bool,
    /// Only this platform (may be given several times) [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<String>,
    /// All platforms
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Image
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Name of the result
    #[arg(value_name = "TARGET")]
    target: String,
}

impl Convert {
    /// Converts it; the digest of the result is printed.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        if !self.uncompress && !self.oci && self.platform.is_empty() {
            return advice::fail(
                "nothing to convert",
                "say what: --oci, --uncompress, or fewer platforms with --platform",
            );
        }
        lease::hold(&ctx.client, |client| async move {
            let record = image::get(&client, &self.source).await?;
            let top = image::target(&record)?;
            let made = self.convert(&client, &top).await?;
            table::line(&made.digest)?;
            let target = Some(
                Descriptor {
                    platform: None,
                    ..made
                }
                .to_wire(),
            );
            let image = Image {
                name: self.target,
                labels: record.labels,
                target,
                ..Default::default()
            };
            image::store(&client, image).await
        })
        .await
    }

    fn wants(&self, platform: &Platform) -> anyhow::Result<bool> {
        if self.all_platforms {
            return Ok(true);
        }
        if self.platform.is_empty() {
            return Ok(Platform::host().rank(platform).is_some());
        }
        for text in &self.platform {
            if Platform::parse(text)?.rank(platform) == Some(0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn convert(&self, client: &Client, top: &Descriptor) -> anyhow::Result<Descriptor> {
        let mut made = Vec::new();
        for descriptor in image::manifests_of(client, top).await? {
            if let Some(declared) = &descriptor.platform
                && !self.wants(&Platform::from(declared))?
            {
                continue;
            }
            made.push(
                self.manifest(client, image::read(client, &descriptor).await?)
                    .await?,
            );
        }
        if made.is_empty() {
            return advice::fail(
                "the image has none of the platforms asked for: not found",
                "`ctr images inspect` shows those it has",
            );
        }
        if !top.is_index() {
            return Ok(made.remove(0));
        }
        let entries = made.iter().enumerate();
        let labels = entries
            .map(|(at, entry)| {
                (
                    format!("containerd.io/gc.ref.content.m.{at}"),
                    entry.digest.clone(),
                )
            })
            .collect();
        let index = Index {
            schema_version: 2,
            media_type: self.media_type(&top.media_type),
            manifests: made,
            ..Default::default()
        };
        let bytes = serde_json::to_vec(&index)?;
        write(client, bytes, &index.media_type, labels).await
    }

    /// The media type after conversion.
    fn media_type(&self, old: &str) -> String {
        let known = OCI_TYPES
            .iter()
            .find(|(docker, _)| self.oci && *docker == old);
        known.map_or(old, |(_, oci)| oci).to_owned()
    }

    async fn manifest(&self, client: &Client, image: Resolved) -> anyhow::Result<Descriptor> {
        let Resolved {
            descriptor,
            mut manifest,
            config,
        } = image;
        let diff_ids = &config.rootfs.diff_ids;
        anyhow::ensure!(
            diff_ids.len() == manifest.layers.len(),
            "manifest {} does not have the layers its config names",
            descriptor.digest
        );
        for (layer, diff_id) in manifest.layers.iter_mut().zip(diff_ids) {
            if self.uncompress {
                uncompress(client, layer, diff_id)
                    .await
                    .with_context(|| format!("cannot unpack layer {}", layer.digest))?;
            }
            layer.media_type = self.media_type(&layer.media_type);
        }
        manifest.config.media_type = self.media_type(&manifest.config.media_type);
        manifest.media_type = self.media_type(&descriptor.media_type);
        let bytes = serde_json::to_vec(&manifest)?;
        let made = write(
            client,
            bytes,
            &manifest.media_type,
            manifest_labels(&manifest),
        )
        .await?;
        Ok(Descriptor {
            digest: made.digest,
            size: made.size,
            media_type: made.media_type,
            ..descriptor
        })
    }
}

async fn write(
    client: &Client,
    bytes: Vec<u8>,
    media_type: &str,
    labels: HashMap<String, String>,
) -> anyhow::Result<Descriptor> {
    let size = i64::try_from(bytes.len())?;
    let digest = content::write(client, bytes, labels).await?;
    Ok(Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        ..Default::default()
    })
}

/// Bytes that a decoder has given out.
enum Decoder {
    None(Vec<u8>),
    Gzip(Box<flate2::write::MultiGzDecoder<Vec<u8>>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Vec<u8>>>),
}

impl Decoder {
    fn new(kind: Compression) -> std::io::Result<Self> {
        Ok(match kind {
            Compression::None => Self::None(Vec::new()),
            Compression::Gzip => {
                Self::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Vec::new())))
            }
            Compression::Zstd => {
                Self::Zstd(Box::new(zstd::stream::write::Decoder::new(Vec::new())?))
            }
        })
    }

    fn push(&mut self, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        match self {
            Self::None(out) => out.extend_from_slice(bytes),
            Self::Gzip(decoder) => decoder.write_all(bytes)?,
            Self::Zstd(decoder) => decoder.write_all(bytes)?,
        }
        self.take()
    }

    fn take(&mut self) -> std::io::Result<Vec<u8>> {
        Ok(std::mem::take(match self {
            Self::None(out) => out,
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => {
                decoder.flush()?;
                decoder.get_mut()
            }
        }))
    }

    fn finish(mut self) -> std::io::Result<Vec<u8>> {
        if let Self::Gzip(decoder) = &mut self {
            decoder.try_finish()?;
        }
        self.take()
    }
}

/// Replaces a compressed layer by its contents, which must be what the image's config says.
async fn uncompress(client: &Client, layer: &mut Descriptor, diff_id: &str) -> anyhow::Result<()> {
    let plain = [".gzip", ".zstd", "+gzip", "+zstd"]
        .iter()
        .find_map(|ending| layer.media_type.strip_suffix(ending).map(str::to_owned));
    let Some(media_type) = plain else {
        return Ok(());
    };
    let mut source = content::stream(client, &layer.digest).await?;
    let name = format!("convert-{diff_id}");
    let mut writer = match Writer::open(client, &name, 0, diff_id).await? {
        Opened::Exists => None,
        Opened::Writer(mut writer) => {
            writer.restart();
            Some(writer)
        }
    };
    let (mut hash, mut size) = (Sha256::new(), 0_i64);
    let mut decoder = None;
    loop {
        let part = source.message().await?;
        let mut pieces = Vec::new();
        match &part {
            Some(part) => pieces.extend(part.data.chunks(SLICE)),
            None => pieces.push(&[][..]),
        }
        for piece in pieces {
            let decoded = match &part {
                Some(_) => match &mut decoder {
                    Some(decoder) => Decoder::push(decoder, piece)?,
                    None => decoder
                        .insert(Decoder::new(compression(piece))?)
                        .push(piece)?,
                },
                None => decoder
                    .take()
                    .map(Decoder::finish)
                    .transpose()?
                    .unwrap_or_default(),
            };
            hash.update(&decoded);
            size += i64::try_from(decoded.len())?;
            if let Some(writer) = &mut writer {
                writer.write(Bytes::from(decoded)).await?;
            }
        }
        if part.is_none() {
            break;
        }
    }
    let digest = format!("sha256:{}", hex::encode(hash.finalize()));
    anyhow::ensure!(
        digest == diff_id,
        "its content hashes to {digest}, not to {diff_id}"
    );
    if let Some(writer) = writer {
        let label = ("containerd.io/uncompressed".to_owned(), digest.clone());
        writer.commit(size, &digest, HashMap::from([label])).await?;
    }
    (layer.media_type, layer.digest, layer.size) = (media_type, digest, size);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoders_give_back_what_was_compressed() {
        let text = b"hello ".repeat(10_000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let cases = [
            text.clone(),
            gzip.finish().unwrap(),
            zstd::encode_all(&text[..], 1).unwrap(),
        ];
        for bytes in cases {
            let mut decoder = Decoder::new(compression(&bytes)).unwrap();
            let mut out = Vec::new();
            for piece in bytes.chunks(100) {
                out.extend(decoder.push(piece).unwrap());
            }
            out.extend(decoder.finish().unwrap());
            assert!(out == text);
        }
    }

    #[test]
    fn docker_types_have_an_oci_name_each() {
        for (docker, oci) in OCI_TYPES {
            assert!(
                docker.contains("docker") && oci.contains("oci.image"),
                "{docker} {oci}"
            );
            assert_eq!(docker.ends_with("gzip"), oci.ends_with("gzip"));
        }
    }
}
