//! Root filesystems for user namespaces: a copy of the image's snapshot whose files belong to the
//! mapped ids, made once and shared by every container with the same mapping.

use std::collections::HashMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::Context as _;
use lighter_proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use lighter_proto::containerd::types::Mount;

use crate::advice;
use crate::client::Client;
use crate::image::unpack;
use crate::mount;
use crate::snapshot::{self, Access};
use crate::spec::model::IdMapping;

/// Directories nested deeper than this are refused: an image made them.
const MAX_DEPTH: usize = 1024;
/// Permission bits of a mode, setuid and its like included.
const PERMISSIONS: u32 = 0o7777;

/// The mappings of a container.
#[derive(Debug, Clone, Copy)]
pub(super) struct Maps<'a> {
    pub(super) uids: &'a [IdMapping],
    pub(super) gids: &'a [IdMapping],
}

impl Maps<'_> {
    /// Whether there is anything to map.
    pub(super) fn is_empty(&self) -> bool {
        self.uids.is_empty()
    }

    /// Labels that leave the work to the snapshotter.
    pub(super) fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (
                "containerd.io/snapshot/uidmapping".to_owned(),
                text(self.uids),
            ),
            (
                "containerd.io/snapshot/gidmapping".to_owned(),
                text(self.gids),
            ),
        ])
    }

    fn owner(&self, uid: u32, gid: u32) -> anyhow::Result<(u32, u32)> {
        Ok((
            mapped(self.uids, uid, "uid")?,
            mapped(self.gids, gid, "gid")?,
        ))
    }
}

fn text(maps: &[IdMapping]) -> String {
    let one = |map: &IdMapping| format!("{}:{}:{}", map.container_id, map.host_id, map.size);
    maps.iter().map(one).collect::<Vec<_>>().join(",")
}

fn mapped(maps: &[IdMapping], id: u32, kind: &str) -> anyhow::Result<u32> {
    let found = maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id)?;
        (offset < map.size)
            .then(|| map.host_id.checked_add(offset))
            .flatten()
    });
    found.with_context(|| format!("the image has files of {kind} {id}, which no mapping covers"))
}

/// The committed snapshot to build on, made if missing.
pub(super) async fn parent(
    client: &Client,
    snapshotter: &str,
    parent: &str,
    maps: &Maps<'_>,
) -> anyhow::Result<String> {
    let name = format!("{parent}-{}-{}", text(maps.uids), text(maps.gids));
    if unpack::exists(client, snapshotter, &name).await? {
        return Ok(name);
    }
    let key = format!("{name}-remap-{:016x}", rand::random::<u64>());
    let request = PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.clone(),
        parent: parent.to_owned(),
        labels: HashMap::new(),
    };
    let mounts = snapshot::make(client, Access::Write, request).await?;
    let outcome = async {
        chown(&mounts, maps).context("cannot map the image's files")?;
        let request = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.clone(),
            key: key.clone(),
            ..Default::default()
        };
        match client.snapshots().commit(request).await {
            Err(status) if !advice::is_already_exists(&status) => Err(status.into()),
            Err(_) => anyhow::Ok(false),
            Ok(_) => Ok(true),
        }
    }
    .await;
    if !matches!(outcome, Ok(true)) {
        let snapshotter = snapshotter.to_owned();
        let _ = client
            .snapshots()
            .remove(RemoveSnapshotRequest { snapshotter, key })
            .await;
    }
    outcome.map(|_| name)
}

fn chown(mounts: &[Mount], maps: &Maps<'_>) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("ctr-remap-").tempdir()?;
    mount::apply(mounts, dir.path())?;
    let outcome = walk(dir.path(), maps, MAX_DEPTH);
    mount::undo(dir.path())?;
    outcome
}

/// Nobody else has the snapshot yet, so names cannot be exchanged under us; links are not followed.
fn walk(path: &Path, maps: &Maps<'_>, depth: usize) -> anyhow::Result<()> {
    anyhow::ensure!(depth > 0, "{} is nested too deeply", path.display());
    let metadata = path.symlink_metadata()?;
    let (uid, gid) = maps.owner(metadata.uid(), metadata.gid())?;
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
    if metadata.is_symlink() {
        return Ok(());
    }
    // Changing the owner drops setuid and setgid.
    std::fs::set_permissions(
        path,
        PermissionsExt::from_mode(metadata.mode() & PERMISSIONS),
    )?;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path)? {
            walk(&entry?.path(), maps, depth - 1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id,
            size,
        }
    }

    #[test]
    fn ids_move_with_their_range() {
        let maps = [map(0, 1000, 10), map(10, 5000, 10)];
        assert_eq!(mapped(&maps, 0, "uid").unwrap(), 1000);
        assert_eq!(mapped(&maps, 15, "uid").unwrap(), 5005);
        assert!(mapped(&maps, 20, "uid").is_err());
        assert!(mapped(&[map(0, u32::MAX, 10)], 5, "uid").is_err());
    }

    #[test]
    fn labels_list_all_ranges() {
        let (uids, gids) = ([map(0, 1, 2), map(3, 4, 5)], [map(0, 9, 9)]);
        let labels = Maps {
            uids: &uids,
            gids: &gids,
        }
        .labels();
        assert_eq!(labels["containerd.io/snapshot/uidmapping"], "0:1:2,3:4:5");
    }
}
