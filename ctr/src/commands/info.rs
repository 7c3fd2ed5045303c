//! `ctr info`: what the daemon says of itself.

use serde_json::json;

use crate::cli::Ctx;
use crate::json;
use crate::table;

/// Prints it as JSON, as upstream does.
pub(crate) async fn run(ctx: &Ctx) -> anyhow::Result<()> {
    let server = ctx.client.introspection().server(()).await?.into_inner();
    let deprecations: Vec<_> = server
        .deprecations
        .iter()
        .map(|warning| {
            json!({
                "id": warning.id,
                "message": warning.message,
                "last_occurrence": json::time(warning.last_occurrence.as_ref()),
            })
        })
        .collect();
    let mut shown =
        json!({ "server": { "uuid": server.uuid, "pid": server.pid, "pidns": server.pidns } });
    if !deprecations.is_empty() {
        shown["server"]["deprecations"] = json!(deprecations);
    }
    table::json(&shown)
}
