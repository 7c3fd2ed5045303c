//! Where each record lives in the key space.
//!
//! Every key of the metadata starts with `m` and the letter of its table; names follow, each but
//! the last escaped and ended so that keys sort as the tuples of their names (`00` becomes `00 ff`,
//! `00 01` ends a name). The last name is raw, so a table lists in byte order of it.
//!
//! | letter | names | value |
//! |---|---|---|
//! | `v` | | version of this schema, decimal text |
//! | `q` | | first sequence number that was never handed out, u64 BE |
//! | `n` | namespace | `NamespaceRecord` |
//! | `c` | namespace, id | `ContainerRecord` |
//! | `i` | namespace, name | `ImageRecord` |
//! | `x` | namespace, id | `SandboxRecord` |
//! | `l` | namespace, id | `LeaseRecord` |
//! | `r` | namespace, lease, kind, id | empty: the lease holds the resource |
//! | `b` | namespace, digest | `BlobRecord` |
//! | `g` | namespace, ref | `IngestRecord` |
//! | `d` | digest, namespace, ref | empty: the namespace keeps the file, by its record (empty ref) or by an ingest |
//! | `s` | namespace, snapshotter, key | `SnapshotRecord` |
//! | `p` | namespace, snapshotter, parent, key | empty: `key` is a child of `parent` |
//! | `k` | snapshotter, backend key | empty: the driver's snapshot has a record |
//!
//! Version 1. A database of a newer version is refused; an older one would be migrated where it is
//! opened.

use lighter_kv::Key;

use crate::{Digest, Namespace};

/// First byte of every key.
pub(crate) const PREFIX: u8 = b'm';
/// Version that this code writes.
pub(crate) const SCHEMA_VERSION: u32 = 1;

/// Letters of the tables.
pub(crate) mod table {
    pub(crate) const VERSION: u8 = b'v';
    pub(crate) const SEQUENCE: u8 = b'q';
    pub(crate) const NAMESPACES: u8 = b'n';
    pub(crate) const CONTAINERS: u8 = b'c';
    pub(crate) const IMAGES: u8 = b'i';
    pub(crate) const SANDBOXES: u8 = b'x';
    pub(crate) const LEASES: u8 = b'l';
    pub(crate) const RESOURCES: u8 = b'r';
    pub(crate) const BLOBS: u8 = b'b';
    pub(crate) const INGESTS: u8 = b'g';
    pub(crate) const HOLDERS: u8 = b'd';
    pub(crate) const SNAPSHOTS: u8 = b's';
    pub(crate) const CHILDREN: u8 = b'p';
    pub(crate) const BACKEND: u8 = b'k';
}

/// Builds a key name by name.
#[derive(Debug, Clone)]
pub(crate) struct Builder(Key);

impl Builder {
    pub(crate) fn new(table: u8) -> Self {
        let mut key = Vec::with_capacity(96);
        key.extend_from_slice(&[PREFIX, table]);
        Self(key)
    }

    /// Adds a name that others follow.
    pub(crate) fn name(mut self, name: &str) -> Self {
        for &byte in name.as_bytes() {
            self.0.push(byte);
            if byte == 0 {
                self.0.push(0xff);
            }
        }
        self.0.extend_from_slice(&[0, 1]);
        self
    }

    /// Adds the last name.
    pub(crate) fn last(mut self, name: &str) -> Key {
        self.0.extend_from_slice(name.as_bytes());
        self.0
    }

    /// The key so far: a prefix of every key that goes on from here.
    pub(crate) fn prefix(self) -> Key {
        self.0
    }
}

/// Takes a key apart name by name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    /// The table's letter and the names of a key of ours.
    pub(crate) fn of(key: &'a [u8]) -> Option<(u8, Self)> {
        match key {
            [PREFIX, table, names @ ..] => Some((*table, Self(names))),
            _ => None,
        }
    }

    /// The next name that others follow.
    pub(crate) fn name(&mut self) -> Option<String> {
        let mut name = Vec::new();
        let mut at = 0;
        loop {
            match (self.0.get(at)?, self.0.get(at + 1)) {
                (0, Some(1)) => {
                    self.0 = &self.0[at + 2..];
                    return String::from_utf8(name).ok();
                }
                (0, Some(0xff)) => {
                    name.push(0);
                    at += 2;
                }
                (0, _) => return None,
                (&byte, _) => {
                    name.push(byte);
                    at += 1;
                }
            }
        }
    }

    /// The last name.
    pub(crate) fn last(self) -> Option<&'a str> {
        std::str::from_utf8(self.0).ok()
    }
}

pub(crate) fn in_namespace(table: u8, namespace: &Namespace) -> Builder {
    Builder::new(table).name(namespace.as_str())
}

pub(crate) fn namespace(namespace: &Namespace) -> Key {
    Builder::new(table::NAMESPACES).last(namespace.as_str())
}

/// Key of an object that has one name in its namespace.
pub(crate) fn object(table: u8, namespace: &Namespace, name: &str) -> Key {
    in_namespace(table, namespace).last(name)
}

/// Prefix of what a lease holds.
pub(crate) fn resources(namespace: &Namespace, lease: &str) -> Builder {
    in_namespace(table::RESOURCES, namespace).name(lease)
}

pub(crate) fn blob(namespace: &Namespace, digest: &Digest) -> Key {
    object(table::BLOBS, namespace, digest.as_str())
}

/// Key that says that `namespace` keeps the file; `reference` of the ingest, empty for the record.
pub(crate) fn holder(digest: &str, namespace: &Namespace, reference: &str) -> Key {
    Builder::new(table::HOLDERS)
        .name(digest)
        .name(namespace.as_str())
        .last(reference)
}

pub(crate) fn holders(digest: &str) -> Builder {
    Builder::new(table::HOLDERS).name(digest)
}

pub(crate) fn snapshots(namespace: &Namespace, snapshotter: &str) -> Builder {
    in_namespace(table::SNAPSHOTS, namespace).name(snapshotter)
}

pub(crate) fn children(namespace: &Namespace, snapshotter: &str, parent: &str) -> Builder {
    in_namespace(table::CHILDREN, namespace)
        .name(snapshotter)
        .name(parent)
}

pub(crate) fn backend(snapshotter: &str, key: &str) -> Key {
    Builder::new(table::BACKEND).name(snapshotter).last(key)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_sort_and_come_apart_as_tuples(
            a in "[\u{0}\u{1}ab]{0,4}", b in "[\u{0}\u{1}ab]{0,4}",
            c in "[\u{0}\u{1}ab]{0,4}", d in "[\u{0}\u{1}ab]{0,4}",
        ) {
            let one = Builder::new(b't').name(&a).last(&b);
            let two = Builder::new(b't').name(&c).last(&d);
            prop_assert_eq!(one.cmp(&two), (&a, &b).cmp(&(&c, &d)));
            let (table, mut parts) = Parts::of(&one).unwrap();
            prop_assert_eq!(table, b't');
            prop_assert_eq!(parts.name(), Some(a));
            prop_assert_eq!(parts.last(), Some(b.as_str()));
        }
    }
}
