//! Which file a shim's binary is: found by the name of a runtime, and known again until it changes.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::error::Error;

/// The runtime that every client asks for unless told otherwise.
pub(super) const RUNC_RUNTIME: &str = "io.containerd.runc.v2";
/// The shim that serves it, in place of `containerd-shim-runc-v2`.
const OUR_SHIM: &str = "containerd-shim-lighter-v2";

/// Which file a binary was; any upgrade changes at least one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    size: u64,
}

impl Identity {
    /// Of the file at `path`, if there is one.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let meta = std::fs::metadata(path).ok()?;
        Some(Self {
            device: meta.dev(),
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            size: meta.size(),
        })
    }
}

/// Whether a shim is ours by its name, which is how it says that it can be warm.
pub(super) fn is_ours(shim: &Path) -> bool {
    shim.file_name() == Some(OsStr::new(OUR_SHIM))
}

/// The shim's binary for a runtime name (`io.containerd.runc.v2`) or an absolute path. The
/// default runtime is served by our own shim wherever it is installed; containerd's is chosen
/// by its path.
///
/// # Errors
/// When the name is none or nothing is installed under it.
pub(super) fn resolve(runtime: &str, daemon: &Path) -> Result<PathBuf, Error> {
    let fail = |reason: String| Err(Error::Runtime { reason });
    if runtime.is_empty() {
        return fail("no runtime name".to_owned());
    }
    if Path::new(runtime).is_absolute() {
        return match std::fs::metadata(runtime) {
            Ok(meta) if meta.is_file() => Ok(PathBuf::from(runtime)),
            Ok(_) => fail(format!(
                "invalid custom binary path {runtime:?}: not a file"
            )),
            Err(error) => fail(format!("invalid custom binary path {runtime:?}: {error}")),
        };
    }
    let Some(name) = shim_name(runtime) else {
        return fail(format!(
            "invalid runtime name {runtime}, correct runtime name should be either format like `io.containerd.runc.v2` or a full path to the binary"
        ));
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = daemon.parent().map(Path::to_owned);
    // Beside our own binary first: an upgraded daemon must not run the shim of the old one.
    let search = |name: &OsStr| {
        own.clone()
            .into_iter()
            .chain(std::env::split_paths(&path))
            .map(|dir| dir.join(name))
            .find(|file| executable(file))
    };
    let ours = (runtime == RUNC_RUNTIME)
        .then(|| search(OsStr::new(OUR_SHIM)))
        .flatten();
    match ours.or_else(|| search(&name)) {
        Some(file) => Ok(file),
        None => fail(format!(
            "runtime {runtime:?} binary not installed {name:?}: file does not exist"
        )),
    }
}

/// `containerd-shim-<name>-<version>` of a runtime name: its last two components.
fn shim_name(runtime: &str) -> Option<OsString> {
    if runtime.contains('/') {
        return None;
    }
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next()?, parts.next()?);
    let whole = runtime.split('.').all(|part| !part.is_empty());
    whole.then(|| format!("containerd-shim-{name}-{version}").into())
}

fn executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtime_names_become_binaries() {
        let name = |n: &str| shim_name(n).map(|s| s.into_string().unwrap());
        assert_eq!(
            name("io.containerd.runc.v2").as_deref(),
            Some("containerd-shim-runc-v2")
        );
        assert_eq!(name("kata.v2").as_deref(), Some("containerd-shim-kata-v2"));
        for bad in ["runc", ".v2", "a/b.v2", "io..v2", ""] {
            assert_eq!(name(bad), None, "{bad}");
        }
    }
}
