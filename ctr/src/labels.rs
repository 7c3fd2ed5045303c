//! `key=value` arguments.

use std::collections::HashMap;

/// Parses `key=value` arguments; a bare `key` gets `bare` as its value.
pub(crate) fn parse<S: AsRef<str>>(args: &[S], bare: &str) -> HashMap<String, String> {
    args.iter()
        .map(|arg| {
            let (key, value) = arg.as_ref().split_once('=').unwrap_or((arg.as_ref(), bare));
            (key.to_owned(), value.to_owned())
        })
        .collect()
}

/// Labels given on the command line: a bare key means `true`, as upstream reads it.
pub(crate) fn given<S: AsRef<str>>(args: &[S]) -> HashMap<String, String> {
    parse(args, "true")
}

/// Changes of a label command: a bare key, or an empty value, clears the label.
pub(crate) fn changes<S: AsRef<str>>(args: &[S]) -> HashMap<String, String> {
    parse(args, "")
}

/// Field mask naming each changed label.
pub(crate) fn mask(labels: &HashMap<String, String>) -> prost_types::FieldMask {
    let mut paths: Vec<_> = labels.keys().map(|key| format!("labels.{key}")).collect();
    paths.sort();
    prost_types::FieldMask { paths }
}

/// `a=1,b=2` in key order; `-` for none.
pub(crate) fn show(labels: &HashMap<String, String>) -> String {
    if labels.is_empty() {
        return "-".to_owned();
    }
    let mut pairs: Vec<_> = labels.iter().collect();
    pairs.sort();
    pairs
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_equals_sign_splits() {
        assert_eq!(given(&["a=b=c"])["a"], "b=c");
        assert_eq!(given(&["a"])["a"], "true");
        assert_eq!(changes(&["a"])["a"], "");
    }

    #[test]
    fn labels_are_shown_in_key_order() {
        assert_eq!(show(&given(&["b2=2", "b=3", "a=1"])), "a=1,b=3,b2=2");
        assert_eq!(show(&HashMap::new()), "-");
    }

    #[test]
    fn a_mask_names_each_key() {
        assert_eq!(
            mask(&changes(&["x/y=1", "a="])).paths,
            ["labels.a", "labels.x/y"]
        );
    }
}
