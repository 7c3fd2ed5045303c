//! Commands, terminals and ports: run to the end, or an address of the streaming server.

use std::sync::Arc;

use lighter_proto::runtime::v1 as api;

use super::seconds;
use crate::error::{Error, Result};
use crate::plugin::Plugin;

pub(in crate::runtime) async fn exec_sync(
    this: Arc<Plugin>,
    request: api::ExecSyncRequest,
) -> Result<api::ExecSyncResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    let limit = seconds(request.timeout);
    this.exec_sync(&container, &request.cmd, limit).await
}

pub(in crate::runtime) async fn exec(
    this: Arc<Plugin>,
    request: api::ExecRequest,
) -> Result<api::ExecResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    this.running(&container).await?;
    let url = this.streaming()?.exec_url(&request)?;
    Ok(api::ExecResponse { url })
}

pub(in crate::runtime) async fn attach(
    this: Arc<Plugin>,
    request: api::AttachRequest,
) -> Result<api::AttachResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    this.running(&container).await?;
    let url = this.streaming()?.attach_url(&request)?;
    Ok(api::AttachResponse { url })
}

pub(in crate::runtime) async fn port_forward(
    this: Arc<Plugin>,
    request: api::PortForwardRequest,
) -> Result<api::PortForwardResponse> {
    let pod = this.store.pods.get(&request.pod_sandbox_id)?;
    if !pod.is_ready() {
        let message = format!("sandbox container {:?} is not running", pod.id);
        return Err(Error::unknown(message));
    }
    let server = this.streaming()?;
    let url = server.port_forward_url(&request)?;
    Ok(api::PortForwardResponse { url })
}
