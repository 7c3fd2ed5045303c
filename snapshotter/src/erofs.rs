//! The EROFS driver: every committed snapshot is one read-only image, stacked by overlayfs.
//!
//! Layout, the same as containerd's: `<root>/snapshots/<id>/`
//!
//! | name | what |
//! |---|---|
//! | `fs/`, `work/` | upper and work directory of an active snapshot |
//! | `.erofslayer` | marks an active snapshot for differs that write the image themselves |
//! | `layer.erofs` | the image of a committed snapshot, made of `fs` by `mkfs.erofs` at commit |
//! | `rwlayer.img` | with a default size: an ext4 image that holds upper and work directory instead |
//!
//! The mounts that clients get are upstream's: they refer to each other (`{{ mount 0 }}`), so a mount
//! manager carries them out.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use lighter_kv::Db;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::dirs::{Dirs, remove_tree};
use crate::local::{Driver, Local, Removal};
use crate::mount::{Access, TempMount};
use crate::overlayfs::{check_file_types, in_user_namespace, owner, remaps_ids};
use crate::storage::Record;
use crate::{
    Error, Kind, LABEL_GID_MAPPING, LABEL_MAX_SIZE, LABEL_UID_MAPPING, Mount, Usage, disk_usage,
    sys,
};

/// The program that makes images (Debian: erofs-utils).
const MKFS: &str = "mkfs.erofs";
/// Bytes of its complaint that are passed on.
const STDERR_MAX_BYTES: usize = 4096;

/// How to run the driver; the names are those of containerd's plugin configuration.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Where snapshots live.
    pub root: PathBuf,
    /// Words added to every overlay mount.
    pub ovl_mount_options: Vec<String>,
    /// Have the kernel check every read of an image.
    pub enable_fsverity: bool,
    /// Protect images from being changed or removed by accident.
    pub set_immutable: bool,
    /// Bytes of the writable layer of an active snapshot; 0: a directory without a bound.
    pub default_size_bytes: u64,
}

/// Snapshots as EROFS images.
#[derive(Debug)]
pub struct Erofs(Local<Images>);

#[derive(Debug)]
struct Images {
    options: Vec<String>,
    fsverity: bool,
    immutable: bool,
    /// 0: directories.
    default_size_bytes: u64,
    remap_ids: bool,
    root: PathBuf,
}

impl Erofs {
    /// Opens the snapshots below `config.root` with records below `prefix` of `db`.
    ///
    /// # Errors
    /// `FailedPrecondition` where the kernel or the machine lacks something; when directories cannot
    /// be made or read, and when records are damaged.
    pub fn open(db: Db, prefix: &[u8], config: Config) -> Result<Self, Error> {
        let dirs = Dirs::open(&config.root)?;
        check_file_types(&config.root)?;
        check_machine()?;
        if config.enable_fsverity {
            check_verity(&config.root)?;
        }
        let remap_ids = !in_user_namespace() && remaps_ids(&config.root);
        let driver = Images {
            options: config.ovl_mount_options,
            fsverity: config.enable_fsverity,
            immutable: config.set_immutable,
            default_size_bytes: config.default_size_bytes,
            remap_ids,
            root: config.root,
        };
        Ok(Self(Local::open(db, prefix, dirs, driver, Removal::Async)?))
    }
}

/// Kernel and tools.
fn check_machine() -> Result<(), Error> {
    let missing = |reason: &str| Error::Precondition {
        reason: reason.to_owned(),
    };
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.trim_start() == "erofs") {
        return Err(missing("EROFS unsupported, please `modprobe erofs`"));
    }
    Command::new(MKFS)
        .arg("--help")
        .output()
        .map_err(|_| missing("mkfs.erofs cannot be run: install erofs-utils"))?;
    Ok(())
}

fn check_verity(root: &Path) -> Result<(), Error> {
    let probe = root.join("check-verity");
    let result = fs::write(&probe, "x")
        .and_then(|()| File::open(&probe))
        .and_then(|file| sys::enable_verity(&file));
    remove_tree(&probe)?;
    result.map_err(|error| Error::Precondition {
        reason: format!(
            "fsverity is not supported on the filesystem of {}: {error}",
            root.display()
        ),
    })
}

fn below(dirs: &Dirs, id: u64, name: &str) -> PathBuf {
    dirs.path(id).join(name)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn is_empty(dir: &Path) -> Result<bool, Error> {
    let mut entries = fs::read_dir(dir).map_err(Error::io("read", dir))?;
    Ok(entries.next().is_none())
}

impl Images {
    /// Bytes of the writable image, when there is one.
    fn writable_bytes(&self, record: &Record) -> Option<u64> {
        if self.default_size_bytes == 0 {
            return None;
        }
        let asked = record.info.labels.get(LABEL_MAX_SIZE);
        let asked = asked.and_then(|text| text.parse::<u64>().ok());
        Some(
            asked
                .filter(|size| *size > 0)
                .unwrap_or(self.default_size_bytes),
        )
    }

    fn layer(dirs: &Dirs, id: u64) -> Result<Mount, Error> {
        let path = below(dirs, id, "layer.erofs");
        fs::symlink_metadata(&path).map_err(Error::io("find valid erofs layer blob", &path))?;
        Ok(Mount {
            fstype: "erofs".to_owned(),
            source: text(&path),
            target: String::new(),
            options: words(&["ro", "loop"]),
        })
    }

    fn writable(dirs: &Dirs, id: u64, bytes: u64, access: &str) -> Mount {
        Mount {
            fstype: "mkfs/ext4".to_owned(),
            source: text(&below(dirs, id, "rwlayer.img")),
            target: String::new(),
            options: vec![
                "X-containerd.mkfs.fs=ext4".to_owned(),
                format!("X-containerd.mkfs.size={bytes}"),
                access.to_owned(),
                "loop".to_owned(),
            ],
        }
    }

    /// The mounts of a snapshot without parents.
    fn base(&self, dirs: &Dirs, record: &Record) -> Result<Vec<Mount>, Error> {
        let fs = below(dirs, record.id, "fs");
        // A differ that wrote the image itself left nothing else.
        if below(dirs, record.id, "layer.erofs").exists() && is_empty(&fs)? {
            return Ok(vec![Self::layer(dirs, record.id)?]);
        }
        let access = if record.info.kind == Kind::View {
            "ro"
        } else {
            "rw"
        };
        // A view of nothing needs no image to write to.
        let bounded = self.writable_bytes(record);
        let Some(bytes) = bounded.filter(|_| record.info.kind == Kind::Active) else {
            return Ok(vec![Mount {
                fstype: "bind".to_owned(),
                source: text(&fs),
                target: String::new(),
                options: words(&[access, "rbind"]),
            }]);
        };
        Ok(vec![
            Self::writable(dirs, record.id, bytes, access),
            Mount {
                fstype: "format/mkdir/bind".to_owned(),
                source: "{{ mount 0 }}/upper".to_owned(),
                target: String::new(),
                options: words(&[
                    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                    access,
                    "rbind",
                ]),
            },
        ])
    }

    /// The image of what an active snapshot has, beside its directory; renamed into place when whole.
    fn convert(&self, dirs: &Dirs, record: &Record) -> Result<(), Error> {
        let (own, fs) = (dirs.path(record.id), below(dirs, record.id, "fs"));
        let image = below(dirs, record.id, "rwlayer.img");
        if !image.exists() {
            return make_image(&fs, &own);
        }
        let writable = Mount {
            fstype: "ext4".to_owned(),
            source: text(&image),
            target: String::new(),
            options: words(&["ro", "loop", "noload"]),
        };
        let mounted = TempMount::new(&self.root, &[writable], Access::AsGiven)?;
        let upper = mounted.path().join("upper");
        // Never mounted: as empty as its directory.
        let from = if upper.is_dir() { &upper } else { &fs };
        make_image(from, &own)?;
        Ok(mounted.close()?)
    }
}

/// Makes `layer.erofs` in `own` of the directory `from`, durably.
fn make_image(from: &Path, own: &Path) -> Result<(), Error> {
    let (new, image) = (own.join("layer.erofs.new"), own.join("layer.erofs"));
    remove_tree(&new)?;
    let made = Command::new(MKFS)
        .args(["--quiet", "-Enoinline_data"])
        .arg(&new)
        .arg(from)
        .output()
        .map_err(Error::io("run", MKFS))?;
    if !made.status.success() {
        let said = [made.stderr, made.stdout].concat();
        let said = String::from_utf8_lossy(&said[..said.len().min(STDERR_MAX_BYTES)]).into_owned();
        let _absent = fs::remove_file(&new);
        return Err(Error::Io {
            operation: "erofs apply failed: convert",
            path: from.to_owned(),
            source: io::Error::other(format!("{}: {}", said.trim(), made.status)),
        });
    }
    File::open(&new)
        .and_then(|file| file.sync_all())
        .and_then(|()| fs::rename(&new, &image))
        .and_then(|()| File::open(own)?.sync_all())
        .map_err(Error::io("keep", &image))
}

/// Sets or clears the flag that forbids changes.
fn set_immutable(path: &Path, on: bool) -> io::Result<()> {
    let file = File::open(path)?;
    let mut flags = ioctl_getflags(&file)?;
    if flags.contains(IFlags::IMMUTABLE) == on {
        return Ok(());
    }
    flags.set(IFlags::IMMUTABLE, on);
    Ok(ioctl_setflags(&file, flags)?)
}

impl Driver for Images {
    fn create(&self, dirs: &Dirs, record: &Record) -> Result<(), Error> {
        let owner = match self.default_size_bytes {
            0 => owner(dirs, record)?,
            // In an image of its own; owners here are of no account.
            _ => None,
        };
        let id = record.id.to_string();
        dirs.make(&id, 0o700)?;
        let fs = format!("{id}/fs");
        dirs.make(&fs, 0o755)?;
        if let Some((uid, gid)) = owner {
            dirs.chown(&fs, uid, gid)?;
        }
        if record.info.kind == Kind::Active {
            if self.default_size_bytes == 0 {
                dirs.make(&format!("{id}/work"), 0o711)?;
            }
            let mark = below(dirs, record.id, ".erofslayer");
            File::create_new(&mark).map_err(Error::io("create", &mark))?;
        }
        Ok(())
    }

    fn mounts(&self, dirs: &Dirs, record: &Record) -> Result<Vec<Mount>, Error> {
        let active = record.info.kind == Kind::Active;
        match record.parent_ids.as_slice() {
            [] => return self.base(dirs, record),
            [only] if !active => return Ok(vec![Self::layer(dirs, *only)?]),
            _ => {}
        }
        let (mut mounts, mut options) = (Vec::new(), Vec::new());
        if let Some(bytes) = self.writable_bytes(record).filter(|_| active) {
            mounts.push(Self::writable(dirs, record.id, bytes, "rw"));
            options.extend(words(&[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
            ]));
        } else if active {
            options.push(format!("workdir={}", text(&below(dirs, record.id, "work"))));
            options.push(format!("upperdir={}", text(&below(dirs, record.id, "fs"))));
        }
        let first = mounts.len();
        for id in &record.parent_ids {
            mounts.push(Self::layer(dirs, *id)?);
        }
        if self.remap_ids {
            for (word, label) in [("uidmap", LABEL_UID_MAPPING), ("gidmap", LABEL_GID_MAPPING)] {
                if let Some(map) = record.info.labels.get(label) {
                    options.push(format!("{word}={map}"));
                }
            }
        }
        let last = mounts.len() - 1;
        options.push(if first == last {
            format!("lowerdir={{{{ mount {first} }}}}")
        } else {
            format!("lowerdir={{{{ overlay {first} {last} }}}}")
        });
        options.extend_from_slice(&self.options);
        mounts.push(Mount {
            fstype: "format/mkdir/overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options,
        });
        Ok(mounts)
    }

    fn usage(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        let image = below(dirs, record.id, "rwlayer.img");
        if image.exists() {
            return disk_usage(&image);
        }
        disk_usage(&below(dirs, record.id, "fs"))
    }

    fn seal(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        let image = below(dirs, record.id, "layer.erofs");
        let fs = below(dirs, record.id, "fs");
        let applied = image.exists() && is_empty(&fs)?;
        if applied {
            File::open(&image)
                .and_then(|file| file.sync_all())
                .map_err(Error::io("sync", &image))?;
        } else {
            self.convert(dirs, record)?;
        }
        rustix::fs::fsync(dirs.snapshots())
            .map_err(|e| Error::io("sync", dirs.root())(e.into()))?;
        if self.fsverity {
            File::open(&image)
                .and_then(|file| sys::enable_verity(&file))
                .or_else(|error| match error.raw_os_error() {
                    Some(libc::EEXIST) => Ok(()),
                    _ => Err(error),
                })
                .map_err(Error::io("enable fsverity of", &image))?;
        }
        disk_usage(&image)
    }

    fn sealed(&self, dirs: &Dirs, record: &Record) {
        let image = below(dirs, record.id, "layer.erofs");
        if self.immutable
            && let Err(error) = set_immutable(&image, true)
        {
            tracing::warn!(%error, path = %image.display(), "cannot make a layer immutable");
        }
        // `fs` itself stays: its owner is inherited.
        let fs = below(dirs, record.id, "fs");
        let inside = fs::read_dir(&fs).into_iter().flatten().flatten();
        let doomed =
            inside
                .map(|entry| entry.path())
                .chain([below(dirs, record.id, "rwlayer.img")]);
        for path in doomed {
            if let Err(error) = remove_tree(&path) {
                tracing::warn!(error = %lighter_proto::errdefs::render(&error),
                    "what a layer was made of stays beside it");
            }
        }
    }

    fn seals_durably(&self) -> bool {
        true
    }

    fn layers_stand_alone(&self) -> bool {
        self.default_size_bytes == 0
            && !in_user_namespace()
            && !self.options.iter().any(|o| o == "userxattr")
    }

    fn release(&self, path: &Path) {
        let image = path.join("layer.erofs");
        if fs::symlink_metadata(&image).is_ok_and(|meta| meta.is_file()) {
            // Where there are no such flags there is nothing to clear; the removal says the rest.
            let _unsupported = set_immutable(&image, false);
        }
    }

    fn capabilities(&self) -> Vec<String> {
        let mut capabilities = words(&["only-remap-ids"]);
        if self.remap_ids {
            capabilities.push("remap-ids".to_owned());
        }
        capabilities.push("rebase".to_owned());
        capabilities
    }
}

crate::local::delegate!(Erofs);
