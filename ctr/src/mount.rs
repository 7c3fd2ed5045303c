//! Mounts that the daemon hands out, performed by us: a look into a rootfs, `images mount`.

use std::ffi::CString;
use std::path::Path;

use anyhow::Context as _;
use lighter_proto::containerd::types::Mount;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_remount,
    move_mount, unmount,
};

/// The classic call takes one page of options; a tall overlay has more.
const MAX_CLASSIC_OPTIONS: usize = 4000;

/// Option names that are flags of the call, not data for the filesystem. `true` clears the flag.
const FLAGS: [(&str, MountFlags, bool); 20] = [
    ("ro", MountFlags::RDONLY, false),
    ("rw", MountFlags::RDONLY, true),
    ("bind", MountFlags::BIND, false),
    ("rbind", MountFlags::BIND.union(MountFlags::REC), false),
    ("nosuid", MountFlags::NOSUID, false),
    ("suid", MountFlags::NOSUID, true),
    ("nodev", MountFlags::NODEV, false),
    ("dev", MountFlags::NODEV, true),
    ("noexec", MountFlags::NOEXEC, false),
    ("exec", MountFlags::NOEXEC, true),
    ("noatime", MountFlags::NOATIME, false),
    ("atime", MountFlags::NOATIME, true),
    ("relatime", MountFlags::RELATIME, false),
    ("norelatime", MountFlags::RELATIME, true),
    ("strictatime", MountFlags::STRICTATIME, false),
    ("nodiratime", MountFlags::NODIRATIME, false),
    ("sync", MountFlags::SYNCHRONOUS, false),
    ("async", MountFlags::SYNCHRONOUS, true),
    ("dirsync", MountFlags::DIRSYNC, false),
    ("defaults", MountFlags::empty(), false),
];

/// A mount's options, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    flags: MountFlags,
    data: Vec<String>,
}

fn parse(options: &[String]) -> Parsed {
    let mut parsed = Parsed {
        flags: MountFlags::empty(),
        data: Vec::new(),
    };
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, true)) => parsed.flags.remove(*flag),
            Some((_, flag, false)) => parsed.flags.insert(*flag),
            // Options that a daemon's mount manager reads are not for the kernel.
            None if option.starts_with("X-containerd.") => {}
            None => parsed.data.push(option.clone()),
        }
    }
    parsed
}

/// Performs the mounts in order, each on `target` (or below it, where it says so).
pub(crate) fn apply(mounts: &[Mount], target: &Path) -> anyhow::Result<()> {
    for entry in mounts {
        let at = match entry.target.trim_start_matches('/') {
            "" => target.to_path_buf(),
            below => {
                anyhow::ensure!(
                    !below.split('/').any(|part| part == ".."),
                    "mount target {below:?} leaves the rootfs"
                );
                target.join(below)
            }
        };
        one(entry, &at).with_context(|| {
            format!(
                "cannot mount {} {} on {}",
                entry.r#type,
                entry.source,
                at.display()
            )
        })?;
    }
    Ok(())
}

fn one(entry: &Mount, target: &Path) -> anyhow::Result<()> {
    let Parsed { flags, data } = parse(&entry.options);
    if flags.contains(MountFlags::BIND) || entry.r#type == "bind" {
        let bind = MountFlags::BIND | (flags & MountFlags::REC);
        mount(&entry.source, target, "", bind, None)?;
        let rest = flags - MountFlags::BIND - MountFlags::REC;
        if !rest.is_empty() {
            mount_remount(target, MountFlags::BIND | rest, "")?;
        }
        return Ok(());
    }
    let joined = data.join(",");
    if joined.len() > MAX_CLASSIC_OPTIONS {
        return tall(entry, flags, &data, target);
    }
    let options = CString::new(joined)?;
    mount(
        &entry.source,
        target,
        &entry.r#type,
        flags,
        Some(options.as_c_str()),
    )?;
    Ok(())
}

/// A mount with more options than a page holds, through the newer calls.
fn tall(entry: &Mount, flags: MountFlags, data: &[String], target: &Path) -> anyhow::Result<()> {
    let context = fsopen(&entry.r#type, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = std::os::fd::AsFd::as_fd(&context);
    fsconfig_set_string(context, "source", &entry.source)?;
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", dirs)) => {
                for dir in dirs.split(':') {
                    fsconfig_set_string(context, "lowerdir+", dir)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(context, key, value)?,
            None => fsconfig_set_flag(context, option)?,
        }
    }
    fsconfig_create(context)?;
    let mut attributes = MountAttrFlags::empty();
    if flags.contains(MountFlags::RDONLY) {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mounted = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(
        &mounted,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    Ok(())
}

/// Undoes every mount on `target`.
pub(crate) fn undo(target: &Path) -> anyhow::Result<()> {
    unmount(target, UnmountFlags::NOFOLLOW)
        .with_context(|| format!("cannot unmount {}", target.display()))?;
    while unmount(target, UnmountFlags::NOFOLLOW).is_ok() {}
    Ok(())
}

/// The same view, but read-only and without touching an overlay's upper and work directories.
fn read_only(entry: &Mount) -> Mount {
    let mut entry = entry.clone();
    if entry.r#type == "overlay" {
        let value = |name: &str| {
            let prefix = format!("{name}=");
            entry
                .options
                .iter()
                .find_map(|o| o.strip_prefix(&prefix))
                .map(str::to_owned)
        };
        if let (Some(upper), Some(lower)) = (value("upperdir"), value("lowerdir")) {
            let of_pair = |o: &String| {
                ["upperdir=", "workdir=", "lowerdir="]
                    .iter()
                    .any(|p| o.starts_with(p))
            };
            entry.options.retain(|option| !of_pair(option));
            entry.options.push(format!("lowerdir={upper}:{lower}"));
        }
    }
    entry.options.retain(|option| option != "rw");
    entry.options.push("ro".to_owned());
    entry
}

/// A rootfs mounted for a moment in a directory of its own. Dropping it undoes that.
#[derive(Debug)]
pub(crate) struct Temporary {
    dir: tempfile::TempDir,
}

impl Temporary {
    /// Mounts read-only.
    pub(crate) fn view(mounts: &[Mount]) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ctr-rootfs-").tempdir()?;
        let temporary = Self { dir };
        apply(
            &mounts.iter().map(read_only).collect::<Vec<_>>(),
            temporary.path(),
        )?;
        Ok(temporary)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Detached, so that a busy reader elsewhere cannot make removal of the directory go deep.
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

/// The shell command that performs a mount.
pub(crate) fn command(entry: &Mount, target: &str) -> String {
    let options = entry.options.join(",");
    let options = if options.is_empty() {
        String::new()
    } else {
        format!(" -o {options}")
    };
    format!(
        "mount -t {} {} {target}{options}",
        entry.r#type, entry.source
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str, options: &[&str]) -> Mount {
        Mount {
            r#type: kind.to_owned(),
            source: "src".to_owned(),
            target: String::new(),
            options: options.iter().map(|&o| o.to_owned()).collect(),
        }
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let mount = entry(
            "tmpfs",
            &[
                "nosuid",
                "size=1m",
                "ro",
                "rw",
                "X-containerd.mkdir.path=/x",
            ],
        );
        let parsed = parse(&mount.options);
        assert_eq!(parsed.flags, MountFlags::NOSUID);
        assert_eq!(parsed.data, ["size=1m"]);
    }

    #[test]
    fn a_view_of_an_overlay_has_no_upper_directory() {
        let view = read_only(&entry(
            "overlay",
            &["workdir=/w", "upperdir=/u", "lowerdir=/a:/b"],
        ));
        assert_eq!(view.options, ["lowerdir=/u:/a:/b", "ro"]);
        assert_eq!(
            read_only(&entry("bind", &["rw", "rbind"])).options,
            ["rbind", "ro"]
        );
    }

    #[test]
    fn the_shell_command_has_all_options() {
        let text = command(&entry("overlay", &["lowerdir=/a", "ro"]), "/mnt");
        assert_eq!(text, "mount -t overlay src /mnt -o lowerdir=/a,ro");
    }

    #[test]
    fn a_target_outside_the_rootfs_is_refused() {
        let mut mount = entry("bind", &["bind"]);
        mount.target = "/../etc".to_owned();
        assert!(apply(&[mount], Path::new("/nonexistent")).is_err());
    }
}
