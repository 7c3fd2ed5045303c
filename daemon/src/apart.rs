//! `lighterd serve`: stores of ours in a process of their own, as proxy plugins of a daemon, this one or
//! containerd.
//!
//! | below the root | what |
//! |---|---|
//! | `metadata.sled/` | the database of the snapshotter |
//! | `io.containerd.snapshotter.v1.<id>/` | its snapshots |
//! | `io.containerd.content.v1.content/` | blobs and ingests |

use std::sync::Arc;

use anyhow::Context as _;
use lighter_snapshotter::Serve as ServeSnapshots;
use lighter_store::content::{Local, Serve as ServeContent};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tracing::info;

use crate::config::Config;
use crate::plugin::builtins::kind;
use crate::server::listen;
use crate::{shutdown, stores, sys, telemetry};

/// Directory of the database below the root.
const DATABASE: &str = "metadata.sled";

/// What is served.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Id of a snapshotter.
    pub(crate) snapshotter: Option<&'a str>,
    /// The content store.
    pub(crate) content: bool,
}

/// Serves until a signal ends it.
///
/// # Errors
/// When nothing is to be served, or it cannot be.
pub(crate) fn serve(config: &Config, parts: Parts<'_>) -> anyhow::Result<()> {
    anyhow::ensure!(
        parts.snapshotter.is_some() || parts.content,
        "nothing to serve: name a snapshotter with --snapshotter, or add --content"
    );
    sys::tame_allocator();
    telemetry::start(&config.log_level, config.log_format)?;
    crate::app::own_dir(&config.root, 0o700)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(run(config, parts))
}

async fn run(config: &Config, parts: Parts<'_>) -> anyhow::Result<()> {
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let signals = shutdown::signals()?;
    let (health, server) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let mut routes = Routes::new(server);
    if let Some(id) = parts.snapshotter {
        let (config, id) = (config.clone(), id.to_owned());
        let open = move || {
            let path = config.root.join(DATABASE);
            let options = lighter_kv::Options::default();
            let (kv, _) = lighter_kv::Db::open_or_rebuild(&path, &options)
                .with_context(|| format!("open the database in {}", path.display()))?;
            stores::builtin(&config, &kv, &id).with_context(|| format!("open snapshotter {id}"))
        };
        let snapshotter = tokio::task::spawn_blocking(open).await??;
        routes = routes.add_service(ServeSnapshots::new(snapshotter));
    }
    if parts.content {
        let path = config.root.join(format!("{}.content", kind::CONTENT));
        let open = move || {
            Local::open(&path).with_context(|| format!("open the content in {}", path.display()))
        };
        let store = tokio::task::spawn_blocking(open).await??;
        routes = routes.add_service(ServeContent::new(Arc::new(store), tasks.clone()));
    }
    let listener = listen::unix(&config.grpc).await?;
    info!(address = %config.grpc.address.display(), version = crate::VERSION, "serving");
    let ended = stop.clone();
    let server = tonic::transport::Server::builder()
        .add_routes(routes)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), ended.cancelled_owned());
    let serving = async {
        let outcome = server.await;
        stop.cancel();
        outcome
    };
    let (outcome, ()) = tokio::join!(serving, signals.wait(stop.clone(), || {}));
    tasks.close();
    let _gone = std::fs::remove_file(&config.grpc.address);
    outcome.context("serve")
}
