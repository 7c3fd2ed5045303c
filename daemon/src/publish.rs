//! `lighterd publish`: shims that cannot speak ttrpc to the daemon run this for each event.

use std::io::Read as _;
use std::time::Duration;

use anyhow::Context as _;
use lighter_proto::containerd::services::events::v1::PublishRequest;
use lighter_proto::containerd::services::events::v1::events_client::EventsClient;
use prost::Message as _;
use tonic::metadata::MetadataValue;

/// Longest that connecting and publishing may take.
const LIMIT: Duration = Duration::from_secs(5);
/// Most bytes of an event.
const MAX_EVENT_BYTES: u64 = 4 << 20;

/// Publishes the `Any` on stdin under `topic`.
///
/// # Errors
/// When stdin holds no `Any`, or the daemon refuses or does not answer.
pub(crate) fn publish(address: &str, namespace: &str, topic: &str) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .take(MAX_EVENT_BYTES)
        .read_to_end(&mut bytes)
        .context("read the event from stdin")?;
    let event = prost_types::Any::decode(bytes.as_slice()).context("stdin holds no event")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let request = PublishRequest {
        topic: topic.to_owned(),
        event: Some(event),
    };
    runtime.block_on(async {
        tokio::time::timeout(LIMIT, send(address, namespace, request))
            .await
            .with_context(|| format!("{address} did not answer within {LIMIT:?}"))?
    })
}

async fn send(address: &str, namespace: &str, request: PublishRequest) -> anyhow::Result<()> {
    let path = address
        .strip_prefix("unix://")
        .unwrap_or(address)
        .to_owned();
    let channel = tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        }))
        .await
        .with_context(|| format!("connect to {address}"))?;
    let mut request = tonic::Request::new(request);
    request.metadata_mut().insert(
        crate::services::scope::NAMESPACE_HEADER,
        MetadataValue::try_from(namespace).context("namespace")?,
    );
    EventsClient::new(channel)
        .publish(request)
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    Ok(())
}
