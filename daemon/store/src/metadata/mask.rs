//! Field masks on records: what containers and sandboxes have in common.

use std::collections::BTreeMap;

use prost_types::Any;

use crate::{Error, Labels, labels};

/// The maps of a record whose entries a mask may name one by one.
pub(super) struct Maps<'a> {
    pub(super) labels: &'a mut Labels,
    pub(super) extensions: &'a mut BTreeMap<String, Any>,
}

impl Maps<'_> {
    /// Takes over what `path` names from a request's maps; `false` when it names neither of them.
    pub(super) fn set(
        &mut self,
        path: &str,
        request_labels: &Labels,
        request_extensions: &BTreeMap<String, Any>,
    ) -> bool {
        match path.split_once('.') {
            Some(("labels", key)) => labels::set_from(self.labels, key, request_labels),
            Some(("extensions", key)) => {
                match request_extensions.get(key) {
                    Some(value) => self.extensions.insert(key.to_owned(), value.clone()),
                    None => self.extensions.remove(key),
                };
            }
            None if path == "labels" => self.labels.clone_from(request_labels),
            None if path == "extensions" => self.extensions.clone_from(request_extensions),
            _ => return false,
        }
        true
    }
}

/// The paths of a request: those of its mask, or all that may change.
pub(super) fn paths<'a>(mask: &'a [String], all: &[&'a str]) -> Vec<&'a str> {
    if mask.is_empty() {
        return all.to_vec();
    }
    mask.iter().map(String::as_str).collect()
}

/// Extensions have names.
pub(super) fn check_extensions(extensions: &BTreeMap<String, Any>) -> Result<(), Error> {
    if extensions.contains_key("") {
        return Err(Error::Invalid {
            reason: "extension key must not be zero-length".to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map() -> impl Strategy<Value = BTreeMap<String, Any>> {
        let value = any::<u8>().prop_map(|byte| Any {
            type_url: "t".to_owned(),
            value: vec![byte],
        });
        proptest::collection::btree_map("[ab.]{1,3}", value, 0..5)
    }

    proptest! {
        #[test]
        fn extensions_change_as_their_model(
            before in map(), request in map(),
            paths in proptest::collection::vec(prop_oneof![
                Just("extensions".to_owned()),
                "[ab.]{1,3}".prop_map(|k| format!("extensions.{k}"))], 0..4),
        ) {
            let mut after = before.clone();
            let mut labels = Labels::new();
            for path in &paths {
                let mut maps = Maps { labels: &mut labels, extensions: &mut after };
                prop_assert!(maps.set(path, &Labels::new(), &request));
            }
            let whole = paths.iter().any(|p| p == "extensions");
            for key in before.keys().chain(request.keys()) {
                let named = paths.iter().any(|p| p.strip_prefix("extensions.") == Some(key));
                let want = if whole || named { request.get(key) } else { before.get(key) };
                prop_assert_eq!(after.get(key), want, "{}", key);
            }
        }
    }

    #[test]
    fn other_paths_are_nobodys() {
        let (mut labels, mut extensions) = (Labels::new(), BTreeMap::new());
        for path in ["", "spec", "labelsx", "extension.a", "spec.labels"] {
            let mut maps = Maps {
                labels: &mut labels,
                extensions: &mut extensions,
            };
            assert!(!maps.set(path, &Labels::new(), &BTreeMap::new()), "{path}");
        }
    }
}
