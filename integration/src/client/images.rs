//! Blobs and images as clients store and unpack them.

use std::collections::HashMap;

use anyhow::Context as _;
use bytes::Bytes;
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types;
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::Client;
use crate::{Image, Result};

/// Bytes in one content write.
const WRITE_CHUNK_BYTES: usize = 1 << 20;

impl Client {
    /// Writes a blob in one stream and commits it with `labels`; a blob that exists is fine.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn write_blob(
        &self,
        reference: &str,
        digest: &str,
        data: &[u8],
        labels: HashMap<String, String>,
    ) -> std::result::Result<(), Status> {
        use svc::content::v1::{WriteAction, WriteContentRequest};
        let total = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let mut requests = Vec::new();
        let mut offset = 0_i64;
        for chunk in data.chunks(WRITE_CHUNK_BYTES) {
            requests.push(WriteContentRequest {
                action: WriteAction::Write.into(),
                r#ref: reference.to_owned(),
                total,
                expected: digest.to_owned(),
                offset,
                data: Bytes::copy_from_slice(chunk),
                labels: HashMap::new(),
            });
            offset += i64::try_from(chunk.len()).unwrap_or(0);
        }
        requests.push(WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: reference.to_owned(),
            total,
            expected: digest.to_owned(),
            offset,
            data: Bytes::new(),
            labels,
        });
        let answer = self.content().write(tokio_stream::iter(requests)).await;
        let done = match answer {
            Ok(response) => {
                let mut stream = response.into_inner();
                let mut last = Ok(());
                while let Some(message) = stream.next().await {
                    if let Err(status) = message {
                        last = Err(status);
                        break;
                    }
                }
                last
            }
            Err(status) => Err(status),
        };
        match done {
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Reads a whole blob.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn read_blob(&self, digest: &str) -> std::result::Result<Vec<u8>, Status> {
        let request = svc::content::v1::ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        };
        let mut stream = self.content().read(request).await?.into_inner();
        let mut data = Vec::new();
        while let Some(message) = stream.next().await {
            data.extend_from_slice(&message?.data);
        }
        Ok(data)
    }

    /// Stores an image's blobs with references for collection, and its record.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn store(&self, image: &Image) -> Result<()> {
        for layer in &image.layers {
            let blob = &layer.blob;
            self.write_blob(
                &format!("layer-{}", blob.digest),
                &blob.digest,
                &blob.data,
                HashMap::new(),
            )
            .await?;
        }
        let config = &image.config;
        self.write_blob(
            &format!("config-{}", config.digest),
            &config.digest,
            &config.data,
            HashMap::new(),
        )
        .await?;
        let mut labels = HashMap::new();
        labels.insert(
            "containerd.io/gc.ref.content.config".to_owned(),
            config.digest.clone(),
        );
        for (n, layer) in image.layers.iter().enumerate() {
            labels.insert(
                format!("containerd.io/gc.ref.content.l.{n}"),
                layer.blob.digest.clone(),
            );
        }
        let manifest = &image.manifest;
        self.write_blob(
            &format!("manifest-{}", manifest.digest),
            &manifest.digest,
            &manifest.data,
            labels,
        )
        .await?;
        let record = svc::images::v1::Image {
            name: image.name.clone(),
            target: Some(types::Descriptor {
                media_type: manifest.media_type.clone(),
                digest: manifest.digest.clone(),
                size: i64::try_from(manifest.data.len())?,
                annotations: HashMap::new(),
            }),
            ..Default::default()
        };
        let request = svc::images::v1::CreateImageRequest {
            image: Some(record),
            source_date_epoch: None,
        };
        match self.images().create(request).await {
            Err(status) if status.code() != tonic::Code::AlreadyExists => Err(status.into()),
            _ => Ok(()),
        }
    }

    /// Stores a busybox image and unpacks it for overlayfs: the image, and the name of its top snapshot.
    ///
    /// # Errors
    /// The daemon's status, or that this machine has no busybox.
    pub async fn busybox(&self) -> Result<(Image, String)> {
        let image = Image::busybox("docker.io/test/busybox:latest")?;
        self.store(&image).await?;
        let top = self.unpack(&image, "overlayfs").await?;
        Ok((image, top))
    }

    /// Unpacks a stored image layer by layer. Returns the name of its top snapshot.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn unpack(&self, image: &Image, snapshotter: &str) -> Result<String> {
        use svc::snapshots::v1 as snap;
        let mut parent = String::new();
        for (n, layer) in image.layers.iter().enumerate() {
            let chain = image.chain_id(n + 1);
            let stat = snap::StatSnapshotRequest {
                snapshotter: snapshotter.to_owned(),
                key: chain.clone(),
            };
            if self.snapshots().stat(stat).await.is_ok() {
                parent = chain;
                continue;
            }
            let key = format!("extract-{n}-{} {chain}", rand::random::<u32>());
            let prepared = self
                .snapshots()
                .prepare(snap::PrepareSnapshotRequest {
                    snapshotter: snapshotter.to_owned(),
                    key: key.clone(),
                    parent: parent.clone(),
                    labels: HashMap::from([(
                        "containerd.io/gc.root".to_owned(),
                        "test".to_owned(),
                    )]),
                })
                .await?
                .into_inner();
            let blob = &layer.blob;
            let applied = self
                .diff()
                .apply(svc::diff::v1::ApplyRequest {
                    diff: Some(types::Descriptor {
                        media_type: blob.media_type.clone(),
                        digest: blob.digest.clone(),
                        size: i64::try_from(blob.data.len())?,
                        annotations: HashMap::new(),
                    }),
                    mounts: prepared.mounts,
                    payloads: HashMap::new(),
                    sync_fs: false,
                })
                .await?
                .into_inner()
                .applied
                .context("Apply answers a descriptor")?;
            anyhow::ensure!(
                applied.digest == layer.diff_id,
                "diff id {}",
                applied.digest
            );
            self.snapshots()
                .commit(snap::CommitSnapshotRequest {
                    snapshotter: snapshotter.to_owned(),
                    name: chain.clone(),
                    key,
                    labels: HashMap::from([(
                        "containerd.io/gc.root".to_owned(),
                        "test".to_owned(),
                    )]),
                    parent: String::new(),
                })
                .await?;
            parent = chain;
        }
        Ok(parent)
    }
}
