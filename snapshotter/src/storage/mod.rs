//! Records of snapshots: kinds, parent chains, labels, children.
//!
//! Keys, all below the prefix handed in (`s/<driver>/` in the daemon), version 1:
//!
//! | key | value |
//! |---|---|
//! | `v` | schema version, 4 bytes big endian; another version is refused |
//! | `r` key-or-name | [`Stored`], a protobuf message |
//! | `c` parent id (8 bytes big endian) child key-or-name | empty; the children of a snapshot |
//!
//! A new version is read by migrating every record in one update before anything else; version 1 is
//! the first.

use std::time::SystemTime;

use lighter_kv::{Db, Durable, Tx};
use lighter_proto::time as wire_time;
use prost::Message;

use crate::{CommitOptions, Error, Info, Kind, LabelUpdate, Labels, Usage};

const VERSION: u32 = 1;

/// A record as it is on disk.
#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(uint64, tag = "1")]
    id: u64,
    /// 1 view, 2 active, 3 committed; as on the wire.
    #[prost(uint32, tag = "2")]
    kind: u32,
    /// Empty: none.
    #[prost(string, tag = "3")]
    parent: String,
    /// Ids of the parents, nearest first.
    #[prost(uint64, repeated, tag = "4")]
    parent_ids: Vec<u64>,
    #[prost(message, optional, tag = "5")]
    created_at: Option<prost_types::Timestamp>,
    #[prost(message, optional, tag = "6")]
    updated_at: Option<prost_types::Timestamp>,
    #[prost(btree_map = "string, string", tag = "7")]
    labels: Labels,
    #[prost(uint64, tag = "8")]
    size_bytes: u64,
    #[prost(uint64, tag = "9")]
    inodes: u64,
}

/// One snapshot with what only its driver needs to know.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// Number of its directory.
    pub(crate) id: u64,
    /// Ids of its parents, nearest first.
    pub(crate) parent_ids: Vec<u64>,
    /// What everyone may know.
    pub(crate) info: Info,
    /// Disk use, of committed ones.
    pub(crate) usage: Usage,
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        Stored {
            id: self.id,
            kind: match self.info.kind {
                Kind::View => 1,
                Kind::Active => 2,
                Kind::Committed => 3,
            },
            parent: self.info.parent.clone().unwrap_or_default(),
            parent_ids: self.parent_ids.clone(),
            created_at: Some(wire_time::to_timestamp(self.info.created_at)),
            updated_at: Some(wire_time::to_timestamp(self.info.updated_at)),
            labels: self.info.labels.clone(),
            size_bytes: self.usage.size_bytes,
            inodes: self.usage.inodes,
        }
        .encode_to_vec()
    }

    fn decode(key: &[u8], value: &[u8]) -> Result<Self, Error> {
        let damaged = || Error::Damaged {
            key: String::from_utf8_lossy(key).into_owned(),
        };
        let stored = Stored::decode(value).map_err(|_| damaged())?;
        let kind = match stored.kind {
            1 => Kind::View,
            2 => Kind::Active,
            3 => Kind::Committed,
            _ => return Err(damaged()),
        };
        let time = |t: Option<prost_types::Timestamp>| {
            t.and_then(wire_time::from_timestamp)
                .unwrap_or(SystemTime::UNIX_EPOCH)
        };
        Ok(Self {
            id: stored.id,
            parent_ids: stored.parent_ids,
            info: Info {
                kind,
                name: String::from_utf8(key.to_vec()).map_err(|_| damaged())?,
                parent: (!stored.parent.is_empty()).then_some(stored.parent),
                labels: stored.labels,
                created_at: time(stored.created_at),
                updated_at: time(stored.updated_at),
            },
            usage: Usage {
                size_bytes: stored.size_bytes,
                inodes: stored.inodes,
            },
        })
    }
}

/// A snapshot about to be made.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) key: String,
    pub(crate) kind: Kind,
    pub(crate) parent: Option<String>,
    pub(crate) labels: Labels,
}

/// The records of one driver.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    db: Db,
    prefix: Vec<u8>,
}

impl Records {
    pub(crate) fn open(db: Db, prefix: &[u8]) -> Result<Self, Error> {
        let records = Self {
            db,
            prefix: prefix.to_vec(),
        };
        let version_key = records.key(b'v', &[]);
        match records.db.get(&version_key)? {
            Some(found) if found == VERSION.to_be_bytes() => {}
            Some(_) => {
                return Err(Error::Damaged {
                    key: "schema version (written by another version of this program)".to_owned(),
                });
            }
            None => {
                let (_, ticket) = records.db.update(|tx| {
                    tx.put(version_key, VERSION.to_be_bytes());
                    Ok::<_, Error>(())
                })?;
                drop(ticket);
            }
        }
        Ok(records)
    }

    fn key(&self, kind: u8, rest: &[u8]) -> Vec<u8> {
        let mut key = Vec::with_capacity(self.prefix.len() + 1 + rest.len());
        key.extend_from_slice(&self.prefix);
        key.push(kind);
        key.extend_from_slice(rest);
        key
    }

    fn record_key(&self, name: &str) -> Vec<u8> {
        self.key(b'r', name.as_bytes())
    }

    fn child_key(&self, parent_id: u64, child: &str) -> Vec<u8> {
        let mut rest = parent_id.to_be_bytes().to_vec();
        rest.extend_from_slice(child.as_bytes());
        self.key(b'c', &rest)
    }

    /// The record of `name`.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Record>, Error> {
        self.db
            .get(&self.record_key(name))?
            .map(|value| Record::decode(name.as_bytes(), &value))
            .transpose()
    }

    pub(crate) fn require(&self, name: &str) -> Result<Record, Error> {
        self.get(name)?.ok_or_else(|| Error::NotFound {
            key: name.to_owned(),
        })
    }

    /// All records in order of key.
    pub(crate) fn all(&self) -> Result<Vec<Record>, Error> {
        let prefix = self.key(b'r', &[]);
        self.db
            .scan(&prefix)?
            .iter()
            .map(|(key, value)| Record::decode(&key[prefix.len()..], value))
            .collect()
    }

    /// What the record of `draft` would be with directory `id`; nothing is written.
    pub(crate) fn plan(&self, draft: &Draft, id: u64) -> Result<Record, Error> {
        let exists = self.db.get(&self.record_key(&draft.key))?.is_some();
        let parent = match &draft.parent {
            Some(parent) => self.get(parent)?,
            None => None,
        };
        build(draft, id, exists, parent)
    }

    /// Writes the record planned, if what it was planned on still stands.
    pub(crate) fn insert(&self, draft: &Draft, planned: &Record) -> Result<Durable, Error> {
        let (_, ticket) = self.db.update(|tx| {
            let exists = tx.contains(&self.record_key(&draft.key))?;
            let parent = match &draft.parent {
                Some(parent) => self.get_in(tx, parent)?,
                None => None,
            };
            let record = build(draft, planned.id, exists, parent)?;
            if record.parent_ids != planned.parent_ids {
                // Removed and made anew under the same name in between.
                return Err(Error::ParentNotFound {
                    parent: draft.parent.clone().unwrap_or_default(),
                });
            }
            if let Some(parent_id) = record.parent_ids.first() {
                tx.put(self.child_key(*parent_id, &draft.key), []);
            }
            tx.put(self.record_key(&draft.key), planned.encode());
            Ok::<_, Error>(())
        })?;
        Ok(ticket)
    }

    fn get_in(&self, tx: &Tx<'_>, name: &str) -> Result<Option<Record>, Error> {
        tx.get(&self.record_key(name))?
            .map(|value| Record::decode(name.as_bytes(), &value))
            .transpose()
    }

    fn require_in(&self, tx: &Tx<'_>, name: &str) -> Result<Record, Error> {
        self.get_in(tx, name)?.ok_or_else(|| Error::NotFound {
            key: name.to_owned(),
        })
    }

    /// Turns active `key` into committed `name`.
    pub(crate) fn commit(
        &self,
        name: &str,
        key: &str,
        options: &CommitOptions,
        usage: Usage,
    ) -> Result<Durable, Error> {
        let (_, ticket) = self.db.update(|tx| {
            let mut record = self.require_in(tx, key)?;
            check_active(&record)?;
            if tx.contains(&self.record_key(name))? {
                return Err(Error::AlreadyExists {
                    key: name.to_owned(),
                });
            }
            let rebase = options.parent.as_deref().filter(|p| !p.is_empty());
            if let Some(parent) = rebase
                && record.info.parent.as_deref() != Some(parent)
            {
                self.rebase(tx, &mut record, parent)?;
            }
            if let Some(parent_id) = record.parent_ids.first().copied() {
                tx.delete(self.child_key(parent_id, key));
                tx.put(self.child_key(parent_id, name), []);
            }
            let now = SystemTime::now();
            record.info.kind = Kind::Committed;
            record.info.labels = options.labels.clone();
            record.info.created_at = now;
            record.info.updated_at = now;
            record.usage = usage;
            tx.delete(self.record_key(key));
            tx.put(self.record_key(name), record.encode());
            Ok::<_, Error>(())
        })?;
        Ok(ticket)
    }

    fn rebase(&self, tx: &Tx<'_>, record: &mut Record, parent: &str) -> Result<(), Error> {
        if record.info.parent.is_some() {
            return Err(Error::Invalid {
                reason: "cannot change parent of active snapshot: invalid argument".to_owned(),
            });
        }
        let base = self
            .get_in(tx, parent)?
            .ok_or_else(|| Error::ParentNotFound {
                parent: parent.to_owned(),
            })?;
        if base.info.kind != Kind::Committed {
            return Err(Error::Precondition {
                reason: format!(
                    "parent \"{parent}\" is not committed snapshot: failed precondition"
                ),
            });
        }
        record.info.parent = Some(parent.to_owned());
        record.parent_ids = chain(&base);
        Ok(())
    }

    /// Removes a record without children and returns it.
    pub(crate) fn remove(&self, name: &str) -> Result<(Record, Durable), Error> {
        self.db.update(|tx| {
            let record = self.require_in(tx, name)?;
            if tx.any(&self.child_key(record.id, ""))? {
                return Err(Error::HasChildren {
                    key: name.to_owned(),
                });
            }
            if let Some(parent_id) = record.parent_ids.first() {
                tx.delete(self.child_key(*parent_id, name));
            }
            tx.delete(self.record_key(name));
            Ok(record)
        })
    }

    /// Changes labels and returns the new record.
    pub(crate) fn update(&self, name: &str, labels: LabelUpdate) -> Result<Record, Error> {
        let (record, ticket) = self.db.update(|tx| {
            let mut record = self.require_in(tx, name)?;
            match labels {
                LabelUpdate::Replace(labels) => record.info.labels = labels,
                LabelUpdate::Merge(changes) => {
                    for (key, value) in changes {
                        match value {
                            Some(value) => record.info.labels.insert(key, value),
                            None => record.info.labels.remove(&key),
                        };
                    }
                }
            }
            record.info.labels.retain(|_, value| !value.is_empty());
            record.info.updated_at = SystemTime::now();
            tx.put(self.record_key(name), record.encode());
            Ok::<_, Error>(record)
        })?;
        drop(ticket);
        Ok(record)
    }

    /// A ticket for everything written so far.
    pub(crate) fn durable(&self) -> Durable {
        self.db.durable()
    }
}

fn chain(parent: &Record) -> Vec<u64> {
    let mut ids = Vec::with_capacity(parent.parent_ids.len() + 1);
    ids.push(parent.id);
    ids.extend_from_slice(&parent.parent_ids);
    ids
}

/// Only active snapshots are committed.
pub(crate) fn check_active(record: &Record) -> Result<(), Error> {
    if record.info.kind == Kind::Active {
        Ok(())
    } else {
        Err(Error::NotActive {
            key: record.info.name.clone(),
        })
    }
}

fn build(draft: &Draft, id: u64, exists: bool, parent: Option<Record>) -> Result<Record, Error> {
    if exists {
        return Err(Error::AlreadyExists {
            key: draft.key.clone(),
        });
    }
    let parent_ids = match (&draft.parent, parent) {
        (None, _) => Vec::new(),
        (Some(name), None) => {
            return Err(Error::ParentNotFound {
                parent: name.clone(),
            });
        }
        (Some(name), Some(parent)) => {
            if parent.info.kind != Kind::Committed {
                return Err(Error::ParentNotCommitted {
                    parent: name.clone(),
                });
            }
            chain(&parent)
        }
    };
    let now = SystemTime::now();
    Ok(Record {
        id,
        parent_ids,
        info: Info {
            kind: draft.kind,
            name: draft.key.clone(),
            parent: draft.parent.clone(),
            labels: draft.labels.clone(),
            created_at: now,
            updated_at: now,
        },
        usage: Usage::default(),
    })
}

#[cfg(test)]
mod tests;
