//! The container's file tree: mounts in order, devices, masks, and the change of root.
//!
//! Runs in the new process, in its mount namespace, before the change of root: every source is looked up on the host,
//! every target beneath the descriptor of the new root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags,
};

use super::devices;
use crate::cgroup::CgroupView;
use crate::error::{Context, Error, Result};
use crate::mount::attach::{self, Site};
use crate::mount::cgroup;
use crate::mount::options::{self, MS_SHARED, MS_SLAVE, MS_UNBINDABLE};
use crate::mount::target::{self, Shape};
use crate::spec::Spec;
use crate::sys::{self, AttrChange};

/// statfs(2) type of devpts.
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Sources that the parent opened, because the new process may not be allowed to reach them.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// The root filesystem's tree.
    pub(crate) root: Option<OwnedFd>,
    /// A tree per mount of the configuration, for binds.
    pub(crate) binds: Vec<Option<OwnedFd>>,
}

/// What the tree is made from.
pub(crate) struct Plan<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) bundle: &'a Path,
    pub(crate) rootfs: &'a Path,
    pub(crate) user_namespace: bool,
    pub(crate) cgroup_namespace: bool,
    pub(crate) cgroup: &'a CgroupView,
}

/// The tree, mounted but not entered.
pub(crate) struct Tree {
    pub(crate) root: OwnedFd,
    /// The container's own devpts, if it has one.
    pub(crate) devpts: Option<OwnedFd>,
    propagation: (u64, bool),
}

/// Which sources the parent opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// All, for a process in another user namespace.
    All,
    /// Those whose ids are mapped: the mapping is written through the /proc of the parent's pid namespace.
    Mapped,
}

/// Opens what the parent has to open.
pub(crate) fn open_sources(
    spec: &Spec,
    bundle: &Path,
    rootfs: &Path,
    which: Opened,
) -> Result<Sources> {
    let slave = |tree: OwnedFd| {
        // Not a peer of the host's mounts: nothing mounted in the container may reach the host.
        let change = AttrChange {
            propagation: MS_SLAVE,
            recursive: true,
            ..AttrChange::default()
        };
        sys::mount_setattr(tree.as_fd(), &change)
            .context(|| "set propagation of a mount source")
            .map(|()| tree)
    };
    let mut sources = Sources::default();
    if which == Opened::All {
        sources.root = Some(slave(clone_tree(rootfs)?)?);
    }
    for mount in &spec.mounts {
        let options = options::Options::parse(&mount.options)?;
        let wanted =
            which == Opened::All || options.idmap.is_some() || !mount.uid_mappings.is_empty();
        sources.binds.push(
            if wanted && attach::is_bind(mount, &options) && !options.remount {
                Some(slave(attach::bind_tree(bundle, mount, &options)?)?)
            } else {
                None
            },
        );
    }
    Ok(sources)
}

fn clone_tree(path: &Path) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    rustix::mount::open_tree(CWD, path, flags)
        .context(|| format!("bind root filesystem {}", path.display()))
}

/// Mounts everything of the configuration. `enter_groups` is called before each mount that shows control groups.
pub(crate) fn mount(
    plan: &Plan<'_>,
    mut sources: Sources,
    mut enter_groups: impl FnMut() -> Result<()>,
) -> Result<Tree> {
    let linux = plan.spec.linux.as_ref().expect("validated");
    let propagation = match linux.rootfs_propagation.as_str() {
        "" => (MS_SLAVE, true),
        word => options::propagation(word)
            .ok_or_else(|| Error::Spec(format!("rootfsPropagation={word} is not supported")))?,
    };
    detach_from_host(plan.rootfs, propagation)?;
    let root = match sources.root.take() {
        Some(tree) => tree,
        None => clone_tree(plan.rootfs)?,
    };
    place_root(&root, plan.rootfs)?;
    let site = Site {
        root: root.as_fd(),
        bundle: plan.bundle,
        label: &linux.mount_label,
    };
    let mut later = Vec::new();
    let mut devpts = None;
    sources.binds.resize_with(plan.spec.mounts.len(), || None);
    for (mount, prepared) in plan.spec.mounts.iter().zip(sources.binds) {
        let is_cgroup = matches!(mount.kind.as_str(), "cgroup" | "cgroup2");
        let attached = if is_cgroup {
            enter_groups()?;
            cgroup::attach(&site, mount, plan.cgroup, plan.cgroup_namespace)?
        } else {
            attach::attach(&site, mount, prepared)?
        };
        if attached.read_only_later {
            later.push(attached.mount);
        } else if mount.kind == "devpts" {
            devpts = Some(attached.mount);
        }
    }
    let dev_is_bound = plan.spec.mounts.iter().any(|mount| {
        target::clean(&mount.destination) == Path::new("/dev")
            && matches!(mount.kind.as_str(), "bind" | "")
    });
    if !dev_is_bound {
        devices::make(root.as_fd(), linux, plan.user_namespace)?;
    }
    if let Some(process) = plan
        .spec
        .process
        .as_ref()
        .filter(|process| process.cwd != "/")
    {
        // As runc: a missing working directory is made; one that cannot be made is reported when it is entered.
        target::make(root.as_fd(), Path::new(&process.cwd), Shape::Directory).ok();
    }
    for mount in later {
        attach::make_read_only(mount.as_fd(), false).context(|| "make a mount read-only")?;
    }
    Ok(Tree {
        root,
        devpts,
        propagation,
    })
}

/// From here on nothing mounted in this namespace reaches the host's.
fn detach_from_host(rootfs: &Path, (flag, recursive): (u64, bool)) -> Result<()> {
    let here = rustix::mount::open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .context(|| "open /")?;
    // What cannot be bound cannot become the new root: it becomes so at the end.
    let (flag, recursive) = if flag == MS_UNBINDABLE {
        (libc::MS_PRIVATE, true)
    } else {
        (flag, recursive)
    };
    let change = AttrChange {
        propagation: flag,
        recursive,
        ..AttrChange::default()
    };
    sys::mount_setattr(here.as_fd(), &change).context(|| "set propagation of /")?;
    if flag != MS_SHARED {
        return Ok(());
    }
    // pivot_root refuses a root whose parent mount is shared. The parent is the first ancestor that is a mount point.
    for ancestor in rootfs.ancestors() {
        let place = rustix::mount::open_tree(CWD, ancestor, OpenTreeFlags::OPEN_TREE_CLOEXEC)
            .context(|| format!("open {}", ancestor.display()))?;
        let change = AttrChange {
            propagation: libc::MS_PRIVATE,
            ..AttrChange::default()
        };
        match sys::mount_setattr(place.as_fd(), &change) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            other => {
                return other.context(|| "make the parent mount of the root filesystem private");
            }
        }
    }
    Ok(())
}

/// Attaches the tree over the rootfs, or where it can be reached if the path cannot: it is only left from there.
fn place_root(root: &OwnedFd, rootfs: &Path) -> Result<()> {
    let mut first = None;
    for place in [
        rootfs,
        Path::new("/tmp"),
        Path::new("/proc"),
        Path::new("/sys"),
    ] {
        let moved = rustix::fs::open(
            place,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|place| attach::move_to(root.as_fd(), place.as_fd()));
        match moved {
            Ok(()) => return Ok(()),
            Err(Errno::ACCESS | Errno::NOENT) if place != Path::new("/sys") => {
                first.get_or_insert(Errno::ACCESS);
            }
            Err(error) => {
                return Err(error)
                    .context(|| format!("mount root filesystem at {}", place.display()));
            }
        }
    }
    Err(first.unwrap_or(Errno::ACCESS)).context(|| "mount root filesystem")
}

/// Puts read-only mounts and masks over the paths of the configuration.
pub(crate) fn cover(tree: &Tree, spec: &Spec) -> Result<()> {
    let linux = spec.linux.as_ref().expect("validated");
    for path in &linux.readonly_paths {
        cover_read_only(tree.root.as_fd(), Path::new(path))?;
    }
    let mut mask = Mask::default();
    for path in &linux.masked_paths {
        mask.cover(tree.root.as_fd(), Path::new(path))?;
    }
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        attach::make_read_only(tree.root.as_fd(), false)
            .context(|| "make the root filesystem read-only")?;
    }
    Ok(())
}

fn cover_read_only(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let found = match target::open_in(root, path, OFlags::PATH) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(());
        }
        other => other.context(|| format!("readonly path {}", path.display()))?,
    };
    let what = || format!("can't make {} read-only", path.display());
    let tree = attach::clone_mount(found.as_fd(), true).context(what)?;
    attach::make_read_only(tree.as_fd(), false).context(what)?;
    attach::move_to(tree.as_fd(), found.as_fd()).context(what)
}

/// An empty read-only directory and the null device, attached over what must not be seen.
#[derive(Default)]
struct Mask {
    null: Option<OwnedFd>,
    /// The first mask directory, attached: later ones are copies of it and share its filesystem.
    directory: Option<OwnedFd>,
}

impl Mask {
    fn cover(&mut self, root: BorrowedFd<'_>, path: &Path) -> Result<()> {
        let found = match target::open_in(root, path, OFlags::PATH) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                return Ok(());
            }
            other => other.context(|| format!("mask path {}", path.display()))?,
        };
        let what = || format!("can't mask path {}", path.display());
        let stat = rustix::fs::fstat(&found).context(what)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let directory = match &self.directory {
                Some(first) => attach::clone_mount(first.as_fd(), false).context(what)?,
                None => empty_directory().context(what)?,
            };
            attach::move_to(directory.as_fd(), found.as_fd()).context(what)?;
            self.directory.get_or_insert(directory);
            return Ok(());
        }
        let null = match &self.null {
            Some(null) => null,
            None => self.null.insert(host_null()?),
        };
        let mask = attach::clone_mount(null.as_fd(), false).context(what)?;
        attach::move_to(mask.as_fd(), found.as_fd()).context(what)
    }
}

fn empty_directory() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", "tmpfs")?;
    rustix::mount::fsconfig_set_flag(&context, "ro")?;
    rustix::mount::fsconfig_set_string(&context, "nr_blocks", "1")?;
    rustix::mount::fsconfig_set_string(&context, "nr_inodes", "1")?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The host's null device, checked to be it: a mask must not be a file the container chose.
fn host_null() -> Result<OwnedFd> {
    let null = rustix::fs::open(
        "/dev/null",
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open /dev/null")?;
    let stat = rustix::fs::fstat(&null).context(|| "stat /dev/null")?;
    let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    if is_null {
        Ok(null)
    } else {
        Err(Error::Process("/dev/null is not the null device".into()))
    }
}

/// How the new root is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RootChange {
    Pivot,
    /// For hosts whose root is an initramfs.
    MoveAndChroot,
}

/// Makes the tree the root of this mount namespace.
pub(crate) fn enter(tree: &Tree, change: RootChange) -> Result<()> {
    match change {
        RootChange::Pivot => pivot(tree.root.as_fd())?,
        RootChange::MoveAndChroot => move_and_chroot(tree.root.as_fd())?,
    }
    let (flag, recursive) = tree.propagation;
    if matches!(flag, MS_SHARED | MS_UNBINDABLE) || (flag == MS_SLAVE && !recursive) {
        let here = rustix::mount::open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC)
            .context(|| "open the new /")?;
        let change = AttrChange {
            propagation: flag,
            recursive,
            ..AttrChange::default()
        };
        sys::mount_setattr(here.as_fd(), &change)
            .context(|| "set propagation of the root filesystem")?;
    }
    Ok(())
}

fn pivot(root: BorrowedFd<'_>) -> Result<()> {
    let what = || "pivot_root";
    let old = rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(what)?;
    rustix::process::fchdir(root).context(what)?;
    rustix::process::pivot_root(".", ".").context(what)?;
    rustix::process::fchdir(&old).context(what)?;
    // The unmount below must not travel to the host.
    rustix::mount::mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "make the old root a slave")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context(|| "unmount the old root")?;
    rustix::process::chdir("/").context(what)
}

fn move_and_chroot(root: BorrowedFd<'_>) -> Result<()> {
    // Whole proc and sys mounts of the host would stay reachable below a chroot: they go first.
    let table = std::fs::read_to_string("/proc/self/mountinfo").context(|| "read mountinfo")?;
    let own = std::fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&root)
    ))
    .unwrap_or_default();
    let mut places: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let kind = after.split(' ').next()?;
            let place = PathBuf::from(before.split(' ').nth(4)?);
            (matches!(kind, "proc" | "sysfs") && !place.starts_with(&own)).then_some(place)
        })
        .collect();
    // Deepest first.
    places.reverse();
    for place in places {
        if rustix::mount::unmount(&place, UnmountFlags::DETACH).is_err() {
            // Locked in a user namespace: cover it.
            let cover = empty_directory().context(|| format!("cover {}", place.display()))?;
            let target = rustix::fs::open(&place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .context(|| format!("open {}", place.display()))?;
            attach::move_to(cover.as_fd(), target.as_fd())
                .context(|| format!("cover {}", place.display()))?;
        }
    }
    let what = || "move the root filesystem to /";
    rustix::process::fchdir(root).context(what)?;
    rustix::mount::mount_move(".", "/").context(what)?;
    rustix::process::chroot(".").context(what)?;
    rustix::process::chdir("/").context(what)
}

/// Enters a root without a mount namespace of its own: nothing can be mounted for it.
pub(crate) fn chroot_only(spec: &Spec, rootfs: &Path) -> Result<()> {
    if !spec.mounts.is_empty() {
        return Err(Error::Spec(
            "mounts need a mount namespace of the container's own".into(),
        ));
    }
    rustix::process::chdir(rootfs).context(|| format!("chdir {}", rootfs.display()))?;
    rustix::process::chroot(".").context(|| "chroot")?;
    rustix::process::chdir("/").context(|| "chdir")
}

/// Opens a new terminal pair in the container's devpts: (master, other end).
pub(crate) fn open_terminal(devpts: BorrowedFd<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let master =
        rustix::fs::openat(devpts, "ptmx", flags, Mode::empty()).context(|| "open ptmx")?;
    target::require_filesystem(master.as_fd(), DEVPTS_MAGIC, "ptmx")?;
    let other = sys::open_terminal_peer(master.as_fd()).context(|| "open terminal")?;
    Ok((master, other))
}

/// Binds the terminal at /dev/console.
pub(crate) fn bind_console(root: BorrowedFd<'_>, terminal: BorrowedFd<'_>) -> Result<()> {
    let what = || "mount /dev/console";
    let place = target::make(root, Path::new("/dev/console"), Shape::File)?;
    let mount = attach::clone_mount(terminal, false).context(what)?;
    attach::move_to(mount.as_fd(), place.as_fd()).context(what)
}
