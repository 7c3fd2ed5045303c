//! What the values of the key space hold: protobuf messages of our own. Numbers are never reused.

use std::collections::BTreeMap;
use std::time::SystemTime;

use lighter_proto::time::{from_nanos, to_nanos};
use prost::Message;
use prost_types::Any;

use crate::{Error, Labels};

#[derive(Clone, PartialEq, Message)]
pub(crate) struct NamespaceRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: Labels,
}

/// When an object came and when it last changed, in nanoseconds since the epoch.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Stamps {
    #[prost(sint64, tag = "1")]
    pub(crate) created: i64,
    #[prost(sint64, tag = "2")]
    pub(crate) updated: i64,
}

impl Stamps {
    pub(crate) fn now() -> Self {
        Self::at(SystemTime::now())
    }

    pub(crate) fn at(time: SystemTime) -> Self {
        let nanos = to_nanos(time);
        Self {
            created: nanos,
            updated: nanos,
        }
    }

    pub(crate) fn touch(&mut self) {
        self.updated = to_nanos(SystemTime::now());
    }

    pub(crate) fn created_at(self) -> SystemTime {
        from_nanos(self.created)
    }

    pub(crate) fn updated_at(self) -> SystemTime {
        from_nanos(self.updated)
    }
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RuntimeRecord {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) options: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContainerRecord {
    #[prost(message, required, tag = "1")]
    pub(crate) stamps: Stamps,
    #[prost(btree_map = "string, string", tag = "2")]
    pub(crate) labels: Labels,
    #[prost(string, tag = "3")]
    pub(crate) image: String,
    #[prost(message, required, tag = "4")]
    pub(crate) runtime: RuntimeRecord,
    #[prost(message, required, tag = "5")]
    pub(crate) spec: Any,
    #[prost(string, tag = "6")]
    pub(crate) snapshotter: String,
    #[prost(string, tag = "7")]
    pub(crate) snapshot_key: String,
    #[prost(btree_map = "string, message", tag = "8")]
    pub(crate) extensions: BTreeMap<String, Any>,
    #[prost(string, tag = "9")]
    pub(crate) sandbox_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ImageRecord {
    #[prost(message, required, tag = "1")]
    pub(crate) stamps: Stamps,
    #[prost(btree_map = "string, string", tag = "2")]
    pub(crate) labels: Labels,
    #[prost(string, tag = "3")]
    pub(crate) media_type: String,
    #[prost(string, tag = "4")]
    pub(crate) digest: String,
    #[prost(uint64, tag = "5")]
    pub(crate) size_bytes: u64,
    #[prost(btree_map = "string, string", tag = "6")]
    pub(crate) annotations: Labels,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SandboxRecord {
    #[prost(message, required, tag = "1")]
    pub(crate) stamps: Stamps,
    #[prost(btree_map = "string, string", tag = "2")]
    pub(crate) labels: Labels,
    #[prost(message, required, tag = "3")]
    pub(crate) runtime: RuntimeRecord,
    #[prost(message, optional, tag = "4")]
    pub(crate) spec: Option<Any>,
    #[prost(string, tag = "5")]
    pub(crate) sandboxer: String,
    #[prost(btree_map = "string, message", tag = "6")]
    pub(crate) extensions: BTreeMap<String, Any>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LeaseRecord {
    #[prost(sint64, tag = "1")]
    pub(crate) created: i64,
    #[prost(btree_map = "string, string", tag = "2")]
    pub(crate) labels: Labels,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct BlobRecord {
    #[prost(message, required, tag = "1")]
    pub(crate) stamps: Stamps,
    #[prost(btree_map = "string, string", tag = "2")]
    pub(crate) labels: Labels,
    #[prost(uint64, tag = "3")]
    pub(crate) size_bytes: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct IngestRecord {
    /// Ref in the store below: `<namespace>/<sequence>/<ref>`.
    #[prost(string, tag = "1")]
    pub(crate) backend: String,
    /// Set when the bytes are another namespace's: the digest whose file this keeps.
    #[prost(string, tag = "2")]
    pub(crate) expected: String,
    /// End of its life, in nanoseconds since the epoch; 0: a lease decides.
    #[prost(sint64, tag = "3")]
    pub(crate) expires: i64,
    /// When it was begun and last opened.
    #[prost(message, required, tag = "4")]
    pub(crate) stamps: Stamps,
    /// Size of the shared file, where `expected` is set.
    #[prost(uint64, tag = "5")]
    pub(crate) size_bytes: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SnapshotRecord {
    #[prost(message, required, tag = "1")]
    pub(crate) stamps: Stamps,
    #[prost(btree_map = "string, string", tag = "2")]
    pub(crate) labels: Labels,
    /// Key in the driver: `<namespace>/<sequence>/<key>`.
    #[prost(string, tag = "3")]
    pub(crate) backend: String,
    /// Client name of the parent; empty for a base.
    #[prost(string, tag = "4")]
    pub(crate) parent: String,
    /// 1 view, 2 active, 3 committed.
    #[prost(uint32, tag = "5")]
    pub(crate) kind: u32,
    /// Set on an active snapshot while its commit runs below, so that a commit which a crash
    /// interrupted is finished at the next start.
    #[prost(message, optional, tag = "6")]
    pub(crate) committing: Option<Committing>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Committing {
    /// Client name it gets.
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    /// Key it gets in the driver.
    #[prost(string, tag = "2")]
    pub(crate) backend: String,
    #[prost(btree_map = "string, string", tag = "3")]
    pub(crate) labels: Labels,
    /// Client name of its parent then.
    #[prost(string, tag = "4")]
    pub(crate) parent: String,
}

/// Decodes a value; `what` names its object in the error.
pub(crate) fn decode<M: Message + Default>(
    value: &[u8],
    what: impl FnOnce() -> String,
) -> Result<M, Error> {
    M::decode(value).map_err(|_| Error::Damaged { what: what() })
}
