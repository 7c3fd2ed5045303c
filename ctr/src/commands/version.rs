//! `ctr version`.

use serde_json::json;

use crate::cli::Ctx;
use crate::table::{self, Format};

/// Prints what we are and what the daemon is.
pub(crate) async fn run(ctx: &Ctx) -> anyhow::Result<()> {
    let server = ctx.client.version().version(()).await?.into_inner();
    let uuid = match ctx.client.introspection().server(()).await {
        Ok(answer) => answer.into_inner().uuid,
        // Of no interest to who only wants the version.
        Err(_) => String::new(),
    };
    let client = env!("CARGO_PKG_VERSION");
    if ctx.format == Format::Json {
        return table::json(&json!({
            "client": { "version": client },
            "server": { "version": server.version, "revision": server.revision, "uuid": uuid },
        }));
    }
    table::lines([
        "Client:".to_owned(),
        format!("  Version:  {client}"),
        String::new(),
        "Server:".to_owned(),
        format!("  Version:  {}", server.version),
        format!("  Revision: {}", server.revision),
        format!("  UUID: {uuid}"),
    ])
}
