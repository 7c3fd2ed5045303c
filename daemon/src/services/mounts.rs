//! `containerd.services.mounts.v1.Mounts`

use std::pin::Pin;

use futures::Stream;
use lighter_engine::mounts::{Activate, Activation, Mounts};
use lighter_proto::containerd::services::mounts::v1 as api;
use lighter_proto::containerd::services::mounts::v1::mounts_server::Mounts as MountsRpc;
use lighter_proto::containerd::types::{ActivationInfo, ActiveMount};
use lighter_proto::errdefs::{Classify, ErrorKind, WireError, into_status};
use lighter_proto::time::to_timestamp;
use lighter_store::Scope;
use lighter_store::metadata::Leases;
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{filter, labels, unordered};

/// Managed mounts.
#[derive(Debug, Clone)]
pub(crate) struct MountsService {
    mounts: Mounts,
    leases: Leases,
}

impl MountsService {
    /// Over all activations; `leases` may own them.
    pub(crate) fn new(mounts: Mounts, leases: Leases) -> Self {
        Self { mounts, leases }
    }

    /// Fails when the request names a lease that does not exist.
    fn check_lease(&self, scope: &Scope) -> Result<(), Status> {
        let Some(lease) = &scope.lease else {
            return Ok(());
        };
        match self.leases.get(scope, lease) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(into_status(WireError::new(
                ErrorKind::NotFound,
                "lease does not exist",
            ))),
            Err(error) => Err(into_status(error)),
        }
    }
}

fn encode(activation: Activation) -> ActivationInfo {
    ActivationInfo {
        name: activation.name,
        active: activation
            .active
            .into_iter()
            .map(|active| ActiveMount {
                mount: Some(active.mount.into()),
                mounted_at: Some(to_timestamp(active.mounted_at)),
                mount_point: active.mount_point,
                data: std::collections::HashMap::new(),
            })
            .collect(),
        system: activation.system.into_iter().map(Into::into).collect(),
        labels: unordered(activation.labels),
    }
}

/// Runs what blocks; it goes on when the client leaves.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, lighter_engine::mounts::Error> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| into_status(WireError::new(ErrorKind::Internal, error.to_string())))?
        .map_err(into_status)
}

type Messages = Pin<Box<dyn Stream<Item = Result<api::ListMessage, Status>> + Send>>;

#[tonic::async_trait]
impl MountsRpc for MountsService {
    type ListStream = Messages;

    async fn activate(
        &self,
        request: Request<api::ActivateRequest>,
    ) -> Result<Response<api::ActivateResponse>, Status> {
        let scope = scope_of(&request)?;
        self.check_lease(&scope)?;
        let request = request.into_inner();
        let mounts: Vec<_> = request.mounts.into_iter().map(Into::into).collect();
        let (engine, labels) = (self.mounts.clone(), labels(request.labels));
        let (name, temporary) = (request.name, request.temporary);
        let made = blocking(move || {
            let wanted = Activate {
                name: &name,
                mounts: &mounts,
                labels: &labels,
                temporary,
            };
            engine.activate(&scope, wanted)
        });
        Ok(Response::new(api::ActivateResponse {
            info: Some(encode(made.await?)),
        }))
    }

    async fn deactivate(
        &self,
        request: Request<api::DeactivateRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let (engine, name) = (self.mounts.clone(), request.into_inner().name);
        blocking(move || engine.deactivate(&scope.namespace, &name)).await?;
        Ok(Response::new(()))
    }

    async fn info(
        &self,
        request: Request<api::InfoRequest>,
    ) -> Result<Response<api::InfoResponse>, Status> {
        let scope = scope_of(&request)?;
        let found = self.mounts.info(&scope.namespace, &request.get_ref().name);
        Ok(Response::new(api::InfoResponse {
            info: Some(encode(found.map_err(into_status)?)),
        }))
    }

    async fn update(
        &self,
        _request: Request<api::UpdateRequest>,
    ) -> Result<Response<api::UpdateResponse>, Status> {
        // Upstream has no update either: clients expect this answer.
        Err(into_status(WireError::new(
            ErrorKind::Unimplemented,
            "update of a mount activation",
        )))
    }

    async fn list(
        &self,
        request: Request<api::ListRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let scope = scope_of(&request)?;
        let filter = filter(&request.get_ref().filters)?;
        let all = self.mounts.list(&scope.namespace, &filter);
        let messages = all.into_iter().map(|activation| {
            Ok(api::ListMessage {
                info: Some(encode(activation)),
            })
        });
        Ok(Response::new(Box::pin(futures::stream::iter(
            messages.collect::<Vec<_>>(),
        ))))
    }
}
