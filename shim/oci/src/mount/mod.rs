//! Mounts of a container, made with descriptors: options parsed to bits, targets resolved beneath the root
//! filesystem, filesystems created detached and attached with `move_mount`.

pub(crate) mod attach;
pub(crate) mod cgroup;
pub(crate) mod copy_up;
pub(crate) mod idmap;
pub(crate) mod options;
pub(crate) mod target;
