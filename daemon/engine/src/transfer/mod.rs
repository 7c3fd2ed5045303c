//! Transfers between typed sources and destinations: pull, push, import, export, tag, and copies
//! into containers and out of them.
//!
//! [`Transfer`] is the engine for the gRPC service and for CRI alike: [`Transfer::pull`] needs no
//! stream and no message type. Everything an operation makes is held by a lease, the caller's or
//! its own ([`OwnLease`]), and image records are written last, when all they stand for is there.

mod archive;
mod container;
mod credentials;
mod error;
mod export;
mod graph;
mod import;
mod kinds;
mod lease;
mod names;
mod pieces;
mod progress;
mod pull;
mod push;
mod tag;
mod tar;
mod verifier;

#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use lighter_store::metadata::Db;
use lighter_store::{Namespace, Scope};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

pub use self::container::{PathEnd, TarStream};
pub use self::error::Error;
pub use self::graph::Select;
pub use self::kinds::{
    Destination, ExportOptions, Extra, ImportOptions, RegistryEnd, Source, StoreEnd,
};
pub use self::lease::OwnLease;
pub use self::names::NewImage;
pub use self::pull::{Pull, Pulled, PulledManifest, UnpackRequest};
pub use self::verifier::VerifierConfig;
use crate::image::{Locks, Platform, Snapshotters, Tracker, Unpacker};
use crate::registry::Registry;
use crate::runtime::Manager;
use crate::streaming::{Stream, Streams, bytes};

/// A platform and snapshotter that clients may ask to unpack for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackSupport {
    /// The platform, and what it can run as well.
    pub platform: Platform,
    /// Plugin id of the snapshotter.
    pub snapshotter: String,
}

/// Configuration of transfers.
#[derive(Debug, Clone)]
pub struct Config {
    /// Blobs downloaded at once.
    pub max_downloads: usize,
    /// Blobs uploaded at once.
    pub max_uploads: usize,
    /// Layers applied at once.
    pub max_unpacks: usize,
    /// What unpacking is offered, the preferred first.
    pub unpack: Vec<UnpackSupport>,
    /// Image verifier plugins; `None`: every image is let in.
    pub verifier: Option<VerifierConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_downloads: 3,
            max_uploads: 3,
            max_unpacks: 2,
            unpack: vec![UnpackSupport {
                platform: Platform::host(),
                snapshotter: "overlayfs".to_owned(),
            }],
            verifier: None,
        }
    }
}

/// The transfer engine; clones share it.
#[derive(Debug, Clone)]
pub struct Transfer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: Db,
    registry: Registry,
    unpacker: Unpacker,
    locks: Locks,
    streams: Streams,
    downloads: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    config: Config,
    tasks: TaskTracker,
    /// Containers' processes, whose files are copied; without it all containers are at rest.
    manager: OnceLock<Manager>,
}

impl Transfer {
    /// An engine over the daemon's stores. Clean-up tasks are `tasks`'.
    #[must_use]
    pub fn new(
        db: Db,
        registry: Registry,
        snapshotters: Snapshotters,
        streams: Streams,
        config: Config,
        tasks: TaskTracker,
    ) -> Self {
        let locks = Locks::default();
        let unpacker = Unpacker::new(db.clone(), snapshotters, locks.clone(), config.max_unpacks);
        Self {
            inner: Arc::new(Inner {
                db,
                registry,
                unpacker,
                locks,
                streams,
                downloads: Arc::new(Semaphore::new(config.max_downloads.max(1))),
                uploads: Arc::new(Semaphore::new(config.max_uploads.max(1))),
                config,
                tasks,
                manager: OnceLock::new(),
            }),
        }
    }

    /// Lets copies reach the files of running containers. To be called once; what comes later is
    /// not heard.
    pub fn reach(&self, manager: Manager) {
        let _first = self.inner.manager.set(manager);
    }

    /// Carries out one transfer. Progress goes to `watcher`; a slow watcher misses some of it.
    ///
    /// # Errors
    /// `Unimplemented` for a pair that makes no sense; else as the operation says.
    ///
    /// # Cancellation
    /// Safe: what was begun is finished by the next attempt or collected with the lease.
    pub async fn transfer(
        &self,
        scope: &Scope,
        source: Source,
        destination: Destination,
        watcher: Option<Stream>,
    ) -> Result<(), Error> {
        let tracker = match watcher {
            Some(_) => Tracker::watched(),
            None => Tracker::default(),
        };
        let work = self.run(scope, source, destination, &tracker);
        progress::watch(work, &tracker, watcher).await
    }

    async fn run(
        &self,
        scope: &Scope,
        source: Source,
        destination: Destination,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        // A copy makes nothing that a lease could hold.
        let (source, destination) = match (source, destination) {
            (Source::Path(from), Destination::Stream(to)) => {
                return self.copy_out(scope, &from, to).await;
            }
            (Source::Stream(from), Destination::Path(to)) => {
                return self.copy_in(scope, from, &to).await;
            }
            other => other,
        };
        let lease = self.lease(scope).await?;
        let scope = lease.scope();
        let done = match (source, destination) {
            (Source::Registry(from), Destination::Store(to)) => {
                self.pull_to_store(scope, from, to, tracker).await
            }
            (Source::Store(from), Destination::Registry(to)) => {
                self.push(scope, &from, to, tracker).await
            }
            (Source::Import(from), Destination::Store(to)) => {
                self.import(scope, from, &to, tracker).await
            }
            (Source::Store(from), Destination::Export(to)) => {
                self.export(scope, &from, to, tracker).await
            }
            (Source::Store(from), Destination::Store(to)) => {
                self.tag(scope, &from, &to, tracker).await
            }
            (Source::Import(from), Destination::Export(to)) => echo(from.stream, to.stream).await,
            (source, destination) => Err(Error::Pair {
                from: source.to_string(),
                to: destination.to_string(),
            }),
        };
        lease.release().await;
        done
    }

    /// The stream a client opened under `id`.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stream(&self, namespace: &Namespace, id: &str) -> Result<Stream, Error> {
        Ok(self.inner.streams.take(namespace, id)?)
    }
}

/// Sends back what comes, as it is: clients try their streams this way.
async fn echo(from: Stream, to: Stream) -> Result<(), Error> {
    let mut from = bytes::Reader::new(from);
    let mut to = bytes::Writer::new(to);
    while let Some(piece) = from.next().await? {
        to.write(&piece).await?;
    }
    Ok(())
}
