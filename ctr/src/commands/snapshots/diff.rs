//! `ctr snapshots diff`.

use std::collections::HashMap;

use anyhow::Context as _;
use clap::Args;
use lighter_proto::containerd::services::diff::v1::DiffRequest;
use lighter_proto::containerd::services::snapshots::v1::{Kind, PrepareSnapshotRequest};
use lighter_proto::containerd::types::Mount;

use super::{Scope, root_label};
use crate::client::Client;
use crate::commands::checkpoint;
use crate::content;
use crate::image::unpack;
use crate::labels;
use crate::lease;
use crate::snapshot::{self, Access};
use crate::table;

/// Flags of `diff`.
#[derive(Debug, Args)]
pub(super) struct Diff {
    /// Form of the result
    #[arg(long, default_value = "application/vnd.oci.image.layer.v1.tar+gzip")]
    media_type: String,
    /// Name of the ingest it is written through
    #[arg(long = "ref", default_value = "", hide_default_value = true)]
    reference: String,
    /// Keep the result as content
    #[arg(long)]
    keep: bool,
    /// Labels of the result
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Snapshot; with a second one, the older of the two
    a: String,
    /// Newer snapshot
    b: Option<String>,
}

impl Scope<'_> {
    pub(super) async fn diff(&self, flags: Diff) -> anyhow::Result<()> {
        lease::hold(self.client, |client| async move {
            let made = match &flags.b {
                None => {
                    let kind = &flags.media_type;
                    checkpoint::diff(&client, &self.snapshotter, &flags.a, kind, &flags.reference)
                        .await?
                }
                Some(newer) => {
                    let request = DiffRequest {
                        left: self.readable(&client, &flags.a).await?,
                        right: self.readable(&client, newer).await?,
                        media_type: flags.media_type.clone(),
                        r#ref: flags.reference.clone(),
                        ..Default::default()
                    };
                    let made = client.diff().diff(request).await?.into_inner().diff;
                    made.context("the daemon made no diff")?
                }
            };
            let mut labels = labels::given(&flags.label);
            if flags.keep {
                labels.extend(root_label());
            }
            unpack::label(&client, &made.digest, labels).await?;
            let mut stream = content::stream(&client, &made.digest).await?;
            while let Some(part) = stream.message().await? {
                table::raw(&part.data)?;
            }
            Ok(())
        })
        .await
    }

    /// Mounts of a snapshot, through a view when it is committed; the view goes with the lease.
    async fn readable(&self, client: &Client, key: &str) -> anyhow::Result<Vec<Mount>> {
        if self.stat(key.to_owned()).await?.kind() != Kind::Committed {
            return self.mounts(key.to_owned()).await;
        }
        let request = PrepareSnapshotRequest {
            snapshotter: self.name(),
            key: format!("{key}-view-{:016x}", rand::random::<u64>()),
            parent: key.to_owned(),
            labels: HashMap::new(),
        };
        snapshot::make(client, Access::Read, request).await
    }
}
