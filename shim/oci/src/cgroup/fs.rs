//! Reading and writing files of the cgroup filesystems.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use crate::error::{Context, Result};

/// Largest cgroup file that is read, in bytes: `cgroup.procs` of a large container.
const MAX_FILE: u64 = 8 << 20;

/// Times a busy directory is removed again; waits grow from 50 us to 64 ms, about 1.2 s in all.
const REMOVE_TRIES: u32 = 28;

/// Writes a value with one write(2), which is what these files want.
pub(super) fn write(directory: &Path, file: &str, value: &str) -> Result<()> {
    let path = directory.join(file);
    let what = || format!("failed to write {value:?} to {}", path.display());
    let mut file = File::options().write(true).open(&path).context(what)?;
    file.write_all(value.as_bytes()).context(what)
}

/// A file that takes several values, each with one write(2) from its start.
pub(super) struct Written {
    path: std::path::PathBuf,
    file: File,
}

impl Written {
    pub(super) fn open(directory: &Path, file: &str) -> Result<Self> {
        let path = directory.join(file);
        let file = File::options()
            .write(true)
            .open(&path)
            .context(|| format!("open {}", path.display()))?;
        Ok(Self { path, file })
    }

    pub(super) fn write(&mut self, value: &str) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        self.file
            .write_all_at(value.as_bytes(), 0)
            .context(|| format!("failed to write {value:?} to {}", self.path.display()))
    }
}

/// Reads a file without the newline at its end.
pub(super) fn read(directory: &Path, file: &str) -> Result<String> {
    let path = directory.join(file);
    let what = || format!("read {}", path.display());
    let mut text = String::new();
    File::open(&path)
        .context(what)?
        .take(MAX_FILE)
        .read_to_string(&mut text)
        .context(what)?;
    text.truncate(text.trim_end().len());
    Ok(text)
}

/// A file holding one number; `max` and numbers too large are `u64::MAX`. Absent or unreadable: `None`.
pub(super) fn number(directory: &Path, file: &str) -> Option<u64> {
    let text = read(directory, file).ok()?;
    match text.as_str() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// A file of `key value` lines.
pub(super) fn pairs(directory: &Path, file: &str) -> Vec<(String, u64)> {
    let text = read(directory, file).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            line.split_once(' ')
                .and_then(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?)))
        })
        .collect()
}

/// Processes of a directory and all below it.
pub(super) fn processes(directory: &Path) -> Result<Vec<i32>> {
    let text = match read(directory, "cgroup.procs") {
        Ok(text) => text,
        // Gone, or a threaded v2 group, whose processes are listed above it.
        Err(error)
            if matches!(
                error.os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
            ) =>
        {
            String::new()
        }
        Err(error) => return Err(error),
    };
    let mut pids: Vec<i32> = text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect();
    for below in subdirectories(directory) {
        pids.extend(processes(&below)?);
    }
    Ok(pids)
}

fn subdirectories(directory: &Path) -> Vec<std::path::PathBuf> {
    // A directory without any below has two links; listing its fifty files is skipped.
    use std::os::unix::fs::MetadataExt;
    if std::fs::symlink_metadata(directory).is_ok_and(|found| found.nlink() == 2) {
        return Vec::new();
    }
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::<_, std::io::Error>::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a directory and those below it.
pub(super) fn remove(directory: &Path) -> Result<()> {
    let mut wait = Duration::from_micros(50);
    let mut tries = 0;
    loop {
        match std::fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if tries >= REMOVE_TRIES || error.raw_os_error() != Some(libc::EBUSY) => {
                return Err(error).context(|| format!("remove cgroup {}", directory.display()));
            }
            Err(_) => {
                for below in subdirectories(directory) {
                    remove(&below)?;
                }
            }
        }
        if tries > 0 {
            std::thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_millis(64));
        }
        tries += 1;
    }
}
