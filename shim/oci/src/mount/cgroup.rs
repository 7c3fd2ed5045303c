//! Mounts of type `cgroup`: the container's view of the control groups, on v1, hybrid and v2 hosts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, OFlags};
use rustix::mount::OpenTreeFlags;

use super::attach::{self, Attached, Site};
use super::options::Options;
use super::target::{self, Shape};
use crate::cgroup::{CgroupView, HierarchyView};
use crate::error::{Context, Result};
use crate::spec::Mount;
use crate::sys::attr;

/// Makes a mount of type `cgroup` or `cgroup2`.
pub(crate) fn attach(
    site: &Site<'_>,
    mount: &Mount,
    view: &CgroupView,
    own_namespace: bool,
) -> Result<Attached> {
    match view {
        CgroupView::Unified { path } => attach_v2(site, mount, path, own_namespace),
        CgroupView::Legacy { hierarchies } => attach_v1(site, mount, hierarchies, own_namespace),
    }
}

fn attach_v2(site: &Site<'_>, mount: &Mount, path: &Path, own_namespace: bool) -> Result<Attached> {
    let as_v2 = Mount {
        kind: "cgroup2".into(),
        source: "cgroup".into(),
        ..mount.clone()
    };
    match attach::attach(site, &as_v2, None) {
        Ok(attached) => Ok(attached),
        // In a user namespace that does not own the cgroup namespace: show the host's, or the own subtree of it.
        Err(error) => {
            let source = if own_namespace {
                path.to_path_buf()
            } else {
                "/sys/fs/cgroup".into()
            };
            let mut options = mount.options.clone();
            options.push("rbind".into());
            let bind = Mount {
                kind: "bind".into(),
                source: source.to_string_lossy().into_owned(),
                options,
                ..mount.clone()
            };
            attach::attach(site, &bind, None).map_err(|_| error)
        }
    }
}

fn attach_v1(
    site: &Site<'_>,
    mount: &Mount,
    hierarchies: &[HierarchyView],
    own_namespace: bool,
) -> Result<Attached> {
    let base = Mount {
        destination: mount.destination.clone(),
        kind: "tmpfs".into(),
        source: "tmpfs".into(),
        options: ["nosuid", "nodev", "noexec", "mode=755"]
            .map(str::to_owned)
            .to_vec(),
        ..Mount::default()
    };
    let tmpfs = attach::attach(site, &base, None)?;
    let wanted = Options::parse(&mount.options)?;
    for hierarchy in hierarchies {
        let target = target::make(
            tmpfs.mount.as_fd(),
            Path::new(&hierarchy.name),
            Shape::Directory,
        )?;
        let tree = if own_namespace {
            new_v1_mount(hierarchy)?
        } else {
            bind_own_group(hierarchy)?
        };
        let mut set = attr::NOSUID | attr::NODEV | attr::NOEXEC;
        set |= wanted.set & attr::RDONLY;
        crate::sys::mount_setattr(
            tree.as_fd(),
            &crate::sys::AttrChange {
                set,
                recursive: true,
                ..Default::default()
            },
        )
        .context(|| format!("set attributes of cgroup {}", hierarchy.name))?;
        attach::move_to(tree.as_fd(), target.as_fd())
            .context(|| format!("mount cgroup {}", hierarchy.name))?;
        link_controllers(tmpfs.mount.as_fd(), hierarchy)?;
    }
    Ok(Attached {
        mount: tmpfs.mount,
        read_only_later: wanted.set & attr::RDONLY != 0,
    })
}

/// In a cgroup namespace a fresh mount of the hierarchy shows the namespace's root.
fn new_v1_mount(hierarchy: &HierarchyView) -> Result<OwnedFd> {
    let what = || format!("mount cgroup hierarchy {}", hierarchy.name);
    let context = rustix::mount::fsopen("cgroup", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC)
        .context(what)?;
    rustix::mount::fsconfig_set_string(&context, "source", "cgroup").context(what)?;
    for controller in &hierarchy.controllers {
        match controller.strip_prefix("name=") {
            Some(name) => {
                rustix::mount::fsconfig_set_flag(&context, "none").context(what)?;
                rustix::mount::fsconfig_set_string(&context, "name", name).context(what)?;
            }
            None => {
                rustix::mount::fsconfig_set_flag(&context, controller.as_str()).context(what)?;
            }
        }
    }
    rustix::mount::fsconfig_create(&context).context(what)?;
    rustix::mount::fsmount(
        &context,
        rustix::mount::FsMountFlags::FSMOUNT_CLOEXEC,
        rustix::mount::MountAttrFlags::empty(),
    )
    .context(what)
}

fn bind_own_group(hierarchy: &HierarchyView) -> Result<OwnedFd> {
    rustix::mount::open_tree(
        CWD,
        &hierarchy.path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .context(|| format!("bind cgroup {}", hierarchy.path.display()))
}

/// `cpu` → `cpu,cpuacct` for controllers mounted together.
fn link_controllers(tmpfs: BorrowedFd<'_>, hierarchy: &HierarchyView) -> Result<()> {
    let inside = rustix::fs::openat(
        tmpfs,
        ".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .context(|| "open the cgroup mount")?;
    for controller in hierarchy
        .controllers
        .iter()
        .filter(|name| !name.contains('=') && **name != hierarchy.name)
    {
        match rustix::fs::symlinkat(&hierarchy.name, &inside, controller.as_str()) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => {
                return Err(error).context(|| format!("link cgroup controller {controller}"));
            }
        }
    }
    Ok(())
}
