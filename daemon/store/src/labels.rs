//! Labels: their rules, how masks change them, and the name of every label we give meaning to.

use std::collections::BTreeMap;

/// Labels of an object. A value is never empty: writing an empty value removes the key.
pub type Labels = BTreeMap<String, String>;

/// Most bytes of key and value together.
pub const MAX_BYTES: usize = 4096;

/// Root of collection: any non-empty value keeps the object.
pub const GC_ROOT: &str = "containerd.io/gc.root";
/// When a lease, image or activation stops protecting (RFC 3339).
pub const GC_EXPIRE: &str = "containerd.io/gc.expire";
/// On a lease: only what it lists is kept, labels are not followed.
pub const GC_FLAT: &str = "containerd.io/gc.flat";
/// Prefix of references from a blob to blobs.
pub const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";
/// Prefix of references to snapshots; the snapshotter's name follows after a dot.
pub const GC_REF_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot";
/// Prefix of references to images.
pub const GC_REF_IMAGE: &str = "containerd.io/gc.ref.image";
/// Prefix of back references; a kind follows.
pub const GC_BREF: &str = "containerd.io/gc.bref.";
/// On compressed layers: digest of what they hold.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Prefix: repositories of a registry host the blob came from.
pub const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source";
/// On a prepared snapshot: the committed name it is meant to become.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// Prefix of labels that reach snapshot drivers.
pub const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";
/// On a namespace: its blobs may be imported by others.
pub const NAMESPACE_SHAREABLE: &str = "containerd.io/namespace.shareable";
