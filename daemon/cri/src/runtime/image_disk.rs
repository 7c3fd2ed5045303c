//! What images take of the disk, measured now and then.

use std::time::{Duration, Instant, SystemTime};

use lighter_snapshotter::Usage;
use lighter_store::filter::Filter;

use crate::error::Result;
use crate::plugin::Plugin;

/// What images take of a disk.
#[derive(Debug, Clone)]
pub(crate) struct ImageFilesystem {
    /// Directory of the snapshotter.
    pub(crate) root: String,
    /// What snapshots and blobs take.
    pub(crate) usage: Usage,
    /// When it was measured.
    pub(crate) at: SystemTime,
}

impl Plugin {
    /// Roots of the snapshotters that handlers use, the default one first, and what their snapshots take:
    /// measured anew once the last measure is older than `stats_collect_period`, or an image came or went.
    ///
    /// # Errors
    /// When the default snapshotter fails.
    pub(crate) async fn image_filesystems(&self) -> Result<Vec<ImageFilesystem>> {
        let images = self.images.generation();
        let longest = Duration::from_secs(self.config.images.stats_collect_period);
        // Held while it measures: callers that come meanwhile want the same.
        let mut last = self.image_filesystems.lock().await;
        if let Some((generation, at, known)) = &*last
            && *generation == images
            && at.elapsed() < longest
        {
            return Ok(known.clone());
        }
        let found = self.measure_images().await?;
        *last = Some((images, Instant::now(), found.clone()));
        Ok(found)
    }

    async fn measure_images(&self) -> Result<Vec<ImageFilesystem>> {
        let mut found = Vec::new();
        for name in self.snapshotters() {
            match self.measure_snapshots(&name).await {
                Ok(measured) => found.push(measured),
                // A kubelet goes by the first one only.
                Err(error) if found.is_empty() => return Err(error),
                Err(error) => {
                    tracing::warn!(snapshotter = %name, %error, "snapshots not measured");
                }
            }
        }
        // Blobs count too, where images are unpacked by default: removing an image frees them as well.
        for blob in self.db.content().list(&self.scope, &Filter::default())? {
            found[0].usage.size_bytes += blob.size_bytes;
            found[0].usage.inodes += 1;
        }
        Ok(found)
    }

    async fn measure_snapshots(&self, name: &str) -> Result<ImageFilesystem> {
        let at = SystemTime::now();
        let snapshots = self.db.snapshots(name)?;
        let root = snapshots.driver().root().map(|r| r.display().to_string());
        let mut total = Usage::default();
        for info in snapshots.list(&self.scope, &Filter::default()).await? {
            // One that went away since it was listed takes nothing.
            if let Ok(usage) = snapshots.usage(&self.scope, &info.name).await {
                total.size_bytes += usage.size_bytes;
                total.inodes += usage.inodes;
            }
        }
        Ok(ImageFilesystem {
            root: root.unwrap_or_default(),
            usage: total,
            at,
        })
    }
}
