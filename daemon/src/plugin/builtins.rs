//! The plugins that are always there, under upstream's types and ids.

use lighter_proto::errdefs::{ErrorKind, WireError};

use super::{Graph, Plugin};
use crate::config::{Config, ProxyPlugin};

/// Types, as upstream names them.
pub(crate) mod kind {
    pub(crate) const CONTENT: &str = "io.containerd.content.v1";
    pub(crate) const SNAPSHOTTER: &str = "io.containerd.snapshotter.v1";
    pub(crate) const EVENT: &str = "io.containerd.event.v1";
    pub(crate) const METADATA: &str = "io.containerd.metadata.v1";
    pub(crate) const GC: &str = "io.containerd.gc.v1";
    pub(crate) const LEASE: &str = "io.containerd.lease.v1";
    pub(crate) const DIFFER: &str = "io.containerd.differ.v1";
    pub(crate) const RUNTIME: &str = "io.containerd.runtime.v2";
    pub(crate) const SHIM: &str = "io.containerd.shim.v1";
    pub(crate) const SANDBOX_STORE: &str = "io.containerd.sandbox.store.v1";
    pub(crate) const SANDBOX_CONTROLLER: &str = "io.containerd.sandbox.controller.v1";
    pub(crate) const MOUNT_MANAGER: &str = "io.containerd.mount-manager.v1";
    pub(crate) const MOUNT_HANDLER: &str = "io.containerd.mount-handler.v1";
    pub(crate) const STREAMING: &str = "io.containerd.streaming.v1";
    pub(crate) const TRANSFER: &str = "io.containerd.transfer.v1";
    pub(crate) const WARNING: &str = "io.containerd.warning.v1";
    pub(crate) const MONITOR: &str = "io.containerd.monitor.task.v1";
    pub(crate) const RESTART: &str = "io.containerd.monitor.container.v1";
    pub(crate) const SERVICE: &str = "io.containerd.service.v1";
    pub(crate) const CRI: &str = "io.containerd.cri.v1";
    pub(crate) const GRPC: &str = "io.containerd.grpc.v1";
    pub(crate) const TTRPC: &str = "io.containerd.ttrpc.v1";
}

/// URI schemes of stdio that shims understand (export of the runtime).
const LOG_SCHEMES: &str = "fifo,binary,binary-v2,file";

/// gRPC services that have a plugin of their own, and the types each needs.
const GRPC_SERVICES: [(&str, &[&str]); 16] = [
    ("containers", &[kind::SERVICE]),
    ("content", &[kind::SERVICE]),
    ("diff", &[kind::SERVICE]),
    ("events", &[kind::EVENT]),
    ("healthcheck", &[]),
    ("images", &[kind::SERVICE]),
    ("introspection", &[kind::SERVICE]),
    ("leases", &[kind::LEASE]),
    ("mounts", &[kind::MOUNT_MANAGER]),
    ("namespaces", &[kind::SERVICE]),
    ("sandbox-controllers", &[kind::SANDBOX_CONTROLLER]),
    ("sandboxes", &[kind::SANDBOX_STORE]),
    ("snapshots", &[kind::SERVICE]),
    ("streaming", &[kind::STREAMING]),
    ("tasks", &[kind::SERVICE]),
    ("version", &[]),
];

/// In-process services, which upstream lists apart from their gRPC faces.
const SERVICES: [(&str, &[&str]); 8] = [
    ("containers-service", &[kind::METADATA, kind::EVENT]),
    ("content-service", &[kind::METADATA, kind::EVENT]),
    ("diff-service", &[kind::DIFFER]),
    ("images-service", &[kind::METADATA, kind::GC, kind::EVENT]),
    ("introspection-service", &[]),
    ("namespaces-service", &[kind::METADATA, kind::EVENT]),
    ("snapshots-service", &[kind::METADATA]),
    (
        "tasks-service",
        &[kind::RUNTIME, kind::METADATA, kind::MONITOR],
    ),
];

/// The part of the graph that does not depend on the machine: stores, engines, services.
pub(crate) fn graph(config: &Config, stores: Vec<Plugin>, differs: Vec<Plugin>) -> Graph {
    let mut graph = Graph::default();
    graph.add(Plugin::new(kind::EVENT, "exchange"));
    graph.add(Plugin::new(kind::WARNING, "deprecations"));
    for store in stores {
        graph.add(store);
    }
    graph.add(
        Plugin::new(kind::METADATA, "bolt")
            .requires(&[kind::CONTENT, kind::SNAPSHOTTER, kind::EVENT])
            .export(
                "policy",
                match config.plugins.metadata.content_sharing_policy.as_str() {
                    "" => "shared",
                    policy => policy,
                },
            ),
    );
    graph.add(Plugin::new(kind::GC, "scheduler").requires(&[kind::METADATA]));
    graph.add(Plugin::new(kind::LEASE, "manager").requires(&[kind::METADATA]));
    for differ in differs {
        graph.add(differ);
    }
    graph.add(
        Plugin::new(kind::MOUNT_MANAGER, "bolt")
            .requires(&[kind::METADATA, kind::MOUNT_HANDLER])
            .export(
                "root",
                config
                    .root
                    .join("io.containerd.mount-manager.v1.bolt")
                    .display()
                    .to_string(),
            ),
    );
    graph.add(Plugin::new(kind::MOUNT_HANDLER, "loop").on_platform());
    graph.add(
        Plugin::new(kind::SHIM, "manager")
            .requires(&[kind::EVENT, kind::METADATA])
            .on_platform(),
    );
    graph.add(
        Plugin::new(kind::RUNTIME, "task")
            .requires(&[kind::SHIM, kind::METADATA])
            .on_platform()
            .export("log-uri-schemes", LOG_SCHEMES),
    );
    graph.add(
        Plugin::new(kind::MONITOR, "cgroups")
            .requires(&[kind::EVENT])
            .on_platform(),
    );
    graph.add(Plugin::new(kind::SANDBOX_STORE, "local").requires(&[kind::METADATA]));
    graph.add(Plugin::new(kind::SANDBOX_CONTROLLER, "shim").requires(&[kind::SHIM, kind::EVENT]));
    for (name, proxy) in config.proxies.iter().filter(|(_, p)| p.kind == "sandbox") {
        graph.add(proxied(kind::SANDBOX_CONTROLLER, name, proxy));
    }
    graph.add(Plugin::new(kind::STREAMING, "manager").requires(&[kind::METADATA]));
    graph.add(Plugin::new(kind::TRANSFER, "local").requires(&[
        kind::LEASE,
        kind::METADATA,
        kind::DIFFER,
        kind::STREAMING,
    ]));
    services(&mut graph);
    graph.add(Plugin::new(kind::GRPC, "transfer").requires(&[kind::TRANSFER, kind::STREAMING]));
    graph.add(Plugin::new(kind::TTRPC, "events").requires(&[kind::EVENT]));
    let policies = ["no", "always", "on-failure", "unless-stopped"];
    graph.add(
        Plugin::new(kind::RESTART, "restart")
            .requires(&[kind::EVENT, kind::SERVICE])
            .capabilities(policies.map(str::to_owned).to_vec()),
    );
    graph
}

/// A plugin in another process, as the configuration describes it.
pub(crate) fn proxied(kind: &str, name: &str, proxy: &ProxyPlugin) -> Plugin {
    let mut plugin = Plugin::new(kind, name)
        .on_platform()
        .capabilities(proxy.capabilities.clone())
        .export("address", proxy.address.clone());
    for (key, value) in &proxy.exports {
        plugin = plugin.export(key, value.clone());
    }
    plugin
}

/// The in-process services, and their faces on the socket.
fn services(graph: &mut Graph) {
    for (id, requires) in SERVICES {
        graph.add(Plugin::new(kind::SERVICE, id).requires(requires));
    }
    for (id, requires) in GRPC_SERVICES {
        let mut plugin = Plugin::new(kind::GRPC, id).requires(requires);
        let service = format!("{id}-service");
        if SERVICES.iter().any(|(known, _)| *known == service) {
            plugin = plugin.fronts(kind::SERVICE, &service);
        }
        graph.add(plugin);
    }
}

/// Why a plugin is off.
pub(crate) fn skipped(uri: &str) -> WireError {
    WireError::new(
        ErrorKind::Unavailable,
        format!("{uri} is turned off by disabled_plugins: skip plugin"),
    )
}
