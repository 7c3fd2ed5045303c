//! What managers and actors share: the books of all tasks, and what each of them works with.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::{Classify as _, ErrorKind};
use lighter_snapshotter::Mount;
use lighter_store::events::Exchange;
use lighter_store::metadata::Db;
use lighter_store::{Labels, Namespace, Scope, labels};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::bundle::Bundle;
use super::error::Error;
use super::groups::Groups;
use super::handle::Handle;
use super::launch::Launcher;
use super::manager::{Config, Timeouts};
use super::steps::{Step, Steps};
use crate::mounts::{Activate, Mounts};

/// What managers and actors share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) root: PathBuf,
    pub(super) state: PathBuf,
    pub(super) launcher: Launcher,
    pub(super) timeouts: Timeouts,
    pub(super) db: Db,
    mounts: Mounts,
    pub(super) events: Exchange,
    pub(super) stop: CancellationToken,
    pub(super) tracker: TaskTracker,
    pub(super) steps: Steps,
    slots: RwLock<Slots>,
    pub(super) groups: Groups,
    /// Rung by who waits for an id that is not free yet.
    pub(super) hurry: Notify,
}

type Slots = BTreeMap<Namespace, HashMap<String, Slot>>;

/// What is known under an id.
#[derive(Debug, Clone)]
pub(super) enum Slot {
    /// Being made; not to be seen yet.
    Creating,
    /// Found after a restart; the sender is dropped when it is settled.
    Recovering(watch::Receiver<()>),
    /// There.
    Live(Handle),
    /// Gone for everybody, but its shim and bundle are still being cleared away, or somebody works on the
    /// files of a container without a task ([`Rest`]); the sender is dropped when the id is free.
    Removing(watch::Receiver<()>),
}

/// While it lives, nobody makes a task of the container: two mounts of one writable layer spoil each
/// other.
#[derive(Debug)]
pub struct Rest {
    shared: Arc<Shared>,
    bundle: Bundle,
    // Dropped after the id is free.
    _freed: watch::Sender<()>,
}

impl Rest {
    /// Takes the id; who makes a task of it waits.
    pub(super) async fn of(shared: &Arc<Shared>, bundle: Bundle) -> Result<Self, Error> {
        let (freed, waiting) = watch::channel(());
        shared.occupy(&bundle, &Slot::Removing(waiting)).await?;
        Ok(Self {
            shared: Arc::clone(shared),
            bundle,
            _freed: freed,
        })
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.shared.forget(&self.bundle);
    }
}

impl Shared {
    /// Nothing on the books.
    pub(super) fn new(config: Config) -> Self {
        Self {
            root: config.root,
            state: config.state,
            launcher: config.launcher,
            timeouts: config.timeouts,
            events: config.db.events().clone(),
            db: config.db,
            mounts: config.mounts,
            stop: CancellationToken::new(),
            tracker: TaskTracker::new(),
            steps: Steps::default(),
            slots: RwLock::default(),
            groups: Groups::default(),
            hurry: Notify::new(),
        }
    }

    pub(super) fn step(&self, bundle: &Bundle, step: &'static str) -> Step {
        self.steps
            .enter(format!("{}/{}", bundle.namespace, bundle.id), step)
    }

    pub(super) fn publish(&self, envelope: Envelope) -> Result<(), Error> {
        Ok(self.events.forward(envelope)?)
    }

    pub(super) fn slots(&self) -> std::sync::RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> std::sync::RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the task off the books: from now on its shim's events go straight through.
    pub(super) fn forget(&self, bundle: &Bundle) {
        let mut slots = self.slots_mut();
        if let Some(tasks) = slots.get_mut(&bundle.namespace) {
            tasks.remove(&bundle.id);
            if tasks.is_empty() {
                slots.remove(&bundle.namespace);
            }
        }
    }

    pub(super) fn put(&self, bundle: &Bundle, slot: Slot) {
        self.slots_mut()
            .entry(bundle.namespace.clone())
            .or_default()
            .insert(bundle.id.clone(), slot);
    }

    /// Takes the id, or says that it is taken. What an earlier task of the id left is waited for.
    pub(super) async fn reserve(&self, bundle: &Bundle) -> Result<(), Error> {
        self.occupy(bundle, &Slot::Creating).await
    }

    async fn occupy(&self, bundle: &Bundle, slot: &Slot) -> Result<(), Error> {
        loop {
            let mut removed = {
                let mut slots = self.slots_mut();
                let tasks = slots.entry(bundle.namespace.clone()).or_default();
                match tasks.get(&bundle.id) {
                    None => {
                        tasks.insert(bundle.id.clone(), slot.clone());
                        return Ok(());
                    }
                    Some(Slot::Removing(removed)) => removed.clone(),
                    Some(_) => {
                        return Err(Error::Exists {
                            id: bundle.id.clone(),
                        });
                    }
                }
            };
            self.hurry.notify_waiters();
            let _freed = removed.changed().await;
        }
    }

    /// Whether a task on the books is served by the shim at `address`.
    pub(super) fn shares_shim(&self, address: &str) -> bool {
        let slots = self.slots();
        let mut tasks = slots.values().flat_map(HashMap::values);
        tasks.any(|slot| match slot {
            Slot::Live(handle) => handle.connection().bootstrap().address == address,
            Slot::Creating | Slot::Recovering(_) | Slot::Removing(_) => false,
        })
    }

    /// Whether anything is mounted for the bundle besides what its shim mounts.
    pub(super) fn has_mounts(&self, bundle: &Bundle) -> bool {
        self.mounts.info(&bundle.namespace, &bundle.id).is_ok()
    }

    /// Removes a bundle, and what was mounted for it, on a blocking thread.
    pub(super) async fn delete_bundle(&self, bundle: &Bundle) -> Result<(), Error> {
        let (bundle, mounts) = (bundle.clone(), self.mounts.clone());
        tokio::task::spawn_blocking(move || {
            bundle.delete()?;
            match mounts.deactivate(&bundle.namespace, &bundle.id) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::Mounts(error)),
                _ => Ok(()),
            }
        })
        .await
        .map_err(|_| Error::Stopping)?
    }

    /// The mounts of a root filesystem as a shim can do them.
    pub(super) async fn activate(
        &self,
        bundle: &Bundle,
        rootfs: Vec<Mount>,
    ) -> Result<Vec<Mount>, Error> {
        if !crate::mounts::needed(&rootfs) {
            return Ok(rootfs);
        }
        let (bundle, mounts) = (bundle.clone(), self.mounts.clone());
        tokio::task::spawn_blocking(move || {
            let labels =
                Labels::from([(format!("{}container", labels::GC_BREF), bundle.id.clone())]);
            // Kept by the container, not by the lease of whoever starts it.
            let scope = Scope::new(bundle.namespace.clone());
            let wanted = Activate {
                name: &bundle.id,
                mounts: &rootfs,
                labels: &labels,
                temporary: false,
            };
            match mounts.activate(&scope, wanted) {
                Ok(activation) => Ok(activation.system),
                Err(error) if error.kind() == ErrorKind::Unimplemented => Ok(rootfs),
                Err(error) => Err(Error::Mounts(error)),
            }
        })
        .await
        .map_err(|_| Error::Stopping)?
    }

    pub(super) fn bundle(&self, kind: &str, namespace: &Namespace, id: &str) -> Bundle {
        Bundle::at(&self.state, &self.root, kind, namespace, id)
    }
}
