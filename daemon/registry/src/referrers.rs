//! What refers to a manifest: signatures, attestations, and other artifacts.

use std::collections::BTreeMap;

use http::header::ACCEPT;
use http::{HeaderValue, Method, StatusCode};
use lighter_floor::Digest;
use serde::Deserialize;

use super::request::{self, Call, Place};
use super::session::{Endpoint, Session};
use super::{Error, MAX_MANIFEST_BYTES, Target};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Referrers of one manifest, at most.
const MAX_REFERRERS: usize = 4096;

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    artifact_type: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Session {
    /// Manifests that name `subject`, of the given artifact types (none: all).
    ///
    /// # Errors
    /// When no host answers sensibly; a registry that knows of none answers with an empty list.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_types: &[String],
    ) -> Result<Vec<Target>, Error> {
        let mut last = None;
        for (endpoint, place) in self.capable("referrers", |c| c.referrers)? {
            match self
                .referrers_at(endpoint, place, subject, artifact_types)
                .await
            {
                Ok(found) => return Ok(found),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("at least one host was tried"))
    }

    async fn referrers_at(
        &self,
        endpoint: &Endpoint,
        place: Place,
        subject: &Digest,
        artifact_types: &[String],
    ) -> Result<Vec<Target>, Error> {
        let (algorithm, hex) = (subject.algorithm().as_str(), subject.hex());
        // The second is where clients keep the list on registries without the first.
        let tails = [
            format!("referrers/{subject}"),
            format!("manifests/{algorithm}-{hex}"),
        ];
        for tail in tails {
            let mut url = endpoint.url(self.reference.repository(), &tail)?;
            if tail.starts_with("referrers/") {
                for artifact_type in artifact_types {
                    url.query_pairs_mut()
                        .append_pair("artifactType", artifact_type);
                }
            }
            let call = Call::new(Method::GET, url).header(ACCEPT, HeaderValue::from_static(INDEX));
            let response = self.send(endpoint, &call, place).await?;
            match response.status() {
                StatusCode::OK => {
                    let url = response.url().clone();
                    let limit = usize::try_from(MAX_MANIFEST_BYTES).expect("a few MiB");
                    let body = request::read_body(response, limit)
                        .await
                        .map_err(|cause| request::transport(&Method::GET, &url, cause))?;
                    return targets(&body, artifact_types);
                }
                StatusCode::NOT_FOUND => {}
                StatusCode::UNAUTHORIZED => return Err(Error::Denied),
                _ => return Err(request::status_error(&Method::GET, response).await),
            }
        }
        Ok(Vec::new())
    }
}

fn targets(body: &[u8], artifact_types: &[String]) -> Result<Vec<Target>, Error> {
    let index: Index = serde_json::from_slice(body).map_err(|error| Error::Protocol {
        reason: format!("referrers: {error}"),
    })?;
    index
        .manifests
        .into_iter()
        .take(MAX_REFERRERS)
        .filter(|entry| artifact_types.is_empty() || artifact_types.contains(&entry.artifact_type))
        .map(|entry| {
            Ok(Target {
                media_type: entry.media_type,
                digest: Digest::parse(&entry.digest).map_err(|error| Error::Protocol {
                    reason: format!("referrers: {error}"),
                })?,
                size_bytes: entry.size,
                urls: Vec::new(),
                annotations: entry.annotations,
            })
        })
        .collect()
}
