//! Files behind loop devices. A device frees itself with its last user, so nothing is to be undone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Error;
use crate::sys::{self, LoopOptions};

/// Tries to win a free device against other processes.
const ATTEMPTS: usize = 100;

/// Binds `path` to a free loop device. Keep the file open until the device is mounted.
pub(super) fn attach(path: &Path, options: LoopOptions) -> Result<(PathBuf, File), Error> {
    let backing = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .open(path)
        .map_err(Error::io("open loop file", path))?;
    let control_path = Path::new("/dev/loop-control");
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(control_path)
        .map_err(Error::io("open", control_path))?;
    let mut last = io::Error::from(io::ErrorKind::ResourceBusy);
    for _ in 0..ATTEMPTS {
        let number = sys::loop_get_free(control.as_fd())
            .map_err(Error::io("find free loop device", control_path))?;
        let device_path = PathBuf::from(format!("/dev/loop{number}"));
        let device = match OpenOptions::new().read(true).write(true).open(&device_path) {
            Ok(device) => device,
            // Another process may have taken and removed it, or udev has not made the node yet.
            Err(error) => {
                last = error;
                std::thread::yield_now();
                continue;
            }
        };
        match sys::loop_configure(
            device.as_fd(),
            backing.as_fd(),
            options,
            path.as_os_str().as_bytes(),
        ) {
            Ok(()) => return Ok((device_path, device)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
            Err(error) => return Err(Error::io("set up loop device for", path)(error)),
        }
    }
    Err(Error::io("set up loop device for", path)(last))
}
