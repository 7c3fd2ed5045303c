//! Containers made of a checkpoint in place of an image.
//!
//! `ContainerConfig.image` may name an archive that `CheckpointContainer` wrote, by its absolute
//! path, or an image that holds the files of one and says so in an annotation. The container is made
//! from the image that the checkpoint was based on, which must be here already, and from the request
//! alone: of the archive nothing reaches its spec, its labels or the image store. Until it is started
//! it keeps what a restore needs in a directory of its own, which is also how a daemon knows after a
//! restart that the container is to be restored:
//!
//! | `<root>/containers/<id>/ctrd-restore/` | |
//! |---|---|
//! | `checkpoint/` | criu's images |
//! | `rootfs-diff.tar` | the writable layer; gone once it is applied |
//! | `container.log` | the log so far; gone once it is in the new log |
//! | `container.log.start` | length of the new log before that, in digits |
//!
//! criu believes its images: what runs afterwards has the rights that they say, whatever the request
//! says. So this is off unless `enable_experimental_restore_via_create` is set, and what was made while
//! it was is not started once it is off.
//!
//! Upstream: CRI's `CreateContainer` up to containerd 2.3 · Differs: labels and annotations of the
//! archive are not taken over, and a base image that is missing is not pulled.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use lighter_engine::diff::{self, ApplyOptions, LAYER_TAR};
use lighter_engine::image::{self, Descriptor, Matcher};
use lighter_proto::containerd::types;
use lighter_proto::errdefs::{ErrorKind, render};
use lighter_proto::runtime::v1::ContainerConfig;
use lighter_snapshotter::Mount;
use lighter_snapshotter::mount::{Access, TempMount};
use lighter_store::{Digest, Labels};
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::archive::{self, CHECKPOINT, CONFIG, LAYER, LOG};
use super::files::remove_dirs;
use crate::error::{Error, Result, io as io_error};
use crate::image::Image;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Below a container's directory.
const DIR: &str = "ctrd-restore";
/// In it: where the log so far begins in the new log.
const LOG_START: &str = "container.log.start";
/// On an image that holds a checkpoint: the name of the container.
const ANNOTATION: &str = "org.criu.checkpoint.container.name";
/// On a task's checkpoint: the directory to restore from.
const RESTORE_FROM: &str = "RestoreFromPath";
/// Most bytes of a manifest or index.
const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Most bytes of `config.dump`.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// How much of a stranger's text is shown in an error.
const SHOWN: usize = 200;

/// What a container is made from.
pub(super) enum Origin {
    /// An image.
    Image(Image),
    /// A checkpoint that is an archive.
    Archive(PathBuf),
    /// A checkpoint that is an image.
    Checkpoint(Image),
}

/// The part of `config.dump` that is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Described {
    rootfs_image_ref: String,
    checkpointed_time: String,
}

/// Annotations of a manifest or index.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Annotated {
    annotations: Option<BTreeMap<String, String>>,
}

fn is_annotated(document: &[u8]) -> bool {
    let read = serde_json::from_slice::<Annotated>(document).unwrap_or_default();
    read.annotations
        .is_some_and(|annotations| annotations.contains_key(ANNOTATION))
}

impl Described {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let failed = |why: String| {
            Error::invalid(format!(
                "failed to read {CONFIG:?} of the checkpoint: {why}"
            ))
        };
        let mut text = Vec::new();
        let file = File::open(&path).map_err(|e| failed(e.to_string()))?;
        let read = file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text);
        read.map_err(|e| failed(e.to_string()))?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(failed(format!("more than {MAX_CONFIG_BYTES} bytes")));
        }
        serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))
    }

    /// Digest of the image that the checkpoint is based on: of its manifest or of its config.
    fn base(&self) -> Result<Digest> {
        let reference = self.rootfs_image_ref.as_str();
        let digest = reference.rsplit('@').next().unwrap_or_default();
        Digest::parse(digest).map_err(|_| {
            let shown: String = reference.chars().take(SHOWN).collect();
            Error::invalid(format!(
                "the checkpoint's base image {shown:?} is not named by a digest"
            ))
        })
    }

    /// When the checkpoint was written; `None` where that is no time.
    fn written_at(&self) -> Option<&str> {
        let text = self.checkpointed_time.as_str();
        OffsetDateTime::parse(text, &Rfc3339).ok().map(|_| text)
    }
}

/// Appends what was logged before the checkpoint to the container's log.
fn continue_log(dir: &Path, log: Option<&Path>) -> Result<()> {
    let old = dir.join(LOG);
    let mut from = match File::open(&old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io_error("open", &old))?,
    };
    if let Some(path) = log {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        }
        let opened = File::options()
            .create(true)
            .append(true)
            .mode(0o640)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path);
        let mut to = opened.map_err(io_error("open log", path))?;
        begin_where_begun(dir, &to, path)?;
        io::copy(&mut from, &mut to).map_err(io_error("write log", path))?;
    }
    std::fs::remove_file(&old).map_err(io_error("remove", &old))
}

/// Takes back what an earlier try, which was cut off, appended to the log. Nobody else writes to it
/// before the container runs.
fn begin_where_begun(dir: &Path, log: &File, path: &Path) -> Result<()> {
    let mark = dir.join(LOG_START);
    let length = log.metadata().map_err(io_error("stat log", path))?.len();
    // One that was cut off itself has no digits: then nothing was appended yet.
    let begun = std::fs::read_to_string(&mark).ok();
    match begun.and_then(|text| text.parse::<u64>().ok()) {
        Some(start) if start < length => log.set_len(start).map_err(io_error("cut log", path)),
        Some(_) => Ok(()),
        None => std::fs::write(&mark, length.to_string()).map_err(io_error("write", &mark)),
    }
}

/// Applies what the container had written to its root filesystem.
fn apply_layer(dir: &Path, rootfs: &[Mount], temp_dir: &Path) -> Result<()> {
    let path = dir.join(LAYER);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io_error("open", &path))?,
    };
    let options = ApplyOptions {
        temp_dir: Some(temp_dir.to_owned()),
        ..ApplyOptions::default()
    };
    diff::apply(io::BufReader::new(file), LAYER_TAR, rootfs, &options).map_err(|e| {
        Error::unknown(format!(
            "failed to apply {LAYER:?} of the checkpoint: {}",
            render(&e)
        ))
    })?;
    // Only now: one that was cut off is applied again.
    std::fs::remove_file(&path).map_err(io_error("remove", &path))
}

impl Plugin {
    fn restore_dir(&self, id: &str) -> PathBuf {
        self.container_root(id).join(DIR)
    }

    /// What the image of a request is.
    ///
    /// # Errors
    /// `NotFound` when nothing here is called so.
    pub(super) async fn origin(&self, wanted: &str) -> Result<Origin> {
        let restores = self.config.runtime.enable_experimental_restore_via_create;
        if restores && wanted.starts_with('/') {
            let found = tokio::fs::metadata(wanted).await;
            if found.is_ok_and(|found| found.is_file()) {
                return Ok(Origin::Archive(PathBuf::from(wanted)));
            }
        }
        let image = self.images.find(wanted).ok_or_else(|| {
            Error::not_found(format!("failed to resolve image {wanted:?}: not found"))
        })?;
        if restores && self.is_checkpoint(&image).await? {
            return Ok(Origin::Checkpoint(image));
        }
        Ok(Origin::Image(image))
    }

    /// Whether an image says that it holds a checkpoint, in its index or in its manifest.
    async fn is_checkpoint(&self, image: &Image) -> Result<bool> {
        let content = self.db.content();
        let top = content.read(&self.scope, &image.target, MAX_DOCUMENT_BYTES);
        if is_annotated(&top.await?) {
            return Ok(true);
        }
        let record = self.db.images().get(&self.scope, &image.first_name())?;
        let (target, matcher) = (Descriptor::from(record.target), Matcher::host());
        // One for another machine is none that could be restored here.
        let Ok(resolved) = image::resolve(&content, &self.scope, &target, &matcher).await else {
            return Ok(false);
        };
        let manifest = resolved.descriptor.digest;
        if manifest == image.target {
            return Ok(false);
        }
        let below = content.read(&self.scope, &manifest, MAX_DOCUMENT_BYTES);
        Ok(is_annotated(&below.await?))
    }

    /// The image that a container is made from. One that is made of a checkpoint gets what its
    /// restore needs into its directory, and `config` is told.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no checkpoint, `NotFound` when the image that it is based on is
    /// not here. What was made by then is below the container's directory.
    pub(super) async fn base_of(
        &self,
        pod: &Pod,
        id: &str,
        origin: Origin,
        config: &mut ContainerConfig,
        snapshotter: &str,
    ) -> Result<Image> {
        if let Origin::Image(image) = origin {
            return Ok(image);
        }
        let asked = config.image.get_or_insert_default();
        let named = match asked.user_specified_image.as_str() {
            "" => asked.image.clone(),
            name => name.to_owned(),
        };
        let failed = |e: Error| e.context(format!("failed to restore checkpoint {named:?}"));
        let described = self.take_checkpoint(pod, id, origin, snapshotter).await;
        let described = described.map_err(failed)?;
        let base = self.find_base(&described).map_err(failed)?;
        self.check_criu().await.map_err(failed)?;
        asked.image = base.first_name();
        let told = [
            ("restored", "true"),
            ("checkpointedAt", described.written_at().unwrap_or_default()),
            ("checkpointImage", named.as_str()),
        ];
        for (key, value) in told.into_iter().filter(|(_, value)| !value.is_empty()) {
            config.annotations.insert(key.to_owned(), value.to_owned());
        }
        Ok(base)
    }

    /// Fills the container's restore directory.
    async fn take_checkpoint(
        &self,
        pod: &Pod,
        id: &str,
        origin: Origin,
        snapshotter: &str,
    ) -> Result<Described> {
        let dir = self.restore_dir(id);
        match origin {
            Origin::Image(_) => {}
            Origin::Archive(path) => {
                let to = dir.clone();
                in_the_background(move || archive::from_tar(&path, &to)).await?;
            }
            Origin::Checkpoint(image) => self.take_image(pod, id, &image, snapshotter).await?,
        }
        let described = tokio::task::spawn_blocking(move || {
            let described = Described::read(&dir)?;
            let path = dir.join(CONFIG);
            std::fs::remove_file(&path).map_err(io_error("remove", &path))?;
            if !dir.join(CHECKPOINT).is_dir() {
                let missing = format!("it has no directory {CHECKPOINT:?}: not found");
                return Err(Error::invalid(missing));
            }
            Ok(described)
        });
        described.await.map_err(|e| Error::unknown(e.to_string()))?
    }

    /// Fills it from an image that holds a checkpoint.
    async fn take_image(
        &self,
        pod: &Pod,
        id: &str,
        image: &Image,
        snapshotter: &str,
    ) -> Result<()> {
        let Some(chain) = &image.chain_id else {
            return Err(Error::invalid("the image has no layers"));
        };
        let snapshots = self.db.snapshots(snapshotter)?;
        // Held like all of the pod's, so that no collection takes it meanwhile.
        let scope = self.scope.with_lease(&pod.id);
        let view = format!("{id}-restore");
        let parent = Some(chain.as_str());
        let mounts = match snapshots.view(&scope, &view, parent, Labels::new()).await {
            // It was pulled for another snapshotter.
            Err(error) if Error::from_store(&error).is_not_found() => {
                self.images.unpack(image, snapshotter).await?;
                snapshots.view(&scope, &view, parent, Labels::new()).await?
            }
            other => other?,
        };
        let (below, dir) = (self.state.clone(), self.restore_dir(id));
        let taken = in_the_background(move || {
            let mounted = TempMount::new(&below, &mounts, Access::ReadOnly);
            let mounted = mounted.map_err(|e| io::Error::other(render(&e)))?;
            archive::from_directory(mounted.path(), &dir)
        });
        let taken = taken.await;
        self.delete_snapshot(snapshotter, &view).await?;
        taken
    }

    /// The image of this node that a checkpoint is based on.
    fn find_base(&self, described: &Described) -> Result<Image> {
        let digest = described.base()?;
        let id = digest.to_string();
        let mut images = self.images.list().into_iter();
        let found = images.find(|image| image.target == digest || image.id == id);
        found.ok_or_else(|| {
            let shown: String = described.rootfs_image_ref.chars().take(SHOWN).collect();
            Error::not_found(format!(
                "its base image {shown:?} is not on this node, pull it first: not found"
            ))
        })
    }

    fn is_to_be_restored(&self, container: &Container) -> bool {
        // One system call; a thread of its own would cost every start more.
        std::fs::symlink_metadata(self.restore_dir(&container.id)).is_ok()
    }

    /// Whether a container may be started as far as its checkpoint goes.
    ///
    /// # Errors
    /// `FailedPrecondition` when restoring was turned off since it was made of one.
    pub(super) fn check_restore(&self, container: &Container) -> Result<()> {
        if self.config.runtime.enable_experimental_restore_via_create
            || !self.is_to_be_restored(container)
        {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "container {:?} was made of a checkpoint, but enable_experimental_restore_via_create \
                 is off by now: turn it on, or remove the container",
                container.id
            ),
        ))
    }

    /// Makes the root filesystem and the log of a container that is to be restored what they were;
    /// the checkpoint for its task. `None` for one that is just started.
    pub(super) async fn prepare_restore(
        &self,
        container: &Container,
        rootfs: &[Mount],
    ) -> Result<Option<types::Descriptor>> {
        // Where this is off, it was refused if it was to be restored.
        if !self.config.runtime.enable_experimental_restore_via_create
            || !self.is_to_be_restored(container)
        {
            return Ok(None);
        }
        let dir = self.restore_dir(&container.id);
        let annotations = [(
            RESTORE_FROM.to_owned(),
            dir.join(CHECKPOINT).display().to_string(),
        )];
        let (rootfs, temp_dir) = (rootfs.to_vec(), self.state.clone());
        let log = container.log_path.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            apply_layer(&dir, &rootfs, &temp_dir)?;
            continue_log(&dir, log.as_deref())
        });
        prepared
            .await
            .map_err(|e| Error::unknown(e.to_string()))??;
        Ok(Some(types::Descriptor {
            annotations: annotations.into(),
            ..types::Descriptor::default()
        }))
    }

    /// Drops what a restore that is done needed.
    pub(super) async fn forget_restore(&self, id: &str) {
        if let Err(error) = remove_dirs([self.restore_dir(id)]).await {
            tracing::warn!(container_id = %id, %error, "checkpoint not removed");
        }
    }
}

/// Work on files of a checkpoint; what is wrong with them is the request's fault, a full disk is not.
async fn in_the_background(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<()> {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(|e| Error::unknown(e.to_string()))?;
    done.map_err(|e| match e.kind() {
        StorageFull | QuotaExceeded | ReadOnlyFilesystem => Error::unknown(e.to_string()),
        _ => Error::invalid(e.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn an_image_says_that_it_is_a_checkpoint() {
        let with =
            |annotations: &str| format!("{{\"schemaVersion\":2,{annotations}\"layers\":[]}}");
        let named = format!("\"annotations\":{{\"{ANNOTATION}\":\"x\"}},");
        assert!(is_annotated(with(&named).as_bytes()));
        for other in [
            "",
            "\"annotations\":null,",
            "\"annotations\":{\"a\":\"b\"},",
        ] {
            assert!(!is_annotated(with(other).as_bytes()), "{other}");
        }
        assert!(!is_annotated(b"not JSON"));
    }

    #[test]
    fn a_base_is_named_by_its_digest() {
        let described = |reference: &str| Described {
            rootfs_image_ref: reference.to_owned(),
            checkpointed_time: "2026-01-02T03:04:05.6Z".to_owned(),
        };
        for good in [DIGEST.to_owned(), format!("registry/x/y@{DIGEST}")] {
            assert_eq!(described(&good).base().unwrap().to_string(), DIGEST);
        }
        // GHSA-cvxm-645q-p574: a tag is whatever the node's owner says, not what an archive says.
        for bad in ["", "registry/x/y:latest", "x@sha256:12", "@"] {
            assert!(described(bad).base().is_err(), "{bad}");
        }
        assert!(described("").written_at().is_some());
        assert_eq!(Described::default().written_at(), None);
    }

    #[test]
    fn a_description_is_read_with_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Described::read(dir.path()).is_err());
        let path = dir.path().join(CONFIG);
        std::fs::write(&path, r#"{"rootfsImageRef":"x","id":"y"}"#).unwrap();
        assert_eq!(Described::read(dir.path()).unwrap().rootfs_image_ref, "x");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        let error = Described::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }

    #[test]
    fn a_log_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("logs/0.log");
        continue_log(dir.path(), Some(&log)).unwrap();
        assert!(!log.exists());
        std::fs::write(dir.path().join(LOG), "before\n").unwrap();
        continue_log(dir.path(), Some(&log)).unwrap();
        continue_log(dir.path(), Some(&log)).unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"before\n");
        // Cut off after it was appended, or in the middle of that: it is there once.
        for appended in ["before\n", "before\nbef", "before\nbefore\n"] {
            std::fs::write(&log, appended).unwrap();
            std::fs::write(dir.path().join(LOG_START), "7").unwrap();
            std::fs::write(dir.path().join(LOG), "before\n").unwrap();
            continue_log(dir.path(), Some(&log)).unwrap();
            assert_eq!(std::fs::read(&log).unwrap(), b"before\nbefore\n");
        }
        std::fs::write(&log, "before\n").unwrap();
        // A link in place of the log is not followed.
        std::fs::write(dir.path().join(LOG), "again\n").unwrap();
        let link = dir.path().join("logs/1.log");
        std::os::unix::fs::symlink("0.log", &link).unwrap();
        assert!(continue_log(dir.path(), Some(&link)).is_err());
        assert_eq!(std::fs::read(&log).unwrap(), b"before\n");
        continue_log(dir.path(), None).unwrap();
        assert!(!dir.path().join(LOG).exists());
    }
}
