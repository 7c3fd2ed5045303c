//! The directory a shim runs in.
//!
//! | path | who writes it | what it is |
//! |---|---|---|
//! | `<state>/<kind>/<namespace>/<id>/` | daemon | the bundle, 0700 (0710 with user namespaces) |
//! | `config.json` | daemon | the OCI spec, byte for byte |
//! | `rootfs/` | daemon | mount point of the root filesystem, 0711 |
//! | `work` | daemon | link to `<root>/<kind>/<namespace>/<id>/` |
//! | `log` | daemon | fifo the shim logs to |
//! | `bootstrap.json` | daemon | how to reach the shim (older daemons: `address`); read-only once the first process's end was told |
//! | `shim-binary-path` | daemon | absolute path of the shim |
//! | `sandbox` | daemon | id of the sandbox whose shim it joined |
//! | `options.json`, `runtime`, `init.pid` | shim | its own |
//!
//! Nothing here is synced: the state directory dies with the boot, and so do the tasks in it. A
//! name that starts with a dot is a bundle on its way out.

use std::ffi::OsString;
use std::fs::{DirBuilder, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, symlink,
};
use std::path::{Path, PathBuf};

use lighter_store::Namespace;
use nix::mount::{MntFlags, umount2};
use serde::Deserialize;

use super::bootstrap::Bootstrap;
use super::error::Error;

/// Directory of tasks below state and root.
pub(super) const TASKS: &str = "io.containerd.runtime.v2.task";
/// Directory of sandboxes below state and root.
pub(super) const SANDBOXES: &str = "io.containerd.sandbox.controller.v1.shim";

const CONFIG: &str = "config.json";
const ROOTFS: &str = "rootfs";
const WORK: &str = "work";
const LOG: &str = "log";
const BOOTSTRAP: &str = "bootstrap.json";
const ADDRESS: &str = "address";
const SHIM_PATH: &str = "shim-binary-path";
const SANDBOX: &str = "sandbox";
/// What older daemons left once the first process's end was told.
const ANNOUNCED: &str = "exit-announced";
/// Mode of the bootstrap file from then on.
const TOLD_MODE: u32 = 0o444;
/// Most bytes of a small file in a bundle.
const MAX_SMALL_BYTES: u64 = 64 << 10;
/// Times a mount on the root filesystem is taken off before giving up: mounts can be stacked.
const MAX_UNMOUNTS: usize = 128;

/// One bundle and its work directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// Namespace of the task.
    pub namespace: Namespace,
    /// Id of the container or sandbox.
    pub id: String,
    /// The bundle.
    pub path: PathBuf,
    /// Its work directory, which survives a boot.
    pub work: PathBuf,
}

/// The part of a spec that decides who may enter the bundle.
#[derive(Deserialize)]
struct UserNamespace {
    #[serde(default)]
    linux: Option<Mappings>,
}

#[derive(Deserialize)]
struct Mappings {
    #[serde(default, rename = "gidMappings")]
    gids: Option<Vec<Mapping>>,
}

#[derive(Deserialize)]
struct Mapping {
    #[serde(rename = "containerID")]
    container: u32,
    #[serde(rename = "hostID")]
    host: u32,
    size: u32,
}

impl Bundle {
    /// Where the bundle of `id` is, whether it exists or not.
    #[must_use]
    pub fn at(state: &Path, root: &Path, kind: &str, namespace: &Namespace, id: &str) -> Self {
        let below = |dir: &Path| dir.join(kind).join(namespace.as_str()).join(id);
        Self {
            namespace: namespace.clone(),
            id: id.to_owned(),
            path: below(state),
            work: below(root),
        }
    }

    /// Makes the directories and writes the spec. Blocks.
    ///
    /// # Errors
    /// `AlreadyExists` when there is a bundle; what the system says. Nothing is left behind then.
    pub(super) fn create(&self, spec: Option<&[u8]>) -> Result<(), Error> {
        let parent = self.path.parent().expect("a bundle is below its namespace");
        make_parents(parent, 0o711)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&self.path)
            .map_err(Error::io("mkdir", &self.path))?;
        let filled = self.fill(spec);
        if filled.is_err() {
            let _gone = std::fs::remove_dir_all(&self.path);
            let _gone = std::fs::remove_dir_all(&self.work);
        }
        filled
    }

    fn fill(&self, spec: Option<&[u8]>) -> Result<(), Error> {
        if let Some(gid) = spec.and_then(root_gid) {
            chown(&self.path, None, Some(gid)).map_err(Error::io("chown", &self.path))?;
            set_mode(&self.path, 0o710)?;
        }
        let rootfs = self.path.join(ROOTFS);
        DirBuilder::new()
            .mode(0o711)
            .create(&rootfs)
            .map_err(Error::io("mkdir", &rootfs))?;
        if let Some(spec) = spec {
            let config = self.path.join(CONFIG);
            write_new(&config, spec, 0o600).map_err(Error::io("write", &config))?;
        }
        if let Some(parent) = self.work.parent() {
            make_parents(parent, 0o711)?;
        }
        // One left by an earlier boot belongs to nobody.
        match DirBuilder::new().mode(0o711).create(&self.work) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                std::fs::remove_dir_all(&self.work).map_err(Error::io("remove", &self.work))?;
                DirBuilder::new().mode(0o711).create(&self.work)
            }
            made => made,
        }
        .map_err(Error::io("mkdir", &self.work))?;
        let link = self.path.join(WORK);
        symlink(&self.work, &link).map_err(Error::io("symlink", &link))?;
        let log = self.log();
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::from_bits_truncate(0o700))
            .map_err(|e| Error::io("mkfifo", &log)(e.into()))
    }

    /// The fifo the shim logs to.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Mount point of the root filesystem.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.path.join(ROOTFS)
    }

    /// Keeps how to reach the shim.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn write_bootstrap(&self, bootstrap: &Bootstrap) -> Result<(), Error> {
        let path = self.path.join(BOOTSTRAP);
        let json = bootstrap.to_json();
        // The first is there whole or empty, and empty is none.
        match write_new(&path, json.as_bytes(), 0o644) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                replace(&path, json.as_bytes(), 0o644)
            }
            written => written,
        }
        .map_err(Error::io("write", &path))
    }

    /// How to reach the shim; a file of an older daemon is read too.
    ///
    /// # Errors
    /// When there is none, or it makes no sense.
    pub(super) fn read_bootstrap(&self) -> Result<Bootstrap, Error> {
        let path = self.path.join(BOOTSTRAP);
        let text = match small(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let old = self.path.join(ADDRESS);
                small(&old).map_err(Error::io("read", old))?
            }
            other => other.map_err(Error::io("read", &path))?,
        };
        Bootstrap::parse(text.as_bytes())
    }

    /// Keeps the shim's path, for cleaning up after a restart.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn write_shim_path(&self, shim: &Path) -> Result<(), Error> {
        let path = self.path.join(SHIM_PATH);
        write_new(&path, shim.as_os_str().as_encoded_bytes(), 0o600)
            .map_err(Error::io("write", &path))
    }

    /// The shim's path, where an earlier run kept it.
    #[must_use]
    pub(super) fn shim_path(&self) -> Option<PathBuf> {
        small(&self.path.join(SHIM_PATH)).ok().map(PathBuf::from)
    }

    /// Notes that subscribers were told of the first process's end, so that a daemon started later does
    /// not tell it again.
    pub(super) fn mark_announced(&self) {
        // A file that is there anyhow says it: another would cost its making and its removal.
        if set_mode(&self.path.join(BOOTSTRAP), TOLD_MODE).is_err() {
            // Lost on failure: the end is then told twice, which subscribers must bear.
            let _kept = std::fs::File::create(self.path.join(ANNOUNCED));
        }
    }

    /// Whether an earlier daemon told the first process's end.
    #[must_use]
    pub(super) fn announced(&self) -> bool {
        let found = std::fs::metadata(self.path.join(BOOTSTRAP));
        let told = found.is_ok_and(|found| found.permissions().mode() & 0o777 == TOLD_MODE);
        told || self.path.join(ANNOUNCED).exists()
    }

    /// Keeps which sandbox's shim was joined.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn write_sandbox(&self, id: &str) -> Result<(), Error> {
        let path = self.path.join(SANDBOX);
        write_new(&path, id.as_bytes(), 0o600).map_err(Error::io("write", &path))
    }

    /// Whether its task was made in the shim of a sandbox.
    #[must_use]
    pub(super) fn is_guest(&self) -> bool {
        self.path.join(SANDBOX).exists()
    }

    /// Pid of the first process as the runtime wrote it.
    #[must_use]
    pub(super) fn init_pid(&self) -> Option<u32> {
        small(&self.path.join("init.pid")).ok()?.trim().parse().ok()
    }

    /// Takes everything away: mounts on the root filesystem, the bundle, the work directory.
    /// Repeatable. Blocks.
    ///
    /// # Errors
    /// What the system says, when something stays.
    pub(super) fn delete(&self) -> Result<(), Error> {
        unmount(&self.rootfs())?;
        // Only ever an empty directory: what a mount hid must not be followed by a removal.
        match std::fs::remove_dir(self.rootfs()) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            // Without any mount the root filesystem was made in place, and goes with the bundle.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(e) => return Err(Error::io("remove", self.rootfs())(e)),
        }
        remove_by_rename(&self.path)?;
        // Checkpoints alone put something there.
        match std::fs::remove_dir(&self.work) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(_) => remove_by_rename(&self.work),
        }
    }
}

/// Removes a directory so that its name is free at once and half of it is never taken for whole.
fn remove_by_rename(path: &Path) -> Result<(), Error> {
    let mut name = OsString::from(".");
    name.push(path.file_name().expect("a bundle has a name"));
    let hidden = path.with_file_name(name);
    match std::fs::rename(path, &hidden) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        // A removal that was cut off left the name taken.
        Err(_) if hidden.exists() => {
            std::fs::remove_dir_all(&hidden).map_err(Error::io("remove", &hidden))?;
            std::fs::rename(path, &hidden).map_err(Error::io("rename", path))?;
        }
        Err(e) => return Err(Error::io("rename", path)(e)),
    }
    match std::fs::remove_dir_all(&hidden) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &hidden)(e)),
        _ => Ok(()),
    }
}

/// Takes every mount off `path`, one over the other, and all below them.
fn unmount(path: &Path) -> Result<(), Error> {
    for _ in 0..MAX_UNMOUNTS {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(Error::io("unmount", path)(e.into())),
        }
    }
    Err(Error::Invalid {
        reason: format!("{}: more than {MAX_UNMOUNTS} mounts on it", path.display()),
    })
}

fn make_parents(path: &Path, mode: u32) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(Error::io("mkdir", path))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Error::io("chmod", path))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?
        .write_all(bytes)
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let temp = path.with_file_name(name);
    let _stale = std::fs::remove_file(&temp);
    write_new(&temp, bytes, mode)?;
    std::fs::rename(&temp, path)
}

/// A file of a bundle as text, if it is small.
fn small(path: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_SMALL_BYTES)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Host gid of group 0 inside, when the spec maps groups.
fn root_gid(spec: &[u8]) -> Option<u32> {
    // Most specs map nothing: a search is cheaper than reading all of the JSON.
    if !spec.windows(11).any(|w| w == b"gidMappings") {
        return None;
    }
    let spec: UserNamespace = serde_json::from_slice(spec).ok()?;
    spec.linux?
        .gids?
        .into_iter()
        .find(|m| m.container == 0 && m.size > 0)
        .map(|m| m.host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(dir: &Path) -> Bundle {
        Bundle::at(
            &dir.join("state"),
            &dir.join("root"),
            TASKS,
            &Namespace::new("n").unwrap(),
            "c",
        )
    }

    #[test]
    fn the_spec_is_kept_byte_for_byte_and_everything_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundle(dir.path());
        let spec = b"{ \"ociVersion\" :  \"1.0\" }\n";
        bundle.create(Some(spec)).unwrap();
        assert_eq!(std::fs::read(bundle.path.join(CONFIG)).unwrap(), spec);
        assert_eq!(
            std::fs::read_link(bundle.path.join(WORK)).unwrap(),
            bundle.work
        );
        let again = bundle.create(None).unwrap_err();
        assert_eq!(
            lighter_proto::errdefs::Classify::kind(&again),
            lighter_proto::errdefs::ErrorKind::AlreadyExists
        );
        bundle.delete().unwrap();
        assert!(!bundle.path.exists() && !bundle.work.exists());
        bundle.delete().unwrap();
        assert_eq!(
            std::fs::read_dir(bundle.path.parent().unwrap())
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn an_end_that_was_told_is_on_record() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundle(dir.path());
        bundle.create(None).unwrap();
        let bootstrap = Bootstrap::parse(b"unix:///x").unwrap();
        bundle.write_bootstrap(&bootstrap).unwrap();
        assert!(!bundle.announced());
        bundle.mark_announced();
        assert!(bundle.announced());
        assert_eq!(bundle.read_bootstrap().unwrap(), bootstrap);
        bundle.write_bootstrap(&bootstrap).unwrap();
        assert!(!bundle.announced());
        std::fs::write(bundle.path.join(ANNOUNCED), "").unwrap();
        assert!(bundle.announced(), "an older daemon's word");
    }

    #[test]
    fn a_mapped_group_zero_may_enter() {
        let spec = br#"{"linux":{"gidMappings":[{"containerID":0,"hostID":1000,"size":10}]}}"#;
        assert_eq!(root_gid(spec), Some(1000));
        assert_eq!(root_gid(b"{}"), None);
        assert_eq!(root_gid(b"gidMappings"), None);
    }

    #[test]
    fn the_address_file_of_an_older_daemon_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = bundle(dir.path());
        bundle.create(None).unwrap();
        std::fs::write(bundle.path.join(ADDRESS), "unix:///run/x").unwrap();
        assert_eq!(bundle.read_bootstrap().unwrap().version, 2);
        let new =
            Bootstrap::parse(br#"{"version":3,"address":"unix:///y","protocol":"ttrpc"}"#).unwrap();
        bundle.write_bootstrap(&new).unwrap();
        assert_eq!(bundle.read_bootstrap().unwrap(), new);
    }
}
