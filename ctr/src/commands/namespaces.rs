//! `ctr namespaces`.

use std::collections::BTreeMap;

use clap::Subcommand;
use lighter_proto::containerd::services::namespaces::v1::{
    CreateNamespaceRequest, DeleteNamespaceRequest, GetNamespaceRequest, ListNamespacesRequest,
    Namespace, UpdateNamespaceRequest,
};
use serde::Serialize;

use super::each;
use crate::advice::is_not_found;
use crate::cli::Ctx;
use crate::labels;
use crate::table;

/// Where cgroup hierarchies are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a namespace
    #[command(visible_alias = "c")]
    Create {
        /// Name
        name: String,
        /// Labels
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// List namespaces
    #[command(visible_alias = "ls")]
    List {
        /// Print only the names
        #[arg(long, short)]
        quiet: bool,
    },
    /// Remove empty namespaces
    #[command(visible_aliases = ["rm", "delete", "del"])]
    Remove {
        /// Remove the namespace's cgroup as well
        #[arg(long, short)]
        cgroup: bool,
        /// Names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Set and clear labels of a namespace
    Label {
        /// Name
        name: String,
        /// Labels; without a value a label is cleared
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    shown: String,
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let mut namespaces = ctx.client.namespaces();
        match self {
            Self::Create { name, labels } => {
                let labels = labels::given(&labels);
                let namespace = Some(Namespace { name, labels });
                namespaces
                    .create(CreateNamespaceRequest { namespace })
                    .await?;
                Ok(())
            }
            Self::List { quiet } => {
                let answer = namespaces.list(ListNamespacesRequest::default()).await?;
                let found = answer.into_inner().namespaces;
                if quiet {
                    return table::lines(found.iter().map(|namespace| namespace.name.as_str()));
                }
                let rows: Vec<_> = found
                    .into_iter()
                    .map(|namespace| Row {
                        name: namespace.name,
                        shown: labels::show(&namespace.labels),
                        labels: namespace.labels.into_iter().collect(),
                    })
                    .collect();
                table::list(ctx.format, &rows, ["NAME", "LABELS"], |row| {
                    let shown = if row.labels.is_empty() {
                        String::new()
                    } else {
                        row.shown.clone()
                    };
                    [row.name.clone(), shown]
                })
            }
            Self::Remove { cgroup, names } => {
                each(&names, "remove namespace", |name| async move {
                    let request = DeleteNamespaceRequest { name: name.clone() };
                    match ctx.client.namespaces().delete(request).await {
                        Err(status) if is_not_found(&status) => {
                            eprintln!("ctr: namespace {name} does not exist: nothing to remove");
                            return Ok(());
                        }
                        other => drop(other?),
                    }
                    if cgroup {
                        remove_cgroups(&name)?;
                    }
                    table::line(&name)
                })
                .await
            }
            Self::Label { name, labels } => {
                let labels = labels::changes(&labels);
                if labels.is_empty() {
                    let found = namespaces
                        .get(GetNamespaceRequest { name })
                        .await?
                        .into_inner();
                    let stored = found.namespace.unwrap_or_default().labels;
                    return table::line(&labels::show(&stored));
                }
                let update_mask = Some(labels::mask(&labels));
                let namespace = Some(Namespace { name, labels });
                namespaces
                    .update(UpdateNamespaceRequest {
                        namespace,
                        update_mask,
                    })
                    .await?;
                Ok(())
            }
        }
    }
}

/// Removes the namespace's directory from every hierarchy; only empty ones can be removed.
fn remove_cgroups(name: &str) -> anyhow::Result<()> {
    // The daemon has just accepted the name, so it is no path.
    let unified = std::path::Path::new(CGROUPS).join(name);
    let hierarchies = std::fs::read_dir(CGROUPS)?.filter_map(Result::ok);
    let candidates = hierarchies
        .map(|entry| entry.path().join(name))
        .chain([unified]);
    for path in candidates.filter(|path| path.is_dir()) {
        std::fs::remove_dir(&path).map_err(|error| {
            anyhow::anyhow!("cannot remove the cgroup {}: {error}", path.display())
        })?;
    }
    Ok(())
}
