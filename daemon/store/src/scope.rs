//! The scope of a request: whose objects it sees and which lease protects what it makes.

use crate::Namespace;

/// Namespace and lease of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The namespace every name in the request is looked up in.
    pub namespace: Namespace,
    /// Lease that everything made or found by the request is added to (header `containerd-lease`).
    pub lease: Option<String>,
}

impl Scope {
    /// A scope without lease.
    #[must_use]
    pub fn new(namespace: Namespace) -> Self {
        Self {
            namespace,
            lease: None,
        }
    }

    /// The same namespace under `lease`.
    #[must_use]
    pub fn with_lease(&self, lease: impl Into<String>) -> Self {
        Self {
            namespace: self.namespace.clone(),
            lease: Some(lease.into()),
        }
    }
}
