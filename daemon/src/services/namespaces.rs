//! `containerd.services.namespaces.v1.Namespaces`

use std::collections::BTreeMap;

use lighter_proto::containerd::services::namespaces::v1 as wire;
use lighter_proto::containerd::services::namespaces::v1::namespaces_server::Namespaces;
use lighter_proto::errdefs::into_status;
use lighter_store::metadata::Db;
use lighter_store::{Labels, Namespace};
use tonic::{Request, Response, Status};

use super::wire::{invalid, labels, paths, required, unordered};

/// Namespace records over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct NamespacesService {
    db: Db,
}

impl NamespacesService {
    /// Over the records of `db`.
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }
}

fn name(text: &str) -> Result<Namespace, Status> {
    Namespace::new(text).map_err(|error| invalid(format!("namespace validation: {error}")))
}

fn encode(name: &Namespace, labels: Labels) -> wire::Namespace {
    wire::Namespace {
        name: name.as_str().to_owned(),
        labels: unordered(labels),
    }
}

/// The labels that a mask names, with the request's values; the second says whether others go.
fn changes(
    mut given: Labels,
    mask: &[String],
) -> Result<(BTreeMap<String, Option<String>>, bool), Status> {
    if mask.is_empty() {
        let all = given.into_iter().map(|(key, value)| (key, Some(value)));
        return Ok((all.collect(), true));
    }
    let mut some = BTreeMap::new();
    for path in mask {
        let Some(key) = path.strip_prefix("labels.") else {
            return Err(invalid(format!(
                "cannot update {path:?} field on namespace"
            )));
        };
        let value = given.remove(key);
        if value.is_some() || !some.contains_key(key) {
            some.insert(key.to_owned(), value);
        }
    }
    Ok((some, false))
}

#[tonic::async_trait]
impl Namespaces for NamespacesService {
    async fn get(
        &self,
        request: Request<wire::GetNamespaceRequest>,
    ) -> Result<Response<wire::GetNamespaceResponse>, Status> {
        let name = name(&request.get_ref().name)?;
        let labels = self.db.namespaces().labels(&name).map_err(into_status)?;
        Ok(Response::new(wire::GetNamespaceResponse {
            namespace: Some(encode(&name, labels)),
        }))
    }

    async fn list(
        &self,
        _request: Request<wire::ListNamespacesRequest>,
    ) -> Result<Response<wire::ListNamespacesResponse>, Status> {
        let all = self.db.namespaces().list().map_err(into_status)?;
        Ok(Response::new(wire::ListNamespacesResponse {
            namespaces: all
                .into_iter()
                .map(|(name, labels)| encode(&name, labels))
                .collect(),
        }))
    }

    async fn create(
        &self,
        request: Request<wire::CreateNamespaceRequest>,
    ) -> Result<Response<wire::CreateNamespaceResponse>, Status> {
        let namespace = required(request.into_inner().namespace, "namespace")?;
        let name = name(&namespace.name)?;
        let namespaces = self.db.namespaces();
        let created = namespaces.create(&name, labels(namespace.labels)).await;
        created.map_err(into_status)?;
        let labels = namespaces.labels(&name).map_err(into_status)?;
        Ok(Response::new(wire::CreateNamespaceResponse {
            namespace: Some(encode(&name, labels)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateNamespaceRequest>,
    ) -> Result<Response<wire::UpdateNamespaceResponse>, Status> {
        let request = request.into_inner();
        let namespace = required(request.namespace, "namespace")?;
        let name = name(&namespace.name)?;
        let (labels, replace) = changes(labels(namespace.labels), &paths(request.update_mask))?;
        let updated = self.db.namespaces().update(&name, labels, replace).await;
        Ok(Response::new(wire::UpdateNamespaceResponse {
            namespace: Some(encode(&name, updated.map_err(into_status)?)),
        }))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteNamespaceRequest>,
    ) -> Result<Response<()>, Status> {
        let name = name(&request.get_ref().name)?;
        let deleted = self.db.namespaces().delete(&name).await;
        deleted.map(Response::new).map_err(into_status)
    }
}
