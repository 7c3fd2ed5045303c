//! A container in its networks: attached, checked, detached.

use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Map, Value};
use tokio::time::Instant;

use crate::cache::Entry;
use crate::conf::{self, Network, Version};
use crate::error::Error;
use crate::exec::Invocation;
use crate::metrics::Operation;
use crate::netns;
use crate::networks::{Cni, STATUS_TIMEOUT, block};
use crate::options::{self, Options};
use crate::result::{Answer, Interface, IpConfig, IpPreference, NetworkResult};

/// Longest time for undoing one container's networks; counted anew after a setup that failed.
pub(super) const TEARDOWN_TIMEOUT: Duration = Duration::from_secs(60);
/// Containers remembered as having nothing left, so that repeated teardowns run no plugin.
const MAX_REMEMBERED: usize = 4096;

/// One network of one container, as it was or is to be attached.
struct Attachment {
    network: Network,
    entry: Entry,
}

impl Cni {
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
            let answer = Answer::parse(&result?).map_err(|reason| Error::Unsupported {
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
