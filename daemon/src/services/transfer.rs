//! `containerd.services.transfer.v1.Transfer`: from typed sources to typed destinations.

use lighter_engine::transfer::{Error, Transfer};
use lighter_proto::containerd::services::transfer::v1::TransferRequest;
use lighter_proto::containerd::services::transfer::v1::transfer_server::Transfer as TransferRpc;
use lighter_proto::errdefs::into_status;
use prost_types::Any;
use tonic::{Request, Response, Status};

use super::scope::scope_of;

/// Hands transfers to the engine.
#[derive(Debug, Clone)]
pub(crate) struct TransferService {
    transfer: Transfer,
}

impl TransferService {
    /// Serves `transfer`.
    pub(crate) fn new(transfer: Transfer) -> Self {
        Self { transfer }
    }
}

#[tonic::async_trait]
impl TransferRpc for TransferService {
    async fn transfer(&self, request: Request<TransferRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let namespace = &scope.namespace;
        let engine = &self.transfer;
        let source = engine.source(namespace, &present(request.source, "source")?);
        let source = source.map_err(into_status)?;
        let destination = present(request.destination, "destination")?;
        let destination = engine
            .destination(namespace, &destination)
            .map_err(into_status)?;
        let id = request.options.unwrap_or_default().progress_stream;
        let stream = (!id.is_empty()).then(|| engine.stream(namespace, &id));
        let watcher = stream.transpose().map_err(into_status)?;
        let done = engine.transfer(&scope, source, destination, watcher).await;
        done.map(Response::new).map_err(into_status)
    }
}

fn present(message: Option<Any>, what: &str) -> Result<Any, Status> {
    let missing = || Error::Invalid {
        reason: format!("transfer without {what}"),
    };
    message.ok_or_else(|| into_status(missing()))
}
