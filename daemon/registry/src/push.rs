//! Uploads: blobs in one `PUT` each (or mounted from a neighbouring repository), manifests by tag
//! or digest. Everything goes to the first host that takes pushes.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Method, StatusCode};
use lighter_floor::Digest;
use reqwest::{Response, Url};

use super::request::{self, BodySource, Call, Place};
use super::session::{Endpoint, Session};
use super::{Error, Target};

/// Opens a blob for reading from its start; called anew for every attempt.
pub type Open = Arc<dyn Fn() -> BoxStream<'static, io::Result<Bytes>> + Send + Sync>;

/// A blob to upload.
#[derive(Clone)]
pub struct Blob {
    /// What it is.
    pub target: Target,
    /// Repository on the same host that may have it already.
    pub mount_from: Option<String>,
    /// Its bytes.
    pub open: Open,
    /// Bytes sent so far, for whoever shows progress.
    pub sent: Arc<AtomicU64>,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob")
            .field("target", &self.target)
            .field("mount_from", &self.mount_from)
            .finish_non_exhaustive()
    }
}

/// How something got to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Existed,
    /// It was mounted from another repository.
    Mounted,
    /// It was sent.
    Uploaded,
}

impl Session {
    fn push_endpoint(&self) -> Result<&Endpoint, Error> {
        Ok(self.capable("push", |c| c.push)?[0].0)
    }

    /// Uploads a blob unless the repository has it.
    ///
    /// # Errors
    /// When the registry refuses.
    pub async fn push_blob(&self, blob: &Blob) -> Result<Pushed, Error> {
        let endpoint = self.push_endpoint()?;
        let tail = format!("blobs/{}", blob.target.digest);
        if self.exists(endpoint, &tail, &blob.target, None).await? {
            return Ok(Pushed::Existed);
        }
        let begun = match &blob.mount_from {
            Some(from) => match self
                .begin(endpoint, Some((&blob.target.digest, from)))
                .await
            {
                Err(
                    Error::Denied
                    | Error::Refused { .. }
                    | Error::Token { .. }
                    | Error::Status { .. },
                ) => self.begin(endpoint, None).await?,
                other => other?,
            },
            None => self.begin(endpoint, None).await?,
        };
        let Some(location) = begun else {
            return Ok(Pushed::Mounted);
        };
        self.put_blob(endpoint, blob, location).await?;
        Ok(Pushed::Uploaded)
    }

    /// Begins an upload; `None` when the blob was mounted instead.
    async fn begin(
        &self,
        endpoint: &Endpoint,
        mount: Option<(&Digest, &str)>,
    ) -> Result<Option<Url>, Error> {
        let mut url = endpoint.url(self.reference.repository(), "blobs/uploads/")?;
        let mut scopes = Vec::new();
        if let Some((digest, from)) = mount {
            url.query_pairs_mut()
                .append_pair("mount", digest.as_str())
                .append_pair("from", from);
            scopes.push(format!("repository:{from}:pull"));
        }
        let mut call =
            Call::new(Method::POST, url).header(CONTENT_LENGTH, HeaderValue::from_static("0"));
        call.scopes = scopes;
        let response = self.send(endpoint, &call, Place::Last).await?;
        match response.status() {
            StatusCode::CREATED if mount.is_some() => Ok(None),
            StatusCode::ACCEPTED
            | StatusCode::OK
            | StatusCode::CREATED
            | StatusCode::NO_CONTENT => upload_location(&response).map(Some),
            StatusCode::UNAUTHORIZED => Err(Error::Denied),
            _ => Err(request::status_error(&Method::POST, response).await),
        }
    }

    async fn put_blob(
        &self,
        endpoint: &Endpoint,
        blob: &Blob,
        mut location: Url,
    ) -> Result<(), Error> {
        location
            .query_pairs_mut()
            .append_pair("digest", blob.target.digest.as_str());
        let own = endpoint.url(self.reference.repository(), "")?;
        let trusted = location.host() == own.host()
            && location.port_or_known_default() == own.port_or_known_default()
            && location.scheme() == own.scheme();
        let open = Arc::clone(&blob.open);
        let sent = Arc::clone(&blob.sent);
        let body: BodySource = Arc::new(move || {
            sent.store(0, Ordering::Relaxed);
            let sent = Arc::clone(&sent);
            reqwest::Body::wrap_stream(open().inspect(move |piece| {
                if let Ok(piece) = piece {
                    sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
            }))
        });
        let mut call = Call::new(Method::PUT, location)
            .header(
                CONTENT_TYPE,
                HeaderValue::from_static("application/octet-stream"),
            )
            .header(CONTENT_LENGTH, HeaderValue::from(blob.target.size_bytes));
        call.trusted = trusted;
        call.body = Some(body);
        let response = self.send(endpoint, &call, Place::Last).await?;
        self.accepted(response).await
    }

    /// Uploads a manifest under `tag`, or by its digest, unless it is there.
    ///
    /// # Errors
    /// When the registry refuses.
    pub async fn push_manifest(
        &self,
        target: &Target,
        bytes: Bytes,
        tag: Option<&str>,
    ) -> Result<Pushed, Error> {
        let endpoint = self.push_endpoint()?;
        let object = tag.unwrap_or(target.digest.as_str());
        let tail = format!("manifests/{object}");
        if self.exists(endpoint, &tail, target, tag).await? {
            return Ok(Pushed::Existed);
        }
        let url = endpoint.url(self.reference.repository(), &tail)?;
        let media_type = HeaderValue::from_str(&target.media_type).map_err(|_| Error::Invalid {
            reason: format!("media type {:?}", target.media_type),
        })?;
        let mut call = Call::new(Method::PUT, url).header(CONTENT_TYPE, media_type);
        call.body = Some(Arc::new(move || reqwest::Body::from(bytes.clone())));
        let response = self.send(endpoint, &call, Place::Last).await?;
        self.accepted(response).await?;
        Ok(Pushed::Uploaded)
    }

    async fn accepted(&self, response: Response) -> Result<(), Error> {
        match response.status() {
            StatusCode::OK | StatusCode::CREATED | StatusCode::NO_CONTENT => Ok(()),
            StatusCode::UNAUTHORIZED => Err(Error::Denied),
            _ => Err(request::status_error(&Method::PUT, response).await),
        }
    }

    async fn exists(
        &self,
        endpoint: &Endpoint,
        tail: &str,
        target: &Target,
        tag: Option<&str>,
    ) -> Result<bool, Error> {
        let accept = match target.media_type.as_str() {
            "" => "*/*".to_owned(),
            media_type => format!("{media_type}, */*"),
        };
        let accept = HeaderValue::from_str(&accept).map_err(|_| Error::Invalid {
            reason: format!("media type {:?}", target.media_type),
        })?;
        let url = endpoint.url(self.reference.repository(), tail)?;
        let call = Call::new(Method::HEAD, url).header(ACCEPT, accept);
        let response = self.send(endpoint, &call, Place::Last).await?;
        match response.status() {
            status if status.is_success() => {
                let stated = response.headers().get("docker-content-digest");
                Ok(tag.is_none()
                    || stated.is_some_and(|d| d.as_bytes() == target.digest.as_str().as_bytes()))
            }
            StatusCode::NOT_FOUND => Ok(false),
            StatusCode::UNAUTHORIZED => Err(Error::Denied),
            _ => Err(request::status_error(&Method::HEAD, response).await),
        }
    }
}

/// `Location` may be absolute, a path, or lack the scheme.
fn upload_location(response: &Response) -> Result<Url, Error> {
    let base = response.url();
    let text = response
        .headers()
        .get(LOCATION)
        .and_then(|value| value.to_str().ok());
    let parsed = text.and_then(|text| {
        if text.starts_with('/') || text.contains("://") {
            base.join(text).ok()
        } else {
            Url::parse(&format!("{}://{text}", base.scheme())).ok()
        }
    });
    parsed
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| Error::Protocol {
            reason: "upload began without a usable Location".to_owned(),
        })
}
