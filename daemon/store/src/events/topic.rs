//! Topics: `/` and identifiers, and the ones that the stores publish.

use crate::{Error, Identifier};

/// A namespace was made.
pub const NAMESPACE_CREATE: &str = "/namespaces/create";
/// A namespace's labels changed.
pub const NAMESPACE_UPDATE: &str = "/namespaces/update";
/// A namespace was removed.
pub const NAMESPACE_DELETE: &str = "/namespaces/delete";
/// A container was recorded.
pub const CONTAINER_CREATE: &str = "/containers/create";
/// A container's record changed.
pub const CONTAINER_UPDATE: &str = "/containers/update";
/// A container's record was removed.
pub const CONTAINER_DELETE: &str = "/containers/delete";
/// An image was recorded.
pub const IMAGE_CREATE: &str = "/images/create";
/// An image's record changed.
pub const IMAGE_UPDATE: &str = "/images/update";
/// An image's record was removed.
pub const IMAGE_DELETE: &str = "/images/delete";
/// A blob came into a namespace.
pub const CONTENT_CREATE: &str = "/content/create";
/// A blob left a namespace.
pub const CONTENT_DELETE: &str = "/content/delete";
/// A writable snapshot was made.
pub const SNAPSHOT_PREPARE: &str = "/snapshot/prepare";
/// A snapshot was committed.
pub const SNAPSHOT_COMMIT: &str = "/snapshot/commit";
/// A snapshot was removed.
pub const SNAPSHOT_REMOVE: &str = "/snapshot/remove";

/// Checks a topic: a leading `/`, then at least one identifier, joined by `/`.
///
/// # Errors
/// `InvalidArgument` that names the topic.
pub fn check(topic: &str) -> Result<(), Error> {
    let invalid = |reason: String| Error::Invalid {
        reason: format!("topic {topic:.200?}: {reason}"),
    };
    if topic.is_empty() {
        return Err(invalid("must not be empty".to_owned()));
    }
    let Some(rest) = topic.strip_prefix('/') else {
        return Err(invalid("must start with '/'".to_owned()));
    };
    if rest.is_empty() {
        return Err(invalid("must have at least one component".to_owned()));
    }
    for component in rest.split('/') {
        Identifier::new(component)
            .map_err(|error| invalid(format!("component {component:.80?}: {error}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_identifiers_below_a_slash() {
        for good in ["/a", CONTENT_CREATE, "/tasks/exec-added"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "/",
            "a",
            "/a/",
            "//a",
            "/tasks/?",
            "/a b",
            &format!("/{}", "x".repeat(99)),
        ] {
            let text = check(bad).expect_err(bad).to_string();
            assert!(text.ends_with("invalid argument"), "{text}");
        }
    }
}
