//! What a document's record says about its children: collection labels and ingest refs. Pure.

use std::collections::BTreeMap;

use lighter_store::labels::{self, GC_REF_CONTENT};
use lighter_store::{Digest, Labels};

use super::{Descriptor, media};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation of a manifest in an archive's index: what it says something about.
pub const SUBJECT: &str = "io.containerd.manifest.subject";

/// Whether layers are kept once they are unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layers {
    /// Their manifest keeps them.
    Keep,
    /// Nothing does: they go with the lease of the pull.
    Discard,
}

/// Labels by which a document keeps its `children`.
#[must_use]
pub fn gc_labels(children: &[Descriptor], layers: Layers) -> Labels {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut found = Labels::new();
    for child in children {
        let media_type = child.media_type.as_str();
        if layers == Layers::Discard && media::is_layer(media_type) {
            continue;
        }
        let prefix = if media::is_config(media_type) {
            format!("{GC_REF_CONTENT}.config")
        } else if media::is_manifest(media_type) {
            format!("{GC_REF_CONTENT}.m.")
        } else if media::is_layer(media_type) {
            format!("{GC_REF_CONTENT}.l.")
        } else {
            format!("{GC_REF_CONTENT}.")
        };
        let count = counts.entry(prefix.clone()).or_default();
        let key = match (*count, prefix.ends_with('.')) {
            (0, false) => prefix,
            (n, true) => format!("{prefix}{n}"),
            (n, false) => format!("{prefix}.{n}"),
        };
        *count += 1;
        found.insert(key, child.digest.to_string());
    }
    found
}

/// Label by which a manifest keeps one that says something about it.
#[must_use]
pub fn referrer_label(referrer: &Digest) -> (String, String) {
    let hex: String = referrer.hex().chars().take(12).collect();
    let algorithm = referrer.algorithm().as_str();
    let key = format!("{GC_REF_CONTENT}.referrer.{algorithm}.{hex}");
    (key, referrer.to_string())
}

/// The ref under which a blob is written.
#[must_use]
pub fn ingest_ref(descriptor: &Descriptor) -> String {
    let media_type = descriptor.media_type.as_str();
    let prefix = if media::is_manifest(media_type) {
        "manifest-"
    } else if media::is_index(media_type) {
        "index-"
    } else if media::is_layer(media_type) {
        "layer-"
    } else if media::is_config(media_type) {
        "config-"
    } else if media::is_attestation(media_type) {
        "attestation-"
    } else {
        "unknown-"
    };
    match descriptor.annotations.get(REF_NAME) {
        Some(name) if name.len() <= 512 => format!("{prefix}{name}@{}", descriptor.digest),
        _ => format!("{prefix}{}", descriptor.digest),
    }
}

/// `current` (a comma list) with `repository` in it, sorted; `None` when nothing changes or the
/// label would become too long.
#[must_use]
pub fn source_label(
    host: &str,
    repository: &str,
    current: Option<&str>,
) -> Option<(String, String)> {
    let key = format!("{}.{host}", labels::DISTRIBUTION_SOURCE);
    let known = current.unwrap_or_default();
    let mut repositories: Vec<&str> = known.split(',').filter(|r| !r.is_empty()).collect();
    repositories.push(repository);
    repositories.sort_unstable();
    repositories.dedup();
    let value = repositories.join(",");
    let fits = key.len() + value.len() <= labels::MAX_BYTES;
    (fits && value != known).then_some((key, value))
}

/// The repository that `repository`'s blob can be mounted from: of those in the comma list `value`
/// the one with the longest common path, the longest first.
#[must_use]
pub fn mount_source(value: &str, repository: &str) -> Option<String> {
    let common = |other: &str| {
        let pairs = other.split('/').zip(repository.split('/'));
        pairs.take_while(|(a, b)| a == b).count()
    };
    value
        .split(',')
        .filter(|other| !other.is_empty() && *other != repository)
        .filter(|other| common(other) > 0)
        .max_by_key(|other| common(other))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child(media_type: &str, n: u8) -> Descriptor {
        Descriptor::of(media_type, &[n])
    }

    #[test]
    fn children_are_labelled_by_kind_and_place() {
        let children = [
            child(media::OCI_CONFIG, 0),
            child(media::OCI_LAYER_GZIP, 1),
            child(media::DOCKER_LAYER, 2),
            child("x/y", 3),
            child(media::OCI_MANIFEST, 4),
        ];
        let keys: Vec<String> = gc_labels(&children, Layers::Keep).into_keys().collect();
        assert_eq!(
            keys,
            [
                "containerd.io/gc.ref.content.0",
                "containerd.io/gc.ref.content.config",
                "containerd.io/gc.ref.content.l.0",
                "containerd.io/gc.ref.content.l.1",
                "containerd.io/gc.ref.content.m.0",
            ]
        );
        assert_eq!(gc_labels(&children, Layers::Discard).len(), 3);
    }

    #[test]
    fn referrers_are_labelled_by_the_start_of_their_digest() {
        let digest = Digest::of(b"");
        let (key, value) = referrer_label(&digest);
        assert_eq!(
            key,
            "containerd.io/gc.ref.content.referrer.sha256.e3b0c44298fc"
        );
        assert_eq!(value, digest.as_str());
    }

    #[test]
    fn refs_name_kind_and_digest() {
        let mut layer = child(media::OCI_LAYER, 1);
        assert_eq!(ingest_ref(&layer), format!("layer-{}", layer.digest));
        layer.annotations.insert(REF_NAME.into(), "v1".into());
        assert_eq!(ingest_ref(&layer), format!("layer-v1@{}", layer.digest));
    }

    #[test]
    fn sources_are_sorted_unique_and_bounded() {
        let label = |current| source_label("h", "b/x", current).map(|(_, value)| value);
        assert_eq!(label(None).as_deref(), Some("b/x"));
        assert_eq!(label(Some("a/x,c/x")).as_deref(), Some("a/x,b/x,c/x"));
        assert_eq!(label(Some("b/x")), None);
        assert_eq!(label(Some(&"y".repeat(4096))), None);
        assert_eq!(
            mount_source("a/b/c,a/d,x/y", "a/b/z").as_deref(),
            Some("a/b/c")
        );
        assert_eq!(mount_source("x/y", "a/b"), None);
    }
}
