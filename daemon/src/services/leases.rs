//! `containerd.services.leases.v1.Leases`

use lighter_engine::gc::Collector;
use lighter_proto::containerd::services::leases::v1 as wire;
use lighter_proto::containerd::services::leases::v1::leases_server::Leases;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use lighter_store::metadata::{Db, Lease, Resource};
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{filter, labels, required, unordered};

/// Leases over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct LeasesService {
    db: Db,
    collector: Collector,
}

impl LeasesService {
    /// Over the records of `db`; synchronous deletes wait for `collector`.
    pub(crate) fn new(db: Db, collector: Collector) -> Self {
        Self { db, collector }
    }
}

fn encode(lease: Lease) -> wire::Lease {
    wire::Lease {
        id: lease.id,
        created_at: Some(to_timestamp(lease.created_at)),
        labels: unordered(lease.labels),
    }
}

fn resource(resource: Option<wire::Resource>) -> Result<Resource, Status> {
    let resource = required(resource, "resource")?;
    Ok(Resource {
        id: resource.id,
        kind: resource.r#type,
    })
}

#[tonic::async_trait]
impl Leases for LeasesService {
    async fn create(
        &self,
        request: Request<wire::CreateRequest>,
    ) -> Result<Response<wire::CreateResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let leases = self.db.leases();
        let created = leases
            .create(&scope, &request.id, labels(request.labels))
            .await;
        Ok(Response::new(wire::CreateResponse {
            lease: Some(encode(created.map_err(into_status)?)),
        }))
    }

    async fn delete(&self, request: Request<wire::DeleteRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.get_ref();
        let deleted = self.db.leases().delete(&scope, &request.id).await;
        deleted.map_err(into_status)?;
        if request.sync {
            self.collector.run_now().await.map_err(into_status)?;
        }
        Ok(Response::new(()))
    }

    async fn list(
        &self,
        request: Request<wire::ListRequest>,
    ) -> Result<Response<wire::ListResponse>, Status> {
        let scope = scope_of(&request)?;
        let filter = filter(&request.get_ref().filters)?;
        let found = self
            .db
            .leases()
            .list(&scope, &filter)
            .map_err(into_status)?;
        Ok(Response::new(wire::ListResponse {
            leases: found.into_iter().map(encode).collect(),
        }))
    }

    async fn add_resource(
        &self,
        request: Request<wire::AddResourceRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let resource = resource(request.resource)?;
        let added = self.db.leases().add(&scope, &request.id, resource).await;
        added.map(Response::new).map_err(into_status)
    }

    async fn delete_resource(
        &self,
        request: Request<wire::DeleteResourceRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let resource = resource(request.resource)?;
        let removed = self
            .db
            .leases()
            .remove(&scope, &request.id, &resource)
            .await;
        removed.map(Response::new).map_err(into_status)
    }

    async fn list_resources(
        &self,
        request: Request<wire::ListResourcesRequest>,
    ) -> Result<Response<wire::ListResourcesResponse>, Status> {
        let scope = scope_of(&request)?;
        let found = self.db.leases().resources(&scope, &request.get_ref().id);
        let resources = found.map_err(into_status)?.into_iter();
        Ok(Response::new(wire::ListResourcesResponse {
            resources: resources
                .map(|resource| wire::Resource {
                    id: resource.id,
                    r#type: resource.kind,
                })
                .collect(),
        }))
    }
}
