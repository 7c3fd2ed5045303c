//! Shims of sandboxes: started, reached and dismissed as those of tasks are.

use std::sync::Arc;

use lighter_store::Namespace;
use prost_types::Any;

use super::bundle::{Bundle, SANDBOXES};
use super::connection::Connection;
use super::error::Error;
use super::manager::Manager;
use super::reap;

impl Manager {
    /// Where the bundle of a sandbox is, whether it exists or not.
    #[must_use]
    pub fn sandbox_bundle(&self, namespace: &Namespace, id: &str) -> Bundle {
        self.shared.bundle(SANDBOXES, namespace, id)
    }

    /// Makes a bundle and starts the shim of `runtime` in it. A failure leaves nothing.
    ///
    /// # Errors
    /// Why one of both failed.
    pub async fn start_shim(
        &self,
        bundle: &Bundle,
        runtime: &str,
        spec: Option<Vec<u8>>,
        options: Option<&Any>,
    ) -> Result<Connection, Error> {
        let shim = self.shared.launcher.resolve(runtime)?;
        let made = bundle.clone();
        tokio::task::spawn_blocking(move || made.create(spec.as_deref()))
            .await
            .map_err(|_| Error::Stopping)??;
        let started = async {
            bundle.write_shim_path(&shim)?;
            // Read for as long as the start takes: a shim must not wait for a reader then.
            let _log = super::shim_log::follow(&self.shared.tracker, bundle)?;
            let launcher = &self.shared.launcher;
            let (connection, _) = launcher.connect(&shim, bundle, options, None).await?;
            Ok(connection)
        };
        match started.await {
            Ok(connection) => Ok(connection),
            Err(error) => {
                reap::delete_action(&self.shared, &shim, bundle).await;
                let _gone = self.shared.delete_bundle(bundle).await;
                Err(error)
            }
        }
    }

    /// Connects to the shim of a bundle that an earlier run made.
    ///
    /// # Errors
    /// When there is no such bundle, or nobody listens.
    pub async fn reach(&self, bundle: &Bundle) -> Result<Connection, Error> {
        let bootstrap = bundle.read_bootstrap()?;
        Ok(Connection::open(&bootstrap, bundle.namespace.as_str()).await?)
    }

    /// Sends a shim away and removes its bundle; without a connection its `delete` action cleans
    /// up.
    ///
    /// # Errors
    /// When the bundle cannot be removed.
    pub async fn dismiss_shim(
        &self,
        bundle: &Bundle,
        connection: Option<&Connection>,
    ) -> Result<(), Error> {
        let shared: &Arc<_> = &self.shared;
        match connection {
            Some(connection) => reap::dismiss(shared, bundle, connection).await,
            None => {
                if let Some(shim) = bundle.shim_path() {
                    reap::delete_action(shared, &shim, bundle).await;
                }
            }
        }
        shared.delete_bundle(bundle).await
    }
}
