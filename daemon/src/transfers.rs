//! The transfer engine, as the configuration wants it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use lighter_engine::image::{Applier, Platform, Snapshotters};
use lighter_engine::registry::{self, HostsConfig, Registry};
use lighter_engine::streaming::Streams;
use lighter_engine::transfer::{self, Transfer, UnpackSupport, VerifierConfig};
use lighter_store::metadata::Db;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::config::plugins::UnpackConfig;
use crate::differs::Book;
use crate::stores::BUILT_IN;

/// The snapshotter that is taken where nobody names one.
const PREFERRED: &str = "overlayfs";
/// Layers applied at once where the configuration has upstream's default of one: unpacking one
/// image never waits for another.
const MIN_UNPACKS: usize = 2;

/// Builds the engine over `db`; images are unpacked to every snapshotter it has.
///
/// # Errors
/// For a platform, duration or differ in the configuration that is none.
pub(crate) fn build(
    config: &Config,
    db: Db,
    differs: &Book,
    streams: Streams,
    tasks: TaskTracker,
) -> anyhow::Result<Transfer> {
    let proxies = config.proxies.keys().map(String::as_str);
    let snapshotters: Vec<String> = BUILT_IN
        .into_iter()
        .chain(proxies)
        .filter(|id| db.snapshots(id).is_ok())
        .map(str::to_owned)
        .collect();
    let mut appliers: BTreeMap<String, Arc<dyn Applier>> = BTreeMap::new();
    for id in &snapshotters {
        appliers.insert(id.clone(), Arc::new(differs.default.clone()));
    }
    for entry in &config.plugins.transfer.unpack_config {
        let differ = differs
            .named(&entry.differ)
            .context("plugins.'io.containerd.transfer.v1.local'.unpack_config.differ")?;
        appliers.insert(snapshotter_of(entry).to_owned(), Arc::new(differ));
    }
    let settings = &config.plugins.transfer;
    let engine = transfer::Config {
        max_downloads: count(settings.max_concurrent_downloads),
        max_uploads: count(settings.max_concurrent_uploaded_layers),
        max_unpacks: count(settings.max_concurrent_unpacks).max(MIN_UNPACKS),
        unpack: unpack(config, &snapshotters)?,
        verifier: verifier(config)?,
    };
    let registry = Registry::new(registry::Config {
        hosts: HostsConfig {
            roots: std::env::split_paths(&settings.config_path).collect(),
            ..HostsConfig::default()
        },
        limits: limits(config),
    });
    let snapshotters = Snapshotters { appliers };
    Ok(Transfer::new(
        db,
        registry,
        snapshotters,
        streams,
        engine,
        tasks,
    ))
}

fn count(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// The snapshotter of an entry of `unpack_config`.
fn snapshotter_of(entry: &UnpackConfig) -> &str {
    match entry.snapshotter.as_str() {
        "" => PREFERRED,
        id => id,
    }
}

/// A chunk size turns ranged downloads to that size; upstream's default of 0 leaves ours.
fn limits(config: &Config) -> registry::Limits {
    let settings = &config.plugins.transfer;
    let mut limits = registry::Limits::default();
    if settings.concurrent_layer_fetch_buffer >= 512 {
        let most = 64 << 20;
        let chunk = usize::try_from(settings.concurrent_layer_fetch_buffer).unwrap_or(most);
        limits.chunk_bytes = chunk.min(most);
        limits.ranged_above_bytes = limits.chunk_bytes as u64 * 2;
        limits.chunks_per_blob = count(settings.max_concurrent_downloads).max(1);
    }
    limits
}

fn unpack(config: &Config, snapshotters: &[String]) -> anyhow::Result<Vec<UnpackSupport>> {
    let wanted = &config.plugins.transfer.unpack_config;
    if wanted.is_empty() {
        let mut ids: Vec<&String> = snapshotters.iter().collect();
        ids.sort_by_key(|id| *id != PREFERRED);
        return Ok(ids
            .into_iter()
            .map(|id| UnpackSupport {
                platform: Platform::host(),
                snapshotter: id.clone(),
            })
            .collect());
    }
    wanted
        .iter()
        .map(|entry| {
            let platform = match entry.platform.as_str() {
                "" => Platform::host(),
                text => Platform::parse(text)
                    .context("plugins.'io.containerd.transfer.v1.local'.unpack_config.platform")?,
            };
            let snapshotter = snapshotter_of(entry).to_owned();
            Ok(UnpackSupport {
                platform,
                snapshotter,
            })
        })
        .collect()
}

fn verifier(config: &Config) -> anyhow::Result<Option<VerifierConfig>> {
    if config.disabled("io.containerd.image-verifier.v1.bindir") {
        return Ok(None);
    }
    let settings = &config.plugins.verifier;
    Ok(Some(VerifierConfig {
        bin_dir: PathBuf::from(&settings.bin_dir),
        max_verifiers: settings.max_verifiers.into(),
        per_verifier_timeout: per_verifier(&settings.per_verifier_timeout)?,
    }))
}

fn per_verifier(text: &str) -> anyhow::Result<Duration> {
    let place = "plugins.'io.containerd.image-verifier.v1.bindir'.per_verifier_timeout";
    Ok(crate::config::duration(place, text)?)
}
