//! Store to store: another name, and unpacking what is there.

use lighter_store::Scope;
use tokio::sync::Mutex;

use super::graph::Walk;
use super::kinds::StoreEnd;
use super::{Error, Transfer, UnpackRequest};
use crate::image::children::Layers;
use crate::image::{Descriptor, FetchOptions, Origin, Tracker};

impl Transfer {
    pub(super) async fn tag(
        &self,
        scope: &Scope,
        from: &StoreEnd,
        to: &StoreEnd,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        if to.name.is_empty() && to.extras.is_empty() {
            return Err(Error::invalid("image store destination needs a name"));
        }
        let image = self.inner.db.images().get(scope, &from.name)?;
        let target = Descriptor::from(image.target);
        self.unpack_stored(scope, &target, to, tracker).await?;
        self.record_all(scope, to, &target, true, tracker).await?;
        Ok(())
    }

    /// Unpacks an image of the store to `snapshotter`; what is there already is left alone. `hint` is
    /// the reference of the image for snapshotters that want to know.
    ///
    /// # Errors
    /// When content is missing or a layer cannot be applied.
    ///
    /// # Cancellation
    /// Finished layers stay for the next attempt.
    pub async fn unpack(
        &self,
        scope: &Scope,
        name: &str,
        target: &Descriptor,
        unpack: UnpackRequest,
        hint: Option<String>,
    ) -> Result<(), Error> {
        let to = StoreEnd {
            name: name.to_owned(),
            labels: lighter_store::Labels::new(),
            platforms: Vec::new(),
            select: super::Select::host(),
            extras: Vec::new(),
            unpacks: vec![unpack],
        };
        let tracker = Tracker::default();
        self.unpack_hinted(scope, target, &to, &tracker, hint).await
    }

    /// Unpacks what `to` wants of an image in the store.
    pub(super) async fn unpack_stored(
        &self,
        scope: &Scope,
        target: &Descriptor,
        to: &StoreEnd,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        self.unpack_hinted(scope, target, to, tracker, None).await
    }

    async fn unpack_hinted(
        &self,
        scope: &Scope,
        target: &Descriptor,
        to: &StoreEnd,
        tracker: &Tracker,
        hint: Option<String>,
    ) -> Result<(), Error> {
        if to.unpacks.is_empty() {
            return Ok(());
        }
        let fetcher = self.fetcher(FetchOptions {
            scope: scope.clone(),
            origin: Origin::Store,
            tracker: tracker.clone(),
            layers: Layers::Keep,
        });
        for unpack in &to.unpacks {
            let select = super::Select {
                matcher: unpack.matcher.clone(),
                limit: 1,
                all_metadata: false,
            };
            let walk = Walk {
                transfer: self,
                fetcher: &fetcher,
                select: &select,
                unpacks: std::slice::from_ref(unpack),
                hint: hint.clone(),
                found: Mutex::default(),
            };
            walk.run(target, &to.name).await?;
        }
        Ok(())
    }
}
