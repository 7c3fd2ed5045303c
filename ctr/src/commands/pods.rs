//! `ctr pods`: what a kubelet runs here, for whoever debugs a node without crictl.
//!
//! Everything goes through the CRI services of the daemon's own socket, but `exec`, which is the
//! task's. IDs may be cut short as long as they name one object.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_proto::runtime::v1 as cri;
use prost::Message as _;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::each;
use super::tasks::Exec;
use crate::advice;
use crate::cli::Ctx;
use crate::duration;
use crate::json::Decoder;
use crate::table;

/// The namespace that a kubelet's containers are in.
const NAMESPACE: &str = "k8s.io";
/// Digits of an ID that tables show.
const SHORT: usize = 13;
/// How often a followed log is looked at.
const FOLLOW: Duration = Duration::from_millis(200);
/// Bytes read of a log at once.
const CHUNK: usize = 64 << 10;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run another process in a pod's container
    Exec(Box<Exec>),
    /// Show whether runtime and network are ready
    Info,
    /// Show everything about a pod or container
    Inspect {
        /// Pod or container
        id: String,
    },
    /// List pods
    #[command(visible_alias = "ls")]
    List {
        /// Print only the ids
        #[arg(long, short)]
        quiet: bool,
        /// Only pods of this Kubernetes namespace
        #[arg(long, value_name = "NAME")]
        pod_namespace: Option<String>,
        /// Only pods with this name
        #[arg(long)]
        name: Option<String>,
        /// Only pods with this label
        #[arg(long, value_name = "KEY=VALUE")]
        label: Vec<String>,
    },
    /// Print a container's log
    Logs(Logs),
    /// List containers
    Ps {
        /// Those that have ended as well
        #[arg(long, short)]
        all: bool,
        /// Print only the ids
        #[arg(long, short)]
        quiet: bool,
        /// Only the containers of this pod
        pod: Option<String>,
    },
    /// Remove pods with all they have
    #[command(visible_alias = "remove")]
    Rm {
        /// Stop them first
        #[arg(long, short)]
        force: bool,
        /// Pods
        #[arg(required = true, value_name = "POD")]
        ids: Vec<String>,
    },
    /// Show what containers use
    Stats {
        /// Only the containers of this pod
        pod: Option<String>,
    },
    /// Stop pods and take down their networks
    Stop {
        /// Pods
        #[arg(required = true, value_name = "POD")]
        ids: Vec<String>,
    },
}

/// Flags of `logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on as more is written, until the container ends
    #[arg(long, short)]
    follow: bool,
    /// Only so many of the last lines
    #[arg(long, value_name = "COUNT")]
    tail: Option<usize>,
    /// Begin each line with its time
    #[arg(long, short)]
    timestamps: bool,
    /// Container
    container: String,
}

impl Command {
    /// Runs the verb; the exit code of an exec.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        match self {
            Self::Exec(exec) => {
                let given = exec.container().unwrap_or_default().to_owned();
                let container = container(ctx, &given).await?;
                let inside = Ctx {
                    client: ctx.client.in_namespace(NAMESPACE),
                    format: ctx.format,
                };
                return exec.of(container.id).run(&inside).await;
            }
            Self::Info => info(ctx).await,
            Self::Inspect { id } => inspect(ctx, &id).await,
            Self::List {
                quiet,
                pod_namespace,
                name,
                label,
            } => {
                let wanted = |pod: &cri::PodSandbox| {
                    let metadata = pod.metadata.clone().unwrap_or_default();
                    pod_namespace
                        .as_ref()
                        .is_none_or(|n| *n == metadata.namespace)
                        && name.as_ref().is_none_or(|n| *n == metadata.name)
                };
                let pods = pods(ctx, &label).await?.into_iter().filter(wanted);
                list(ctx, pods.collect(), quiet)
            }
            Self::Logs(logs) => logs.run(ctx).await,
            Self::Ps { all, quiet, pod } => ps(ctx, all, quiet, pod.as_deref()).await,
            Self::Rm { force, ids } => {
                each(&ids, "remove pod", |id| async move {
                    let id = pod(ctx, &id).await?.id;
                    if force {
                        stop(ctx, &id).await?;
                    }
                    let request = cri::RemovePodSandboxRequest {
                        pod_sandbox_id: id.clone(),
                    };
                    ctx.client.cri().remove_pod_sandbox(request).await?;
                    table::line(&id)
                })
                .await
            }
            Self::Stats { pod } => stats(ctx, pod.as_deref()).await,
            Self::Stop { ids } => {
                each(&ids, "stop pod", |id| async move {
                    let id = pod(ctx, &id).await?.id;
                    stop(ctx, &id).await?;
                    table::line(&id)
                })
                .await
            }
        }
        .map(|()| 0)
    }
}

async fn stop(ctx: &Ctx, id: &str) -> anyhow::Result<()> {
    let request = cri::StopPodSandboxRequest {
        pod_sandbox_id: id.to_owned(),
    };
    ctx.client.cri().stop_pod_sandbox(request).await?;
    Ok(())
}

async fn pods(ctx: &Ctx, labels: &[String]) -> anyhow::Result<Vec<cri::PodSandbox>> {
    let filter = cri::PodSandboxFilter {
        label_selector: crate::labels::given(labels),
        ..Default::default()
    };
    let request = cri::ListPodSandboxRequest {
        filter: Some(filter),
    };
    let mut pods = ctx
        .client
        .cri()
        .list_pod_sandbox(request)
        .await?
        .into_inner()
        .items;
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    Ok(pods)
}

async fn containers(ctx: &Ctx, pod: Option<&str>) -> anyhow::Result<Vec<cri::Container>> {
    let filter = match pod {
        Some(given) => Some(cri::ContainerFilter {
            pod_sandbox_id: self::pod(ctx, given).await?.id,
            ..Default::default()
        }),
        None => None,
    };
    let request = cri::ListContainersRequest { filter };
    let mut found = ctx
        .client
        .cri()
        .list_containers(request)
        .await?
        .into_inner()
        .containers;
    found.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    Ok(found)
}

/// The one object whose ID begins with `given`.
fn only<T>(what: &str, given: &str, all: Vec<T>, id: impl Fn(&T) -> &str) -> anyhow::Result<T> {
    let mut fitting = all
        .into_iter()
        .filter(|item| !given.is_empty() && id(item).starts_with(given));
    match (fitting.next(), fitting.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => advice::fail(
            format!("{given:?} begins the ID of more than one {what}"),
            "give more digits",
        ),
        _ => advice::fail(
            format!("{what} {given:?}: not found"),
            "see `ctr pods ls` and `ctr pods ps -a`",
        ),
    }
}

async fn pod(ctx: &Ctx, given: &str) -> anyhow::Result<cri::PodSandbox> {
    only("pod", given, pods(ctx, &[]).await?, |pod| &pod.id)
}

async fn container(ctx: &Ctx, given: &str) -> anyhow::Result<cri::Container> {
    only("container", given, containers(ctx, None).await?, |c| &c.id)
}

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

fn list(ctx: &Ctx, pods: Vec<cri::PodSandbox>, quiet: bool) -> anyhow::Result<()> {
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

async fn ps(ctx: &Ctx, all: bool, quiet: bool, pod: Option<&str>) -> anyhow::Result<()> {
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

async fn inspect(ctx: &Ctx, given: &str) -> anyhow::Result<()> {
    let decoder = Decoder::new();
    let found = containers(ctx, None).await?;
    let (status, more) = if found.iter().any(|c| c.id.starts_with(given)) {
        let container_id = only("container", given, found, |c| &c.id)?.id;
        let request = cri::ContainerStatusRequest {
            container_id,
            verbose: true,
        };
        let answer = ctx.client.cri().container_status(request).await?;
        let answer = answer.into_inner();
        let bytes = answer.status.unwrap_or_default().encode_to_vec();
        (
            decoder.typed("runtime.v1.ContainerStatus", &bytes),
            answer.info,
        )
    } else {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod(ctx, given).await?.id,
            verbose: true,
        };
        let answer = ctx.client.cri().pod_sandbox_status(request).await?;
        let answer = answer.into_inner();
        let bytes = answer.status.unwrap_or_default().encode_to_vec();
        (
            decoder.typed("runtime.v1.PodSandboxStatus", &bytes),
            answer.info,
        )
    };
    table::json(&serde_json::json!({ "status": status, "info": parsed(more) }))
}

async fn info(ctx: &Ctx) -> anyhow::Result<()> {
    let request = cri::StatusRequest { verbose: true };
    let answer = ctx.client.cri().status(request).await?.into_inner();
    let bytes = answer.status.unwrap_or_default().encode_to_vec();
    let status = Decoder::new().typed("runtime.v1.RuntimeStatus", &bytes);
    table::json(&serde_json::json!({ "status": status, "info": parsed(answer.info) }))
}

/// Values of a verbose answer: JSON in strings, mostly.
fn parsed<I: IntoIterator<Item = (String, String)>>(
    info: I,
) -> BTreeMap<String, serde_json::Value> {
    info.into_iter()
        .map(|(key, text)| {
            let value = serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text));
            (key, value)
        })
        .collect()
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

async fn stats(ctx: &Ctx, pod: Option<&str>) -> anyhow::Result<()> {
    let filter = match pod {
        Some(given) => Some(cri::ContainerStatsFilter {
            pod_sandbox_id: self::pod(ctx, given).await?.id,
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

impl Logs {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let id = container(ctx, &self.container).await?.id;
        let path = status(ctx, &id).await?.log_path;
        if path.is_empty() {
            return advice::fail(
                format!("container {id} keeps no log"),
                "whoever made it gave no log path; `ctr pods inspect` shows how it was made",
            );
        }
        let mut file =
            std::fs::File::open(&path).with_context(|| format!("cannot open the log {path}"))?;
        let mut log = Reader::default();
        let lines = log.lines(&mut file)?;
        let skipped = self.tail.map_or(0, |tail| lines.len().saturating_sub(tail));
        for line in &lines[skipped..] {
            self.print(line)?;
        }
        if !self.follow {
            return Ok(());
        }
        loop {
            let state = status(ctx, &id).await?.state();
            for line in log.lines(&mut file)? {
                self.print(&line)?;
            }
            if state == cri::ContainerState::ContainerExited {
                return Ok(());
            }
            if rotated(&file, &path) {
                file = std::fs::File::open(&path)
                    .with_context(|| format!("cannot open the log {path}"))?;
                log = Reader::default();
                continue;
            }
            tokio::time::sleep(FOLLOW).await;
        }
    }

    fn print(&self, line: &[u8]) -> anyhow::Result<()> {
        let Some(entry) = Entry::parse(line) else {
            return table::raw(&[line, b"\n"].concat());
        };
        let mut text = Vec::new();
        if self.timestamps {
            text.extend_from_slice(entry.time);
            text.push(b' ');
        }
        text.extend_from_slice(entry.content);
        if !entry.partial {
            text.push(b'\n');
        }
        if entry.stderr {
            use std::io::Write as _;
            std::io::stderr().write_all(&text)?;
            return Ok(());
        }
        table::raw(&text)
    }
}

async fn status(ctx: &Ctx, id: &str) -> anyhow::Result<cri::ContainerStatus> {
    let request = cri::ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose: false,
    };
    let answer = ctx.client.cri().container_status(request).await?;
    Ok(answer.into_inner().status.unwrap_or_default())
}

/// Whether another file stands under the log's name by now.
fn rotated(file: &std::fs::File, path: &str) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(old), Ok(new)) => old.ino() != new.ino(),
        _ => false,
    }
}

/// Whole lines of a file that grows.
#[derive(Debug, Default)]
struct Reader {
    offset: u64,
    rest: Vec<u8>,
}

impl Reader {
    fn lines(&mut self, file: &mut std::fs::File) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        file.seek(SeekFrom::Start(self.offset))?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                return Ok(lines);
            }
            self.offset += count as u64;
            self.rest.extend_from_slice(&chunk[..count]);
            while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                lines.push(line);
            }
        }
    }
}

/// One line of a CRI log: `TIME stdout|stderr P|F CONTENT`.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    time: &'a [u8],
    stderr: bool,
    partial: bool,
    content: &'a [u8],
}

impl<'a> Entry<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
        if ![&b"stdout"[..], b"stderr"].contains(&stream) {
            return None;
        }
        Some(Self {
            time,
            stderr: stream == b"stderr",
            // Tags may follow one another with colons.
            partial: tag.split(|byte| *byte == b':').next() == Some(b"P"),
            content: parts.next().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_is_time_stream_tag_and_content() {
        let entry = Entry::parse(b"2026-01-02T03:04:05.6Z stderr P a b").unwrap();
        assert!(entry.stderr && entry.partial);
        assert_eq!(entry.content, b"a b");
        let entry = Entry::parse(b"t stdout F ").unwrap();
        assert!(!entry.stderr && !entry.partial && entry.content.is_empty());
        assert_eq!(Entry::parse(b"no log line at all"), None);
    }

    #[test]
    fn an_id_may_be_cut_short_but_not_ambiguous() {
        let all = || vec!["abc", "abd", "xyz"];
        assert_eq!(only("pod", "x", all(), |id| id).unwrap(), "xyz");
        assert!(only("pod", "ab", all(), |id| id).is_err());
        assert!(only("pod", "", all(), |id| id).is_err());
    }

    #[test]
    fn lines_are_read_as_they_become_whole() {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        let mut reader = Reader::default();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(reader.lines(&mut file).unwrap(), [b"one".to_vec()]);
        file.write_all(b"o\n").unwrap();
        assert_eq!(reader.lines(&mut file).unwrap(), [b"two".to_vec()]);
    }
}
