//! Verbs that only look: list, check, inspect, usage.

use std::collections::BTreeMap;

use lighter_proto::containerd::services::images::v1::Image;
use lighter_proto::containerd::services::snapshots::v1::{StatSnapshotRequest, UsageRequest};
use serde::Serialize;
use serde_json::Value;

use super::all;
use crate::advice;
use crate::cli::Ctx;
use crate::client::Client;
use crate::content;
use crate::duration;
use crate::image::model::Descriptor;
use crate::image::platform::Platform;
use crate::image::{self, model, unpack};
use crate::json;
use crate::labels;
use crate::table;

/// Documents nested deeper than this are not followed.
const MAX_DEPTH: usize = 8;

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    media_type: String,
    digest: String,
    /// Bytes of the parts for this host; absent when they are not here.
    size: Option<i64>,
    platforms: Vec<String>,
    labels: BTreeMap<String, String>,
    created_at: String,
    updated_at: String,
    #[serde(skip)]
    shown: String,
}

/// `images ls`
pub(super) async fn list(ctx: &Ctx, quiet: bool, filters: Vec<String>) -> anyhow::Result<()> {
    let images = all(&ctx.client, filters).await?;
    if quiet {
        return table::lines(images.iter().map(|image| image.name.as_str()));
    }
    let mut rows = Vec::new();
    for image in images {
        rows.push(row(&ctx.client, image).await);
    }
    let header = ["REF", "TYPE", "DIGEST", "SIZE", "PLATFORMS", "LABELS"];
    table::list(ctx.format, &rows, header, |row| {
        [
            row.name.clone(),
            row.media_type.clone(),
            row.digest.clone(),
            row.size.map_or_else(|| "-".to_owned(), duration::size),
            if row.platforms.is_empty() {
                "-".to_owned()
            } else {
                row.platforms.join(",")
            },
            row.shown.clone(),
        ]
    })
}

/// What is not here leaves gaps in the row, not in the list.
async fn row(client: &Client, image: Image) -> Row {
    let target: Descriptor = image.target.clone().unwrap_or_default().into();
    let size = size(client, &target).await.ok();
    let platforms = platforms(client, &target).await.unwrap_or_default();
    Row {
        created_at: json::time(image.created_at.as_ref()),
        updated_at: json::time(image.updated_at.as_ref()),
        shown: labels::show(&image.labels),
        labels: image.labels.into_iter().collect(),
        name: image.name,
        media_type: target.media_type,
        digest: target.digest,
        size,
        platforms,
    }
}

/// Bytes of everything that this host needs of an image, by its descriptors.
async fn size(client: &Client, target: &Descriptor) -> anyhow::Result<i64> {
    let image = image::resolve(client, target, &Platform::host()).await?;
    let top = if target.is_index() { target.size } else { 0 };
    let layers: i64 = image.manifest.layers.iter().map(|layer| layer.size).sum();
    Ok(top + image.descriptor.size + image.manifest.config.size + layers)
}

/// Every platform that an image has, as far as it can be told.
async fn platforms(client: &Client, target: &Descriptor) -> anyhow::Result<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    for descriptor in image::manifests_of(client, target).await? {
        let platform = match &descriptor.platform {
            Some(platform) => Platform::from(platform),
            None => match image::read(client, &descriptor).await {
                Ok(image) => Platform::from(&image.config.platform),
                Err(_) => continue,
            },
        };
        let known = platform.os != "unknown" && platform.architecture != "unknown";
        let text = platform.to_string();
        if known && !platform.os.is_empty() && !found.contains(&text) {
            found.push(text);
        }
    }
    Ok(found)
}

#[derive(Debug, Serialize)]
struct Checked {
    name: String,
    media_type: String,
    digest: String,
    status: String,
    size: String,
    unpacked: bool,
    #[serde(skip)]
    complete: bool,
}

/// `images check`
pub(super) async fn check(
    ctx: &Ctx,
    snapshotter: &str,
    quiet: bool,
    filters: Vec<String>,
) -> anyhow::Result<()> {
    let snapshotter = unpack::snapshotter(&ctx.client, snapshotter).await?;
    let mut rows = Vec::new();
    for image in all(&ctx.client, filters).await? {
        rows.push(check_one(&ctx.client, image, &snapshotter).await?);
    }
    if quiet {
        let ready = rows.iter().filter(|row| row.complete && row.unpacked);
        return table::lines(ready.map(|row| row.name.as_str()));
    }
    let header = ["REF", "TYPE", "DIGEST", "STATUS", "SIZE", "UNPACKED"];
    table::list(ctx.format, &rows, header, |row| {
        [
            row.name.clone(),
            row.media_type.clone(),
            row.digest.clone(),
            row.status.clone(),
            row.size.clone(),
            row.unpacked.to_string(),
        ]
    })
}

async fn check_one(client: &Client, image: Image, snapshotter: &str) -> anyhow::Result<Checked> {
    let target: Descriptor = image.target.clone().unwrap_or_default().into();
    let mut checked = Checked {
        name: image.name,
        media_type: target.media_type.clone(),
        digest: target.digest.clone(),
        status: "unavailable (0/?)".to_owned(),
        size: "-".to_owned(),
        unpacked: false,
        complete: false,
    };
    let Ok(image) = image::resolve(client, &target, &Platform::host()).await else {
        return Ok(checked);
    };
    let mut needed = vec![image.descriptor.clone(), image.manifest.config.clone()];
    if target.is_index() {
        needed.insert(0, target);
    }
    needed.extend(image.manifest.layers.iter().cloned());
    let (mut here, mut here_bytes) = (0, 0);
    for descriptor in &needed {
        if content::exists(client, &descriptor.digest).await? {
            here += 1;
            here_bytes += descriptor.size;
        }
    }
    checked.complete = here == needed.len();
    let word = if checked.complete {
        "complete"
    } else {
        "incomplete"
    };
    checked.status = format!("{word} ({here}/{})", needed.len());
    let all_bytes = needed.iter().map(|descriptor| descriptor.size).sum();
    checked.size = format!(
        "{}/{}",
        duration::size(here_bytes),
        duration::size(all_bytes)
    );
    let chain = image.chain_id();
    checked.unpacked = !chain.is_empty() && unpack::exists(client, snapshotter, &chain).await?;
    Ok(checked)
}

#[derive(Debug, Serialize)]
struct Used {
    key: String,
    size: i64,
    inodes: i64,
}

/// `images usage`
pub(super) async fn usage(ctx: &Ctx, snapshotter: &str, name: &str) -> anyhow::Result<()> {
    let client = &ctx.client;
    let snapshotter = unpack::snapshotter(client, snapshotter).await?;
    let record = image::get(client, name).await?;
    let resolved = image::resolve(client, &image::target(&record)?, &Platform::host()).await?;
    let mut key = resolved.chain_id();
    if !unpack::exists(client, &snapshotter, &key).await? {
        return advice::fail(
            format!("image {name} isn't unpacked in snapshotter {snapshotter}"),
            "running it unpacks it, or name another one with --snapshotter",
        );
    }
    let mut rows = Vec::new();
    while !key.is_empty() {
        let (snapshotter, wanted) = (snapshotter.clone(), key.clone());
        let request = UsageRequest {
            snapshotter: snapshotter.clone(),
            key: wanted.clone(),
        };
        let usage = client.snapshots().usage(request).await?.into_inner();
        rows.push(Used {
            key,
            size: usage.size,
            inodes: usage.inodes,
        });
        let request = StatSnapshotRequest {
            snapshotter,
            key: wanted,
        };
        key = client
            .snapshots()
            .stat(request)
            .await?
            .into_inner()
            .info
            .unwrap_or_default()
            .parent;
    }
    table::list(ctx.format, &rows, ["KEY", "SIZE", "INODES"], |row| {
        [
            row.key.clone(),
            duration::size(row.size),
            row.inodes.to_string(),
        ]
    })
}

/// `images inspect`
pub(super) async fn inspect(ctx: &Ctx, name: &str, documents: bool) -> anyhow::Result<()> {
    let record = image::get(&ctx.client, name).await?;
    let target = image::target(&record)?;
    if ctx.format == table::Format::Json {
        return table::json(&as_json(&ctx.client, &record, &target).await);
    }
    let mut lines = vec![record.name.clone()];
    let shown = labels::show(&record.labels);
    lines.push(format!(
        "│   Created: {}",
        json::time(record.created_at.as_ref())
    ));
    lines.push(format!(
        "│   Updated: {}",
        json::time(record.updated_at.as_ref())
    ));
    lines.push(format!("│   Labels:  {shown}"));
    let mut stack = vec![(target, String::new(), true, 0)];
    while let Some((descriptor, indent, last, depth)) = stack.pop() {
        let (branch, below) = if last {
            ("└── ", "    ")
        } else {
            ("├── ", "│   ")
        };
        let platform = descriptor.platform.as_ref();
        let platform = platform
            .map(|p| format!(", {}", Platform::from(p)))
            .unwrap_or_default();
        lines.push(format!(
            "{indent}{branch}{} @{} ({} bytes{platform})",
            descriptor.media_type, descriptor.digest, descriptor.size
        ));
        let inner = format!("{indent}{below}");
        let bytes = match document(&ctx.client, &descriptor).await {
            None => continue,
            Some(Ok(bytes)) => bytes,
            Some(Err(_)) => {
                lines.push(format!("{inner}not here"));
                continue;
            }
        };
        if documents && let Ok(json) = serde_json::from_slice::<Value>(&bytes) {
            let text = serde_json::to_string_pretty(&json)?;
            lines.extend(text.lines().map(|line| format!("{inner}{line}")));
        }
        if depth < MAX_DEPTH {
            let children = children(&descriptor, &bytes);
            let count = children.len();
            for (at, child) in children.into_iter().enumerate().rev() {
                stack.push((child, inner.clone(), at + 1 == count, depth + 1));
            }
        }
    }
    table::lines(lines)
}

/// The bytes of a blob that is a JSON document; `None` for layers.
async fn document(client: &Client, descriptor: &Descriptor) -> Option<anyhow::Result<Vec<u8>>> {
    let json = descriptor.media_type.ends_with("+json") || descriptor.is_manifest();
    if json {
        Some(content::read(client, &descriptor.digest).await)
    } else {
        None
    }
}

fn children(descriptor: &Descriptor, bytes: &[u8]) -> Vec<Descriptor> {
    if descriptor.is_index() {
        return model::index(&descriptor.digest, bytes)
            .map(|i| i.manifests)
            .unwrap_or_default();
    }
    if !descriptor.is_manifest() {
        return Vec::new();
    }
    let Ok(manifest) = model::manifest(&descriptor.digest, bytes) else {
        return Vec::new();
    };
    std::iter::once(manifest.config)
        .chain(manifest.layers)
        .collect()
}

async fn as_json(client: &Client, record: &Image, target: &Descriptor) -> Value {
    let image = image::resolve(client, target, &Platform::host()).await;
    let (manifest, config) = match image {
        Ok(image) => {
            let config = content::read(client, &image.manifest.config.digest).await;
            let config = config
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
            (serde_json::to_value(&image.manifest).ok(), config)
        }
        Err(_) => (None, None),
    };
    serde_json::json!({
        "name": record.name,
        "labels": record.labels.iter().collect::<BTreeMap<_, _>>(),
        "target": target,
        "created_at": json::time(record.created_at.as_ref()),
        "updated_at": json::time(record.updated_at.as_ref()),
        "platforms": platforms(client, target).await.unwrap_or_default(),
        "manifest": manifest,
        "config": config,
    })
}
