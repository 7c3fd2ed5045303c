//! The overlayfs driver: one directory per snapshot, stacked by the kernel.
//!
//! Layout of version 1, the same as containerd's: `<root>/snapshots/<id>/fs` (0755) holds the
//! changes of snapshot `id`, `<root>/snapshots/<id>/work` (0711, active snapshots only) is
//! overlayfs' own.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use lighter_kv::Db;
use rustix::fs::{AtFlags, Dir, FileType, statat};

use crate::dirs::{Dirs, remove_tree};
use crate::local::{Driver, Local, Removal};
use crate::mount::{IdMap, root_pair};
use crate::storage::Record;
use crate::{
    Error, Kind, LABEL_GID_MAPPING, LABEL_UID_MAPPING, LABEL_UPPER_DIR, Labels, Mount, Usage,
    disk_usage,
};

/// How to run the driver; the names are those of containerd's plugin configuration.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Where snapshots live.
    pub root: PathBuf,
    /// Show label [`LABEL_UPPER_DIR`].
    pub upperdir_label: bool,
    /// Remove directories with their snapshots instead of at cleanup.
    pub sync_remove: bool,
    /// Shifted owners may also be had by changing every file (capability `only-remap-ids` is absent).
    pub slow_chown: bool,
    /// Words added to every overlay mount, e.g. `volatile`.
    pub mount_options: Vec<String>,
}

/// Snapshots on overlayfs.
#[derive(Debug)]
pub struct Overlayfs(Local<Overlay>);

#[derive(Debug)]
struct Overlay {
    options: Vec<String>,
    upperdir_label: bool,
    remap_ids: bool,
    capabilities: Vec<String>,
}

impl Overlayfs {
    /// Opens the snapshots below `config.root` with records below `prefix` of `db`.
    ///
    /// # Errors
    /// When directories cannot be made or read, when the filesystem does not report file types, and
    /// when records are damaged.
    pub fn open(db: Db, prefix: &[u8], config: Config) -> Result<Self, Error> {
        let dirs = Dirs::open(&config.root)?;
        check_file_types(&config.root)?;
        let in_userns = in_user_namespace();
        let mut options = config.mount_options;
        if in_userns && !options.iter().any(|o| o == "userxattr") {
            options.push("userxattr".to_owned());
        }
        if Path::new("/sys/module/overlay/parameters/index").exists()
            && !options.iter().any(|o| o.starts_with("index="))
        {
            options.push("index=off".to_owned());
        }
        let remap_ids = !in_userns && remaps_ids(&config.root);
        let mut capabilities = Vec::new();
        if remap_ids {
            capabilities.push("remap-ids".to_owned());
        }
        if !config.slow_chown {
            capabilities.push("only-remap-ids".to_owned());
        }
        if !in_userns {
            capabilities.push("rebase".to_owned());
        }
        let driver = Overlay {
            options,
            upperdir_label: config.upperdir_label,
            remap_ids,
            capabilities,
        };
        let removal = if config.sync_remove {
            Removal::Sync
        } else {
            Removal::Async
        };
        Ok(Self(Local::open(db, prefix, dirs, driver, removal)?))
    }
}

fn fs_dir(dirs: &Dirs, id: u64) -> String {
    let mut path = dirs.path(id);
    path.push("fs");
    path.to_string_lossy().into_owned()
}

/// A directory in an overlay option: colons and backslashes are protected, commas cannot be.
fn escaped(path: &str) -> String {
    if path.contains([':', '\\']) {
        path.replace('\\', "\\\\").replace(':', "\\:")
    } else {
        path.to_owned()
    }
}

fn bind(source: String, mut options: Vec<String>, access: &str) -> Vec<Mount> {
    options.push(access.to_owned());
    options.push("rbind".to_owned());
    vec![Mount {
        fstype: "bind".to_owned(),
        source,
        target: String::new(),
        options,
    }]
}

/// The owner of a new snapshot's root when it is not the daemon's.
pub(crate) fn owner(dirs: &Dirs, record: &Record) -> Result<Option<(u32, u32)>, Error> {
    let label = |name: &str| record.info.labels.get(name).map(String::as_str);
    if let (Some(uid), Some(gid)) = (label(LABEL_UID_MAPPING), label(LABEL_GID_MAPPING)) {
        let pair = root_pair(uid, gid).ok_or_else(|| Error::Invalid {
            reason: format!(
                "labels {LABEL_UID_MAPPING}={uid:?} and {LABEL_GID_MAPPING}={gid:?} do not map \
                 root: want container:host:size[,…]: invalid argument"
            ),
        })?;
        return Ok(Some(pair));
    }
    let Some(parent) = record.parent_ids.first() else {
        return Ok(None);
    };
    let path = format!("{parent}/fs");
    let stat = statat(dirs.snapshots(), &path, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| Error::io("read owner of", dirs.path(*parent).join("fs"))(e.into()))?;
    Ok(Some((stat.st_uid, stat.st_gid)).filter(|pair| *pair != (0, 0)))
}

impl Driver for Overlay {
    fn create(&self, dirs: &Dirs, record: &Record) -> Result<(), Error> {
        let owner = owner(dirs, record)?;
        let id = record.id.to_string();
        dirs.make(&id, 0o700)?;
        let fs = format!("{id}/fs");
        dirs.make(&fs, 0o755)?;
        if let Some((uid, gid)) = owner {
            dirs.chown(&fs, uid, gid)?;
        }
        if record.info.kind == Kind::Active {
            dirs.make(&format!("{id}/work"), 0o711)?;
        }
        Ok(())
    }

    fn is_whole(&self, dirs: &Dirs, record: &Record) -> bool {
        let path = dirs.path(record.id);
        path.join("fs").is_dir() && (record.info.kind != Kind::Active || path.join("work").is_dir())
    }

    fn mounts(&self, dirs: &Dirs, record: &Record) -> Result<Vec<Mount>, Error> {
        let mut options = Vec::with_capacity(8);
        if self.remap_ids {
            for (word, label) in [("uidmap", LABEL_UID_MAPPING), ("gidmap", LABEL_GID_MAPPING)] {
                if let Some(map) = record.info.labels.get(label) {
                    options.push(format!("{word}={map}"));
                }
            }
        }
        let active = record.info.kind == Kind::Active;
        match record.parent_ids.as_slice() {
            [] => {
                let access = if active { "rw" } else { "ro" };
                return Ok(bind(fs_dir(dirs, record.id), options, access));
            }
            [only] if !active => return Ok(bind(fs_dir(dirs, *only), options, "ro")),
            _ => {}
        }
        if active {
            let own = dirs.path(record.id);
            options.push(format!("workdir={}", own.join("work").display()));
            options.push(format!("upperdir={}", own.join("fs").display()));
        }
        let lower: Vec<String> = record
            .parent_ids
            .iter()
            .map(|id| escaped(&fs_dir(dirs, *id)))
            .collect();
        options.push(format!("lowerdir={}", lower.join(":")));
        options.extend_from_slice(&self.options);
        Ok(vec![Mount {
            fstype: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options,
        }])
    }

    fn usage(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        disk_usage(&dirs.path(record.id).join("fs"))
    }

    fn decorate(&self, dirs: &Dirs, record: &Record, labels: &mut Labels) {
        if self.upperdir_label {
            labels.insert(LABEL_UPPER_DIR.to_owned(), fs_dir(dirs, record.id));
        }
    }

    fn capabilities(&self) -> Vec<String> {
        self.capabilities.clone()
    }

    fn layers_stand_alone(&self) -> bool {
        self.capabilities.iter().any(|c| c == "rebase")
            && !self.options.iter().any(|o| o == "userxattr")
    }
}

/// overlayfs needs file types from `readdir`; without them it hides deletions silently.
pub(crate) fn check_file_types(root: &Path) -> Result<(), Error> {
    let failed = |e: rustix::io::Errno| Error::io("check file types in", root)(e.into());
    let probe = tempfile::Builder::new()
        .prefix("check-")
        .tempdir_in(root)
        .map_err(Error::io("make directory in", root))?;
    fs::create_dir(probe.path().join("d")).map_err(Error::io("make directory in", root))?;
    let dir = fs::File::open(probe.path()).map_err(Error::io("open", probe.path()))?;
    for entry in Dir::read_from(dir.as_fd()).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name() == c"d" && entry.file_type() == FileType::Unknown {
            return Err(Error::Precondition {
                reason: format!(
                    "{} does not support d_type: make the filesystem anew with it (xfs: ftype=1): \
                     failed precondition",
                    root.display()
                ),
            });
        }
    }
    Ok(())
}

/// Whether root here is not the machine's root.
pub(crate) fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let mut words = map.split_whitespace();
    !(words.next() == Some("0") && words.next() == Some("0") && words.next() == Some("4294967295"))
}

/// Whether overlayfs takes lower directories with shifted owners from this filesystem.
pub(crate) fn remaps_ids(root: &Path) -> bool {
    // Idmapped layers under overlayfs came with Linux 5.19.
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 19) {
        return false;
    }
    let Ok(probe) = tempfile::Builder::new().prefix("check-").tempdir_in(root) else {
        return false;
    };
    let works =
        IdMap::parse("0:1:1", "0:1:1").is_some_and(|map| map.tree(probe.path(), false).is_ok());
    let _ = remove_tree(probe.path());
    works
}

crate::local::delegate!(Overlayfs);
