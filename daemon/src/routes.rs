//! Which services are served, over which engines, and how large their messages may be.

use lighter_engine::differ::Differ;
use lighter_engine::gc::Collector;
use lighter_engine::mounts::Mounts;
use lighter_engine::runtime::Manager;
use lighter_engine::sandbox::Sandboxes;
use lighter_engine::streaming::Streams;
use lighter_engine::transfer::Transfer;
use lighter_proto::containerd::services::containers::v1::containers_server::ContainersServer;
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
use lighter_store::metadata::Db;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::config::MessageLimits;
use crate::services::containers::ContainersService;
use crate::services::content::ContentService;
use crate::services::diff::DiffService;
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
    /// Layers to mounts and back.
    pub(crate) differ: Differ,
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
}

/// All services of the client socket.
pub(crate) async fn routes(engines: Engines, limits: MessageLimits) -> Routes {
    macro_rules! limited {
        ($server:ident, $service:expr) => {
            $server::new($service)
                .max_decoding_message_size(limits.receive_bytes)
                .max_encoding_message_size(limits.send_bytes)
        };
    }
    let Engines {
        db,
        tasks,
        collector,
        differ,
        sandboxes,
        mounts,
        streams,
        transfer,
        tracker,
        introspection,
    } = engines;
    let (health, health_server) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    let leases = LeasesService::new(db.clone(), collector.clone());
    let images = ImagesService::new(db.clone(), collector);
    Routes::new(health_server)
        .add_service(limited!(VersionServer, VersionService))
        .add_service(limited!(IntrospectionServer, introspection))
        .add_service(limited!(DiffServer, DiffService::new(differ)))
        .add_service(limited!(MountsServer, MountsService::new(mounts)))
        .add_service(limited!(StoreServer, SandboxStore::new(&db)))
        .add_service(limited!(
            ControllerServer,
            SandboxController::new(&db, sandboxes)
        ))
        .add_service(limited!(EventsServer, EventsService::new(&db)))
        .add_service(limited!(
            NamespacesServer,
            NamespacesService::new(db.clone())
        ))
        .add_service(limited!(LeasesServer, leases))
        .add_service(limited!(ContentServer, ContentService::new(db.clone())))
        .add_service(limited!(SnapshotsServer, SnapshotsService::new(db.clone())))
        .add_service(limited!(ImagesServer, images))
        .add_service(limited!(
            ContainersServer,
            ContainersService::new(db.clone())
        ))
        .add_service(limited!(
            TasksServer,
            TasksService::new(tasks, db.containers())
        ))
        .add_service(limited!(
            StreamingServer,
            StreamingService::new(streams, tracker)
        ))
        .add_service(limited!(TransferServer, TransferService::new(transfer)))
}
