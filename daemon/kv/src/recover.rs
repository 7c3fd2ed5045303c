//! Opening a database that may be damaged, and the export that it can be rebuilt from.
//!
//! `<path>` is the database's directory, `<path>.export` the newest export, `<path>.damaged-<n>`
//! what was found damaged, kept for whoever wants to look.
//!
//! | damaged | what is lost |
//! |---|---|
//! | the store | nothing when the journal reaches back to the export, which says up to which commit it has everything; otherwise the commits between them |
//! | a segment of the journal | the commits of which it had the only copy; newer and older ones are kept |

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::export::{self, Export};
use crate::journal::{self, Found};
use crate::layered::{self, Layered};
use crate::sled::Sled;
use crate::{Backend as _, Change, Db, Error, Options};

/// Most damaged databases that are kept.
const KEPT: u32 = 100;

/// Pairs of an export that are written at a time.
const IMPORT_PART: usize = 256;

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
        /// Commits that the journal had on top.
        replayed: u64,
    },
    /// A part of its journal could not be read: some of the newest changes are lost. The same holds
    /// for the stores below.
    Mended {
        /// What is missing.
        reason: String,
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

/// Opens a database of which nothing is lost.
pub(crate) fn open_whole(path: &Path, options: &Options) -> Result<Db, Error> {
    let below = Sled::open(path, options)?;
    let found = read_journal(path)?;
    if let Some(damage) = found.damage {
        return Err(Error::Corrupt {
            path: path.to_owned(),
            reason: damage.reason,
        });
    }
    with_journal(path, options, below, &found, 0)
}

fn read_journal(path: &Path) -> Result<Found, Error> {
    journal::read(path).map_err(|e| Error::io("read the journal", e))
}

/// Brings the store up to date and puts the journal before it.
fn with_journal(
    path: &Path,
    options: &Options,
    below: Sled,
    found: &Found,
    sequence: u64,
) -> Result<Db, Error> {
    layered::replay(&below, found.missing_below())?;
    if options.journal_bytes > 0 {
        match layered::prepare(path, found, options.journal_bytes, sequence) {
            Ok(journal) => return Db::over(Box::new(Layered::over(Box::new(below), journal))),
            Err(Error::Full) => {
                tracing::warn!("no room for the database's journal; changes take longer");
            }
            Err(other) => return Err(other),
        }
    }
    journal::remove(path).map_err(|e| Error::io("remove the journal", e))?;
    Db::over(Box::new(below))
}

impl Db {
    /// Opens the database in `path`; a damaged one is put aside and rebuilt from its export and
    /// its journal.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Full`], [`Error::Io`]: what a rebuild would not help.
    pub fn open_or_rebuild(path: &Path, options: &Options) -> Result<(Self, Opened), Error> {
        let building = beside(path, "rebuilding");
        if !path.exists() && building.exists() {
            // The end of a rebuild was interrupted: the damaged one went when this one was whole.
            rename(&building, path)?;
        }
        let reason = match Sled::open(path, options) {
            Ok(below) => return open_mended(path, options, below),
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
        rebuild(path, options, &building, damaged)
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    let renamed = std::fs::rename(from, to).and_then(|()| match to.parent() {
        Some(parent) => std::fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    });
    renamed.map_err(|e| Error::io("put a rebuilt database in place", e))
}

/// Opens a database whose journal may be damaged.
fn open_mended(path: &Path, options: &Options, below: Sled) -> Result<(Db, Opened), Error> {
    let found = read_journal(path)?;
    let opened = match &found.damage {
        None => Opened::Whole,
        Some(damage) => {
            let reason = damage.reason.clone();
            tracing::error!(
                path = %path.display(), reason,
                "the database's journal is damaged; acknowledged changes are lost"
            );
            Opened::Mended { reason }
        }
    };
    let db = with_journal(path, options, below, &found, 0)?;
    Ok((db, opened))
}

/// Makes a database anew, in `building`, of the export and of the journal in `path`, and puts it in
/// the place of the one in `path`, which becomes `damaged`.
fn rebuild(
    path: &Path,
    options: &Options,
    building: &Path,
    damaged: PathBuf,
) -> Result<(Db, Opened), Error> {
    let exported = export_path(path);
    let (export, pairs) = match export::read(&exported) {
        Ok(export) => {
            let pairs = export.pairs.len() as u64;
            (export, Some(pairs))
        }
        Err(error) => {
            let error = lighter_proto::errdefs::render(&error);
            tracing::error!(error, export = %exported.display(), "no export to rebuild from");
            (Export::default(), None)
        }
    };
    let found = read_journal(path)?;
    if let Some(oldest) = found.oldest()
        && oldest > export.sequence + 1
    {
        let (first, last) = (export.sequence + 1, oldest - 1);
        tracing::error!(
            first,
            last,
            "commits that neither export nor journal has are lost"
        );
    }
    if let Some(damage) = &found.damage {
        tracing::error!(reason = damage.reason, "the journal is damaged as well");
    }
    match std::fs::remove_dir_all(building) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove an unfinished rebuild", error));
        }
        _ => {}
    }
    let below = Sled::open(building, options)?;
    for part in export.pairs.chunks(IMPORT_PART) {
        let changes: Vec<Change<'_>> = part
            .iter()
            .map(|(key, value)| (key.as_slice(), Some(value.as_slice())))
            .collect();
        below.apply(&changes)?;
    }
    // All it has, not only what is newer: the export was written while changes went on.
    layered::replay(&below, found.after(0))?;
    below.sync()?;
    let newer = found.after(export.sequence);
    let replayed = newer.filter(|payload| !payload.is_empty()).count() as u64;
    let newest = found.newest().max(export.sequence);
    drop(with_journal(
        building,
        options,
        below,
        &Found::default(),
        newest,
    )?);
    rename(path, &damaged)?;
    rename(building, path)?;
    let db = open_whole(path, options)?;
    // The numbers of the export and of the new journal are those of one history only from here on.
    if let Err(error) = db.export(&exported) {
        let error = lighter_proto::errdefs::render(&error);
        tracing::warn!(error, "export of the database");
    }
    let opened = Opened::Rebuilt {
        damaged,
        pairs,
        replayed,
    };
    Ok((db, opened))
}
