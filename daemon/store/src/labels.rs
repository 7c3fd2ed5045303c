//! Labels: their rules, how masks change them, and the name of every label we give meaning to.

use std::collections::BTreeMap;

use crate::Error;

/// Labels of an object. A value is never empty: writing an empty value removes the key.
pub type Labels = BTreeMap<String, String>;

/// Most bytes of key and value together.
pub const MAX_BYTES: usize = 4096;

/// Most bytes of a key that an error repeats.
const SHOWN_BYTES: usize = 64;

/// Checks the length rule of every label.
///
/// # Errors
/// `InvalidArgument` for the first that is too long.
pub fn check(labels: &Labels) -> Result<(), Error> {
    labels
        .iter()
        .try_for_each(|(key, value)| check_one(key, value))
}

/// Checks the length rule of one label.
///
/// # Errors
/// `InvalidArgument` when it is too long.
pub fn check_one(key: &str, value: &str) -> Result<(), Error> {
    let bytes = key.len() + value.len();
    if bytes <= MAX_BYTES {
        return Ok(());
    }
    let mut end = key.len().min(SHOWN_BYTES);
    while !key.is_char_boundary(end) {
        end -= 1;
    }
    Err(Error::Invalid {
        reason: format!(
            "label key and value length ({bytes} bytes) greater than maximum size ({MAX_BYTES} \
             bytes), key: {}",
            &key[..end]
        ),
    })
}

/// Removes labels without a value: they are never stored.
pub fn drop_empty(labels: &mut Labels) {
    labels.retain(|_, value| !value.is_empty());
}

/// Makes `target[key]` what the request says: its value, or nothing when that is absent or empty.
pub fn set_from(target: &mut Labels, key: &str, request: &Labels) {
    match request.get(key) {
        Some(value) if !value.is_empty() => {
            target.insert(key.to_owned(), value.clone());
        }
        _ => {
            target.remove(key);
        }
    }
}

/// Applies a mask that may only name labels (`labels`, `labels.<key>`; empty: replace all).
///
/// # Errors
/// `InvalidArgument` naming the first other path; `object` completes its text.
pub fn apply_mask(
    target: &mut Labels,
    request: &Labels,
    mask: &[String],
    object: &str,
) -> Result<(), Error> {
    if mask.is_empty() {
        target.clone_from(request);
        drop_empty(target);
        return Ok(());
    }
    for path in mask {
        match path.split_once('.') {
            Some(("labels", key)) => set_from(target, key, request),
            None if path == "labels" => {
                target.clone_from(request);
                drop_empty(target);
            }
            _ => return Err(unknown_path(path, object)),
        }
    }
    Ok(())
}

/// The error for a mask path that an object does not allow.
#[must_use]
pub fn unknown_path(path: &str, object: &str) -> Error {
    Error::Invalid {
        reason: format!("cannot update {path:?} field on {object}"),
    }
}

/// Root of collection: any non-empty value keeps the object.
pub const GC_ROOT: &str = "containerd.io/gc.root";
/// When a lease, image or activation stops protecting (RFC 3339).
pub const GC_EXPIRE: &str = "containerd.io/gc.expire";
/// On a lease: only what it lists is kept, labels are not followed.
pub const GC_FLAT: &str = "containerd.io/gc.flat";
/// Prefix of conditional references; a kind follows.
pub const GC_COND: &str = "containerd.io/gc.cond.";
/// On a conditionally referenced object: when it was last used (RFC 3339).
pub const GC_COND_USED_AT: &str = "containerd.io/gc.cond.value-usedat";
/// Prefix of references; a kind follows.
pub const GC_REF: &str = "containerd.io/gc.ref.";
/// Prefix of references from a blob to blobs.
pub const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";
/// Prefix of references to snapshots; the snapshotter's name follows after a dot.
pub const GC_REF_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot";
/// Prefix of references to images.
pub const GC_REF_IMAGE: &str = "containerd.io/gc.ref.image";
/// Prefix of back references; a kind follows.
pub const GC_BREF: &str = "containerd.io/gc.bref.";
/// On compressed layers: digest of what they hold.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Prefix: repositories of a registry host the blob came from.
pub const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source";
/// On a prepared snapshot: the committed name it is meant to become.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// Prefix of labels that reach snapshot drivers.
pub const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";
/// On a namespace: its blobs may be imported by others.
pub const NAMESPACE_SHAREABLE: &str = "containerd.io/namespace.shareable";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels() -> impl Strategy<Value = Labels> {
        proptest::collection::btree_map("[ab.]{0,3}", "[xy]{0,1}", 0..5)
    }

    #[test]
    fn a_long_label_is_refused_with_a_short_text() {
        let labels = Labels::from([("é".repeat(100), "x".repeat(4000))]);
        let text = check(&labels).unwrap_err().to_string();
        assert!(
            text.starts_with("label key and value length (4200 bytes)"),
            "{text}"
        );
        assert!(text.len() < 250);
        assert!(check(&Labels::from([("k".into(), "x".repeat(4095))])).is_ok());
    }

    #[test]
    fn other_paths_are_refused() {
        for path in ["size", "label", "labelsx", "digest.labels", ""] {
            let mut target = Labels::new();
            let error = apply_mask(&mut target, &Labels::new(), &[path.to_owned()], "content");
            assert!(
                error.unwrap_err().to_string().contains("cannot update"),
                "{path}"
            );
        }
    }

    proptest! {
        #[test]
        fn masks_act_as_their_model(
            before in labels(), request in labels(),
            paths in proptest::collection::vec(prop_oneof![
                Just("labels".to_owned()), "[ab.]{0,3}".prop_map(|k| format!("labels.{k}"))], 0..4),
        ) {
            let mut before = before;
            drop_empty(&mut before);
            let mut after = before.clone();
            apply_mask(&mut after, &request, &paths, "object").unwrap();
            let whole = paths.is_empty() || paths.iter().any(|p| p == "labels");
            for key in before.keys().chain(request.keys()) {
                let named = whole || paths.iter().any(|p| p.strip_prefix("labels.") == Some(key));
                let want = if named {
                    request.get(key).filter(|v| !v.is_empty())
                } else {
                    before.get(key)
                };
                prop_assert_eq!(after.get(key), want, "{}", key);
            }
        }
    }
}
