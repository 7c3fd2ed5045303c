//! Names typed and named in full, good and bad.

use proptest::prelude::*;

use super::*;

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn short_names_get_domain_library_and_latest() {
    for (typed, full) in [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("a/b", "docker.io/a/b:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:y", "localhost:5000/x:y"),
        ("quay.io/a/b/c:t", "quay.io/a/b/c:t"),
        ("Upper/x", "Upper/x:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("a__b/c--d/e.f", "docker.io/a__b/c--d/e.f:latest"),
    ] {
        assert_eq!(normalize(typed).as_deref(), Ok(full), "{typed}");
    }
    let both = format!("busybox:1@sha256:{HEX}");
    assert_eq!(
        normalize(&both),
        Ok(format!("docker.io/library/busybox@sha256:{HEX}"))
    );
}

#[test]
fn malformed_names_say_why() {
    assert!(matches!(Named::parse(HEX), Err(Error::Identifier { .. })));
    assert!(matches!(
        Named::parse("docker.io/A"),
        Err(Error::Uppercase { .. })
    ));
    let long = format!("x.io/{}", "a".repeat(260));
    assert_eq!(Named::parse(&long), Err(Error::TooLong));
    for bad in [
        "",
        ":",
        "a:",
        "a:b:c",
        "a//b",
        "/a",
        "a/",
        "a_.b",
        "a___b",
        "-a",
        "a@sha256:00",
        "a b",
        "a:-x",
        "x.io:port/a",
        "https://x.io/a",
        "..",
        "a/../b",
        "a%2f",
        "ä",
        "a@",
        "a:t/b",
    ] {
        assert!(Named::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn familiar_form_hides_the_defaults() {
    let short = |text| Named::parse(text).map(|n| n.familiar());
    assert_eq!(
        short("docker.io/library/busybox:1").as_deref(),
        Ok("busybox:1")
    );
    assert_eq!(short("docker.io/a/b").as_deref(), Ok("a/b"));
    assert_eq!(short("x.io/library/b:t").as_deref(), Ok("x.io/library/b:t"));
}

#[test]
fn transport_references_have_no_defaults() {
    let parsed = Reference::parse("docker.io/library/x:1").expect("valid");
    assert_eq!(
        (parsed.host(), parsed.repository(), parsed.tag()),
        ("docker.io", "library/x", Some("1"))
    );
    let both = format!("h:1/p:t@sha256:{HEX}");
    let parsed = Reference::parse(&both).expect("valid");
    assert_eq!(parsed.tag(), Some("t"));
    assert!(parsed.digest().is_some());
    assert_eq!(parsed.to_string(), both);
    let bare = Reference::parse("busybox").expect("a host alone parses");
    assert!(matches!(
        bare.with_object(),
        Err(Error::ObjectRequired { .. })
    ));
    assert!(matches!(
        Reference::parse("/x"),
        Err(Error::HostnameRequired { .. })
    ));
    for bad in [
        "",
        "http://h/x",
        "h/x y",
        "h/x?y",
        "h/../x",
        "h/x@y",
        "u@h/x",
        "h/x:",
        "h:x/y",
    ] {
        assert!(Reference::parse(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_text_parses_or_fails_without_panic(text in "\\PC{0,80}") {
        let _ = Named::parse(&text);
        let _ = Reference::parse(&text);
    }

    #[test]
    fn canonical_names_are_fixed_points(
        text in "([a-z]{1,5}\\.io(:[1-9][0-9]{0,3})?/)?[a-z0-9]{1,6}([_/-][a-z0-9]{1,6}){0,3}(:[A-Za-z0-9_][A-Za-z0-9._-]{0,10})?"
    ) {
        let full = normalize(&text).expect("made to the grammar");
        prop_assert_eq!(normalize(&full), Ok(full.clone()));
        let reference = Reference::parse(&full).expect("a full name is a transport reference");
        prop_assert_eq!(reference.to_string(), full.clone());
        let familiar = Named::parse(&full).expect("full").familiar();
        prop_assert_eq!(normalize(&familiar), Ok(full));
    }
}
