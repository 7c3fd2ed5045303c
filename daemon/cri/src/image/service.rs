//! `runtime.v1.ImageService`: decode, call, encode.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::errdefs::into_status;
use lighter_proto::runtime::v1 as api;
use lighter_proto::runtime::v1::image_service_server::ImageService;
use lighter_proto::time;
use tonic::{Request, Response, Status};

use super::Image;
use crate::deadline::{deadline, owned};
use crate::plugin::{Gate, Plugin};

/// Items in one message of a streamed list.
const BATCH: usize = 5000;

/// The service over the plugin.
#[derive(Debug, Clone)]
pub struct ImageEdge(pub Arc<Gate>);

fn encode(image: &Image) -> api::Image {
    let user = image.process.user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(uid) => (Some(api::Int64Value { value: uid }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    api::Image {
        id: image.id.clone(),
        repo_tags: image.tags(),
        repo_digests: image.digests(),
        size: image.size_bytes,
        uid,
        username,
        spec: Some(api::ImageSpec {
            image: image.id.clone(),
            ..Default::default()
        }),
        pinned: image.pinned,
    }
}

impl ImageEdge {
    fn listed(plugin: &Plugin, filter: Option<api::ImageFilter>) -> Vec<api::Image> {
        let wanted = filter
            .and_then(|f| f.image)
            .map(|s| s.image)
            .filter(|i| !i.is_empty());
        let images = &plugin.images;
        match wanted {
            Some(name) => images.find(&name).iter().map(encode).collect(),
            None => images.list().iter().map(encode).collect(),
        }
    }

    fn spec_name(spec: Option<api::ImageSpec>) -> Result<String, Status> {
        match spec.map(|s| s.image).filter(|name| !name.is_empty()) {
            Some(name) => Ok(name),
            None => Err(Status::invalid_argument(
                "image name is required: invalid argument",
            )),
        }
    }
}

/// Annotation of a pod or an image that names the handler which an image is for, from before CRI had a
/// field for that.
const HANDLER_ANNOTATION: &str = "io.containerd.cri.runtime-handler";

/// The handler that an image is pulled for; empty for the default one.
fn handler_of(request: &api::PullImageRequest) -> String {
    let image = request.image.as_ref();
    let named = image
        .map(|s| s.runtime_handler.as_str())
        .unwrap_or_default();
    if !named.is_empty() {
        return named.to_owned();
    }
    let pod = request.sandbox_config.as_ref().map(|c| &c.annotations);
    let annotations = pod.into_iter().chain(image.map(|s| &s.annotations));
    let mut found = annotations.filter_map(|a| a.get(HANDLER_ANNOTATION));
    found.next().cloned().unwrap_or_default()
}

#[tonic::async_trait]
impl ImageService for ImageEdge {
    type StreamImagesStream = BoxStream<'static, Result<api::StreamImagesResponse, Status>>;

    async fn list_images(
        &self,
        request: Request<api::ListImagesRequest>,
    ) -> Result<Response<api::ListImagesResponse>, Status> {
        let images = Self::listed(self.0.plugin()?, request.into_inner().filter);
        Ok(Response::new(api::ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<api::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = Self::listed(self.0.plugin()?, request.into_inner().filter);
        let batches: Vec<_> = images
            .chunks(BATCH)
            .map(|batch| {
                Ok(api::StreamImagesResponse {
                    images: batch.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(stream::iter(batches).boxed()))
    }

    async fn image_status(
        &self,
        request: Request<api::ImageStatusRequest>,
    ) -> Result<Response<api::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let name = Self::spec_name(request.image)?;
        let found = self.0.plugin()?.images.find(&name);
        let mut info = std::collections::HashMap::new();
        if let (true, Some(image)) = (request.verbose, &found) {
            let detail = serde_json::json!({ "chainID": image.chain_id, "imageSpec": { "config": image.process } });
            info.insert("info".to_owned(), detail.to_string());
        }
        Ok(Response::new(api::ImageStatusResponse {
            image: found.as_ref().map(encode),
            info,
        }))
    }

    async fn pull_image(
        &self,
        request: Request<api::PullImageRequest>,
    ) -> Result<Response<api::PullImageResponse>, Status> {
        let until = deadline(request.metadata());
        let request = request.into_inner();
        let handler = handler_of(&request);
        let name = Self::spec_name(request.image)?;
        let plugin = Arc::clone(self.0.plugin()?);
        let snapshotter = plugin.snapshotter_of(&handler);
        // A kubelet that hangs up must not leave half a pull to be repeated from the start.
        owned(&plugin.tracker.clone(), until, async move {
            let image_ref = plugin
                .images
                .pull(&name, request.auth.as_ref(), &snapshotter)
                .await?;
            Ok(api::PullImageResponse { image_ref })
        })
        .await
    }

    async fn remove_image(
        &self,
        request: Request<api::RemoveImageRequest>,
    ) -> Result<Response<api::RemoveImageResponse>, Status> {
        let name = Self::spec_name(request.into_inner().image)?;
        let plugin = Arc::clone(self.0.plugin()?);
        owned(&plugin.tracker.clone(), None, async move {
            plugin.images.remove(&name).await?;
            plugin.collect().await;
            Ok(api::RemoveImageResponse {})
        })
        .await
    }

    async fn image_fs_info(
        &self,
        _: Request<api::ImageFsInfoRequest>,
    ) -> Result<Response<api::ImageFsInfoResponse>, Status> {
        let limit = Duration::from_secs(30);
        let plugin = Arc::clone(self.0.plugin()?);
        let usage = tokio::time::timeout(limit, plugin.image_filesystems()).await;
        let usage =
            usage.map_err(|_| Status::deadline_exceeded("measuring the image filesystem"))?;
        let measured = usage.map_err(into_status)?.into_iter();
        let filesystems: Vec<_> = measured
            .map(|measured| api::FilesystemUsage {
                timestamp: time::to_nanos(measured.at),
                fs_id: Some(api::FilesystemIdentifier {
                    mountpoint: measured.root,
                }),
                used_bytes: Some(api::UInt64Value {
                    value: measured.usage.size_bytes,
                }),
                inodes_used: Some(api::UInt64Value {
                    value: measured.usage.inodes,
                }),
            })
            .collect();
        Ok(Response::new(api::ImageFsInfoResponse {
            image_filesystems: filesystems.clone(),
            container_filesystems: filesystems,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handler_of_a_pull_is_in_its_field_or_in_an_annotation() {
        let annotated = |name: &str| {
            std::collections::HashMap::from([(HANDLER_ANNOTATION.to_owned(), name.to_owned())])
        };
        let mut request = api::PullImageRequest::default();
        assert_eq!(handler_of(&request), "");
        request.image = Some(api::ImageSpec {
            annotations: annotated("image"),
            ..Default::default()
        });
        assert_eq!(handler_of(&request), "image");
        request.sandbox_config = Some(api::PodSandboxConfig {
            annotations: annotated("pod"),
            ..Default::default()
        });
        assert_eq!(handler_of(&request), "pod");
        request.image.as_mut().unwrap().runtime_handler = "field".to_owned();
        assert_eq!(handler_of(&request), "field");
    }
}
