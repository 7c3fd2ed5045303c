//! `containerd.services.version.v1.Version`

use lighter_proto::containerd::services::version::v1::VersionResponse;
use lighter_proto::containerd::services::version::v1::version_server::Version;
use tonic::{Request, Response, Status};

/// Answers who we are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VersionService;

#[tonic::async_trait]
impl Version for VersionService {
    async fn version(&self, _request: Request<()>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            version: crate::VERSION.to_owned(),
            revision: crate::REVISION.to_owned(),
        }))
    }
}
