//! `ctr pods`: what a kubelet runs here, for whoever debugs a node without crictl.
//!
//! Everything goes through the CRI services of the daemon's own socket, but `exec`, which is the
//! task's. IDs may be cut short as long as they name one object.

mod inspect;
mod list;
mod logs;

use clap::Subcommand;
use lighter_proto::runtime::v1 as cri;

use self::inspect::{info, inspect};
use self::list::{list, ps, stats};
use self::logs::Logs;
use super::each;
use super::tasks::Exec;
use crate::advice;
use crate::cli::Ctx;
use crate::table;

/// The namespace that a kubelet's containers are in.
const NAMESPACE: &str = "k8s.io";

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_may_be_cut_short_but_not_ambiguous() {
        let all = || vec!["abc", "abd", "xyz"];
        assert_eq!(only("pod", "x", all(), |id| id).unwrap(), "xyz");
        assert!(only("pod", "ab", all(), |id| id).is_err());
        assert!(only("pod", "", all(), |id| id).is_err());
    }
}
