//! Registry to store.

use lighter_store::Scope;
use lighter_store::metadata::Image;
use tokio::sync::Mutex;
use tracing::info;

use super::graph::{Select, Walk};
use super::kinds::{RegistryEnd, StoreEnd};
use super::names::{self, NewImage};
use super::{Error, Transfer};
use crate::image::children::Layers;
use crate::image::{
    self, Descriptor, Event, FetchOptions, Fetcher, Matcher, Origin, Tracker, Unpacked, media,
};
use crate::registry::{Reference, SessionOptions};

/// One snapshotter to unpack to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackRequest {
    /// Which manifests.
    pub matcher: Matcher,
    /// Plugin id of the snapshotter.
    pub snapshotter: String,
}

/// What to pull.
#[derive(Debug)]
pub struct Pull {
    /// Transport-level reference (`docker.io/library/busybox:latest`).
    pub reference: String,
    /// Credentials, headers, hosts.
    pub session: SessionOptions,
    /// Which manifests of an index.
    pub select: Select,
    /// What to unpack.
    pub unpacks: Vec<UnpackRequest>,
    /// Whether layers are kept once unpacked.
    pub layers: Layers,
    /// Whether lazy snapshotters get the image's name with each layer.
    pub hint: bool,
}

/// One manifest that was pulled whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledManifest {
    /// The manifest.
    pub descriptor: Descriptor,
    /// Its configuration; the digest is CRI's image id.
    pub config: Descriptor,
    /// The configuration, where it is an image's.
    pub config_bytes: bytes::Bytes,
    /// By snapshotter.
    pub unpacked: Vec<(String, Unpacked)>,
}

/// What was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// What the reference means: index or manifest.
    pub target: Descriptor,
    /// Manifests that were taken whole.
    pub manifests: Vec<PulledManifest>,
}

impl Transfer {
    /// Pulls an image: resolve, verify, fetch, unpack. Records nothing under a name: `scope` must
    /// carry a lease ([`Transfer::lease`]) that holds everything until the caller has done that
    /// ([`Transfer::record`]).
    ///
    /// # Errors
    /// `NotFound` (no such image, no such platform), the registry's refusals, whatever fetching
    /// and unpacking say.
    ///
    /// # Cancellation
    /// Safe: the next pull goes on where this one stopped.
    pub async fn pull(
        &self,
        scope: &Scope,
        pull: Pull,
        tracker: &Tracker,
    ) -> Result<Pulled, Error> {
        let reference = Reference::parse(&pull.reference)?;
        let shown = format!("OCI Registry ({})", pull.reference);
        tracker.say(format!("Resolving from {shown}"));
        let session = self.inner.registry.session(reference, pull.session).await?;
        let resolved = session.resolve().await.map_err(Error::Resolve)?;
        let target = Descriptor::from(resolved);
        if media::is_schema1(&target.media_type) {
            return Err(image::Error::Schema1.into());
        }
        if let Some(verifier) = &self.inner.config.verifier {
            verifier.verify(&pull.reference, &target).await?;
        }
        tracker.say(format!("Pulling from {shown}"));
        tracker.message(Event {
            event: "fetching image content".to_owned(),
            name: pull.reference.clone(),
            ..Event::default()
        });
        let options = FetchOptions {
            scope: scope.clone(),
            origin: Origin::Registry(std::sync::Arc::new(session)),
            tracker: tracker.clone(),
            layers: pull.layers,
        };
        let fetcher = self.fetcher(options);
        let walk = Walk {
            transfer: self,
            fetcher: &fetcher,
            select: &pull.select,
            unpacks: &pull.unpacks,
            hint: pull.hint.then(|| pull.reference.clone()),
            found: Mutex::default(),
        };
        walk.run(&target, &pull.reference).await?;
        let manifests = walk.found.into_inner();
        Ok(Pulled { target, manifests })
    }

    pub(super) fn fetcher(&self, options: FetchOptions) -> Fetcher {
        let inner = &self.inner;
        let downloads = std::sync::Arc::clone(&inner.downloads);
        Fetcher::new(inner.db.content(), inner.locks.clone(), downloads, options)
    }

    /// Records `target` under a name, whether or not the name is taken.
    ///
    /// # Errors
    /// `InvalidArgument`; when the store fails.
    pub async fn record(
        &self,
        scope: &Scope,
        image: NewImage,
        target: &Descriptor,
    ) -> Result<Image, Error> {
        names::put(&self.inner.db.images(), scope, image, target).await
    }

    pub(super) async fn record_all(
        &self,
        scope: &Scope,
        end: &StoreEnd,
        target: &Descriptor,
        named: bool,
        tracker: &Tracker,
    ) -> Result<usize, Error> {
        let records = names::records(end, target, named);
        let count = records.len();
        for record in records {
            let image = self.record(scope, record, target).await?;
            info!(image = %image.name, digest = %target.digest, "image recorded");
            tracker.message(Event {
                event: "saved".to_owned(),
                name: image.name,
                descriptor: Some(target.clone()),
                ..Event::default()
            });
        }
        Ok(count)
    }

    pub(super) async fn pull_to_store(
        &self,
        scope: &Scope,
        from: RegistryEnd,
        to: StoreEnd,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        if to.name.is_empty() && to.extras.is_empty() {
            return Err(Error::invalid("image store destination needs a name"));
        }
        let shown = from.to_string();
        let pull = Pull {
            reference: from.reference,
            session: from.session,
            select: to.select.clone(),
            unpacks: to.unpacks.clone(),
            layers: Layers::Keep,
            hint: false,
        };
        let pulled = self.pull(scope, pull, tracker).await?;
        self.record_all(scope, &to, &pulled.target, true, tracker)
            .await?;
        tracker.say(format!("Completed pull from {shown}"));
        Ok(())
    }
}
