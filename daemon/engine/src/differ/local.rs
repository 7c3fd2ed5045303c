//! The differ of this process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_snapshotter::Mount;
use lighter_store::metadata::{Content, Descriptor};
use lighter_store::{Digest, Labels, Scope, labels};

use super::{Applied, ApplyOptions, Differ, Difference};
use crate::diff;
use crate::image::blocking;
use crate::ingest::ingest;

/// Applies and makes layers on this machine.
#[derive(Debug, Clone)]
pub struct LocalDiffer {
    /// Where layers are.
    pub content: Content,
    /// Stream processors of the configuration.
    pub processors: Arc<[diff::Processor]>,
    /// Bounds on what a layer may become.
    pub limits: diff::Limits,
    /// Whether every applied layer is synced, asked for or not.
    pub sync_fs: bool,
    /// Where temporary mountpoints are made.
    pub temp_dir: PathBuf,
}

fn wire<E: Classify>(error: &E) -> WireError {
    WireError::of(error)
}

fn cut_off(error: &tokio::task::JoinError) -> WireError {
    WireError::new(ErrorKind::Internal, error.to_string())
}

#[async_trait]
impl Differ for LocalDiffer {
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        mounts: &[Mount],
        options: ApplyOptions,
    ) -> Result<Applied, WireError> {
        let reader = self.content.reader(scope, &layer.digest).await;
        let reader = blocking(reader.map_err(|e| wire(&e))?)?;
        let (this, media_type) = (self.clone(), layer.media_type.clone());
        let plain_type = diff::plain_type(&media_type);
        let mounts = mounts.to_vec();
        let work = move || {
            let options = diff::ApplyOptions {
                sync_fs: this.sync_fs || options.sync_fs,
                processors: &this.processors,
                payloads: options.payloads,
                limits: this.limits,
                temp_dir: Some(this.temp_dir),
            };
            diff::apply(reader, &media_type, &mounts, &options).map_err(|e| wire(&e))
        };
        let applied = tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| cut_off(&e))??;
        let layer = Descriptor {
            media_type: plain_type.to_owned(),
            digest: Digest::parse(&applied.diff_id).map_err(|e| wire(&e))?,
            size_bytes: applied.size_bytes,
            annotations: Labels::new(),
        };
        Ok(Applied {
            layer,
            leans_on: applied.leans_on,
        })
    }

    async fn compare(&self, scope: &Scope, asked: Difference) -> Result<Descriptor, WireError> {
        let reference = if asked.reference.is_empty() {
            format!("diff-{:016x}", rand::random::<u64>())
        } else {
            asked.reference.clone()
        };
        let options = diff::CompareOptions {
            media_type: asked.media_type,
            source_date_epoch: asked.source_date_epoch.map(seconds),
            temp_dir: Some(self.temp_dir.clone()),
        };
        let (lower, upper) = (asked.lower, asked.upper);
        let mut kept = asked.labels;
        let produce = move |out: &mut crate::ingest::Chunks| {
            diff::compare(&lower, &upper, &options, out).map_err(|e| wire(&e))
        };
        let made = ingest(&self.content, scope, &reference, produce, |compared| {
            kept.insert(labels::UNCOMPRESSED.to_owned(), compared.diff_id.clone());
            kept
        })
        .await?;
        if made.existed {
            // A blob that came another way may lack what tells its diff ID.
            let label =
                Labels::from([(labels::UNCOMPRESSED.to_owned(), made.made.diff_id.clone())]);
            let mask = [format!("labels.{}", labels::UNCOMPRESSED)];
            let updated = self.content.update(scope, &made.digest, label, &mask).await;
            updated.map_err(|e| wire(&e))?;
        }
        Ok(Descriptor {
            media_type: made.made.media_type.to_owned(),
            digest: made.digest,
            size_bytes: made.size_bytes,
            annotations: Labels::new(),
        })
    }

    fn tells_what_layers_lean_on(&self) -> bool {
        true
    }
}

fn seconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |s| -s),
    }
}
