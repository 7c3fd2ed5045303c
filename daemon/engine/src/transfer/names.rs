//! Image records at the end of a transfer: which names, and how they come to be.

use std::time::SystemTime;

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::labels::{GC_BREF, GC_EXPIRE};
use lighter_store::metadata::{Image, Images};
use lighter_store::{Labels, Scope};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Error;
use super::kinds::{Extra, StoreEnd};
use crate::image::Descriptor;

/// Annotation of archives: the image's full name.
pub(super) const IMAGE_NAME: &str = "io.containerd.image.name";
/// Annotation: its tag, or its full name.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Times a record may come and go between our two ways to write it.
const MAX_TRIES: u32 = 8;

/// A record to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
}

/// Writes a record, whether or not the name is taken.
pub(super) async fn put(
    images: &Images,
    scope: &Scope,
    new: NewImage,
    target: &Descriptor,
) -> Result<Image, Error> {
    let now = SystemTime::now();
    let image = Image {
        name: new.name,
        labels: new.labels,
        target: target.into(),
        created_at: now,
        updated_at: now,
    };
    let mut tries = 0;
    loop {
        tries += 1;
        match images.create(scope, image.clone(), None).await {
            Ok(image) => return Ok(image),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
        match images.update(scope, image.clone(), &[], None).await {
            Ok(image) => return Ok(image),
            Err(error) if error.kind() == ErrorKind::NotFound && tries < MAX_TRIES => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The records that `end` asks for `descriptor`; `named` is whether the store's own name is for it.
pub(super) fn records(end: &StoreEnd, descriptor: &Descriptor, named: bool) -> Vec<NewImage> {
    let mut found = Vec::new();
    let own = named && !end.name.is_empty();
    if own {
        found.push(NewImage {
            name: end.name.clone(),
            labels: end.labels.clone(),
        });
    }
    for extra in &end.extras {
        let mut names = Vec::new();
        let name = if extra.is_prefix {
            annotated(extra, descriptor)
        } else {
            named
                .then(|| extra.name.clone())
                .filter(|name| !name.is_empty())
        };
        let skip_digest = extra.skip_named_digest && name.is_some();
        names.extend(name);
        if extra.add_digest && !skip_digest {
            names.push(format!("{}@{}", extra.name, descriptor.digest));
        }
        for name in names {
            if found.iter().any(|known| known.name == name) {
                continue;
            }
            let mut labels = end.labels.clone();
            if own {
                labels.insert(format!("{GC_BREF}image"), end.name.clone());
                labels.insert(GC_EXPIRE.to_owned(), now());
            }
            found.push(NewImage { name, labels });
        }
    }
    found
}

fn now() -> String {
    let now = OffsetDateTime::now_utc();
    now.format(&Rfc3339).expect("a time in this millennium")
}

/// The name an archive gives an image, under the rules of a prefix.
fn annotated(extra: &Extra, descriptor: &Descriptor) -> Option<String> {
    let annotation = |key| {
        descriptor
            .annotations
            .get(key)
            .filter(|value| !value.is_empty())
    };
    let fits = |name: &str| {
        extra.allow_overwrite
            || name == extra.name
            || name
                .strip_prefix(extra.name.as_str())
                .is_some_and(|rest| rest.starts_with([':', '@', '/']) || extra.name.ends_with('/'))
    };
    if let Some(full) = annotation(IMAGE_NAME) {
        return fits(full).then(|| full.clone());
    }
    let name = annotation(REF_NAME)?;
    if name.contains(['/', ':', '@']) {
        return fits(name).then(|| name.clone());
    }
    Some(format!("{}:{name}", extra.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Matcher;
    use crate::transfer::Select;

    fn end(name: &str, extra: Extra) -> StoreEnd {
        StoreEnd {
            name: name.to_owned(),
            labels: Labels::new(),
            platforms: Vec::new(),
            select: Select {
                matcher: Matcher::all(),
                limit: 0,
                all_metadata: false,
            },
            extras: vec![extra],
            unpacks: Vec::new(),
        }
    }

    fn extra(prefix: &str, allow_overwrite: bool) -> Extra {
        Extra {
            name: prefix.to_owned(),
            is_prefix: true,
            allow_overwrite,
            add_digest: false,
            skip_named_digest: false,
        }
    }

    fn names(end: &StoreEnd, annotations: &[(&str, &str)]) -> Vec<String> {
        let mut descriptor = Descriptor::of("t", b"x");
        let pairs = annotations
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        descriptor.annotations.extend(pairs);
        records(end, &descriptor, false)
            .into_iter()
            .map(|new| new.name)
            .collect()
    }

    #[test]
    fn prefixes_complete_tags_and_filter_full_names() {
        let strict = end("", extra("docker.io/library/x", false));
        assert_eq!(
            names(&strict, &[(REF_NAME, "1")]),
            ["docker.io/library/x:1"]
        );
        assert_eq!(
            names(
                &strict,
                &[(IMAGE_NAME, "docker.io/library/x:2"), (REF_NAME, "2")]
            ),
            ["docker.io/library/x:2"]
        );
        assert!(names(&strict, &[(IMAGE_NAME, "docker.io/library/xy:2")]).is_empty());
        assert!(names(&strict, &[]).is_empty());
        let open = end("", extra("import-1", true));
        assert_eq!(names(&open, &[(IMAGE_NAME, "a.io/b:2")]), ["a.io/b:2"]);
        assert_eq!(names(&open, &[(REF_NAME, "a.io/b:2")]), ["a.io/b:2"]);
    }

    #[test]
    fn digests_are_added_where_asked() {
        let digest = Descriptor::of("t", b"x").digest;
        let mut wish = extra("p", true);
        wish.add_digest = true;
        let with = end("", wish.clone());
        assert_eq!(
            names(&with, &[(REF_NAME, "1")]),
            ["p:1".to_owned(), format!("p@{digest}")]
        );
        wish.skip_named_digest = true;
        let skipping = end("", wish);
        assert_eq!(names(&skipping, &[(REF_NAME, "1")]), ["p:1"]);
        assert_eq!(names(&skipping, &[]), [format!("p@{digest}")]);
    }

    #[test]
    fn names_derived_from_a_named_parent_go_with_it() {
        let mut wish = extra("p", true);
        wish.is_prefix = false;
        let found = records(&end("parent", wish), &Descriptor::of("t", b"x"), true);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].labels["containerd.io/gc.bref.image"], "parent");
        assert!(found[1].labels.contains_key("containerd.io/gc.expire"));
    }
}
