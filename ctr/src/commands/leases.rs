//! `ctr leases`.

use std::collections::BTreeMap;

use clap::Subcommand;
use lighter_proto::containerd::services::leases::v1::{DeleteRequest, ListRequest};
use serde::Serialize;

use super::each;
use crate::cli::Ctx;
use crate::flags::ExpiryFlag;
use crate::json;
use crate::labels;
use crate::lease;
use crate::table;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List leases
    #[command(visible_alias = "ls")]
    List {
        /// Print only the ids
        #[arg(long, short)]
        quiet: bool,
        /// Filters; any of them
        filters: Vec<String>,
    },
    /// Create a lease; its id is printed
    Create {
        /// Id [default: made up]
        #[arg(long, default_value = "", hide_default_value = true)]
        id: String,
        #[command(flatten)]
        expiry: ExpiryFlag,
        /// Labels
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// Delete leases
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete {
        /// Wait until what they held has been collected
        #[arg(long)]
        sync: bool,
        /// Leases
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    created_at: String,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    shown: String,
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        match self {
            Self::List { quiet, filters } => {
                let answer = ctx.client.leases().list(ListRequest { filters }).await?;
                let leases = answer.into_inner().leases;
                if quiet {
                    return table::lines(leases.iter().map(|lease| lease.id.as_str()));
                }
                let rows: Vec<_> = leases
                    .into_iter()
                    .map(|lease| Row {
                        created_at: json::time(lease.created_at.as_ref()),
                        shown: labels::show(&lease.labels),
                        labels: lease.labels.into_iter().collect(),
                        id: lease.id,
                    })
                    .collect();
                table::list(ctx.format, &rows, ["ID", "CREATED AT", "LABELS"], |row| {
                    [row.id.clone(), row.created_at.clone(), row.shown.clone()]
                })
            }
            Self::Create { id, expiry, labels } => {
                let mut labels = labels::given(&labels);
                if !expiry.expires.is_zero() {
                    labels.extend(lease::expiring(expiry.expires));
                }
                table::line(&lease::create(&ctx.client, &id, labels).await?)
            }
            Self::Delete { sync, ids } => {
                each(&ids, "delete lease", |id| async move {
                    let request = DeleteRequest {
                        id: id.clone(),
                        sync,
                    };
                    ctx.client.leases().delete(request).await?;
                    table::line(&id)
                })
                .await
            }
        }
    }
}
