//! What CRI knows in memory: pods, containers, and the names they hold.
//!
//! Lists and status come from here without touching disk, shim or database. The life-cycle calls of
//! a pod or container take its `busy` [turn](crate::turn::Turn) one after the other; reading takes only the small
//! state lock.
//!
//! ```text
//! container: CREATED ─start─► RUNNING ─exit─► EXITED       (start fails: CREATED ─► EXITED)
//! pod:       NOTREADY ─run─► READY ─stop, exit─► NOTREADY
//! ```

mod container;
mod pod;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use lighter_proto::errdefs::ErrorKind;

pub use self::container::{Container, ContainerStatus, NewContainer};
pub use self::pod::{Pod, PodState};
use crate::error::{Error, Result};

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Objects by id.
#[derive(Debug)]
pub struct Table<T> {
    /// What they are called in errors.
    what: &'static str,
    objects: RwLock<HashMap<String, Arc<T>>>,
}

/// What a [`Table`] holds.
pub trait Object {
    /// Its id.
    fn id(&self) -> &str;
}

impl Object for Pod {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Object for Container {
    fn id(&self) -> &str {
        &self.id
    }
}

impl<T: Object> Table<T> {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            objects: RwLock::default(),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<String, Arc<T>>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Arc<T>>> {
        self.objects.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an object.
    pub fn add(&self, object: Arc<T>) {
        self.write().insert(object.id().to_owned(), object);
    }

    /// Forgets an object.
    pub fn remove(&self, id: &str) {
        self.write().remove(id);
    }

    /// The object of an id or unambiguous prefix.
    ///
    /// # Errors
    /// For an empty or ambiguous prefix.
    pub fn find(&self, id: &str) -> Result<Option<Arc<T>>> {
        unique(&self.read(), id)
    }

    /// [`Table::find`], which must exist.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Arc<T>> {
        self.find(id)?.ok_or_else(|| {
            let what = self.what;
            Error::not_found(format!(
                "an error occurred when try to find {what} {id:?}: not found"
            ))
        })
    }

    /// All for which `keep` holds.
    pub fn select(&self, keep: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let objects = self.read();
        objects.values().filter(|o| keep(o)).cloned().collect()
    }
}

/// All pods and containers.
#[derive(Debug)]
pub struct Store {
    /// Pods, those that are being made included.
    pub pods: Table<Pod>,
    /// Containers.
    pub containers: Table<Container>,
    names: Mutex<HashMap<String, String>>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            pods: Table::new("sandbox"),
            containers: Table::new("container"),
            names: Mutex::default(),
        }
    }
}

/// A name held for an object that is being made; given back when dropped unless kept.
#[derive(Debug)]
pub struct Reservation {
    store: Arc<Store>,
    name: String,
    kept: bool,
}

impl Reservation {
    /// The object stands: its name stays until [`Store::release`].
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            self.store.release(&self.name);
        }
    }
}

/// The one whose id is `prefix` or starts with it, if it is the only one.
fn unique<T>(map: &HashMap<String, Arc<T>>, prefix: &str) -> Result<Option<Arc<T>>> {
    if prefix.is_empty() {
        return Err(Error::unknown("prefix can't be empty"));
    }
    if let Some(found) = map.get(prefix) {
        return Ok(Some(Arc::clone(found)));
    }
    let mut found = map.iter().filter(|(id, _)| id.starts_with(prefix));
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some((_, one)), None) => Ok(Some(Arc::clone(one))),
        (Some(_), Some(_)) => Err(Error::unknown(format!(
            "multiple IDs found with provided prefix: {prefix}"
        ))),
    }
}

impl Store {
    /// Holds `name` for `id`. `kind` is `sandbox` or `container`.
    ///
    /// # Errors
    /// `FailedPrecondition` when another id holds it.
    pub fn reserve(self: &Arc<Self>, kind: &str, name: &str, id: &str) -> Result<Reservation> {
        let mut names = locked(&self.names);
        if let Some(holder) = names.get(name)
            && holder != id
        {
            let hint = if kind == "container" {
                "; check if another CreateContainer request is in progress"
            } else {
                ""
            };
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "failed to reserve {kind} name {name:?}{hint}: name {name:?} is reserved for {holder:?}"
                ),
            ));
        }
        names.insert(name.to_owned(), id.to_owned());
        Ok(Reservation {
            store: Arc::clone(self),
            name: name.to_owned(),
            kept: false,
        })
    }

    /// Id that holds `name`.
    #[must_use]
    pub fn holder(&self, name: &str) -> Option<String> {
        locked(&self.names).get(name).cloned()
    }

    /// Gives a name back.
    pub fn release(&self, name: &str) {
        locked(&self.names).remove(name);
    }

    /// Holds a name that an object of an earlier run has; whoever holds it already keeps it.
    pub fn adopt(&self, name: &str, id: &str) {
        locked(&self.names)
            .entry(name.to_owned())
            .or_insert_with(|| id.to_owned());
    }

    /// All pods that lists show.
    #[must_use]
    pub fn visible_pods(&self) -> Vec<Arc<Pod>> {
        self.pods.select(|pod| pod.state.borrow().visible)
    }

    /// All containers.
    #[must_use]
    pub fn all_containers(&self) -> Vec<Arc<Container>> {
        self.containers.select(|_| true)
    }

    /// Containers of one pod.
    #[must_use]
    pub fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.containers.select(|c| c.pod_id == pod_id)
    }
}

#[cfg(test)]
mod tests {
    use lighter_proto::runtime::v1::PodSandboxConfig;

    use super::*;

    #[test]
    fn a_dropped_reservation_gives_the_name_back() {
        let store = Arc::new(Store::default());
        let held = store.reserve("container", "n", "1").unwrap();
        let refused = store
            .reserve("container", "n", "2")
            .unwrap_err()
            .to_string();
        assert!(refused.contains("reserved for \"1\""), "{refused}");
        drop(held);
        store.reserve("container", "n", "2").unwrap().keep();
        assert_eq!(store.holder("n").as_deref(), Some("2"));
    }

    #[test]
    fn a_prefix_must_be_unambiguous() {
        let store = Store::default();
        for id in ["ab1", "ab2"] {
            let pod = Pod::new(
                id.into(),
                String::new(),
                PodSandboxConfig::default(),
                String::new(),
                None,
            );
            store.pods.add(Arc::new(pod));
        }
        assert!(store.pods.find("ab").is_err() && store.pods.find("").is_err());
        assert_eq!(store.pods.find("ab2").unwrap().unwrap().id, "ab2");
        assert!(store.pods.find("x").unwrap().is_none());
    }
}
