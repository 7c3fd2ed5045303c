//! Pulling: credentials of the request, one download for many callers, three records.

use async_trait::async_trait;
use base64::Engine as _;
use lighter_engine::image::children::Layers;
use lighter_engine::image::{self, Matcher, Tracker};
use lighter_engine::registry::reference::Named;
use lighter_engine::registry::{Anonymous, SessionOptions};
use lighter_engine::registry::{Credential, CredentialRequest, Credentials, Secret};
use lighter_engine::transfer::{self, NewImage, Pull, Select, UnpackRequest};
use lighter_proto::errdefs::{Classify as _, ErrorKind, render};
use lighter_proto::runtime::v1::AuthConfig;
use lighter_store::Labels;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Images, MANAGED_LABEL, PINNED_LABEL};
use crate::config;
use crate::error::{Error, Result};

/// Pulls, for metrics.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Under way.
    pub(crate) running: AtomicU64,
    /// Done.
    pub(crate) succeeded: AtomicU64,
    /// Failed.
    pub(crate) failed: AtomicU64,
    /// Bytes of the images pulled, and milliseconds that took.
    pub(crate) bytes: AtomicU64,
    /// See `bytes`.
    pub(crate) millis: AtomicU64,
}

/// One pull that is counted as running.
struct Running<'a>(&'a Counts);

impl<'a> Running<'a> {
    fn new(counts: &'a Counts) -> Self {
        counts.running.fetch_add(1, Ordering::Relaxed);
        Self(counts)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How often the progress of a pull is looked at.
const PROGRESS_LOOK: Duration = Duration::from_secs(1);

/// The credentials of one pull, for the host they are meant for.
#[derive(Debug)]
struct Given {
    host: String,
    credential: Credential,
}

#[async_trait]
impl Credentials for Given {
    async fn credential(
        &self,
        request: &CredentialRequest,
    ) -> std::result::Result<Credential, lighter_engine::registry::Error> {
        let meant = self.host.is_empty() || self.host == request.host;
        Ok(if meant {
            self.credential.clone()
        } else {
            Credential::None
        })
    }
}

/// What the kubelet sent, as a source of credentials.
///
/// # Errors
/// For an `auth` that is not base64 of `user:password`.
fn credentials(given: Option<&AuthConfig>) -> Result<Arc<dyn Credentials>> {
    let Some(given) = given else {
        return Ok(Arc::new(Anonymous));
    };
    let credential = if !given.username.is_empty() {
        Credential::Basic {
            username: given.username.clone(),
            password: Secret::new(given.password.clone()),
        }
    } else if !given.identity_token.is_empty() {
        Credential::Refresh(Secret::new(given.identity_token.clone()))
    } else if !given.auth.is_empty() {
        let bad = || Error::unknown("invalid auth: not base64 of user:password");
        let text = base64::engine::general_purpose::STANDARD
            .decode(&given.auth)
            .map_err(|_| bad())?;
        let text = String::from_utf8(text).map_err(|_| bad())?;
        let (username, password) = text.split_once(':').ok_or_else(bad)?;
        Credential::Basic {
            username: username.to_owned(),
            password: Secret::new(password.trim_end_matches('\0')),
        }
    } else {
        Credential::None
    };
    let server = given
        .server_address
        .split_once("://")
        .map_or(given.server_address.as_str(), |(_, rest)| rest);
    let host = server.split('/').next().unwrap_or_default().to_owned();
    Ok(Arc::new(Given { host, credential }))
}

/// The word that CRI defines for a failure: it comes first in the message.
fn marker(error: &transfer::Error) -> Option<&'static str> {
    use lighter_engine::registry::Error as Registry;
    let of_registry = |error: &Registry| match error {
        Registry::Transport { .. } => true,
        Registry::Status { status, .. } => status.is_server_error(),
        _ => false,
    };
    match error {
        transfer::Error::Blocked { .. } => Some("SignatureValidationFailed"),
        transfer::Error::Resolve(e) | transfer::Error::Registry(e) if of_registry(e) => {
            Some("RegistryUnavailable")
        }
        _ => None,
    }
}

/// Ends when blobs are being downloaded and no byte came for `limit`; never without a limit.
async fn stalled(tracker: &Tracker, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    let mut loading = BTreeSet::new();
    let mut last = Instant::now();
    loop {
        tokio::time::sleep(PROGRESS_LOOK.min(limit)).await;
        let events = tracker.drain();
        if !events.is_empty() {
            last = Instant::now();
        }
        for event in events {
            if event.event == "downloading" {
                loading.insert(event.name);
            } else {
                loading.remove(&event.name);
            }
        }
        if loading.is_empty() {
            last = Instant::now();
        } else if last.elapsed() >= limit {
            return;
        }
    }
}

impl Images {
    /// How long no byte may come; `None` for ever.
    fn progress_limit(&self) -> Result<Option<Duration>> {
        let text = &self.config.image_pull_progress_timeout;
        let limit = config::duration("image_pull_progress_timeout", text)?;
        Ok(limit.filter(|l| !l.is_zero()))
    }

    /// Pulls `text` and returns its image id. Callers that pull the same bytes share the work.
    ///
    /// # Errors
    /// `NotFound` for an image that does not exist; otherwise without a class, as the kubelet
    /// expects.
    pub async fn pull(
        &self,
        text: &str,
        auth: Option<&AuthConfig>,
        snapshotter: &str,
    ) -> Result<String> {
        let (counts, begun) = (&self.pulls, Instant::now());
        let _running = Running::new(counts);
        let pulled = self.pull_now(text, auth, snapshotter).await;
        match &pulled {
            Ok(id) => {
                counts.succeeded.fetch_add(1, Ordering::Relaxed);
                let size = self.find(id).map_or(0, |image| image.size_bytes);
                counts.bytes.fetch_add(size, Ordering::Relaxed);
                let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                counts.millis.fetch_add(took, Ordering::Relaxed);
            }
            Err(_) => {
                counts.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        pulled
    }

    async fn pull_now(
        &self,
        text: &str,
        auth: Option<&AuthConfig>,
        snapshotter: &str,
    ) -> Result<String> {
        let named = Named::parse(text).map_err(|e| {
            Error::unknown(format!("failed to parse image reference {text:?}: {e}"))
        })?;
        let reference = named.canonical();
        let limit = self.progress_limit()?;
        let pull = Pull {
            reference: reference.clone(),
            session: SessionOptions {
                credentials: credentials(auth)?,
                headers: self.headers(),
                host_dir: self.config.registry.config_path.clone().into(),
                ..SessionOptions::default()
            },
            select: Select::host(),
            unpacks: vec![UnpackRequest {
                matcher: Matcher::host(),
                snapshotter: snapshotter.to_owned(),
            }],
            layers: if self.config.discard_unpacked_layers {
                Layers::Discard
            } else {
                Layers::Keep
            },
            hint: !self.config.disable_snapshot_annotations,
        };
        let failed = |kind: ErrorKind, detail: String| {
            let kind = if kind == ErrorKind::NotFound {
                kind
            } else {
                ErrorKind::Unknown
            };
            Error::new(
                kind,
                format!("failed to pull and unpack image {reference:?}: {detail}"),
            )
        };
        let lease = self
            .transfer
            .lease(&self.scope)
            .await
            .map_err(|e| failed(e.kind(), render(&e)))?;
        let tracker = Tracker::watched();
        let pulled = tokio::select! {
            pulled = self.transfer.pull(lease.scope(), pull, &tracker) => Some(pulled),
            () = stalled(&tracker, limit) => None,
        };
        let recorded = match pulled {
            Some(Ok(pulled)) => match self.suits(lease.scope(), &pulled).await {
                Ok(()) => self.record(lease.scope(), &named, &pulled).await,
                Err(error) => Err(failed(error.kind(), error.to_string())),
            },
            Some(Err(error)) => {
                let error_kind = error.kind();
                Err(match marker(&error) {
                    Some(marker) => failed(error_kind, render(&error)).context(marker),
                    None => failed(error_kind, render(&error)),
                })
            }
            None => {
                let detail = "no progress for too long (image_pull_progress_timeout)".to_owned();
                Err(failed(ErrorKind::Unknown, detail).context("RegistryUnavailable"))
            }
        };
        lease.release().await;
        recorded
    }

    /// Whether containers can be made from what was pulled.
    async fn suits(&self, scope: &lighter_store::Scope, pulled: &transfer::Pulled) -> Result<()> {
        let (content, matcher) = (self.db.content(), Matcher::host());
        let resolved = image::resolve(&content, scope, &pulled.target, &matcher).await;
        let resolved = resolved.map_err(|e| Error::new(e.kind(), render(&e)))?;
        super::check_platform(&resolved, &matcher)
    }

    fn headers(&self) -> std::collections::BTreeMap<String, String> {
        let pairs = self.config.registry.headers.iter();
        pairs
            .filter_map(|(k, v)| Some((k.clone(), v.first()?.clone())))
            .collect()
    }

    /// Records what was pulled under its id, its tag and its digest.
    async fn record(
        &self,
        scope: &lighter_store::Scope,
        named: &Named,
        pulled: &transfer::Pulled,
    ) -> Result<String> {
        let Some(manifest) = pulled.manifests.first() else {
            return Err(Error::not_found(format!(
                "{}: no manifest for this platform",
                named.name()
            )));
        };
        let id = manifest.config.digest.to_string();
        let repository = format!("{}/{}", named.domain(), named.path());
        let mut names = vec![id.clone(), format!("{repository}@{}", pulled.target.digest)];
        if named.digest().is_none() {
            names.push(named.canonical());
        }
        let mut labels = Labels::from([(MANAGED_LABEL.0.to_owned(), MANAGED_LABEL.1.to_owned())]);
        if names.iter().any(|name| self.is_pinned(name)) {
            labels.insert(PINNED_LABEL.0.to_owned(), PINNED_LABEL.1.to_owned());
        }
        for name in names {
            let image = NewImage {
                name: name.clone(),
                labels: labels.clone(),
            };
            let recorded = self.transfer.record(scope, image, &pulled.target).await;
            recorded.map_err(|e| Error::unknown(render(&e)))?;
            self.refresh(&name).await;
        }
        Ok(id)
    }
}
