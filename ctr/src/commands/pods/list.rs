//! `ctr pods list`, `ps` and `stats`: tables.

use std::collections::BTreeMap;

use lighter_proto::runtime::v1 as cri;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::containers;
use crate::cli::Ctx;
use crate::duration;
use crate::table;

/// Digits of an ID that tables show.
const SHORT: usize = 13;

fn short(id: &str) -> String {
    id.chars().take(SHORT).collect()
}

/// A time in nanoseconds as people write it; empty for none.
fn at(nanoseconds: i64) -> String {
    if nanoseconds == 0 {
        return String::new();
    }
    OffsetDateTime::from_unix_timestamp_nanos(nanoseconds.into())
        .ok()
        .and_then(|time| time.replace_nanosecond(0).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_default()
}

#[derive(Debug, Serialize)]
struct PodRow {
    id: String,
    created_at: String,
    state: &'static str,
    name: String,
    namespace: String,
    attempt: u32,
    runtime_handler: String,
    labels: BTreeMap<String, String>,
}

pub(super) fn list(ctx: &Ctx, pods: Vec<cri::PodSandbox>, quiet: bool) -> anyhow::Result<()> {
    if quiet {
        return table::lines(pods.iter().map(|pod| pod.id.as_str()));
    }
    let rows: Vec<_> = pods
        .into_iter()
        .map(|pod| {
            let state = match pod.state() {
                cri::PodSandboxState::SandboxReady => "ready",
                cri::PodSandboxState::SandboxNotready => "not ready",
            };
            let metadata = pod.metadata.unwrap_or_default();
            PodRow {
                created_at: at(pod.created_at),
                state,
                name: metadata.name,
                namespace: metadata.namespace,
                attempt: metadata.attempt,
                runtime_handler: pod.runtime_handler,
                labels: pod.labels.into_iter().collect(),
                id: pod.id,
            }
        })
        .collect();
    table::list(
        ctx.format,
        &rows,
        ["POD", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT"],
        |row| {
            [
                short(&row.id),
                row.created_at.clone(),
                row.state.to_owned(),
                row.name.clone(),
                row.namespace.clone(),
                row.attempt.to_string(),
            ]
        },
    )
}

#[derive(Debug, Serialize)]
struct ContainerRow {
    id: String,
    created_at: String,
    state: &'static str,
    name: String,
    attempt: u32,
    image: String,
    pod_id: String,
}

pub(super) async fn ps(ctx: &Ctx, all: bool, quiet: bool, pod: Option<&str>) -> anyhow::Result<()> {
    let running = |c: &cri::Container| c.state() == cri::ContainerState::ContainerRunning;
    let found = containers(ctx, pod).await?;
    let rows: Vec<_> = found
        .into_iter()
        .filter(|container| all || running(container))
        .map(|container| {
            let state = match container.state() {
                cri::ContainerState::ContainerCreated => "created",
                cri::ContainerState::ContainerRunning => "running",
                cri::ContainerState::ContainerExited => "exited",
                cri::ContainerState::ContainerUnknown => "unknown",
            };
            let metadata = container.metadata.unwrap_or_default();
            let image = container.image.unwrap_or_default();
            ContainerRow {
                created_at: at(container.created_at),
                state,
                name: metadata.name,
                attempt: metadata.attempt,
                image: if image.user_specified_image.is_empty() {
                    image.image
                } else {
                    image.user_specified_image
                },
                pod_id: container.pod_sandbox_id,
                id: container.id,
            }
        })
        .collect();
    if quiet {
        return table::lines(rows.iter().map(|row| row.id.as_str()));
    }
    table::list(
        ctx.format,
        &rows,
        [
            "CONTAINER",
            "CREATED",
            "STATE",
            "NAME",
            "ATTEMPT",
            "IMAGE",
            "POD",
        ],
        |row| {
            [
                short(&row.id),
                row.created_at.clone(),
                row.state.to_owned(),
                row.name.clone(),
                row.attempt.to_string(),
                row.image.clone(),
                short(&row.pod_id),
            ]
        },
    )
}

#[derive(Debug, Serialize)]
struct StatsRow {
    id: String,
    name: String,
    cpu_nano_cores: u64,
    memory_bytes: u64,
    disk_bytes: u64,
    inodes: u64,
}

pub(super) async fn stats(ctx: &Ctx, pod: Option<&str>) -> anyhow::Result<()> {
    let filter = match pod {
        Some(given) => Some(cri::ContainerStatsFilter {
            pod_sandbox_id: super::pod(ctx, given).await?.id,
            ..Default::default()
        }),
        None => None,
    };
    let request = cri::ListContainerStatsRequest { filter };
    let answer = ctx.client.cri().list_container_stats(request).await?;
    let value = |value: Option<cri::UInt64Value>| value.map_or(0, |v| v.value);
    let mut rows: Vec<_> = answer
        .into_inner()
        .stats
        .into_iter()
        .map(|stats| {
            let attributes = stats.attributes.unwrap_or_default();
            let disk = stats.writable_layer.unwrap_or_default();
            StatsRow {
                id: attributes.id,
                name: attributes.metadata.unwrap_or_default().name,
                cpu_nano_cores: value(stats.cpu.unwrap_or_default().usage_nano_cores),
                memory_bytes: value(stats.memory.unwrap_or_default().working_set_bytes),
                disk_bytes: value(disk.used_bytes),
                inodes: value(disk.inodes_used),
            }
        })
        .collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    table::list(
        ctx.format,
        &rows,
        ["CONTAINER", "NAME", "CPU", "MEMORY", "DISK", "INODES"],
        |row| {
            let bytes = |n: u64| duration::size(i64::try_from(n).unwrap_or(i64::MAX));
            [
                short(&row.id),
                row.name.clone(),
                format!("{}m", row.cpu_nano_cores / 1_000_000),
                bytes(row.memory_bytes),
                bytes(row.disk_bytes),
                row.inodes.to_string(),
            ]
        },
    )
}
