//! Which daemon a run is about, and where its programs are.

use std::path::PathBuf;

/// The daemon under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Ours, from this build.
    Lighter,
    /// The reference on the machine's PATH.
    Containerd,
}

impl Subject {
    /// The subject of this run: `SUBJECT=lighter` (default) or `SUBJECT=containerd`.
    ///
    /// # Panics
    /// For another value: a run about nothing must not pass.
    #[must_use]
    pub fn of_run() -> Self {
        match std::env::var("SUBJECT").as_deref() {
            Err(_) | Ok("" | "lighter") => Self::Lighter,
            Ok("containerd") => Self::Containerd,
            Ok(other) => panic!("SUBJECT={other}: want lighter or containerd"),
        }
    }

    /// Its daemon program.
    #[must_use]
    pub fn daemon(self) -> PathBuf {
        match self {
            Self::Lighter => built("lighterd"),
            Self::Containerd => PathBuf::from("containerd"),
        }
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Lighter => "lighter",
            Self::Containerd => "containerd",
        }
    }
}

/// The OCI runtime that containers of this run are given where a test names none: `RUNTIME=runc`, or
/// another program. Without it, the subject's own choice.
#[must_use]
pub fn runtime() -> Option<String> {
    std::env::var("RUNTIME")
        .ok()
        .filter(|name| !name.is_empty())
}

/// A program of this workspace: in `LIGHTER_BIN_DIR`, or where cargo put it beside this test.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("LIGHTER_BIN_DIR") {
        return PathBuf::from(dir).join(name);
    }
    let mut dir = std::env::current_exe().unwrap_or_default();
    // …/target/<profile>/deps/<test> → …/target/<profile>/<name>
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    dir.join(name)
}
