//! Checkpoints: what criu wrote, as a blob, and a blob back as what criu reads.

use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use lighter_proto::any;
use lighter_proto::containerd::runc::v1::{CheckpointOptions, Options};
use lighter_proto::containerd::types::Descriptor;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_store::metadata::{Container, Content};
use lighter_store::{Digest, Error as StoreError, Labels, Scope};
use prost::Message as _;
use prost_types::Any;

use super::bundle::Bundle;
use super::create::CreateTask;
use super::error::Error;
use super::manager::Manager;
use super::shared::Shared;
use crate::image::blocking;
use crate::ingest::{Chunks, ingest};

/// Media type of criu's files in a tar.
const CRIU_TAR: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
/// Media type of the container's spec beside them.
const CONFIG: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
/// On the descriptor: a directory to restore from in place of the blob.
const RESTORE_FROM: &str = "RestoreFromPath";
/// Most files of a checkpoint.
const MAX_FILES: usize = 100_000;

impl Manager {
    /// Writes a checkpoint of a task: as two blobs, or, when the options name a directory, there
    /// and with no blob.
    ///
    /// # Errors
    /// `NotFound`, the shim's own, or why a blob could not be written.
    pub async fn checkpoint(
        &self,
        scope: &Scope,
        container: &Container,
        options: Option<Any>,
    ) -> Result<Vec<Descriptor>, Error> {
        let task = self.get(&scope.namespace, container.id.as_str()).await?;
        let named = options
            .as_ref()
            .and_then(|options| any::unpack::<CheckpointOptions>(options).ok())
            .map(|options| options.image_path)
            .filter(|path| !path.is_empty());
        if let Some(path) = named {
            task.checkpoint(&path, options).await?;
            return Ok(Vec::new());
        }
        let dir = tempfile::Builder::new()
            .prefix("ctrd-checkpoint")
            .tempdir()
            .map_err(Error::io("mkdir in", std::env::temp_dir()))?;
        task.checkpoint(&dir.path().display().to_string(), options)
            .await?;
        let content = self.shared.db.content();
        let reference = format!("checkpoint-{}-{}", container.id, rand::random::<u64>());
        let images = store_tar(&content, scope, &format!("{reference}-criu"), dir.path()).await?;
        let spec = container.spec.encode_to_vec();
        let config = store_bytes(&content, scope, &format!("{reference}-config"), spec).await?;
        Ok(vec![images, config])
    }
}

async fn store_bytes(
    content: &Content,
    scope: &Scope,
    reference: &str,
    bytes: Vec<u8>,
) -> Result<Descriptor, Error> {
    let produce = move |out: &mut Chunks| out.write_all(&bytes).map_err(|e| packing(&e));
    let blob = ingest(content, scope, reference, produce, |()| Labels::new()).await?;
    Ok(descriptor(CONFIG, &blob.digest, blob.size_bytes))
}

async fn store_tar(
    content: &Content,
    scope: &Scope,
    reference: &str,
    dir: &Path,
) -> Result<Descriptor, Error> {
    let source = dir.to_owned();
    let produce = move |out: &mut Chunks| {
        let mut tar = tar::Builder::new(out);
        // A file with holes would be an entry that no restore takes.
        tar.sparse(false);
        let packed = tar.append_dir_all(".", &source).and_then(|()| tar.finish());
        packed.map_err(|e| packing(&e))
    };
    let blob = ingest(content, scope, reference, produce, |()| Labels::new()).await?;
    Ok(descriptor(CRIU_TAR, &blob.digest, blob.size_bytes))
}

fn packing(error: &io::Error) -> WireError {
    WireError::new(ErrorKind::Internal, format!("pack a checkpoint: {error}"))
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        ..Descriptor::default()
    }
}

/// Directory to restore from; empty when nothing is restored. A blob is unpacked into the
/// bundle's work directory, which goes with the task.
pub(super) async fn restore_path(
    shared: &Arc<Shared>,
    bundle: &Bundle,
    task: &CreateTask,
) -> Result<String, Error> {
    let Some(checkpoint) = &task.checkpoint else {
        let options = task.options.as_ref();
        let options = options.and_then(|options| any::unpack::<Options>(options).ok());
        return Ok(options
            .map(|options| options.criu_image_path)
            .unwrap_or_default());
    };
    if let Some(path) = checkpoint.annotations.get(RESTORE_FROM) {
        return Ok(path.clone());
    }
    if checkpoint.media_type != CRIU_TAR {
        return Err(Error::Invalid {
            reason: format!("unsupported checkpoint type {:?}", checkpoint.media_type),
        });
    }
    let digest = Digest::parse(&checkpoint.digest).map_err(StoreError::from)?;
    let scope = Scope::new(bundle.namespace.clone());
    let reader = blocking(shared.db.content().reader(&scope, &digest).await?)?;
    let dir = bundle.work.join("checkpoint");
    let target = dir.clone();
    tokio::task::spawn_blocking(move || unpack(reader, &target))
        .await
        .map_err(|_| Error::Stopping)?
        .map_err(Error::io("unpack checkpoint into", &dir))?;
    Ok(dir.display().to_string())
}

/// Unpacks regular files and directories; anything else, or a path that leaves `dir`, is refused.
fn unpack(reader: impl Read, dir: &Path) -> io::Result<()> {
    let refuse = |path: &Path, what: &str| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {what} in a checkpoint", path.display()),
        )
    };
    std::fs::create_dir(dir)?;
    let mut archive = tar::Archive::new(reader);
    for (count, entry) in archive.entries()?.enumerate() {
        if count >= MAX_FILES {
            return Err(refuse(dir, "too many files"));
        }
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let mut inside = PathBuf::new();
        for part in path.components() {
            match part {
                Component::Normal(name) => inside.push(name),
                Component::CurDir => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    return Err(refuse(&path, "a path that leads out"));
                }
            }
        }
        let target = dir.join(inside);
        // No links are made, so no path below leads anywhere else.
        match entry.header().entry_type() {
            tar::EntryType::Directory => std::fs::create_dir_all(&target)?,
            tar::EntryType::Regular => {
                if let Some(parent) = target.parent() {
                    std::fs::create_dir_all(parent)?;
                }
                let mut file = std::fs::File::create_new(&target)?;
                io::copy(&mut entry, &mut file)?;
            }
            _ => return Err(refuse(&path, "something else than files and directories")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_with(path: &str, kind: tar::EntryType) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(1);
        header.set_mode(0o600);
        // Written past the crate's own checks, as a stranger would.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        let mut tar = tar::Builder::new(Vec::new());
        tar.append(&header, &b"x"[..]).unwrap();
        tar.into_inner().unwrap()
    }

    #[test]
    fn only_files_below_are_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let good = tar_with("core-1.img", tar::EntryType::Regular);
        unpack(&good[..], &dir.path().join("a")).unwrap();
        assert_eq!(
            std::fs::read(dir.path().join("a/core-1.img")).unwrap(),
            b"x"
        );
        for (n, path) in ["../x", "/x"].into_iter().enumerate() {
            let bad = tar_with(path, tar::EntryType::Regular);
            let target = dir.path().join(format!("b{n}"));
            assert!(unpack(&bad[..], &target).is_err(), "{path}");
        }
        let link = tar_with("l", tar::EntryType::Symlink);
        assert!(unpack(&link[..], &dir.path().join("c")).is_err());
        assert!(!dir.path().join("x").exists());
    }
}
