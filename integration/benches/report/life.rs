//! One life of a container, request by request, from a client that takes next to no time itself.

use std::time::Instant;

use lighter_integration::{Result, Spec};
use lighter_proto::any;
use lighter_proto::containerd::services as svc;
use prost_types::Any;
use svc::snapshots::v1 as snapshots;

use super::lean::Lean;
use super::millis;

/// The requests of a life, in their order.
pub(crate) const STEPS: [&str; 9] = [
    "prepare",
    "create container",
    "mounts",
    "create task",
    "start",
    "wait",
    "delete task",
    "delete container",
    "remove snapshot",
];

const SNAPSHOTTER: &str = "overlayfs";
const SNAPSHOTS: &str = "/containerd.services.snapshots.v1.Snapshots";
const CONTAINERS: &str = "/containerd.services.containers.v1.Containers";
const TASKS: &str = "/containerd.services.tasks.v1.Tasks";

/// What all containers of a contender have in common.
pub(crate) struct Life<'a> {
    /// Name of the unpacked image's top snapshot.
    pub(crate) top: &'a str,
    pub(crate) namespace: &'a str,
    /// Options of the runtime.
    pub(crate) options: Option<Any>,
}

impl Life<'_> {
    /// Runs `true` as container `id` and removes it: the milliseconds of every step.
    pub(crate) fn live(&self, lean: &mut Lean, id: &str) -> Result<[f64; STEPS.len()]> {
        let spec = Spec::new(self.namespace, id, &["true"]);
        let container = svc::containers::v1::Container {
            id: id.into(),
            runtime: Some(svc::containers::v1::container::Runtime {
                name: "io.containerd.runc.v2".into(),
                options: self.options.clone(),
            }),
            spec: Some(any::pack_json(any::SPEC, &spec.0)?),
            snapshotter: SNAPSHOTTER.into(),
            snapshot_key: id.into(),
            ..Default::default()
        };
        let mut times = [0.0; STEPS.len()];
        let (mut step, mut last) = (0, Instant::now());
        let mut lap = || {
            times[step] = millis(last);
            (step, last) = (step + 1, Instant::now());
        };
        let prepare = snapshots::PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: id.into(),
            parent: self.top.into(),
            ..Default::default()
        };
        lean.call(&format!("{SNAPSHOTS}/Prepare"), &prepare)?;
        lap();
        let create = svc::containers::v1::CreateContainerRequest {
            container: Some(container),
        };
        lean.call(&format!("{CONTAINERS}/Create"), &create)?;
        lap();
        let mounts = snapshots::MountsRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: id.into(),
        };
        let mounts: snapshots::MountsResponse =
            lean.ask(&format!("{SNAPSHOTS}/Mounts"), &mounts)?;
        lap();
        let create = svc::tasks::v1::CreateTaskRequest {
            container_id: id.into(),
            rootfs: mounts.mounts,
            ..Default::default()
        };
        lean.call(&format!("{TASKS}/Create"), &create)?;
        lap();
        let start = svc::tasks::v1::StartRequest {
            container_id: id.into(),
            exec_id: String::new(),
        };
        lean.call(&format!("{TASKS}/Start"), &start)?;
        lap();
        let wait = svc::tasks::v1::WaitRequest {
            container_id: id.into(),
            exec_id: String::new(),
        };
        let exit: svc::tasks::v1::WaitResponse = lean.ask(&format!("{TASKS}/Wait"), &wait)?;
        anyhow::ensure!(
            exit.exit_status == 0,
            "true ended with {}",
            exit.exit_status
        );
        lap();
        let delete = svc::tasks::v1::DeleteTaskRequest {
            container_id: id.into(),
        };
        lean.call(&format!("{TASKS}/Delete"), &delete)?;
        lap();
        let delete = svc::containers::v1::DeleteContainerRequest { id: id.into() };
        lean.call(&format!("{CONTAINERS}/Delete"), &delete)?;
        lap();
        let remove = snapshots::RemoveSnapshotRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: id.into(),
        };
        lean.call(&format!("{SNAPSHOTS}/Remove"), &remove)?;
        lap();
        Ok(times)
    }
}
