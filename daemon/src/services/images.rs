//! `containerd.services.images.v1.Images`

use std::time::SystemTime;

use lighter_engine::gc::Collector;
use lighter_proto::containerd::services::images::v1 as wire;
use lighter_proto::containerd::services::images::v1::images_server::Images;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use lighter_store::metadata::images::Changes;
use lighter_store::metadata::{Db, Image};
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{
    descriptor, encode_descriptor, filter, labels, optional_digest, paths, required, stamp,
    unordered,
};

/// Image records over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct ImagesService {
    db: Db,
    collector: Collector,
}

impl ImagesService {
    /// Over the records of `db`; synchronous deletes wait for `collector`.
    pub(crate) fn new(db: Db, collector: Collector) -> Self {
        Self { db, collector }
    }
}

fn encode(image: Image) -> wire::Image {
    wire::Image {
        name: image.name,
        labels: unordered(image.labels),
        target: Some(encode_descriptor(image.target)),
        created_at: Some(to_timestamp(image.created_at)),
        updated_at: Some(to_timestamp(image.updated_at)),
    }
}

#[tonic::async_trait]
impl Images for ImagesService {
    async fn get(
        &self,
        request: Request<wire::GetImageRequest>,
    ) -> Result<Response<wire::GetImageResponse>, Status> {
        let scope = scope_of(&request)?;
        let found = self.db.images().get(&scope, &request.get_ref().name);
        Ok(Response::new(wire::GetImageResponse {
            image: Some(encode(found.map_err(into_status)?)),
        }))
    }

    async fn list(
        &self,
        request: Request<wire::ListImagesRequest>,
    ) -> Result<Response<wire::ListImagesResponse>, Status> {
        let scope = scope_of(&request)?;
        let filter = filter(&request.get_ref().filters)?;
        let found = self
            .db
            .images()
            .list(&scope, &filter)
            .map_err(into_status)?;
        Ok(Response::new(wire::ListImagesResponse {
            images: found.into_iter().map(encode).collect(),
        }))
    }

    async fn create(
        &self,
        request: Request<wire::CreateImageRequest>,
    ) -> Result<Response<wire::CreateImageResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let stamp = stamp(request.source_date_epoch)?;
        let image = required(request.image, "image")?;
        let image = Image {
            name: image.name,
            labels: labels(image.labels),
            target: descriptor(required(image.target, "image.Target")?)?,
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
        };
        let created = self.db.images().create(&scope, image, stamp).await;
        Ok(Response::new(wire::CreateImageResponse {
            image: Some(encode(created.map_err(into_status)?)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateImageRequest>,
    ) -> Result<Response<wire::UpdateImageResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let stamp = stamp(request.source_date_epoch)?;
        let mask = paths(request.update_mask);
        let image = required(request.image, "image")?;
        let annotations = image.target.as_ref().map(|t| t.annotations.clone());
        let whole = mask.is_empty() || mask.iter().any(|path| path == "target");
        let changes = Changes {
            labels: labels(image.labels),
            annotations: labels(annotations.unwrap_or_default()),
            // A mask without the target may come with half of one.
            target: image.target.filter(|_| whole).map(descriptor).transpose()?,
        };
        let images = self.db.images();
        let updated = images
            .change(&scope, &image.name, &changes, &mask, stamp)
            .await;
        Ok(Response::new(wire::UpdateImageResponse {
            image: Some(encode(updated.map_err(into_status)?)),
        }))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteImageRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let target = optional_digest(&request.target.unwrap_or_default().digest)?;
        let images = self.db.images();
        let deleted = images.delete(&scope, &request.name, target.as_ref()).await;
        deleted.map_err(into_status)?;
        if request.sync {
            self.collector.run_now().await.map_err(into_status)?;
        }
        Ok(Response::new(()))
    }
}
