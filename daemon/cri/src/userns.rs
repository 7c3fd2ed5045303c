//! User namespaces of pods, pinned by a mount before the pod's first process exists, so that the
//! network namespace can belong to them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use lighter_proto::runtime::v1::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace};
use lighter_snapshotter::{LABEL_GID_MAPPING, LABEL_UID_MAPPING};
use lighter_store::Labels;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::error::{Error, Result, io as io_error};
use lighter_cni::NamespaceHolder;

/// The user namespace of a pod of its own; `None` where it uses the machine's.
#[must_use]
pub fn own(options: Option<&NamespaceOption>) -> Option<&UserNamespace> {
    options?
        .userns_options
        .as_ref()
        .filter(|u| u.mode() == NamespaceMode::Pod)
}

/// Checks a pod's user namespace: one line each, with root mapped.
///
/// # Errors
/// For modes and mappings that are not supported.
pub fn check(options: Option<&NamespaceOption>) -> Result<()> {
    let Some(userns) = options.and_then(|o| o.userns_options.as_ref()) else {
        return Ok(());
    };
    match userns.mode() {
        NamespaceMode::Node if userns.uids.is_empty() && userns.gids.is_empty() => return Ok(()),
        NamespaceMode::Pod => {}
        NamespaceMode::Node => {
            return Err(Error::unknown(
                "can't use mappings with user namespace mode NODE",
            ));
        }
        other => {
            return Err(Error::unknown(format!(
                "unsupported user namespace mode: {}",
                other.as_str_name()
            )));
        }
    }
    for (name, lines) in [("uid", &userns.uids), ("gid", &userns.gids)] {
        let [line] = lines.as_slice() else {
            return Err(Error::unknown(format!(
                "exactly one {name} mapping is supported, got {}",
                lines.len()
            )));
        };
        if line.container_id != 0 || line.length == 0 {
            return Err(Error::unknown(format!(
                "{name} 0 of the container must be mapped"
            )));
        }
    }
    Ok(())
}

/// The mappings as an OCI spec has them.
#[must_use]
pub fn lines(mappings: &[IdMapping]) -> Value {
    let line = |m: &IdMapping| json!({ "containerID": m.container_id, "hostID": m.host_id, "size": m.length });
    mappings.iter().map(line).collect()
}

/// Labels that make a snapshot's owners those of the pod.
#[must_use]
pub fn snapshot_labels(options: Option<&NamespaceOption>) -> Labels {
    let Some(userns) = own(options) else {
        return Labels::new();
    };
    let text = |m: &IdMapping| format!("{}:{}:{}", m.container_id, m.host_id, m.length);
    let joined = |lines: &[IdMapping]| lines.iter().map(text).collect::<Vec<_>>().join(",");
    Labels::from([
        (LABEL_UID_MAPPING.to_owned(), joined(&userns.uids)),
        (LABEL_GID_MAPPING.to_owned(), joined(&userns.gids)),
    ])
}

fn map(mappings: &[IdMapping]) -> String {
    let line = |m: &IdMapping| format!("{} {} {}\n", m.container_id, m.host_id, m.length);
    mappings.iter().map(line).collect()
}

/// Makes a user namespace with these mappings, pinned at `path`.
///
/// # Errors
/// When it cannot be made, mapped or pinned; nothing is left then.
pub async fn create(path: &Path, userns: &UserNamespace) -> Result<OwnedFd> {
    let (target, uids, gids) = (path.to_owned(), map(&userns.uids), map(&userns.gids));
    let made = tokio::task::spawn_blocking(move || create_at(&target, &uids, &gids)).await;
    let made = made.map_err(|e| Error::unknown(e.to_string()))?;
    made.map_err(io_error("failed to create user namespace at", path))
}

fn create_at(path: &Path, uids: &str, gids: &str) -> io::Result<OwnedFd> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    }
    let holder = NamespaceHolder::user()?;
    std::fs::write(holder.path("uid_map"), uids)?;
    std::fs::write(holder.path("gid_map"), gids)?;
    File::create(path)?;
    let none = None::<&str>;
    let source = holder.path("ns/user");
    let pinned = mount(Some(source.as_str()), path, none, MsFlags::MS_BIND, none);
    if let Err(error) = pinned {
        // The file says nothing by itself.
        let _ = std::fs::remove_file(path);
        return Err(error.into());
    }
    Ok(File::open(path)?.into())
}

/// Takes the pin off; a namespace that is gone is fine.
///
/// # Errors
/// When it can neither be unmounted nor deleted.
pub fn remove(path: &Path) -> Result<()> {
    while umount2(path, MntFlags::MNT_DETACH).is_ok() {}
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(container_id: u32, length: u32) -> IdMapping {
        IdMapping {
            container_id,
            host_id: 100_000,
            length,
        }
    }

    fn options(mode: NamespaceMode, uids: Vec<IdMapping>, gids: Vec<IdMapping>) -> NamespaceOption {
        NamespaceOption {
            userns_options: Some(UserNamespace {
                mode: mode.into(),
                uids,
                gids,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn only_one_line_that_maps_root_is_taken() {
        let pod = |uids| options(NamespaceMode::Pod, uids, vec![line(0, 5)]);
        check(Some(&pod(vec![line(0, 1)]))).unwrap();
        for bad in [
            vec![],
            vec![line(1, 1)],
            vec![line(0, 0)],
            vec![line(0, 1), line(1, 1)],
        ] {
            assert!(check(Some(&pod(bad.clone()))).is_err(), "{bad:?}");
        }
        let node = options(NamespaceMode::Node, vec![line(0, 1)], vec![]);
        assert!(check(Some(&node)).is_err());
        for mode in [NamespaceMode::Container, NamespaceMode::Target] {
            let error = check(Some(&options(mode, vec![], vec![]))).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("unsupported user namespace mode")
            );
        }
    }

    #[test]
    fn a_snapshot_is_labelled_with_the_mapping() {
        let pod = options(NamespaceMode::Pod, vec![line(0, 7)], vec![line(0, 9)]);
        let labels = snapshot_labels(Some(&pod));
        assert_eq!(labels[LABEL_UID_MAPPING], "0:100000:7");
        assert_eq!(labels[LABEL_GID_MAPPING], "0:100000:9");
        assert!(snapshot_labels(None).is_empty());
    }

    #[tokio::test]
    async fn a_namespace_is_pinned_and_removed() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ns/user");
        let pod = options(NamespaceMode::Pod, vec![line(0, 7)], vec![line(0, 7)]);
        create(&path, own(Some(&pod)).unwrap()).await.unwrap();
        let stat = nix::sys::statfs::statfs(&path).unwrap();
        assert_eq!(stat.filesystem_type().0, 0x6e73_6673);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
    }
}
