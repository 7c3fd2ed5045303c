//! Registries over HTTP: references, hosts, auth, resolve, fetch, push.
