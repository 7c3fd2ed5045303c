//! Snapshots as a namespace sees them: client keys over a driver's own.

use std::sync::Arc;

use lighter_snapshotter::{CommitOptions, Info, LabelUpdate, Mount, Snapshotter, Usage};

use super::db::Inner;
use crate::filter::Filter;
use crate::{Error, Labels, Scope};

/// Snapshots of one snapshotter, in all namespaces.
#[derive(Debug, Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
    name: Arc<str>,
    driver: Arc<dyn Snapshotter>,
}

impl Snapshots {
    pub(crate) fn over(inner: Arc<Inner>, name: &str) -> Result<Self, Error> {
        let invalid = |reason: String| Err(Error::Invalid { reason });
        if name.is_empty() {
            return invalid("snapshotter argument missing".to_owned());
        }
        let Some(driver) = inner.snapshotters.get(name).cloned() else {
            return invalid(format!("snapshotter not loaded: {name}"));
        };
        Ok(Self {
            inner,
            name: name.into(),
            driver,
        })
    }
    /// The record of `key`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn stat(&self, _scope: &Scope, _key: &str) -> Result<Info, Error> {
        todo!()
    }
    /// Changes labels.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        _scope: &Scope,
        _key: &str,
        _labels: LabelUpdate,
    ) -> Result<Info, Error> {
        todo!()
    }
    /// Disk use.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn usage(&self, _scope: &Scope, _key: &str) -> Result<Usage, Error> {
        todo!()
    }
    /// Mounts of an active snapshot or view.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`.
    pub async fn mounts(&self, _scope: &Scope, _key: &str) -> Result<Vec<Mount>, Error> {
        todo!()
    }
    /// Makes a writable snapshot. Event `/snapshot/prepare`.
    ///
    /// # Errors
    /// `AlreadyExists` (also for the `snapshot.ref` target), `NotFound`, `InvalidArgument`.
    pub async fn prepare(
        &self,
        _scope: &Scope,
        _key: &str,
        _parent: Option<&str>,
        _labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        todo!()
    }
    /// Makes a read-only snapshot.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    pub async fn view(
        &self,
        _scope: &Scope,
        _key: &str,
        _parent: Option<&str>,
        _labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        todo!()
    }
    /// Commits `key` as `name`. Event `/snapshot/commit`.
    ///
    /// # Errors
    /// `AlreadyExists`, `NotFound`, `FailedPrecondition`.
    pub async fn commit(
        &self,
        _scope: &Scope,
        _name: &str,
        _key: &str,
        _options: CommitOptions,
    ) -> Result<(), Error> {
        todo!()
    }
    /// Removes a snapshot without children. Event `/snapshot/remove`.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`.
    pub async fn remove(&self, _scope: &Scope, _key: &str) -> Result<(), Error> {
        todo!()
    }
    /// Matching records in byte order of key.
    ///
    /// # Errors
    /// When the database or the driver fails.
    pub async fn list(&self, _scope: &Scope, _filter: &Filter) -> Result<Vec<Info>, Error> {
        todo!()
    }
    /// Removes what no record owns.
    ///
    /// # Errors
    /// `Unimplemented` where the driver has nothing to clean.
    pub async fn cleanup(&self) -> Result<(), Error> {
        todo!()
    }
}
