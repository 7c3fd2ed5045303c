//! The blockfile driver: every snapshot is an image file with a filesystem, mounted through a loop
//! device.
//!
//! Layout: `<root>/scratch` is an empty filesystem, `<root>/snapshots/<id>` the image of snapshot `id`
//! (a copy of its parent's, or of `scratch`); a view of a parent has an empty file. Images share
//! blocks where the filesystem below can (reflink), and holes stay holes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use lighter_kv::Db;

use crate::copy::copy_image;
use crate::dirs::{Dirs, remove_tree};
use crate::local::{Driver, Local, Removal};
use crate::storage::Record;
use crate::{Error, Kind, Mount, Usage, disk_usage};

/// Filesystem of the images where none is configured.
const DEFAULT_FILESYSTEM: &str = "ext4";
/// The word that puts a file behind a loop device.
const LOOP: &str = "loop";

/// How to run the driver; the names are those of containerd's plugin configuration.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Where snapshots live.
    pub root: PathBuf,
    /// An empty filesystem image to copy for `<root>/scratch`; empty: it must be there.
    pub scratch_file: PathBuf,
    /// Type of the filesystem in it; empty: ext4.
    pub fs_type: String,
    /// Words of every mount; `loop` is added where it is missing.
    pub mount_options: Vec<String>,
    /// Copy `scratch_file` anew at every start.
    pub recreate_scratch: bool,
}

/// Snapshots as image files.
#[derive(Debug)]
pub struct Blockfile(Local<Images>);

#[derive(Debug)]
struct Images {
    scratch: PathBuf,
    fs_type: String,
    options: Vec<String>,
}

impl Blockfile {
    /// Opens the snapshots below `config.root` with records below `prefix` of `db`.
    ///
    /// # Errors
    /// `FailedPrecondition` without a scratch file and none to copy; when directories cannot be made
    /// or read, and when records are damaged.
    pub fn open(db: Db, prefix: &[u8], config: Config) -> Result<Self, Error> {
        let dirs = Dirs::open(&config.root)?;
        let scratch = config.root.join("scratch");
        let exists = scratch
            .try_exists()
            .map_err(Error::io("look for scratch file", &scratch))?;
        if config.recreate_scratch || !exists {
            make_scratch(&config.scratch_file, &scratch)?;
        }
        let mut options = config.mount_options;
        if !options.iter().any(|o| o == LOOP) {
            options.push(LOOP.to_owned());
        }
        let driver = Images {
            scratch,
            fs_type: match config.fs_type.as_str() {
                "" => DEFAULT_FILESYSTEM.to_owned(),
                kind => kind.to_owned(),
            },
            options,
        };
        Ok(Self(Local::open(db, prefix, dirs, driver, Removal::Sync)?))
    }
}

/// Copies the configured file to its place, whole or not at all.
fn make_scratch(from: &Path, scratch: &Path) -> Result<(), Error> {
    if from.as_os_str().is_empty() {
        return Err(Error::Precondition {
            reason: format!(
                "no scratch file generator: set scratch_file to an empty filesystem image, or put \
                 one at {}",
                scratch.display()
            ),
        });
    }
    let new = scratch.with_extension("new");
    remove_tree(&new)?;
    copy_image(from, &new)?;
    fs::rename(&new, scratch).map_err(Error::io("rename", &new))
}

impl Images {
    /// The image that is mounted for a snapshot.
    fn image(dirs: &Dirs, record: &Record) -> PathBuf {
        match (record.info.kind, record.parent_ids.first()) {
            (Kind::View, Some(parent)) => dirs.path(*parent),
            _ => dirs.path(record.id),
        }
    }
}

impl Driver for Images {
    fn create(&self, dirs: &Dirs, record: &Record) -> Result<(), Error> {
        let own = dirs.path(record.id);
        match (record.info.kind, record.parent_ids.first()) {
            (Kind::View, Some(_)) => {
                File::create_new(&own).map_err(Error::io("create", &own))?;
                Ok(())
            }
            (_, Some(parent)) => copy_image(&dirs.path(*parent), &own),
            (_, None) => copy_image(&self.scratch, &own),
        }
    }

    fn mounts(&self, dirs: &Dirs, record: &Record) -> Result<Vec<Mount>, Error> {
        let access = if record.info.kind == Kind::View {
            "ro"
        } else {
            "rw"
        };
        let mut options = self.options.clone();
        options.push(access.to_owned());
        Ok(vec![Mount {
            fstype: self.fs_type.clone(),
            source: Self::image(dirs, record).to_string_lossy().into_owned(),
            target: String::new(),
            options,
        }])
    }

    /// Blocks of the image beyond those of its parent. Shared ones count as if they were its own, and
    /// what was removed hides what was added: an approximation, as upstream's.
    fn usage(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        let own = disk_usage(&dirs.path(record.id))?;
        let below = match record.parent_ids.first() {
            Some(parent) => disk_usage(&dirs.path(*parent))?.size_bytes,
            None => 0,
        };
        Ok(Usage {
            size_bytes: own.size_bytes.saturating_sub(below),
            inodes: 1,
        })
    }

    fn seal(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        let own = dirs.path(record.id);
        File::open(&own)
            .and_then(|image| image.sync_all())
            .and_then(|()| rustix::fs::fsync(dirs.snapshots()).map_err(io::Error::from))
            .map_err(Error::io("sync", &own))?;
        self.usage(dirs, record)
    }

    fn seals_durably(&self) -> bool {
        true
    }
}

crate::local::delegate!(Blockfile);
