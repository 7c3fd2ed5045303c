//! `ctr pods inspect` and `info`: everything there is to say, as JSON.

use std::collections::BTreeMap;

use lighter_proto::runtime::v1 as cri;
use prost::Message as _;

use super::{containers, only, pod};
use crate::cli::Ctx;
use crate::json::Decoder;
use crate::table;

pub(super) async fn inspect(ctx: &Ctx, given: &str) -> anyhow::Result<()> {
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

pub(super) async fn info(ctx: &Ctx) -> anyhow::Result<()> {
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
