//! The native driver: every snapshot is a whole copy of its parent; works on any filesystem.
//!
//! Layout: `<root>/snapshots/<id>` is the root of snapshot `id`. Files share blocks where the
//! filesystem can (reflink).

use std::path::Path;

use lighter_kv::Db;

use crate::copy::copy_tree;
use crate::dirs::Dirs;
use crate::local::{Driver, Local, Removal};
use crate::storage::Record;
use crate::{Error, Kind, Mount, Usage, disk_usage};

/// Snapshots as plain copies.
#[derive(Debug)]
pub struct Native(Local<Copying>);

#[derive(Debug)]
struct Copying;

impl Native {
    /// Opens the snapshots below `root` with records below `prefix` of `db`.
    ///
    /// # Errors
    /// When directories cannot be made or read, and when records are damaged.
    pub fn open(db: Db, prefix: &[u8], root: &Path) -> Result<Self, Error> {
        let dirs = Dirs::open(root)?;
        Ok(Self(Local::open(
            db,
            prefix,
            dirs,
            Copying,
            Removal::Async,
        )?))
    }
}

impl Driver for Copying {
    fn create(&self, dirs: &Dirs, record: &Record) -> Result<(), Error> {
        dirs.make(&record.id.to_string(), 0o755)?;
        match record.parent_ids.first() {
            // A view of a parent is the parent itself; its own directory stays empty.
            Some(parent) if record.info.kind == Kind::Active => {
                copy_tree(&dirs.path(*parent), &dirs.path(record.id))?;
                // The record may outlive the power; half a copy must not pass for a whole one.
                dirs.sync()
                    .map_err(Error::io("sync the filesystem of", dirs.root()))
            }
            _ => Ok(()),
        }
    }

    fn mounts(&self, dirs: &Dirs, record: &Record) -> Result<Vec<Mount>, Error> {
        let (id, access) = match (record.info.kind, record.parent_ids.first()) {
            (Kind::View, Some(parent)) => (*parent, "ro"),
            (Kind::View, None) => (record.id, "ro"),
            _ => (record.id, "rw"),
        };
        Ok(vec![Mount {
            fstype: "bind".to_owned(),
            source: dirs.path(id).to_string_lossy().into_owned(),
            target: String::new(),
            options: vec![access.to_owned(), "rbind".to_owned()],
        }])
    }

    fn usage(&self, dirs: &Dirs, record: &Record) -> Result<Usage, Error> {
        disk_usage(&dirs.path(record.id))
    }
}

crate::local::delegate!(Native);
