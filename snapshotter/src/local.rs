//! What all drivers with directories on this machine share: records first, directories second.
//!
//! Making: plan (read only) → directory → record. Removing: record → wait until that is durable →
//! directory. So a kill at any point leaves at most a directory without a record, which the next
//! open counts as garbage, and never a record without its directory.
//!
//! Committing: files on disk → record. Files are written by others through mounts, so "on disk" is a
//! `syncfs`, shared by all commits that wait for one; who commits many layers syncs once before
//! (see [`CommitOptions::synced`]).

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use lighter_kv::Db;

use crate::dirs::{Dirs, remove_tree};
use crate::flush::Flush;
use crate::storage::{Draft, Record, Records, check_active};
use crate::{CommitOptions, Error, Info, Kind, LabelUpdate, Labels, Mount, Snapshotter, Usage};

/// What differs between drivers. All methods block.
pub(crate) trait Driver: Send + Sync + fmt::Debug + 'static {
    /// Makes the directory of a new snapshot.
    fn create(&self, dirs: &Dirs, record: &Record) -> Result<(), Error>;

    /// Whether everything that [`Driver::create`] makes is there for an active snapshot or view.
    fn is_whole(&self, dirs: &Dirs, record: &Record) -> bool {
        dirs.path(record.id).is_dir()
    }

    /// The mounts of an active snapshot or view.
    fn mounts(&self, dirs: &Dirs, record: &Record) -> Result<Vec<Mount>, Error>;

    /// Measures an active snapshot.
    fn usage(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error>;

    /// Finishes the files of an active snapshot that is about to be committed, and measures them.
    /// The commit may still fail: nothing that the active snapshot needs may go.
    fn seal(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        self.usage(dirs, record)
    }

    /// The commit stands: what only the active snapshot needed may go.
    fn sealed(&self, _dirs: &Dirs, _record: &Record) {}

    /// Whether [`Driver::seal`] leaves everything on disk by itself; if not, a commit syncs the
    /// filesystem.
    fn seals_durably(&self) -> bool {
        false
    }

    /// What must happen before `path` (of a snapshot, or garbage) can be removed.
    fn release(&self, _path: &Path) {}

    /// Adds labels that are shown but not stored.
    fn decorate(&self, _dirs: &Dirs, _record: &Record, _labels: &mut Labels) {}

    /// See [`Snapshotter::capabilities`].
    fn capabilities(&self) -> Vec<String> {
        Vec::new()
    }

    /// See [`Snapshotter::layers_stand_alone`].
    fn layers_stand_alone(&self) -> bool {
        false
    }
}

/// When the directories of removed snapshots go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// With the snapshot.
    Sync,
    /// At the next cleanup.
    Async,
}

#[derive(Debug)]
struct Inner<D> {
    driver: D,
    records: Records,
    dirs: Dirs,
    removal: Removal,
    flush: Flush,
    /// Things that may go: left by a crash, or by removed snapshots. Numbers are not reused, so
    /// nothing that is being made can be among them.
    garbage: Mutex<Vec<PathBuf>>,
}

/// A [`Snapshotter`] made of a driver, records and directories.
#[derive(Debug)]
pub(crate) struct Local<D> {
    inner: Arc<Inner<D>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Driver> Local<D> {
    /// Opens records and directories and reconciles them.
    pub(crate) fn open(
        db: Db,
        prefix: &[u8],
        dirs: Dirs,
        driver: D,
        removal: Removal,
    ) -> Result<Self, Error> {
        let inner = Inner {
            driver,
            records: Records::open(db, prefix)?,
            dirs,
            removal,
            flush: Flush::default(),
            garbage: Mutex::default(),
        };
        inner.reconcile()?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Filesystem work goes to the blocking pool.
    async fn blocking<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Inner<D>) -> Result<T, Error> + Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::Precondition {
                    reason: "shutting down".to_owned(),
                }),
            },
        }
    }
}

impl<D: Driver> Inner<D> {
    /// Finds directories without records and records without directories.
    fn reconcile(&self) -> Result<(), Error> {
        let found = self.dirs.list()?;
        let records = self.records.all()?;
        let highest = records
            .iter()
            .map(|r| r.id)
            .chain(found.ids.iter().copied());
        self.dirs.number_above(highest.max().unwrap_or(0));
        let on_disk: HashSet<u64> = found.ids.iter().copied().collect();
        let known: HashSet<u64> = records.iter().map(|r| r.id).collect();
        let mut lost: Vec<&Record> = records
            .iter()
            .filter(|r| {
                let open = r.info.kind != Kind::Committed;
                !on_disk.contains(&r.id) || open && !self.driver.is_whole(&self.dirs, r)
            })
            .collect();
        // Children before their parents.
        lost.sort_by_key(|r| std::cmp::Reverse(r.parent_ids.len()));
        for record in lost {
            // What was written to an active snapshot and not synced is lost as on any disk; the snapshot itself was
            // acknowledged. It is made again, as it was at first. Only a parent that is lost as well prevents that.
            if record.info.kind != Kind::Committed {
                self.dirs.remove(record.id)?;
                match self.driver.create(&self.dirs, record) {
                    Ok(()) => {
                        tracing::warn!(key = %record.info.name, id = record.id,
                            "snapshot without directory made again, empty");
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(%error, key = %record.info.name, "a lost snapshot");
                        self.dirs.remove(record.id)?;
                    }
                }
            }
            match self.records.remove(&record.info.name) {
                Ok((_, ticket)) => {
                    drop(ticket);
                    tracing::warn!(key = %record.info.name, id = record.id,
                        "snapshot without directory forgotten");
                }
                Err(Error::HasChildren { .. }) => {
                    tracing::error!(key = %record.info.name, id = record.id,
                        "directory of a snapshot with children is missing; remove what uses it");
                }
                Err(error) => return Err(error),
            }
        }
        let mut garbage = found.strays;
        garbage.extend(
            found
                .ids
                .iter()
                .filter(|id| !known.contains(id))
                .map(|id| self.dirs.path(*id)),
        );
        if !garbage.is_empty() {
            tracing::info!(count = garbage.len(), root = %self.dirs.root().display(),
                "directories without snapshots found; cleanup removes them");
        }
        *lock(&self.garbage) = garbage;
        Ok(())
    }

    fn create(&self, draft: &Draft) -> Result<Vec<Mount>, Error> {
        let id = self.dirs.next_id();
        let record = self.records.plan(draft, id)?;
        let result = self
            .driver
            .create(&self.dirs, &record)
            .and_then(|()| self.driver.mounts(&self.dirs, &record))
            .and_then(|mounts| {
                // Whoever tells the client waits, most often for a record of his own that follows;
                // see `Snapshotter::durable`.
                self.records.insert(draft, &record)?.with_next();
                Ok(mounts)
            });
        if result.is_err()
            && let Err(error) = self.dirs.remove(id)
        {
            tracing::warn!(error = %lighter_proto::errdefs::render(&error), id,
                "directory of a failed snapshot stays until cleanup");
            lock(&self.garbage).push(self.dirs.path(id));
        }
        result
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.records.require(key)?;
        if record.info.kind == Kind::Committed {
            return Err(Error::NoMounts {
                key: key.to_owned(),
            });
        }
        self.driver.mounts(&self.dirs, &record)
    }

    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.records.require(key)?;
        match record.info.kind {
            Kind::Committed => Ok(record.usage),
            Kind::View => Ok(Usage::default()),
            Kind::Active => self.driver.usage(&self.dirs, &record),
        }
    }

    fn commit(&self, name: &str, key: &str, options: &CommitOptions) -> Result<(), Error> {
        let record = self.records.require(key)?;
        check_active(&record)?;
        if self.records.get(name)?.is_some() {
            return Err(Error::AlreadyExists {
                key: name.to_owned(),
            });
        }
        let usage = self.driver.seal(&self.dirs, &record)?;
        if !options.synced {
            self.sync()?;
        }
        drop(self.records.commit(name, key, options, usage)?);
        self.driver.sealed(&self.dirs, &record);
        Ok(())
    }

    /// Returns when the files written so far are on disk.
    fn sync(&self) -> Result<(), Error> {
        if self.driver.seals_durably() {
            return Ok(());
        }
        self.flush
            .run(|| self.dirs.sync())
            .map_err(Error::io("sync the filesystem of", self.dirs.root()))
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        let (record, ticket) = self.records.remove(key)?;
        let path = self.dirs.path(record.id);
        match self.removal {
            Removal::Async => {
                drop(ticket);
                lock(&self.garbage).push(path);
                Ok(())
            }
            Removal::Sync => {
                ticket.wait_blocking()?;
                self.driver.release(&path);
                self.dirs.remove(record.id).inspect_err(|_| {
                    lock(&self.garbage).push(path);
                })
            }
        }
    }

    fn cleanup(&self) -> Result<(), Error> {
        let garbage = std::mem::take(&mut *lock(&self.garbage));
        if garbage.is_empty() {
            return Ok(());
        }
        // The records must be gone for good before their directories are.
        self.records.durable().wait_blocking()?;
        let mut first_error = None;
        for path in garbage {
            self.driver.release(&path);
            if let Err(error) = remove_tree(&path) {
                lock(&self.garbage).push(path);
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn shown(&self, record: Record) -> Info {
        let mut labels = record.info.labels.clone();
        self.driver.decorate(&self.dirs, &record, &mut labels);
        Info {
            labels,
            ..record.info
        }
    }
}

#[async_trait]
impl<D: Driver> Snapshotter for Local<D> {
    async fn stat(&self, key: &str) -> Result<Info, Error> {
        Ok(self.inner.shown(self.inner.records.require(key)?))
    }

    async fn update(&self, key: &str, labels: LabelUpdate) -> Result<Info, Error> {
        Ok(self.inner.shown(self.inner.records.update(key, labels)?))
    }

    async fn usage(&self, key: &str) -> Result<Usage, Error> {
        let key = key.to_owned();
        self.blocking(move |inner| inner.usage(&key)).await
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        self.inner.mounts(key)
    }

    async fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let draft = draft(key, Kind::Active, parent, labels)?;
        self.blocking(move |inner| inner.create(&draft)).await
    }

    async fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let draft = draft(key, Kind::View, parent, labels)?;
        self.blocking(move |inner| inner.create(&draft)).await
    }

    async fn commit(&self, name: &str, key: &str, options: CommitOptions) -> Result<(), Error> {
        require_name(name)?;
        let (name, key) = (name.to_owned(), key.to_owned());
        self.blocking(move |inner| inner.commit(&name, &key, &options))
            .await
    }

    async fn remove(&self, key: &str) -> Result<(), Error> {
        if self.inner.removal == Removal::Async {
            return self.inner.remove(key);
        }
        let key = key.to_owned();
        self.blocking(move |inner| inner.remove(&key)).await
    }

    async fn walk(&self) -> Result<Vec<Info>, Error> {
        self.blocking(|inner| {
            let records = inner.records.all()?;
            Ok(records.into_iter().map(|r| inner.shown(r)).collect())
        })
        .await
    }

    async fn cleanup(&self) -> Result<(), Error> {
        self.blocking(Inner::cleanup).await
    }

    async fn durable(&self) -> Result<(), Error> {
        Ok(self.inner.records.durable().wait().await?)
    }

    async fn sync(&self) -> Result<(), Error> {
        self.blocking(Inner::sync).await
    }

    fn shares_records(&self) -> bool {
        true
    }

    fn capabilities(&self) -> Vec<String> {
        self.inner.driver.capabilities()
    }

    fn layers_stand_alone(&self) -> bool {
        self.inner.driver.layers_stand_alone()
    }

    fn root(&self) -> Option<PathBuf> {
        Some(self.inner.dirs.root().to_owned())
    }
}

fn require_name(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::Invalid {
            reason: "snapshot key must not be empty: invalid argument".to_owned(),
        });
    }
    Ok(())
}

fn draft(key: &str, kind: Kind, parent: Option<&str>, mut labels: Labels) -> Result<Draft, Error> {
    require_name(key)?;
    labels.retain(|_, value| !value.is_empty());
    Ok(Draft {
        key: key.to_owned(),
        kind,
        parent: parent.filter(|p| !p.is_empty()).map(str::to_owned),
        labels,
    })
}

/// Makes a tuple struct around a [`Local`] a [`Snapshotter`].
macro_rules! delegate {
    ($name:ident) => {
        #[async_trait::async_trait]
        impl crate::Snapshotter for $name {
            async fn stat(&self, key: &str) -> Result<crate::Info, crate::Error> {
                self.0.stat(key).await
            }
            async fn update(
                &self,
                key: &str,
                labels: crate::LabelUpdate,
            ) -> Result<crate::Info, crate::Error> {
                self.0.update(key, labels).await
            }
            async fn usage(&self, key: &str) -> Result<crate::Usage, crate::Error> {
                self.0.usage(key).await
            }
            async fn mounts(&self, key: &str) -> Result<Vec<crate::Mount>, crate::Error> {
                self.0.mounts(key).await
            }
            async fn prepare(
                &self,
                key: &str,
                parent: Option<&str>,
                labels: crate::Labels,
            ) -> Result<Vec<crate::Mount>, crate::Error> {
                self.0.prepare(key, parent, labels).await
            }
            async fn view(
                &self,
                key: &str,
                parent: Option<&str>,
                labels: crate::Labels,
            ) -> Result<Vec<crate::Mount>, crate::Error> {
                self.0.view(key, parent, labels).await
            }
            async fn commit(
                &self,
                name: &str,
                key: &str,
                options: crate::CommitOptions,
            ) -> Result<(), crate::Error> {
                self.0.commit(name, key, options).await
            }
            async fn remove(&self, key: &str) -> Result<(), crate::Error> {
                self.0.remove(key).await
            }
            async fn walk(&self) -> Result<Vec<crate::Info>, crate::Error> {
                self.0.walk().await
            }
            async fn cleanup(&self) -> Result<(), crate::Error> {
                self.0.cleanup().await
            }
            async fn durable(&self) -> Result<(), crate::Error> {
                self.0.durable().await
            }
            async fn sync(&self) -> Result<(), crate::Error> {
                self.0.sync().await
            }

            fn shares_records(&self) -> bool {
                self.0.shares_records()
            }
            fn capabilities(&self) -> Vec<String> {
                self.0.capabilities()
            }
            fn layers_stand_alone(&self) -> bool {
                self.0.layers_stand_alone()
            }
            fn root(&self) -> Option<std::path::PathBuf> {
                self.0.root()
            }
        }
    };
}
pub(crate) use delegate;
