//! What a transfer is doing, for whoever watches: states of blobs, collected and handed out now and
//! then, so that work never waits for its audience.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lighter_store::Digest;

use super::Descriptor;
use super::children::ingest_ref;

/// Free-standing messages kept for a watcher who does not look.
const MAX_MESSAGES: usize = 1024;

/// One line of progress, with upstream's words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// `waiting`, `downloading`, `complete`, … or a sentence.
    pub event: String,
    /// Ingest ref of a blob, or an image's name.
    pub name: String,
    /// Names of what it belongs to.
    pub parents: Vec<String>,
    /// Bytes done.
    pub progress_bytes: u64,
    /// Bytes in all; 0 when unknown.
    pub total_bytes: u64,
    /// The blob.
    pub descriptor: Option<Descriptor>,
}

#[derive(Debug)]
struct Job {
    event: Event,
    changed: bool,
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Event>,
    /// In the order they were first seen.
    order: Vec<Digest>,
    jobs: BTreeMap<Digest, Job>,
}

/// Collects progress; clones share it. The default one throws everything away.
#[derive(Clone, Default)]
pub struct Tracker(Option<Arc<Mutex<State>>>);

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("watched", &self.0.is_some())
            .finish()
    }
}

impl Tracker {
    /// A tracker that somebody drains.
    #[must_use]
    pub fn watched() -> Self {
        Self(Some(Arc::default()))
    }

    fn state(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.0.as_ref()?;
        Some(state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A sentence.
    pub fn say(&self, sentence: impl Into<String>) {
        self.message(Event {
            event: sentence.into(),
            ..Event::default()
        });
    }

    /// An event that stands for itself.
    pub fn message(&self, event: Event) {
        let Some(mut state) = self.state() else {
            return;
        };
        if state.messages.len() < MAX_MESSAGES {
            state.messages.push_back(event);
        }
    }

    /// A blob comes into view, below `parent` (a name).
    pub fn add(&self, descriptor: &Descriptor, parent: &str) {
        let Some(mut state) = self.state() else {
            return;
        };
        if let Some(job) = state.jobs.get_mut(&descriptor.digest) {
            if !parent.is_empty() && !job.event.parents.iter().any(|p| p == parent) {
                job.event.parents.push(parent.to_owned());
                job.changed = true;
            }
            return;
        }
        state.order.push(descriptor.digest.clone());
        let event = Event {
            event: "waiting".to_owned(),
            name: ingest_ref(descriptor),
            parents: [parent]
                .into_iter()
                .filter(|p| !p.is_empty())
                .map(str::to_owned)
                .collect(),
            progress_bytes: 0,
            total_bytes: descriptor.size_bytes,
            descriptor: Some(descriptor.clone()),
        };
        let job = Job {
            event,
            changed: true,
        };
        state.jobs.insert(descriptor.digest.clone(), job);
    }

    /// The blob is now in `state`, with so many bytes done.
    pub fn set(&self, descriptor: &Descriptor, event: &str, progress_bytes: u64) {
        let Some(mut state) = self.state() else {
            return;
        };
        if let Some(job) = state.jobs.get_mut(&descriptor.digest) {
            if job.event.event != event {
                event.clone_into(&mut job.event.event);
                job.changed = true;
            }
            job.changed |= job.event.progress_bytes != progress_bytes;
            job.event.progress_bytes = progress_bytes;
        }
    }

    /// The blob is now in `state`, with all bytes done.
    pub fn done(&self, descriptor: &Descriptor, event: &str) {
        self.set(descriptor, event, descriptor.size_bytes);
    }

    /// What changed since the last call, sentences first.
    #[must_use]
    pub fn drain(&self) -> Vec<Event> {
        let Some(mut state) = self.state() else {
            return Vec::new();
        };
        let mut events: Vec<Event> = state.messages.drain(..).collect();
        let State { order, jobs, .. } = &mut *state;
        for digest in order.iter() {
            let job = jobs
                .get_mut(digest)
                .expect("every digest in order has a job");
            if std::mem::take(&mut job.changed) {
                events.push(job.event.clone());
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_come_out_and_each_once() {
        let tracker = Tracker::watched();
        let blob = Descriptor::of("application/vnd.oci.image.layer.v1.tar", b"abc");
        tracker.say("Pulling");
        tracker.add(&blob, "image");
        tracker.set(&blob, "downloading", 1);
        tracker.set(&blob, "downloading", 2);
        let events = tracker.drain();
        assert_eq!(events.len(), 2);
        assert_eq!(events[1].progress_bytes, 2);
        assert_eq!(events[1].parents, ["image"]);
        assert_eq!(events[1].name, format!("layer-{}", blob.digest));
        assert!(tracker.drain().is_empty());
        tracker.done(&blob, "complete");
        assert_eq!(tracker.drain()[0].progress_bytes, 3);
    }
}
