//! Image verifier plugins: executables that let an image in or not, after it was resolved and
//! before anything of it is fetched.
//!
//! Upstream: plugin `io.containerd.image-verifier.v1.bindir`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tracing::{debug, warn};

use super::Error;
use crate::image::Descriptor;

/// Most bytes of a verifier's reason.
const MAX_REASON_BYTES: u64 = 32 << 10;
const MEDIA_TYPE: &str = "application/vnd.oci.descriptor.v1+json";

/// Where verifiers are and how they are run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifierConfig {
    /// Every executable in it is asked, in order of name. Absent or empty: every image is let in.
    pub bin_dir: PathBuf,
    /// At most so many are asked; negative: all.
    pub max_verifiers: i64,
    /// How long each may take.
    pub per_verifier_timeout: Duration,
}

impl Default for VerifierConfig {
    fn default() -> Self {
        Self {
            bin_dir: "/opt/containerd/image-verifier/bin".into(),
            max_verifiers: 10,
            per_verifier_timeout: Duration::from_secs(10),
        }
    }
}

impl VerifierConfig {
    /// Asks every verifier about `name`, which resolved to `target`.
    pub(super) async fn verify(&self, name: &str, target: &Descriptor) -> Result<(), Error> {
        let bin_dir = self.bin_dir.clone();
        let listed = tokio::task::spawn_blocking(move || executables(&bin_dir)).await;
        let mut verifiers =
            listed
                .expect("listing does not panic")
                .map_err(|error| Error::Verifier {
                    reason: format!("{}: {error}", self.bin_dir.display()),
                })?;
        if let Ok(most) = usize::try_from(self.max_verifiers)
            && verifiers.len() > most
        {
            warn!(bin_dir = %self.bin_dir.display(), most, "more verifiers than are asked");
            verifiers.truncate(most);
        }
        for verifier in verifiers {
            let asked =
                tokio::time::timeout(self.per_verifier_timeout, ask(&verifier, name, target));
            let verdict = asked
                .await
                .unwrap_or_else(|_| Ok(Err("timed out".to_owned())))
                .map_err(|error| Error::Verifier {
                    reason: format!("{}: {error}", verifier.display()),
                })?;
            if let Err(reason) = verdict {
                return Err(Error::Blocked {
                    what: format!("{name} with digest {}", target.digest),
                    reason: format!("verifier {} rejected image: {reason}", file_name(&verifier)),
                });
            }
        }
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn executables(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `Ok(Err(reason))` is a rejection. Dropping the future kills the verifier.
async fn ask(
    verifier: &Path,
    name: &str,
    target: &Descriptor,
) -> std::io::Result<Result<(), String>> {
    let mut child = Command::new(verifier)
        .args(["-name", name, "-digest", target.digest.as_str()])
        .args(["-stdin-media-type", MEDIA_TYPE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let question = serde_json::to_vec(&target.to_wire())?;
    let mut stdin = child.stdin.take().expect("piped");
    let stdout = child.stdout.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let feed = async move {
        // A verifier that does not read its input may still decide.
        let _ = stdin.write_all(&question).await;
        drop(stdin);
    };
    let ((), reason, complaint, status) =
        tokio::join!(feed, limited(stdout), limited(stderr), child.wait());
    if !complaint.is_empty() {
        debug!(verifier = %verifier.display(), stderr = %complaint, "verifier says");
    }
    Ok(if status?.success() {
        Ok(())
    } else {
        Err(reason.trim().to_owned())
    })
}

/// The start of what comes; the rest is read and dropped, so that nobody blocks on a full pipe.
async fn limited(mut from: impl tokio::io::AsyncRead + Unpin) -> String {
    let mut kept = Vec::new();
    let _ = (&mut from)
        .take(MAX_REASON_BYTES)
        .read_to_end(&mut kept)
        .await;
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dir: &Path, name: &str, script: &str) {
        lighter_testing::executable(dir.join(name), format!("#!/bin/sh\n{script}\n"))
            .expect("write");
    }

    fn config(dir: &Path) -> VerifierConfig {
        VerifierConfig {
            bin_dir: dir.to_owned(),
            max_verifiers: 10,
            per_verifier_timeout: Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn all_must_agree_and_the_reason_is_told() {
        let dir = tempfile::tempdir().expect("tempdir");
        let target = Descriptor::of("t", b"x");
        let config = config(dir.path());
        config.verify("n", &target).await.expect("nobody objects");
        put(dir.path(), "a", "cat >/dev/null; test \"$2\" = n");
        config.verify("n", &target).await.expect("accepted");
        put(dir.path(), "b", "echo unsigned; exit 1");
        let error = config.verify("n", &target).await.expect_err("rejected");
        let text = error.to_string();
        assert!(
            text.starts_with("image verifier bindir blocked pull of n with digest sha256:"),
            "{text}"
        );
        assert!(
            text.ends_with("for reason: verifier b rejected image: unsigned"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_verifier_that_hangs_rejects() {
        let dir = tempfile::tempdir().expect("tempdir");
        put(dir.path(), "slow", "exec sleep 60");
        let mut config = config(dir.path());
        config.per_verifier_timeout = Duration::from_millis(100);
        let error = config
            .verify("n", &Descriptor::of("t", b"x"))
            .await
            .expect_err("rejected");
        assert!(error.to_string().contains("timed out"));
    }
}
