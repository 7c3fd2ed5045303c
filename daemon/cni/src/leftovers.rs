//! What crashes leave: containers that only the journal knows, and addresses of nobody.

use std::collections::HashSet;
use std::path::PathBuf;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::attach::TEARDOWN_TIMEOUT;
use crate::conf::Version;
use crate::error::Error;
use crate::networks::{Cni, block};
use crate::options::Options;

impl Cni {
    /// Detaches what the journal knows and `valid` does not, with a fresh deadline for each.
    /// Returns what became of each container.
    pub async fn recover(&self, valid: &HashSet<String>) -> Vec<(String, Result<(), Error>)> {
        let mut outcomes = Vec::new();
        for id in self.journaled_except(valid).await {
            let result = self.detach_leftover(&id).await;
            outcomes.push((id, result));
        }
        outcomes
    }

    /// Containers in the journal that are not in `valid`.
    pub async fn journaled_except(&self, valid: &HashSet<String>) -> Vec<String> {
        let journal = self.journal.clone();
        let ids = block(move || journal.ids()).await;
        ids.into_iter().filter(|id| !valid.contains(id)).collect()
    }

    /// Detaches a container that only the journal knows.
    ///
    /// # Errors
    /// As [`Cni::teardown`].
    pub async fn detach_leftover(&self, id: &str) -> Result<(), Error> {
        let planned = self.journal.planned(id);
        let netns = planned.first().map(|entry| PathBuf::from(&entry.netns));
        self.teardown(id, netns.as_deref(), &Options::default())
            .await
    }

    /// Detaches leftovers as [`Cni::recover`] does, then tells plugins that can collect garbage
    /// (1.1) which attachments are valid: those of `valid`, and all that other runtimes made.
    ///
    /// # Errors
    /// The first failure; every network is tried.
    pub async fn gc(&self, valid: &HashSet<String>) -> Result<(), Error> {
        let mut first = Ok(());
        for (_, result) in self.recover(valid).await {
            first = first.and(result);
        }
        let cache = self.cache.clone();
        let entries = block(move || cache.all()).await;
        let deadline = Instant::now() + TEARDOWN_TIMEOUT;
        for network in self.networks()?.iter() {
            if network.version < Version::STATUS || network.disable_gc {
                continue;
            }
            let kept = entries.iter().filter(|e| e.network_name == network.name);
            let kept = kept
                .filter(|e| valid.contains(&e.container_id) || !self.journal.has(&e.container_id));
            let kept: Value = kept
                .map(|e| json!({"containerID": e.container_id, "ifname": e.if_name}))
                .collect();
            let call = self.plain("GC", deadline);
            let extra = [("cni.dev/valid-attachments", kept)];
            let result = network.each(&call, "gc", &Map::new(), None, &extra).await;
            first = first.and(result);
        }
        first
    }
}
