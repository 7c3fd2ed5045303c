//! A reference to a descriptor: what does this name mean on the registry now?

use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Method, StatusCode};
use lighter_floor::Digest;
use reqwest::Response;

use super::request::{self, Call, Place};
use super::session::{Endpoint, Session};
use super::{Error, MAX_MANIFEST_BYTES, Target};

pub(super) const ACCEPT_MANIFESTS: &str = "application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*";
const CONTENT_DIGEST: &str = "docker-content-digest";

impl Session {
    /// What the reference means.
    ///
    /// # Errors
    /// `NotFound` naming the reference; else the error of the host that got furthest.
    pub async fn resolve(&self) -> Result<Target, Error> {
        let reference = self.reference.clone().with_object()?;
        let digest = reference.digest();
        let endpoints = self.capable("pull", |c| c.pull && (digest.is_some() || c.resolve))?;
        let object = match (&digest, reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => String::new(),
        };
        let mut places = vec!["manifests"];
        if digest.is_some() {
            places.push("blobs");
        }
        let mut worst: Option<Error> = None;
        let mut all_missing = true;
        for kind in places {
            for (endpoint, place) in &endpoints {
                let tail = format!("{kind}/{object}");
                match self
                    .resolve_at(endpoint, &tail, digest.as_ref(), *place)
                    .await
                {
                    Ok(target) => return Ok(target),
                    Err(error) => {
                        tracing::debug!(host = %endpoint.host.authority, %error, "not resolved");
                        // Docker's registry answers 500 to a manifest that is a blob.
                        all_missing &= matches!(&error, Error::NotFound { .. })
                            || matches!(&error, Error::Status { status, .. } if status.as_u16() == 500);
                        let further = worst
                            .as_ref()
                            .is_none_or(|w| error.progress() > w.progress());
                        if further {
                            worst = Some(error);
                        }
                    }
                }
            }
            // Blobs are asked only when all agree that there is no such manifest.
            if !all_missing {
                break;
            }
        }
        Err(worst.expect("at least one host was tried"))
    }

    async fn resolve_at(
        &self,
        endpoint: &Endpoint,
        tail: &str,
        digest: Option<&Digest>,
        place: Place,
    ) -> Result<Target, Error> {
        let url = endpoint.url(self.reference.repository(), tail)?;
        let accept = HeaderValue::from_static(ACCEPT_MANIFESTS);
        let head = Call::new(Method::HEAD, url.clone()).header(ACCEPT, accept.clone());
        let get = Call::new(Method::GET, url).header(ACCEPT, accept);
        let response = self.send(endpoint, &head, place).await?;
        let response = match response.status() {
            StatusCode::METHOD_NOT_ALLOWED => self.send(endpoint, &get, place).await?,
            // A HEAD has no body to say why.
            StatusCode::FORBIDDEN => {
                let refused = self.send(endpoint, &get, place).await?;
                if refused.status().is_success() {
                    response
                } else {
                    refused
                }
            }
            _ => response,
        };
        self.check(&response)?;
        if !response.status().is_success() {
            return Err(request::status_error(&Method::HEAD, response).await);
        }
        let stated = stated(&response, digest)?;
        let target = match stated {
            Some(target) => target,
            None => {
                let response = self.send(endpoint, &get, place).await?;
                self.check(&response)?;
                if !response.status().is_success() {
                    return Err(request::status_error(&Method::GET, response).await);
                }
                self.measured(response, digest).await?
            }
        };
        let limited = tail.starts_with("manifests/");
        if limited && target.size_bytes > MAX_MANIFEST_BYTES {
            return Err(Error::ManifestTooLarge {
                reference: self.reference.to_string(),
                size_bytes: target.size_bytes,
            });
        }
        Ok(target)
    }

    /// Statuses that have an error of their own.
    pub(super) fn check(&self, response: &Response) -> Result<(), Error> {
        match response.status() {
            StatusCode::NOT_FOUND => Err(Error::NotFound {
                what: self.reference.to_string(),
            }),
            StatusCode::UNAUTHORIZED => Err(Error::Denied),
            _ => Ok(()),
        }
    }

    /// Reads a manifest that came without digest or length, and hashes it.
    async fn measured(&self, response: Response, digest: Option<&Digest>) -> Result<Target, Error> {
        let media_type = media_type(&response);
        let url = response.url().clone();
        let limit = usize::try_from(MAX_MANIFEST_BYTES + 1).expect("a few MiB");
        let body = request::read_body(response, limit)
            .await
            .map_err(|source| request::transport(&Method::GET, &url, source))?;
        let got = Digest::of(&body);
        let want = digest.unwrap_or(&got).clone();
        if want.algorithm() == got.algorithm() && want != got {
            return Err(Error::Digest { got, want });
        }
        Ok(Target {
            media_type,
            digest: want,
            size_bytes: body.len() as u64,
            urls: Vec::new(),
            annotations: std::collections::BTreeMap::new(),
        })
    }
}

fn media_type(response: &Response) -> String {
    let value = response.headers().get(CONTENT_TYPE);
    let text = value
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().to_owned()
}

/// The descriptor the headers give; `None` when one is missing.
fn stated(response: &Response, digest: Option<&Digest>) -> Result<Option<Target>, Error> {
    let headers = response.headers();
    let digest = match (digest, headers.get(CONTENT_DIGEST)) {
        (Some(digest), _) => digest.clone(),
        (None, Some(value)) => {
            let text = value.to_str().unwrap_or_default();
            Digest::parse(text).map_err(|error| Error::Protocol {
                reason: format!("invalid digest in header: {error}"),
            })?
        }
        (None, None) => return Ok(None),
    };
    let size_bytes = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    Ok(size_bytes.map(|size_bytes| Target {
        media_type: media_type(response),
        digest,
        size_bytes,
        urls: Vec::new(),
        annotations: std::collections::BTreeMap::new(),
    }))
}
