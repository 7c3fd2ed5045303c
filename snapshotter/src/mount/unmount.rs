//! Undoing mounts.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount as umount2};

use super::mountinfo::entries_below;
use super::{Error, is_mountpoint};

/// How long a busy mount is retried before it is only detached.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause between retries.
const RETRY: Duration = Duration::from_millis(10);

/// Unmounts the topmost mount at `path`; nothing happens when there is none.
///
/// A mount that stays busy is detached: it goes away with its last user.
///
/// # Errors
/// When the system refuses for another reason.
pub fn unmount(path: &Path) -> Result<(), Error> {
    once(path).map(|_| ())
}

/// Whether something was unmounted.
fn once(path: &Path) -> Result<bool, Error> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        let flags = if Instant::now() < deadline {
            UnmountFlags::NOFOLLOW
        } else {
            UnmountFlags::NOFOLLOW | UnmountFlags::DETACH
        };
        match umount2(path, flags) {
            Ok(()) => return Ok(true),
            // Not mounted, or not there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(false),
            Err(Errno::BUSY) if !flags.contains(UnmountFlags::DETACH) => {
                // Submounts make it busy for good: no use in waiting for them.
                if has_submounts(path) {
                    return match umount2(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
                        Ok(()) => Ok(true),
                        Err(error) => Err(Error::io("unmount", path)(error.into())),
                    };
                }
                thread::sleep(RETRY);
            }
            Err(error) => return Err(Error::io("unmount", path)(error.into())),
        }
    }
}

fn has_submounts(path: &Path) -> bool {
    entries_below(path).is_ok_and(|found| found.iter().any(|entry| entry.mountpoint != path))
}

/// Unmounts everything stacked at `path`.
///
/// # Errors
/// When the system refuses; a path that does not exist or has no mount is no error.
pub fn unmount_all(path: &Path) -> Result<(), Error> {
    while once(path)? {}
    Ok(())
}

/// Unmounts everything at `path` and below it, newest first.
///
/// # Errors
/// The first refusal, after all others were tried; and when something is mounted there still.
pub fn unmount_recursive(path: &Path) -> Result<(), Error> {
    let path = match path.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("resolve", path)(error)),
    };
    let found = entries_below(&path).map_err(Error::io("read mounts below", &path))?;
    let mut first_error = None;
    for entry in found.iter().rev() {
        if let Err(error) = once(&entry.mountpoint) {
            first_error.get_or_insert(error);
        }
    }
    if let Some(error) = first_error {
        return Err(error);
    }
    if is_mountpoint(&path).map_err(Error::io("read mounts at", &path))? {
        unmount_all(&path)?;
    }
    Ok(())
}
