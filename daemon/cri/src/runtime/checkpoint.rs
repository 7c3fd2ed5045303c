//! Writing a running container to an archive, for forensics and for another machine to go on with.
//!
//! The archive is a tar with `checkpoint/` (what criu wrote), `rootfs-diff.tar` (the writable
//! layer), `spec.dump`, `config.dump` and `status.dump` (JSON), `status`, and `container.log`. The
//! container runs on. Everything is put together in a directory of its own below the container's
//! and appears at its location at once, whole or not at all.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lighter_engine::diff::{self, CompareOptions, LAYER_TAR};
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::CheckpointOptions;
use lighter_proto::errdefs::{ErrorKind, render};
use lighter_proto::runtime::v1::ContainerState;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::files::remove_dirs;
use crate::error::{Error, Result, io as io_error};
use crate::plugin::Plugin;
use crate::store::Container;

/// Oldest criu that can do it: 3.16.
const CRIU_MIN: (u32, u32) = (3, 16);
/// How long criu may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(5);

/// `Version: 3.17.1` as numbers.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text.lines().find_map(|l| l.strip_prefix("Version:"))?;
    let mut parts = version.trim().split('.');
    let major = parts.next()?.parse().ok()?;
    Some((major, parts.next().map_or(Some(0), |p| p.parse().ok())?))
}

fn rfc3339(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// Copies a regular file; one that is missing is none. Links are not followed.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = File::options().read(true).custom_flags(flags).open(from);
    let mut source = match opened {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !source.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut target = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    io::copy(&mut source, &mut target)?;
    Ok(())
}

/// Packs a directory at `location`.
fn pack(dir: &Path, location: &Path) -> Result<()> {
    let failed = io_error("write checkpoint archive", location);
    let parent = location.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        // Beside it, readable by root alone: it holds the container's memory.
        let mut partial = tempfile::Builder::new()
            .prefix(".checkpoint-")
            .tempfile_in(parent)?;
        let mut tar = tar::Builder::new(io::BufWriter::new(partial.as_file_mut()));
        tar.follow_symlinks(false);
        // A file with holes would be an entry that no restore takes.
        tar.sparse(false);
        tar.append_dir_all("", dir)?;
        tar.into_inner()?.flush()?;
        partial.as_file().sync_all()?;
        partial.persist(location).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(failed)
}

impl Plugin {
    /// Whether checkpoints can be written and restored here.
    pub(super) async fn check_criu(&self) -> Result<()> {
        if !self.config.runtime.enable_criu {
            return Err(Error::unknown(
                "criu support is disabled by configuration (enable_criu)",
            ));
        }
        let mut command = tokio::process::Command::new("criu");
        command.arg("--version").kill_on_drop(true);
        let answer = tokio::time::timeout(VERSION_LIMIT, command.output()).await;
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::unknown(
                    "criu binary not found in PATH; install criu for checkpoints",
                ));
            }
            Ok(Err(e)) => return Err(Error::unknown(format!("failed to run criu: {e}"))),
            Err(_) => return Err(Error::unknown("criu --version does not answer")),
        };
        match parse_version(&String::from_utf8_lossy(&answer.stdout)) {
            Some(version) if version >= CRIU_MIN => Ok(()),
            version => Err(Error::unknown(format!(
                "checkpoint/restore requires at least CRIU {}.{}, current version is {version:?}",
                CRIU_MIN.0, CRIU_MIN.1
            ))),
        }
    }

    /// Writes a container that runs to an archive at `location`. `limit` bounds what the shim
    /// takes; zero does not.
    pub(super) async fn checkpoint_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        location: &str,
        limit: Duration,
    ) -> Result<()> {
        let failed =
            |e: Error| e.context(format!("failed to checkpoint container {:?}", container.id));
        self.check_criu().await.map_err(failed)?;
        let location = PathBuf::from(location);
        if !location.is_absolute() || location.file_name().is_none() {
            return Err(Error::invalid(format!(
                "checkpoint location {location:?} is not the absolute path of a file"
            )));
        }
        let _turn = container
            .busy
            .take("CheckpointContainer", &container.name)
            .await?;
        let status = container.status();
        if status.state != ContainerState::ContainerRunning {
            return Err(Error::unknown(format!(
                "container {:?} is in {} state. only CONTAINER_RUNNING containers can be \
                 checkpointed",
                container.id,
                status.state.as_str_name()
            )));
        }
        let dir = self.container_root(&container.id).join("ctrd-checkpoint");
        remove_dirs([dir.clone()]).await?;
        let written = self
            .write_checkpoint(container, &dir, &location, limit)
            .await;
        remove_dirs([dir.clone()]).await?;
        written.map_err(failed)
    }

    async fn write_checkpoint(
        self: &Arc<Self>,
        container: &Arc<Container>,
        dir: &Path,
        location: &Path,
        limit: Duration,
    ) -> Result<()> {
        let images = dir.join("checkpoint");
        tokio::fs::create_dir_all(&images)
            .await
            .map_err(io_error("create", &images))?;
        let Some(task) = self.task(&container.id).await? else {
            return Err(Error::not_found(format!("task {} not found", container.id)));
        };
        let options = any::pack(&CheckpointOptions {
            exit: false,
            work_path: dir.display().to_string(),
            ..CheckpointOptions::default()
        });
        let path = images.display().to_string();
        let work = task.checkpoint(&path, Some(options));
        let done = if limit.is_zero() {
            work.await
        } else {
            tokio::time::timeout(limit, work).await.map_err(|_| {
                let message = format!("criu takes longer than {} s", limit.as_secs());
                Error::new(ErrorKind::DeadlineExceeded, message)
            })?
        };
        done?;
        self.describe_checkpoint(container, dir).await?;
        self.write_layer(container, &dir.join("rootfs-diff.tar"))
            .await?;
        let (dir, location) = (dir.to_owned(), location.to_owned());
        let packed = tokio::task::spawn_blocking(move || pack(&dir, &location)).await;
        packed.map_err(|e| Error::unknown(e.to_string()))?
    }

    /// The JSON files, the status file and the log.
    async fn describe_checkpoint(&self, container: &Arc<Container>, dir: &Path) -> Result<()> {
        let record = self.db.containers().get(&self.scope, &container.id)?;
        let status = self.status_of(container);
        let image = status.image.as_ref().map(|i| i.image.clone());
        let config = json!({
            "id": container.id,
            "name": container.name,
            "rootfsImage": image,
            "rootfsImageRef": status.image_ref,
            "rootfsImageName": image,
            "runtime": record.runtime.name,
            "createdTime": rfc3339(record.created_at),
            "checkpointedTime": rfc3339(SystemTime::now()),
            "restoredTime": "0001-01-01T00:00:00Z",
            "restored": false,
        });
        let files = [
            ("spec.dump", record.spec.value),
            ("config.dump", config.to_string().into_bytes()),
            (
                "status.dump",
                self.json.write(&status)?.to_string().into_bytes(),
            ),
        ];
        for (name, bytes) in files {
            let path = dir.join(name);
            tokio::fs::write(&path, bytes)
                .await
                .map_err(io_error("write", &path))?;
        }
        let known = self.container_root(&container.id).join("status");
        let copies = [
            (Some(known), dir.join("status")),
            (container.log_path.clone(), dir.join("container.log")),
        ];
        let copied = tokio::task::spawn_blocking(move || {
            for (from, to) in copies {
                if let Some(from) = from {
                    copy_file(&from, &to).map_err(io_error("copy", &from))?;
                }
            }
            Ok(())
        });
        copied.await.map_err(|e| Error::unknown(e.to_string()))?
    }

    /// What the container changed of its image, as a layer.
    async fn write_layer(&self, container: &Container, path: &Path) -> Result<()> {
        let snapshots = self.db.snapshots(&container.snapshotter)?;
        let info = snapshots.stat(&self.scope, &container.id).await?;
        let upper = snapshots.mounts(&self.scope, &container.id).await?;
        let view = format!("{}-checkpoint", container.id);
        let parent = info.parent.as_deref();
        // Held like all of the pod's, so that no collection takes it meanwhile.
        let scope = self.scope.with_lease(&container.pod_id);
        let lower = snapshots
            .view(&scope, &view, parent, lighter_store::Labels::new())
            .await?;
        let options = CompareOptions {
            media_type: LAYER_TAR.to_owned(),
            temp_dir: Some(self.state.clone()),
            ..CompareOptions::default()
        };
        let path = path.to_owned();
        let compared = tokio::task::spawn_blocking(move || {
            let file = File::create_new(&path).map_err(io_error("create", &path))?;
            let mut out = io::BufWriter::new(file);
            diff::compare(&lower, &upper, &options, &mut out)
                .map_err(|e| Error::unknown(render(&e)))?;
            out.flush().map_err(io_error("write", &path))
        });
        let compared = compared.await;
        self.delete_snapshot(&container.snapshotter, &view).await?;
        compared.map_err(|e| Error::unknown(e.to_string()))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criu_says_its_version() {
        assert_eq!(parse_version("Version: 3.17.1\nGitID: x\n"), Some((3, 17)));
        assert_eq!(parse_version("Version: 4\n"), Some((4, 0)));
        assert_eq!(parse_version("nonsense"), None);
    }

    /// GHSA-rgh6-rfwx-v388: what lies in a container's directory may be a link planted there.
    #[test]
    fn links_are_not_followed_into_a_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let (link, to) = (dir.path().join("container.log"), dir.path().join("copy"));
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(copy_file(&link, &to).is_err());
        assert!(!to.exists());
        copy_file(&dir.path().join("missing"), &to).unwrap();
        assert!(
            copy_file(dir.path(), &to).is_err(),
            "a directory is no file"
        );
    }

    #[test]
    fn an_archive_appears_whole() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("config.dump"), "{}").unwrap();
        let location = dir.path().join("out.tar");
        pack(&source, &location).unwrap();
        let mut archive = tar::Archive::new(File::open(&location).unwrap());
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert!(names.contains(&"config.dump".to_owned()), "{names:?}");
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2);
        assert!(pack(&source, &dir.path().join("no/such/out.tar")).is_err());
    }
}
