//! `images mount` and `unmount`.

use std::collections::HashMap;
use std::path::Path;

use clap::Args;
use lighter_proto::containerd::services::leases::v1::DeleteRequest;
use lighter_proto::containerd::services::snapshots::v1::{
    PrepareSnapshotRequest, RemoveSnapshotRequest,
};

use crate::advice::{self, is_already_exists, is_not_found};
use crate::cli::Ctx;
use crate::client::Client;
use crate::flags::{ExpiryFlag, SnapshotterFlag};
use crate::image::platform::Platform;
use crate::image::{self, unpack};
use crate::lease;
use crate::mount;
use crate::snapshot::{self, Access};
use crate::table;

/// Mount an image's filesystem
///
/// The snapshot behind it is kept by a lease named like the target, and goes with it: `unmount --rm`
/// ends both, or they end when the lease expires.
#[derive(Debug, Args)]
pub(crate) struct Mount {
    #[command(flatten)]
    snapshotter: SnapshotterFlag,
    /// Writable: changes go to a snapshot of their own
    #[arg(long)]
    rw: bool,
    /// Use the image of this platform
    #[arg(long)]
    platform: Option<String>,
    /// Write the filesystem's data to disk when the image has to be unpacked first
    #[arg(long)]
    sync_fs: bool,
    #[command(flatten)]
    expiry: ExpiryFlag,
    /// Image
    #[arg(value_name = "REF")]
    name: String,
    /// Directory
    target: String,
}

impl Mount {
    /// Mounts it.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        if !Path::new(&self.target).is_dir() {
            return advice::fail(
                format!("{} is no directory to mount on", self.target),
                format!("make it with `mkdir {}`", self.target),
            );
        }
        let snapshotter = unpack::snapshotter(&ctx.client, &self.snapshotter.snapshotter).await?;
        let labels = if self.expiry.expires.is_zero() {
            HashMap::new()
        } else {
            lease::expiring(self.expiry.expires)
        };
        match lease::create(&ctx.client, &self.target, labels).await {
            Err(error) if error.downcast_ref().is_some_and(is_already_exists) => {
                return advice::fail(
                    format!("an image is mounted on {} already", self.target),
                    format!("undo that with `ctr images unmount --rm {}`", self.target),
                );
            }
            other => drop(other?),
        }
        let client = ctx.client.under_lease(&self.target)?;
        let outcome = self.mount(&client, &snapshotter).await;
        if outcome.is_err() {
            // The lease is ours, and takes a half-made snapshot along.
            let request = DeleteRequest {
                id: self.target.clone(),
                sync: false,
            };
            let _ = ctx.client.leases().delete(request).await;
        }
        outcome?;
        table::line(&self.target)
    }

    async fn mount(&self, client: &Client, snapshotter: &str) -> anyhow::Result<()> {
        let platform = match &self.platform {
            Some(text) => Platform::parse(text)?,
            None => Platform::host(),
        };
        let record = image::get(client, &self.name).await?;
        let resolved = image::resolve(client, &image::target(&record)?, &platform).await?;
        let parent = unpack::unpack(client, &resolved, snapshotter, self.sync_fs).await?;
        let access = if self.rw { Access::Write } else { Access::Read };
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: self.target.clone(),
            parent,
            labels: HashMap::new(),
        };
        let mounts = snapshot::make(client, access, request).await?;
        mount::apply(&mounts, Path::new(&self.target))
    }
}

/// Undo `mount`
#[derive(Debug, Args)]
pub(crate) struct Unmount {
    #[command(flatten)]
    snapshotter: SnapshotterFlag,
    /// Remove the snapshot (and what was written to it) as well
    #[arg(long)]
    rm: bool,
    /// Directory
    target: String,
}

impl Unmount {
    /// Unmounts it.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        mount::undo(Path::new(&self.target))?;
        if self.rm {
            let snapshotter =
                unpack::snapshotter(&ctx.client, &self.snapshotter.snapshotter).await?;
            let id = self.target.clone();
            let gone = ctx
                .client
                .leases()
                .delete(DeleteRequest { id, sync: false })
                .await;
            if let Err(status) = gone
                && !is_not_found(&status)
            {
                return Err(status.into());
            }
            let request = RemoveSnapshotRequest {
                snapshotter,
                key: self.target.clone(),
            };
            match ctx.client.snapshots().remove(request).await {
                Err(status) if !is_not_found(&status) => return Err(status.into()),
                _ => {}
            }
        }
        table::line(&self.target)
    }
}
