//! The differ of this process: layers of the content store to mounts and back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use lighter_proto::errdefs::{Classify, ErrorKind, WireError, render};
use lighter_snapshotter::Mount;
use lighter_store::metadata::{Content, Descriptor};
use lighter_store::{Digest, Labels, Scope, labels};
use prost_types::Any;

use crate::diff;
use crate::image::blocking;
use crate::ingest::ingest;

/// Applies and makes layers.
#[derive(Debug, Clone)]
pub struct Differ {
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

/// What a difference is made of.
#[derive(Debug, Clone, Default)]
pub struct Difference {
    /// Mounts of the lower side.
    pub lower: Vec<Mount>,
    /// Mounts of the upper side.
    pub upper: Vec<Mount>,
    /// Media type of the result; empty is gzip.
    pub media_type: String,
    /// Ref of the ingest; empty for any.
    pub reference: String,
    /// Labels of the blob.
    pub labels: Labels,
    /// Latest modification time in the result.
    pub source_date_epoch: Option<SystemTime>,
}

fn wire<E: Classify>(error: &E) -> WireError {
    WireError::new(error.kind(), render(error))
}

fn cut_off(error: &tokio::task::JoinError) -> WireError {
    WireError::new(ErrorKind::Internal, error.to_string())
}

impl Differ {
    /// Unpacks `layer` over `mounts`; the descriptor of the plain tar it holds.
    ///
    /// # Errors
    /// `NotFound` without the blob, `Unimplemented` for a media type that nothing reads, or why it
    /// could not be unpacked; what was written so far stays.
    pub async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        mounts: Vec<Mount>,
        payloads: BTreeMap<String, Any>,
        sync_fs: bool,
    ) -> Result<Descriptor, WireError> {
        let reader = self.content.reader(scope, &layer.digest).await;
        let reader = blocking(reader.map_err(|e| wire(&e))?)?;
        let (this, media_type) = (self.clone(), layer.media_type.clone());
        let work = move || {
            let options = diff::ApplyOptions {
                sync_fs: this.sync_fs || sync_fs,
                processors: &this.processors,
                payloads,
                limits: this.limits,
                temp_dir: Some(this.temp_dir),
            };
            diff::apply(reader, &media_type, &mounts, &options).map_err(|e| wire(&e))
        };
        let applied = tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| cut_off(&e))??;
        Ok(Descriptor {
            media_type: diff::LAYER_TAR.to_owned(),
            digest: Digest::parse(&applied.diff_id).map_err(|e| wire(&e))?,
            size_bytes: applied.size_bytes,
            annotations: Labels::new(),
        })
    }

    /// Writes what makes the upper side of the lower as a layer.
    ///
    /// # Errors
    /// `Unimplemented` for a media type that is not made, or why it could not be.
    pub async fn compare(&self, scope: &Scope, asked: Difference) -> Result<Descriptor, WireError> {
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
}

fn seconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |s| -s),
    }
}
