//! One mount of the configuration, from its entry to its place beneath the root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
};

use super::options::Options;
use super::target::{self, Shape};
use super::{copy_up, idmap};
use crate::error::{Context, Error, Result};
use crate::spec::Mount;
use crate::sys::{self, AttrChange, attr};

/// statfs(2) type of procfs.
pub(crate) const PROC_MAGIC: i64 = 0x9fa0;

/// Longest value that fsconfig(2) takes as a string; longer ones need mount(2).
const MAX_FSCONFIG_VALUE: usize = 255;

/// Files of procfs that tools such as lxcfs bind over; anything else there stays the kernel's.
const COVERABLE_IN_PROC: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
    "/proc/net/dev",
];

/// What a mount needs to know about the container.
pub(crate) struct Site<'a> {
    pub(crate) root: BorrowedFd<'a>,
    pub(crate) bundle: &'a Path,
    /// SELinux label for new filesystems; empty for none.
    pub(crate) label: &'a str,
}

/// A mount in its place.
pub(crate) struct Attached {
    pub(crate) mount: OwnedFd,
    /// Has to be made read-only once nothing more is to be mounted or made in it.
    pub(crate) read_only_later: bool,
}

/// Whether a mount is a bind, by type or by option.
pub(crate) fn is_bind(mount: &Mount, options: &Options) -> bool {
    options.bind.is_some() || mount.kind == "bind"
}

/// The detached copy of a bind's source, with everything its options and mappings ask for.
pub(crate) fn bind_tree(bundle: &Path, mount: &Mount, options: &Options) -> Result<OwnedFd> {
    let source = bundle.join(&mount.source);
    let recursive = options.bind == Some(true);
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = rustix::mount::open_tree(CWD, &source, flags).context(|| {
        format!(
            "error mounting {:?} to rootfs at {:?}: open source",
            source, mount.destination
        )
    })?;
    if options.idmap.is_some() || !mount.uid_mappings.is_empty() {
        if mount.uid_mappings.is_empty() || mount.gid_mappings.is_empty() {
            return Err(Error::Spec(format!(
                "mount {:?}: idmap needs uidMappings and gidMappings",
                mount.destination
            )));
        }
        let namespace = idmap::user_namespace(&mount.uid_mappings, &mount.gid_mappings)?;
        let change = AttrChange {
            idmap: Some(namespace.as_fd()),
            recursive: options.idmap == Some(true),
            ..AttrChange::default()
        };
        sys::mount_setattr(tree.as_fd(), &change).context(|| {
            format!(
                "map ids of mount {:?} (its filesystem must support it)",
                mount.destination
            )
        })?;
    }
    Ok(tree)
}

/// Applies attributes and propagation of the options to a mount (detached or not).
fn apply_options(mount: BorrowedFd<'_>, options: &Options, name: &Path) -> Result<()> {
    let changes = [
        (options.set, options.clear, false),
        (options.recursive_set, options.recursive_clear, true),
    ];
    for (set, clear, recursive) in changes {
        if set | clear != 0 {
            let change = AttrChange {
                set,
                clear,
                recursive,
                ..AttrChange::default()
            };
            sys::mount_setattr(mount, &change)
                .context(|| format!("set attributes of mount {name:?}"))?;
        }
    }
    apply_propagation(mount, options, name)
}

fn apply_propagation(mount: BorrowedFd<'_>, options: &Options, name: &Path) -> Result<()> {
    for (propagation, recursive) in &options.propagation {
        let change = AttrChange {
            propagation: *propagation,
            recursive: *recursive,
            ..AttrChange::default()
        };
        sys::mount_setattr(mount, &change)
            .context(|| format!("set propagation of mount {name:?}"))?;
    }
    Ok(())
}

/// Puts a detached mount onto an open target.
pub(crate) fn move_to(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", target, "", flags)
}

/// Copies the mount (not the tree) that an open path is in, from that path on.
pub(crate) fn clone_mount(of: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(of, "", flags)
}

/// Makes one mount of the configuration. `prepared` is a bind's tree if the parent had to open it.
pub(crate) fn attach(
    site: &Site<'_>,
    mount: &Mount,
    prepared: Option<OwnedFd>,
) -> Result<Attached> {
    let options = Options::parse(&mount.options)?;
    let destination = target::clean(&mount.destination);
    if options.remount {
        return remount(site, &destination, &options);
    }
    if is_bind(mount, &options) {
        let tree = match prepared {
            Some(tree) => tree,
            None => bind_tree(site.bundle, mount, &options)?,
        };
        let stat =
            rustix::fs::fstat(&tree).context(|| format!("stat source of {destination:?}"))?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let shape = if is_directory {
            Shape::Directory
        } else {
            Shape::File
        };
        let target = target::make(site.root, &destination, shape)?;
        refuse_proc(target.as_fd(), &destination, Some(tree.as_fd()))?;
        apply_options(tree.as_fd(), &options, &destination)?;
        move_to(tree.as_fd(), target.as_fd()).context(|| {
            format!(
                "error mounting {:?} to rootfs at {destination:?}",
                mount.source
            )
        })?;
        return Ok(Attached {
            mount: tree,
            read_only_later: false,
        });
    }
    attach_filesystem(site, mount, &options, &destination)
}

fn attach_filesystem(
    site: &Site<'_>,
    mount: &Mount,
    options: &Options,
    destination: &Path,
) -> Result<Attached> {
    let target = if matches!(mount.kind.as_str(), "proc" | "sysfs") {
        ordinary_directory(site.root, destination, &mount.kind)?
    } else {
        target::make(site.root, destination, Shape::Directory)?
    };
    refuse_proc(target.as_fd(), destination, None)?;
    // Things are still to be made in a tmpfs: it becomes read-only at the end.
    let read_only_later = mount.kind == "tmpfs" && options.set & attr::RDONLY != 0;
    let made = create(site, mount, options, read_only_later).map_err(|error| {
        Error::Process(format!(
            "error mounting {:?} to rootfs at {destination:?}: {error}",
            mount.source
        ))
    });
    let Some(made) = made? else {
        return mount_with_long_options(site, mount, options, &target, destination);
    };
    if mount.kind == "tmpfs" && options.tmp_copy_up {
        let from = rustix::fs::openat(
            &target,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .context(|| format!("open {destination:?}"))?;
        let to = rustix::fs::openat(
            &made,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .context(|| format!("open the new {destination:?}"))?;
        copy_up::copy(from.as_fd(), to.as_fd())?;
    } else if mount.kind == "tmpfs" && !options.data.iter().any(|(key, _)| key == "mode") {
        // A tmpfs without a mode takes the one of the directory it covers.
        let stat = rustix::fs::fstat(&target).context(|| format!("stat {destination:?}"))?;
        rustix::fs::chmodat(
            &made,
            ".",
            rustix::fs::Mode::from_raw_mode(stat.st_mode & 0o7777),
            rustix::fs::AtFlags::empty(),
        )
        .context(|| format!("set the mode of {destination:?}"))?;
    }
    move_to(made.as_fd(), target.as_fd()).context(|| {
        format!(
            "error mounting {:?} to rootfs at {destination:?}",
            mount.source
        )
    })?;
    apply_propagation(made.as_fd(), options, destination)?;
    Ok(Attached {
        mount: made,
        read_only_later,
    })
}

/// A new filesystem, mounted nowhere yet. `None` if its options do not fit the mount API.
fn create(
    site: &Site<'_>,
    mount: &Mount,
    options: &Options,
    read_only_later: bool,
) -> Result<Option<OwnedFd>> {
    let label = label_of(site, &mount.kind);
    let values = options
        .data
        .iter()
        .filter_map(|(_, value)| value.as_deref());
    if values
        .chain(label)
        .any(|value| value.len() > MAX_FSCONFIG_VALUE)
    {
        return Ok(None);
    }
    let context = match rustix::mount::fsopen(mount.kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(error) => return Err(error).context(|| format!("filesystem type {:?}", mount.kind)),
    };
    let explain = |error: Errno, step: &str| {
        let mut message = [0_u8; 256];
        let told = rustix::io::read(&context, &mut message).unwrap_or(0);
        let told = String::from_utf8_lossy(&message[..told]);
        let told = told.trim_start_matches(['e', 'w', 'i', ' ']).trim();
        let text = crate::error::errno_text(&error.into());
        Error::Process(if told.is_empty() {
            format!("{step}: {text}")
        } else {
            format!("{step}: {text} ({told})")
        })
    };
    let source = if mount.source.is_empty() {
        mount.kind.as_str()
    } else {
        mount.source.as_str()
    };
    rustix::mount::fsconfig_set_string(&context, "source", source)
        .map_err(|error| explain(error, "set source"))?;
    if let Some(label) = label {
        rustix::mount::fsconfig_set_string(&context, "context", label)
            .map_err(|error| explain(error, "set label"))?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => {
                rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str())
            }
            None => rustix::mount::fsconfig_set_flag(&context, key.as_str()),
        }
        .map_err(|error| explain(error, &format!("option {key:?}")))?;
    }
    // Kernel filesystems share one superblock between containers: there only the mount is read-only.
    let shared = matches!(
        mount.kind.as_str(),
        "proc" | "sysfs" | "mqueue" | "cgroup" | "cgroup2" | "devpts"
    );
    if options.set & attr::RDONLY != 0 && !shared && !read_only_later {
        rustix::mount::fsconfig_set_flag(&context, "ro")
            .map_err(|error| explain(error, "option \"ro\""))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(|error| explain(error, "create"))?;
    let mut bits = options.set;
    if read_only_later {
        bits &= !attr::RDONLY;
    }
    let bits =
        MountAttrFlags::from_bits_retain(u32::try_from(bits).expect("attribute bits fit in 32"));
    let made = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, bits)
        .map_err(|error| explain(error, "mount"))?;
    if mount.kind == "mqueue" && !site.label.is_empty() {
        label_root(made.as_fd(), site.label).map_err(|error| explain(error, "set label"))?;
    }
    Ok(Some(made))
}

/// The label that all of a new filesystem has. The kernel shares those of some types with mounts that
/// were made before, and refuses one of another label.
fn label_of<'a>(site: &Site<'a>, kind: &str) -> Option<&'a str> {
    let shared = matches!(kind, "proc" | "sysfs" | "mqueue" | "cgroup" | "cgroup2");
    (!shared && !site.label.is_empty()).then_some(site.label)
}

/// Labels the directory that a mount begins with.
fn label_root(mount: BorrowedFd<'_>, label: &str) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(mount, ".", flags, rustix::fs::Mode::empty())?;
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::fsetxattr(&root, "security.selinux", label.as_bytes(), none)
}

/// mount(2), for option values too long for fsconfig(2) (an overlay of many layers, a label of many categories).
fn mount_with_long_options(
    site: &Site<'_>,
    mount: &Mount,
    options: &Options,
    target: &OwnedFd,
    destination: &Path,
) -> Result<Attached> {
    use std::os::fd::AsRawFd;
    // Quotes hold a label together among the words.
    let label = label_of(site, &mount.kind).map(|label| format!("context=\"{label}\""));
    let words = options.data.iter().map(|(key, value)| {
        value
            .as_ref()
            .map_or_else(|| key.clone(), |value| format!("{key}={value}"))
    });
    let words: Vec<String> = words.chain(label).collect();
    let data = std::ffi::CString::new(words.join(","))
        .map_err(|_| Error::Spec("mount option with a zero byte".into()))?;
    // The descriptor names the target; /proc is still the host's here.
    let place = format!("/proc/self/fd/{}", target.as_raw_fd());
    rustix::mount::mount(
        mount.source.as_str(),
        place,
        mount.kind.as_str(),
        rustix::mount::MountFlags::empty(),
        data.as_c_str(),
    )
    .context(|| {
        format!(
            "error mounting {:?} to rootfs at {destination:?}",
            mount.source
        )
    })?;
    let made = target::open_in(site.root, destination, OFlags::PATH)
        .context(|| format!("open {destination:?}"))?;
    apply_options(made.as_fd(), options, destination)?;
    Ok(Attached {
        mount: made,
        read_only_later: false,
    })
}

fn remount(site: &Site<'_>, destination: &Path, options: &Options) -> Result<Attached> {
    let place = target::open_in(site.root, destination, OFlags::PATH)
        .context(|| format!("remount {destination:?}"))?;
    if options.bind.is_none() && !options.data.is_empty() {
        let context = rustix::mount::fspick(
            &place,
            "",
            FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC,
        )
        .context(|| format!("remount {destination:?}"))?;
        for (key, value) in &options.data {
            match value {
                Some(value) => {
                    rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str())
                }
                None => rustix::mount::fsconfig_set_flag(&context, key.as_str()),
            }
            .context(|| format!("remount {destination:?} with {key:?}"))?;
        }
        rustix::mount::fsconfig_reconfigure(&context)
            .context(|| format!("remount {destination:?}"))?;
    }
    apply_options(place.as_fd(), options, destination)?;
    Ok(Attached {
        mount: place,
        read_only_later: false,
    })
}

/// The target of a kernel filesystem: behind a symbolic link the masks would miss it.
fn ordinary_directory(root: BorrowedFd<'_>, path: &Path, kind: &str) -> Result<OwnedFd> {
    let open = || {
        let relative = path.strip_prefix("/").unwrap_or(path);
        rustix::fs::openat2(
            root,
            relative,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
            rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_SYMLINKS,
        )
    };
    if let Err(Errno::NOENT) = open() {
        target::make(root, path, Shape::Directory)?;
    }
    open().map_err(|error| {
        let text = crate::error::errno_text(&error.into());
        Error::Process(format!(
            "filesystem {kind:?} must be mounted on ordinary directory {path:?}: {text}"
        ))
    })
}

/// Refuses to cover parts of procfs, which would hide or forge what the kernel says.
fn refuse_proc(target: BorrowedFd<'_>, path: &Path, source: Option<BorrowedFd<'_>>) -> Result<()> {
    if path == Path::new("/proc") {
        // A bind over all of /proc has to be a procfs itself.
        return match source {
            Some(source) => {
                target::require_filesystem(source, PROC_MAGIC, "the source of a mount on /proc")
            }
            None => Ok(()),
        };
    }
    let is_proc = rustix::fs::fstatfs(target)
        .context(|| format!("fstatfs {path:?}"))?
        .f_type
        == PROC_MAGIC;
    if is_proc
        && !COVERABLE_IN_PROC
            .iter()
            .any(|allowed| path == Path::new(allowed))
    {
        return Err(Error::Spec(format!(
            "{path:?} cannot be mounted because it is inside /proc"
        )));
    }
    Ok(())
}

/// Makes a mount read-only.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>, recursive: bool) -> std::io::Result<()> {
    sys::mount_setattr(
        mount,
        &AttrChange {
            set: attr::RDONLY,
            recursive,
            ..AttrChange::default()
        },
    )
}
