//! Checkpoint and restore through the `criu` program.
//!
//! The images directory holds CRIU's own files and `descriptors.json`: what descriptors 0, 1 and 2 of init were, so that
//! a restored container's streams can be connected to those of the restoring process.

pub(crate) mod cli;
mod dump;
mod restore;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::mount::options::Options;
use crate::mount::{attach, target};
use crate::spec::{Linux, Spec};

/// Name of the file with init's descriptors.
const DESCRIPTORS: &str = "descriptors.json";

/// The host's file over masked files, which is also its name in CRIU's images, as in runc's.
const MASK: &str = "/dev/null";

/// Bytes of CRIU's log that go into an error.
const LOG_TAIL: usize = 600;

/// Namespaces that can be somebody else's: as a spec names them, as CRIU does, and runc's label for CRIU's images.
const EXTERNAL: [(&str, &str, &str); 2] = [
    ("network", "net", "extRootNetNS"),
    ("pid", "pid", "extRootPidNS"),
];

/// A namespace of somebody else's that the container is in: CRIU neither writes nor makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Joined<'a> {
    /// CRIU's name of its kind, which is that of its file below `/proc`.
    kind: &'static str,
    label: &'static str,
    path: &'a str,
}

/// What can be said about dumping and restoring alike.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choices {
    pub(crate) images: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) tcp_established: bool,
    pub(crate) external_unix_sockets: bool,
    pub(crate) shell_job: bool,
    pub(crate) file_locks: bool,
    pub(crate) link_remap: bool,
    pub(crate) auto_dedup: bool,
    pub(crate) lazy_pages: bool,
    pub(crate) manage_cgroups: Option<String>,
}

impl Choices {
    /// `criu VERB` with what was chosen.
    fn command(&self, verb: &str, log: &str) -> Command {
        let mut command = Command::new("criu");
        command
            .arg(verb)
            .arg("--images-dir")
            .arg(&self.images)
            .arg("--work-dir")
            .arg(&self.work);
        command.args(["--log-file", log, "-v4"]);
        let switches = [
            (self.tcp_established, "--tcp-established"),
            (self.external_unix_sockets, "--ext-unix-sk"),
            (self.shell_job, "--shell-job"),
            (self.file_locks, "--file-locks"),
            (self.link_remap, "--link-remap"),
            (self.auto_dedup, "--auto-dedup"),
            (self.lazy_pages, "--lazy-pages"),
        ];
        command.args(
            switches
                .into_iter()
                .filter(|(on, _)| *on)
                .map(|(_, name)| name),
        );
        command.arg(format!(
            "--manage-cgroups={}",
            self.manage_cgroups.as_deref().unwrap_or("soft")
        ));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    fn run(&self, mut command: Command, verb: &str, log: &str) -> Result<()> {
        let status = command.status().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::Unsupported(format!(
                "{verb} needs the program criu, which is not on the PATH"
            )),
            _ => Error::Io {
                what: "run criu".into(),
                source: error,
            },
        })?;
        if status.success() {
            return Ok(());
        }
        let path = self.work.join(log);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
        let mut tail = errors.join("; ");
        if let Some(start) = tail.len().checked_sub(LOG_TAIL) {
            let start = (start..tail.len())
                .find(|at| tail.is_char_boundary(*at))
                .unwrap_or(0);
            tail.drain(..start);
        }
        Err(Error::State(format!(
            "criu failed: {verb} {status}: see {}: {tail}",
            path.display()
        )))
    }

    fn make_directories(&self) -> Result<()> {
        for directory in [&self.images, &self.work] {
            std::fs::create_dir_all(directory)
                .context(|| format!("mkdir {}", directory.display()))?;
        }
        Ok(())
    }
}

/// Mounts of the container that come from outside: (place inside, source on the host).
fn external_mounts(spec: &Spec, bundle: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut external = Vec::new();
    for mount in &spec.mounts {
        let options = Options::parse(&mount.options)?;
        if attach::is_bind(mount, &options) && !options.remount {
            external.push((
                target::clean(&mount.destination),
                bundle.join(&mount.source),
            ));
        }
    }
    Ok(external)
}

/// Namespaces that the container joined.
fn joined(linux: &Linux) -> Vec<Joined<'_>> {
    let theirs = linux.namespaces.iter().filter(|n| !n.path.is_empty());
    let known = theirs.filter_map(|namespace| {
        let &(_, kind, label) = EXTERNAL
            .iter()
            .find(|(name, _, _)| *name == namespace.kind)?;
        Some(Joined {
            kind,
            label,
            path: &namespace.path,
        })
    });
    known.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_joined_namespaces_are_external() {
        let linux: Linux = serde_json::from_str(
            r#"{"namespaces":[{"type":"pid"},{"type":"uts","path":"/u"},{"type":"network","path":"/n"}]}"#,
        )
        .unwrap();
        let network = Joined {
            kind: "net",
            label: "extRootNetNS",
            path: "/n",
        };
        assert_eq!(joined(&linux), [network]);
    }
}
