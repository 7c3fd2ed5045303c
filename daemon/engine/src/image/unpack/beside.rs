//! Layers applied beside each other, each as if nothing were below it.
//!
//! ```text
//! Prepare(extract-…) of every layer ─▶ fetch and apply, all at once ─▶ one sync ─▶ in order:
//!     Commit(chain ID, parent = chain ID below)
//! ```
//!
//! Few layers need to know what is below them: those with a hard link to it, with files in a directory
//! that the archive only implies, or that delete what is not there. They are found while they are
//! applied, and applied again on their parent when it is their turn.

use std::sync::atomic::{AtomicBool, Ordering};

use futures::future::join_all;
use lighter_snapshotter::{CommitOptions, Mount};
use lighter_store::Labels;
use tracing::debug;

use super::downloads::{Downloads, received};
use super::{Job, Unpacker, discard, exists, extract_key, is_staged, prepare};
use crate::diff::{LeansOn, visible};
use crate::image::Error;
use crate::image::locks::Held;

/// A layer on its way into a snapshot.
struct Extract {
    index: usize,
    /// Key and mounts of the snapshot it is unpacked into; `None` when its snapshot is there already.
    into: Option<(String, Vec<Mount>)>,
    /// What became of it.
    outcome: Outcome,
    _alone: Held,
}

enum Outcome {
    /// Nothing yet, or nothing to do.
    Open,
    /// Unpacked.
    Filled(LeansOn),
    /// Not to be unpacked without what is below it.
    Again,
}

impl Unpacker {
    /// Makes the snapshots of all layers from `start` up; how many were applied.
    pub(super) async fn beside(
        &self,
        job: &Job<'_>,
        start: usize,
        downloads: &mut Downloads,
    ) -> Result<usize, Error> {
        let mut extracts = Vec::with_capacity(job.layers.len() - start);
        let made = self.all(job, start, &mut extracts, downloads).await;
        if made.is_err() {
            for (key, _) in extracts.iter().rev().filter_map(|e| e.into.as_ref()) {
                discard(&job.snapshots, job.fetcher.scope(), key).await;
            }
        }
        made
    }

    async fn all(
        &self,
        job: &Job<'_>,
        start: usize,
        extracts: &mut Vec<Extract>,
        downloads: &mut Downloads,
    ) -> Result<usize, Error> {
        for index in start..job.layers.len() {
            extracts.push(self.extract(job, index).await?);
        }
        self.fill_all(job, extracts, downloads).await?;
        job.snapshots.sync().await?;
        let mut applied = 0;
        for extract in extracts {
            applied += usize::from(self.finish(job, extract, downloads).await?);
        }
        Ok(applied)
    }

    async fn extract(&self, job: &Job<'_>, index: usize) -> Result<Extract, Error> {
        let alone = self.alone(job, index).await;
        let (chain_id, labels) = (job.chain[index].as_str(), job.labels(index));
        Ok(Extract {
            index,
            into: prepare(job, chain_id, None, &labels).await?,
            outcome: Outcome::Open,
            _alone: alone,
        })
    }

    /// Fetches and applies every layer that has something to be unpacked into.
    async fn fill_all(
        &self,
        job: &Job<'_>,
        extracts: &mut [Extract],
        downloads: &mut Downloads,
    ) -> Result<(), Error> {
        let failed = AtomicBool::new(false);
        let mut fills = Vec::new();
        for extract in extracts.iter_mut() {
            let Some((key, mounts)) = &extract.into else {
                continue;
            };
            if is_staged(mounts) {
                continue;
            }
            let index = extract.index;
            downloads.ensure(job, index);
            let download = downloads.take(index);
            let (outcome, failed) = (&mut extract.outcome, &failed);
            fills.push(async move {
                let filled = async {
                    received(download, index).await?;
                    if failed.load(Ordering::Relaxed) {
                        return Err(Error::Abandoned);
                    }
                    self.fill(job, index, key, mounts).await
                };
                let filled = filled.await;
                failed.fetch_or(filled.is_err(), Ordering::Relaxed);
                *outcome = filled?;
                Ok(())
            });
        }
        let mut first = Ok(());
        for result in join_all(fills).await {
            // A layer that was given up because of another is not the cause.
            if matches!(first, Ok(()) | Err(Error::Abandoned)) && result.is_err() {
                first = result;
            }
        }
        first
    }

    /// Applies a layer that was fetched, without what is below it.
    async fn fill(
        &self,
        job: &Job<'_>,
        index: usize,
        key: &str,
        mounts: &[Mount],
    ) -> Result<Outcome, Error> {
        let applied = self.apply(job, index, &as_layer(index, mounts), key).await;
        match applied {
            Ok(leans_on) if index == 0 || !leans_on.attributes => Ok(Outcome::Filled(leans_on)),
            Ok(_) => Ok(Outcome::Again),
            Err(error @ Error::Apply { .. }) if index > 0 => {
                debug!(%error, key, "layer is applied again on what is below it");
                Ok(Outcome::Again)
            }
            Err(error) => Err(error),
        }
    }

    /// Commits one layer, whose parent stands by now; `false` when somebody else has.
    async fn finish(
        &self,
        job: &Job<'_>,
        extract: &mut Extract,
        downloads: &mut Downloads,
    ) -> Result<bool, Error> {
        let (scope, tracker) = (job.fetcher.scope(), job.fetcher.tracker());
        let (index, layer) = (extract.index, &job.layers[extract.index]);
        let parent = index.checked_sub(1).map(|below| job.chain[below].as_str());
        let Some((key, _)) = &extract.into else {
            tracker.done(layer, "already exists");
            return Ok(false);
        };
        let again = match (&extract.outcome, parent) {
            (Outcome::Again, _) => true,
            (Outcome::Filled(leans_on), Some(parent)) => !hides(job, parent, leans_on).await?,
            _ => false,
        };
        if again {
            discard(&job.snapshots, scope, key).await;
            extract.into = None;
            return self.on_parent(job, index, parent, downloads).await;
        }
        let options = CommitOptions {
            labels: job.labels(index),
            parent: parent.map(str::to_owned),
            synced: true,
        };
        let committed = job
            .snapshots
            .commit(scope, job.chain[index].as_str(), key, options)
            .await
            .map_err(Error::from);
        match committed {
            Ok(()) => {}
            Err(error) if exists(&error) => discard(&job.snapshots, scope, key).await,
            Err(error) => return Err(error),
        }
        extract.into = None;
        if matches!(extract.outcome, Outcome::Filled(_)) {
            downloads.note(job, index);
        }
        tracker.done(layer, "extracted");
        Ok(true)
    }
}

/// The mounts of an empty directory as those of an overlay's upper directory, so that deletions are
/// kept as marks. The base has nothing to delete.
fn as_layer(index: usize, mounts: &[Mount]) -> Vec<Mount> {
    match mounts {
        [mount] if index > 0 && mount.fstype == "bind" => vec![Mount {
            fstype: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![format!("upperdir={}", mount.source)],
        }],
        other => other.to_vec(),
    }
}

/// Whether everything that a layer deletes is there below, in snapshot `parent`.
async fn hides(job: &Job<'_>, parent: &str, leans_on: &LeansOn) -> Result<bool, Error> {
    if leans_on.deleted.is_empty() {
        return Ok(true);
    }
    let (scope, key) = (job.fetcher.scope(), extract_key(parent));
    let view = job
        .snapshots
        .view(scope, &key, Some(parent), Labels::new())
        .await?;
    let dirs = match view.as_slice() {
        [mount] if mount.fstype == "bind" => vec![mount.source.clone()],
        [mount] if mount.fstype == "overlay" => mount.lower_dirs(),
        // Not directories: nothing is known without mounting them.
        _ => Vec::new(),
    };
    let deleted = leans_on.deleted.clone();
    let look = move || deleted.iter().all(|path| visible(&dirs, path));
    let seen = tokio::task::spawn_blocking(look).await;
    discard(&job.snapshots, scope, &key).await;
    Ok(seen.unwrap_or(false))
}
