//! Manifests, platforms, and unpacking of images into snapshots.
//!
//! `manifest`, `platform`, `media` and `children` are pure. [`Fetcher`] brings blobs into the
//! content store, [`Unpacker`] turns layers into snapshots; both share one piece of work among all
//! who need it (see [`Locks`]) and leave nothing that the next attempt could not use.

mod apply;
pub mod children;
mod descriptor;
mod error;
mod fetch;
mod inspect;
mod locks;
pub mod manifest;
pub mod media;
pub mod platform;
mod progress;
mod unpack;

pub(crate) use self::apply::blocking;
pub use self::apply::{Applied, Applier};
pub use self::descriptor::Descriptor;
pub use self::error::Error;
pub use self::fetch::{FetchOptions, Fetcher, Origin};
pub use self::inspect::{Completeness, Resolved, check, resolve, sizes};
pub(crate) use self::inspect::{document, wanted};
pub use self::locks::{Held, Locks};
pub use self::platform::{Matcher, Platform};
pub use self::progress::{Event, Tracker};
pub use self::unpack::{Snapshotters, UnpackTarget, Unpacked, Unpacker, chain_ids};
