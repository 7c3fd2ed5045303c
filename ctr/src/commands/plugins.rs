//! `ctr plugins`.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use lighter_proto::any;
use lighter_proto::containerd::services::introspection::v1::{
    Plugin, PluginInfoRequest, PluginsRequest,
};
use lighter_proto::containerd::types::{RuntimeInfo, RuntimeRequest};
use prost_types::Any;
use serde::Serialize;
use serde_json::json;
use tonic::Code;

use super::create;
use crate::cli::Ctx;
use crate::flags::RuntimeFlags;
use crate::image::platform::Platform;
use crate::json::Decoder;
use crate::table;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the daemon's plugins
    #[command(visible_alias = "ls")]
    List {
        /// Print only the ids
        #[arg(long, short)]
        quiet: bool,
        /// Print everything about each
        #[arg(long, short)]
        detailed: bool,
        /// Filters, e.g. type==io.containerd.snapshotter.v1; any of them
        filters: Vec<String>,
    },
    /// Ask a runtime's shim what it is
    InspectRuntime(Inspect),
}

/// Flags of `inspect-runtime`.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    #[command(flatten)]
    runtime: RuntimeFlags,
}

#[derive(Debug, Serialize)]
struct Row {
    #[serde(rename = "type")]
    kind: String,
    id: String,
    requires: Vec<String>,
    platforms: Vec<String>,
    exports: BTreeMap<String, String>,
    capabilities: Vec<String>,
    status: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
}

/// `error`, unless the plugin was left out on purpose.
fn status(plugin: &Plugin) -> (&'static str, String) {
    match &plugin.init_err {
        None => ("ok", String::new()),
        Some(error) => {
            let skipped = error.code == i32::from(Code::Unimplemented)
                || error.message.ends_with("skip plugin");
            (
                if skipped { "skip" } else { "error" },
                error.message.clone(),
            )
        }
    }
}

fn row(plugin: Plugin) -> Row {
    let (status, error) = status(&plugin);
    let platforms = plugin
        .platforms
        .iter()
        .map(|p| Platform::from(p).to_string())
        .collect();
    Row {
        kind: plugin.r#type,
        id: plugin.id,
        requires: plugin.requires,
        platforms,
        exports: plugin.exports.into_iter().collect(),
        capabilities: plugin.capabilities,
        status,
        error,
    }
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        match self {
            Self::List {
                quiet,
                detailed,
                filters,
            } => {
                let answer = ctx
                    .client
                    .introspection()
                    .plugins(PluginsRequest { filters })
                    .await?;
                let rows: Vec<_> = answer.into_inner().plugins.into_iter().map(row).collect();
                if quiet {
                    return table::lines(rows.iter().map(|row| row.id.as_str()));
                }
                if detailed && ctx.format == table::Format::Table {
                    return table::lines(rows.iter().map(details));
                }
                table::list(
                    ctx.format,
                    &rows,
                    ["TYPE", "ID", "PLATFORMS", "STATUS"],
                    |row| {
                        let platforms = match row.platforms.as_slice() {
                            [] => "-".to_owned(),
                            some => some.join(","),
                        };
                        [
                            row.kind.clone(),
                            row.id.clone(),
                            platforms,
                            row.status.to_owned(),
                        ]
                    },
                )
            }
            Self::InspectRuntime(inspect) => inspect.run(ctx).await,
        }
    }
}

/// Everything about a plugin, a line each, ended by a blank one.
fn details(row: &Row) -> String {
    let mut text = format!("Type:          {}\nID:            {}\n", row.kind, row.id);
    let mut list = |name: &str, items: &[String]| {
        for (at, item) in items.iter().enumerate() {
            let head = if at == 0 {
                format!("{name}:")
            } else {
                String::new()
            };
            text.push_str(&format!("{head:15}{item}\n"));
        }
    };
    list("Requires", &row.requires);
    list("Platforms", &row.platforms);
    let exports: Vec<_> = row
        .exports
        .iter()
        .map(|(k, v)| format!("{k} = {v}"))
        .collect();
    list("Exports", &exports);
    list("Capabilities", &row.capabilities);
    list(
        "Error",
        std::slice::from_ref(&row.error)
            .iter()
            .filter(|e| !e.is_empty())
            .cloned()
            .collect::<Vec<_>>()
            .as_slice(),
    );
    text
}

impl Inspect {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let runtime = create::runtime(&ctx.client, &self.runtime).await?;
        let request = RuntimeRequest {
            runtime_path: runtime.name,
            options: runtime.options,
        };
        let request = PluginInfoRequest {
            r#type: "io.containerd.runtime.v2".to_owned(),
            id: "task".to_owned(),
            options: Some(any::pack(&request)),
        };
        let answer = ctx
            .client
            .introspection()
            .plugin_info(request)
            .await?
            .into_inner();
        let info: RuntimeInfo = any::unpack(&answer.extra.unwrap_or_default())?;
        let decoder = Decoder::new();
        let decode = |value: &Any| decoder.decode(value);
        let version = info.version.unwrap_or_default();
        table::json(&json!({
            "Name": info.name,
            "Version": { "Version": version.version, "Revision": version.revision },
            "Options": info.options.as_ref().map(decode),
            "Features": info.features.as_ref().map(decode),
            "Annotations": info.annotations.into_iter().collect::<BTreeMap<_, _>>(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use lighter_proto::google::rpc::Status;

    use super::*;

    #[test]
    fn a_skipped_plugin_is_no_error() {
        let failed = |message: &str| Plugin {
            init_err: Some(Status {
                code: 2,
                message: message.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(row(Plugin::default()).status, "ok");
        assert_eq!(row(failed("no btrfs: skip plugin")).status, "skip");
        assert_eq!(row(failed("broken")).status, "error");
    }
}
