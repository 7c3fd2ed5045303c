//! Which services are served, over which engines, and how large their messages may be.

use std::sync::Arc;

use lighter_cri::image::ImageEdge;
use lighter_cri::plugin::Gate;
use lighter_engine::differ::Differs;
use lighter_engine::gc::Collector;
use lighter_engine::mounts::Mounts;
use lighter_engine::runtime::Manager;
use lighter_engine::sandbox::Sandboxes;
use lighter_engine::streaming::Streams;
use lighter_engine::transfer::Transfer;
use lighter_proto::containerd::services::content::v1::content_server::ContentServer;
use lighter_proto::containerd::services::diff::v1::diff_server::DiffServer;
use lighter_proto::containerd::services::events::v1::events_server::EventsServer;
use lighter_proto::containerd::services::images::v1::images_server::ImagesServer;
use lighter_proto::containerd::services::introspection::v1::introspection_server::IntrospectionServer;
use lighter_proto::containerd::services::leases::v1::leases_server::LeasesServer;
use lighter_proto::containerd::services::mounts::v1::mounts_server::MountsServer;
use lighter_proto::containerd::services::namespaces::v1::namespaces_server::NamespacesServer;
use lighter_proto::containerd::services::sandbox::v1::controller_server::ControllerServer;
use lighter_proto::containerd::services::sandbox::v1::store_server::StoreServer;
use lighter_proto::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use lighter_proto::containerd::services::streaming::v1::streaming_server::StreamingServer;
use lighter_proto::containerd::services::tasks::v1::tasks_server::TasksServer;
use lighter_proto::containerd::services::transfer::v1::transfer_server::TransferServer;
use lighter_proto::containerd::services::version::v1::version_server::VersionServer;
use lighter_proto::lighter::disk::v1::disk_server::DiskServer;
use lighter_proto::runtime::v1::image_service_server::ImageServiceServer;
use lighter_store::metadata::Db;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::config::MessageLimits;
use crate::plugin::Graph;
use crate::plugin::builtins::kind;
use crate::services::containers::ContainersEdge;
use crate::services::content::{ContentService, Reads};
use crate::services::cri::CriEdge;
use crate::services::diff::DiffService;
use crate::services::disk::DiskService;
use crate::services::events::EventsService;
use crate::services::images::ImagesService;
use crate::services::introspection::IntrospectionService;
use crate::services::leases::LeasesService;
use crate::services::mounts::MountsService;
use crate::services::namespaces::NamespacesService;
use crate::services::sandboxes::{SandboxController, SandboxStore};
use crate::services::snapshots::SnapshotsService;
use crate::services::streaming::StreamingService;
use crate::services::tasks::TasksService;
use crate::services::transfer::TransferService;
use crate::services::version::VersionService;

/// What services are made over.
pub(crate) struct Engines {
    /// Records.
    pub(crate) db: Db,
    /// Tasks.
    pub(crate) tasks: Manager,
    /// Garbage collection.
    pub(crate) collector: Collector,
    /// The daemon's directory.
    pub(crate) root: std::path::PathBuf,
    /// Layers to mounts and back.
    pub(crate) differs: Differs,
    /// Sandbox controllers.
    pub(crate) sandboxes: Sandboxes,
    /// Managed mounts.
    pub(crate) mounts: Mounts,
    /// Named streams.
    pub(crate) streams: Streams,
    /// Transfers.
    pub(crate) transfer: Transfer,
    /// Owner of what handlers leave behind.
    pub(crate) tracker: TaskTracker,
    /// What the daemon is made of.
    pub(crate) introspection: IntrospectionService,
    /// Cancelled when the daemon stops: what would wait for ever ends then.
    pub(crate) stop: CancellationToken,
}

/// A service that keeps to the limits of messages.
macro_rules! limited {
    ($limits:expr, $server:ident, $service:expr) => {
        $server::new($service)
            .max_decoding_message_size($limits.receive_bytes)
            .max_encoding_message_size($limits.send_bytes)
    };
}

/// All services of the client socket but CRI's; a service whose plugin of `graph` is turned off, or
/// lacks what it needs, is not there.
#[allow(clippy::too_many_lines, reason = "one line for each service")]
pub(crate) async fn routes(engines: Engines, limits: MessageLimits, graph: &Graph) -> Routes {
    let Engines {
        db,
        tasks,
        collector,
        root,
        differs,
        sandboxes,
        mounts,
        streams,
        transfer,
        tracker,
        introspection,
        stop,
    } = engines;
    let (health, health_server) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let leases = LeasesService::new(db.clone(), collector.clone());
    let images = ImagesService::new(db.clone(), collector.clone());
    let disk = DiskService::new(collector, root);
    let mut routes = Routes::new(limited!(limits, DiskServer, disk));
    if graph.works(kind::GRPC, "healthcheck") {
        routes = routes.add_service(health_server);
    }
    macro_rules! serve {
        ($id:literal, $server:ident, $service:expr) => {
            if graph.works(kind::GRPC, $id) {
                routes = routes.add_service(limited!(limits, $server, $service));
            }
        };
    }
    serve!("version", VersionServer, VersionService);
    serve!("introspection", IntrospectionServer, introspection);
    serve!("diff", DiffServer, DiffService::new(differs));
    serve!(
        "mounts",
        MountsServer,
        MountsService::new(mounts, db.leases())
    );
    serve!("sandboxes", StoreServer, SandboxStore::new(&db));
    serve!(
        "sandbox-controllers",
        ControllerServer,
        SandboxController::new(&db, sandboxes)
    );
    serve!(
        "events",
        EventsServer,
        EventsService::new(&db, stop.clone())
    );
    serve!(
        "namespaces",
        NamespacesServer,
        NamespacesService::new(db.clone())
    );
    serve!("leases", LeasesServer, leases);
    if graph.works(kind::GRPC, "content") {
        let content = ContentService::new(db.clone());
        let served = limited!(limits, ContentServer, content.clone());
        routes = routes.add_service(Reads::new(served, content));
    }
    serve!(
        "snapshots",
        SnapshotsServer,
        SnapshotsService::new(db.clone())
    );
    serve!("images", ImagesServer, images);
    if graph.works(kind::GRPC, "containers") {
        routes = routes.add_service(ContainersEdge::new(db.clone(), limits));
    }
    serve!(
        "tasks",
        TasksServer,
        TasksService::new(tasks, db.containers(), stop)
    );
    serve!(
        "streaming",
        StreamingServer,
        StreamingService::new(streams, tracker)
    );
    serve!("transfer", TransferServer, TransferService::new(transfer));
    routes
}

/// `routes` and both services of CRI.
pub(crate) fn with_cri(routes: Routes, gate: Arc<Gate>, limits: MessageLimits) -> Routes {
    routes
        .add_service(CriEdge::new(Arc::clone(&gate), limits))
        .add_service(limited!(limits, ImageServiceServer, ImageEdge(gate)))
}
