//! `containerd.services.containers.v1.Containers`

use std::convert::Infallible;
use std::task::Poll;
use std::time::SystemTime;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::containerd::services::containers::v1 as wire;
use lighter_proto::containerd::services::containers::v1::containers_server::{
    Containers, ContainersServer, SERVICE_NAME,
};
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use lighter_store::Identifier;
use lighter_store::metadata::{Container, Db, EncodedContainers, Runtime};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};

use crate::config::MessageLimits;

use super::encoded;
use super::scope::scope_of;
use super::wire::{filter, invalid, labels, paths, required, unordered};

/// Container records over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct ContainersService {
    db: Db,
}

impl ContainersService {
    fn found(&self, request: &Request<wire::GetContainerRequest>) -> Result<Bytes, Status> {
        let scope = scope_of(request)?;
        let found = self.db.containers();
        let found = found.get_encoded(&scope, &request.get_ref().id);
        found.map_err(into_status)
    }

    fn matching(
        &self,
        request: &Request<wire::ListContainersRequest>,
    ) -> Result<EncodedContainers, Status> {
        let scope = scope_of(request)?;
        let filter = filter(&request.get_ref().filters)?;
        let found = self.db.containers().list_encoded(&scope, &filter);
        found.map_err(into_status)
    }
}

/// The service as it is served: what reads is answered with bytes as they are stored, and the rest
/// by the generated server.
#[derive(Debug, Clone)]
pub(crate) struct ContainersEdge {
    service: ContainersService,
    rest: ContainersServer<ContainersService>,
    limits: MessageLimits,
}

impl ContainersEdge {
    /// Over the records of `db`.
    pub(crate) fn new(db: Db, limits: MessageLimits) -> Self {
        let service = ContainersService { db };
        let rest = ContainersServer::new(service.clone())
            .max_decoding_message_size(limits.receive_bytes)
            .max_encoding_message_size(limits.send_bytes);
        Self {
            service,
            rest,
            limits,
        }
    }
}

impl NamedService for ContainersEdge {
    const NAME: &'static str = SERVICE_NAME;
}

impl tower::Service<http::Request<Body>> for ContainersEdge {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (service, limits) = (self.service.clone(), self.limits);
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        match method {
            "Get" => {
                let answer = encoded::Unary(move |request: Request<_>| service.found(&request));
                encoded::unary(answer, limits, request).boxed()
            }
            "List" => {
                let answer = encoded::Unary(move |request: Request<_>| {
                    service.matching(&request).map(EncodedContainers::joined)
                });
                encoded::unary(answer, limits, request).boxed()
            }
            "ListStream" => {
                let answer = encoded::Streaming(move |request: Request<_>| {
                    service.matching(&request).map(EncodedContainers::split)
                });
                encoded::streaming(answer, limits, request).boxed()
            }
            _ => self.rest.call(request),
        }
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
        encoded::decoded(self.found(&request)?)
    }

    async fn list(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Result<Response<wire::ListContainersResponse>, Status> {
        encoded::decoded(self.matching(&request)?.joined())
    }

    type ListStreamStream = BoxStream<'static, Result<wire::ListContainerMessage, Status>>;

    async fn list_stream(
        &self,
        request: Request<wire::ListContainersRequest>,
    ) -> Result<Response<Self::ListStreamStream>, Status> {
        let found = self.matching(&request)?.split();
        let messages = found.map(|message| encoded::decoded(message).map(Response::into_inner));
        Ok(Response::new(stream::iter(messages).boxed()))
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
