//! `lighter.disk.v1.Disk`: what keeps objects, what uses the disk, and getting it back.

use std::path::PathBuf;
use std::time::Duration;

use lighter_engine::gc::{Collector, Prune};
use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use lighter_proto::lighter::disk::v1 as wire;
use lighter_proto::lighter::disk::v1::disk_server::Disk;
use lighter_store::Namespace;
use lighter_store::metadata::edges::{Kind, Node};
use tonic::{Request, Response, Status};

use super::scope::{NAMESPACE_HEADER, scope_of};
use super::wire::invalid;

/// Answers about the disk.
#[derive(Debug, Clone)]
pub(crate) struct DiskService {
    collector: Collector,
    root: PathBuf,
}

impl DiskService {
    /// Over what `collector` knows; `root` is the daemon's directory.
    pub(crate) fn new(collector: Collector, root: PathBuf) -> Self {
        Self { collector, root }
    }
}

fn encode(node: &Node) -> wire::Object {
    wire::Object {
        r#type: node.kind.as_str().to_owned(),
        id: node.id.to_string(),
        namespace: node.namespace.to_string(),
    }
}

/// The request's namespace; `None`, for all, without the header.
fn namespace_of<T>(request: &Request<T>) -> Result<Option<Namespace>, Status> {
    if request.metadata().contains_key(NAMESPACE_HEADER) {
        return Ok(Some(scope_of(request)?.namespace));
    }
    Ok(None)
}

#[tonic::async_trait]
impl Disk for DiskService {
    async fn why(
        &self,
        request: Request<wire::WhyRequest>,
    ) -> Result<Response<wire::WhyResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let kind = Kind::parse(&request.r#type).ok_or_else(|| {
            let known: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
            invalid(format!(
                "type {:?} is none of {}",
                request.r#type,
                known.join(", ")
            ))
        })?;
        let node = Node::new(kind, scope.namespace.as_str(), &request.id);
        let missing = format!("{node}");
        let path = self.collector.why(node).await.map_err(into_status)?;
        let path = path.ok_or_else(|| into_status(WireError::new(ErrorKind::NotFound, missing)))?;
        let step = |step: &lighter_engine::gc::Step| wire::Step {
            object: Some(encode(&step.node)),
            reason: step.reason.clone(),
        };
        Ok(Response::new(wire::WhyResponse {
            path: path.iter().map(step).collect(),
        }))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let namespace = namespace_of(&request)?;
        let used = self.collector.disk_usage(namespace).await;
        let used = used.map_err(into_status)?;
        let filesystem = nix::sys::statvfs::statvfs(&self.root).ok();
        let bytes = |blocks: fn(&nix::sys::statvfs::Statvfs) -> u64| {
            filesystem
                .as_ref()
                .map_or(0, |f| blocks(f) * f.fragment_size())
        };
        let kinds = used.kinds.into_iter().map(|used| wire::KindUsage {
            namespace: used.namespace,
            kind: used.kind,
            count: used.count,
            size: used.bytes,
            reclaimable_count: used.garbage_count,
            reclaimable_size: used.garbage_bytes,
        });
        let images = used.images.into_iter().map(|used| wire::ImageUsage {
            namespace: used.namespace,
            name: used.name,
            content_size: used.content_bytes,
            snapshot_size: used.snapshot_bytes,
            unique_size: used.unique_bytes,
            containers: used.containers,
        });
        Ok(Response::new(wire::UsageResponse {
            kinds: kinds.collect(),
            images: images.collect(),
            filesystem_size: bytes(nix::sys::statvfs::Statvfs::blocks),
            filesystem_available: bytes(nix::sys::statvfs::Statvfs::blocks_available),
            content_size: used.content_bytes,
        }))
    }

    async fn prune(
        &self,
        request: Request<wire::PruneRequest>,
    ) -> Result<Response<wire::PruneResponse>, Status> {
        let namespace = namespace_of(&request)?;
        let request = request.into_inner();
        let older = request.leases_older_than_seconds;
        let prune = Prune {
            namespace,
            images: request.images,
            leases_older: (older > 0).then(|| Duration::from_secs(older)),
            labelled_content: request.labelled_content,
            labelled_snapshots: request.labelled_snapshots,
            dry_run: request.dry_run,
        };
        let pruned = self.collector.prune(&prune).await.map_err(into_status)?;
        let removed = pruned.removed.iter().map(|(node, bytes)| wire::Removed {
            object: Some(encode(node)),
            size: *bytes,
        });
        Ok(Response::new(wire::PruneResponse {
            removed: removed.collect(),
            freed: pruned.freed_bytes,
        }))
    }
}
