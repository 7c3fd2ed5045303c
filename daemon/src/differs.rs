//! The differs of the configuration: ours, and those in other processes.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use lighter_engine::diff::{Limits, Processor};
use lighter_engine::differ::{Differ, Differs, LocalDiffer, ProxyDiffer};
use lighter_proto::errdefs::WireError;
use lighter_store::metadata::Content;
use tracing::info;

use crate::config::Config;
use crate::plugin::Plugin;
use crate::plugin::builtins::{kind, proxied, skipped};

/// Id of the differ of this process.
const OURS: &str = "walking";
/// A differ of upstream's that files for it may name. Here its work is the snapshotter's: layers
/// become images when they are committed.
const EROFS: &str = "erofs";

/// All differs, by plugin id.
#[derive(Debug)]
pub(crate) struct Book {
    by_id: BTreeMap<String, Result<Arc<dyn Differ>, WireError>>,
    /// Those that requests are answered by, in order.
    pub(crate) default: Differs,
    /// What introspection lists.
    pub(crate) plugins: Vec<Plugin>,
}

impl Book {
    /// Makes every differ over `content`.
    ///
    /// # Errors
    /// For a name in the list of default ones that no differ has.
    pub(crate) fn open(config: &Config, content: &Content) -> anyhow::Result<Self> {
        let mut by_id: BTreeMap<_, Result<Arc<dyn Differ>, _>> = BTreeMap::new();
        let uri = format!("{}.{OURS}", kind::DIFFER);
        let plugin = Plugin::new(kind::DIFFER, OURS)
            .requires(&[kind::METADATA])
            .on_platform();
        let mut plugins = Vec::new();
        if config.disabled(&uri) {
            by_id.insert(OURS.to_owned(), Err(skipped(&uri)));
            plugins.push(plugin.failed(skipped(&uri)));
        } else {
            by_id.insert(OURS.to_owned(), Ok(Arc::new(local(config, content))));
            plugins.push(plugin);
        }
        for (name, proxy) in config.proxies.iter().filter(|(_, p)| p.kind == "diff") {
            let plugin = proxied(kind::DIFFER, name, proxy);
            let opened = ProxyDiffer::connect(&proxy.address);
            plugins.push(match &opened {
                Ok(_) => plugin,
                Err(error) => plugin.failed(error.clone()),
            });
            by_id.insert(name.clone(), opened.map(|differ| Arc::new(differ) as _));
        }
        let mut book = Self {
            by_id,
            default: Differs::new(Vec::new()),
            plugins,
        };
        let mut list = Vec::new();
        for id in &config.plugins.diff.default {
            if id == EROFS && !book.by_id.contains_key(id) {
                info!("differ erofs left out: the erofs snapshotter makes images at commit");
                continue;
            }
            list.push(
                book.find(id)
                    .context("plugins.'io.containerd.service.v1.diff-service'.default")?,
            );
        }
        book.default = Differs::new(list);
        Ok(book)
    }

    fn find(&self, id: &str) -> anyhow::Result<Arc<dyn Differ>> {
        match self.by_id.get(id) {
            Some(Ok(differ)) => Ok(Arc::clone(differ)),
            Some(Err(error)) => anyhow::bail!("differ {id}: {error}"),
            None => anyhow::bail!(
                "differ {id} is not there: want one of {}",
                self.by_id
                    .keys()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }

    /// The differ `id` alone; the default ones for an empty id.
    ///
    /// # Errors
    /// For an id that no differ has.
    pub(crate) fn named(&self, id: &str) -> anyhow::Result<Differs> {
        match id {
            "" | EROFS if !self.by_id.contains_key(id) => Ok(self.default.clone()),
            id => Ok(Differs::new(vec![self.find(id)?])),
        }
    }
}

fn local(config: &Config, content: &Content) -> LocalDiffer {
    LocalDiffer {
        content: content.clone(),
        processors: processors(config),
        limits: Limits::default(),
        sync_fs: config.plugins.diff.sync_fs,
        temp_dir: config.temp.clone().unwrap_or_else(std::env::temp_dir),
    }
}

/// Stream processors in order of id.
fn processors(config: &Config) -> Arc<[Processor]> {
    let all = config.processors.iter();
    all.map(|(id, processor)| Processor {
        id: id.clone(),
        accepts: processor.accepts.clone(),
        returns: processor.returns.clone(),
        path: processor.path.clone(),
        args: processor.args.clone(),
        env: processor.env.clone(),
    })
    .collect()
}
