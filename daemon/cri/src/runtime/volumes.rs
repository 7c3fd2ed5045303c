//! Volumes made of images: whole images bound into containers, and the paths that an image's
//! config declares as volumes, which start with the image's own content.
//!
//! An image is mounted once for a pod, at `<state>/image-volumes/<pod>/<digest>`, from a snapshot
//! with that path as its key; the pod's lease holds it. Declared volumes are directories of the
//! container, at `<root>/containers/<id>/volumes/<random>`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1::{ContainerConfig, Mount};
use lighter_snapshotter::mount::{self, Access, TempMount};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use serde_json::Value;

use super::copy::copy_tree;
use super::files::blocking;
use crate::error::{Error, Result, io};
use crate::image::Image;
use crate::plugin::Plugin;
use crate::selinux::label_mounts;
use crate::spec::mounts::bind;
use crate::store::Pod;
use crate::userns;

/// Most volumes that an image's config may declare.
const MAX_DECLARED: usize = 1024;

/// Option of an overlay that syncs nothing. Since Linux 5.10.
const VOLATILE: &str = "volatile";

/// Marks an error as one that the kubelet knows.
fn failed(error: Error) -> Error {
    error.context("failed to mount image volume: ImageVolumeMountFailed")
}

/// The directory `path` below `root`. Nothing on the way may lead out of `root`: neither `..`, nor a
/// link, nor an absolute path, which is one even where the image holds what it names.
///
/// # Errors
/// When it is missing, out of `root` or no directory, in the words that kubelets know.
fn directory_below(root: &Path, path: &str) -> Result<PathBuf> {
    let failed = |why: &dyn std::fmt::Display| {
        Error::unknown(format!(
            "failed to ensure image subpath {path:?} in {:?}: {why}",
            root.display(),
        ))
    };
    let bad = |e: Errno| match e {
        Errno::XDEV => failed(&"path escapes from parent"),
        Errno::NOENT => failed(&format_args!("openat {path}: no such file or directory")),
        other => failed(&std::io::Error::from(other)),
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root_fd = rustix::fs::open(root, flags, Mode::empty()).map_err(bad)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(&root_fd, path, flags, Mode::empty(), resolve).map_err(bad)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found).map_err(bad)?.st_mode);
    if kind != FileType::Directory {
        return Err(failed(&format_args!(
            "only directory subpath is supported, subpath: {path:?}, mountpoint: {:?}",
            root.display()
        )));
    }
    let number = std::os::fd::AsRawFd::as_raw_fd(&found);
    let real = std::fs::read_link(format!("/proc/self/fd/{number}"));
    real.map_err(io("resolve", root))
}

/// Spares overlays with a writable layer, which nobody is let write to here, all syncing: unmounting
/// one would otherwise wait for whatever the file system below has to write.
fn make_volatile(mounts: &mut [lighter_snapshotter::Mount]) {
    for mount in mounts.iter_mut().filter(|m| m.fstype == "overlay") {
        let options = &mut mount.options;
        let writable = options.iter().any(|o| o.starts_with("upperdir="));
        if writable && !options.iter().any(|o| o == VOLATILE) {
            options.push(VOLATILE.to_owned());
        }
    }
}

/// Whether something is mounted at a directory.
fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    let above = path.parent().and_then(device);
    device(path).is_some() && device(path) != above
}

/// `/a//b/` as `/a/b`.
fn clean(path: &str) -> String {
    let parts = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".");
    parts.fold(String::new(), |path, part| format!("{path}/{part}"))
}

impl Plugin {
    fn image_volumes(&self, pod_id: &str) -> PathBuf {
        self.state.join("image-volumes").join(pod_id)
    }

    /// Mounts the images that a container asks for; binds for its spec. The config is told where
    /// they are, and which image each is.
    ///
    /// # Errors
    /// `NotFound` for an image that is not here, else why it could not be mounted.
    pub(super) async fn mount_images(
        &self,
        pod: &Pod,
        config: &mut ContainerConfig,
        snapshotter: &str,
    ) -> Result<Vec<Value>> {
        let mut binds = Vec::new();
        for mount in config.mounts.iter_mut().filter(|m| m.image.is_some()) {
            let source = self.mount_image(pod, mount, snapshotter).await;
            let source = source.map_err(failed)?;
            binds.push(bind(&source, &mount.container_path, "ro"));
            mount.host_path = source.display().to_string();
            // The snapshot has the right owners already.
            mount.uid_mappings.clear();
            mount.gid_mappings.clear();
        }
        Ok(binds)
    }

    async fn mount_image(
        &self,
        pod: &Pod,
        asked: &mut Mount,
        snapshotter: &str,
    ) -> Result<PathBuf> {
        let destination = asked.container_path.clone();
        if !asked.host_path.is_empty() {
            return Err(Error::unknown(format!(
                "hostpath must be empty while mount image: {destination}"
            )));
        }
        if !asked.readonly {
            return Err(Error::unknown(format!(
                "readonly must be true while mount image: {destination}"
            )));
        }
        let wanted = asked.image.as_mut().filter(|image| !image.image.is_empty());
        let Some(wanted) = wanted else {
            return Err(Error::unknown(format!(
                "image not specified in: {destination}"
            )));
        };
        let image = self.images.find(&wanted.image).ok_or_else(|| {
            Error::not_found(format!(
                "failed to resolve image {:?}: not found",
                wanted.image
            ))
        })?;
        wanted.image_ref.clone_from(&image.id);
        let target = self.mounted_image(pod, &image, snapshotter).await?;
        if asked.image_sub_path.is_empty() {
            return Ok(target);
        }
        directory_below(&target, &asked.image_sub_path)
    }

    async fn mounted_image(&self, pod: &Pod, image: &Image, snapshotter: &str) -> Result<PathBuf> {
        let digest = image.target.to_string();
        let name = digest.rsplit(':').next().unwrap_or_default();
        let target = self.image_volumes(&pod.id).join(name);
        // Containers of one pod share it: one of them mounts it.
        let _one = self.volumes.lock().await;
        if is_mounted(&target) {
            return Ok(target);
        }
        let Some(chain) = &image.chain_id else {
            return Err(Error::unknown(format!(
                "image {} has no layers",
                image.first_name()
            )));
        };
        let snapshots = self.db.snapshots(snapshotter)?;
        let key = target.display().to_string();
        let scope = self.scope.with_lease(&pod.id);
        let labels = userns::snapshot_labels(pod.namespace_options());
        let parent = Some(chain.as_str());
        let make = async || {
            let labels = labels.clone();
            if labels.is_empty() {
                snapshots.prepare(&scope, &key, parent, labels).await
            } else {
                // Owners are mapped in layers that nobody writes to.
                snapshots.view(&scope, &key, parent, labels).await
            }
        };
        let mut mounts = match make().await {
            Err(error) if Error::from_store(&error).is(ErrorKind::AlreadyExists) => {
                snapshots.mounts(&scope, &key).await?
            }
            // It was pulled for another snapshotter.
            Err(error) if Error::from_store(&error).is_not_found() => {
                self.images.unpack(image, snapshotter).await?;
                make().await?
            }
            made => made?,
        };
        make_volatile(&mut mounts);
        label_mounts(&mut mounts, pod.mount_label());
        tokio::fs::create_dir_all(&target)
            .await
            .map_err(io("create", &target))?;
        let at = target.clone();
        blocking(move || mount::mount_all(&mounts, &at)).await?;
        Ok(target)
    }

    /// Unmounts the images of a pod; those that are gone are fine.
    pub(super) async fn unmount_images(&self, pod: &Pod) -> Result<()> {
        let base = self.image_volumes(&pod.id);
        let snapshotter = self.snapshotter_of(&pod.handler);
        let Ok(entries) = std::fs::read_dir(&base) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            let (target, at) = (entry.path(), entry.path());
            blocking(move || mount::unmount_all(&at)).await?;
            self.delete_snapshot(&snapshotter, &target.display().to_string())
                .await?;
            tokio::fs::remove_dir(&target)
                .await
                .map_err(io("remove", &target))?;
        }
        tokio::fs::remove_dir(&base)
            .await
            .map_err(io("remove", &base))
    }

    /// Makes the volumes that the image of a container declares; binds for its spec.
    ///
    /// # Errors
    /// When the image's content cannot be copied.
    pub(super) async fn declared_volumes(
        self: &Arc<Self>,
        id: &str,
        config: &ContainerConfig,
        image: &Image,
        rootfs: &[lighter_snapshotter::Mount],
    ) -> Result<Vec<Value>> {
        let declared = &image.process.volumes;
        if declared.is_empty() || self.config.runtime.ignore_image_defined_volumes {
            return Ok(Vec::new());
        }
        if declared.len() > MAX_DECLARED {
            return Err(Error::unknown(format!(
                "image {} declares more than {MAX_DECLARED} volumes",
                image.first_name()
            )));
        }
        let taken: Vec<String> = config
            .mounts
            .iter()
            .map(|m| clean(&m.container_path))
            .collect();
        let mut wanted: Vec<String> = declared.keys().map(|path| clean(path)).collect();
        wanted.retain(|path| !path.is_empty() && !taken.contains(path));
        wanted.dedup();
        let base = self.container_root(id).join("volumes");
        let (below, rootfs) = (self.state.clone(), rootfs.to_vec());
        let made = tokio::task::spawn_blocking(move || {
            let mounted = TempMount::new(&below, &rootfs, Access::ReadOnly)
                .map_err(|e| Error::unknown(lighter_proto::errdefs::render(&e)))?;
            let mut binds = Vec::with_capacity(wanted.len());
            for path in wanted {
                let volume = base.join(hex::encode(rand::random::<[u8; 16]>()));
                std::fs::create_dir_all(&volume).map_err(io("create", &volume))?;
                copy_tree(mounted.path(), &path, &volume).map_err(|e| {
                    Error::unknown(format!(
                        "failed to copy up volume {path:?} of the image: {e}"
                    ))
                })?;
                binds.push(bind(&volume, &path, "rw"));
            }
            Ok(binds)
        });
        made.await.map_err(|e| Error::unknown(e.to_string()))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sub_path_stays_in_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("image");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        std::os::unix::fs::symlink("../../outside", root.join("up")).unwrap();
        std::os::unix::fs::symlink("/a", root.join("absolute")).unwrap();
        let real = std::fs::canonicalize(&root).unwrap();
        assert_eq!(directory_below(&root, "a/b").unwrap(), real.join("a/b"));
        assert_eq!(
            directory_below(&root, "a/../a/b").unwrap(),
            real.join("a/b")
        );
        for (bad, why) in [
            ("file", "only directory subpath is supported"),
            ("missing", "no such file or directory"),
            ("up", "path escapes from parent"),
            ("absolute/b", "path escapes from parent"),
            ("/a", "path escapes from parent"),
            ("a/../..", "path escapes from parent"),
        ] {
            let refused = directory_below(&root, bad).unwrap_err().to_string();
            assert!(refused.contains(why), "{bad}: {refused}");
        }
    }

    #[test]
    fn paths_are_cleaned() {
        assert_eq!(clean("//a/./b/"), "/a/b");
        assert_eq!(clean("/"), "");
    }
}
