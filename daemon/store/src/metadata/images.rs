//! Image records: a name for a descriptor.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use lighter_proto::containerd::services::images::v1::{ImageCreate, ImageDelete, ImageUpdate};

use super::db::{Change, Inner};
use super::keys::{self, table};
use super::leases::{self, KIND_IMAGES};
use super::records::{ImageRecord, Stamps};
use crate::events::topic;
use crate::filter::{self, Fields, Filter};
use crate::{Digest, Error, Labels, Scope, labels};

/// What a blob is, how long, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type.
    pub media_type: String,
    /// Digest.
    pub digest: Digest,
    /// Bytes; never negative.
    pub size_bytes: u64,
    /// Annotations.
    pub annotations: Labels,
}

/// One image record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Any non-empty string; by custom a full reference.
    pub name: String,
    /// Labels.
    pub labels: Labels,
    /// Index or manifest.
    pub target: Descriptor,
    /// Set by the store.
    pub created_at: SystemTime,
    /// Set by the store.
    pub updated_at: SystemTime,
}

/// What an update says of an image; the mask says what of it counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Labels.
    pub labels: Labels,
    /// The whole target, with its annotations.
    pub target: Option<Descriptor>,
    /// The target's annotations, for masks that name them alone.
    pub annotations: Labels,
}

impl From<Image> for Changes {
    fn from(image: Image) -> Self {
        Self {
            labels: image.labels,
            annotations: image.target.annotations.clone(),
            target: Some(image.target),
        }
    }
}

impl Fields for Image {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        let text = |text: &'_ str| (!text.is_empty()).then(|| Cow::Owned(text.to_owned()));
        match path.split_first()? {
            (first, []) if first == "name" => text(&self.name),
            (first, [field]) if first == "target" => match field.as_str() {
                "digest" => text(self.target.digest.as_str()),
                "mediatype" => text(&self.target.media_type),
                _ => None,
            },
            (first, rest) if first == "labels" => filter::entry(&self.labels, rest),
            (first, rest) if first == "annotations" => {
                filter::entry(&self.target.annotations, rest)
            }
            _ => None,
        }
    }
}

impl Image {
    fn check(&self) -> Result<(), Error> {
        let invalid = |reason: &str| {
            Err(Error::Invalid {
                reason: reason.to_owned(),
            })
        };
        if self.name.is_empty() {
            return invalid("image name must not be empty");
        }
        labels::check(&self.labels)?;
        labels::check(&self.target.annotations)?;
        if self.target.size_bytes == 0 {
            return invalid("Target.Size must be > 0");
        }
        if self.target.media_type.is_empty() {
            return invalid("Target.MediaType must be set");
        }
        Ok(())
    }

    fn record(&self, stamps: Stamps) -> ImageRecord {
        ImageRecord {
            stamps,
            labels: self.labels.clone(),
            media_type: self.target.media_type.clone(),
            digest: self.target.digest.as_str().to_owned(),
            size_bytes: self.target.size_bytes,
            annotations: self.target.annotations.clone(),
        }
    }

    fn of(name: String, record: ImageRecord) -> Result<Self, Error> {
        Ok(Self {
            name,
            labels: record.labels,
            target: Descriptor {
                media_type: record.media_type,
                digest: Digest::parse(&record.digest)?,
                size_bytes: record.size_bytes,
                annotations: record.annotations,
            },
            created_at: record.stamps.created_at(),
            updated_at: record.stamps.updated_at(),
        })
    }

    /// Takes over what `path` names.
    fn set(&mut self, changes: &Changes, path: &str) -> Result<(), Error> {
        let annotations = &mut self.target.annotations;
        match path.split_once('.') {
            Some(("labels", key)) => labels::set_from(&mut self.labels, key, &changes.labels),
            Some(("annotations", key)) => labels::set_from(annotations, key, &changes.annotations),
            None if path == "labels" => self.labels.clone_from(&changes.labels),
            None if path == "annotations" => annotations.clone_from(&changes.annotations),
            None if path == "target" => {
                self.target = changes.target.clone().ok_or_else(|| Error::Invalid {
                    reason: "image.Target must be set".to_owned(),
                })?;
            }
            _ => {
                let object = format!("image \"{}\"", self.name);
                return Err(labels::unknown_path(path, &object));
            }
        }
        Ok(())
    }
}

/// Image records of all namespaces.
#[derive(Debug, Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

impl Images {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Records an image. `stamp` replaces now (`source_date_epoch`). Event `/images/create`.
    ///
    /// # Errors
    /// `InvalidArgument`, `AlreadyExists`.
    pub async fn create(
        &self,
        scope: &Scope,
        mut image: Image,
        stamp: Option<SystemTime>,
    ) -> Result<Image, Error> {
        image.check()?;
        labels::drop_empty(&mut image.labels);
        labels::drop_empty(&mut image.target.annotations);
        let stamps = stamp.map_or_else(Stamps::now, Stamps::at);
        image.created_at = stamps.created_at();
        image.updated_at = stamps.updated_at();
        let record = image.record(stamps);
        let event = ImageCreate {
            name: image.name.clone(),
            labels: image.labels.clone().into_iter().collect(),
        };
        self.inner
            .update(|change| {
                let key = keys::object(table::IMAGES, &scope.namespace, &image.name);
                if change.contains(&key)? {
                    return Err(Error::AlreadyExists {
                        what: format!("image \"{}\"", image.name),
                    });
                }
                change.ensure_namespace(&scope.namespace)?;
                attach_if_expiring(change, scope, &image)?;
                change.put(key, &record);
                change.publish(&scope.namespace, topic::IMAGE_CREATE, &event);
                Ok(())
            })
            .await?;
        Ok(image)
    }

    /// One record.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, scope: &Scope, name: &str) -> Result<Image, Error> {
        let key = keys::object(table::IMAGES, &scope.namespace, name);
        let record = self.inner.get(&key, || format!("image \"{name}\""))?;
        Image::of(name.to_owned(), record.ok_or_else(|| not_found(name))?)
    }

    /// Matching records in byte order of name.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<Image>, Error> {
        let mut found = Vec::new();
        for (name, record) in self.inner.list(table::IMAGES, &scope.namespace)? {
            let image = Image::of(name, record)?;
            if filter.matches(&image) {
                found.push(image);
            }
        }
        Ok(found)
    }

    /// Changes what `mask` names (labels and target when empty). Event `/images/update`.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        scope: &Scope,
        image: Image,
        mask: &[String],
        stamp: Option<SystemTime>,
    ) -> Result<Image, Error> {
        let name = image.name.clone();
        self.change(scope, &name, &image.into(), mask, stamp).await
    }

    /// [`Images::update`] for a request that need not carry a whole image.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn change(
        &self,
        scope: &Scope,
        name: &str,
        changes: &Changes,
        mask: &[String],
        stamp: Option<SystemTime>,
    ) -> Result<Image, Error> {
        let every = ["labels".to_owned(), "target".to_owned()];
        let mask = if mask.is_empty() { &every } else { mask };
        self.inner
            .update(|change| {
                let key = keys::object(table::IMAGES, &scope.namespace, name);
                let record: ImageRecord = change
                    .get(&key, || format!("image \"{name}\""))?
                    .ok_or_else(|| not_found(name))?;
                let mut stamps = record.stamps;
                let mut updated = Image::of(name.to_owned(), record)?;
                for path in mask {
                    updated.set(changes, path)?;
                }
                updated.check()?;
                labels::drop_empty(&mut updated.labels);
                labels::drop_empty(&mut updated.target.annotations);
                match stamp {
                    Some(stamp) => stamps.updated = Stamps::at(stamp).updated,
                    None => stamps.touch(),
                }
                updated.updated_at = stamps.updated_at();
                attach_if_expiring(change, scope, &updated)?;
                change.put(key, &updated.record(stamps));
                let event = ImageUpdate {
                    name: name.to_owned(),
                    labels: updated.labels.clone().into_iter().collect(),
                };
                change.publish(&scope.namespace, topic::IMAGE_UPDATE, &event);
                Ok(updated)
            })
            .await
    }

    /// Removes a record, if its target still is `target` where given. Event `/images/delete`.
    /// (A synchronous delete also runs a collection: the caller does that.)
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(
        &self,
        scope: &Scope,
        name: &str,
        target: Option<&Digest>,
    ) -> Result<(), Error> {
        self.inner
            .update(|change| {
                let key = keys::object(table::IMAGES, &scope.namespace, name);
                let record: ImageRecord = change
                    .get(&key, || format!("image \"{name}\""))?
                    .ok_or_else(|| not_found(name))?;
                if let Some(target) = target
                    && record.digest != target.as_str()
                {
                    return Err(Error::NotFound {
                        what: format!("image \"{name}\" has digest {}", record.digest),
                    });
                }
                leases::detach(change, scope, KIND_IMAGES, name);
                remove(change, &scope.namespace, name);
                Ok(())
            })
            .await
    }
}

/// Removes an image's record and says so.
pub(crate) fn remove(change: &mut Change<'_, '_>, namespace: &crate::Namespace, name: &str) {
    change.delete(keys::object(table::IMAGES, namespace, name));
    change.dirty();
    let event = ImageDelete {
        name: name.to_owned(),
    };
    change.publish(namespace, topic::IMAGE_DELETE, &event);
}

/// An image that would expire on its own is held by the lease it was made under.
fn attach_if_expiring(
    change: &mut Change<'_, '_>,
    scope: &Scope,
    image: &Image,
) -> Result<(), Error> {
    if image.labels.contains_key(labels::GC_EXPIRE) {
        leases::attach(change, scope, KIND_IMAGES, &image.name)?;
    }
    Ok(())
}

fn not_found(name: &str) -> Error {
    Error::NotFound {
        what: format!("image {name:?}"),
    }
}
