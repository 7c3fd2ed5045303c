//! What tests of every crate need, and nothing else may use.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// Puts a program at `path`: `content` as it is, mode 0755.
///
/// A test that writes such a file itself holds it open for writing meanwhile, and so does, until
/// it calls execve, every child that another thread of the test starts in that moment: the program
/// then fails with "Text file busy" (execve(2), `ETXTBSY`). Here only a child of its own, awaited,
/// ever has the file open.
///
/// # Errors
/// When the shell cannot be started or the file cannot be written.
pub fn executable(path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> io::Result<()> {
    let path = path.as_ref();
    let mut shell = Command::new("/bin/sh")
        .args(["-ec", "cat >\"$0\"; chmod 0755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()?;
    let mut to = shell
        .stdin
        .take()
        .ok_or_else(|| io::Error::other("no pipe"))?;
    let written = to.write_all(content.as_ref());
    drop(to);
    let status = shell.wait()?;
    written?;
    if status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{}: the shell that writes it ended with {status}",
        path.display()
    )))
}

/// Copies the program `from` to `to`, as [`executable`] does.
///
/// # Errors
/// As [`executable`], or when `from` cannot be read.
pub fn copy_executable(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
    executable(to, std::fs::read(from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_run_while_other_threads_start_children() {
        let dir = std::env::temp_dir().join(format!("lighter-testing-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    Command::new("/bin/true").status().unwrap();
                }
            });
            for round in 0..50 {
                let path = dir.join(round.to_string());
                executable(&path, "#!/bin/sh\nexit 7\n").unwrap();
                let status = Command::new(&path).status();
                if round == 49 || status.is_err() {
                    done.store(true, std::sync::atomic::Ordering::Relaxed);
                }
                assert_eq!(status.unwrap().code(), Some(7));
            }
        });
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_told() {
        let error = executable("/nonexistent/program", "").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/program"));
    }
}
