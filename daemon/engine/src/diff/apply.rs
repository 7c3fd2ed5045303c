//! Applying a layer to mounts.
//!
//! Where the bytes go is decided here: straight into the upper directory of a single overlay mount
//! (which needs no mount at all), straight into the source of a single writable bind, or into the
//! mounts as mounted, without a path of their own where the kernel allows.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use lighter_snapshotter::Mount;
use lighter_snapshotter::mount::{Access, Detached};
use prost_types::Any;

use super::processors::{self, Processor};
use super::tar::Archive;
use super::tree::{is_empty, open_root};
use super::unpack::{Base, Form, LeansOn, Unpack, in_user_namespace};
use super::whiteout::Attributes;
use super::{Error, erofs, pipeline};

/// Bytes a layer may unpack to before its ratio is looked at.
const RATIO_FREE_BYTES: u64 = 64 << 20;

/// How a layer is applied.
#[derive(Debug, Clone, Default)]
pub struct ApplyOptions<'a> {
    /// Write everything to disk before it is reported applied.
    pub sync_fs: bool,
    /// Stream processors of the configuration; they come before the built-in decompression.
    pub processors: &'a [Processor],
    /// Payloads for processors, by id.
    pub payloads: BTreeMap<String, Any>,
    /// Bounds on what a layer may become.
    pub limits: Limits,
    /// Where temporary mountpoints may be made; the system's temporary directory when `None`.
    pub temp_dir: Option<PathBuf>,
}

/// Bounds on a layer; none by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Bytes of the uncompressed stream.
    pub max_size_bytes: Option<u64>,
    /// Uncompressed bytes per byte of the blob, once 64 MiB are exceeded.
    pub max_ratio: Option<u32>,
}

/// What was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the uncompressed stream, `sha256:<hex>`.
    pub diff_id: String,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// What it would have wanted to know of the layers below, where it was not given them.
    pub leans_on: LeansOn,
}

/// Unpacks the layer `reader` of type `media_type` into `mounts`.
///
/// The stream is read to its end, past the end of the archive. Blocks.
///
/// # Errors
/// See [`Error`]. What was written before a failure stays: the snapshot is to be thrown away.
pub fn apply<R: Read + Send>(
    reader: R,
    media_type: &str,
    mounts: &[Mount],
    options: &ApplyOptions<'_>,
) -> Result<Applied, Error> {
    let compressed = Arc::new(AtomicU64::new(0));
    let reader = Counted {
        reader,
        count: Arc::clone(&compressed),
    };
    let limits = options.limits;
    let check = move |size: u64| limits.check(size, compressed.load(Ordering::Relaxed));
    if let Some(packing) = erofs::packing(media_type) {
        return erofs::apply(reader, packing?, mounts, options, check);
    }
    let target = Target::open(mounts, options)?;
    let (leans_on, hashed) = thread::scope(|scope| {
        let (stream, running) = processors::open(scope, reader, media_type, options)?;
        let result = pipeline::run(stream, check, |plain| {
            Unpack::new(target.root.as_fd(), target.form, target.base).all(&mut Archive::new(plain))
        });
        // A failed processor explains whatever its output led to.
        running.finish(result.is_ok())?;
        result
    })?;
    if options.sync_fs {
        rustix::fs::syncfs(&target.root).map_err(Error::io("sync", b"/"))?;
    }
    Ok(Applied {
        diff_id: hashed.digest,
        size_bytes: hashed.size_bytes,
        leans_on,
    })
}

impl Limits {
    fn check(self, size: u64, compressed: u64) -> Result<(), Error> {
        if let Some(max) = self.max_size_bytes
            && size > max
        {
            return Err(Error::TooLarge {
                limit: format!("{max} bytes"),
            });
        }
        if let Some(ratio) = self.max_ratio
            && size > RATIO_FREE_BYTES
            && size / u64::from(ratio.max(1)) > compressed
        {
            return Err(Error::TooLarge {
                limit: format!("{ratio} times its compressed size"),
            });
        }
        Ok(())
    }
}

/// Counts what was read of the blob.
struct Counted<R> {
    reader: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buf)?;
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Where entries are written.
struct Target {
    root: OwnedFd,
    form: Form,
    base: Base,
    /// Keeps a mount alive as long as `root` is used.
    _mounted: Option<Detached>,
}

impl Target {
    fn open(mounts: &[Mount], options: &ApplyOptions<'_>) -> Result<Self, Error> {
        if let [mount] = mounts
            && mount.target.is_empty()
        {
            let upper = mount.option("upperdir");
            if let Some(upper) = upper
                && mount.fstype == "overlay"
                && !in_user_namespace()
            {
                return Self::upper(mount, upper);
            }
            let shifted = mount.option("uidmap").is_some() || mount.option("gidmap").is_some();
            if mount.fstype == "bind" && !shifted && !mount.has("ro") {
                let root = open_root(&mount.source)?;
                return Self::plain(root, None);
            }
        }
        let temp_dir = options.temp_dir.clone().unwrap_or_else(std::env::temp_dir);
        let mounted = Detached::new(mounts, Access::AsGiven, &temp_dir)?;
        let root = mounted
            .root()
            .try_clone_to_owned()
            .map_err(Error::io("open", b"/"))?;
        Self::plain(root, Some(mounted))
    }

    fn plain(root: OwnedFd, mounted: Option<Detached>) -> Result<Self, Error> {
        let base = if is_empty(root.as_fd())? {
            Base::Empty
        } else {
            Base::Filled
        };
        Ok(Self {
            root,
            form: Form::Plain,
            base,
            _mounted: mounted,
        })
    }

    fn upper(mount: &Mount, upper: &str) -> Result<Self, Error> {
        let root = open_root(upper)?;
        let base = if is_empty(root.as_fd())? {
            Base::Empty
        } else {
            Base::Filled
        };
        let attributes = if mount.has("userxattr") {
            Attributes::User
        } else {
            Attributes::Trusted
        };
        Ok(Self {
            root,
            form: Form::Overlay {
                attributes,
                lower: mount.lower_dirs(),
            },
            base,
            _mounted: None,
        })
    }
}

#[cfg(test)]
mod tests;
