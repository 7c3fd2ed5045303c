//! Managed mount activations: mounts that the kernel alone cannot do.
//!
//! A mount's type may carry prefixes, applied left to right: `format/` fills templates in from
//! what is mounted already, `mkfs/` makes a filesystem image first, `mkdir/` makes directories (all
//! three: `lighter_snapshotter::mount::ready`); type `loop` attaches a file to a loop device (`loopdev.rs`).
//! Everything up to the last mount that needs any of this is mounted here (`manager.rs`), the rest
//! is the caller's.
//!
//! | below `<state>/io.containerd.mount-manager.v1.bolt/` | what |
//! |---|---|
//! | `<n>/record.json` | name, namespace, labels, mounts; written before the first mount |
//! | `<n>/<index>` | mount point of the mount at `index`, or a link to its loop device |
//!
//! Mounts die with the boot and so does this directory: nothing is kept elsewhere. A record that
//! does not say `complete` belongs to an activation that was cut off; it is undone at start.

mod activation;
mod loopdev;
mod manager;
mod record;

pub use activation::{Activate, Activation, Active};
pub(crate) use manager::needed;
pub use manager::{Error, Mounts};
