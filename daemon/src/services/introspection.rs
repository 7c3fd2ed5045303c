//! `containerd.services.introspection.v1.Introspection`

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use lighter_proto::any;
use lighter_proto::containerd::services::introspection::v1::introspection_server::Introspection;
use lighter_proto::containerd::services::introspection::v1::{
    DeprecationWarning, PluginInfoRequest, PluginInfoResponse, PluginsRequest, PluginsResponse,
    ServerResponse,
};
use lighter_proto::containerd::types::RuntimeRequest;
use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use lighter_proto::time::now;
use lighter_store::filter::Filter;
use tonic::{Request, Response, Status};

use crate::plugin::builtins::kind;
use crate::plugin::{Graph, graph};

/// Asks a runtime's shim what it is: runs it with `-info`.
#[tonic::async_trait]
pub(crate) trait RuntimeInfo: Send + Sync + 'static {
    /// Description of the runtime named in `request`, packed.
    async fn info(&self, request: RuntimeRequest) -> Result<prost_types::Any, WireError>;
}

/// Answers what the daemon is made of.
pub(crate) struct IntrospectionService {
    graph: Graph,
    uuid: String,
    warnings: Vec<DeprecationWarning>,
    runtimes: Arc<dyn RuntimeInfo>,
}

impl std::fmt::Debug for IntrospectionService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IntrospectionService")
    }
}

impl IntrospectionService {
    /// Over the finished graph; `uuid` is the installation's, `warnings` what configuration said.
    pub(crate) fn new(
        graph: Graph,
        uuid: String,
        warnings: &[String],
        runtimes: Arc<dyn RuntimeInfo>,
    ) -> Self {
        let stamp = now();
        let warnings = warnings
            .iter()
            .map(|message| DeprecationWarning {
                id: "io.lighter.warning/configuration".to_owned(),
                message: message.clone(),
                last_occurrence: Some(stamp),
            })
            .collect();
        Self {
            graph,
            uuid,
            warnings,
            runtimes,
        }
    }
}

/// The installation's id, made and kept on first use.
///
/// # Errors
/// When the file can be neither read nor written.
pub(crate) fn uuid(root: &std::path::Path) -> std::io::Result<String> {
    let dir: PathBuf = root.join("io.containerd.grpc.v1.introspection");
    let path = dir.join("uuid");
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim().len() == 36 => return Ok(text.trim().to_owned()),
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    std::fs::create_dir_all(&dir)?;
    let uuid = random_uuid(rand::random());
    let temp = dir.join(".uuid.tmp");
    std::fs::write(&temp, &uuid)?;
    std::fs::rename(&temp, &path)?;
    Ok(uuid)
}

/// Version 4, variant 1.
fn random_uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[tonic::async_trait]
impl Introspection for IntrospectionService {
    async fn plugins(
        &self,
        request: Request<PluginsRequest>,
    ) -> Result<Response<PluginsResponse>, Status> {
        let filter = Filter::parse(&request.into_inner().filters).map_err(into_status)?;
        Ok(Response::new(PluginsResponse {
            plugins: self.graph.list(&filter),
        }))
    }

    async fn server(&self, _request: Request<()>) -> Result<Response<ServerResponse>, Status> {
        let pidns = std::fs::metadata("/proc/self/ns/pid").map_or(0, |meta| meta.ino());
        Ok(Response::new(ServerResponse {
            uuid: self.uuid.clone(),
            pid: u64::from(std::process::id()),
            pidns,
            deprecations: self.warnings.clone(),
        }))
    }

    async fn plugin_info(
        &self,
        request: Request<PluginInfoRequest>,
    ) -> Result<Response<PluginInfoResponse>, Status> {
        let request = request.into_inner();
        let uri = format!("{}.{}", request.r#type, request.id);
        let error = |kind, text: String| into_status(WireError::new(kind, text));
        let plugin = self
            .graph
            .find(&request.r#type, &request.id)
            .ok_or_else(|| error(ErrorKind::NotFound, format!("plugin {uri}")))?;
        let Some(options) = request.options else {
            return Ok(Response::new(PluginInfoResponse {
                plugin: Some(graph::encode(plugin)),
                extra: None,
            }));
        };
        if let Some(failure) = &plugin.error {
            return Err(error(
                ErrorKind::FailedPrecondition,
                format!("plugin {uri} failed to start: {}", failure.message),
            ));
        }
        if (plugin.kind.as_str(), plugin.id.as_str()) != (kind::RUNTIME, "task") {
            return Err(error(
                ErrorKind::Unimplemented,
                format!("plugin {uri} does not give information"),
            ));
        }
        let wanted: RuntimeRequest =
            any::unpack(&options).map_err(|e| error(ErrorKind::InvalidArgument, e.to_string()))?;
        let extra = self.runtimes.info(wanted).await.map_err(into_status)?;
        Ok(Response::new(PluginInfoResponse {
            plugin: Some(graph::encode(plugin)),
            extra: Some(extra),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uuid_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = uuid(dir.path()).unwrap();
        assert_eq!(uuid(dir.path()).unwrap(), first);
        assert_eq!(first.len(), 36);
        assert_eq!(first.as_bytes()[14], b'4');
    }
}
