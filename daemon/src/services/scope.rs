//! Whose objects a request sees: its namespace and lease headers, decoded.

use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use lighter_store::{Namespace, Scope};
use tonic::{Request, Status};

/// Header that names the namespace.
pub const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Header that names the lease which everything made or found by the request is added to.
pub const LEASE_HEADER: &str = "containerd-lease";

/// Namespace and lease of a request; of several values the first counts.
///
/// # Errors
/// `FailedPrecondition` without a namespace, `InvalidArgument` for a malformed one.
pub fn scope_of<T>(request: &Request<T>) -> Result<Scope, Status> {
    let namespace = header(request, NAMESPACE_HEADER).ok_or_else(|| {
        into_status(WireError::new(
            ErrorKind::FailedPrecondition,
            "namespace is required",
        ))
    })?;
    let namespace = Namespace::new(namespace).map_err(|error| {
        into_status(WireError::new(
            ErrorKind::InvalidArgument,
            format!("namespace validation: {error}"),
        ))
    })?;
    let lease = header(request, LEASE_HEADER).map(str::to_owned);
    Ok(Scope { namespace, lease })
}

/// The header's first value; `None` when it is absent, empty, or not text.
fn header<'a, T>(request: &'a Request<T>, name: &str) -> Option<&'a str> {
    let value = request.metadata().get(name)?.to_str().ok()?;
    (!value.is_empty()).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&'static str, &'static str)]) -> Request<()> {
        let mut request = Request::new(());
        for (name, value) in headers {
            request
                .metadata_mut()
                .append(*name, value.parse().expect("a header value"));
        }
        request
    }

    #[test]
    fn the_first_value_of_each_header_counts() {
        let scope = scope_of(&request(&[
            (NAMESPACE_HEADER, "a"),
            (NAMESPACE_HEADER, "b"),
            (LEASE_HEADER, "l"),
        ]))
        .expect("a scope");
        assert_eq!(scope.namespace.as_str(), "a");
        assert_eq!(scope.lease.as_deref(), Some("l"));
    }

    #[test]
    fn a_missing_namespace_and_a_malformed_one_differ() {
        for headers in [&[][..], &[(NAMESPACE_HEADER, "")]] {
            let status = scope_of(&request(headers)).expect_err("no namespace");
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            assert_eq!(
                status.message(),
                "namespace is required: failed precondition"
            );
        }
        let status = scope_of(&request(&[(NAMESPACE_HEADER, "a/b")])).expect_err("malformed");
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().starts_with("namespace validation: "));
    }
}
