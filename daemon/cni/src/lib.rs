//! Pod networks by CNI plugins: loads the operator's configuration, attaches, detaches, checks.
//!
//! Spec: CNI 1.1 (versions 0.1.0 to 1.1.0 are spoken). Nothing here knows Kubernetes: what pods
//! need is passed in [`Options`], so the command line's `--cni` goes the same way.
//!
//! ```text
//! setup:    journal ── lo up ∥ ADD a ─ ADD b … ── cache ── result     (failure: teardown, error)
//! teardown: cache ∪ journal ∪ configuration ── DEL b ─ DEL a … ── forget cache, then journal
//! ```
//!
//! The journal names every container that may hold an address, from before its first `ADD` until
//! after its last `DEL`; [`Cni::recover`] empties it of those that nobody knows any more.

mod cache;
mod chain;
mod conf;
mod error;
mod exec;
mod journal;
mod metrics;
pub mod netns;
mod options;
mod result;
mod sys;
mod template;
mod watch;

use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

pub use self::cache::DEFAULT_DIR as DEFAULT_CACHE_DIR;
pub use self::conf::{Network, Plugin, Version};
pub use self::error::{Error, Failure};
pub use self::metrics::{Metrics, Operation, OperationStats};
pub use self::options::{Bandwidth, Capabilities, DnsConfig, IpRange, Options, PortMapping};
pub use self::result::{Dns, Interface, IpConfig, IpPreference, NetworkResult, Route};
pub use self::sys::NamespaceHolder;
pub use self::template::{BridgeConfig, bridge_conflist};

use self::cache::{Cache, Entry};
use self::exec::Invocation;
use self::journal::Journal;

/// Longest time for undoing one container's networks; counted anew after a setup that failed.
const TEARDOWN_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for the `STATUS` of all plugins; the kubelet asks every few seconds.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Containers remembered as having nothing left, so that repeated teardowns run no plugin.
const MAX_REMEMBERED: usize = 4096;

/// Where things are and how networks are attached.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of network configurations.
    pub conf_dir: PathBuf,
    /// Directories of plugin binaries, first match wins.
    pub bin_dirs: Vec<PathBuf>,
    /// Networks loaded, in the order of file names; 0 for all.
    pub max_conf_num: usize,
    /// Attach one network after the other instead of all at once.
    pub setup_serially: bool,
    /// Template of the configuration that [`Cni::write_from_template`] writes.
    pub conf_template: Option<PathBuf>,
    /// Directory of libcni's result cache, shared with other runtimes.
    pub cache_dir: PathBuf,
    /// Directory of our own journal. It must last as long as the plugins' leases do.
    pub journal_dir: PathBuf,
}

impl Config {
    /// The usual directories, with the journal below `root`.
    #[must_use]
    pub fn with_root(root: &Path) -> Self {
        Self {
            conf_dir: PathBuf::from("/etc/cni/net.d"),
            bin_dirs: vec![PathBuf::from("/opt/cni/bin")],
            max_conf_num: 1,
            setup_serially: false,
            conf_template: None,
            cache_dir: PathBuf::from(DEFAULT_CACHE_DIR),
            journal_dir: root.join("cni"),
        }
    }
}

/// What was loaded last: the networks, or why there are none.
type Loaded = Result<Arc<Vec<Network>>, Arc<Error>>;

/// The networks of one configuration directory.
#[derive(Debug)]
pub struct Cni {
    config: Config,
    cache: Cache,
    journal: Journal,
    loaded: RwLock<Loaded>,
    /// Containers whose teardown is known to be complete, oldest first.
    clean: Mutex<VecDeque<String>>,
    metrics: Metrics,
}

/// One network of one container, as it was or is to be attached.
struct Attachment {
    network: Network,
    entry: Entry,
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

    /// Attaches container `id`, whose network namespace is at `netns`, to every loaded network.
    ///
    /// # Errors
    /// Whatever failed first; what had been attached is detached again, or stays in the journal.
    ///
    /// # Cancellation
    /// Running plugins are killed and the container stays in the journal: call
    /// [`Cni::teardown`].
    pub async fn setup(
        &self,
        id: &str,
        netns: &Path,
        options: &Options,
    ) -> Result<NetworkResult, Error> {
        let timer = self.metrics.start(Operation::Setup);
        let result = self.setup_all(id, netns, options).await;
        let undo = Options {
            timeout: TEARDOWN_TIMEOUT,
            ..options.clone()
        };
        if result.is_err()
            && self.journal.has(id)
            && let Err(error) = self.teardown_all(id, Some(netns), &undo).await
        {
            tracing::warn!(container_id = id, %error, "undo of a failed network setup");
        }
        timer.done(result.is_ok());
        result
    }

    async fn setup_all(
        &self,
        id: &str,
        netns: &Path,
        options: &Options,
    ) -> Result<NetworkResult, Error> {
        check_name("container id", id)?;
        let networks = self.networks()?;
        let attachments = plan(&networks, id, &netns.to_string_lossy(), options)?;
        let entries: Vec<Entry> = attachments.iter().map(|a| a.entry.clone()).collect();
        let (journal, owner) = (self.journal.clone(), id.to_owned());
        self.forget_clean(id);
        block(move || journal.begin(&owner, &entries)).await?;
        let deadline = Instant::now() + options.timeout;
        let adds = async {
            if self.config.setup_serially {
                let mut results = Vec::new();
                for attachment in &attachments {
                    let result = self.attach(attachment, deadline).await;
                    let failed = result.is_err();
                    results.push(result);
                    if failed {
                        break;
                    }
                }
                results
            } else {
                let mut adds = Vec::with_capacity(attachments.len());
                for attachment in &attachments {
                    adds.push(self.attach(attachment, deadline));
                }
                join_all(adds).await
            }
        };
        let (raised, results) = tokio::join!(netns::raise_loopback(netns), adds);
        raised?;
        let mut joined = NetworkResult::default();
        joined.interfaces.insert("lo".to_owned(), loopback(netns));
        for (result, attachment) in results.into_iter().zip(&attachments) {
            let ifname = &attachment.entry.if_name;
            let answer = result::Answer::parse(&result?).map_err(|reason| Error::Unsupported {
                network: attachment.network.name.clone(),
                reason,
            })?;
            joined.add(answer, ifname);
        }
        let first = format!("{}0", options.interface_prefix);
        if joined.addresses(&first, IpPreference::Cni).is_none() {
            return Err(Error::NoAddress { id: id.to_owned() });
        }
        Ok(joined)
    }

    async fn attach(
        &self,
        attachment: &Attachment,
        deadline: Instant,
    ) -> Result<Map<String, Value>, Error> {
        let entry = &attachment.entry;
        let args = args_text(entry);
        let capabilities = entry.capability_args.clone().unwrap_or_default();
        let call = self.invocation("ADD", entry, &args, &entry.netns, deadline);
        let keep = |result: Map<String, Value>| {
            let mut entry = entry.clone();
            entry.result = Some(result);
            let cache = self.cache.clone();
            block(move || cache.store(&entry))
        };
        attachment.network.add(&call, &capabilities, keep).await
    }

    /// Detaches container `id` from every network it is known to be in, and from the loaded ones.
    /// A container with nothing left is fine, and so is a namespace that is gone.
    ///
    /// # Errors
    /// The first failure; the container stays in the journal and the call can be repeated.
    pub async fn teardown(
        &self,
        id: &str,
        netns: Option<&Path>,
        options: &Options,
    ) -> Result<(), Error> {
        let timer = self.metrics.start(Operation::Teardown);
        let result = self.teardown_all(id, netns, options).await;
        timer.done(result.is_ok());
        result
    }

    async fn teardown_all(
        &self,
        id: &str,
        netns: Option<&Path>,
        options: &Options,
    ) -> Result<(), Error> {
        check_name("container id", id)?;
        if self.is_clean(id) {
            return Ok(());
        }
        let attachments = self.attachments(id, options).await?;
        let netns = netns.filter(|path| !netns::is_closed(path));
        let netns = netns.map_or_else(String::new, |path| path.to_string_lossy().into_owned());
        let deadline = Instant::now() + TEARDOWN_TIMEOUT.min(options.timeout);
        let mut dels = Vec::with_capacity(attachments.len());
        for attachment in &attachments {
            dels.push(self.detach(attachment, &netns, deadline));
        }
        let mut first = Ok(());
        for result in join_all(dels).await {
            if first.is_ok() {
                first = result;
            } else if let Err(error) = result {
                tracing::warn!(container_id = id, %error, "network teardown");
            }
        }
        first?;
        let (journal, owner) = (self.journal.clone(), id.to_owned());
        block(move || journal.end(&owner)).await?;
        self.remember_clean(id);
        Ok(())
    }

    async fn detach(
        &self,
        attachment: &Attachment,
        netns: &str,
        deadline: Instant,
    ) -> Result<(), Error> {
        let entry = attachment.entry.clone();
        let args = args_text(&entry);
        let capabilities = entry.capability_args.clone().unwrap_or_default();
        let call = self.invocation("DEL", &entry, &args, netns, deadline);
        let network = &attachment.network;
        let result = entry.result.as_ref();
        if let Err(error) = network.del(&call, &capabilities, result).await {
            // The reference bridge plugin fails on rules that an ADD cut short never made, after
            // it has freed all the rest; asked again, it finds nothing to do. Of an ADD that ended
            // the caller is to know.
            if result.is_some() || Instant::now() >= deadline {
                return Err(error);
            }
            tracing::debug!(container_id = %entry.container_id, %error, "second try at a DEL");
            network.del(&call, &capabilities, result).await?;
        }
        let cache = self.cache.clone();
        block(move || cache.delete(&entry.network_name, &entry.container_id, &entry.if_name)).await
    }

    /// Where `id` is or may be attached: cached results, then the journal's plan, then the loaded
    /// networks. Each keeps the configuration it was made with, when that is known.
    async fn attachments(&self, id: &str, options: &Options) -> Result<Vec<Attachment>, Error> {
        let (cache, journal, owner) = (self.cache.clone(), self.journal.clone(), id.to_owned());
        let known = block(move || {
            let mut known = cache.of(&owner);
            known.extend(journal.planned(&owner));
            known
        });
        let known = known.await;
        let loaded = self.networks().ok();
        let mut found: Vec<Attachment> = Vec::new();
        let same = |found: &[Attachment], name: &str, ifname: &str| {
            let mut entries = found.iter().map(|a| &a.entry);
            entries.any(|e| e.network_name == name && e.if_name == ifname)
        };
        for entry in known {
            if entry.container_id != id || same(&found, &entry.network_name, &entry.if_name) {
                continue;
            }
            let cached = entry.config().and_then(|raw| Network::parse(&raw).ok());
            let current = || {
                let networks = loaded.as_ref()?.iter();
                networks
                    .clone()
                    .find(|n| n.name == entry.network_name)
                    .cloned()
            };
            let Some(network) = cached.or_else(current) else {
                return Err(Error::Unsupported {
                    network: entry.network_name,
                    reason: format!("its configuration is gone, so {id} cannot be detached"),
                });
            };
            found.push(Attachment { network, entry });
        }
        if let Some(networks) = &loaded {
            for planned in plan(networks, id, "", options)? {
                let name = &planned.network.name;
                if !found.iter().any(|a| a.entry.network_name == *name) {
                    found.push(planned);
                }
            }
        }
        Ok(found)
    }

    /// Asks every plugin whether `id` is still attached as its result says.
    ///
    /// # Errors
    /// The first plugin that disagrees, or a network that was never attached.
    pub async fn check(&self, id: &str, netns: &Path) -> Result<(), Error> {
        check_name("container id", id)?;
        let deadline = Instant::now() + STATUS_TIMEOUT;
        let netns = netns.to_string_lossy();
        for Attachment { network, entry } in self.attachments(id, &Options::default()).await? {
            if network.version < Version::CHECK || network.disable_check {
                continue;
            }
            let Some(result) = &entry.result else {
                return Err(Error::Unsupported {
                    network: network.name,
                    reason: format!("no result of {id} is cached, set the container up again"),
                });
            };
            let args = args_text(&entry);
            let capabilities = entry.capability_args.clone().unwrap_or_default();
            let call = self.invocation("CHECK", &entry, &args, &netns, deadline);
            network
                .each(&call, "check", &capabilities, Some(result), &[])
                .await?;
        }
        Ok(())
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

    fn invocation<'a>(
        &'a self,
        command: &'static str,
        entry: &'a Entry,
        args: &'a str,
        netns: &'a str,
        deadline: Instant,
    ) -> Invocation<'a> {
        Invocation {
            command,
            container_id: &entry.container_id,
            netns,
            ifname: &entry.if_name,
            args,
            bin_dirs: &self.config.bin_dirs,
            deadline,
        }
    }

    fn plain(&self, command: &'static str, deadline: Instant) -> Invocation<'_> {
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

    fn is_clean(&self, id: &str) -> bool {
        let clean = self.clean.lock().unwrap_or_else(PoisonError::into_inner);
        clean.iter().any(|other| other == id)
    }

    fn remember_clean(&self, id: &str) {
        let mut clean = self.clean.lock().unwrap_or_else(PoisonError::into_inner);
        if clean.len() >= MAX_REMEMBERED {
            clean.pop_front();
        }
        clean.push_back(id.to_owned());
    }

    fn forget_clean(&self, id: &str) {
        let mut clean = self.clean.lock().unwrap_or_else(PoisonError::into_inner);
        clean.retain(|other| other != id);
    }
}

/// The attachments of a container to all of `networks`, in order.
fn plan(
    networks: &[Network],
    id: &str,
    netns: &str,
    options: &Options,
) -> Result<Vec<Attachment>, Error> {
    let values = options.capabilities.values();
    let mut planned = Vec::with_capacity(networks.len());
    for (index, network) in networks.iter().enumerate() {
        let ifname = format!("{}{index}", options.interface_prefix);
        if !conf::is_interface(&ifname) {
            return Err(Error::Name {
                what: "interface name",
                value: ifname,
                rule: "1 to 15 characters without '/', ':' and spaces",
            });
        }
        let mut entry = Entry::new(id, &network.name, &ifname, &network.raw);
        netns.clone_into(&mut entry.netns);
        entry.cni_args = (!options.args.is_empty()).then(|| options.args.clone());
        let declared = options::declared(network, &values);
        entry.capability_args = (!declared.is_empty()).then_some(declared);
        planned.push(Attachment {
            network: network.clone(),
            entry,
        });
    }
    Ok(planned)
}

fn args_text(entry: &Entry) -> String {
    let pairs = entry.cni_args.iter().flatten();
    let texts: Vec<String> = pairs.map(|(key, value)| format!("{key}={value}")).collect();
    texts.join(";")
}

fn loopback(netns: &Path) -> Interface {
    let local = |ip| IpConfig { ip, gateway: None };
    Interface {
        ip_configs: vec![
            local(std::net::Ipv4Addr::LOCALHOST.into()),
            local(std::net::Ipv6Addr::LOCALHOST.into()),
        ],
        mac: "00:00:00:00:00:00".to_owned(),
        sandbox: netns.to_string_lossy().into_owned(),
        ..Interface::default()
    }
}

fn check_name(what: &'static str, value: &str) -> Result<(), Error> {
    if conf::is_name(value) {
        return Ok(());
    }
    Err(Error::Name {
        what,
        value: value.to_owned(),
        rule: "up to 200 letters, digits, '.', '-' and '_', beginning with a letter or digit",
    })
}

/// Runs file system work where it may block.
async fn block<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests;
