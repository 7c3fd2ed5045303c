//! `ctr events`: everything that happens, until interrupted.

use clap::Args;
use lighter_proto::containerd::services::events::v1::SubscribeRequest;
use serde_json::json;

use crate::cli::Ctx;
use crate::json::{self, Decoder};
use crate::table::{self, Format};

/// Show the daemon's events as they come
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Filters, e.g. topic==/tasks/exit or 'namespace==default,topic~=/tasks/.+'; any of them
    filters: Vec<String>,
}

impl Events {
    /// Prints events until the daemon ends.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let request = SubscribeRequest {
            filters: self.filters,
        };
        let mut stream = ctx.client.events().subscribe(request).await?.into_inner();
        let decoder = Decoder::new();
        while let Some(envelope) = stream.message().await? {
            let at = json::time(envelope.timestamp.as_ref());
            let event = envelope.event.as_ref().map(|event| decoder.decode(event));
            let event = event.unwrap_or_default();
            let line = match ctx.format {
                Format::Table => {
                    format!("{at} {} {} {event}", envelope.namespace, envelope.topic)
                }
                Format::Json => json!({
                    "timestamp": at,
                    "namespace": envelope.namespace,
                    "topic": envelope.topic,
                    "event": event,
                })
                .to_string(),
            };
            table::line(&line)?;
        }
        Ok(())
    }
}
