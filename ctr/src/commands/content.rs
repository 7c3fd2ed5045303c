//! `ctr content`: blobs and what is being written.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand};
use lighter_proto::any;
use lighter_proto::containerd::services::content::v1::{
    DeleteContentRequest, Info, InfoRequest, ListContentRequest, ListStatusesRequest, UpdateRequest,
};
use lighter_registry::Access;
use serde::Serialize;

use super::images::Wanted;
use super::{each, objects};
use crate::advice;
use crate::cli::Ctx;
use crate::client::Client;
use crate::content::{self, Opened, Writer};
use crate::duration;
use crate::flags::RegistryFlags;
use crate::image::local;
use crate::json;
use crate::labels;
use crate::lease;
use crate::remote::Remote;
use crate::table;
use crate::transfer::Pumps;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what is being written
    Active {
        /// Filters, e.g. ref~=layer; any of them
        filters: Vec<String>,
    },
    /// Delete blobs for good
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete {
        /// Digests
        #[arg(required = true, value_name = "DIGEST")]
        digests: Vec<String>,
    },
    /// Edit a blob; the new blob's digest is printed
    Edit(Edit),
    /// Fetch everything of an image, without unpacking it
    Fetch(Fetch),
    /// Write blobs of a repository to standard output
    FetchBlob(objects::FetchBlob),
    /// Write a manifest or blob of a repository to standard output
    FetchObject(objects::FetchObject),
    /// Write a blob to standard output
    Get {
        /// Digests
        #[arg(required = true, value_name = "DIGEST")]
        digests: Vec<String>,
    },
    /// Read a blob from standard input; unless something refers to it, it stays for a day
    Ingest(Ingest),
    /// Set and clear labels of a blob
    Label {
        /// Digest
        digest: String,
        /// Labels; without a value a label is cleared
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// List blobs
    #[command(visible_alias = "ls")]
    List {
        /// Print only the digests
        #[arg(long, short)]
        quiet: bool,
        /// Filters, e.g. labels."a/b"==c; any of them
        filters: Vec<String>,
    },
    /// Let go of content
    #[command(subcommand)]
    Prune(Prune),
    /// Upload a blob or manifest to a repository
    PushObject(objects::PushObject),
}

/// What can be let go of.
#[derive(Debug, Subcommand)]
pub(crate) enum Prune {
    /// Remove the labels by which manifests keep their layers: unpacked images do without them
    References {
        /// Do not wait until the layers are gone
        #[arg(long = "async")]
        later: bool,
        /// Only show which labels would go
        #[arg(long)]
        dry: bool,
    },
}

/// Flags of `edit`.
#[derive(Debug, Args)]
pub(crate) struct Edit {
    /// Check the result: json
    #[arg(long, value_name = "FORMAT", value_parser = ["json"])]
    validate: Option<String>,
    /// Editor
    #[arg(long, env = "EDITOR")]
    editor: String,
    /// Digest
    digest: String,
}

/// Flags of `fetch`.
#[derive(Debug, Args)]
pub(crate) struct Fetch {
    #[command(flatten)]
    registry: RegistryFlags,
    #[command(flatten)]
    wanted: Wanted,
    /// Labels of the image
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Image
    #[arg(value_name = "REF")]
    name: String,
}

/// Flags of `ingest`.
#[derive(Debug, Args)]
pub(crate) struct Ingest {
    /// Size that it must have, bytes
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 0,
        hide_default_value = true
    )]
    expected_size: i64,
    /// Digest that it must have
    #[arg(
        long,
        value_name = "DIGEST",
        default_value = "",
        hide_default_value = true
    )]
    expected_digest: String,
    /// Labels of the blob
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Name of the ingest, under which a broken-off one can be found again
    #[arg(value_name = "REF")]
    name: String,
}

#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    size: i64,
    created_at: String,
    updated_at: String,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    shown: String,
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        match self {
            Self::Active { filters } => active(ctx, filters).await,
            Self::Delete { digests } => {
                each(&digests, "delete content", |digest| async move {
                    let request = DeleteContentRequest {
                        digest: digest.clone(),
                    };
                    ctx.client.content().delete(request).await?;
                    table::line(&digest)
                })
                .await
            }
            Self::Edit(edit) => edit.run(ctx).await,
            Self::Fetch(fetch) => fetch.run(ctx).await,
            Self::FetchBlob(fetch) => fetch.run().await,
            Self::FetchObject(fetch) => fetch.run().await,
            Self::PushObject(push) => push.run(ctx).await,
            Self::Get { digests } => {
                for digest in digests {
                    let mut stream = content::stream(&ctx.client, &digest).await?;
                    while let Some(part) = stream.message().await? {
                        table::raw(&part.data)?;
                    }
                }
                Ok(())
            }
            Self::Ingest(ingest) => ingest.run(ctx).await,
            Self::Label { digest, labels } => label(ctx, digest, &labels).await,
            Self::List { quiet, filters } => list(ctx, quiet, filters).await,
            Self::Prune(Prune::References { later, dry }) => prune(ctx, later, dry).await,
        }
    }
}

/// Every blob of the namespace.
async fn all(client: &Client, filters: Vec<String>) -> anyhow::Result<Vec<Info>> {
    let mut stream = client
        .content()
        .list(ListContentRequest { filters })
        .await?
        .into_inner();
    let mut found = Vec::new();
    while let Some(part) = stream.message().await? {
        found.extend(part.info);
    }
    Ok(found)
}

async fn list(ctx: &Ctx, quiet: bool, filters: Vec<String>) -> anyhow::Result<()> {
    let found = all(&ctx.client, filters).await?;
    if quiet {
        return table::lines(found.iter().map(|info| info.digest.as_str()));
    }
    let rows: Vec<_> = found
        .into_iter()
        .map(|info| Row {
            created_at: json::time(info.created_at.as_ref()),
            updated_at: json::time(info.updated_at.as_ref()),
            shown: labels::show(&info.labels),
            labels: info.labels.into_iter().collect(),
            digest: info.digest,
            size: info.size,
        })
        .collect();
    table::list(
        ctx.format,
        &rows,
        ["DIGEST", "SIZE", "CREATED AT", "LABELS"],
        |row| {
            [
                row.digest.clone(),
                duration::size(row.size),
                row.created_at.clone(),
                row.shown.clone(),
            ]
        },
    )
}

#[derive(Debug, Serialize)]
struct Transfer {
    #[serde(rename = "ref")]
    name: String,
    offset: i64,
    total: i64,
    started_at: String,
    updated_at: String,
}

async fn active(ctx: &Ctx, filters: Vec<String>) -> anyhow::Result<()> {
    let answer = ctx
        .client
        .content()
        .list_statuses(ListStatusesRequest { filters })
        .await?;
    let mut rows: Vec<_> = answer
        .into_inner()
        .statuses
        .into_iter()
        .map(|status| Transfer {
            started_at: json::time(status.started_at.as_ref()),
            updated_at: json::time(status.updated_at.as_ref()),
            name: status.r#ref,
            offset: status.offset,
            total: status.total,
        })
        .collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    table::list(
        ctx.format,
        &rows,
        ["REF", "SIZE", "STARTED", "UPDATED"],
        |row| {
            let size = match row.total {
                0 => duration::size(row.offset),
                total => format!("{}/{}", duration::size(row.offset), duration::size(total)),
            };
            [
                row.name.clone(),
                size,
                row.started_at.clone(),
                row.updated_at.clone(),
            ]
        },
    )
}

async fn label(ctx: &Ctx, digest: String, args: &[String]) -> anyhow::Result<()> {
    let labels = labels::changes(args);
    let stored = if labels.is_empty() {
        ctx.client
            .content()
            .info(InfoRequest { digest })
            .await?
            .into_inner()
            .info
    } else {
        let update_mask = Some(labels::mask(&labels));
        let info = Some(Info {
            digest,
            labels,
            ..Default::default()
        });
        ctx.client
            .content()
            .update(UpdateRequest { info, update_mask })
            .await?
            .into_inner()
            .info
    };
    table::line(&labels::show(&stored.unwrap_or_default().labels))
}

impl Ingest {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let (total, expected) = (self.expected_size, self.expected_digest.as_str());
        let Opened::Writer(mut writer) = Writer::open(
            &lease::leave(&ctx.client).await?,
            &self.name,
            total,
            expected,
        )
        .await?
        else {
            return table::line(expected);
        };
        writer.restart();
        loop {
            // A thread reads: input may take its time, and the daemon must not be kept from us.
            let chunk = tokio::task::spawn_blocking(|| {
                let mut chunk = vec![0; content::WRITE_CHUNK];
                let count = std::io::stdin().lock().read(&mut chunk)?;
                chunk.truncate(count);
                Ok::<_, std::io::Error>(chunk)
            });
            let chunk = chunk.await?.context("cannot read standard input")?;
            if chunk.is_empty() {
                break;
            }
            writer.write(Bytes::from(chunk)).await?;
        }
        table::line(
            &writer
                .commit(total, expected, labels::given(&self.label))
                .await?,
        )
    }
}

impl Edit {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let bytes = content::read(&ctx.client, &self.digest).await?;
        let file = tempfile::Builder::new().prefix("ctr-edit-").tempfile()?;
        std::fs::write(file.path(), &bytes)?;
        // The variable may hold arguments as well, as shells have it.
        let status = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("{} \"$1\"", self.editor))
            .arg("sh")
            .arg(file.path())
            .status()
            .with_context(|| format!("cannot run {}", self.editor))?;
        anyhow::ensure!(
            status.success(),
            "the editor failed ({status}): nothing was written"
        );
        let edited = std::fs::read(file.path())?;
        if self.validate.is_some() {
            serde_json::from_slice::<serde_json::Value>(&edited)
                .context("the result is no JSON: nothing was written")?;
        }
        let client = lease::leave(&ctx.client).await?;
        table::line(&content::write(&client, edited, HashMap::new()).await?)
    }
}

impl Fetch {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        lease::hold(&ctx.client, |client| async move {
            if self.wanted.metadata_only {
                // The transfer service has no word for this.
                let remote = Remote::open(&self.name, &self.registry, Access::Pull).await?;
                let parts = self.wanted.parts(0)?;
                let labels = labels::given(&self.label);
                local::pull(&client, &remote, &self.name, &parts, labels).await?;
                return table::line(&self.name);
            }
            let mut pumps = Pumps::default();
            let source = pumps.registry(&client, &self.name, &self.registry).await?;
            let mut store = self.wanted.store(&self.name)?;
            store.labels = labels::given(&self.label);
            pumps
                .run(&client, any::pack(&source), any::pack(&store))
                .await?;
            table::line(&self.name)
        })
        .await
    }
}

/// Labels by which a manifest refers to its layers.
fn layer_references(info: &Info) -> Vec<String> {
    let is_layer = |key: &&String| key.starts_with("containerd.io/gc.ref.content.l.");
    let mut keys: Vec<_> = info.labels.keys().filter(is_layer).cloned().collect();
    keys.sort();
    keys
}

async fn prune(ctx: &Ctx, later: bool, dry: bool) -> anyhow::Result<()> {
    for info in all(&ctx.client, Vec::new()).await? {
        let keys = layer_references(&info);
        if keys.is_empty() {
            continue;
        }
        for key in &keys {
            table::line(&format!("{} {key}", info.digest))?;
        }
        if !dry {
            let cleared: HashMap<_, _> = keys.into_iter().map(|key| (key, String::new())).collect();
            let update_mask = Some(labels::mask(&cleared));
            let info = Some(Info {
                digest: info.digest,
                labels: cleared,
                ..Default::default()
            });
            ctx.client
                .content()
                .update(UpdateRequest { info, update_mask })
                .await?;
        }
    }
    if later || dry {
        return Ok(());
    }
    // Deleting a lease with `sync` is how a client waits for a collection.
    let id = lease::create(&ctx.client, "", HashMap::new()).await?;
    let request = lighter_proto::containerd::services::leases::v1::DeleteRequest { id, sync: true };
    match ctx.client.leases().delete(request).await {
        Err(status) => advice::fail(
            format!("the labels are gone, but waiting for the collection failed: {status}"),
            "it happens later by itself",
        ),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_layers_are_let_go() {
        let keys = [
            "containerd.io/gc.ref.content.l.0",
            "containerd.io/gc.ref.content.config",
            "x",
        ];
        let labels = keys.map(|key| (key.to_owned(), "d".to_owned())).into();
        let info = Info {
            labels,
            ..Default::default()
        };
        assert_eq!(layer_references(&info), [keys[0]]);
    }
}
