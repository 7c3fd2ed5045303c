//! The grammar, its errors, and generated filters against a model.

use proptest::prelude::*;

use super::*;

struct Object(BTreeMap<String, String>);

impl Fields for Object {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.split_first()? {
            (first, rest) if first == "labels" => entry(&self.0, rest),
            (first, []) if first == "id" => Some("foo".into()),
            _ => None,
        }
    }
}

fn object() -> Object {
    let labels = [("a.b", "one two"), ("c", "x/y:z@1"), ("", "empty key")];
    Object(labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into())
}

fn matches(filter: &str) -> bool {
    Filter::parse(&[filter]).expect(filter).matches(&object())
}

#[test]
fn selectors_follow_the_grammar() {
    for yes in [
        "",
        "id",
        "id==foo",
        " id == foo",
        "id==\"foo\"",
        "id!=bar",
        "absent!=bar",
        "id~=^f",
        "id~=/^fo+$/",
        "id~=|o|",
        "absent~=^$",
        "labels.a.b==\"one two\"",
        "labels.\"a.b\"",
        "labels.\"a\\x2eb\"==\"\\157ne\\u0020two\"",
        "labels.c==x/y:z@1",
        "labels",
        "id==foo,labels.c",
        "\"id\"==foo",
    ] {
        assert!(matches(yes), "{yes}");
    }
    for no in [
        "absent",
        "absent==\"\"",
        "id==fo",
        "id~=(",
        "labels.a",
        "id==foo,absent",
        "labels.c.d",
    ] {
        assert!(!matches(no), "{no}");
    }
    let either = Filter::parse(&["absent", "id==foo"]).expect("two filters");
    assert!(either.matches(&object()));
    assert!(Filter::parse::<&str>(&[]).expect("none").matches(&object()));
}

#[test]
fn the_filter_of_dockerd_parses() {
    struct Event;
    impl Fields for Event {
        fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
            match path[0].as_str() {
                "namespace" => Some("moby".into()),
                "topic" => Some("/tasks/exit".into()),
                _ => None,
            }
        }
    }
    let filter = Filter::parse(&["namespace==moby,topic~=|^/tasks/|"]).expect("dockerd's");
    assert!(filter.matches(&Event));
}

#[test]
fn errors_say_where_and_why() {
    for (filter, want) in [
        ("id=foo", "[id >|=|< foo]: unsupported operator \"=\""),
        ("id==/foo/", "[id== >|/|< foo/]: invalid quote encountered"),
        ("id==", "[id== >||<]: expected value or quoted"),
        ("id,", "[id, >||<]: expected field or quoted"),
        (".id", "[ >|.|< id]: expected field or quoted"),
        (
            "id==\"foo",
            "[id== >|\"|< foo]: quoted literal not terminated",
        ),
        ("id==a b", "[id==a >| |< b]: unexpected input:  "),
        ("id foo", "[id  >|f|< oo]: expected an operator"),
        ("a\0", "[a >|\0|< ]: unexpected null"),
        ("id==\"\\q\"", "unquoting failed"),
        ("id==\"\\x4\"", "unquoting failed"),
        ("id==\"\\x4g\"", "unquoting failed"),
        ("id==\"\\u123\"", "unquoting failed"),
        ("id==\"\\12\"", "unquoting failed"),
    ] {
        let error = Filter::parse(&[filter]).expect_err(filter).to_string();
        assert!(error.starts_with("filters: parse error: "), "{error}");
        assert!(error.contains(want), "{error} lacks {want}");
    }
}

#[derive(Debug, Clone)]
enum Model {
    Present(String),
    Equal(String, String),
    NotEqual(String, String),
}

impl Model {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Present(k) => labels.contains_key(k),
            Self::Equal(k, v) => labels.get(k) == Some(v),
            Self::NotEqual(k, v) => labels.get(k).map_or("", String::as_str) != v,
        }
    }

    fn text(&self) -> String {
        let quote = |s: &str| {
            let escaped: String = s
                .chars()
                .map(|c| match c {
                    '"' | '\\' => format!("\\{c}"),
                    c if c.is_ascii_graphic() => c.to_string(),
                    c => format!("\\U{:08x}", u32::from(c)),
                })
                .collect();
            format!("\"{escaped}\"")
        };
        match self {
            Self::Present(k) => format!("labels.{}", quote(k)),
            Self::Equal(k, v) => format!("labels.{}=={}", quote(k), quote(v)),
            Self::NotEqual(k, v) => format!("labels.{} != {}", quote(k), quote(v)),
        }
    }
}

fn selector() -> impl Strategy<Value = Model> {
    let key = prop_oneof![Just("k".to_owned()), "[a.\"/|,= \\\\é]{0,3}"];
    let value = prop_oneof![Just("v".to_owned()), "\\PC{0,3}"];
    (0..3, key, value).prop_map(|(kind, k, v)| match kind {
        0 => Model::Present(k),
        1 => Model::Equal(k, v),
        _ => Model::NotEqual(k, v),
    })
}

proptest! {
    #[test]
    fn a_filter_means_what_its_model_means(
        alternatives in proptest::collection::vec(proptest::collection::vec(selector(), 1..3), 0..3),
        labels in proptest::collection::btree_map("[ka.é]{0,2}", "[v\"é]{0,2}", 0..4),
    ) {
        let texts: Vec<String> = alternatives.iter()
            .map(|all| all.iter().map(Model::text).collect::<Vec<_>>().join(","))
            .collect();
        let want = alternatives.is_empty()
            || alternatives.iter().any(|all| all.iter().all(|m| m.holds(&labels)));
        let filter = Filter::parse(&texts).unwrap();
        prop_assert_eq!(filter.matches(&Object(labels)), want, "{:?}", texts);
    }

    #[test]
    fn no_input_panics(text in "[a-c.=!~,\"/|\\\\ \u{0}é\nx0-9U]{0,20}") {
        let _ = Filter::parse(&[text]);
    }
}
