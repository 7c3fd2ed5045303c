//! Layers fetched ahead of being applied.

use std::collections::{BTreeMap, BTreeSet};

use lighter_store::Labels;
use lighter_store::labels::UNCOMPRESSED;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::debug;

use super::Job;
use crate::image::Error;

/// A download's result, once it has one. Sender: its task. Closed: the task was stopped.
type Waiting = oneshot::Receiver<Result<(), Error>>;

/// Downloads running ahead; dropping it stops them.
#[derive(Default)]
pub(super) struct Downloads {
    tasks: JoinSet<()>,
    /// Notes on layers that are done; the next layer does not wait for them.
    labels: JoinSet<Result<(), Error>>,
    waiting: BTreeMap<usize, Waiting>,
    /// Layers whose result was taken.
    taken: BTreeSet<usize>,
}

impl Downloads {
    /// Starts the downloads of `index` and everything above it, once.
    pub(super) fn ensure(&mut self, job: &Job<'_>, index: usize) {
        for (at, layer) in job.layers.iter().enumerate().skip(index) {
            if self.waiting.contains_key(&at) || self.taken.contains(&at) {
                continue;
            }
            let (fetcher, layer) = (job.fetcher.clone(), layer.clone());
            let (send, receive) = oneshot::channel();
            self.waiting.insert(at, receive);
            self.tasks.spawn(async move {
                // Nobody waits any more when the unpack failed: then this task is stopped too.
                let _ = send.send(fetcher.blob(&layer).await);
            });
        }
    }

    /// Waits until layer `index` is here; its download has been started.
    pub(super) async fn wait(&mut self, index: usize) -> Result<(), Error> {
        if self.taken.contains(&index) {
            return Ok(());
        }
        received(self.take(index), index).await
    }

    /// What [`received`] waits for, for one who waits beside others.
    pub(super) fn take(&mut self, index: usize) -> Waiting {
        self.taken.insert(index);
        self.waiting
            .remove(&index)
            .expect("started before it is waited for")
    }

    /// Notes the diff ID of a layer that was applied; see [`Downloads::noted`].
    pub(super) fn note(&mut self, job: &Job<'_>, index: usize) {
        let diff_id = job.diff_ids[index].to_string();
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), diff_id)]);
        let (fetcher, digest) = (job.fetcher.clone(), job.layers[index].digest.clone());
        self.labels
            .spawn(async move { fetcher.set_labels(&digest, labels).await });
    }

    /// Waits for all notes.
    pub(super) async fn noted(&mut self) -> Result<(), Error> {
        while let Some(done) = self.labels.join_next().await {
            done.map_err(|_| Error::Abandoned)??;
        }
        Ok(())
    }
}

/// The result of a download.
pub(super) async fn received(waiting: Waiting, index: usize) -> Result<(), Error> {
    match waiting.await {
        Ok(result) => result,
        Err(_) => {
            debug!(index, "download task ended without result");
            Err(Error::Abandoned)
        }
    }
}
