//! What is being done, on what, and since when: for people who ask why something hangs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Operations under way; clones share the list.
#[derive(Debug, Clone, Default)]
pub struct Steps {
    list: Arc<Mutex<List>>,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    steps: BTreeMap<u64, (String, &'static str, Instant)>,
}

/// One operation under way; leaves the list when dropped.
#[derive(Debug)]
pub struct Step {
    steps: Steps,
    id: u64,
}

impl Steps {
    /// Lists `step` on `object` until the guard is dropped.
    #[must_use]
    pub fn enter(&self, object: String, step: &'static str) -> Step {
        let mut list = self.lock();
        let id = list.next;
        list.next += 1;
        list.steps.insert(id, (object, step, Instant::now()));
        drop(list);
        Step {
            steps: self.clone(),
            id,
        }
    }

    /// Object, step and age of everything under way, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<(String, &'static str, Duration)> {
        self.lock()
            .steps
            .values()
            .map(|(object, step, since)| (object.clone(), *step, since.elapsed()))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Step {
    /// The operation has come to `step`.
    pub fn at(&self, step: &'static str) {
        if let Some(entry) = self.steps.lock().steps.get_mut(&self.id) {
            entry.1 = step;
            entry.2 = Instant::now();
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.steps.lock().steps.remove(&self.id);
    }
}
