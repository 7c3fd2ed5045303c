//! `ctr deprecations`: what the daemon was seen doing that it will stop doing.

use clap::Subcommand;
use serde::Serialize;

use crate::cli::Ctx;
use crate::json;
use crate::table;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the warnings
    #[command(visible_alias = "ls")]
    List,
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    message: String,
    #[serde(rename = "lastOccurrence")]
    last_occurrence: String,
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let Self::List = self;
        let server = ctx.client.introspection().server(()).await?.into_inner();
        let rows: Vec<_> = server
            .deprecations
            .into_iter()
            .map(|warning| Row {
                last_occurrence: json::time(warning.last_occurrence.as_ref()),
                id: warning.id,
                message: warning.message,
            })
            .collect();
        table::list(
            ctx.format,
            &rows,
            ["ID", "LAST OCCURRENCE", "MESSAGE"],
            |row| {
                [
                    row.id.clone(),
                    row.last_occurrence.clone(),
                    row.message.clone(),
                ]
            },
        )
    }
}
