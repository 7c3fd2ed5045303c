//! The networks of one configuration directory: loaded, watched, asked whether they are ready.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::cache::Cache;
use crate::conf::{self, Network, Version};
use crate::config::Config;
use crate::error::Error;
use crate::exec::{self, Invocation};
use crate::journal::Journal;
use crate::metrics::{Metrics, Operation};
use crate::{template, watch};

/// Time for the `STATUS` of all plugins; the kubelet asks every few seconds.
pub(super) const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// What was loaded last: the networks, or why there are none.
type Loaded = Result<Arc<Vec<Network>>, Arc<Error>>;

/// The networks of one configuration directory.
#[derive(Debug)]
pub struct Cni {
    pub(super) config: Config,
    pub(super) cache: Cache,
    pub(super) journal: Journal,
    loaded: RwLock<Loaded>,
    /// Containers whose teardown is known to be complete, oldest first.
    pub(super) clean: Mutex<VecDeque<String>>,
    pub(super) metrics: Metrics,
}

impl Cni {
    /// Loads the configuration. A configuration that cannot be loaded is no error here: it may
    /// come later, and [`Cni::load_status`] says what is wrong meanwhile.
    pub async fn new(config: Config) -> Self {
        let cni = Self {
            cache: Cache::new(&config.cache_dir),
            journal: Journal::new(&config.journal_dir),
            loaded: RwLock::new(Err(Arc::new(Error::NotInitialized))),
            clean: Mutex::default(),
            metrics: Metrics::default(),
            config,
        };
        cni.reload().await;
        cni
    }

    /// Loads the configuration again.
    pub async fn reload(&self) {
        let (dir, max) = (self.config.conf_dir.clone(), self.config.max_conf_num);
        let loaded = block(move || conf::load(&dir, max)).await;
        let fresh = match loaded {
            Ok(networks) => Ok(Arc::new(networks)),
            Err(error) => Err(Arc::new(error)),
        };
        let mut current = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        match (&*current, &fresh) {
            (Ok(old), Ok(new)) if old == new => {}
            (_, Ok(networks)) => {
                let names: Vec<&str> = networks.iter().map(|n| n.name.as_str()).collect();
                tracing::info!(networks = ?names, "network configuration loaded");
            }
            (_, Err(error)) => tracing::warn!(%error, "network configuration not loaded"),
        }
        *current = fresh;
    }

    /// Reloads after every change of the configuration directory, until dropped.
    ///
    /// # Cancellation
    /// Safe at any point; the owner runs this in a task of its own.
    pub async fn watch(&self) {
        watch::run(self, &self.config.conf_dir).await;
    }

    /// Why the last load failed, if it did.
    #[must_use]
    pub fn load_status(&self) -> Option<Arc<Error>> {
        self.loaded().err()
    }

    /// The loaded networks.
    ///
    /// # Errors
    /// [`Error::NotInitialized`] when there are none.
    pub fn networks(&self) -> Result<Arc<Vec<Network>>, Error> {
        self.loaded().map_err(|_| Error::NotInitialized)
    }

    /// Settings, as given.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Counts and durations of the operations so far.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn loaded(&self) -> Loaded {
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        loaded.clone()
    }

    /// Whether pods can be attached: a configuration is loaded, and plugins that can say so (1.1)
    /// are ready.
    ///
    /// # Errors
    /// [`Error::NotInitialized`], or the plugin that is not ready.
    pub async fn status(&self) -> Result<(), Error> {
        let timer = self.metrics.start(Operation::Status);
        let result = self.status_all().await;
        timer.done(result.is_ok());
        result
    }

    async fn status_all(&self) -> Result<(), Error> {
        let deadline = Instant::now() + STATUS_TIMEOUT;
        for network in self.networks()?.iter() {
            if network.version >= Version::STATUS {
                let call = self.plain("STATUS", deadline);
                network
                    .each(&call, "status", &Map::new(), None, &[])
                    .await?;
            }
        }
        Ok(())
    }

    /// The versions that the plugin `kind` supports.
    ///
    /// # Errors
    /// When it cannot be run or answers no list.
    pub async fn plugin_versions(&self, kind: &str) -> Result<Vec<String>, Error> {
        let failed = |failure| Error::Plugin {
            kind: kind.to_owned(),
            name: None,
            verb: "version",
            failure: Box::new(failure),
        };
        let call = self.plain("VERSION", Instant::now() + STATUS_TIMEOUT);
        let stdin = br#"{"cniVersion":"1.1.0"}"#;
        let output = exec::run(kind, stdin, &call).await.map_err(failed)?;
        let answer: Option<Value> = serde_json::from_slice(&output).ok();
        let versions = answer
            .as_ref()
            .and_then(|a| a.get("supportedVersions")?.as_array());
        let versions = versions.ok_or_else(|| {
            failed(exec::garbage(
                "no supportedVersions".to_owned(),
                &output,
                String::new(),
            ))
        })?;
        let texts = versions.iter().filter_map(Value::as_str);
        Ok(texts.map(str::to_owned).collect())
    }

    /// Writes `10-containerd-net.conflist` from the configured template and the pods' CIDRs, when
    /// no usable configuration exists. Returns whether a file was written.
    ///
    /// # Errors
    /// A template that cannot be read or rendered, a CIDR that is none, a directory that cannot be
    /// written.
    pub async fn write_from_template(&self, pod_cidrs: &str) -> Result<bool, Error> {
        let Some(template) = self.config.conf_template.clone() else {
            return Ok(false);
        };
        if pod_cidrs.trim().is_empty() || self.status().await.is_ok() {
            return Ok(false);
        }
        self.reload().await;
        if self.load_status().is_none() {
            return Ok(false);
        }
        let (dir, cidrs) = (self.config.conf_dir.clone(), pod_cidrs.to_owned());
        block(move || template::write(&template, &cidrs, &dir)).await?;
        self.reload().await;
        Ok(true)
    }

    /// A call that is about no container.
    pub(super) fn plain(&self, command: &'static str, deadline: Instant) -> Invocation<'_> {
        Invocation {
            command,
            container_id: "",
            netns: "",
            ifname: "",
            args: "",
            bin_dirs: &self.config.bin_dirs,
            deadline,
        }
    }
}

/// Runs file system work where it may block.
pub(super) async fn block<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
