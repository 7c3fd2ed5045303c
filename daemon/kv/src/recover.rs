//! Opening a database that may be damaged, and the export that it can be rebuilt from.
//!
//! `<path>` is the database's directory, `<path>.export` the newest export, `<path>.damaged-<n>`
//! what was found damaged, kept for whoever wants to look.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::{Db, Error, Options};

/// Most damaged databases that are kept.
const KEPT: u32 = 100;

/// What it took to open a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// Nothing: it was whole, or new.
    Whole,
    /// It was damaged, and was built anew. Changes since the export are lost: what the stores below
    /// hold must not be removed for want of a record.
    Rebuilt {
        /// Where the damaged one is.
        damaged: PathBuf,
        /// Pairs that the export had; `None` without a whole export.
        pairs: Option<u64>,
    },
}

/// Where the export of the database in `path` is.
#[must_use]
pub fn export_path(path: &Path) -> PathBuf {
    beside(path, "export")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    path.with_file_name(name)
}

impl Db {
    /// Opens the database in `path`; a damaged one is put aside and rebuilt from its export.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Full`], [`Error::Io`]: what a rebuild would not help.
    pub fn open_or_rebuild(path: &Path, options: &Options) -> Result<(Self, Opened), Error> {
        let reason = match Self::open(path, options) {
            Ok(db) => return Ok((db, Opened::Whole)),
            Err(Error::Corrupt { reason, .. }) => reason,
            Err(other) => return Err(other),
        };
        let damaged = (0..KEPT)
            .map(|n| beside(path, &format!("damaged-{n}")))
            .find(|candidate| !candidate.exists())
            .ok_or_else(|| Error::Corrupt {
                path: path.to_owned(),
                reason: format!("{reason}; and {KEPT} damaged databases are beside it already"),
            })?;
        tracing::error!(
            path = %path.display(), damaged = %damaged.display(), reason,
            "the database is damaged; it is put aside and rebuilt from its export"
        );
        std::fs::rename(path, &damaged).map_err(|source| Error::Io {
            operation: "put the damaged database aside",
            source,
        })?;
        let db = Self::open(path, options)?;
        let export = export_path(path);
        let pairs = match db.import(&export) {
            Ok(pairs) => Some(pairs),
            Err(error) => {
                let error = lighter_proto::errdefs::render(&error);
                tracing::error!(error, export = %export.display(), "no export to rebuild from");
                None
            }
        };
        Ok((db, Opened::Rebuilt { damaged, pairs }))
    }
}
