//! `containerd.services.containers.v1.Containers`

use std::time::SystemTime;

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::containerd::services::containers::v1 as wire;
use lighter_proto::containerd::services::containers::v1::containers_server::Containers;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use lighter_store::Identifier;
use lighter_store::metadata::{Container, Db, Runtime};
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{filter, invalid, labels, paths, required, unordered};

/// Container records over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct ContainersService {
    db: Db,
}

impl ContainersService {
    /// Over the records of `db`.
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }

    fn matching(
        &self,
        request: &Request<wire::ListContainersRequest>,
    ) -> Result<Vec<Container>, Status> {
        let scope = scope_of(request)?;
        let filter = filter(&request.get_ref().filters)?;
        let found = self.db.containers().list(&scope, &filter);
        found.map_err(into_status)
    }
}

/// A request's container; what an update leaves out stays empty.
fn decode(container: wire::Container) -> Result<Container, Status> {
    let id = Identifier::new(&container.id).map_err(|e| invalid(format!("container.ID: {e}")))?;
    let runtime = container.runtime.unwrap_or_default();
    Ok(Container {
        id,
        labels: labels(container.labels),
        image: container.image,
        runtime: Runtime {
            name: runtime.name,
            options: runtime.options,
        },
        spec: container.spec.unwrap_or_default(),
        snapshotter: container.snapshotter,
        snapshot_key: container.snapshot_key,
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
        extensions: labels(container.extensions),
        sandbox_id: container.sandbox,
    })
}

fn encode(container: Container) -> wire::Container {
    wire::Container {
        id: container.id.as_str().to_owned(),
        labels: unordered(container.labels),
        image: container.image,
        runtime: Some(wire::container::Runtime {
            name: container.runtime.name,
            options: container.runtime.options,
        }),
        spec: Some(container.spec),
        snapshotter: container.snapshotter,
        snapshot_key: container.snapshot_key,
        created_at: Some(to_timestamp(container.created_at)),
        updated_at: Some(to_timestamp(container.updated_at)),
        extensions: container.extensions.into_iter().collect(),
        sandbox: container.sandbox_id,
    }
}

#[tonic::async_trait]
impl Containers for ContainersService {
    async fn get(
        &self,
        request: Request<wire::GetContainerRequest>,
    ) -> Result<Response<wire::GetContainerResponse>, Status> {
        let scope = scope_of(&request)?;
        let found = self.db.containers().get(&scope, &request.get_ref().id);
        Ok(Response::new(wire::GetContainerResponse {
            container: Some(encode(found.map_err(into_status)?)),
        }))
    }

    async fn list(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Result<Response<wire::ListContainersResponse>, Status> {
        let found = self.matching(&request)?;
        Ok(Response::new(wire::ListContainersResponse {
            containers: found.into_iter().map(encode).collect(),
        }))
    }

    type ListStreamStream = BoxStream<'static, Result<wire::ListContainerMessage, Status>>;

    async fn list_stream(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Result<Response<Self::ListStreamStream>, Status> {
        let found = self.matching(&request)?;
        let messages = stream::iter(found).map(|container| {
            Ok(wire::ListContainerMessage {
                container: Some(encode(container)),
            })
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn create(
        &self,
        request: Request<wire::CreateContainerRequest>,
    ) -> Result<Response<wire::CreateContainerResponse>, Status> {
        let scope = scope_of(&request)?;
        let container = decode(required(request.into_inner().container, "container")?)?;
        let created = self.db.containers().create(&scope, container).await;
        Ok(Response::new(wire::CreateContainerResponse {
            container: Some(encode(created.map_err(into_status)?)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateContainerRequest>,
    ) -> Result<Response<wire::UpdateContainerResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let mask = paths(request.update_mask);
        let container = decode(required(request.container, "container")?)?;
        let updated = self.db.containers().update(&scope, container, &mask).await;
        Ok(Response::new(wire::UpdateContainerResponse {
            container: Some(encode(updated.map_err(into_status)?)),
        }))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteContainerRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let id = &request.get_ref().id;
        let deleted = self.db.containers().delete(&scope, id).await;
        deleted.map(Response::new).map_err(into_status)
    }
}
